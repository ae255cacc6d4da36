"""run.sh: one commit, one experiment, in a small repository of its own."""

import fcntl
import os
import shutil
import subprocess
import sys

import pytest

from tests.helpers.pretraining import ROOT

# a script that says where it runs and with what, and continues where its folder says it stopped
SCRIPT = """
import sys
from pathlib import Path
folder = Path(sys.argv[sys.argv.index("--output_dir") + 1])
folder.mkdir(parents=True, exist_ok=True)
with (folder / "said.txt").open("a") as said:
    print("version 1", Path(__file__).parent, sys.argv[1:], file=said)
print("data:", Path("data/words.txt").read_text())
"""


@pytest.fixture
def repository(tmp_path):
    top = tmp_path / "repository"
    top.mkdir()
    shutil.copy(ROOT / "run.sh", top)
    (top / "train.py").write_text(SCRIPT)
    (top / "run_with_submitit.py").write_text(SCRIPT)
    (top / ".gitignore").write_text("/data/\n/output/\n")
    (top / "data").mkdir()
    (top / "data/words.txt").write_text("shared words")
    git(top, "init", "--quiet")
    commit(top, "first")
    return top


def git(top, *words) -> str:
    who = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    return subprocess.run(
        ["git", *who, *words], cwd=top, check=True, capture_output=True, text=True
    ).stdout.strip()


def commit(top, subject):
    git(top, "add", "--all")
    git(top, "commit", "--quiet", "--message", subject)


def run_sh(top, *words, expect=0, **env) -> str:
    env = os.environ | {"PYTHON": sys.executable} | env
    result = subprocess.run(
        ["bash", str(top / "run.sh"), *words], env=env, capture_output=True, text=True
    )
    assert result.returncode == expect, result.stdout + result.stderr
    return result.stdout + result.stderr


def said(folder) -> list[str]:
    return (folder / "run/said.txt").read_text().splitlines()


def test_without_arguments_it_explains_itself(repository):
    text = run_sh(repository)
    assert "One commit, one experiment" in text and "--allow-dirty" in text and "set -e" not in text


def test_runs_from_the_snapshot_and_records_everything(repository):
    secret = {"WANDB_API_KEY": "do-not-tell", "NCCL_DEBUG": "INFO"}
    text = run_sh(repository, "train.py", "--name", "X", "--caption", "two words", **secret)
    folder = repository / "output/experiments/X"
    assert "data: shared words" in text
    assert said(folder) == [
        f"version 1 {folder / 'code'} {['--output_dir', str(folder / 'run'), '--caption', 'two words']}"
    ]
    assert git(repository, "rev-parse", "HEAD") in (folder / "commit.txt").read_text()
    assert (
        "first" in (folder / "commit.txt").read_text() and not (folder / "changes.patch").exists()
    )
    environment = (folder / "environment.txt").read_text()
    assert f"Python {sys.version.split()[0]}" in environment and "torch==" in environment
    assert "NCCL_DEBUG=INFO" in environment and "do-not-tell" not in environment
    # the recorded command, pasted into a shell, does the same again
    command = (folder / "command.txt").read_text().splitlines()[-1]
    subprocess.run(["bash", "-c", command], check=True, capture_output=True)
    assert said(folder)[0] == said(folder)[1]


def test_the_same_name_goes_on_with_its_own_commit(repository):
    run_sh(repository, "train.py", "--name", "X", "--seed", "3")
    folder = repository / "output/experiments/X"
    (repository / "train.py").write_text(SCRIPT.replace("version 1", "version 2"))
    commit(repository, "second")
    assert "choose a new --name" in run_sh(repository, "train.py", "--name=X", "--seed", "3")
    run_sh(repository, "--name", "X")  # as it was started
    assert len(said(folder)) == 3 and len(set(said(folder))) == 1
    assert len((folder / "command.txt").read_text().splitlines()) == 6
    run_sh(repository, "train.py", "--name", "Y")
    assert said(repository / "output/experiments/Y")[0].startswith("version 2")


def test_a_dirty_tree_is_refused_or_kept_as_a_patch(repository):
    (repository / "train.py").write_text(SCRIPT.replace("version 1", "version 2"))
    (repository / "new.txt").write_text("untracked")
    refused = run_sh(repository, "train.py", "--name", "X", expect=2)
    assert (
        "train.py" in refused
        and "new.txt" in refused
        and "--allow-dirty" in refused
        and "git commit" in refused
    )
    assert not list((repository / "output/experiments").iterdir())
    before = git(repository, "status", "--porcelain")
    run_sh(repository, "--allow-dirty", "train.py", "--name", "X")
    folder = repository / "output/experiments/X"
    assert (
        said(folder)[0].startswith("version 2")
        and (folder / "code/new.txt").read_text() == "untracked"
    )
    assert git(repository, "status", "--porcelain") == before, "the index or the tree was touched"
    # the patch on top of the commit gives what ran
    git(repository, "checkout", "--quiet", "--", ".")
    (repository / "new.txt").unlink()
    git(repository, "apply", str(folder / "changes.patch"))
    assert (repository / "train.py").read_text() == (folder / "code/train.py").read_text()
    assert (repository / "new.txt").read_text() == "untracked"


def test_without_a_name_the_same_command_is_the_same_experiment(repository):
    for seed in ("1", "1", "2"):
        run_sh(repository, "train.py", "--seed", seed)
    folders = sorted((repository / "output/experiments").iterdir())
    assert len(folders) == 2 and {len(said(folder)) for folder in folders} == {1, 2}
    assert all(
        folder.name.startswith(f"train-{git(repository, 'rev-parse', 'HEAD')[:7]}-")
        for folder in folders
    )


def test_the_slurm_launcher_gets_name_and_job_folder(repository):
    words = ["--name", "X", "--nodes", "2", "--", "--name", "of the script"]
    run_sh(
        repository, "run_with_submitit.py", "train.py", *words, expect=1
    )  # the stand-in wants --output_dir
    folder = repository / "output/experiments/X"
    command = (folder / "command.txt").read_text()
    assert (
        f"run_with_submitit.py train.py --job_dir {folder}/run --name X --nodes 2 -- --name of\\ the\\ script"
        in command
    )


def test_two_at_once_are_refused(repository):
    run_sh(repository, "train.py", "--name", "X")
    with (repository / "output/experiments/X/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "is running" in run_sh(repository, "train.py", "--name", "X", expect=2)


def test_a_file_system_without_locks_is_no_second_run(repository, tmp_path):
    (tmp_path / "flock").write_text("#!/bin/sh\nexit 71\n")  # as util-linux's where there are none
    (tmp_path / "flock").chmod(0o755)
    run_sh(repository, "train.py", "--name", "X", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert len(said(repository / "output/experiments/X")) == 1


MISTAKES = {
    "no such script": (["nothing.py", "--name", "X"], "nothing.py"),
    "no script": (["--bogus"], "SCRIPT.py"),
    "nothing to continue with": (["--name", "X"], "no experiment X"),
    "name that is a path": (["train.py", "--name", "../X"], "--name ../X"),
    "name without a value": (["train.py", "--name"], "--name"),
    "processes": (["--nproc", "many", "train.py"], "--nproc many"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_clear_message(mistake, repository):
    words, named = MISTAKES[mistake]
    text = run_sh(repository, *words, expect=2)
    assert text.startswith("error: ") and named in text
    left = repository / "output/experiments"
    assert not left.exists() or not list(left.iterdir())


def test_outside_a_git_repository(tmp_path):
    shutil.copy(ROOT / "run.sh", tmp_path)
    text = run_sh(tmp_path, "train.py", expect=2, GIT_CEILING_DIRECTORIES=str(tmp_path.parent))
    assert "not a git repository" in text
