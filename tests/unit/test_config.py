"""Configuration: precedence, spellings, every kind of mistake with its message, and the way to a
file and back."""

import atexit
import dataclasses
import importlib
import io
import os
import pwd
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from base import distributed
from base.errors import UserError
from base.knobs import check_choices
from models.weights.clip import load_text_transformer
from models.weights.loading import load_checkpoint
from runtime.config import cli as config_module
from runtime.config.cli import (
    knob,
    parse,
    run_script,
    section,
)
from runtime.config.draft import Draft
from runtime.config.networks import FusionNetworks, Geometry
from runtime.config.schema import Schema
from runtime.config.values import Option, differences, of_type
from runtime.config.yaml import save, to_dict
from tests.helpers.configs import NEEDED, load

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Optimizer:
    """How the weights move."""

    lr: float = knob(1e-4, "peak learning rate, absolute", low=0)
    weight_decay: float = knob(0.02, "decoupled", aliases=("wd",))
    betas: tuple[float, float] = knob((0.9, 0.999), "moments")
    fused: bool = knob(True, "one kernel")


@dataclass
class Schedule:
    epochs: str = knob("30 epochs", "length")
    min_lr: float = knob(1e-5, "last learning rate", aliases=("lr_end",))


@dataclass
class Base:
    """The run."""

    seed: int = knob(42, "seed", low=0)
    workers: int = knob(4, "loader processes", aliases=("j",))
    resume: str = knob("auto", "auto, none or a file", bare="auto")


@dataclass
class Config(Base):
    train_file: list[str] = knob((), "annotation lists")
    alpha: float = knob(0.4, "share of soft targets, 0–1", low=0, high=1)
    compile: bool = knob(False, "compile the network")
    no_last_bn: bool = knob(False, "a name that begins with no")
    mode: str = knob("pre", "stage", choices=("pre", "fine"))
    model: str = knob("vit_b", "network", choices=("vit_b", "vit_l"))
    layers: list[int] = knob([8], "layers", choices=(4, 8, 12))
    k_test: int | None = knob(None, "candidates")
    checkpoint: Path | None = knob(None, "weights")
    optimizer: Optimizer = section(Optimizer, flat=True, lr=3e-4)
    scheduler: Schedule = section(Schedule, aliases=("schedular",))


def read(*argv: str) -> Config:
    return parse(Config, argv)


def mistakes(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        read(*argv)
    return str(caught.value)


@pytest.fixture
def yaml(tmp_path):
    def write(text: str, name: str = "a.yaml") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return str(path)

    return write


# ---- order and spelling ----------------------------------------------------------------------------------------------


def test_defaults_have_the_declared_types_and_are_not_shared():
    one, two = read(), read()
    assert one.train_file == [] and one.optimizer.lr == 3e-4 and Optimizer().lr == 1e-4
    one.train_file.append("x")
    one.layers.append(4)
    assert two.train_file == [] and two.layers == [8]
    assert Config().layers is not Config().layers


def test_precedence(yaml):
    first = yaml("alpha: 0.1\nseed: 1\nworkers: 1\nmode: fine\n")
    second = yaml("alpha: 0.2\nseed: 2\nworkers: 2\n", "b.yaml")
    got = read(
        "--overrides", "alpha=0.4", "--alpha", "0.3", "--seed", "3", "--config", first, second
    )
    assert (got.alpha, got.seed, got.workers, got.mode, got.model) == (0.4, 3, 2, "fine", "vit_b")
    assert read("--config", second, "--config", first).seed == 1
    assert read("--seed", "1", "--seed", "5").seed == 5


def test_base_chain_is_relative_to_the_file(yaml):
    yaml("seed: 1\nalpha: 0.1\noptimizer: {lr: 0.1, wd: 0.1}\n", "common/base.yaml")
    yaml("base: ../common/base.yaml\nalpha: 0.2\n", "mid/mid.yaml")
    got = load(Config, yaml("base: mid/mid.yaml\noptimizer: {lr: 0.5}\n"))
    assert (got.seed, got.alpha, got.optimizer.lr, got.optimizer.weight_decay) == (1, 0.2, 0.5, 0.1)


@pytest.mark.parametrize(
    "argv",
    [
        ["--scheduler.min-lr", "1e-6"],
        ["--scheduler.min_lr=1e-6"],
        ["--schedular.lr_end", "1e-6"],
        ["--overrides", "schedular.min_lr=1e-6"],
        ["--overrides", "scheduler={lr_end: 1e-6}"],
    ],
)
def test_spellings_of_a_nested_key(argv):
    assert read(*argv).scheduler == Schedule(min_lr=1e-6)


def test_old_section_name_in_a_file(yaml):
    assert load(Config, yaml("schedular: {epochs: 30, min_lr: 1e-6}")).scheduler == Schedule(
        "30", 1e-6
    )


def test_flat_section_answers_without_its_name_and_others_do_not():
    assert read("--lr", "1", "--wd", "2").optimizer == Optimizer(1.0, 2.0)
    assert "--min-lr: unknown key; did you mean --scheduler.min-lr?" in mistakes("--min-lr", "1")


def test_short_flag_negative_numbers_and_empty_text():
    got = read("-j", "0", "--optimizer.weight-decay", "-1e-4", "--resume", "")
    assert (got.workers, got.optimizer.weight_decay, got.resume) == (0, -1e-4, "")


@pytest.mark.parametrize(
    "argv, value",
    [
        (["--compile"], True),
        (["--no-compile"], False),
        (["--compile", "false"], False),
        (["--compile=True"], True),
        (["--compile", "--no-compile"], False),
        (["--overrides", "compile=yes"], True),
    ],
)
def test_booleans(argv, value):
    assert read(*argv, "--seed", "1").compile is value


def test_negated_booleans_of_sections_and_names_that_begin_with_no():
    got = read("--no-optimizer.fused", "--no-last-bn")
    assert got.optimizer.fused is False and got.no_last_bn is True
    assert "--no-alpha: unknown key" in mistakes("--no-alpha")
    assert "--no-compile: unknown key" in mistakes("--no-compile", "yes")  # which of the two?


def test_flag_that_stands_alone_takes_its_bare_value():
    assert read("--resume", "none", "--resume", "--seed", "1").resume == "auto"
    assert mistakes("--alpha", "--seed", "1") == "--alpha: a value is missing"


@pytest.mark.parametrize(
    "argv", [["a", "b"], ["a,b"], ["[a, b]"], ["a,", "b"]], ids=["words", "comma", "yaml", "mixed"]
)
def test_lists(argv):
    assert read("--train-file", *argv).train_file == ["a", "b"]
    assert read("--train-file", "[]").train_file == []


def test_list_keeps_braces_and_columns_and_tuples_have_a_length():
    assert read("--train-file", "s3://b/{00,01}.tar,c").train_file == ["s3://b/{00,01}.tar", "c"]
    tables = ["a.csv", "b.csv?image=url&caption=title,alt:0.5", "c.csv?caption=x,y"]
    assert read("--train-file", ",".join(tables)).train_file == tables
    assert read("--betas", "0.9", "0.98").optimizer.betas == (0.9, 0.98)
    assert "--betas: expected 2 values (a finite number, a finite number), got" in mistakes(
        "--betas", "0.9"
    )


def test_single_value_in_a_file_counts_as_a_list_of_one(yaml):
    assert load(Config, yaml("train_file: ve.json")).train_file == ["ve.json"]
    assert read("--train_file", "a.json", "--train_file", "none").train_file == []
    assert load(Config, yaml("train_file: null")).train_file == []


def test_a_tuple_of_any_length_is_given_as_a_list_is():
    option = Option(help="", default=(), group="", **of_type(tuple[int, ...]))
    assert [option.read(value) for value in ("none", 3, ["3", 4])] == [(), (3,), (3, 4)]


def test_optional_and_path(yaml):
    got = read("--k_test", "5", "--checkpoint", "a/1.50", "--mode", "fine")
    assert (got.k_test, got.checkpoint, got.mode) == (5, Path("a/1.50"), "fine")
    assert read("--k_test", "5", "--k_test", "none").k_test is None
    assert load(Config, yaml("checkpoint: none\nk_test: None")).checkpoint is None


def test_the_home_of_the_user(yaml, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    got = read("--checkpoint=~/a.pt", "--config", yaml("train_file: [~/b.json, 'c/~/d', ~e]"))
    assert got.checkpoint == Path("/home/me/a.pt")
    assert got.train_file == ["/home/me/b.json", "c/~/d", "~e"]
    assert read("--checkpoint=~").checkpoint == Path("/home/me")
    user = pwd.getpwuid(os.getuid())
    assert read(f"--checkpoint=~{user.pw_name}/a").checkpoint == Path(user.pw_dir, "a")


def test_an_empty_path_is_none_of_a_folder_or_file(yaml):
    """As `--checkpoint $RUN` without RUN: the folder that the script is started in it is not."""
    said = "expected a path or none, got ''; for example folder/file"
    assert mistakes("--checkpoint", "") == f"--checkpoint: {said}"
    file = yaml("checkpoint: ''")
    assert mistakes("--config", file) == f"{file}:1: checkpoint: {said}"


@pytest.mark.parametrize(
    "declared", [set, dict[str, int], int | str, list[int | None], tuple[int, str], list, Any]
)
def test_a_type_that_no_option_can_have(declared):
    with pytest.raises(TypeError, match="cannot hold"):
        of_type(declared)


def test_yaml_numbers(yaml):
    got = load(
        Config, yaml("optimizer:\n  lr: 1e-4\n  weight_decay: '1e-2'\nseed: 1e3\nalpha: 1\n")
    )
    assert (got.optimizer.lr, got.optimizer.weight_decay, got.seed) == (1e-4, 1e-2, 1000)
    assert isinstance(got.alpha, float) and isinstance(got.seed, int)


def test_launcher_leftovers_are_accepted_silently():
    assert (
        read("--local_rank=1", "--local-rank", "1", "--dist_url", "env://", "--seed", "7").seed == 7
    )


# ---- mistakes --------------------------------------------------------------------------------------------------------


def test_unknown_key_names_file_line_and_neighbour(yaml):
    file = yaml("alpha: 0.1\noptimizer:\n  lr: 1\n  weight_dcay: 2\n")
    assert (
        mistakes("--config", file)
        == f"{file}:4: optimizer.weight_dcay: unknown key; did you mean optimizer.weight_decay?"
    )


def test_unknown_flag_names_neighbour():
    assert mistakes("--aplha", "1") == "--aplha: unknown key; did you mean --alpha?"
    assert mistakes("--ALPHA", "1") == "--ALPHA: unknown key; did you mean --alpha?"
    assert (
        mistakes("--optimiser.lr", "1")
        == "--optimiser.lr: unknown key; did you mean --optimizer.lr?"
    )
    assert mistakes("--zzz") == "--zzz: unknown key; see --help"
    assert (
        mistakes("--overrides", "trainfile=1")
        == "--overrides trainfile: unknown key; did you mean train_file?"
    )


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "alpha: high",
            "alpha: expected a finite number >= 0 and <= 1, got 'high'; for example 0.4",
        ),
        ("alpha: 1.5", "alpha: expected a finite number >= 0 and <= 1, got 1.5; for example 0.4"),
        ("alpha: true", "alpha: expected a finite number >= 0 and <= 1, got True; for example 0.4"),
        ("alpha: .nan", "alpha: expected a finite number >= 0 and <= 1, got nan; for example 0.4"),
        ("alpha:", "alpha: expected a finite number >= 0 and <= 1, got None; for example 0.4"),
        ("seed: 1.5", "seed: expected a whole number >= 0, got 1.5; for example 42"),
        ("seed: -1", "seed: expected a whole number >= 0, got -1; for example 42"),
        ("compile: maybe", "compile: expected true or false, got 'maybe'; for example false"),
        ("model: vit_x", "model: expected one of vit_b, vit_l, got 'vit_x'; for example vit_l"),
        ("layers: [4, 5]", "layers: expected one of 4, 8, 12, got [4, 5]; for example 8"),
        ("mode: x", "mode: expected one of pre, fine, got 'x'; for example pre"),
        ("mode: a_fine", "mode: expected one of pre, fine, got 'a_fine'; for example fine"),
        ("k_test: x", "k_test: expected a whole number or none, got 'x'; for example 1"),
        (
            "train_file: {a: 1}",
            "train_file: expected a list (text, ...), got {'a': 1}; for example text",
        ),
        ("optimizer: adamw", "optimizer: expected a section (key: value), got 'adamw'"),
        (
            "optimizer.lr: {x: 1}",
            "optimizer.lr: expected a finite number >= 0, got {'x': 1}; for example 0.0003",
        ),
    ],
)
def test_wrong_values(yaml, text, message):
    file = yaml("# first line\n" + text)
    assert mistakes("--config", file) == f"{file}:2: {message}"


def test_ranges_are_inclusive():
    assert (read("--alpha", "0").alpha, read("--alpha", "1").alpha, read("--seed", "0").seed) == (
        0,
        1,
        0,
    )


def test_all_mistakes_are_reported_together(yaml):
    file = yaml("alfa: 1\nseed: x\noptimizer:\n  lr: -1\n")
    assert mistakes("--config", file, "--workers", "many", "--alpha", "2").split("\n") == [
        "5 mistakes in the configuration:",
        f"  {file}:1: alfa: unknown key; did you mean alpha?",
        f"  {file}:2: seed: expected a whole number >= 0, got 'x'; for example 42",
        f"  {file}:4: optimizer.lr: expected a finite number >= 0, got -1; for example 0.0003",
        "  --workers: expected a whole number, got 'many'; for example 4",
        "  --alpha: expected a finite number >= 0 and <= 1, got '2'; for example 0.4",
    ]


def test_files_that_cannot_be_read(yaml, tmp_path):
    file = yaml("seed: 1\nalpha: 0.1\nalpha: 0.2\n")
    assert f"{file}: not valid YAML: line 3: found duplicate key" in mistakes("--config", file)
    assert f"{file}: not valid YAML: line 1" in mistakes("--config", yaml("seed: [1"))
    assert f"{file}: expected lines of key: value, got [1]" in mistakes("--config", yaml("- 1"))
    assert f"{file}: is its own base" in mistakes("--config", yaml("base: a.yaml"))
    missing = tmp_path / "aa.yaml"
    assert mistakes("--config", str(missing)) == f"{missing}: no such file; did you mean {file}?"
    assert f"{tmp_path / 'gone.yml'}: no such file" in mistakes("--config", yaml("base: gone.yml"))
    assert mistakes("--config") == "--config: a value is missing"
    assert load(Config, yaml("")) == read()


def test_stray_words():
    assert mistakes("pretrain") == "pretrain: expected --flag value (see --help)"
    assert mistakes("--seed", "1", "2") == "--seed 1: what is '2' after it?"
    assert mistakes("--overrides", "seed") == "--overrides seed: expected key=value"


def test_a_wrong_default_is_the_programmers_mistake():
    @dataclass
    class Wrong:
        size: int = knob("big", "pixels")

    @dataclass
    class Unsupported:
        size: set = knob(1, "pixels")

    with pytest.raises(TypeError, match=r"Wrong.size: default 'big'"):
        parse(Wrong, [])
    with pytest.raises(TypeError, match="cannot hold"):
        parse(Unsupported, [])


def test_cross_checks_of_the_dataclass_see_the_final_values():
    @dataclass
    class Checked:
        a: int = knob(0, "must be set")

        def __post_init__(self):
            if self.a == 0:
                raise UserError("a: set it")

    assert parse(Checked, ["--a", "1"]).a == 1
    with pytest.raises(UserError, match="a: set it"):
        parse(Checked, [])


# ---- to a file and back ----------------------------------------------------------------------------------------------


def test_round_trip(tmp_path):
    config = read(
        "--train-file",
        "a, b",
        "x: y",
        "--checkpoint",
        "p/q",
        "--lr",
        "1e-5",
    )
    path = tmp_path / "config.yaml"
    save(config, path)
    assert load(Config, path) == config
    assert "  lr: 1e-05  # peak learning rate, absolute\n" in path.read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]
    assert to_dict(config)["optimizer"]["betas"] == [0.9, 0.999] and to_dict(config)[
        "checkpoint"
    ] == str(Path("p/q"))


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    save(read("--seed", "1"), path)
    monkeypatch.setattr(
        config_module.os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(UserError, match=r"config.yaml: not written, disk full"):
        save(read("--seed", "2"), path)
    assert load(Config, path).seed == 1
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
numbers = st.floats(allow_nan=False, allow_infinity=False)


@settings(
    max_examples=60,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    st.lists(texts, max_size=3),
    numbers,
    texts,
    st.none() | st.integers(-(2**63) + 1, 2**63 - 1),
)
def test_any_configuration_survives_a_file(tmp_path, files, number, text, k_test):
    config = Config(train_file=files, resume=text, k_test=k_test)
    config.optimizer = dataclasses.replace(config.optimizer, weight_decay=number)
    save(config, tmp_path / "config.yaml")
    assert load(Config, tmp_path / "config.yaml") == config


def test_differences():
    old = to_dict(read("--lr", "1e-4", "--train-file", "a"))
    new = to_dict(read("--lr", "2e-4", "--train-file", "a", "b", "--k_test", "3"))
    assert differences(old, old) == []
    assert differences(old, new) == [
        "train_file: a -> a,b",
        "k_test: none -> 3",
        "optimizer.lr: 0.0001 -> 0.0002",
    ]
    assert differences({"a": 1, "s": {"b": 1}}, {"s": {"c": True}}) == [
        "a: 1 -> (absent)",
        "s.b: 1 -> (absent)",
        "s.c: (absent) -> true",
    ]


# ---- running a script ------------------------------------------------------------------------------------------------


def test_help_shows_description_groups_and_defaults(capsys):
    with pytest.raises(SystemExit) as left:
        parse(Config, ["--alpha", "wrong", "--help"], "Train it.\n\n    python train.py")
    out = capsys.readouterr().out
    assert left.value.code == 0
    order = [
        "usage: ",
        "Train it.",
        "--train-file TEXT ...",
        "optimizer: How the weights move:",
        "The run:",
        "--seed INT",
    ]
    assert [out.index(part) for part in order] == sorted(out.index(part) for part in order)
    assert "--alpha FLOAT\n        share of soft targets, 0–1 [default: 0.4]" in out
    assert (
        "--workers, -j INT" in out and "--model {vit_b,vit_l}" in out and "--mode {pre,fine}" in out
    )
    assert "  --weight-decay, --wd FLOAT" in out and "[default: 0.0003]" in out
    assert "--optimizer." not in out  # its flat names are the ones to type
    assert "--scheduler.min-lr, --scheduler.lr-end FLOAT" in out


def test_help_into_a_pipe_that_nobody_reads_ends_without_a_traceback():
    code = "from runtime.config.cli import show_page; show_page('page')"
    unread, page = os.pipe()
    os.close(unread)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, stdout=page, stderr=subprocess.PIPE
    )
    os.close(page)
    assert (done.returncode, done.stderr) == (0, b"")


class Mendable(UserError):
    pass


def raised(error: BaseException) -> Callable:
    """A script that fails."""

    def main(_config):
        raise error

    return main


def leave_with(error: BaseException, monkeypatch, **environment: str) -> Any:
    for name in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    waited = []
    monkeypatch.setattr("runtime.advice.time.sleep", waited.append)

    with pytest.raises(SystemExit) as left:
        run_script(raised(error), Config, argv=[])
    return left.value.code, waited


def test_run_tells_what_people_can_mend_in_one_line(monkeypatch, capsys):
    assert leave_with(Mendable("no such image"), monkeypatch) == (2, [])
    assert capsys.readouterr().err == "error: no such image\n"
    assert leave_with(Mendable("no such image"), monkeypatch, RANK="0", SLURM_PROCID="3") == (2, [])
    assert capsys.readouterr().err == "error: no such image\n"


@pytest.mark.parametrize(
    "said",
    [
        "[/x/gloo/transport/tcp/pair.cc:545] Read error [::1]:7: Connection reset by peer. GLHF!",
        "[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:7",
        "NCCL error: remote process exited or there was a network error, NCCL version 2.27",
        "Failed to recv, got 0 bytes. Did the remote server shutdown or crash?",
    ],
)
def test_a_process_whose_peer_has_ended_leaves_with_a_sentence(monkeypatch, capsys, said):
    assert leave_with(RuntimeError(said), monkeypatch) == (1, [])
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: another process of this run has ended")


def test_what_the_system_says_about_a_file_is_one_line(monkeypatch, capsys, tmp_path):
    def main(_config):
        print("words of a terminal: \udcff")
        (tmp_path / ("x" * 300)).exists()

    for name in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", stdout)
    with pytest.raises(SystemExit, match="2"):
        run_script(main, Config, argv=[])
    stdout.flush()
    assert stdout.buffer.getvalue() == b"words of a terminal: \\udcff\n"
    [line] = capsys.readouterr().err.splitlines()
    assert re.match("error: /.*xxx: File name too long; name another file", line)
    with pytest.raises(FileNotFoundError):  # may be a fault of ours
        run_script(raised(FileNotFoundError(2, "No such file", "x")), Config, argv=[])


def test_a_loader_process_that_died_is_one_sentence_wherever_torch_says_so(monkeypatch, capsys):
    """It raises in a handler of signals, in the midst of an update."""
    died = RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. ")
    assert leave_with(died, monkeypatch)[0] == 2
    assert capsys.readouterr().err.startswith(
        "error: a data loading worker died (DataLoader worker"
    )


def test_a_fault_of_ours_keeps_its_traceback():
    fault = RuntimeError("[enforce fail at gloo/x.cc:7] op.preamble.length <= op.nbytes. 8 vs 4")
    with pytest.raises(RuntimeError, match="enforce fail"):
        run_script(raised(fault), Config, argv=[])


def test_run_on_another_rank_gives_the_first_the_word(monkeypatch, capsys):
    code, waited = leave_with(Mendable("no such image"), monkeypatch, SLURM_PROCID="3")
    assert code == 2 and waited[0] > 0
    assert capsys.readouterr().err == "error on rank 3: no such image\n"


def test_of_several_processes_none_takes_the_way_out_on_which_gloo_may_abort_it(monkeypatch):
    done = []
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(threading, "_shutdown", lambda: done.append("threads"))
    monkeypatch.setattr(atexit, "_run_exitfuncs", lambda: done.append("atexit"))
    monkeypatch.setattr(os, "_exit", done.append)
    leave_with(Mendable("no such image"), monkeypatch)
    assert done == ["threads", "atexit", 2]


def test_run_on_ctrl_c_and_on_defects(monkeypatch, capsys):
    assert leave_with(KeyboardInterrupt(), monkeypatch)[0] == 130
    with pytest.raises(ZeroDivisionError):
        run_script(lambda config: 1 / 0, Config, argv=[])
    with pytest.raises(SystemExit) as left:
        run_script(print, Config, argv=["--seeds", "1"])
    assert (
        left.value.code == 2
        and capsys.readouterr().err == "error: --seeds: unknown key; did you mean --seed?\n"
    )
    seen = []
    run_script(seen.append, Config, argv=["--seed", "9"])
    assert seen == [read("--seed", "9")]


def test_weights_that_do_not_fit_name_the_checkpoint(capsys, tmp_path):
    @dataclass
    class Tool:
        """A tool."""

        checkpoint: Path | None = knob(None, "weights")

    def main(_config):
        load_checkpoint(torch.nn.Linear(2, 1), {})

    for argv, begins in ((["--checkpoint", "other.pt"], "other.pt: the checkpoint"), ([], "the")):
        with pytest.raises(SystemExit):
            run_script(main, Tool, argv=argv)
        assert capsys.readouterr().err.startswith(f"error: {begins} ")
    with pytest.raises(UserError, match="init_text_encoder its blocks: the checkpoint does not"):
        load_text_transformer(
            torch.nn.ModuleDict({"transformer": torch.nn.Linear(2, 1)}),
            {"transformer.x": torch.zeros(1)},
        )


def test_a_mistyped_model_is_refused_before_the_built_in_data_are_made(
    capsys, monkeypatch, tmp_path
):
    from main import Config as MainConfig

    monkeypatch.chdir(tmp_path)
    words = ["--model", "CL2L_R50_CL2", "--shards", "data/digitscenes/shards"]
    with pytest.raises(SystemExit) as left:
        run_script(print, MainConfig, argv=words)
    assert left.value.code == 2 and "did you mean CL2L_R50_CL2L?" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_importing_is_cheap():
    code = "import runtime.config.cli, sys; assert not {'torch', 'numpy', 'ruamel.yaml'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


LAUGHS = "x0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"x{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9)
)


@pytest.mark.parametrize(
    "text, complaint",
    [
        (LAUGHS + "seed: *a8", "aliases stand for more than 2,000 values"),
        ("x: [" + "1, " * 5000 + "]", "not valid YAML: more than 2,000 values"),
        ("seed: &a [*a]", "nested deeper than 200 levels"),
        ("seed: " + "[" * 1000, "nested deeper than 200 levels"),
        ("seed: " + "[" * 300 + "]" * 300, "nested deeper than 200 levels"),
        ("base: 5", "base: expected a file, or a list of files"),
        ("base: [1, other.yaml]", "base: expected a file, or a list of files"),
        ("seed: [1, 2", "not valid YAML: line 1"),
        ("- 1", "expected lines of key: value"),
        ("seed: !!python/object:os.system x", "not valid YAML"),
        ("seed: " + "x" * 10_000, "seed: expected a whole number"),
        ("alpha: " + "9" * 400, "alpha: expected a finite number"),
        ("seed: {a: [" + "{b: [" * 50 + "]}" * 50 + "]}", "seed: expected a whole number"),
    ],
    ids=range(13),
)
def test_hostile_files_are_one_short_sentence(tmp_path, monkeypatch, text, complaint):
    monkeypatch.setattr("runtime.config.yaml.YAML_VALUES", 2000)
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        read("--config", str(file))
    assert complaint in str(error.value) and str(file) in str(error.value)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize(("first", "seed"), [("", 10), ("%YAML 1.1\n---\n", 8)])
def test_a_file_may_name_its_version_of_yaml(tmp_path, first, seed):
    (tmp_path / "c.yaml").write_text(f"{first}seed: 010\n")
    assert read("--config", str(tmp_path / "c.yaml")).seed == seed


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"\xef\xbb\xbfseed: 7\r\n")
    assert read("--config", str(tmp_path / "c.yaml")).seed == 7


def test_a_folder_given_as_configuration_lists_its_files(tmp_path):
    (tmp_path / "digits.yaml").write_text("seed: 1")
    with pytest.raises(UserError, match=r"is a folder; name one of its files: digits\.yaml"):
        read("--config", str(tmp_path))


# ---- names that every training script understands
SCRIPTS = [
    "Pretrain",
    "Retrieval",
    "VQA",
    "VE",
    "NLVR",
    "Grounding",
    "Classification",
    "Recognition",
    "main",
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_same_short_flags_in_every_training_script(script):
    config_class = importlib.import_module(script).Config
    flags = ["--lr", "3e-4", "--epochs", "7", "--wd", "0.3", "--warmup", "11 steps"]
    config = parse(config_class, [*NEEDED.get(script, ()), *flags])
    assert (config.optimizer.lr, config.optimizer.weight_decay) == (3e-4, 0.3)
    assert (config.scheduler.duration, config.scheduler.warmup) == ("7", "11 steps")


def test_the_learning_rate_of_old_schedules_is_the_optimizers(yaml):
    from VE import Config as VeConfig

    assert parse(VeConfig, ["--scheduler.lr", "5e-4"]).optimizer.lr == 5e-4
    old = yaml("optimizer: {lr: 1e-5}\nschedular: {lr: 1e-5}")
    assert parse(VeConfig, ["--config", str(old)]).optimizer.lr == 1e-5
    assert parse(VeConfig, ["--config", str(old), "--lr", "2e-5"]).optimizer.lr == 2e-5
    two = yaml("optimizer: {lr: 1e-5}\nschedular: {lr: 2e-5}")
    with pytest.raises(UserError, match="has two values: 1e-05 and 2e-05"):
        parse(VeConfig, ["--config", str(two)])
    wrong = yaml("optimizer: {lr: x}\nschedular: {lr: 3e-5}")
    with pytest.raises(UserError, match=r"^\S+:1: optimizer.lr: expected .*, got 'x'[^\n]*$"):
        parse(VeConfig, ["--config", str(wrong)])  # one mistake, not two values
    saved = yaml("optimizer: {lr: 1e-5}\nscheduler: {lr: null}")
    assert parse(VeConfig, ["--config", str(saved)]).optimizer.lr == 1e-5


def test_help_shows_what_the_method_uses(capsys):
    @dataclass
    class OfBeta:
        METHODS = "beta"
        bb: int = knob(1, "width of beta")

    @dataclass
    class Methods(Base, OfBeta):
        METHOD = "method"
        method: str = knob("alpha", "what to train", choices=("alpha", "beta"))
        aa: int = knob(1, "width of alpha", methods="alpha")
        cc: int = knob(1, "for experts", rare=True)

    parse(Methods, ["--method", "beta", "--aa", "2", "--bb", "2"])
    assert capsys.readouterr().out == "note: without effect here: --aa (of alpha, not of beta)\n"

    def shown(*argv: str) -> set[str]:
        with pytest.raises(SystemExit):
            parse(Methods, [*argv, "--help"] if "--help" not in argv else argv)
        words = capsys.readouterr().out.split()
        return {word for word in words if word in ("--aa", "--bb", "--cc", "--seed", "--method")}

    assert shown() == {"--aa", "--seed", "--method"}
    assert shown("--method", "beta") == {"--bb", "--seed", "--method"}
    assert shown("--help", "all") == {"--aa", "--bb", "--cc", "--seed", "--method"}
    assert shown("--resume", "all", "--help") == {"--aa", "--seed", "--method"}


@pytest.mark.parametrize(
    "flag, meant",
    [
        ("--steps", "--max-steps"),
        ("--step", "--max-steps"),
        ("--batch", "--batch-size"),
        ("--worker", "--workers"),
    ],
)
def test_an_unknown_flag_suggests_the_option_that_has_its_words(flag, meant):
    from Pretrain import Config as PretrainConfig

    with pytest.raises(UserError) as error:
        parse(PretrainConfig, [flag, "1"])
    assert str(error.value) == f"{flag}: unknown key; did you mean {meant}?"


def test_flags_that_go_with_another_option_are_named_without_it(capsys):
    from VE import Config as VeConfig

    parse(VeConfig, ["--offload", "--compile-mode", "blocks", "--shard-group", "0"])
    assert capsys.readouterr().out == (
        "note: without effect here: --offload (only with --parallel fsdp), "
        "--compile-mode (only with --compile true)\n"
    )
    parse(VeConfig, ["--offload", "--parallel", "fsdp"])
    assert capsys.readouterr().out == ""


def test_what_has_no_effect_is_reported_on_the_first_rank(yaml, capsys, monkeypatch):
    from VE import Config as VeConfig

    old = yaml("schedular: {decay_rate: 1, cooldown_epochs: 0}")
    parse(VeConfig, ["--config", str(old), "--mlm_probability", "0.15"])
    said = capsys.readouterr().out
    assert said.startswith("note: without effect here: schedular.decay_rate (no schedule of")
    assert "schedular.cooldown_epochs" in said and "--mlm-probability (no tokens are" in said
    assert said.count("\n") == 1
    monkeypatch.setenv("RANK", "1")
    parse(VeConfig, ["--mlm_probability", "0.3"])
    assert capsys.readouterr().out == ""


ALL_SCRIPTS = [*SCRIPTS, "eval_zeroshot", "eval_knn"]


@pytest.mark.parametrize("script", ALL_SCRIPTS)
def test_help_is_short_flat_and_explains_every_option(script):
    config_class = importlib.import_module(script).Config
    page = config_module.help_text(Draft(config_class))
    flags = [line for line in page.splitlines() if line.startswith("  --")]
    assert 15 < len(flags) <= 60
    everything = config_module.help_text(Draft(config_class), everything=True)
    schema = Schema(config_class)
    assert everything.count("\n  -") == len(schema.knobs)
    dotted = re.findall(r"^  --\w+\.([\w-]+)", everything, re.MULTILINE)
    assert set(dotted) <= {"momentum"}  # whose flat name is the teacher's
    assert [path for path, each in schema.knobs.items() if not each.help] == []


@pytest.mark.parametrize("script", ALL_SCRIPTS)
def test_ignored_names_are_accepted_with_their_reason_and_not_in_help(script, capsys):
    config_class = importlib.import_module(script).Config
    ignored = Schema(config_class).ignored
    assert not set(ignored) & set(Schema(config_class).knobs)
    everything = config_module.help_text(Draft(config_class), everything=True)
    for path, why in ignored.items():
        parse(config_class, [*NEEDED.get(script, ()), f"--{path}", "1"])
        assert f"--{path.replace('_', '-')} ({why})" in capsys.readouterr().out
        assert f"--{path.rpartition('.')[2].replace('_', '-')} " not in everything


def test_a_recipe_in_another_folder_is_suggested():
    from Pretrain import Config as PretrainConfig

    with pytest.raises(UserError, match=r"no such file; did you mean configs/Pretrain/simla\.yaml"):
        parse(PretrainConfig, ["--config", "configs/pretrain/simla.yaml"])
    with pytest.raises(UserError, match=r"no such file; its recipe here is configs/VQA/vqa\.yaml"):
        parse(PretrainConfig, ["--config", "configs/VQA.yaml"])


@pytest.mark.parametrize("name", ["save_every", "eval_every"])
def test_a_slip_in_a_duration_shows_before_any_data_are_read(name):
    from runtime.run import check_durations
    from VQA import Config as VqaConfig

    check_durations(parse(VqaConfig, []))
    with pytest.raises(UserError, match="duration '10 stepps'"):
        check_durations(parse(VqaConfig, [f"--{name}", "10 stepps"]))
    with pytest.raises(UserError, match=f"{name} '0 steps': every 0 updates is never or always"):
        check_durations(parse(VqaConfig, [f"--{name}", "0 steps"]))


def test_an_option_is_described_by_known_words_and_holds_one_of_its_choices():
    with pytest.raises(TypeError, match="chioces"):
        knob("a", "letter", chioces=("a", "b"))

    @dataclass
    class Letters:
        first: str = knob("a", "letter", choices=("a", "b", "c"))
        second: str | None = knob(None, "letter", choices=("a", "b"))

    check_choices(Letters())
    with pytest.raises(UserError, match=r"^first 'd' is unknown; use a, b or c$"):
        check_choices(Letters("d"))


def test_networks_that_are_left_open_have_the_options_of_pretraining():
    stated, left_open = Schema(FusionNetworks).knobs, Schema(Geometry).knobs
    assert set(stated) < set(left_open)
    for name, option in stated.items():
        same = (left_open[name].help, left_open[name].low, left_open[name].high)
        assert same == (option.help, option.low, option.high) and left_open[name].default is None


def test_what_a_script_needs_is_named_with_the_other_mistakes(capsys):
    @dataclass
    class Tool(Base):
        data: list[str] = knob([], "lists or folders", required=True)
        target: Path | None = knob(None, "folder to write to", required=True)
        kind: str = knob("x", "what they are", required=True)

    assert parse(Tool, ["--data", "a", "--target", "b"]) == Tool(data=["a"], target=Path("b"))
    with pytest.raises(UserError, match=r"^--kind: is needed"):
        parse(Tool, ["--data", "a", "--target", "b", "--kind", ""])
    with pytest.raises(UserError) as caught:
        parse(Tool, ["--data", "none", "--sed", "1"])
    assert str(caught.value).split("\n  ")[1:] == [
        "--sed: unknown key; did you mean --seed?",
        "--data: is needed: lists or folders",
        "--target: is needed: folder to write to",
    ]
    with pytest.raises(UserError, match=r"^--data: a value is missing$"):  # said once
        parse(Tool, ["--data", "--target", "b"])
    with pytest.raises(UserError, match=r"^--data: is needed"):
        parse(Tool, ["--data", "", "--target", "b"])
    with pytest.raises(SystemExit):
        parse(Tool, ["--help"])
    assert "folder to write to [required]" in capsys.readouterr().out


def test_words_before_the_first_flag_are_those_of_the_positional_option(yaml):
    @dataclass
    class Tool(Base):
        POSITIONAL = "folders"
        folders: list[Path] = knob([Path("output")], "folders")

    assert parse(Tool, ["a", "b", "--seed", "1"]) == Tool(seed=1, folders=[Path("a"), Path("b")])
    file = yaml("folders: [c]\nseed: 3")
    assert parse(Tool, ["a", "--config", file]) == Tool(seed=3, folders=[Path("a")])
    assert parse(Tool, ["--seed", "1"]).folders == [Path("output")]
    assert "[FOLDERS ...] [--config" in config_module.help_text(Draft(Tool)).splitlines()[0]
