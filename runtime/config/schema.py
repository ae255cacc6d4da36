"""Every option of a configuration class by its dotted path, and every spelling of a path.

Beside its fields a class may have
    METHOD       the option that chooses the method
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
from dataclasses import MISSING, Field, fields, is_dataclass, replace
from typing import Any

from base.knobs import about
from base.names import nearest
from runtime.config.values import Option, of_type


class Schema:
    """All knobs of the configuration class `cls` and of its sections."""

    def __init__(self, cls: type):
        self.knobs: dict[str, Option] = {}  # by path, in the order of --help
        self.sections: dict[str, type] = {}  # by path, "" is `cls` itself
        self.ignored: dict[str, str] = {}  # path -> why it has no effect
        # every spelling -> path, which of an old name is its own
        self.names = self._add(cls, {f.name: _default(f) for f in fields(cls)}, "")

    def _add(self, cls: type, defaults: Mapping[str, Any], prefix: str) -> dict[str, str]:
        """Add the section that `prefix` leads to; returns how its keys are spelled inside of it, with
        their paths."""
        self.sections[prefix.rstrip(".")] = cls
        ignored = getattr(cls, "IGNORED", {})
        self.ignored |= {prefix + name: why for name, why in ignored.items()}
        old = (*ignored, *getattr(cls, "OLD_NAMES", ()))
        names = {name: prefix + name for name in old} | getattr(cls, "ELSEWHERE", {})
        flat: dict[str, str] = {}  # names of a section without the section's own
        own_first = sorted(fields(cls), key=lambda f: _owner(cls, f) is not cls)
        for f in own_first:
            path = prefix + f.name
            spellings = (f.name, *about(f).aliases)
            names |= dict.fromkeys(spellings, path)
            if not is_dataclass(defaults[f.name]):
                self.knobs[path] = _option(cls, f, defaults[f.name], prefix)
                continue
            section = defaults[f.name]
            inside = self._add(type(section), vars(section), f"{path}.")
            for name in spellings:
                names |= {f"{name}.{key}": target for key, target in inside.items()}
            if about(f).flat:
                flat = inside | flat
        return flat | names

    def find(self, key: str) -> str | None:
        """The path that `key` names, None where it is unknown."""
        return self.names.get(key.replace("-", "_"))

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


def _option(cls: type, f: Field, default: Any, prefix: str) -> Option:
    """The option of a field of `cls`, the section that `prefix` leads to. It stands in --help under
    the first line of the docstring of the class that declared it first."""
    owner = _owner(cls, f)
    title = (owner.__doc__ or "").strip().split("\n")[0].rstrip(".")
    if title.startswith(f"{owner.__name__}("):  # dataclass() wrote that one
        title = ""
    said = {**vars(about(f)), **of_type(f.type), "default": default}
    said["group"] = ": ".join(filter(None, [prefix.rstrip("."), title])) or "Options"
    said["methods"] = said["methods"] or vars(owner).get("METHODS", "")  # not those of its bases
    option = Option(**said)
    try:
        return replace(option, default=option.read(default))
    except ValueError:
        raise TypeError(f"{cls.__name__}.{f.name}: default {default!r} is no {f.type}") from None


def _owner(cls: type, f: Field) -> type:
    """The class of the hierarchy that declared the field first."""
    owners = [c for c in cls.__mro__ if f.name in getattr(c, "__dataclass_fields__", ())]
    return owners[-1]
