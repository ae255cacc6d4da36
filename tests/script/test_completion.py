"""scripts/completion.sh: options, choices and recipes on <TAB>, from what --help all says."""

import os
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import VE
from runtime.config.draft import flag
from runtime.config.schema import Schema

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 0.5  # of CPU time, where the options are known
PAGE = """
usage: VE.py [--config FILE.yaml ...]

  --epochs, --duration, -e TEXT
        how long [default: 1]
  --precision {fp32,bf16}
  --evaluate [true|false]
  --train-file PATH ...
"""


@pytest.fixture
def complete(tmp_path):
    """complete(words, the last one unfinished): what <TAB> offers."""

    def run(*words: str, python: str = sys.executable) -> list[str]:
        given = " ".join(map(shlex.quote, words))
        code = (
            f"source scripts/completion.sh; COMP_WORDS=({given}); COMP_CWORD={len(words) - 1}; "
            "_quintet; printf '%s\\n' \"${COMPREPLY[@]}\""
        )
        variables = {"QUINTET_CACHE": str(tmp_path), "QUINTET_PYTHON": python}
        done = subprocess.run(
            ["bash", "-c", code],
            cwd=ROOT,
            env=os.environ | variables,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stderr == ""
        return done.stdout.split()

    return run


@pytest.fixture
def asked(tmp_path):
    """(a command that prints PAGE, the file that counts its calls)."""
    calls, command = tmp_path / "calls", tmp_path / "python"
    command.write_text(f"#!/bin/sh\necho \"$@\" >> {calls}\ncat <<'EOF'\n{PAGE}EOF\n")
    command.chmod(0o755)
    return str(command), calls


def test_all_options_of_a_script_in_no_time(complete):
    schema = Schema(VE.Config)
    names = {flag(name) for path in schema.knobs for name in schema.flat_names(path)}
    names = {name for name in names if len(name) > 3}  # -j and its like are typed
    first = complete("python", "VE.py", "--")
    assert names <= set(first) <= names | {"--config", "--overrides"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert complete("torchrun", "--nproc_per_node=8", "VE.py", "--") == first
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert spent < SECONDS, f"{spent:.2f} s of CPU time"


def test_values_and_recipes(complete, asked):
    python, calls = asked
    assert complete("python", "VE.py", "--precision", "", python=python) == ["fp32", "bf16"]
    assert complete("python", "VE.py", "--precision", "b", python=python) == ["bf16"]
    assert complete("python", "VE.py", "--evaluate", "", python=python) == ["true", "false"]
    assert complete("python", "VE.py", "--dur", python=python) == ["--duration"]
    assert complete("python", "VE.py", "--train_file", "", python=python) == []  # files follow
    recipes = {str(path.relative_to(ROOT)) for path in ROOT.glob("configs/VE/*.yaml")}
    assert set(complete("python", "VE.py", "--config", "", python=python)) == recipes
    found = complete("python", "VE.py", "--config", "configs/VE/deb", python=python)
    assert found == ["configs/VE/debug.yaml"]
    assert calls.read_text() == "VE.py --help all\n", "asked once"


def test_the_slurm_launcher_completes_its_own_and_the_scripts(complete, asked):
    python, calls = asked
    submit = ("python", "run_with_submitit.py")
    assert "--epochs" in complete(*submit, "--ep", python=python)  # of the launcher, which PAGE is
    given = complete(*submit, "VE.py", "--nodes", "2", "--", "--precision", "", python=python)
    assert given == ["fp32", "bf16"]
    assert complete(*submit, "VE.py", "--config", "x/VE/d", python=python) == []
    found = complete(*submit, "VE.py", "--config", "configs/VE/deb", python=python)
    assert found == ["configs/VE/debug.yaml"]
    asked_of = {line.split()[0] for line in calls.read_text().splitlines()}
    assert asked_of == {"run_with_submitit.py", "VE.py"}


def test_options_are_asked_again_after_a_change(complete, asked, tmp_path):
    python, calls = asked
    complete("python", "VE.py", "--", python=python)
    os.utime(tmp_path / "completion/VE.py.txt", (1, 1))
    complete("python", "VE.py", "--", python=python)
    assert len(calls.read_text().splitlines()) == 2


def test_other_programs_are_left_alone(complete, asked, tmp_path):
    python, calls = asked
    (tmp_path / "other.py").write_text("")
    assert complete("python", str(tmp_path / "other.py"), "--", python=python) == []
    assert complete("python", "-m", "pytest", "--", python=python) == []
    assert not calls.exists()
