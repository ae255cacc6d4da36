"""Two processes give the losses and gradients of one process with the whole batch, for every dual
encoder.

In float64: in float32 the gradients of two runs may part by percents after a few updates, where a
ReLU behind a batch norm turns on in one of them alone (SLIP's projector).
"""

import copy

import pytest
import torch
import torch.distributed as dist

from models.layers.average import WeightAverage
from models.layers.batchnorm import synchronise_batch_norm
from models.layers.library_towers import start_towers
from tests.helpers.clip_toys import ToyConvNet, cached_losses, losses_with_total, toy, toy_batch
from tests.helpers.gradients import assert_same_gradients
from tests.helpers.processes import spawn

PAIRS = 8
IN_FLOAT32 = ("tiled", "siglip", "barlip", "swalip", "cached")  # parts of their losses
CASES = {
    "clip": {"model": "CLIP_VITB16_CLIP"},
    "clip_tiled": {"model": "CLIP_VITB16_CLIP", "tile": 3},
    "siglip": {"model": "CLIP_VITB16_SIGLIP"},
    "siglip_tiled": {"model": "CLIP_VITB16_SIGLIP", "tile": 3},
    "cl2l": {"separate_proj": True, "label_smoothing": 0.1, "loss_avg_or_sum": "sum"},
    "cl2l_tiled": {"separate_proj": True, "label_smoothing": 0.1, "tile": 3},
    "cl2l_convolutional": {"separate_proj": True},
    "cl2l_linear": {
        "cl2l_img_proj_type": "linear",
        "cl2l_txt_proj_type": "linear",
        "separate_proj": True,
    },
    "barlip": {"model": "CL2L_VITB16_BARLIP", "separate_proj": True, "separate_proj_child": True},
    "barlip_many_pairs": {  # more of them than features: through the correlation matrix
        "model": "CL2L_VITB16_BARLIP",
        "separate_proj": True,
        "barlip_proj_dim": 6,
    },
    "siamlip": {"model": "CL2L_VITB16_SIAMLIP", "separate_proj": True},
    "byolip": {"model": "CL2L_VITB16_SIAMLIP"},
    "swalip": {"model": "CL2L_VITB16_SWALIP", "separate_proj": True},
    "swalipv1": {"model": "CLIP_VITB16_SWALIPV1", "target_epsilon": 0.5},
    "slip": {"model": "SLIP_VITB16"},
    "simclr": {"model": "SIMCLR_VITB16"},
}


def gradients(name: str, batch: dict, cached: bool = False) -> tuple[dict, dict, dict]:
    """Losses, gradients and batch-norm buffers of one step, averaged over the processes there
    are."""
    model = toy(**CASES[name], visual=ToyConvNet() if "convolutional" in name else None).double()
    if name == "byolip":
        teacher = copy.deepcopy(model).requires_grad_(False)
        WeightAverage([(teacher, toy(**CASES[name], seed=5).double())]).update(0.5)
        model.momentum_model = teacher
    synchronise_batch_norm(model)
    if cached:
        parts = [
            {k: v[i : i + 2] for k, v in batch.items()} for i in range(0, len(batch["image"]), 2)
        ]
        losses = cached_losses(model, parts)
    else:
        losses = losses_with_total(model, batch)
        losses["loss"].backward()
    grads = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    losses = {k: v.detach() for k, v in losses.items()}
    if dist.is_initialized():
        for value in [*losses.values(), *grads.values()]:
            dist.all_reduce(value)
            value /= dist.get_world_size()
    return losses, grads, dict(model.named_buffers())


def whole_batch() -> dict:
    batch = toy_batch(PAIRS)
    return {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}


def half(batch: dict, rank: int) -> dict:
    return {k: v[rank * PAIRS // 2 : (rank + 1) * PAIRS // 2] for k, v in batch.items()}


def on_two(rank: int, expected: dict) -> None:
    for name, (losses, grads, buffers) in expected.items():
        compare(name, losses, grads, *gradients(name, half(whole_batch(), rank)), buffers)
    for name in ("clip", "cl2l_linear"):
        losses, grads, _ = expected[name]
        compare(
            f"{name} cached",
            losses,
            grads,
            *gradients(name, half(whole_batch(), rank), cached=True),
        )


def compare(name, losses, grads, own_losses, own_grads, own_buffers, buffers=None) -> None:
    part = 1e-6 if any(word in name for word in IN_FLOAT32) else 1e-11
    assert own_losses.keys() == losses.keys()
    for key, value in losses.items():
        torch.testing.assert_close(
            own_losses[key], value, rtol=part, atol=part, msg=lambda m, k=key: f"{name} {k}: {m}"
        )
    assert_same_gradients(own_grads, grads, part)
    for key, value in (buffers or {}).items():
        torch.testing.assert_close(
            own_buffers[key], value, rtol=part, atol=part, msg=lambda m, k=key: f"{name} {k}: {m}"
        )


def test_two_processes_equal_one():
    spawn(on_two, 2, {name: gradients(name, whole_batch()) for name in CASES})


@pytest.mark.parametrize("name", ["clip", "clip_tiled", "siglip", "cl2l_linear"])
def test_cached_accumulation_equals_the_large_batch(name):
    batch = whole_batch()
    losses, grads, _ = gradients(name, batch)
    compare(f"{name} cached", losses, grads, *gradients(name, batch, cached=True))


@pytest.mark.parametrize("lock", [["image"], ["text"], ["image", "text"]])
@pytest.mark.parametrize("name", ["clip", "siglip", "cl2l_linear"])
def test_a_locked_tower_is_computed_once_under_gradient_caching(name, lock):
    """Losses and gradients are those of one large batch. CL2L's heads see local views, too."""
    runs = []
    for cached in (False, True):
        model = toy(**CASES[name]).double()
        start_towers(model, None, lock, load=False)
        model.train()
        sizes = []
        towers = {"image": model.visual, "text": model.transformer}
        for tower in (towers[each] for each in lock):
            tower.register_forward_hook(
                lambda _, given, __, sizes=sizes: sizes.append(len(given[0]))
            )
        batch = whole_batch()
        if cached:
            parts = [{k: v[i : i + 2] for k, v in batch.items()} for i in range(0, PAIRS, 2)]
            losses = cached_losses(model, parts)
        else:
            losses = losses_with_total(model, batch)
            losses["loss"].backward()
        grads = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
        runs.append(({k: v.detach() for k, v in losses.items()}, grads, sum(sizes)))
    (losses, grads, rows), (own_losses, own_grads, own_rows) = runs
    compare(f"{name} cached", losses, grads, own_losses, own_grads, {})
    assert own_rows == rows * (2 if name == "cl2l_linear" else 1)


def test_cached_accumulation_moves_batch_statistics_once():
    _, _, buffers = gradients("barlip", whole_batch(), cached=True)
    tracked = {
        v.item() for k, v in buffers.items() if k.endswith("num_batches_tracked") and "global" in k
    }
    assert tracked == {4}  # once for each micro-batch


def compat_on_two(rank: int, dense: dict) -> None:
    """The original's gather lets no gradient through: its gradients are not those of the global
    batch."""
    CASES["clip_original"] = {"model": "CLIP_VITB16_CLIP", "compat": "original"}
    losses, grads, _ = gradients("clip_original", half(whole_batch(), rank))
    torch.testing.assert_close(losses["loss"], dense["loss"], rtol=1e-5, atol=1e-5)
    name = "image_projector.weight"
    assert (grads[name] - dense[name]).norm() > 0.05 * dense[name].norm()


def test_compat_keeps_the_originals_gather():
    losses, grads, _ = gradients("clip", whole_batch())
    spawn(compat_on_two, 2, losses | grads)
