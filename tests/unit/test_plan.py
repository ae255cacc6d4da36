"""scripts/plan.py: bounds by hand, traffic of rings, bad input in one sentence, the table's figures."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from base.errors import UserError
from runtime.gpus import GPUS
from runtime.simulate import bounds as b
from runtime.simulate.recorder import Collective, Group, Operation, Recorder, Trace
from runtime.simulate.stand_ins import attention, simulated_cpu, simulated_gpu

ROOT = Path(__file__).resolve().parents[2]
H100 = GPUS["h100"]
COPY = Operation("forward", "add", torch.bfloat16, 0, 10**9, 10**9, "a.py:1", 1, (10,))
PRODUCT = replace(COPY, name="mm", flops=10**12, read=10**6, written=10**6)


def test_a_copy_takes_its_bytes_and_a_product_its_flops():
    assert b.seconds(COPY, H100, "bf16") == pytest.approx(2e9 / (3.35e12 * 0.85))
    assert b.seconds(PRODUCT, H100, "bf16") == pytest.approx(1e12 / (989.4e12 * 0.7))
    in_float32 = replace(PRODUCT, dtype=torch.float32)
    assert b.seconds(in_float32, H100, "bf16") == pytest.approx(1e12 / (494.7e12 * 0.7))
    assert b.seconds(in_float32, H100, "fp32") == pytest.approx(1e12 / (67e12 * 0.7))


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
    assert next(group.bytes for group in recorder.trace.groups) == 4096 + 4096


def test_attention_kernels():
    with simulated_gpu(), Recorder() as recorder:
        q = torch.zeros(2, 4, 16, 64, dtype=torch.bfloat16)
        attention(q, q, q)
        attention(q, q, q, attn_mask=torch.ones(2, 1, 1, 16, dtype=torch.bool))
        attention(q.double(), q.double(), q.double())
    names = [o.name for o in recorder.trace.operations if o.name.startswith("_scaled")]
    assert names[0] == "_scaled_dot_product_flash_attention"
    assert names[1] == "_scaled_dot_product_efficient_attention"


def plan(*argv: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "scripts/plan.py", *argv]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


DEBUG = ("main.py", "--config", "configs/main/debug.yaml")


@pytest.mark.parametrize(
    "argv, sentence",
    [
        ((*DEBUG, "--gpu", "h1000"), "--gpu h1000: not a known GPU"),
        (("Nothing.py",), "Nothing.py: no script of that name"),
        (("eval_knn.py", "--config", "configs/eval_knn/debug.yaml"), "does not train"),
        ((*DEBUG, "--gpus", "0"), "--gpus 0"),
        ((*DEBUG, "--gpu", "1,1,0.01", "--search"), "no batch fits"),
        ((*DEBUG, "--bacth_size", "3"), "bacth_size"),
    ],
)
def test_bad_input_is_one_sentence(argv, sentence):
    result = plan(*argv)
    assert result.returncode == 2, result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert sentence in result.stderr and "Traceback" not in result.stderr, last


def test_the_figures_of_a_recipe():
    result = plan(*DEBUG, "--gpus", "8", "--samples", "4096", "--json")
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout)
    assert figures["global_batch"] == 8 * figures["batch_size"]
    assert figures["memory"]["fits"] and figures["memory"]["peak"] > 10**7
    parts = figures["memory"]["parts"]
    assert sum(parts.values()) == figures["memory"]["peak"]
    assert {"weights", "gradients", "optimizer"} <= parts.keys()
    assert figures["host_waits"] == []
    reduced = figures["traffic"]["bytes"]["allreduce_"]
    assert reduced > 2 * 7 / 8 * 4 * figures["trained_parameters"]
    assert figures["training"]["hours"][0] > 0


def test_the_table_names_everything():
    result = plan(*DEBUG, "--price", "2.5")
    assert result.returncode == 0, result.stderr
    for line in ("memory", "work", "step, eager", "step, compiled", "data", "checkpoint"):
        assert any(row.startswith(line) for row in result.stdout.splitlines()), result.stdout


def test_unknown_scripts_are_refused_in_process():
    from scripts.planning.simulate import load_script

    with pytest.raises(UserError, match="there are"):
        load_script("Pretrian")
