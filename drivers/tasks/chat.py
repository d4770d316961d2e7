"""The chat template of an instruct model: a prompt is rendered as the tokenizer's makers have written it down."""

from collections.abc import Mapping, Sequence
from typing import Any

from drivers.common.errors import UsageError

_CONTENT = "Two and two is four."
"""Of a trial message: a template may leave outer space away, and no template has this in it."""


def render(tokenizer: Any, messages: Sequence[Mapping[str, str]], *, to_answer: bool) -> str:
    """The messages as text, special tokens and all; `to_answer` opens the turn that the model is to write."""
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=to_answer)
    except Exception as error:  # a template is a program of somebody else's, and may raise anything
        reason = " ".join(str(error).split())[:300]
        roles = " and ".join(message["role"] for message in messages)
        raise UsageError(
            f"--chat-template: the tokenizer's template refuses messages of {roles} ({reason})"
        ) from error
    return str(text)


def use_end_of_turn_as_eos(tokenizer: Any, model_path: str) -> None:
    """Make the token that ends a turn of the template the tokenizer's end token, and refuse what cannot be asked.

    It need not be the one that the tokenizer names: base models name the one that ends a text, and come with the
    template of the instruct model. Where a template ends a turn with no token, the tokenizer's stays.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError(
            f"--chat-template: the tokenizer of {model_path} has no chat template, as those of base models; leave the "
            "flag out for a plain prompt, or name an instruct model"
        )
    asked = {"role": "user", "content": "What is two and two?"}
    answered = render(tokenizer, [asked, {"role": "assistant", "content": _CONTENT}], to_answer=False)
    before, _, after = answered.rpartition(_CONTENT)
    prompt = render(tokenizer, [asked], to_answer=True)
    opening = before[len(prompt) :].strip() if before.startswith(prompt) else ""
    if opening and prompt == render(tokenizer, [asked], to_answer=False):  # `[/INST]` opens the turn by itself
        raise UsageError(
            f"--chat-template: the template of {model_path} does not open the model's turn: its answers stand behind "
            f"{opening!r}, which it does not write for add_generation_prompt; add that to the template"
        )
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    ends = [token for token in tokenizer.encode(after, add_special_tokens=False) if token in special]
    if before and ends:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends[0])
