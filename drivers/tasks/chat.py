"""Render prompts with the chat template of a tokenizer."""

import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from typing import Any

from drivers.common.errors import UsageError

_CONTENT = "Two and two is four."
"""Trial message: templates may strip outer space, and no template contains this text."""


_DAY = date(2024, 2, 29)
"""Date of trial messages. A clock that goes on between two of them would make them differ."""


def render(
    tokenizer: Any,
    messages: Sequence[Mapping[str, str]],
    *,
    to_answer: bool,
    day: date | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> str:
    """Return messages as text with special tokens; `to_answer` opens the model's turn.

    Templates of some models show the date. With `day`, they show the beginning of that day. `arguments` are others
    that the template reads.
    """
    options: dict[str, Any] = dict(arguments or {})
    if day is not None and "strftime_now" in str(tokenizer.chat_template):  # the clock that transformers provides
        options["strftime_now"] = day.strftime
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=to_answer, **options
        )
    except Exception as error:  # a template is a third-party program and may raise anything
        reason = " ".join(str(error).split())[:300]
        roles = " and ".join(message["role"] for message in messages)
        raise UsageError(
            f"--chat-template: the tokenizer's template refuses messages of {roles} ({reason})"
        ) from error
    return str(text)


def check_arguments(tokenizer: Any, names: Iterable[str]) -> None:
    """Raise a UsageError if the template reads no argument of one of these names: it would have no effect."""
    for name in names:
        if not re.search(rf"\b{name}\b", str(tokenizer.chat_template)):
            raise UsageError(
                f"--chat-template-args {name}: the model's chat template reads no such name; correct it, or omit it"
            )


def use_end_of_turn_as_eos(tokenizer: Any, model_path: str) -> None:
    """Make the template's end-of-turn token the tokenizer's end token.

    A base model may come with the template of the instruct model but name another end token. If the template ends a
    turn without a special token, the tokenizer's end token stays. Raise a UsageError for a template that cannot open
    the model's turn.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError(
            f"--chat-template: the tokenizer of {model_path} has no chat template; omit the flag for a "
            "plain prompt, or use an instruct model"
        )
    question = {"role": "user", "content": "What is two and two?"}
    answered = render(tokenizer, [question, {"role": "assistant", "content": _CONTENT}], to_answer=False, day=_DAY)
    before, _, after = answered.rpartition(_CONTENT)
    prompt = render(tokenizer, [question], to_answer=True, day=_DAY)
    opening = before[len(prompt) :].strip() if before.startswith(prompt) else ""
    # Some templates open the turn with the end of the question, like `[/INST]`.
    if opening and prompt == render(tokenizer, [question], to_answer=False, day=_DAY):
        raise UsageError(
            f"--chat-template: the template of {model_path} does not open the model's turn: answers follow "
            f"{opening!r}, which it omits with add_generation_prompt; add it to the template"
        )
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    ends = [token for token in tokenizer.encode(after, add_special_tokens=False) if token in special]
    if before and ends:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends[0])
