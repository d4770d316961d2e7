"""From strings to the tensors that a policy is scored on."""

import torch
from jaxtyping import Shaped
from torch import Tensor

from grpo_core._checks import shape_checked
from grpo_core.types import Tokenizer


@shape_checked
def tokenize_prompt_and_output(
    prompt_strs: list[str], output_strs: list[str], tokenizer: Tokenizer
) -> dict[str, Shaped[Tensor, "batch seq"]]:
    r"""$x = [\text{prompt}; \text{output}]$: inputs $x_{<n}$, labels $x_{>1}$, and the mask of the output's labels.

    Prompt and output are encoded apart, so that the border between them is a border between tokens; no end token is
    added. Rows are padded on the right. The mask comes from lengths and never from ids: an end token that is also the
    padding token stays in the response. An empty output gives a row of False.

    Args:
        prompt_strs: prompts, encoded with the special tokens the tokenizer adds by itself (a BOS, if it has one).
        output_strs: the output to each prompt, encoded without special tokens.
        tokenizer: a Hugging Face tokenizer, or anything with the same `encode`.

    Returns:
        `input_ids` (Int): all tokens but the last column; `labels` (Int): all tokens but the first column;
        `response_mask` (Bool): True where the label is a token of the output. On the CPU, all three of the same shape,
        the longest row's length less one.

    Raises:
        ValueError: if the lists are empty or differ in length, a prompt has no token, or the tokenizer has neither a
            padding nor an end token.

    Example:
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
    pad_id = _pad_id(tokenizer)
    prompts = [_encode_prompt(tokenizer, prompt, index) for index, prompt in enumerate(prompt_strs)]
    outputs = [tokenizer.encode(output, add_special_tokens=False) for output in output_strs]
    longest = max(len(prompt) + len(output) for prompt, output in zip(prompts, outputs, strict=True))
    token_ids = torch.full((len(prompts), longest), pad_id)
    is_output = torch.zeros(token_ids.shape, dtype=torch.bool)
    for row, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        end = len(prompt) + len(output)
        token_ids[row, :end] = torch.tensor(prompt + output)
        is_output[row, len(prompt) : end] = True
    # Copies, lest a caller who writes into the labels writes into the inputs.
    return {
        "input_ids": token_ids[:, :-1].clone(),
        "labels": token_ids[:, 1:].clone(),
        "response_mask": is_output[:, 1:].clone(),
    }


def _pad_id(tokenizer: Tokenizer) -> int:
    """The padding token, else the end token; the mask tells either from a token that was sampled."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return token_id
    raise ValueError("tokenizer has neither pad_token_id nor eos_token_id: set one of them, rows need padding")


def _encode_prompt(tokenizer: Tokenizer, prompt: str, index: int) -> list[int]:
    token_ids = tokenizer.encode(prompt)
    if not token_ids:
        raise ValueError(
            f"prompt_strs[{index}]={prompt!r} has no token: the first token of the output would have nothing to be"
            " predicted from"
        )
    return token_ids
