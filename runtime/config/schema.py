"""Every option of a configuration class by its dotted path, and every spelling of a path.

Beside its fields a class may have
    METHODS      methods that use its options, where an option names none itself
    IGNORED      names that are accepted without effect: {name: why}
    ELSEWHERE    names of this section that belong to another: {name: path}
    OLD_NAMES    names that its static method `translate` takes
    POSITIONAL   the option that the words before the first flag are for
    OF_CHECKPOINT  sections and knobs that --evaluate takes from the run of --checkpoint
    NEW_NAMES    names of other code bases: {name: what to write here}, for the error message
    translate    (values of a mapping, notes to the user) -> the mapping in today's names
"""

from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import Any, get_type_hints

from base.errors import brief
from base.knobs import Knob, about
from base.names import nearest
from runtime.config.values import Kind, show


@dataclass(frozen=True, kw_only=True)
class Option(Knob):
    """One option of a script."""

    kind: Kind
    default: Any
    group: str  # its heading in --help

    def read(self, value: Any) -> Any:
        """`value` in the knob's type; ValueError where type, range or choice is wrong."""
        value = self.kind.convert(value)
        for item in value if isinstance(value, list | tuple) else [value]:
            if item is None:
                continue
            too_low = self.low is not None and item < self.low
            too_high = self.high is not None and item > self.high
            if too_low or too_high or (self.choices and item not in self.choices):
                raise ValueError(value)
        return value

    def complaint(self, value: Any) -> str:
        """What was expected instead of `value`."""
        wanted = self.kind.describe()
        if self.choices:
            wanted = "one of " + ", ".join(map(show, self.choices))
        limits = {">=": self.low, "<=": self.high}
        limits = [f"{sign} {limit}" for sign, limit in limits.items() if limit is not None]
        wanted = " ".join([wanted, " and ".join(limits)]).rstrip()
        near = nearest(value, self.choices) if isinstance(value, str) else None
        return f"expected {wanted}, got {brief(value)}; for example {near or self.example}"

    @property
    def example(self) -> str:
        """A value that would be right: the default if it says something."""
        if self.default not in (None, "", [], ()):
            return show(self.default)
        return show(self.choices[0]) if self.choices else self.kind.example

    @property
    def alone(self) -> str | None:
        """What a flag without a value means; None where it needs one."""
        return "true" if self.kind.is_bool else self.bare

    @property
    def placeholder(self) -> str:
        """The type as --help marks it: `INT`, `{a,b}`, `TEXT ...`."""
        mark = self.kind.mark
        if self.choices:
            mark = "{" + ",".join(map(show, self.choices)) + "}"
        return f"{mark} ..." if self.kind.many else mark


class Schema:
    """All knobs of the configuration class `cls` and of its sections."""

    def __init__(self, cls: type):
        self.knobs: dict[str, Option] = {}  # by path, in the order of --help
        self.sections: dict[str, type] = {}  # by path, "" is `cls` itself
        self.ignored: dict[str, str] = {}  # path -> why it has no effect
        self.names: dict[str, str] = {}  # every accepted name, behind its section's path -> path
        self._add(cls, {f.name: _default(f) for f in fields(cls)}, "")

    def _add(self, cls: type, defaults: Mapping[str, Any], prefix: str) -> None:
        """Add the section that `prefix` leads to."""
        self.sections[prefix.rstrip(".")] = cls
        ignored = getattr(cls, "IGNORED", {})
        self.ignored |= {prefix + name: why for name, why in ignored.items()}
        for name in (*ignored, *getattr(cls, "OLD_NAMES", ())):
            self.names[prefix + name] = prefix + name
        for name, path in getattr(cls, "ELSEWHERE", {}).items():
            self.names[prefix + name] = path
        hints = get_type_hints(cls)
        own_first = sorted(fields(cls), key=lambda f: _owner(cls, f) is not cls)
        for f in own_first:
            path = prefix + f.name
            default = defaults[f.name]
            for name in (f.name, *about(f).aliases):
                self.names[prefix + name] = path
            if is_dataclass(default):
                self._add(type(default), vars(default), f"{path}.")
            else:
                self.knobs[path] = _option(cls, f, Kind(hints[f.name]), default, prefix)
            if about(f).flat:
                self._add_flat(f"{path}.", prefix)

    def _add_flat(self, inner: str, prefix: str) -> None:
        """Names of a section without the section's own, where nothing else has them."""
        for name, path in list(self.names.items()):
            if name.startswith(inner):
                self.names.setdefault(prefix + name.removeprefix(inner), path)

    def find(self, key: str) -> str | None:
        """The path that `key` names, None where it is unknown."""
        path = ""
        for name in key.replace("-", "_").split("."):
            path = self.names.get(f"{path}.{name}".lstrip("."), "")
            if not path:
                return None
        return path

    def flat_names(self, path: str) -> list[str]:
        """How --help writes `path`: names without a section's where they are accepted."""
        names = [name for name, target in self.names.items() if target == path]
        short = [name for name in names if "." not in name]
        return short or [name for name in names if name.startswith(path.rpartition(".")[0])]

    def nearest(self, key: str) -> str | None:
        """The valid key that was probably meant: same last part, or all its words in a longer one."""
        key = key.replace("-", "_")
        leaf = key.rpartition(".")[2]
        known = [name for name, path in self.names.items() if path in self.knobs]
        same_leaf = [path for path in self.knobs if path.rpartition(".")[2] == leaf]
        longer = [name for name in known if _stems(leaf) < _stems(name)]
        for candidates, cutoff in ((same_leaf, 0), (known, 0.8), (longer, 0), (known, 0.6)):
            if found := nearest(key, candidates, cutoff):
                return found
        return None

    def build(self, values: Mapping[str, Any], section: str = "") -> Any:
        """The configuration object with one value per knob."""
        cls = self.sections[section]
        arguments = {}
        for f in fields(cls):
            path = f"{section}.{f.name}".lstrip(".")
            inner = path in self.sections
            arguments[f.name] = self.build(values, path) if inner else values[path]
        return cls(**arguments)


def _stems(name: str) -> set[str]:
    """The words of a name, without a plural's s."""
    return {word.removesuffix("s") for word in name.split("_")}


def _default(f: Field) -> Any:
    return f.default if f.default_factory is MISSING else f.default_factory()


def _option(cls: type, f: Field, kind: Kind, default: Any, prefix: str) -> Option:
    try:
        default = kind.convert(default)
    except ValueError:
        raise TypeError(f"{cls.__name__}.{f.name}: default {default!r} is no {f.type}") from None
    owner = _owner(cls, f)
    stated = {**vars(about(f)), "kind": kind, "default": default, "group": _title(owner, prefix)}
    stated["methods"] = stated["methods"] or getattr(owner, "METHODS", "")
    return Option(**stated)


def _owner(cls: type, f: Field) -> type:
    """The class of the hierarchy that declared the field first."""
    owners = [c for c in cls.__mro__ if f.name in getattr(c, "__dataclass_fields__", ())]
    return owners[-1]


def _title(owner: type, prefix: str) -> str:
    """First line of the class's docstring, after the section's name."""
    title = (owner.__doc__ or "").strip().split("\n")[0].rstrip(".")
    if title.startswith(f"{owner.__name__}("):  # dataclass() wrote that one
        title = ""
    return ": ".join(filter(None, [prefix.rstrip("."), title])) or "Options"
