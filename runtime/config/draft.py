"""A configuration in the making: values from files, flags and overrides, and every mistake."""

import copy
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from base.errors import UserError, brief
from base.names import matching_files, nearest
from base.text import as_list
from runtime.config.foreign_files import foreign_hint
from runtime.config.old_commands import recipe_of, recipe_of_flags, recipe_of_nxtp
from runtime.config.schema import Schema
from runtime.config.values import Option, show
from runtime.config.yaml import line_of, parse_yaml, read_yaml

NAMES_COLUMNS = re.compile(r"\?\w+=")  # as in pairs.csv?caption=title,alt

# where a key was written, as a message says it
Place = Callable[[str], str]


def flag(key: str) -> str:
    """A key as one types it on the command line."""
    return "--" + key.replace("_", "-")


def at_flag(key: str) -> str:
    return f"--{key}"


def at_override(key: str) -> str:
    return f"--overrides {key}"


COMMAND_LINE = (at_flag, at_override)  # a later value wins there; a file has one value for a knob


class Draft:
    """The values so far, and every mistake met on the way."""

    def __init__(self, cls: type):
        self.schema = Schema(cls)
        self.values = {path: copy.deepcopy(k.default) for path, k in self.schema.knobs.items()}
        self.set_by: dict[str, Place] = {}  # by path
        self.help: list[str] | None = None  # the words after --help
        self.mistakes: list[str] = []
        self.notes: list[str] = []  # what the user should know, printed once at the start
        self.ignored: dict[str, str] = {}  # names that were set without effect -> why

    def put(self, key: str, value: Any, place: Place) -> None:
        """Set one knob, or a section from a mapping; a mistake is noted."""
        try:
            self._put(key, value, place)
        except UserError as error:
            self.mistakes.append(f"{place(key)}: {error}")

    def _put(self, key: str, value: Any, place: Place) -> None:
        path = self.schema.find(key)
        typed = flag if place is at_flag else str
        new_names = getattr(self.schema.sections[""], "NEW_NAMES", {})
        if here := new_names.get(key.replace("-", "_")):  # before a section's name of old
            raise UserError(f"unknown key; here it is {here}")
        if path is None:
            if near := self.schema.nearest(key):
                raise UserError(f"unknown key; did you mean {typed(near)}?")
            raise UserError("unknown key; see --help")
        if path in self.schema.knobs:
            self.put_knob(path, value, place)
        elif path in self.schema.ignored:
            self.ignored[typed(key)] = self.schema.ignored[path]
        elif path not in self.schema.sections:  # an old name
            section, _, name = path.rpartition(".")
            self.put_section(section, {name: value}, place, path.removesuffix(name))
        elif isinstance(value, Mapping):
            self.put_section(path, value, place, f"{key}.")
        elif value is not None:
            raise UserError(f"expected a section (key: value), got {brief(value)}")

    def put_knob(self, path: str, value: Any, place: Place) -> None:
        """Set the knob `path`. UserError for a value that it cannot have."""
        before = self.values[path]
        now = self.schema.knobs[path].read(value)
        again = place not in COMMAND_LINE and self.set_by.get(path) is place
        if again and now != before:
            raise UserError(f"is {path}, which has two values: {show(before)} and {show(now)}")
        self.values[path] = now
        self.set_by[path] = place

    def put_section(self, section: str, values: Mapping, place: Place, prefix: str) -> None:
        """Set the knobs of a section from a mapping; there its keys are written behind `prefix`."""
        if translate := getattr(self.schema.sections[section], "translate", None):
            values = translate(dict(values), self.notes)
        for name, value in values.items():
            self.put(f"{prefix}{name}", value, place)

    def put_words(self, key: str, words: Sequence[str], place: Place) -> None:
        """Set one knob from the words that follow its name on a command line."""
        if not words and self.is_negated(key):
            key, words = key[3:], ["false"]
        path = self.schema.find(key)
        knob = self.schema.knobs.get(path)
        if len(words) > 1 and path and not (knob and knob.many):
            rest = " ".join(words[1:])
            self.mistakes.append(f"{place(key)} {words[0]}: what is {rest!r} after it?")
        elif words:
            self.put(key, value_of_words(words, knob), place)
        elif path in self.schema.sections or (knob and not knob.is_switch and knob.bare is None):
            self.mistakes.append(f"{place(key)}: a value is missing")
        else:
            self.put(key, knob.bare if knob and knob.bare else True, place)

    def is_negated(self, key: str) -> bool:
        """Whether a key is `no-NAME` and turns off a switch NAME."""
        knob = self.schema.knobs.get(self.schema.find(key[3:]))
        no_other = key[:3] in ("no-", "no_") and self.schema.find(key) is None
        return no_other and knob is not None and knob.is_switch

    def read_file(self, path: Path, above: tuple[Path, ...] = ()) -> None:
        """Take the values of a YAML file, first those of the files it names as `base`."""
        try:
            values, node = read_yaml(checked_file(path, above))
            if hint := foreign_hint(path, values):
                raise UserError(f"{path}: {hint}")
            bases = as_list(values.pop("base", None) or [])
            if not all(isinstance(base, str) for base in bases):
                raise UserError(f"{path}: base: expected a file, or a list of files")
        except UserError as error:
            self.mistakes.append(str(error))
            return
        for base in bases:
            self.read_file(path.parent / base, (*above, path.resolve()))

        def place(key: str) -> str:
            line = line_of(node, key)
            return f"{path}:{line}: {key}" if line else f"{path}: {key}"

        self.put_section("", values, place, "")

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
    if recipe := recipe_of_flags(path):
        raise UserError(
            f"{path}: a flag file of COYO-ALIGN; its recipe is {recipe}, and main.py --flagfile "
            f"{path} says the whole command"
        )
    if not path.is_file():
        fault = "not a regular file" if path.exists() else f"no such file{hint_for_missing(path)}"
        raise UserError(f"{path}: {fault}")
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
    if knob is None or (knob.many and in_brackets):
        with suppress(ValueError):
            return parse_yaml(words[0])[0]
    if knob is None or not knob.many or words[0].lower() in ("none", "null"):
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
