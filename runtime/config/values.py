"""Values of a configuration: from YAML or the words of a flag to the declared type."""

import math
import re
import types
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from runtime.config.yaml import parse_yaml

YES = ("true", "yes", "on", "1")
NO = ("false", "no", "off", "0")
# type -> (how an error names it, how --help marks it, an example)
NAMES = {
    bool: ("true or false", "[true|false]", "true"),
    int: ("a whole number", "INT", "1"),
    float: ("a number", "FLOAT", "1e-4"),
    str: ("text", "TEXT", "text"),
    Path: ("a path", "PATH", "folder/file"),
    dict: ("a mapping of key: value", "{key: value}", "{key: value}"),
    Any: ("any value", "VALUE", "1"),
    type(None): ("none", "none", "none"),
}


# ---- to the declared type
def convert(value: Any, kind: Any) -> Any:
    """`value`, from YAML or as the text of a flag, as type `kind`.

    Raises ValueError where it is none, TypeError where a configuration cannot hold such a type.
    """
    origin, members = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        return _one_of(value, members)
    if origin is Literal:
        return {str(member): member for member in members}[_known(str(value), map(str, members))]
    if (origin or kind) in (list, tuple):
        return _sequence(value, origin or kind, members)
    if (origin or kind) is dict and isinstance(value, Mapping):
        key_kind, item_kind = members or (Any, Any)
        return {convert(k, key_kind): convert(v, item_kind) for k, v in value.items()}
    if kind not in SCALARS:
        raise (ValueError if (origin or kind) is dict else TypeError)(f"cannot hold {kind}")
    return SCALARS[kind](value)


def _one_of(value: Any, kinds: Sequence) -> Any:
    """As the first of `kinds` that fits; the word none is None, in files as after flags."""
    if type(None) in kinds and str(value).lower() in ("none", "null"):
        return None
    exact = [kind for kind in kinds if type(value) is (get_origin(kind) or kind)]
    for kind in (*exact, *kinds):
        with suppress(ValueError):
            return convert(value, kind)
    raise ValueError(value)


def _sequence(value: Any, kind: type, members: tuple) -> Any:
    """List or tuple with elements of type `members`; a single value counts as a list of one."""
    if kind is list and isinstance(value, str | int | float | Path):
        value = [value]
    if not isinstance(value, list | tuple):
        raise ValueError(value)
    fixed = kind is tuple and members and members[-1] is not Ellipsis
    kinds = members if fixed else (members or (Any,))[:1] * len(value)
    if len(kinds) != len(value):
        raise ValueError(value)
    return kind(convert(item, item_kind) for item, item_kind in zip(value, kinds, strict=True))


def _known(text: str, names) -> str:
    if text not in names:
        raise ValueError(text)
    return text


def _bool(value: Any) -> bool:
    return _known(str(value).lower(), YES + NO) in YES


def _float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(value)
    if math.isnan(float(value)):
        raise ValueError(value)
    return float(value)


def _int(value: Any) -> int:
    if isinstance(value, str):
        with suppress(ValueError):
            return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if not _float(value).is_integer():
        raise ValueError(value)
    return int(_float(value))


def _str(value: Any) -> str:  # a number is welcome: `epochs: 30` is as good as '30 epochs'
    if isinstance(value, bool) or not isinstance(value, str | int | float | Path):
        raise ValueError(value)
    return str(value)


def _path(value: Any) -> Path:
    return Path(_str(value))


def _none(value: Any) -> None:
    _known(str(value).lower(), ("none", "null"))


SCALARS: dict[Any, Callable[[Any], Any]] = {
    bool: _bool,
    int: _int,
    float: _float,
    str: _str,
    Path: _path,
    type(None): _none,
}


def from_words(words: Sequence[str], kind: Any) -> Any:
    """The words after a flag, as a value for `convert`. Lists: several words, commas, or [a, b]."""
    text = words[0]
    if text.lower() in ("none", "null") and type(None) in get_args(kind):
        return None
    if allows(kind, list, tuple) and not (text.startswith("[") and len(words) == 1):
        # a comma inside the braces of shard-{00,01}.tar does not separate
        parts = [part for word in words for part in re.split(r",(?![^{]*})", word) if part]
        return [from_words([part], element(kind)) for part in parts]
    for choice in sorted(alternatives(kind), key=(str, Path).__contains__):  # text takes all: last
        structured = choice is Any or allows(choice, dict, list, tuple)
        with suppress(ValueError):
            return convert(parse_yaml(text)[0] if structured else text, choice)
    return text


# ---- about a type
def alternatives(kind: Any) -> list[Any]:
    """The types a value may have, without None."""
    members = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    return [member for member in members if member is not type(None)]


def allows(kind: Any, *wanted: type) -> bool:
    """Whether a value of type `kind` may be one of `wanted`, whatever its elements."""
    return any((get_origin(member) or member) in wanted for member in alternatives(kind))


def element(kind: Any) -> Any:
    """Type of one element of a list or tuple; of anything else its first type."""
    first = alternatives(kind)[0]
    return alternatives((get_args(first) or (str,))[0])[0] if allows(first, list, tuple) else first


def options(kind: Any, choices: Sequence) -> Sequence:
    """The values that are allowed, where they are few."""
    return choices or (get_args(element(kind)) if get_origin(element(kind)) is Literal else ())


def describe(kind: Any) -> str:
    """The type in the words of an error message."""
    origin, members = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(map(describe, members))
    if origin is Literal:
        return "one of " + ", ".join(map(show, members))
    if origin is tuple and members[-1] is not Ellipsis:
        return f"{len(members)} values ({', '.join(map(describe, members))})"
    if (origin or kind) in (list, tuple):
        return "a list" + (f" ({describe(members[0])}, ...)" if members else "")
    return NAMES[origin or kind][0]


def placeholder(kind: Any, choices: Sequence = ()) -> str:
    """The type as --help marks it: `INT`, `{a,b}`, `TEXT ...`."""
    item = element(kind)
    word = "{" + ",".join(map(show, options(kind, choices))) + "}"
    word = word if options(kind, choices) else NAMES[get_origin(item) or item][1]
    return word + " ..." if allows(kind, list, tuple) else word


def example(kind: Any, default: Any, choices: Sequence = ()) -> str:
    """A value that would be right: the default where it says something."""
    if default not in (None, "", [], (), {}):
        return show(default)
    item = element(kind)
    known = options(kind, choices)
    return show(known[0]) if known else NAMES[get_origin(item) or item][2]


def show(value: Any) -> str:
    """A value as one would type it after a flag."""
    if value is None or isinstance(value, bool):
        return "none" if value is None else str(value).lower()
    if isinstance(value, list | tuple):
        return ",".join(map(show, value)) or "[]"
    return str(value) or "''"
