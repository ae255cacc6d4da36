"""Every benchmark runs in its tiny setting, all sides in this process."""

import importlib
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

from base.errors import UserError
from benchmarks import child, runner

STEP = {"tiny": True, "warmup": 0, "steps": 1, "batch": 2, "repeats": 1}
RUNS = {  # benchmark and settings: rows of the table that the run must have
    ("pretrain", "system=simla"): (STEP, ["ours"]),
    ("pretrain", "system=albef"): ({**STEP, "precision": "bf16"}, ["ours"]),
    ("dual", ""): ({**STEP, "tokens": 12}, ["ours", "open_clip"]),
    ("vit", ""): ({**STEP, "image_size": 32, "classes": 9}, ["ours", "timm", "transformers"]),
    ("align", ""): (
        {**STEP, "image_size": 64, "batch": 4, "virtual_batch": 2, "length": 8},
        ["ours", "transformers"],
    ),
    ("knn", ""): (
        {"train": 300, "queries": 40, "width": 8, "k": 3, "repeats": 1},
        ["ours", "scikit-learn"],
    ),
    ("contrastive", ""): (
        {"pairs": 64, "width": 8, "tile": 16, "repeats": 1},
        ["tiles of 16", "dense"],
    ),
    ("retrieval", ""): ({"tiny": True, "images": 3, "k_test": 2, "repeats": 1}, ["ours"]),
    ("recognition", ""): (
        {**STEP, "cases": ["1", "train"], "labels": 3},
        ["top 3, case 1: ours", "training step, 2 images: ours"],
    ),
    ("views", ""): (
        {"items": 10, "repeats": 1},
        [
            "decode: ours",
            "read a zip member: reference",
            "sample from zips: reference",
        ],
    ),
    ("startup", ""): (
        {"shards": 8, "samples": 64, "ranks": 1, "workers": 1, "batch": 4, "repeats": 1},
        ["rank 0"],
    ),
    ("checkpoint", ""): (
        {"gigabytes": 0.01, "repeats": 1},
        ["ours", "one file, beside", "sharded, waiting", "one file, waiting"],
    ),
}


@pytest.fixture
def in_this_process(monkeypatch):
    """Sides are called instead of started; a real process is in test_bench_table.py."""

    def run_side(name, function, options, processes=0, **more):
        device = runner.device_of(options)
        return child.call(function, {**asdict(options), "device": device, "side": name, **more})

    monkeypatch.setattr(runner, "run_side", run_side)
    monkeypatch.setattr(runner, "current_load", lambda: 0.0)


SLOW = {("startup", "")}  # starts three sets of loader workers
# two networks and more a side; vit has as many sides, and ALBEF's is the same script
SLOW |= {("pretrain", "system=simla"), ("dual", ""), ("align", ""), ("views", "")}
CASES = [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in RUNS]


@pytest.mark.parametrize("name", CASES, ids=lambda name: "-".join(filter(None, name)))
def test_the_benchmark_runs_and_prints_its_rows(name, in_this_process, capsys, monkeypatch):
    module = importlib.import_module(f"benchmarks.{name[0]}")
    if name[0] == "views":
        monkeypatch.setattr(module, "IMAGES", 4)
        monkeypatch.setattr(module, "MEMBERS", 40)
    settings, rows = RUNS[name]
    more = dict([name[1].split("=")]) if name[1] else {}
    config = module.Config(**{"threads": 1, "device": "cpu", "report": ""} | settings | more)
    module.main(config)
    out = capsys.readouterr().out
    for row in rows:
        (line,) = [line for line in out.splitlines() if line.startswith(f"| {row} |")]
        assert any(cell.strip(" x%GiB").replace(".", "").isdigit() for cell in line.split("|")[2:])
    assert f"python -m benchmarks.{name[0]}" in out and "Machine: " in out
    if name[0] == "knn":
        assert "100.0000%" in out
    if name[0] == "contrastive":
        (dense,) = [line for line in out.splitlines() if line.startswith("| dense |")]
        assert float(dense.split("|")[-2]) < 1e-5


@pytest.mark.parametrize("library", ["ours", "timm", "transformers"])
def test_all_libraries_have_the_same_network(library):
    settings = {"image_size": 32, "classes": 9, "model": "vit-b/16", "precision": "fp32"}
    settings |= {"compile": False, "activation_checkpointing": True, "device": "cpu"}
    result = child.call("benchmarks.vit:step", settings | STEP | {"side": library})
    assert result["cpu_seconds"] > 0 and result["parameters"] == 51625


def test_measure_leaves_out_the_warmup():
    calls = []
    options = SimpleNamespace(device="cpu", warmup=2, steps=3)
    result = child.measure(lambda: calls.append(0), options)
    assert len(calls) == 5 and result["seconds"] < 1
    assert result["peak_bytes"] > 50e6  # torch alone is larger


def test_the_first_call_is_marked(monkeypatch):
    clock = SimpleNamespace(perf_counter=lambda: 3.0, process_time=lambda: 1.0)
    monkeypatch.setattr(child, "time", clock)
    marks = [(1.0, 0.5)]
    function = child.marking(lambda *args: sum(args), marks, "cpu")
    assert [function(1, 2), function(3, 4)] == [3, 7]
    assert marks == [(1.0, 0.5), (3.0, 1.0)]


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("pretrain", "models/simla/pretrain.py"),
        ("retrieval", "models/simla/retrieval.py"),
        ("dual", "losses.py"),
        ("vit", "backbones/vit/vit_model.py"),
        ("align", "models/efficientnet.py"),
        ("recognition", "src/decoding.py"),
    ],
)
def test_a_folder_that_is_no_checkout_is_one_error(name, file, tmp_path):
    module = importlib.import_module(f"benchmarks.{name}")
    with pytest.raises(UserError, match=f"no {file} there; it takes a checkout of"):
        module.main(module.Config(peer=str(tmp_path), report=""))
    if name in ("vit", "align"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).touch()
        with pytest.raises(UserError, match="--peer-python"):
            module.main(module.Config(peer=str(tmp_path), report=""))


def test_inputs_beside_clip_rocket_have_its_size():
    from benchmarks.inputs import random_batch

    options = SimpleNamespace(batch=1, tokens=8, tiny=True, peer=None)
    assert random_batch(options)["image"].shape[-1] == 32
    options.peer = "PATH"  # its network has one size, so has ours beside it
    found = {name: tuple(value.shape) for name, value in random_batch(options).items()}
    local = (1, 2, 3, 224, 224)
    assert found == {"image": (1, 3, 224, 224), "text_ids": (1, 3, 77), "image_local": local}


def test_captions_of_the_dual_encoders_end_where_they_say():
    from benchmarks.inputs import END, clip_captions

    ids = clip_captions(5, 3, longest=12)
    ends = (ids == END).int().argmax(-1)
    assert ids.shape == (5, 3, 77) and ends[0, 0] == 11
    assert ((ids == END).sum(-1) == 1).all() and ends.min() >= 7 and ends.max() <= 11
    after = torch.arange(77) > ends[..., None]
    assert (ids[after] == 0).all() and (ids[~after] > 0).all()
