"""scripts/plan.py: bounds by hand, traffic of rings, bad input in one sentence, the table's figures."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from base.errors import UserError
from models.dual_encoder.config import DualConfig
from models.dual_encoder.factory import build_dual
from models.layers.library_towers import HuggingFaceText
from runtime.config.cli import parse
from runtime.gpus import GPUS
from runtime.simulate import bounds as b
from runtime.simulate.fusion import Group
from runtime.simulate.recorder import Collective, Operation, Recorder, Trace
from runtime.simulate.stand_ins import attention, simulated_cpu, simulated_gpu
from scripts.plan import in_full
from scripts.planning.recipes import recipes
from scripts.planning.report import (
    Request,
    figures,
    gigabytes,
    milliseconds,
    text,
    total_hours,
    whole_cores,
)
from scripts.planning.simulate import Simulation
from scripts.planning.steps import Setup, pretrain
from scripts.planning.towers import bert_of_width, sized_text_tower, without_weights
from tests.helpers.processes import Run

CONFIGS = Path(__file__).parents[2] / "configs"
H100 = GPUS["h100"]
COPY = Operation("forward", "add", torch.bfloat16, 0, 10**9, 10**9, "a.py:1", 1, (10,))
PRODUCT = replace(COPY, name="mm", flops=10**12, read=10**6, written=10**6)


def test_a_copy_takes_its_bytes_and_a_product_its_flops():
    assert b.seconds(COPY, H100, "bf16") == pytest.approx(2e9 / (3.35e12 * 0.85))
    assert b.seconds(PRODUCT, H100, "bf16") == pytest.approx(1e12 / (989.4e12 * 0.803))
    in_float32 = replace(PRODUCT, dtype=torch.float32)
    assert b.seconds(in_float32, H100, "bf16") == pytest.approx(1e12 / (494.7e12 * 0.803))
    assert b.seconds(in_float32, H100, "fp32") == pytest.approx(1e12 / (67e12 * 0.803))


def test_bounds_of_a_step():
    trace = Trace([PRODUCT, COPY, COPY], [Group("forward", 10**9)])
    bound = b.bounds(trace, H100, "bf16", 1, 50e9)
    product, copy = (b.seconds(o, H100, "bf16") for o in (PRODUCT, COPY))
    assert bound.device == pytest.approx(product + 2 * copy)
    assert bound.fused == pytest.approx(product + copy / 2)
    assert bound.host == pytest.approx(3 * b.LAUNCH)
    assert bound.eager == bound.device and bound.exposed == 0


def test_traffic_of_rings():
    assert b.traffic(Collective("backward", "allreduce_", 800), 8) == 2 * 700
    assert b.traffic(Collective("forward", "_allgather_base_", 800), 8) == 700
    assert b.traffic(Collective("backward", "_reduce_scatter_base_", 800), 8) == 700


def test_communication_hides_behind_the_backward_pass():
    backward = replace(COPY, phase="backward")
    small = Trace([backward], [], [Collective("backward", "allreduce_", 10**6)])
    assert b.bounds(small, H100, "bf16", 8, 50e9).exposed == 0
    large = Trace([backward], [], [Collective("backward", "allreduce_", 10**12)])
    bound = b.bounds(large, H100, "bf16", 8, 50e9)
    assert bound.exposed == pytest.approx(2 * 7 / 8 * 1e12 / 450e9 - bound.device)
    early = Trace([backward], [], [Collective("forward", "_allgather_base_", 10**9)])
    assert b.bounds(early, H100, "bf16", 16, 50e9).exposed == pytest.approx(15 / 16 * 1e9 / 50e9)


def test_memory_of_a_small_step():
    """A product whose operands live: 4 MB of weights, 4 MB kept, and 4 MB that is freed at once."""
    with simulated_cpu(), Recorder() as recorder:
        weight = torch.zeros(1024, 1024)
        recorder.adopt([weight], "weights")
        kept = weight @ weight
        (weight + 1).sum()
        assert recorder.now == 8 * 2**20 or recorder.now == 8 * 2**20 + 512
        del kept
    assert recorder.trace.peak == 12 * 2**20 + 512
    assert recorder.trace.peak_parts["weights"] == 4 * 2**20
    assert recorder.trace.flops == 2 * 1024**3


def test_fused_groups_read_once_and_write_what_lives():
    with simulated_cpu(), Recorder() as recorder:
        x = torch.zeros(32, 32)
        y = ((x + 1) * 2).relu()
        y @ y
    assert sum(group.bytes for group in recorder.finish().groups) == 4096 + 4096


def fused_bytes(step) -> int:
    with simulated_cpu(), Recorder() as recorder:
        x = torch.zeros(32, 32)  # 4096 bytes
        recorder.restart()
        kept = step(x)
        groups = recorder.finish().groups
        del kept
    return sum(group.bytes for group in groups)


def test_what_nobody_reads_is_not_written():
    def unread(x):
        y = x + 1
        return y, x @ x  # y outlives the step: written

    def read_in_the_same_group(x):
        y = x + 1
        z = y * 2  # y, alive during the product, is read by no other kernel
        z @ z
        del y
        return z

    assert fused_bytes(unread) == 2 * 4096
    assert fused_bytes(read_in_the_same_group) == 2 * 4096


def test_operations_join_the_kernel_that_made_their_input():
    """A sum that the program computes after a product belongs to the kernel before it."""

    def late(x):
        y = x + 1
        y @ y
        return y.sum()

    def after(x):
        return ((x @ x) + 1) @ x  # reads the product, writes the operand of the next one

    assert fused_bytes(late) == 4096 + 4096 + 4  # x, y for the product, the sum
    assert fused_bytes(after) == 4096 + 4096


def test_copies_of_one_tensor_in_one_dtype_are_one():
    def thrice(x):
        halves = [x.bfloat16() for _ in range(3)]
        return [half @ half for half in halves], halves

    def parts(x):
        halves = [x[:16].bfloat16(), x[16:].bfloat16()]
        return [half @ half.t() for half in halves], halves

    def changed(x):
        y = x + 1
        first = y.bfloat16()
        second = y.add_(1).bfloat16()
        return first @ second, first, second

    assert fused_bytes(thrice) == 4096 + 2048
    assert fused_bytes(parts) == 2 * 2048 + 2 * 1024  # two parts, two copies
    assert fused_bytes(changed) == 4096 + 2 * 2048


def test_parts_of_a_tensor_are_read_one_by_one():
    """Halves of 2048 bytes each, also where the kernel reads all of it besides."""

    def halves(x):
        return x[:16] + x[16:]

    def halves_and_all(x):
        return x[:16] + x[16:], x * 2

    assert fused_bytes(halves) == 4096 + 2048
    assert fused_bytes(halves_and_all) == 4096 + 2048 + 4096


def backward_bytes(step) -> int:
    """Bytes of the fused kernels of `step(x, phase)`, which sets the phase by `phase("backward")`."""
    with simulated_cpu(), Recorder() as recorder:
        recorder.phase = "forward"
        x = torch.zeros(32, 32)  # 4096 bytes
        product = x @ x
        recorder.restart()
        kept = step(product, lambda name: setattr(recorder, "phase", name))
        groups = recorder.finish().groups
        del kept, x
    return sum(group.bytes for group in groups)


def test_elementwise_results_are_computed_again():
    """sigmoid(y) for the backward pass is neither written nor read where y is in memory anyway."""

    def again(y, phase):
        gate = y.sigmoid()
        z = gate * 2
        z @ z
        phase("backward")
        return gate * y

    def overwritten(y, phase):
        y = y + 0  # not in memory before this step's kernel
        gate = y.sigmoid()
        z = gate * 2
        z @ z
        y.add_(1)
        phase("backward")
        return gate * 3

    def reduced(y, phase):
        sums = y.softmax(-1)  # no elementwise operation
        z = sums * 2
        z @ z
        phase("backward")
        return sums * 3

    def gated(y, phase):
        gate = y.sigmoid()
        other = y @ y
        return gate * other  # reads y again: the kernel of the gate came before the product

    forward, backward = 4096 + 4096, 4096 + 4096  # y and z; y and the result
    assert backward_bytes(gated) == 4096 + 3 * 4096  # the gate is not written
    assert backward_bytes(again) == forward + backward
    # y + 1 outlives the product, so it is written; the gate of y is written and read
    assert backward_bytes(overwritten) == forward + 4096 + backward
    assert backward_bytes(reduced) == forward + 4096 + backward


def test_a_lookup_reads_what_it_returns():
    def look_up(x):
        rows = torch.zeros(4, dtype=torch.int64)
        return torch.nn.functional.embedding(rows, x), rows

    assert fused_bytes(look_up) == 4 * 32 * 4 * 2 + 4 * 8  # rows read and written, and the ids


def test_places_of_a_compiled_step():
    groups = [Group("forward", 10**9, "a.py:1"), Group("forward", 10**9, "a.py:1")]
    trace = Trace([PRODUCT, COPY], groups)
    found = b.compiled_places(trace, H100, "bf16")
    assert [(place.name, place.count, place.line) for place in found] == [
        ("mm", 1, "a.py:1"),
        ("fused", 2, "a.py:1"),
    ]
    total = b.bounds(trace, H100, "bf16", 1, 50e9).compiled
    assert sum(place.seconds for place in found) == pytest.approx(total)


def test_attention_kernels():
    with simulated_gpu(), Recorder() as recorder:
        q = torch.zeros(2, 4, 16, 64, dtype=torch.bfloat16)
        attention(q, q, q)
        attention(q, q, q, attn_mask=torch.ones(2, 1, 1, 16, dtype=torch.bool))
        attention(q.double(), q.double(), q.double())
    names = [o.name for o in recorder.trace.operations if o.name.startswith("_scaled")]
    assert names[0] == "_scaled_dot_product_flash_attention"
    assert names[1] == "_scaled_dot_product_efficient_attention"


def plan(*argv: str) -> Run:
    run = Run("scripts/plan.py", argv)
    run.wait()
    return run


DEBUG = ("Classification.py", "--config", "configs/Classification/debug.yaml")  # the fewest layers


@pytest.mark.parametrize(
    "argv, sentence",
    [
        ((*DEBUG, "--gpu", "h1000"), "--gpu h1000: not a known GPU"),
        (("Nothing.py",), "Nothing.py: no script of that name"),
        (("eval_knn.py", "--config", "configs/eval_knn/debug.yaml"), "does not train"),
        ((*DEBUG, "--gpus", "0"), "--gpus 0"),
        ((*DEBUG, "--gpus", "10000000"), "--gpus 10000000: give 1 or more, at most 131,072"),
        ((*DEBUG, "--price=-5"), "--price -5.0: give a finite number above 0"),
        ((*DEBUG, "--samples", "nan"), "--samples nan: give a finite number above 0"),
        ((*DEBUG, "--gpu", "1,1,0.01", "--search"), "no batch fits"),
        ((*DEBUG, "--bacth_size", "3"), "bacth_size"),
    ],
)
def test_bad_input_is_one_sentence(argv, sentence):
    result = plan(*argv)
    assert result.returncode == 2, result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert sentence in result.stderr and "Traceback" not in result.stderr, last


def test_files_are_those_of_the_callers_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("mine.yml", "sizes.json", "128"):
        (tmp_path / name).touch()
    words = ["--config", "mine.yml", "--config=mine.yml", "--bert_config", "sizes.json"]
    words += ["--batch_size", "128", "--lr=0.1", "--config", "configs/VE/debug.yaml"]
    mine, sizes = f"{tmp_path}/mine.yml", f"{tmp_path}/sizes.json"
    full = ["--config", mine, f"--config={mine}", "--bert_config", sizes, *words[5:]]
    assert [in_full(word) for word in words] == full


def test_the_figures_of_a_recipe():
    result = plan(*DEBUG, "--gpus", "8", "--samples", "4096", "--json", "--no-graphs")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["global_batch"] == 8 * found["batch_size"]
    assert found["memory"]["fits"] and found["memory"]["peak"] > 10**7
    parts = found["memory"]["parts"]
    assert sum(parts.values()) == found["memory"]["peak"]
    assert {"weights", "gradients", "optimizer"} <= parts.keys()
    assert found["host_waits"] == []
    reduced = found["traffic"]["bytes"]["allreduce_"]
    assert reduced > 2 * 7 / 8 * 4 * found["trained_parameters"]
    assert found["training"]["hours"][0] > 0


@pytest.fixture
def step():
    """A recorded step of 5 images a GPU and micro-batch, three of them, on four cards."""
    config = SimpleNamespace(precision="bf16", parallel="ddp", activation_checkpointing=True)
    config.accumulate = 3
    config.scheduler = SimpleNamespace(duration="2 epochs")
    setup = Setup(None, 5, None, image_bytes=1000, assumed=["one", "two"])
    gathered = Collective("forward", "_allgather_base_", 8 * 10**8)
    trace = Trace([PRODUCT, COPY], [Group("forward", 10**9)], [gathered, gathered])
    trace.peak, trace.peak_phase = 6 * 10**10, "backward"
    trace.peak_parts = {"weights": 2 * 10**10, "activations": 4 * 10**10, "gradients": 0}
    trace.waits["forward", "item", "a.py:3"] += 2
    return Simulation("VE", config, setup, trace, 4, 7 * 10**6, 3 * 10**9, 1.0)


def test_the_figures_by_hand(step):
    request = Request(H100, 4, network=1e9, price=2.0, samples=6e10)
    f = figures(step, request)
    bound = b.bounds(step.trace, H100, "bf16", 4, 1e9)
    assert (f["batch_size"], f["accumulate"], f["global_batch"]) == (5, 3, 60)
    assert f["seconds"]["eager"] == bound.eager > f["seconds"]["fused"] == bound.compiled
    flops = step.trace.flops
    assert f["mfu"]["eager"] == pytest.approx(flops / bound.eager / H100.half)
    assert f["mfu"]["fused"] == pytest.approx(flops / bound.compiled / H100.half)
    assert f["data"]["samples_per_second"] == [15 / bound.eager, 15 / bound.compiled]
    cores = [rate / b.SAMPLES_PER_CORE for rate in f["data"]["samples_per_second"]]
    assert f["data"]["loader_cores"] == cores
    assert f["data"]["bus_bytes_per_second"] == pytest.approx(1000 * 15 / bound.compiled)
    needed = b.memory_needed(step.trace, 4)
    memory = f["memory"]
    assert memory["beside"] == needed - 6e10 and memory["fraction"] == needed / H100.memory
    assert memory["parts"] == {"weights": 2e10, "activations": 4e10} and memory["fits"]
    small = figures(step, replace(request, gpu=replace(H100, memory=61e9)))
    assert not small["memory"]["fits"] and ": DOES NOT FIT (" in text(small, None)
    sent = 2 * 8e8 * 3 / 4
    traffic = f["traffic"]
    assert traffic["collectives"] == 2 and traffic["bytes"] == {"_allgather_base_": sent}
    assert traffic["seconds_in_node"] == pytest.approx(sent / H100.link)
    assert traffic["seconds_between_nodes"] == pytest.approx(sent / 1e9)
    assert f["checkpoint"] == {"bytes": 3e9, "seconds": 2.0}
    assert f["host_waits"] == [{"times": 2, "phase": "forward", "what": "item", "line": "a.py:3"}]
    hours = [2e9 * seconds / 3600 for seconds in (bound.compiled, bound.eager)]
    assert f["training"]["hours"] == pytest.approx(hours)
    said = " ".join(text(f, 2.0).split())
    low, high = (4 * one for one in hours)
    assert f"{low:,.0f} to {high:,.0f} GPU-hours, {2 * low:,.0f} to {2 * high:,.0f} at 2 a" in said
    assert f"at least {hours[0]:,.1f} (compiled) to {hours[1]:,.1f} hours" in said
    assert "4 x " in said and "ddp, activation checkpointing" in said
    assert "5 a GPU x 3 micro-batches x 4 GPUs = 60" in said and "assumed one; two" in said
    assert "backward) + about" in said and ": fits (" in said
    assert "activations 40.0 GB, weights 20.0 GB" in said, "the largest first"
    assert "host waits 2 a step" in said and "2 x item (forward) a.py:3" in said
    assert "2 collectives a step; a GPU sends _allgather_base_ 1.2 GB" in said
    assert "checkpoint 3.0 GB, about 2 s" in said and "at 2 a" not in text(f, None)
    assert ", 0 to 0 at 0 a GPU-hour" in text(f, 0.0), "a price of nothing is one"


def test_sizes_and_times_have_their_units():
    assert [gigabytes(size) for size in (99e6, 1e8, 2.54e9)] == ["99.0 MB", "0.1 GB", "2.5 GB"]
    assert [milliseconds(value) for value in (0.0015, 9.99, 12.34)] == [
        "1.5 ms",
        "9,990.0 ms",
        "12.3 s",
    ]


@pytest.mark.parametrize(
    "duration, samples, updates",
    [
        ("500 steps", None, 500),
        ("1 step", None, 1),
        ("600 samples", None, 10),
        ("1 sample", None, 1),
    ]
    + [
        ("2 epochs", None, None),
        ("2 epochs", 659.0, 20),
        ("2 epochs", 59.0, 2),
        ("9 steps", 6e9, 9),
    ],
)
def test_hours_of_a_duration(step, duration, samples, updates):
    step.config.scheduler.duration = duration
    found = total_hours(step, Request(H100, 4, 1e9, None, samples), 7.2)
    assert found == (None if updates is None else pytest.approx(7.2 * updates / 3600))


@pytest.mark.parametrize(
    "few, many, said",
    [
        (0.02, 0.3, "1 loader core"),
        (0.8, 1.2, "1 to 2 loader cores"),
        (7.1, 8.0, "8 loader cores"),
    ],
)
def test_a_part_of_a_loader_core_is_one(few, many, said):
    assert whole_cores(few, many) == said


def all_recipes_of(folder: Path, gpu: str = "h100") -> tuple[int, list[str]]:
    """Exit code and lines of scripts.planning.recipes."""
    run = Run("scripts/planning/recipes.py", (str(folder), "--gpu", gpu))
    run.wait()
    return run.returncode, (run.stdout + run.stderr).strip().splitlines()


@pytest.mark.slow
def test_every_recipe_of_a_folder_has_a_line(tmp_path):
    folder = tmp_path / "VE"
    folder.mkdir()
    debug = f"base: {CONFIGS / 'VE/debug.yaml'}\n"
    (folder / "good.yaml").write_text(debug)
    (folder / "typing_error.yaml").write_text(debug + "bacth_size: 3\n")
    nxtp = tmp_path / "Recognition/library_tower.yaml"  # whose weights are not here
    nxtp.parent.mkdir()
    tower = "image_tower: timm/resnet18:nowhere.safetensors\nimage_size: 64\n"
    nxtp.write_text(f"base: {CONFIGS / 'Recognition/debug.yaml'}\n{tower}")
    lit = tmp_path / "main/towers.yaml"  # neither of which is here
    lit.parent.mkdir()
    image = "image_tower: timm/test_resnet:nowhere.safetensors\nimage_size: 64\n"
    lit.write_text(f"base: {CONFIGS / 'main/photos.yaml'}\n{image}")
    code, lines = all_recipes_of(tmp_path, "1,1,0.1")
    assert code == 1 and len(lines) == 6
    assert lines.pop(2).startswith("| Recognition/library_tower.yaml | 8 | ")
    towers = lines.pop(-1)
    assert towers.startswith("| main/towers.yaml | 64 | ") and "| 0 |" in towers
    assert lines[2].startswith("| VE/good.yaml | 8 | ") and "does not fit | 0 |" in lines[2]
    assert lines[3].startswith("| VE/typing_error.yaml | FAILED: UserError: ")
    assert "bacth_size" in lines[3]


def test_a_text_tower_has_its_own_sizes_or_assumed_ones(tmp_path):
    import transformers

    shape = {"vocab_size": 77, "hidden_size": 8, "num_attention_heads": 1}
    transformers.BertConfig(**shape).save_pretrained(tmp_path)
    here = DualConfig(text_tower=f"hf/{tmp_path}")
    with sized_text_tower(here) as (network, said):
        assert network == replace(here, vocab_size=77)
        assert said == f"the 77 tokens of text_tower hf/{tmp_path}"
    nowhere = DualConfig(text_tower="hf/no/such", tower_classes="names", embed_dim=384)
    with sized_text_tower(nowhere) as (network, said):
        assert said.startswith("text_tower hf/no/such is not here: a BERT of 12 layers, width 384")
        with torch.device("meta"):
            assert HuggingFaceText(network.text_tower).num_features == 384
        sizes = transformers.AutoConfig.from_pretrained(network.text_tower.removeprefix("hf/"))
    assert (sizes.hidden_size, sizes.vocab_size) == (384, network.vocab_size) == (384, 30522)
    assert (sizes.num_attention_heads, sizes.intermediate_size) == (6, 1536)
    assert bert_of_width(160).num_attention_heads == 1, "of 160 channels, not 64"
    with (
        pytest.raises(UserError, match="write hf/NAME"),
        sized_text_tower(DualConfig(text_tower="timm/vit")),
    ):
        pass


def test_every_training_recipe_is_listed():
    """All YAML files but those of data sets and evaluations."""
    folders = {path.parent.name for path in CONFIGS.rglob("*.yaml")}
    left_out = folders - {path.parent.name for path in recipes([CONFIGS])}
    assert left_out == {"data", "eval_knn", "eval_zeroshot"}
    assert f"All {len(recipes([CONFIGS]))} recipes" in (CONFIGS.parent / "docs/PLAN.md").read_text()


TABLE = ["recipe", "cards", "batch", "assumed", "memory", "work", "step, eager", "step, compiled"]
TABLE += ["graphs", "host waits", "traffic", "data", "checkpoint", "training"]


def test_the_table_names_everything():
    result = plan(*DEBUG, "--price", "2.5", "--samples", "4096")
    assert result.returncode == 0, result.stderr
    for line in TABLE:
        assert any(row.startswith(line) for row in result.stdout.splitlines()), result.stdout
    for words in ("recompilations", "loader cores", "GPU-hours", "at 2.5 a GPU-hour", "to write"):
        assert words in result.stdout


@pytest.mark.parametrize("card", [4e9, 80e9])
def test_search_fills_the_card(card, monkeypatch):
    """The largest batch within 90 % of the card, where memory grows a little faster than the batch."""
    from scripts.planning import search

    def simulated(script, config, gpus):
        size, saving = config.batch_size, config.activation_checkpointing
        peak = 5e8 + size * (1e6 if saving else 4e6) * (1 + size / 1e6)
        trace = Trace([COPY], [Group("forward", size * (1 + saving) * 10**6)], peak=int(peak))
        return SimpleNamespace(trace=trace, config=config)

    def config(script, recipe):
        return SimpleNamespace(batch_size=32, precision="bf16")

    monkeypatch.setattr(search, "simulate", simulated)
    monkeypatch.setattr(search, "read_config", config)
    request = Request(replace(H100, memory=card), 1, 50e9, None, None)
    results = search.search(None, [], request)
    found = results.candidates
    assert [candidate.checkpointing for candidate in found] == [False, True]
    assert all(0.85 * card < candidate.memory <= 0.9 * card for candidate in found)
    for candidate in found:
        choice = {"activation_checkpointing": candidate.checkpointing}
        one = simulated(None, SimpleNamespace(batch_size=candidate.batch_size, **choice), 1)
        bound = b.bounds(one.trace, H100, "bf16", 1, 50e9)
        assert (candidate.eager, candidate.compiled) == (bound.eager, bound.compiled)
    fastest = found[0]  # without computing anything twice
    assert results.best() == fastest and results.figures()["best"] == vars(fastest)
    assert f"{fastest.batch_size} samples a GPU and micro-batch" in results.text()
    two = search.search(None, [], replace(request, gpus=2)).candidates
    asked = [(one.parallel, one.checkpointing) for one in two]
    assert asked == [("ddp", False), ("ddp", True), ("fsdp", False), ("fsdp", True)]


ALIGN = SimpleNamespace(model="ALIGN_B7", virtual_batch_size=96)


@pytest.mark.parametrize(
    "sizes, unit",
    [({"batch_size": 31, "network": ALIGN}, 96), ({"batch_size": 1, "batch_size_train": 20}, 8)],
)
def test_search_sets_the_scripts_own_batch_size_in_its_unit(monkeypatch, sizes, unit):
    from scripts.planning import search

    name = max(sizes, key=lambda key: key.startswith("batch_size_train"))
    tried = []

    def simulated(script, config, gpus):
        tried.append(config)
        peak = int(5e8 + 4e6 * getattr(config, name))
        trace = Trace([COPY], [Group("forward", 10**6)], peak=peak)
        return SimpleNamespace(trace=trace, config=config)

    monkeypatch.setattr(search, "simulate", simulated)
    recipe = {"precision": "bf16"} | sizes
    monkeypatch.setattr(search, "read_config", lambda *_: SimpleNamespace(**recipe))
    search.search(None, [], Request(replace(H100, memory=8e9), 1, 50e9, None, None))
    assert {one.parallel for one in tried} == {"ddp"} and len(tried) >= 6
    tried_sizes = [getattr(one, name) for one in tried]
    assert all(size >= unit and size % unit == 0 for size in tried_sizes)
    assert name == "batch_size" or {one.batch_size for one in tried} == {1}


def test_unknown_scripts_are_refused_in_process():
    from scripts.planning.simulate import load_script

    with pytest.raises(UserError, match="there are"):
        load_script("Pretrian")


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, recipe, most",
    [
        ("main", "main/cc12m_r50_barlip", 2.0),
        ("main", "main/cc12m_r50_cl2l", 2.0),
        ("main", "main/align_coyo700m", 1.0),
    ],
)
def test_a_thousand_ranks_gather_what_fits(script, recipe, most):
    """At 1,024 ranks a recipe fits its card, and what it holds for collectives stays below `most`
    GB: BarLIP's gathered projections would be 26."""
    recipe = ("--config", f"configs/{recipe}.yaml", "--gpus", "1024", "--gpu", "h100")
    result = plan(f"{script}.py", *recipe, "--no-graphs", "--json")
    assert result.returncode == 0, result.stderr
    memory = json.loads(result.stdout)["memory"]
    assert memory["fits"]
    assert 0 < memory["parts"]["communication"] < most * 1e9


def test_a_plan_locks_towers_and_reads_no_weights():
    def read(path):
        raise AssertionError(f"{path} was read")

    tower = "timm/test_resnet:nowhere.pth"
    config = DualConfig(model="CLIP_VITT8_CLIP", transformer_layers=1, image_tower=tower)
    model, script = build_dual(config), SimpleNamespace(start_towers=None)
    with without_weights(script):
        script.start_towers(model, read, ["image"], load=True)
    assert not any(parameter.requires_grad for parameter in model.visual.parameters())
    assert model.locked == (model.visual,)


def test_a_plan_of_pre_training_reads_no_tower():
    import Pretrain

    tower = ("--vision_tower", "timm/test_resnet:nowhere.pth", "--image_res", "64")
    config = parse(Pretrain.Config, ["--config", str(CONFIGS / "Pretrain/photos.yaml"), *tower])
    with torch.device("meta"):
        model = pretrain(Pretrain, config).model
    locked = model.visual_encoder.patch_embed.backbone.parameters()
    assert not any(parameter.requires_grad for parameter in locked)


def test_timms_rates_of_stochastic_depth_are_read_in_a_plan():
    import timm

    with simulated_gpu(), torch.device("meta"):
        network = timm.create_model("test_vit", drop_path_rate=0.4, num_classes=0)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in network.blocks]
    assert rates[0] == 0 and rates[-1] == pytest.approx(0.4)


@pytest.mark.slow
@pytest.mark.parametrize("make", ["siglip", "align"])
def test_a_librarys_pair(tmp_path, make):
    """Its texts are padded to the whole context, its images as large as it takes them."""
    from tests.helpers import tiny_hugging_face

    folder = tiny_hugging_face.saved(getattr(tiny_hugging_face, make), tmp_path)
    words = ("--model", f"hf/{folder}", "--batch_size", "4", "--no-graphs", "--json")
    result = plan("main.py", *words)
    assert result.returncode == 0, result.stderr
    assert "32 tokens, texts of 16 tokens" in result.stdout
