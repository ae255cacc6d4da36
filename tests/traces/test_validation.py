"""The simulator against the CPU: the predicted peak of memory is the tracked peak of a real step, and
times are in proportion."""

import statistics
import time

import pytest
import torch

from scripts.gpu_checks.runs import Run
from tests.helpers.traces import ONE_LAYER, trace_of

RECIPES = {
    "SIMLA": f"Pretrain --config configs/Pretrain/debug.yaml {ONE_LAYER['simla']}",
    "NXTP": f"Recognition --config configs/Recognition/debug.yaml {ONE_LAYER['nxtp']}",
    "VE": f"VE --config configs/VE/debug.yaml {ONE_LAYER['ve']}",
    "CL2L": "main --config configs/main/debug.yaml",
    "SLIP": "main --config configs/main/debug.yaml --model SLIP_VITT8 --batch_size 16",
    "ALIGN": "main --config configs/main/debug_align.yaml",
    "ViT, checkpointed": "Classification --config configs/Classification/debug.yaml "
    "--activation_checkpointing true --batch_size 32",
}


@pytest.mark.parametrize("name", RECIPES)
def test_predicted_peak_is_the_tracked_peak(name):
    predicted, real = trace_of(RECIPES[name], 1, "cpu"), trace_of(RECIPES[name], 1, "real")
    assert predicted.peak == pytest.approx(real.peak, rel=0.01)
    assert predicted.peak_phase == real.peak_phase
    assert predicted.flops == pytest.approx(real.flops, rel=0.01)
    assert not predicted.waits  # on one process; test_traces.py has those on eight


# of sizes at which products take most of the time: below, the dispatcher does
WIDE = "--vision_width 384 --vision_depth 6 --vision_heads 6 --image_res 96 --patch_size 8"
TIMED = {
    "ViT-S, 128 px": "Classification --config configs/Classification/debug.yaml --model vit-s/16 "
    "--batch_size 4 --image_size 128",
    "ViT-S, 96 px": "Classification --config configs/Classification/debug.yaml --model vit-s/16 "
    "--batch_size 8 --image_size 96",
    "VE": f"VE --config configs/VE/debug.yaml --bert_config configs/bert_small.json {WIDE} "
    "--batch_size_train 4",
    "Retrieval": "Retrieval --config configs/Retrieval/debug.yaml --batch_size_train 4 "
    f"--bert_config configs/bert_small.json {WIDE}",
    "SLIP": "main --config configs/main/debug.yaml --model SLIP_VITS16 --image_size 96 "
    "--batch_size 4 --text_width 256 --transformer_layers 4",
    "ALBEF": "Pretrain --config configs/Pretrain/debug.yaml --method albef --batch_size 4 "
    f"--bert_config configs/bert_small.json {WIDE}",
}
PROBES = 20


def processor_seconds(work, times: int) -> float:
    """Least processor time of one call: of one thread, other work on the machine disturbs it least."""
    found = []
    for _ in range(times):
        started = time.process_time()
        work()
        found.append(time.process_time() - started)
    return min(found)


def rates_of_this_processor() -> tuple[float, float, float]:
    """FLOP/s of float32 products, bytes/s of copies, seconds of an operation on one value."""
    x, one = torch.randn(512, 512), torch.zeros(1)
    source, target = torch.zeros(2**24), torch.empty(2**24)
    flops = 2 * 512**3 / processor_seconds(lambda: x @ x, PROBES)
    bandwidth = 2 * 4 * 2**24 / processor_seconds(lambda: target.copy_(source), PROBES)
    many = processor_seconds(lambda: [one.add_(1) for _ in range(1000)], PROBES)
    return flops, bandwidth, many / 1000


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_time_of_a_step_by_one_fitted_constant(one_thread):
    """Every operation takes its FLOPs or its bytes, whichever is longer, and a launch: times one
    constant, which the recipes share, that is a real step's processor time within 15 %."""
    flops, bandwidth, launch = rates_of_this_processor()
    predicted, runs = {}, {}
    for name, command in TIMED.items():
        trace = trace_of(command, 1, "cpu")
        predicted[name] = sum(
            max(o.flops / flops, (o.read + o.written) / bandwidth) + o.launches * launch
            for o in trace.operations
        )
        runs[name] = Run(command, torch.device("cpu"), "fp32")
        runs[name].step()
    # in turn: a shared host is faster and slower by the minute, and so for all alike
    rounds = [
        {name: processor_seconds(run.step, 1) for name, run in runs.items()} for _ in range(6)
    ]
    ratios = {name: min(each[name] for each in rounds) / predicted[name] for name in runs}
    constant = statistics.geometric_mean(ratios.values())
    assert ratios == pytest.approx(dict.fromkeys(ratios, constant), rel=0.15)
