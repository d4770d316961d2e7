"""Parse a command line with tyro, and report a mistake in it in one line."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, get_args

import tyro
from tyro import _errors as events  # tyro's only way to reword its errors; a test fails if another version changes it

from drivers.common.cli import fit_help
from drivers.common.errors import UsageError, suggest

KINDS = {int: "a whole number, like 8", float: "a number, like 0.1"}


def parse_arguments(kind: Any, arguments: Sequence[str], *, names: Sequence[str] = (), **options: Any) -> Any:
    """Return what tyro parses as `kind`; raise UsageError for arguments that cannot be parsed.

    `names` are words that are no flags, such as subcommands, to suggest for a misspelled one.
    """

    def explain(event: events.ParseErrorEvent) -> None:
        message = _explain(event, arguments, dict(_list_flags(kind)), names)
        if message is not None:
            raise UsageError(message)

    with fit_help(), events.on_parse_error(explain):
        return tyro.cli(kind, args=arguments, **options)


def _list_flags(kind: Any) -> Iterator[tuple[str, Any]]:
    """Yield the flags of a dataclass, of those that it contains or of each member of a union, with their fields."""
    if not is_dataclass(kind):
        for member in get_args(kind):
            yield from _list_flags(member)
        return
    for field in fields(kind):
        if is_dataclass(field.default):
            yield from _list_flags(type(field.default))
        elif "Positional" not in str(field.type):
            yield f"--{field.name.replace('_', '-')}", field


def _explain(
    event: events.ParseErrorEvent, arguments: Sequence[str], flags: Mapping[str, Any], names: Sequence[str]
) -> str | None:
    """Return what is wrong with the arguments and what to pass instead, or None for a kind of mistake not known."""
    match event:
        case events.UnrecognizedArgs(tokens=[token, *_]):
            return _explain_unknown(token, arguments, flags, names)
        case events.InvalidChoice(argument=argument, value=value):
            choices = [name for name in _list_choices(argument.field.type_stripped) if name in event.choices]
            choices = choices or list(event.choices)
            return f"{_name(argument)} {value}: must be one of {', '.join(choices)}{suggest(value, choices)}"
        case events.BadValue(argument=argument, reason="too_few_values"):
            n_values = argument.lowered.nargs
            return f"{_name(argument)}: needs {'a value' if n_values == 1 else f'{n_values} values'}"
        case events.InstantiationFailure(argument=None, message=message):
            return message  # of a check in the settings, which names the flag
        case events.InstantiationFailure(argument=argument, message=message):
            assert argument is not None
            value = _find_value(arguments, _name(argument))
            wanted = {KINDS[kind] for kind in _list_types(argument.field.type_stripped) if kind in KINDS}
            return f"{_name(argument)} {value}: must be {' or '.join(sorted(wanted)) if wanted else message}"
        case events.MissingSubcommand():
            return f"must begin with one of {', '.join(names)}"
        case events.MissingArgs(missing_arguments=missing):
            return f"missing: {', '.join(_name(entry.arg) for entry in missing)}"
    return None


def _explain_unknown(token: str, arguments: Sequence[str], flags: Mapping[str, Any], names: Sequence[str]) -> str:
    """Return why a token is neither a flag nor the value of one."""
    name = token.partition("=")[0]
    if name.startswith("-"):
        initials = {"".join(word[0] for word in flag.strip("-").split("-")): flag for flag in reversed(list(flags))}
        known = initials.get(name.strip("-"))  # such as --lr
        hint = f"; did you mean {known}?" if known else suggest(name.replace("_", "-"), list(flags))
        return f"{name}: no such flag{hint or '; --help lists the flags'}"
    flag = _find_flag_before(token, arguments)
    field = flags.get(flag.replace("--no-", "--", 1)) if flag else None
    if flag and field is not None and bool in _list_types(field.type):
        words = flag.removeprefix("--").removeprefix("no-")
        return f"{flag} {token}: takes no value; pass --{words} to turn it on, or --no-{words} to turn it off"
    after = f", and {flag} takes no further value" if flag else ""
    return f"{token}: not a flag{after}{suggest(token, names) or '; --help lists the flags'}"


def _find_flag_before(token: str, arguments: Sequence[str]) -> str | None:
    """Return the flag whose value, or one of whose values, the token seems to be."""
    flag = None
    for argument in arguments:
        name, _, value = argument.partition("=")
        if argument.startswith("--"):
            flag = name.replace("_", "-")
        if token in (argument, value):
            return flag
    return None


def _find_value(arguments: Sequence[str], flag: str) -> str:
    """Return the values of a flag as they were typed."""
    found: list[str] = []
    is_here = False
    for argument in arguments:
        name, has_value, value = argument.partition("=")
        if argument.startswith("--"):
            is_here = name.replace("_", "-") == flag
            found = ([value] if has_value else []) if is_here else found
        elif is_here:
            found.append(argument)
    return " ".join(found)


def _name(argument: Any) -> str:
    """Return an argument as it is typed."""
    return str(argument.display_name())


def _list_choices(hint: Any) -> list[str]:
    """Return the texts of a Literal, in its order, which tyro loses in a union with None."""
    return [member for part in get_args(hint) for member in ([part] if isinstance(part, str) else _list_choices(part))]


def _list_types(hint: Any) -> list[Any]:
    """Return a type, or those that a union, a tuple or an annotation consists of."""
    return [hint, *(inner for part in get_args(hint) for inner in _list_types(part))]
