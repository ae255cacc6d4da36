"""Every command of the pages and of the scripts' own descriptions is one that its script takes."""

import argparse
import importlib
import re
import shlex
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from runtime.config.cli import parse
from runtime.config.schema import Schema
from tests.helpers.dry_run import dry_run

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
BENCHMARKS = [
    path for path in sorted(ROOT.glob("benchmarks/*.py")) if "class Config" in path.read_text()
]
SCRIPTS = sorted([*ROOT.glob("*.py"), *ROOT.glob("scripts/**/*.py"), *BENCHMARKS])
STARTED = r"(?:(?:torchrun|python) [^`|]*?\.py|python -m benchmarks\.(?!child)\w+)\b"
COMMAND = re.compile(rf"(?:^|`)[ #]*({STARTED}[^`|]*)")
HERE = re.compile(rf"`((?:{STARTED}|\w+\.py )[^`|]*)")  # in a table, python is left out
OTHERS = ("SCRIPT.py", "src/infer.py", "test_slurm.py")
LEFT_OUT = ("…", "...")
PLACEHOLDERS = {"SCRIPT", "N"}
NEEDS_A_RUN = "eval_zeroshot.py --output-dir output/main --root datasets"


def commands(file: Path) -> dict[str, list[str]]:
    """Script and flags of the commands in a file, each once, without ellipses and comments. Of the
    table of other code bases, those of its last column."""
    found = {}
    for line in re.sub(r"\\+\n\s*", " ", file.read_text()).splitlines():
        here = file.name == "COMING_FROM.md" and line.startswith("|")
        for command in HERE.findall(line.split("|")[2]) if here else COMMAND.findall(line):
            command = command.replace("--config …", "")  # any recipe
            try:
                words = shlex.split(command.strip("` #").partition("   ")[0], comments=True)
            except ValueError:  # a text in quotes that continues in the next line
                continue
            benchmark = words[1:2] == ["-m"] and words[2].startswith("benchmarks.")
            script = 2 if benchmark else _script(words)
            whole = not PLACEHOLDERS.intersection(words)
            if script is not None and whole and not words[script].endswith(OTHERS):
                words = [word for word in words[script:] if word not in LEFT_OUT]
                found[" ".join(words)] = words
    return found


def _script(words: list[str]) -> int | None:
    return next((at for at, word in enumerate(words) if word.endswith(".py")), None)


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
        module = module_of(script)
        if script == "run_with_submitit.py":
            module.read_arguments(flags)  # what it passes on is looked at, too
        elif script == "scripts/plan.py":
            options, recipe = module.arguments(flags)
            parse(module_of(options.script).Config, recipe)
        elif not hasattr(module, "Config") and flags:
            with monkeypatch.context() as patched, pytest.raises(Taken):
                patched.setattr(argparse.ArgumentParser, "parse_args", parse_alone)
                patched.setattr(sys, "argv", [script, *flags])
                module.main()
        elif hasattr(module, "Config") and "--help" not in flags and command != NEEDS_A_RUN:
            parse(module.Config, flags)


def module_of(script: str):
    """The module of `scripts/x.py` or `benchmarks.x`."""
    return importlib.import_module(script.removesuffix(".py").replace("/", "."))


class Taken(BaseException):
    """A tool takes its options; what it would do with them is left out."""


PARSE = argparse.ArgumentParser.parse_args


def parse_alone(parser: argparse.ArgumentParser, words: list[str] | None = None):
    PARSE(parser, words)
    raise Taken


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


OF_OTHERS = {  # section of COMING_FROM.md -> script whose options its last column names
    "open_clip": "main",
    "transformers: run_clip.py and the Trainer": "main",
    "BLIP and LAVIS": "Retrieval",
    "timm": "Classification",
}


def test_options_that_replace_those_of_other_code_bases_are_options():
    """Each of its script, or of the one that its cell names before."""
    sections = re.split(r"^## ", (ROOT / "docs/COMING_FROM.md").read_text(), flags=re.MULTILINE)
    found = 0
    for title, _, text in (section.partition("\n") for section in sections):
        for line in text.splitlines() if title in OF_OTHERS else ():
            here = line.split(" | ")[-1] if line.startswith("| ") else line
            named = re.search(r"([\w/]+)\.py\b", here)
            is_ours = named and (ROOT / f"{named[1]}.py").is_file()
            module = module_of(f"{named[1]}.py" if is_ours else f"{OF_OTHERS[title]}.py")
            if not hasattr(module, "Config"):  # a tool, whose commands are tried as a whole
                continue
            schema = Schema(module.Config)
            for flag in FLAG.findall(" ".join(re.findall(r"`([^`]+)`", here))):
                found += 1
                assert schema.find(flag[2:]), (title, flag)
    assert found > 100


def test_enough_commands_are_found():
    assert sum(map(len, COMMANDS.values())) > 200


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


def test_shards_that_recipes_read_are_those_that_commands_write():
    recipes = [yaml.safe_load(file.read_text()) for file in ROOT.glob("configs/Recognition/*.yaml")]
    read = {path for each in recipes for path in [*each.get("shards", []), each.get("test", "")]}
    words = [word for each in COMMANDS[ROOT / "docs/NXTP.md"].values() for word in each]
    written = {word for flag, word in pairwise(words) if flag == "--target"}
    by_hand = "datasets/laion115m_nouns"
    assert by_hand in (ROOT / "docs/NXTP.md").read_text()
    labelled = {path for path in read if "_nouns" in path}
    assert len(labelled) == 5 and labelled - written == {by_hand}


FOREIGN = {  # of torchrun, pip, tar and srun
    "--nproc_per_node", "--max-restarts", "--rdzv_endpoint", "--rdzv_conf", "--shutdown-timeout",
    "--no-index", "--find-links", "--sort", "--gpus-per-task",
}  # fmt: skip
FLAG = re.compile(r"(?<![\w-])--\w[\w.-]*")


def test_options_that_pages_name_are_options_of_something():
    """In their sentences and tables; those of other code bases stand in COMING_FROM.md."""
    files = [
        *SCRIPTS,
        *ROOT.glob("benchmarks/*.py"),
        *ROOT.glob("*.sh"),
        *ROOT.glob("scripts/*.sh"),
    ]
    known = {flag for file in files for flag in FLAG.findall(file.read_text())}
    options = set()
    for file in SCRIPTS:
        module = module_of(str(file.relative_to(ROOT)))
        if hasattr(module, "Config"):
            schema = Schema(module.Config)
            options |= {*schema.names, *schema.knobs}
    unknown = []
    for page in [*PAGES, ROOT / "CHANGELOG.md"]:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        named = {flag for code in re.findall(r"`([^`\n]+)`", text) for flag in FLAG.findall(code)}
        for flag in named - known - FOREIGN if page.name != "COMING_FROM.md" else ():
            key = flag[2:].replace("-", "_")
            if not {key, key.removeprefix("no_")} & options:
                unknown.append(f"{page.name}: {flag}")
    assert not unknown
