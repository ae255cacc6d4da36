"""Typed configuration: a dataclass per script, read in the order

    defaults <- `--config FILE.yaml` ... <- `--flag value` <- `--overrides key=value` ...

Later wins; mappings merge, anything else is replaced. A file may name the file it builds on: `base:
other.yaml`.

    @dataclass
    class Config(RunConfig):
        alpha: float = knob(0.4, "weight of the momentum teacher's soft targets", low=0, high=1)
        scheduler: Schedule = section(Schedule, aliases=("schedular",))

    config = parse(Config, description=__doc__)
"""

import copy
import os
import re
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from base.errors import UserError, brief
from base.files import nearest, write_text
from runtime.builtin_data import make_digitscenes_if_named
from runtime.config.schema import Schema, knob, section
from runtime.config.values import (
    allows,
    from_words,
    line_of,
    placeholder,
    read_yaml,
    show,
    to_yaml,
)

__all__ = [
    "differences",
    "from_dict",
    "knob",
    "load",
    "parse",
    "run_script",
    "save",
    "section",
    "to_dict",
]

C = TypeVar("C")
# what torch.distributed.launch and the originals' command lines hand over; the launcher's
# environment decides
LAUNCHER_FLAGS = {"local_rank", "rank", "world_size", "dist_url", "dist_backend", "distributed"}
OTHER_RANKS_WAIT = 3.0  # seconds, see `run`
ABSENT = "(absent)"


class Source(NamedTuple):
    """Where a value was written: how a message points to it, and how keys are spelled there."""

    place: Callable[[str], str]
    spell: Callable[[str], str]


FLAGS = Source(lambda key: f"--{key}", lambda key: "--" + key.replace("_", "-"))
OVERRIDES = Source(lambda key: f"--overrides {key}", str)


class Draft:
    """The values so far, and every mistake met on the way."""

    def __init__(self, cls: type):
        self.schema = Schema(cls)
        self.values = {
            path: copy.deepcopy(knob.default) for path, knob in self.schema.knobs.items()
        }
        self.mistakes: list[str] = []
        self.unused: list[str] = []  # what was set without effect
        self.set_by: dict[str, Source] = {}

    def put(self, key: str, value: Any, source: Source) -> None:
        """Set one knob, or a section from a mapping."""
        found = self.schema.find(key)
        if found is None:
            near = self.schema.nearest(key)
            hint = f"; did you mean {source.spell(near)}?" if near else "; see --help"
            return self.mistakes.append(f"{source.place(key)}: unknown key{hint}")
        path, rest = found
        if path in self.schema.sections:
            if isinstance(value, Mapping):
                return self.put_all(value, source, key + ".")
            if value is not None:
                self.mistakes.append(
                    f"{source.place(key)}: expected a section (key: value), got {brief(value)}"
                )
            return None
        if self.schema.knobs[path].moved_to is not None:
            return self.put_moved(path, value, source)
        for name in reversed(rest):
            value = {name: value}
        if isinstance(value, Mapping) and isinstance(self.values[path], Mapping):
            value = _merged(self.values[path], value)
        try:
            self.values[path] = self.schema.knobs[path].read(value)
        except ValueError:
            self.mistakes.append(f"{source.place(key)}: {self.schema.knobs[path].complaint(value)}")
        self.set_by[path] = source
        if self.schema.knobs[path].unused and self.values[path] != self.schema.knobs[path].default:
            self.unused.append(source.place(key))

    def put_moved(self, path: str, value: Any, source: Source) -> None:
        """Set the knob that took the place of `path`; a file must not give both different values."""
        if value is None:
            return
        target = self.schema.knobs[path].moved_to
        before = self.values[target]
        set_here = self.set_by.get(target) is source and source is not FLAGS
        self.put(target, value, source)
        if set_here and self.values[target] != before:
            values = f"{show(before)} and {show(self.values[target])}"
            self.mistakes.append(
                f"{source.place(path)}: is {target}, which has two values: {values}"
            )

    def put_all(self, values: Mapping, source: Source, prefix: str = "") -> None:
        for name, value in values.items():
            self.put(f"{prefix}{name}", value, source)

    def put_words(self, key: str, words: list[str], source: Source) -> None:
        """Set one knob from the words of a command line."""
        found = self.schema.find(key)
        if found is None and not words and re.match("no[-_]", key):
            positive = self.schema.find(key[3:])
            if (
                positive
                and positive[0] in self.schema.knobs
                and allows(self.schema.knobs[positive[0]].kind, bool)
            ):
                return self.put(key[3:], False, source)
        if found is None:
            return None if key.replace("-", "_") in LAUNCHER_FLAGS else self.put(key, None, source)
        path, rest = found
        knob = self.schema.knobs.get(path)
        kind = dict if knob is None else Any if rest else knob.kind
        if not words and knob is not None:
            words = ["true"] if allows(kind, bool) else [knob.bare] if knob.bare else []
        if not words:
            return self.mistakes.append(f"{source.place(key)}: a value is missing")
        if len(words) > 1 and not allows(kind, list, tuple):
            return self.mistakes.append(
                f"{source.place(key)} {words[0]}: what is {' '.join(words[1:])!r} after it?"
            )
        self.put(key, from_words(words, kind), source)

    def read_file(self, path: Path, above: tuple[Path, ...] = ()) -> None:
        """Take the values of a YAML file, first those of the file it names as `base`."""
        if path.is_dir():
            inside = ", ".join(sorted(each.name for each in path.glob("*.yaml"))) or "none here"
            return self.mistakes.append(f"{path}: is a folder; name one of its files: {inside}")
        if not path.is_file():
            beside = os.listdir(path.parent) if path.parent.is_dir() else []
            found = nearest(path.name, beside)
            hint = f"; did you mean {path.parent / found}?" if found else ""
            return self.mistakes.append(f"{path}: no such file{hint}")
        if path.resolve() in above:
            return self.mistakes.append(f"{path}: is its own base; remove one `base:`")
        try:
            values, node = read_yaml(path)
        except UserError as error:
            return self.mistakes.append(str(error))
        bases = values.pop("base", None) or []
        bases = [bases] if isinstance(bases, str) else bases
        if not (isinstance(bases, list) and all(isinstance(base, str) for base in bases)):
            return self.mistakes.append(f"{path}: base: expected a file, or a list of files")
        for base in bases:
            self.read_file(path.parent / base, (*above, path.resolve()))

        def place(key: str) -> str:
            line = line_of(node, key)
            return f"{path}:{line}: {key}" if line else f"{path}: {key}"

        self.put_all(values, Source(place, str))

    def finish(self) -> Any:
        """The configuration, or UserError with every mistake."""
        if self.mistakes:
            head = (
                f"{len(self.mistakes)} mistakes in the configuration:\n  "
                if len(self.mistakes) > 1
                else ""
            )
            raise UserError(head + "\n  ".join(self.mistakes))
        if self.unused and launched_rank() == "0":
            print("note: without effect here:", ", ".join(self.unused), flush=True)
        return self.schema.build(self.values)


def _merged(old: Mapping, new: Mapping) -> dict:
    both = [k for k in new if isinstance(old.get(k), Mapping) and isinstance(new[k], Mapping)]
    return {**old, **new, **{k: _merged(old[k], new[k]) for k in both}}


def parse(
    config_class: type[C], argv: Sequence[str] | None = None, description: str | None = None
) -> C:
    """The configuration of a script from its files and flags (`argv`, else the command line).

    `--help` prints `description` and every knob, and exits. Raises UserError with every mistake
    found.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if "-h" in argv or "--help" in argv:
        print(help_text(config_class, description))
        raise SystemExit(0)
    draft = Draft(config_class)
    flags = _flags(argv, draft)
    for path in (word for key, words in flags if key == "config" for word in words):
        draft.read_file(Path(path))
    for key, words in flags:
        if key not in ("config", "overrides"):
            draft.put_words(key, words, FLAGS)
    for word in (word for key, words in flags if key == "overrides" for word in words):
        key, equals, text = word.partition("=")
        if equals:
            draft.put_words(key, [text], OVERRIDES)
        else:
            draft.mistakes.append(f"--overrides {word}: expected key=value")
    return draft.finish()


def _flags(argv: list[str], draft: Draft) -> list[tuple[str, list[str]]]:
    """The command line cut at its flags: (name without dashes, words that follow)."""
    flags: list[tuple[str, list[str]]] = []
    for word in argv:
        if re.match(r"--[^\W\d]|-[a-zA-Z]$", word):  # -1e-4 is a number
            name, equals, value = word.lstrip("-").partition("=")
            flags.append((name, [value] if equals else []))
        elif flags:
            flags[-1][1].append(word)
        else:
            draft.mistakes.append(f"{word}: expected --flag value (see --help)")
    for name, words in flags:
        if name in ("config", "overrides") and not words:
            draft.mistakes.append(f"--{name}: a value is missing")
    return flags


def help_text(config_class: type, description: str | None = None) -> str:
    """Usage, `description`, and every knob with default and meaning, grouped by section."""
    groups: dict[str, list[str]] = {}
    schema = Schema(config_class)
    for path, k in schema.knobs.items():
        flat = [n for n, target in schema.spellings.items() if target == path and "." not in n]
        names = [
            *(flat if "." in path else []),
            path,
            *(
                alias if len(alias) == 1 else path[: path.rfind(".") + 1] + alias
                for alias in k.aliases
            ),
        ]
        flags = ", ".join(("-" if len(n) == 1 else "--") + n.replace("_", "-") for n in names)
        text = textwrap.fill(
            f"{k.help} [default: {show(k.default)}]",
            116,
            initial_indent=" " * 8,
            subsequent_indent=" " * 8,
        )
        groups.setdefault(k.group, []).append(f"  {flags} {placeholder(k.kind, k.choices)}\n{text}")
    usage = f"usage: {Path(sys.argv[0]).name} [--config FILE.yaml ...] [--flag value ...] [--overrides key=value ...]"
    blocks = [
        usage,
        (description or "").strip(),
        *("\n".join([g + ":", *lines]) for g, lines in groups.items()),
    ]
    return "\n\n".join(filter(None, blocks))


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration in plain Python (numbers, text, lists, dicts), for checkpoints and logs."""

    def plain(value: Any) -> Any:
        if is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
        if isinstance(value, Mapping):
            return {key: plain(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [plain(inner) for inner in value]
        return str(value) if isinstance(value, Path) else value

    return plain(config)


def from_dict(
    config_class: type[C], values: Mapping[str, Any], name: str = "saved configuration"
) -> C:
    """The opposite of `to_dict`; `name` is what mistakes are blamed on."""
    draft = Draft(config_class)
    draft.put_all(values, Source(lambda key: f"{name}: {key}", str))
    return draft.finish()


def load(config_class: type[C], path: str | Path) -> C:
    """The configuration that a YAML file holds; what it does not name keeps its default."""
    draft = Draft(config_class)
    draft.read_file(Path(path))
    return draft.finish()


def save(config: Any, path: str | Path) -> None:
    """Write every knob as YAML, its meaning as a comment. The file is replaced as a whole or not at
    all."""
    write_text(path, "\n".join(_yaml_lines(config, "")) + "\n")


def _yaml_lines(config: Any, indent: str) -> list[str]:
    lines = []
    plain = to_dict(config)
    for f in fields(config):
        if is_dataclass(getattr(config, f.name)):
            lines += [f"{indent}{f.name}:", *_yaml_lines(getattr(config, f.name), indent + "  ")]
        else:
            comment = f.metadata.get("help", "").replace("\n", " ")
            lines.append(
                f"{indent}{f.name}: {to_yaml(plain[f.name])}"
                + (f"  # {comment}" if comment else "")
            )
    return lines


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What changed between two results of `to_dict`: lines such as `optimizer.lr: 0.0001 ->
    0.0002`."""
    lines = []
    for key in dict.fromkeys([*old, *new]):
        before, after = old.get(key, ABSENT), new.get(key, ABSENT)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: {show(before)} -> {show(after)}")
    return lines


def launched_rank() -> str:
    """Rank of this process as the launcher says, before the processes have joined."""
    return os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"


def run_script(
    main: Callable[[C], Any], config_class: type[C], description: str | None = None, argv=None
) -> None:
    """Parse and call `main(config)`. A mistake of the user is one line on stderr and exit status 2;
    Ctrl-C is 130.

    On other ranks than 0 the message waits: where all ranks fail alike, the launcher ends them
    meanwhile and it is printed once; where one rank alone fails, it is not lost.
    """
    try:
        config = parse(config_class, argv, description)
        make_digitscenes_if_named(config)
        main(config)
        if "base.distributed" in sys.modules:  # a script without torch does not load it for this
            sys.modules["base.distributed"].shutdown()
    except KeyboardInterrupt:
        sys.exit(130)
    except UserError as error:
        rank = launched_rank()
        if rank != "0":
            time.sleep(OTHER_RANKS_WAIT)
        print(
            f"error: {error}" if rank == "0" else f"error on rank {rank}: {error}",
            file=sys.stderr,
            flush=True,
        )
        sys.exit(2)
