"""Every command of the pages and of the scripts' own descriptions is one that its script takes."""

import importlib
import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from runtime.config.cli import parse
from tests.helpers.dry_run import dry_run

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
SCRIPTS = sorted([*ROOT.glob("*.py"), *ROOT.glob("scripts/**/*.py")])
COMMAND = re.compile(r"(?:^|`)[ #]*(?:torchrun|python) [^`|]*?\.py\b[^`|]*")
OTHERS = ("SCRIPT.py", "src/infer.py", "run_with_submitit.py")  # the last passes flags on
LEFT_OUT = ("…", "...")
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


WRITTEN = re.compile(r"--output[-_]dir[ =]\"?(output/[\w/-]+)|Path\(\"(output/[\w/-]+)\"\)")
READ = (
    "--checkpoint",
    "--pretrain_dir",
    "--retrieval_dir",
    "--image_tokenizer_path",
    "--runs",
    "convert.py",
)


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


def test_the_quickstart_calls_scripts_as_they_are(tmp_path, monkeypatch):
    """And Python may keep what it compiled: packages are installed without."""
    done, calls = dry_run(tmp_path, "quickstart.sh", PYTHONDONTWRITEBYTECODE="1")
    assert done.returncode == 0, done.stderr
    assert "PYTHONDONTWRITEBYTECODE" not in calls
    monkeypatch.chdir(ROOT)
    configs = {}
    for call in calls.splitlines():
        words = shlex.split(call)
        at = next(at for at, word in enumerate(words) if word.endswith(".py"))
        script = words[at].removesuffix(".py").replace("/", ".")
        module = importlib.import_module(script)
        if hasattr(module, "Config"):
            configs[script] = parse(module.Config, words[at + 1 :])
    vit, simla = configs["Classification"], configs["Pretrain"]
    assert vit.output_dir == simla.vision_weights and vit.batch_size == 32
    assert simla.output_dir == configs["Retrieval"].checkpoint
    assert configs["scripts.train_dvae"].output_dir == simla.image_tokenizer_path


def test_enough_commands_are_found():
    assert sum(map(len, COMMANDS.values())) > 100


def test_runs_that_are_read_are_those_that_others_write():
    """A recipe's folder, a script's own or one that another command names."""
    recipes = [yaml.safe_load(file.read_text()) for file in ROOT.glob("configs/*/*.yaml")]
    written = {Path(recipe["output_dir"]) for recipe in recipes if "output_dir" in recipe}
    for file in [*COMMANDS, *ROOT.glob("scripts/*.sh"), *ROOT.glob("runtime/config/*.py")]:
        found = WRITTEN.findall(file.read_text())
        written |= {Path(one or other) for one, other in found}
    read = [
        Path(word)
        for commands in COMMANDS.values()
        for words in commands.values()
        for before, word in pairwise(words)
        if word.startswith("output/") and before.endswith(READ)
    ]
    assert len(read) > 15
    assert not [path for path in read if not written & {path, *path.parents}]
