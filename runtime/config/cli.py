"""Typed configuration: a dataclass per script, read in the order

    defaults <- `--config FILE.yaml` ... <- `--flag value` <- `--overrides key=value` ...

Later wins; mappings merge, anything else is replaced. A file may name the files it builds on:
`base: other.yaml` or `base: [one.yaml, two.yaml]`.

    @dataclass
    class Config(RunConfig):
        alpha: float = knob(0.4, "weight of the momentum teacher's soft targets", low=0, high=1)
        scheduler: Schedule = section(Schedule, aliases=("schedular",))

    config = parse(Config, description=__doc__)
"""

import copy
import io
import os
import re
import sys
import textwrap
import warnings
from collections.abc import Callable, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

from base import flight_recorder
from base.errors import UnfitWeights, UserError
from base.knobs import knob, restated, section
from base.processes import SENTENCE_FILE, end_with_parent
from base.writing import check_output_folder
from runtime.advice import advice_on, format_warning, has_lost_peer, launched_rank, leave_with
from runtime.bucket import output_in_bucket
from runtime.builtin_data import make_digitscenes_if_named, of_its_images_alone
from runtime.config.draft import COMMAND_LINE, Draft, at_flag, at_override, flag
from runtime.config.old_commands import align
from runtime.config.values import Option, show
from runtime.own_tokenizers import train_tokenizers_if_asked
from runtime.streams import outlive_readers

__all__ = ["knob", "parse", "restated", "run_script", "section"]

C = TypeVar("C")
HELP = ("h", "help")
# what torch.distributed.launch and the originals' command lines hand over; the launcher's
# environment decides
LAUNCHER_FLAGS = {"local_rank", "rank", "world_size", "dist_url", "dist_backend", "distributed"}
PRECEDENCE = {"config": 0, "overrides": 2}  # 1 for other flags
USAGE = "[--config FILE.yaml ...] [--flag value ...] [--overrides key=value ...]"
SPLITS = ("val_file", "test_file", "val", "test")  # what --evaluate reads, in any script


def parse(cls: type[C], argv: Sequence[str] | None = None, description: str | None = None) -> C:
    """The configuration of a script from its files and flags (`argv`, else the command line).

    `--help` prints `description` and the knobs of the chosen method, `--help all` all, and exits.
    Raises UserError with every mistake found; whether options agree says the class's `check()`, if
    it has one.
    """
    draft = read_words(cls, sys.argv[1:] if argv is None else argv)
    if draft.help is not None:
        show_page(help_text(draft, description, everything=draft.help == ["all"]))
        raise SystemExit(0)
    config = draft.finish()
    config.given = frozenset(draft.set_by)
    if hasattr(cls, "OF_CHECKPOINT") and config.evaluate and config.checkpoint:
        from runtime.config import from_checkpoint  # here, for --help goes without torch

        options = cls.OF_CHECKPOINT
        from_checkpoint.take_from_checkpoint(config, options=options, none_is_open=False)
    draft.ignored.update(flags_without_effect(draft, config))
    if launched_rank() == "0":
        for note in dict.fromkeys(draft.notes):
            print("note:", note, flush=True)
        without_effect = ", ".join(f"{name} ({why})" for name, why in draft.ignored.items())
        if without_effect:
            print("note: without effect here:", without_effect, flush=True)
    if hasattr(config, "check"):
        config.check()
    return config


def read_words(cls: type, argv: Sequence[str]) -> Draft:
    """What a command line and the files that it names say, mistakes included. UserError for a command
    of COYO-ALIGN."""
    draft = Draft(cls)
    flags = split_at_flags(argv, getattr(cls, "POSITIONAL", ""))
    if any(name == "flagfile" for name, _ in flags):
        raise UserError(f"--flagfile: COYO-ALIGN's are recipes here; run: {align(flags)}")
    for name, words in sorted(flags, key=lambda each: PRECEDENCE.get(each[0], 1)):
        if name in HELP:
            draft.help = words
        elif name == "":
            draft.mistakes += [f"{word}: expected --flag value (see --help)" for word in words]
        elif name in PRECEDENCE and not words:
            draft.mistakes.append(f"--{name}: a value is missing")
        elif name == "config":
            for path in words:
                draft.read_file(Path(path))
        elif name == "overrides":
            for word in words:
                key, equals, value = word.partition("=")
                if equals:
                    draft.put_words(key, [value], at_override)
                else:
                    draft.mistakes.append(f"--overrides {word}: expected key=value")
        elif name.replace("-", "_") not in LAUNCHER_FLAGS:
            draft.put_words(name, words, at_flag)
    leave_out_unnamed_splits(draft)
    return draft


def split_at_flags(argv: Sequence[str], positional: str) -> list[tuple[str, list[str]]]:
    """The command line cut at its flags: (name without dashes, words that follow). Words before the
    first flag follow `positional`."""
    flags: list[tuple[str, list[str]]] = [(positional, [])]
    for word in argv:
        if re.match(r"--[^\W\d]|-[a-zA-Z]$", word):  # -1e-4 is a number
            name, equals, value = word.lstrip("-").partition("=")
            flags.append((name, [value] if equals else []))
        else:
            flags[-1][1].append(word)
    return flags if flags[0][1] else flags[1:]


def leave_out_unnamed_splits(draft: Draft) -> None:
    """With --evaluate and a split on the command line, the recipe's other splits are not read: they
    may not be on this machine. What belongs to a recipe's split goes with it, in training too; and
    what is of the images of DigitScenes, where the command line names a folder of others."""
    values = draft.values
    asked = {path for path, source in draft.set_by.items() if source in COMMAND_LINE}
    unread = of_its_images_alone(values, asked)  # path -> why
    if named := [path for path in SPLITS if path in asked and values[path]]:
        if values.get("evaluate"):
            unread |= dict.fromkeys(SPLITS, f"--evaluate with {named[0]}")
        if "test_file" in named:
            unread["test_answers"] = "it belongs to the recipe's test_file"
    for path, why in unread.items():
        if path not in asked and values.get(path):
            values[path] = copy.copy(draft.schema.knobs[path].default)
            draft.notes.append(f"{path} of the recipe is not read: {why}")


def is_used(option: Option, chosen: str) -> bool:
    """Whether the method `chosen`, or a part of its name, uses an option."""
    method = {chosen, *chosen.split("_")}
    return not option.methods or bool(method.intersection(option.methods.split()))


def flags_without_effect(draft: Draft, config: Any) -> dict[str, str]:
    """Flags of the command line that do nothing beside the other options -> why."""
    found: dict[str, str] = {}
    method_path = getattr(config, "METHOD", None)
    chosen = str(attrgetter(method_path)(config)) if method_path else ""
    for path, source in draft.set_by.items():
        if source not in COMMAND_LINE:
            continue
        option = draft.schema.knobs[path]
        other, needed = option.only_with or ("", None)
        is_default = draft.values[path] == option.default
        name = flag(draft.schema.flat_names(path)[0])
        if chosen and not is_used(option, chosen):
            found[name] = f"of {', '.join(option.methods.split())}, not of {chosen}"
        elif other and not is_default and getattr(config, other) != needed:
            found[name] = f"only with {flag(other)} {show(needed)}"
    return found


def help_text(draft: Draft, description: str | None = None, everything: bool = False) -> str:
    """Usage, `description`, and the knobs by section, with default and meaning.

    Shown are those that the chosen method uses (a class names the option that chooses it: METHOD),
    without rare ones; `everything`: all.
    """
    method_path = getattr(draft.schema.sections[""], "METHOD", None)
    chosen = str(draft.values[method_path]) if method_path else ""
    groups: dict[str, list[str]] = {}
    hidden = 0
    for path, k in draft.schema.knobs.items():
        if everything or (is_used(k, chosen) and not k.rare):
            lines = groups.setdefault(k.group, [f"{k.group}:"])
            lines.append(_help_lines(draft.schema.flat_names(path), k))
        else:
            hidden += 1
    positional = getattr(draft.schema.sections[""], "POSITIONAL", None)
    words = f"[{positional.upper()} ...] {USAGE}" if positional else USAGE
    blocks = [f"usage: {Path(sys.argv[0]).name} {words}"]
    if description:
        blocks.append(description.strip())
    blocks += ["\n".join(lines) for lines in groups.values()]
    if hidden:
        others = f", or of other methods than {chosen}" if chosen else ""
        blocks.append(f"{hidden} more are rarely needed{others}: --help all")
    return "\n\n".join(blocks)


def show_page(text: str) -> None:
    """Print a page; who reads it through a pipe may leave early, as `head` does."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _help_lines(names: Sequence[str], k: Option) -> str:
    flags = ", ".join(f"-{name}" if len(name) == 1 else flag(name) for name in names)
    indent = " " * 8
    text = f"{k.help} [{'required' if k.required else f'default: {show(k.default)}'}]"
    meaning = textwrap.fill(text, 100, initial_indent=indent, subsequent_indent=indent)
    return f"  {flags} {k.placeholder}\n{meaning}"


def run_script(
    main: Callable[[C], Any], cls: type[C], description: str | None = None, argv=None
) -> None:
    """Parse and call `main(config)`. What the user can fix is one line on stderr and exit status 2;
    Ctrl-C is 130."""
    warnings.formatwarning = format_warning
    if SENTENCE_FILE in os.environ:
        end_with_parent()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # words and names that are not UTF-8
    config = None
    try:
        config = parse(cls, argv, description)
        has_folder = isinstance(getattr(config, "output_dir", None), Path)
        if has_folder:
            from runtime.interrupt import leave_when_signalled  # here: --help goes without torch

            leave_when_signalled()
            outlive_readers()
        make_digitscenes_if_named(config)
        if not has_folder:
            main(config)
        else:
            from base.memory import check_batches

            check_batches(config)
            with output_in_bucket(config, launched_rank()):
                check_output_folder(config.output_dir)
                train_tokenizers_if_asked(config)
                flight_recorder.record_in(config.output_dir)
                main(config)
        if "base.distributed" in sys.modules:  # a script without torch does not load it for this
            sys.modules["base.distributed"].shutdown()
    except KeyboardInterrupt:
        sys.exit(130)
    except (UserError, MemoryError, RuntimeError, OSError) as error:
        advice = advice_on(error)
        if advice is None:
            raise
        file = getattr(config, "checkpoint", None)
        if isinstance(error, UnfitWeights) and file and str(file) not in advice:
            advice = f"{file}: {advice}"  # whose weights they are
        leave_with(advice, status=1 if has_lost_peer(error) else 2)
