"""Read --chat-template-args: the arguments of a chat template, with values of the types that templates compare."""

import math
import re
from collections.abc import Sequence

from drivers.common.errors import UsageError

ChatValue = bool | int | float | str
OF_TRANSFORMERS = {
    *("conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize"),
    *("continue_final_message", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs", "strftime_now"),
}
"""Arguments of `apply_chat_template` that the programs pass themselves, or that are no arguments of the template."""


def parse_chat_args(entries: Sequence[str]) -> dict[str, ChatValue]:
    """Return the arguments of `name=value` entries by name: booleans, numbers or text."""
    values = dict[str, ChatValue]()
    for entry in entries:
        name, equals, text = entry.partition("=")
        if not (equals and name.isidentifier()):
            raise UsageError(
                f"--chat-template-args {entry}: must be a name and a value, such as enable_thinking=false"
            )
        if name in OF_TRANSFORMERS:
            raise UsageError(
                f"--chat-template-args {entry}: {name} belongs to transformers, not to the template; omit it"
            )
        if name in values:
            raise UsageError(f"--chat-template-args {entry}: each name must be unique")
        values[name] = _parse_value(text)
    return values


def _parse_value(text: str) -> ChatValue:
    """Return true and false as booleans, finite numbers as numbers, and anything else as it is."""
    if text in ("true", "false"):
        return text == "true"
    if re.fullmatch(r"[+-]?[0-9]{1,18}", text):
        return int(text)
    try:
        number = float(text)
    except ValueError:
        return text
    return number if math.isfinite(number) else text
