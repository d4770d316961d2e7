"""Token ids, labels and response masks from prompts and outputs."""

import torch
from jaxtyping import Shaped
from torch import Tensor

from grpo_core._checks import shape_checked
from grpo_core.types import Tokenizer


@shape_checked
def tokenize_prompt_and_output(
    prompt_strs: list[str], output_strs: list[str], tokenizer: Tokenizer
) -> dict[str, Shaped[Tensor, "batch seq"]]:
    r"""Return inputs $x_{<n}$, labels $x_{>1}$ and the mask of output labels for $x = [\text{prompt}; \text{output}]$.

    Prompt and output are encoded separately, so that no token spans their border, and no end token is added. Rows are
    padded on the right. The mask is computed from lengths instead of ids, so that an end token that is also the
    padding token stays in the response. The mask of an empty output is all False.

    Args:
        prompt_strs: prompts, encoded with the special tokens that the tokenizer adds by default, such as a BOS token,
            but without an end token that it appends.
        output_strs: the output for each prompt, encoded without special tokens.
        tokenizer: a Hugging Face tokenizer, or an object with the same `encode`.

    Returns:
        `input_ids` (Int), all columns but the last; `labels` (Int), all columns but the first; `response_mask` (Bool),
        True where the label is a token of the output. All three are on the CPU and have one column less than the
        longest row has tokens.

    Raises:
        ValueError: if the lists are empty or differ in length, a prompt has no token, or the tokenizer has neither a
            padding nor an end token.

    Examples:
        >>> class Letters:
        ...     pad_token_id, eos_token_id = 0, None
        ...     def encode(self, text, *, add_special_tokens=True):
        ...         return [ord(letter) - ord("a") + 1 for letter in text]
        >>> tokenize_prompt_and_output(["ab", "c"], ["c", "d"], Letters())["labels"]
        tensor([[2, 3],
                [4, 0]])
    """
    if len(prompt_strs) != len(output_strs) or not prompt_strs:
        raise ValueError(
            f"prompt_strs has {len(prompt_strs)} entries and output_strs has {len(output_strs)}: give one output per"
            " prompt, and at least one prompt"
        )
    pad_id = _choose_pad_id(tokenizer)
    prompts = [_encode_prompt(tokenizer, prompt, index) for index, prompt in enumerate(prompt_strs)]
    outputs = [tokenizer.encode(output, add_special_tokens=False) for output in output_strs]
    longest = max(len(prompt) + len(output) for prompt, output in zip(prompts, outputs, strict=True))
    token_ids = torch.full((len(prompts), longest), pad_id)
    is_output = torch.zeros(token_ids.shape, dtype=torch.bool)
    for row, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        end = len(prompt) + len(output)
        token_ids[row, :end] = torch.tensor(prompt + output)
        is_output[row, len(prompt) : end] = True
    # Copies, so that writing into the labels does not change the inputs.
    return {
        "input_ids": token_ids[:, :-1].clone(),
        "labels": token_ids[:, 1:].clone(),
        "response_mask": is_output[:, 1:].clone(),
    }


def _choose_pad_id(tokenizer: Tokenizer) -> int:
    """Return the padding token or, without one, the end token; the mask separates both from sampled tokens."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return token_id
    raise ValueError("tokenizer has neither pad_token_id nor eos_token_id: set one of them to pad rows")


def _encode_prompt(tokenizer: Tokenizer, prompt: str, index: int) -> list[int]:
    token_ids = tokenizer.encode(prompt)
    if not token_ids:
        raise ValueError(
            f"prompt_strs[{index}]={prompt!r} has no token, so no logits predict the first token of the output: give a"
            " prompt of at least one token"
        )
    if token_ids[-1] == tokenizer.eos_token_id and len(token_ids) > 1:
        # Some tokenizers end every text with it; a prompt that ends there would have no output.
        of_text = tokenizer.encode(prompt, add_special_tokens=False)
        return token_ids if token_ids[-len(of_text) :] == of_text else token_ids[:-1]
    return token_ids
