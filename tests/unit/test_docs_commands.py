"""Every command of the pages and of the scripts' own descriptions is one that its script takes."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from runtime.config.cli import parse

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
SCRIPTS = sorted([*ROOT.glob("*.py"), *ROOT.glob("scripts/**/*.py")])
COMMAND = re.compile(r"(?:^|`)[ #]*(?:torchrun|python) [^`|]*?\.py\b[^`|]*")
OTHERS = ("SCRIPT.py", "src/infer.py", "run_with_submitit.py")  # the last passes flags on
LEFT_OUT = ("…", "...", "FLAGS")
NEEDS_A_RUN = "eval_zeroshot.py --output-dir output/main --root datasets"


def commands(file: Path) -> dict[str, list[str]]:
    """Script and flags of the commands in a file, each once, without ellipses and comments."""
    found = {}
    for line in re.sub(r"\\+\n\s*", " ", file.read_text()).splitlines():
        for command in COMMAND.findall(line):
            try:
                words = shlex.split(command.strip("` #").partition("   ")[0], comments=True)
            except ValueError:  # a text in quotes that continues in the next line
                continue
            script = next((at for at, word in enumerate(words) if word.endswith(".py")), None)
            if script is not None and words[script] not in OTHERS:
                words = [word for word in words[script:] if word not in LEFT_OUT]
                found[" ".join(words)] = words
    return found


COMMANDS = {file: commands(file) for file in [*PAGES, *SCRIPTS]}


@pytest.mark.parametrize(
    "file",
    [file for file in COMMANDS if COMMANDS[file]],
    ids=lambda file: str(file.relative_to(ROOT)),
)
def test_commands_are_taken_by_their_scripts(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    for command, (script, *flags) in COMMANDS[file].items():
        assert Path(script).is_file(), command
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        if hasattr(module, "Config") and "--help" not in flags and command != NEEDS_A_RUN:
            parse(module.Config, flags)


def test_enough_commands_are_found():
    assert sum(map(len, COMMANDS.values())) > 100
