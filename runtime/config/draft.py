"""A configuration in the making: values from files, flags and overrides, and every mistake."""

import copy
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from base.errors import UserError, brief
from base.names import matching_files, nearest
from runtime.config.old_commands import blip_hint, recipe_of, recipe_of_nxtp
from runtime.config.schema import Option, Schema
from runtime.config.values import show
from runtime.config.yaml import line_of, parse_yaml, read_yaml

# what torch.distributed.launch and the originals' command lines hand over; the launcher's
# environment decides
LAUNCHER_FLAGS = {"local_rank", "rank", "world_size", "dist_url", "dist_backend", "distributed"}
NAMES_COLUMNS = re.compile(r"\?\w+=")  # as in pairs.csv?caption=title,alt


class Source(NamedTuple):
    """Where a value was written: how a message points to a key there, and how it is spelled."""

    place: Callable[[str], str]
    spell: Callable[[str], str] = str


def flag(key: str) -> str:
    """A key as one types it on the command line."""
    return "--" + key.replace("_", "-")


FLAGS = Source("--{}".format, flag)
OVERRIDES = Source("--overrides {}".format)
COMMAND_LINE = (FLAGS, OVERRIDES)  # a later value wins there; a file has one value for a knob


class Draft:
    """The values so far, and every mistake met on the way."""

    def __init__(self, cls: type):
        self.schema = Schema(cls)
        self.values = {path: copy.deepcopy(k.default) for path, k in self.schema.knobs.items()}
        self.set_by: dict[str, Source] = {}  # by path
        self.mistakes: list[str] = []
        self.notes: list[str] = []  # what the user should know, printed once at the start
        self.ignored: dict[str, str] = {}  # names that were set without effect -> why

    def refuse(self, key: str, source: Source, why: str) -> None:
        """Note a mistake at `key`."""
        self.mistakes.append(f"{source.place(key)}: {why}")

    def put(self, key: str, value: Any, source: Source) -> None:
        """Set one knob, or a section from a mapping."""
        path = self.schema.find(key)
        if path is None:
            self.refuse(key, source, f"unknown key{self.hint(key, source)}")
        elif path in self.schema.knobs:
            self.put_knob(path, key, value, source)
        elif path in self.schema.ignored:
            self.ignored[source.spell(key)] = self.schema.ignored[path]
        elif path not in self.schema.sections:  # an old name
            section, _, name = path.rpartition(".")
            self.put_section(section, {name: value}, source, path.removesuffix(name))
        elif isinstance(value, Mapping):
            self.put_section(path, value, source, f"{key}.")
        elif value is not None:
            self.refuse(key, source, f"expected a section (key: value), got {brief(value)}")

    def hint(self, key: str, source: Source) -> str:
        """What to write instead of an unknown key."""
        new_names = getattr(self.schema.sections[""], "NEW_NAMES", {})
        if here := new_names.get(key.replace("-", "_")):
            return f"; here it is {here}"
        near = self.schema.nearest(key)
        return f"; did you mean {source.spell(near)}?" if near else "; see --help"

    def put_knob(self, path: str, key: str, value: Any, source: Source) -> None:
        """Set the knob `path`, written as `key`."""
        knob = self.schema.knobs[path]
        before = self.values[path]
        try:
            self.values[path] = knob.read(value)
        except ValueError:
            self.refuse(key, source, knob.complaint(value))
        again = source not in COMMAND_LINE and self.set_by.get(path) is source
        if again and self.values[path] != before:
            both = f"{show(before)} and {show(self.values[path])}"
            self.refuse(key, source, f"is {path}, which has two values: {both}")
        self.set_by[path] = source

    def put_section(self, section: str, values: Mapping, source: Source, prefix: str) -> None:
        """Set the knobs of a section from a mapping; there its keys are written behind `prefix`."""
        translate = getattr(self.schema.sections[section], "translate", None)
        try:
            values = translate(dict(values), self.notes) if translate else values
        except UserError as error:
            self.refuse(prefix.rstrip("."), source, str(error))
        else:
            for name, value in values.items():
                self.put(f"{prefix}{name}", value, source)

    def put_words(self, key: str, words: Sequence[str], source: Source) -> None:
        """Set one knob from the words of a command line."""
        path = self.schema.find(key)
        knob = self.schema.knobs.get(path or "")
        if path is None and self.is_negated(key) and not words:
            self.put(key[3:], False, source)
        elif path is None:
            if key.replace("-", "_") not in LAUNCHER_FLAGS:
                self.put(key, None, source)
        elif len(words) > 1 and not (knob and knob.kind.many):
            self.refuse(f"{key} {words[0]}", source, f"what is {' '.join(words[1:])!r} after it?")
        elif words:
            self.put(key, value_of_words(words, knob), source)
        elif path in self.schema.sections or (knob and knob.alone is None):
            self.refuse(key, source, "a value is missing")
        else:
            self.put(key, knob.alone if knob else True, source)

    def put_override(self, word: str) -> None:
        """Set one knob from the `key=value` of a command line."""
        key, equals, text = word.partition("=")
        if equals:
            self.put_words(key, [text], OVERRIDES)
        else:
            self.mistakes.append(f"--overrides {word}: expected key=value")

    def is_negated(self, key: str) -> bool:
        """Whether `no-NAME` turns off an option that exists."""
        knob = self.schema.knobs.get(self.schema.find(key[3:]) or "")
        return key[:3] in ("no-", "no_") and knob is not None and knob.kind.is_bool

    def read_file(self, path: Path, above: tuple[Path, ...] = ()) -> None:
        """Take the values of a YAML file, first those of the files it names as `base`."""
        try:
            values, node = read_yaml(checked_file(path, above))
            if hint := blip_hint(path, values):
                raise UserError(f"{path}: {hint}")
            bases = values.pop("base", None) or []
            bases = [bases] if isinstance(bases, str) else bases
            if not (isinstance(bases, list) and all(isinstance(base, str) for base in bases)):
                raise UserError(f"{path}: base: expected a file, or a list of files")
        except UserError as error:
            self.mistakes.append(str(error))
            return
        for base in bases:
            self.read_file(path.parent / base, (*above, path.resolve()))

        def place(key: str) -> str:
            line = line_of(node, key)
            return f"{path}:{line}: {key}" if line else f"{path}: {key}"

        self.put_section("", values, Source(place), "")

    def finish(self) -> Any:
        """The configuration, or UserError with every mistake."""
        for path, knob in self.schema.knobs.items():
            said = any(mistake.startswith(f"{flag(path)}:") for mistake in self.mistakes)
            if knob.required and self.values[path] in (None, "", []) and not said:
                self.mistakes.append(f"{flag(path)}: is needed: {knob.help}")
        if not self.mistakes:
            return self.schema.build(self.values)
        if len(self.mistakes) > 1:
            self.mistakes.insert(0, f"{len(self.mistakes)} mistakes in the configuration:")
        raise UserError("\n  ".join(self.mistakes))


def checked_file(path: Path, above: tuple[Path, ...]) -> Path:
    """`path`, if it is a file and not one of those `above`, which build on it. UserError."""
    if path.is_dir():
        inside = ", ".join(each.name for each in matching_files(path, "*.yaml")) or "none here"
        raise UserError(f"{path}: is a folder; name one of its files: {inside}")
    if path.suffix == ".py":  # as NXTP's
        recipe = recipe_of_nxtp(path)
        hint = f"; the recipe of that name is {recipe}" if recipe else ""
        raise UserError(f"{path}: a configuration is YAML, Python is not run{hint}")
    if not path.is_file():
        raise UserError(f"{path}: no such file{hint_for_missing(path)}")
    if path.resolve() in above:
        raise UserError(f"{path}: is its own base; remove one `base:`")
    return path


def hint_for_missing(path: Path) -> str:
    """Which file was probably meant by one that is not there."""
    if recipe := recipe_of(path):
        return f"; its recipe here is {recipe}"
    beside = os.listdir(path.parent) if path.parent.is_dir() else []
    if found := nearest(path.name, beside):
        return f"; did you mean {path.parent / found}?"
    recipes = Path("configs").glob("*/*.yaml")
    if same := sorted(recipe for recipe in recipes if recipe.name == path.name):
        return f"; did you mean {nearest(path, same, 0)}?"
    return ""


def value_of_words(words: Sequence[str], knob: Option | None) -> Any:
    """The words after a flag as a value for `Option.read`. Lists: several words, commas, or [a, b].

    Without a knob, as for a section, one word is YAML.
    """
    in_brackets = len(words) == 1 and words[0].startswith("[")
    if knob is None or (knob.kind.many and in_brackets):
        with suppress(ValueError):
            return parse_yaml(words[0])[0]
    if knob is None or not knob.kind.many or words[0].lower() in ("none", "null"):
        return words[0]
    items = []
    for word in words:
        items += items_between_commas(word)
    return [item for item in items if item]


def items_between_commas(word: str) -> list[str]:
    """The items of a list in one word: neither the braces of `shard-{00,01}.tar` nor the columns of
    `FILE?caption=title,alt` are taken apart."""
    items: list[str] = []
    for part in re.split(r",(?![^{]*})", word):
        if items and NAMES_COLUMNS.search(items[-1]) and not NAMES_COLUMNS.search(part):
            items[-1] += f",{part}"
        else:
            items.append(part)
    return items
