"""A configuration in the making: values from files, flags and overrides, and every mistake."""

import copy
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from base.errors import UserError, brief
from base.files import nearest
from runtime.config.old_commands import FLAG_FILES, recipe_of
from runtime.config.schema import Knob, Schema
from runtime.config.values import show
from runtime.config.yaml import line_of, parse_yaml, read_yaml

# what torch.distributed.launch and the originals' command lines hand over; the launcher's
# environment decides
LAUNCHER_FLAGS = {"local_rank", "rank", "world_size", "dist_url", "dist_backend", "distributed"}


class Source(NamedTuple):
    """Where a value was written: how a message points to it, and how keys are spelled there."""

    place: Callable[[str], str]
    spell: Callable[[str], str] = str
    later_wins: bool = False  # a key may stand twice


def flag(key: str) -> str:
    """A key as one types it on the command line."""
    return "--" + key.replace("_", "-")


FLAGS = Source("--{}".format, flag, later_wins=True)
OVERRIDES = Source("--overrides {}".format, later_wins=True)


class Draft:
    """The values so far, and every mistake met on the way."""

    def __init__(self, cls: type):
        self.schema = Schema(cls)
        self.values = {path: copy.deepcopy(k.default) for path, k in self.schema.knobs.items()}
        self.mistakes: list[str] = []
        self.notes: list[str] = []  # what the user should know, printed once at the start
        self.ignored: dict[str, str] = {}  # names that were set without effect -> why
        self.set_by: dict[str, tuple[Source, str]] = {}  # path -> source and spelling

    def put(self, key: str, value: Any, source: Source) -> None:
        """Set one knob, or a section from a mapping."""
        found = self.schema.find(key)
        if found is None:
            near = self.schema.nearest(key)
            hint = f"; did you mean {source.spell(near)}?" if near else "; see --help"
            if key == "flagfile":
                hint = f"; COYO-ALIGN's flag files are recipes here: --config {' or '.join(FLAG_FILES)}"
            self.mistakes.append(f"{source.place(key)}: unknown key{hint}")
        elif found.path in self.schema.sections:
            if isinstance(value, Mapping):
                self.put_all(value, source, found.path, key + ".")
            elif value is not None:
                wanted = "expected a section (key: value)"
                self.mistakes.append(f"{source.place(key)}: {wanted}, got {brief(value)}")
        elif found.path in self.schema.ignored:
            self.ignored[source.spell(key)] = self.schema.ignored[found.path]
        elif found.path in self.schema.old_names:
            section, _, name = found.path.rpartition(".")
            self.put_all({name: value}, source, section, found.path.removesuffix(name))
        elif value is not None or not found.moved:
            self.put_knob(found.path, key, value, source)

    def put_knob(self, path: str, key: str, value: Any, source: Source) -> None:
        """Set the knob `path`, written as `key`. A file must not give it two values."""
        knob = self.schema.knobs[path]
        before = self.values[path]
        try:
            self.values[path] = knob.read(value)
        except ValueError:
            self.mistakes.append(f"{source.place(key)}: {knob.complaint(value)}")
        other_source, other_key = self.set_by.get(path, (None, key))
        again = other_source is source and other_key != key and not source.later_wins
        if again and self.values[path] != before:
            both = f"{show(before)} and {show(self.values[path])}"
            self.mistakes.append(f"{source.place(key)}: is {path}, which has two values: {both}")
        self.set_by[path] = (source, key)

    def put_all(self, values: Mapping, source: Source, section: str = "", prefix: str = "") -> None:
        """Set the knobs of a section, written with `prefix`, from a mapping."""
        translate = getattr(self.schema.sections[section], "translate", None)
        try:
            values = translate(dict(values), self.notes) if translate else values
        except UserError as error:
            return self.mistakes.append(f"{source.place(prefix.rstrip('.'))}: {error}")
        for name, value in values.items():
            self.put(f"{prefix}{name}", value, source)
        return None

    def put_words(self, key: str, words: Sequence[str], source: Source) -> None:
        """Set one knob from the words of a command line."""
        found = self.schema.find(key)
        if found is None and not words and key[:3] in ("no-", "no_"):
            positive = self.schema.find(key[3:])
            knob = self.schema.knobs.get(positive.path) if positive else None
            if knob and knob.kind.is_bool:
                return self.put(key[3:], False, source)
        if found is None:
            known = key.replace("-", "_") in LAUNCHER_FLAGS
            return None if known else self.put(key, None, source)
        knob = self.schema.knobs.get(found.path)
        if not words and knob and (knob.kind.is_bool or knob.bare):
            words = ["true"] if knob.kind.is_bool else [knob.bare]
        elif not words and knob is None and found.path not in self.schema.sections:
            words = ["true"]  # an old name
        elif not words:
            return self.mistakes.append(f"{source.place(key)}: a value is missing")
        if len(words) > 1 and not (knob and knob.kind.many):
            surplus = " ".join(words[1:])
            return self.mistakes.append(
                f"{source.place(key)} {words[0]}: what is {surplus!r} after it?"
            )
        return self.put(key, value_of_words(words, knob), source)

    def read_file(self, path: Path, above: tuple[Path, ...] = ()) -> None:
        """Take the values of a YAML file, first those of the files it names as `base`."""
        try:
            values, node = read_yaml(self.checked_file(path, above))
            bases = values.pop("base", None) or []
            bases = [bases] if isinstance(bases, str) else bases
            if not (isinstance(bases, list) and all(isinstance(base, str) for base in bases)):
                raise UserError(f"{path}: base: expected a file, or a list of files")
        except UserError as error:
            return self.mistakes.append(str(error))
        for base in bases:
            self.read_file(path.parent / base, (*above, path.resolve()))

        def place(key: str) -> str:
            line = line_of(node, key)
            return f"{path}:{line}: {key}" if line else f"{path}: {key}"

        return self.put_all(values, Source(place))

    @staticmethod
    def checked_file(path: Path, above: tuple[Path, ...]) -> Path:
        """`path`, if it is a file and not one of those `above`, which build on it. UserError."""
        if path.is_dir():
            inside = ", ".join(sorted(each.name for each in path.glob("*.yaml"))) or "none here"
            raise UserError(f"{path}: is a folder; name one of its files: {inside}")
        if path.suffix == ".py":  # as NXTP's
            same = sorted(Path("configs").glob(f"*/{path.stem}.yaml"))
            hint = f"; the recipe of that name is {same[0]}" if same else ""
            raise UserError(f"{path}: a configuration is YAML, Python is not run{hint}")
        if not path.is_file():
            beside = os.listdir(path.parent) if path.parent.is_dir() else []
            found = nearest(path.name, beside)
            hint = f"; did you mean {path.parent / found}?" if found else ""
            if recipe := recipe_of(path):
                hint = f"; its recipe here is {recipe}"
            raise UserError(f"{path}: no such file{hint}")
        if path.resolve() in above:
            raise UserError(f"{path}: is its own base; remove one `base:`")
        return path

    def finish(self) -> Any:
        """The configuration, or UserError with every mistake."""
        if self.mistakes:
            count = f"{len(self.mistakes)} mistakes in the configuration:\n  "
            raise UserError((count if len(self.mistakes) > 1 else "") + "\n  ".join(self.mistakes))
        return self.schema.build(self.values)


def value_of_words(words: Sequence[str], knob: Knob | None) -> Any:
    """The words after a flag as a value for `Knob.read`. Lists: several words, commas, or [a, b].

    Without a knob, as for a section, one word is YAML.
    """
    in_brackets = len(words) == 1 and words[0].startswith("[")
    if knob is None or (knob.kind.many and in_brackets):
        with suppress(ValueError):
            return parse_yaml(words[0])[0]
    if knob is None or not knob.kind.many or words[0].lower() in ("none", "null"):
        return words[0]
    parts = []
    for word in words:
        parts += re.split(r",(?![^{]*})", word)  # not inside the braces of shard-{00,01}.tar
    return [part for part in parts if part]
