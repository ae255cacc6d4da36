"""Loss values and gradients of clip-rocket and SLIP, on one process and on two."""

import pytest
import torch

from tests.golden.clip_cases import close
from tests.golden.report import same
from tests.helpers.clip_toys import losses_of
from tests.helpers.golden import golden, golden_file, recorded
from tests.helpers.processes import spawn

MODELS = {
    ("rocket", "CLIPLoss"): "CLIP_VITT8_CLIP",
    ("rocket", "CL2LLoss"): "CL2L_VITT8_CL2L",
    ("rocket", "BarLIPLoss"): "CL2L_VITT8_BARLIP",
    ("rocket", "SiamLIPLoss"): "CL2L_VITT8_SIAMLIP",
    ("rocket", "SwALIPLoss"): "CL2L_VITT8_SWALIP",
    ("rocket", "SwALIPV1Loss"): "CLIP_VITT8_SWALIPV1",
    ("slip", "CLIPLoss"): "CLIP_VITT8",
    ("slip", "SIMCLRLoss"): "SIMCLR_VITT8",
    ("slip", "SLIPLoss"): "SLIP_VITT8",
}
KNOBS = {"lamb": "barlip_lamb", "scale_loss": "barlip_scale_loss"}


def load(stem: str) -> tuple[dict, dict]:
    return golden("clip_rocket", f"losses/{stem}")


@pytest.mark.parametrize("name", recorded("clip_rocket", "losses", "single_process.json"))
@pytest.mark.parametrize("compat", ["none", "original"])
def test_single_process(name, compat):
    meta, tensors = load("single_process")
    check(name, meta[name], tensors, compat)


def check(name: str, case: dict, tensors: dict, compat: str) -> None:
    inputs = {
        k.removeprefix(f"{name}/in."): v.clone()
        for k, v in tensors.items()
        if k.startswith(f"{name}/in.")
    }
    leaves = {k: v.requires_grad_() for k, v in inputs.items()}
    features = stack_views(leaves)
    config = {KNOBS.get(k, k): v for k, v in case["config"].items()}
    if case["loss"] in ("SIMCLRLoss", "SLIPLoss"):
        config["ssl_temp"] = config.pop("temperature")
    config.pop("temperature", None)  # an argument the original accepts and ignores
    out = losses_of(MODELS[case["system"], case["loss"]], features, compat=compat, **config)
    assert set(out) == set(case["outputs"])
    for key, expected in case["outputs"].items():
        close(out[key], expected, f"{name} {key}")
    out["loss"].backward()
    listed = {f"in.{key}" for key in leaves} | {
        f"grad.{key}" for key, leaf in leaves.items() if leaf.grad is not None
    }
    same(
        f"clip_rocket {name}",
        "tensors that are recorded",
        sorted(listed),
        sorted(case.get("tensors", listed)),
    )
    for key, leaf in leaves.items():
        expected = tensors.get(f"{name}/grad.{key}")
        if expected is None:
            assert leaf.grad is None or not leaf.grad.any(), (
                f"{name}: {key} should have no gradient"
            )
        else:
            close(leaf.grad, expected, f"{name} gradient of {key}")


def stack_views(leaves: dict) -> dict:
    """`h_image_local.0`, `.1` ... -> `h_image_local` [B,A,D]."""
    features: dict = {}
    for key, value in leaves.items():
        stem, _, index = key.partition(".")
        features.setdefault(stem, []).append((int(index or 0), value))
    views = {k: [v for _, v in sorted(pairs, key=lambda p: p[0])] for k, pairs in features.items()}
    return {k: torch.stack(v, 1) if f"{k}.0" in leaves else v[0] for k, v in views.items()}


def compare_rank(rank: int) -> None:
    meta, tensors = load(f"world{torch.distributed.get_world_size()}_rank{rank}")
    for name, case in meta.items():
        check(name, case, tensors, "original")


def test_several_processes_as_the_original():
    ranks = sorted(golden_file("clip_rocket", "losses").glob("world*_rank*.json"))
    for file in ranks:
        load(file.stem)  # whatever is missing shows here
    spawn(compare_rank, len(ranks))
