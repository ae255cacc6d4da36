"""Every option of a configuration class by its dotted path, and every spelling of a path.

Beside its fields a class may have
    IGNORED      names that are accepted without effect: {name: why}
    ELSEWHERE    names of this section that belong to another: {name: path}
    OLD_NAMES    names that its static method `translate` takes
    translate    (values of a mapping, notes to the user) -> the mapping in today's names
"""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Any, NamedTuple, get_type_hints

from base.errors import brief
from base.files import nearest
from runtime.config.values import Kind, show


@dataclass(frozen=True)
class Knob:
    """One option; what is not described here is as in base.knobs.knob."""

    kind: Kind
    default: Any
    group: str  # its heading in --help
    help: str = ""
    choices: tuple = ()
    low: float | None = None
    high: float | None = None
    aliases: tuple[str, ...] = ()
    bare: str | None = None
    methods: tuple[str, ...] = ()
    rare: bool = False

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
        wanted = [self.kind.describe()]
        if self.choices:
            wanted = ["one of " + ", ".join(map(show, self.choices))]
        if self.low is not None:
            wanted.append(f">= {self.low}")
        if self.high is not None:
            wanted.append(f"{'and ' if self.low is not None else ''}<= {self.high}")
        return f"expected {' '.join(wanted)}, got {brief(value)}; for example {self.example}"

    @property
    def example(self) -> str:
        """A value that would be right: the default if it says something."""
        if self.default not in (None, "", [], ()):
            return show(self.default)
        return show(self.choices[0]) if self.choices else self.kind.scalar.example

    @property
    def placeholder(self) -> str:
        """The type as --help marks it: `INT`, `{a,b}`, `TEXT ...`."""
        mark = self.kind.scalar.mark
        if self.choices:
            mark = "{" + ",".join(map(show, self.choices)) + "}"
        return f"{mark} ..." if self.kind.many else mark


class Found(NamedTuple):
    """What a key names."""

    path: str
    moved: bool  # written in one section, it belongs to another


@dataclass
class Schema:
    """All knobs of the configuration class `cls` and of its sections."""

    cls: type
    knobs: dict[str, Knob] = field(default_factory=dict)
    sections: dict[str, type] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)  # path -> why it has no effect
    old_names: set[str] = field(default_factory=set)  # paths that a section's `translate` takes
    spellings: dict[str, str] = field(default_factory=dict)  # every accepted name -> path

    def __post_init__(self):
        self._add(self.cls, self.cls, "")

    def _add(self, cls: type, node: Any, prefix: str) -> None:
        """`node`: the class itself, or for a section an instance, whose values are the defaults."""
        self.sections[prefix.rstrip(".")] = cls
        self._add_other_names(cls, prefix)
        hints = get_type_hints(cls)
        owners = {f.name: _owner(cls, f.name) for f in fields(cls) if f.init}
        own_first = sorted(owners, key=lambda name: owners[name] is not cls)
        for f in (cls.__dataclass_fields__[name] for name in own_first):
            default = f.default_factory() if f.default_factory is not MISSING else f.default
            default = default if node is cls else getattr(node, f.name)
            path = prefix + f.name
            for name in (f.name, *f.metadata.get("aliases", ())):
                self.spellings[prefix + name] = path
            if is_dataclass(default):
                self._add(type(default), default, path + ".")
                if f.metadata.get("flat"):
                    self._add_flat(path + ".", prefix)
                continue
            about = {key: f.metadata[key] for key in f.metadata if key != "flat"}
            group = _title(owners[f.name], prefix)
            kind = Kind(hints[f.name])
            try:
                value = kind.convert(default)
            except ValueError:
                declared = f"{cls.__name__}.{f.name}"
                raise TypeError(f"{declared}: default {default!r} is not {hints[f.name]}") from None
            self.knobs[path] = Knob(kind, value, group, **about)

    def _add_other_names(self, cls: type, prefix: str) -> None:
        for base in cls.__mro__:
            for name, why in vars(base).get("IGNORED", {}).items():
                self.ignored[prefix + name] = why
                self.spellings[prefix + name] = prefix + name
            for name, path in vars(base).get("ELSEWHERE", {}).items():
                self.spellings[prefix + name] = path
            for name in vars(base).get("OLD_NAMES", ()):
                self.old_names.add(prefix + name)
                self.spellings[prefix + name] = prefix + name

    def _add_flat(self, inner: str, prefix: str) -> None:
        """Names of a section without the section's own, where nothing else has them."""
        for name, path in list(self.spellings.items()):
            if name.startswith(inner):
                self.spellings.setdefault(prefix + name[len(inner) :], path)

    def find(self, key: str) -> Found | None:
        """What `key` names, None where it is unknown."""
        path = ""
        moved = False
        for name in key.split("."):
            inside = path and path + "."
            if inside and path not in self.sections:
                return None
            path = self.spellings.get(inside + name.replace("-", "_"), "")
            if not path:
                return None
            moved = not path.startswith(inside)
        return Found(path, moved)

    def flat_names(self, path: str) -> list[str]:
        """How --help writes `path`: names without a section's where they are accepted."""
        names = [name for name, target in self.spellings.items() if target == path]
        short = [name for name in names if "." not in name]
        return short or [name for name in names if name.startswith(path.rpartition(".")[0])]

    def nearest(self, key: str) -> str | None:
        """The valid key that was probably meant: same last part, or all its words in a longer one."""
        key = key.replace("-", "_")
        leaf = key.rpartition(".")[2]
        known = [name for name, path in self.spellings.items() if path in self.knobs]
        same_leaf = [path for path in self.knobs if path.rpartition(".")[2] == leaf]
        longer = [name for name in known if set(leaf.split("_")) < set(name.split("_"))]
        for candidates, cutoff in ((same_leaf, 0), (known, 0.8), (longer, 0), (known, 0.6)):
            if found := nearest(key, candidates, cutoff):
                return found
        return None

    def build(self, values: Mapping[str, Any], prefix: str = "") -> Any:
        """The configuration object with one value per knob."""
        cls = self.sections[prefix.rstrip(".")]
        arguments = {}
        for name in (f.name for f in fields(cls) if f.init):
            path = prefix + name
            inner = path in self.sections
            arguments[name] = self.build(values, path + ".") if inner else values[path]
        return cls(**arguments)


def _owner(cls: type, name: str) -> type:
    """The class of the hierarchy that declared the field first."""
    return next(c for c in reversed(cls.__mro__) if name in getattr(c, "__dataclass_fields__", ()))


def _title(owner: type, prefix: str) -> str:
    """First line of the class's docstring, after the section's name."""
    first = (owner.__doc__ or "").strip().split("\n")[0].rstrip(".")
    title = "" if first.startswith(f"{owner.__name__}(") else first  # dataclass() wrote that one
    return ": ".join(filter(None, [prefix.rstrip("."), title])) or "Options"
