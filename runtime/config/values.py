"""Values of a configuration: from YAML or the words of a flag to the declared type, and back to
text."""

import json
import math
import re
import types
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from base.errors import UserError, brief
from base.files import DEPTH_LIMIT, read_text

YAML_LIMIT = 64 << 20  # bytes of a file
NODE_LIMIT = 1_000_000  # values of a file, its aliases written out
TRUTH = {
    "true": True,
    "yes": True,
    "on": True,
    "1": True,
    "false": False,
    "no": False,
    "off": False,
    "0": False,
}
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


def convert(value: Any, kind: Any) -> Any:
    """`value`, from YAML or as the text of a flag, as type `kind`.

    Raises ValueError where it is none, TypeError where a configuration cannot hold such a type.
    """
    origin, members = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        exact = [m for m in members if type(value) is (get_origin(m) or m)]
        for member in (*exact, *members):
            with suppress(ValueError):
                return convert(value, member)
        raise ValueError(value)
    if origin is Literal:
        known = {str(m): m for m in members}
        return known[str(value)] if str(value) in known else _refuse(value)
    kind = origin or kind
    if kind in (list, tuple):
        return _sequence(value, kind, members)
    if kind is dict:
        if not isinstance(value, Mapping):
            raise ValueError(value)
        key_kind, item_kind = members or (Any, Any)
        return {convert(k, key_kind): convert(v, item_kind) for k, v in value.items()}
    if kind not in SCALARS:
        raise TypeError(f"a configuration cannot hold {kind}")
    return SCALARS[kind](value)


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
    return kind(convert(v, k) for v, k in zip(value, kinds, strict=True))


def _refuse(value: Any) -> Any:
    raise ValueError(value)


def _bool(value: Any) -> bool:
    text = str(value).lower()
    return TRUTH[text] if text in TRUTH else _refuse(value)


def _float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(value)
    return _refuse(value) if math.isnan(float(value)) else float(value)


def _int(value: Any) -> int:
    if isinstance(value, str):
        with suppress(ValueError):
            return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    return int(float(value)) if _float(value).is_integer() else _refuse(value)


def _str(value: Any) -> str:
    # a number is welcome: `epochs: 30` is as good as '30 epochs'
    if isinstance(value, bool) or not isinstance(value, str | int | float | Path):
        raise ValueError(value)
    return str(value)


def _none(value: Any) -> None:
    if value is not None and str(value).lower() not in ("none", "null"):
        raise ValueError(value)


SCALARS: dict[Any, Callable[[Any], Any]] = {
    bool: _bool,
    int: _int,
    float: _float,
    str: _str,
    type(None): _none,
}
SCALARS[Path] = lambda value: Path(_str(value))


def alternatives(kind: Any) -> list[Any]:
    """The types a value may have, without None."""
    members = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    return [m for m in members if m is not type(None)]


def allows(kind: Any, *wanted: type) -> bool:
    """Whether a value of type `kind` may be one of `wanted`, whatever its elements."""
    return any((get_origin(m) or m) in wanted for m in alternatives(kind))


def element(kind: Any) -> Any:
    """Type of one element of a list or tuple; of anything else the type itself, the first where
    there are several."""
    first = alternatives(kind)[0]
    return alternatives((get_args(first) or (str,))[0])[0] if allows(first, list, tuple) else first


def from_words(words: Sequence[str], kind: Any) -> Any:
    """The words after a flag, as a value for `convert`. Lists: several words, commas, or `[a,
    b]`."""
    text = words[0]
    if text.lower() in ("none", "null") and type(None) in get_args(kind):
        return None
    if allows(kind, list, tuple) and not (text.startswith("[") and len(words) == 1):
        # a comma inside the braces of shard-{00,01}.tar does not separate
        parts = [part for word in words for part in re.split(r",(?![^{]*})", word) if part]
        return [from_words([part], element(kind)) for part in parts]
    for alternative in sorted(
        alternatives(kind), key=lambda k: k in (str, Path)
    ):  # text takes anything: last
        structured = alternative is Any or allows(alternative, dict, list, tuple)
        with suppress(ValueError):
            return convert(parse_yaml(text)[0] if structured else text, alternative)
    return text


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
    options = choices or (get_args(item) if get_origin(item) is Literal else ())
    word = (
        "{" + ",".join(map(show, options)) + "}" if options else NAMES[get_origin(item) or item][1]
    )
    return word + " ..." if allows(kind, list, tuple) else word


def example(kind: Any, default: Any, choices: Sequence = ()) -> str:
    """A value that would be right: the default where it says something."""
    if default not in (None, "", [], (), {}):
        return show(default)
    item = element(kind)
    options = choices or (get_args(item) if get_origin(item) is Literal else ())
    return show(options[0]) if options else NAMES[get_origin(item) or item][2]


def show(value: Any) -> str:
    """A value as one would type it after a flag."""
    if value is None or isinstance(value, bool):
        return "none" if value is None else str(value).lower()
    if isinstance(value, list | tuple):
        return ",".join(map(show, value)) or "[]"
    return str(value) or "''"


def read_yaml(path: str | Path) -> tuple[dict[str, Any], Any]:
    """The mapping that a YAML file holds, and its node tree. UserError."""
    try:
        values, node = parse_yaml(read_text(path, limit=YAML_LIMIT))
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(values, dict | None):
        raise UserError(f"{path}: expected lines of key: value, got {brief(values)}")
    return dict(values or {}), node


def parse_yaml(text: str) -> tuple[Any, Any]:
    """YAML 1.2 (1e-4 is a number, `no` is text) as plain values, and the node tree that knows
    lines.

    Raises ValueError, its message starting with the line, where it is not YAML, a key stands twice,
    it nests deeper than DEPTH_LIMIT or its aliases stand for more than NODE_LIMIT values.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    try:
        node = YAML(typ="safe", pure=True).compose(text)
        _check_size(node)
        return YAML(typ="safe", pure=True).load(text), node
    except YAMLError as error:
        mark = error.problem_mark if isinstance(error, MarkedYAMLError) else None
        line = f"line {mark.line + 1}: " if mark else ""
        problem = str(getattr(error, "problem", error)).replace("\n", " ")
        raise ValueError(line + problem[:200]) from None
    except RecursionError:
        raise ValueError(f"nested deeper than {DEPTH_LIMIT} levels") from None


def _check_size(root: Any) -> None:
    """ValueError where a node tree, its aliases written out, is too deep or too large."""
    sizes: dict[int, int] = {}  # by node: values that it stands for

    def size(node: Any, depth: int) -> int:
        if depth > DEPTH_LIMIT:
            raise ValueError(f"nested deeper than {DEPTH_LIMIT} levels")
        if id(node) not in sizes:
            inner = node.value if isinstance(getattr(node, "value", None), list) else []
            pairs = (each if isinstance(each, tuple) else (each,) for each in inner)
            sizes[id(node)] = 1 + sum(size(each, depth + 1) for pair in pairs for each in pair)
        return sizes[id(node)]

    if size(root, 0) > NODE_LIMIT:
        raise ValueError(f"its aliases stand for more than {NODE_LIMIT:,} values")


def line_of(node: Any, key: str) -> int | None:
    """Line, from 1, of the dotted `key` in a node tree of `parse_yaml`."""
    if getattr(node, "id", None) != "mapping":
        return None
    for name, inner in node.value:
        if name.value == key:
            return name.start_mark.line + 1
        if key.startswith(f"{name.value}."):
            return line_of(inner, key[len(name.value) + 1 :]) or name.start_mark.line + 1
    return None


def to_yaml(value: Any) -> str:
    """Plain values (numbers, text, lists, mappings) as YAML on one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{to_yaml(k)}: {to_yaml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(to_yaml, value)) + "]"
    if value is None or isinstance(value, bool | int):
        return json.dumps(value)
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else f"{value:+}".replace("inf", ".inf")
    text = str(value)
    if re.fullmatch(r"[A-Za-z/]([\w ./-]*[\w./-])?", text, re.ASCII) and text.lower() not in (
        *TRUTH,
        "null",
        "none",
    ):
        return text
    quoted = json.dumps(text, ensure_ascii=False)
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in quoted)
