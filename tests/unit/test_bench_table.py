"""The arithmetic, the turns and the page of the benchmarks; nothing is timed here."""

import json
import sys

import pytest

from base.errors import UserError
from benchmarks import runner, steps, table
from benchmarks.runner import OURS, Options, TrainOptions


def runs(*rows):
    return [{"seconds": s, "cpu_seconds": c, "peak_bytes": b} for s, c, b in rows]


RESULTS = {
    OURS: runs((1.0, 2.0, 6 << 30), (10.0, 2.0, 6 << 30), (1.0, 1.0, 6 << 30)),
    "other": runs((2.0, 6.0, 10 << 30), (20.0, 4.0, 12 << 30), (9.0, 2.0, 10 << 30)),
}


def test_ratios_are_medians_of_neighbouring_runs():
    # pairs 2, 2, 9: a disturbed pair counts once; the ratio of the medians would be 9, the mean 4.3
    pair = RESULTS["other"], RESULTS[OURS]
    assert table.FASTER.cell(*pair) == table.FASTER_CPU.cell(*pair) == "2.00 x"
    memory = table.Column("memory", "peak_bytes", ratio="higher")
    assert memory.cell(*pair) == "0.60"


def test_unequal_numbers_of_runs_are_no_pairs():
    with pytest.raises(ValueError, match="longer"):
        table.FASTER.cell(RESULTS["other"][:2], RESULTS[OURS])


def test_a_row_has_median_spread_and_ratios():
    for run in RESULTS[OURS]:
        run["mfu"] = 0.344
    head, _, ours, other = table.table(RESULTS, steps.COLUMNS).splitlines()
    assert head.startswith("|  | seconds a step | CPU seconds | samples/s | peak memory | MFU |")
    assert ours == "| ours | 1.000 (1.000-10.000) | 2.00 |  | 6.00 GiB | 34% |  |  |  |"
    assert other == (
        "| other | 9.000 (2.000-20.000) | 4.00 |  | 10.00 GiB |  | 2.00 x | 2.00 x | 0.60 x |"
    )


def test_rates_are_compared_the_other_way_round():
    faster = table.Column("ours is faster by", "rate", "{:.1f} x", ratio="higher")
    assert faster.cell([{"rate": 2.0}], [{"rate": 6.0}]) == "3.0 x"
    assert faster.cell([{"rate": 2.0}], []) == ""


def test_ours_alone_has_no_ratios():
    lines = table.table({OURS: RESULTS[OURS]}, steps.COLUMNS).splitlines()
    assert len(lines) == 3 and "faster" not in lines[0]
    assert lines[2].count("|") == lines[0].count("|") == lines[1].count("|")


def test_steps_are_compared_and_published(monkeypatch, capsys):
    monkeypatch.setattr(runner, "current_load", lambda: 0.1)
    step = {"cpu_seconds": 1.0, "peak_bytes": 1 << 30, "parameters": 2_500_000}
    seconds = {OURS: 0.5, "TF": 2.0}

    def run_side(name, function, options, **more):
        return {**step, "seconds": seconds[name], "library": "TensorFlow 2"}

    monkeypatch.setattr(runner, "run_side", run_side)
    options = TrainOptions(batch=8, device="cpu", report="")
    steps.compare_steps(options, "vit", ["ViT"], {OURS: "a:b", "TF": "c:d"})
    out = capsys.readouterr().out
    assert "| ours | 0.500 (0.500-0.500) | 1.00 | 16.000 |" in out and "4.00 x | 1.00 x" in out
    assert "2.5 million parameters. " in out and "TF: TensorFlow 2, float32." in out


def test_sections_are_replaced_and_others_kept():
    page = table.with_section("# Benchmarks\n", "A, batch 4", "first")
    page = table.with_section(page, "A, batch 4, compiled", "second")
    page = table.with_section(page, "A, batch 4", r"third \1")
    assert (
        page == "# Benchmarks\n\n## A, batch 4\n\nthird \\1\n\n## A, batch 4, compiled\n\nsecond\n"
    )


def test_settings_that_differ_have_different_headings():
    changes = [
        {},
        {"batch": 8},
        {"precision": "bf16"},
        {"compile": True},
        {"activation_checkpointing": True},
    ]
    headings = {tuple(steps.settings(TrainOptions(**change))) for change in changes}
    assert len(headings) == len(changes)


def test_the_command_line_has_the_settings_and_no_path_of_this_disk():
    from benchmarks import pretrain, recognition

    config = pretrain.Config(
        peer="/home/me/SIMLA", peer_python="/opt/python", batch=8, compile=True, busy=True
    )
    assert table.command_line(config, "pretrain") == (
        "python -m benchmarks.pretrain --peer PATH --peer-python PATH --batch 8 --compile true"
    )
    config = recognition.Config(cases=["1", "8"], labels=5)
    words = "python -m benchmarks.recognition --cases 1 8 --labels 5"
    assert table.command_line(config, "recognition") == words


def test_a_busy_machine_is_refused_or_waited_for(monkeypatch):
    loads = iter([1.9, 0.8, 0.1, 1.9])
    monkeypatch.setattr(runner, "current_load", lambda: next(loads))
    assert runner.idle_load(Options(wait=10)) == 0.1
    assert runner.idle_load(Options(busy=True)) == 1.9
    monkeypatch.setattr(runner, "current_load", lambda: 0.3)
    with pytest.raises(UserError, match=r"load 0\.3.*--wait MINUTES.*--busy"):
        runner.idle_load(Options(wait=0))


def measured(load: float, others: float) -> dict:
    loads = {OURS: [{"load": load, "others": others}], "other": [{"load": 0.0, "others": others}]}
    return {side: [{**run, "k": 5} for run in runs] for side, runs in loads.items()}


COLUMNS = [table.Column("neighbours", "k", "{:.0f}")]
TABLE = "|  | neighbours |\n| --- | --- |\n| ours | 5 |\n| other | 5 |"


def test_the_page_has_the_table_its_machine_load_and_command(tmp_path, capsys):
    page = tmp_path / "page.md"
    options = Options(busy=True, report=str(page), device="cpu", wait=3)
    table.publish(options, "knn", ["kNN", "cpu"], measured(1.9, 0.5), COLUMNS, "A remark.")
    text = page.read_text()
    assert text.startswith(
        "# Benchmarks\n\nWritten by the `benchmarks` package; each section names"
    )
    assert text.count("\n## ") == 1
    assert f"else refuses.\n\n## kNN, cpu\n\n{TABLE}\n\nA remark.\n\nMachine: " in text
    assert "(load 1.9 at the start, 0.5 meanwhile): times by the clock are disturbed." in text
    assert text.endswith("\n\n    python -m benchmarks.knn --device cpu\n")
    assert TABLE in capsys.readouterr().out
    assert table.load_note([{}]) == ""
    quiet = table.load_note([{"load": 0.12, "others": 0.05}])
    assert "disturbed" not in quiet and "Load 0.12 at the start, 0.05 meanwhile." in quiet


def test_what_other_work_disturbed_is_not_recorded(tmp_path, capsys):
    options = Options(report=str(tmp_path / "page.md"), device="cpu")
    for disturbed in (measured(0.4, 0.0), measured(0.0, 0.3)):
        with pytest.raises(UserError, match="nothing is recorded"):
            table.publish(options, "knn", ["kNN"], disturbed, COLUMNS)
    assert TABLE in capsys.readouterr().out and not list(tmp_path.iterdir())
    for title in ("kNN", "kNN, k 5"):
        table.publish(options, "knn", [title], measured(0.1, 0.2), COLUMNS, f"Of {title}.")
    page = (tmp_path / "page.md").read_text()
    assert "Of kNN." in page and "Of kNN, k 5." in page and page.count("Load 0.10") == 2


def test_the_load_is_the_cores_in_use(monkeypatch):
    busy = iter([100.0, 103.0])
    monkeypatch.setattr(runner, "busy_seconds", lambda: next(busy))
    assert runner.current_load(seconds=2e-3) == pytest.approx(1500)


def test_sides_take_turns_and_ours_comes_first(monkeypatch):
    order = []

    monkeypatch.setattr(runner, "current_load", lambda: 0.25)

    def run_side(name, function, options, **more):
        order.append(name)
        return {"seconds": float(len(order)), "cpu_seconds": 0.0, **more}

    monkeypatch.setattr(runner, "run_side", run_side)
    sides = {"other": "a:b", OURS: "c:d"}
    results = runner.take_turns(Options(repeats=3), sides, exchange="folder")
    assert order == ["other", OURS, OURS, "other", "other", OURS]
    assert list(results) == [OURS, "other"]
    assert [run["seconds"] for run in results[OURS]] == [2, 3, 6]
    assert results[OURS][0]["exchange"] == "folder" and results[OURS][0]["load"] == 0.25


def test_a_side_runs_in_a_process_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "sides.py").write_text(
        "import os\n"
        "def step(options):\n"
        "    print('noise')\n"
        "    return {'pid': os.getpid(), 'limit': os.environ['OMP_NUM_THREADS'], **vars(options)}\n"
        "def fail(options):\n"
        "    raise RuntimeError('no such thing')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    options = Options(threads=3, device="cpu")
    result = runner.run_side("x", "sides:step", options, exchange="folder")
    assert result["others"] >= 0 and 0 < result["spent"] < 20
    assert result["pid"] != runner.os.getpid() and result["limit"] == "3"
    assert (result["device"], result["exchange"], result["repeats"]) == ("cpu", "folder", 3)
    assert result["side"] == "x"
    with pytest.raises(UserError, match=r"(?s)x failed \(exit 1\).*no such thing"):
        runner.run_side("x", "sides:fail", options)


def test_the_original_runs_by_its_own_interpreter(tmp_path):
    fake = tmp_path / "python"
    fake.write_text(
        f"#!{sys.executable}\nimport json, sys\nprint(json.dumps({{'words': sys.argv[1:]}}))"
    )
    fake.chmod(0o755)
    options = runner.PeerOptions(peer_python=str(fake), device="cpu")
    words = runner.run_side("x", "benchmarks.peers.no:function", options)["words"]
    assert words[:-1] == ["-m", "benchmarks.child", "benchmarks.peers.no:function"]
    assert json.loads(words[-1])["device"] == "cpu"
    launched = runner.run_side("x", "benchmarks.peers.no:function", options, 2)["words"]
    assert launched[:4] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    assert launched[4:] == words
    with pytest.raises(UserError, match="No module named 'no'"):
        runner.run_side("x", "no:function", options)


def test_one_table_has_all_cases():
    speed = table.Column("ours is faster by", "seconds", "{:.0f} x", ratio="lower")
    results = {
        "a: ours": [{"seconds": 1.0}],
        "a: other": [{"seconds": 3.0}],
        "b: ours": [{"seconds": 2.0}],
    }
    lines = table.table(results, [table.SECONDS, speed]).splitlines()
    assert lines[2:] == ["| a: ours | 1.0 |  |", "| a: other | 3.0 | 3 x |", "| b: ours | 2.0 |  |"]
    del results["a: ours"]
    assert table.table(results, [table.SECONDS, speed]).splitlines()[0] == "|  | seconds |"
