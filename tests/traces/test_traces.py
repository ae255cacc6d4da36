"""What a step would do on a GPU, for every training script and method: never wait, recompute in the
dtype of the forward pass, losses and contrastive logits in float32, attention in a fused kernel.

Each trace is of the script's own step in bf16 on fake tensors, at a small size, in a fake group of
eight; a step on one process is traced in test_validation.py.
"""

import inspect
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from base.distributed import World
from models.fusion.base import ImageTextModel
from models.fusion.losses import masked_patches
from runtime.log import Meters
from runtime.run import Run
from runtime.simulate.recorder import Operation, Recorder, _calling_line
from runtime.simulate.stand_ins import simulated_gpu
from tests.helpers.traces import STEPS as METHODS
from tests.helpers.traces import call_in_worker, trace_of
from tests.traces.waiting import talking_step, waiting_step

# a small ViT: CLIP has a residual network, of many more operations
STEPS = {
    name: command if name == "clip" else command.replace("_RT_", "_VITT8_")
    for name, command in METHODS.items()
}
CHECKPOINTED = {
    name: STEPS[name] + " --activation_checkpointing true"
    for name in ("simla", "clip", "align", "vit")
}
LOSSES = ("models/dual_encoder/losses.py", "models/dual_encoder/objectives.py")
FUSION = ("simla", "albef", "retrieval", "grounding")  # methods with a queue and ITM
# what losses are made of; the gates of EfficientNet are sigmoids, too, but no loss
KINDS = {"_softmax", "_log_softmax", "nll_loss_forward", "logsumexp", "exp", "log", "softplus"}
KINDS |= {"binary_cross_entropy_with_logits"}


@pytest.mark.parametrize("name", STEPS)
def test_the_host_never_waits(name):
    trace = trace_of(STEPS[name], 8)
    assert not trace.waits, "\n".join(f"{n} x {wait}" for wait, n in trace.waits.items())
    assert len(trace.operations) > 100


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name] != STEPS[name]])
def test_the_host_never_waits_for_residual_networks(name):
    """Batch norm across processes is where hosts wait; each method calls it in its own way."""
    trace = trace_of(METHODS[name], 8)
    assert not trace.waits, "\n".join(f"{n} x {wait}" for wait, n in trace.waits.items())
    assert any("batch_norm" in operation.name for operation in trace.operations)


@pytest.mark.parametrize("opt", ["muon", "lamb"])
def test_no_update_waits(opt):
    """AdamW is in the traces above, timm's are in test_optimizers.py."""
    trace = trace_of(f"{STEPS['ve']} --optimizer.opt {opt}")
    assert not trace.waits, "\n".join(f"{n} x {wait}" for wait, n in trace.waits.items())
    assert len([o for o in trace.operations if o.phase == "optimizer"]) > 3


@pytest.mark.parametrize("name", CHECKPOINTED)
def test_recomputation_in_the_dtype_of_the_forward_pass(name):
    """Each product that runs again in the backward pass ran before in the same dtype, or less often."""
    plain, saving = trace_of(STEPS[name], 8), trace_of(CHECKPOINTED[name], 8)
    assert not saving.waits, saving.waits
    forward = {(o.line, o.name, o.dtype, o.shape) for o in plain.operations if o.phase == "forward"}
    before = Counter((o.name, o.dtype, o.shape) for o in plain.operations if o.phase == "backward")
    again = Counter((o.name, o.dtype, o.shape) for o in saving.operations if o.phase == "backward")
    recomputed = again - before
    assert sum(recomputed.values()) > 10
    for name_, dtype, shape in recomputed:
        known = {d for _, n, d, s in forward if n == name_ and s == shape}
        assert not known or dtype in known, (name_, dtype, shape, known)
    products = [key for key in recomputed if key[0] in ("addmm", "mm", "convolution", "bmm")]
    assert products
    assert {str(dtype) for _, dtype, _ in products} == {"torch.bfloat16"}


@pytest.mark.parametrize("name", [n for n in STEPS if STEPS[n].startswith("main")])
def test_contrastive_losses_in_float32(name):
    """No operation of the dual encoders' losses computes in half precision."""
    operations = [o for o in trace_of(STEPS[name], 8).operations if o.line.startswith(LOSSES)]
    assert len(operations) > 10
    half = {(o.line, o.name) for o in operations if o.dtype is not None and o.dtype.itemsize == 2}
    # features arrive in half precision and become float32 in one operation
    assert not {key for key in half if key[1] not in ("_to_copy", "clone", "copy_")}, half


@pytest.mark.parametrize("name", STEPS)
def test_softmax_and_cross_entropy_in_float32(name):
    operations = [o for o in trace_of(STEPS[name], 8).operations if o.name in KINDS]
    assert operations
    assert {str(o.dtype) for o in operations} == {"torch.float32"}


def called_in(function, operations: list[Operation]) -> list[Operation]:
    """The operations that lines of this function call."""
    lines, first = inspect.getsourcelines(function)
    file = inspect.getsourcefile(function)
    numbers = range(first, first + len(lines))
    return [
        o
        for o in operations
        if file.endswith(o.line.split(":")[0]) and int(o.line.split(":")[1]) in numbers
    ]


@pytest.mark.parametrize("name", FUSION)
def test_logits_of_fusion_encoders_in_float32(name):
    """The products of image-text contrast and of matching; their gradients, too."""
    operations = trace_of(STEPS[name], 8).operations
    for function in (ImageTextModel.similarities, ImageTextModel.match_logits):
        products = [o for o in called_in(function, operations) if o.flops]
        assert {o.phase for o in products} == {"forward", "backward"}
        assert {o.dtype for o in products} == {torch.float32}, (function, products)


def test_masked_patches_are_sorted_once():
    """The image tokenizer and masked image modelling use the same positions."""
    operations = trace_of(STEPS["simla"], 8).operations
    assert Counter(o.name for o in called_in(masked_patches, operations))["sort"] == 1


@pytest.mark.parametrize("name", STEPS)
def test_attention_is_fused(name):
    names = Counter(o.name for o in trace_of(STEPS[name], 8).operations)
    assert not [n for n in names if "attention_math" in n]
    fused = [n for n in names if n.startswith("_scaled_dot_product") and "backward" not in n]
    assert fused, "no attention at all"


def test_a_wait_is_seen():
    """The recorder itself: each of Python's ways to wait is found, with its line."""
    trace = call_in_worker(waiting_step)
    found = {what.split(" ")[0] for _, what, _ in trace.waits}
    assert {"a", "indexing", ".cpu():", "torch.tensor(…,", ".to(device):", "nonzero"} <= found
    assert len(trace.copies) == 1
    assert all(line.startswith("tests/traces/waiting.py") for _, _, line in trace.waits)


@pytest.mark.parametrize("place", ["/env/lib/python3.12/site-packages/a.py", "-env/lib/a.py"])
def test_lines_of_libraries_are_not_ours(place):
    """An environment lies in the repository under any name, or beside it under a similar one."""
    library = compile("line = calling_line()", f"{Path(__file__).parents[2]}{place}", "exec")
    exec(library, known := {"calling_line": _calling_line})
    assert known["line"].startswith("tests/traces/test_traces.py:")


def test_collectives_take_fake_tensors():
    """Those of every torch: 2.6 itself runs them on real tensors alone."""
    sizes = [(c.name, c.size) for c in call_in_worker(talking_step).collectives]
    assert sizes == [
        ("allreduce_", 16),
        ("_allgather_base_", 128),
        ("_reduce_scatter_base_", 128),
        ("allreduce_coalesced_", 32),
        ("broadcast_", 16),
        ("barrier", 1),
    ]


def test_counting_losses_does_not_wait():
    """The log reads the means at log points alone; the updates between add to them on the device."""
    with simulated_gpu(), Recorder() as recorder:
        meters = Meters()
        for _ in range(3):
            value = torch.zeros((), device=torch.device("cpu"))
            meters.add(loss=value, grad_norm=value)
        assert not recorder.trace.waits
        meters.read()
    assert recorder.trace.waits  # one copy, whose values are read


def test_processes_ask_about_signals_at_log_points_alone():
    """Asking is a collective whose answer the host waits for."""
    asked = []

    def pending(device) -> bool:
        asked.append(device)
        return False

    run = SimpleNamespace(
        world=World(0, 8, 0, torch.device("cuda")),
        config=SimpleNamespace(log_every=10),
        interrupt=SimpleNamespace(pending=pending),
        plan=SimpleNamespace(total=25),
    )
    run._is_log_point = lambda step: Run._is_log_point(run, step)
    for step in range(1, 26):
        Run._interrupted(run, step)
    assert len(asked) == 3  # steps 10, 20 and the last
