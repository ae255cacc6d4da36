"""Shared by the golden tests of the dual encoders: weights by recipe, flags to configuration,
comparison."""

import re
import zlib

import numpy as np
import torch
from torch import nn

from models.dual_encoder.config import DualConfig
from models.layers.clip_towers import ClipViT
from models.layers.vit import ViTConfig
from tests.golden.report import compare

# toy geometry of the recorded cases -> our configuration
TOY = {
    "ctx": "context_length",
    "vocab": "vocab_size",
    "tw": "text_width",
    "th": "text_heads",
    "tl": "transformer_layers",
    "emb": "embed_dim",
    "mlp": "cl2l_hidden_dim",
    "clip_mlp": "clip_hidden_dim",
    "bar_h": "barlip_hidden_dim",
    "bar_p": "barlip_proj_dim",
    "si_h": "siamlip_hidden_dim",
    "si_p": "siamlip_proj_dim",
    "sw_h": "swalip_hidden_dim",
    "sw_p": "swalip_proj_dim",
    "sw_k": "swalip_num_proto",
}


KINDS = (
    "gradient",
    "buffer",
    "eval",
    "train",
    "encode_image_val",
    "encode_text_val",
    "predict_zeroshot",
    "weights",
)


def recipe_tensor(name: str, shape, seed: int) -> torch.Tensor:
    """The golden README's weight for a state-dict key."""
    shape = tuple(shape)
    count = int(np.prod(shape))
    x = np.random.RandomState(zlib.crc32(name.encode()) ^ seed).standard_normal(count)
    x = torch.from_numpy(x.astype(np.float32).reshape(shape))
    last = name.rsplit(".", 1)[-1]
    if not shape:
        return 2.0 + 0.1 * x
    if name.endswith("running_var"):
        return 1 + 0.2 * x.abs()
    if name.endswith("running_mean"):
        return 0.1 * x
    if len(shape) == 1 and last in ("weight", "gamma"):
        return 1 + 0.1 * x
    if len(shape) == 1:
        return 0.05 * x
    if name == "token_embedding.weight" or name.endswith(
        ("positional_embedding", "pos_embed", "cls_token", "class_embedding")
    ):
        return 0.1 * x
    if len(shape) == 2 and last in ("text_projection", "image_projection", "proj"):
        return x / shape[0] ** 0.5
    return x / (count / shape[0]) ** 0.5


def recipe_state(shapes: dict, seed: int, half: bool) -> dict[str, torch.Tensor]:
    """State dict for `name -> [shape, dtype]`; `half` rounds to half precision and back."""
    state = {}
    for name, (shape, dtype) in shapes.items():
        if not dtype.startswith(("float", "torch.float")):
            state[name] = torch.zeros(shape, dtype=torch.int64)
            continue
        value = recipe_tensor(name, shape, seed)
        state[name] = value.half().float() if half else value
    return state


def config_of(model: str, flags: list[str], toy: dict | None = None, **more) -> DualConfig:
    """DualConfig of a recorded command line; flags that are none of the model's are ignored."""
    values: dict = {TOY[k]: v for k, v in (toy or {}).items() if k in TOY}
    known = {**DualConfig.__dataclass_fields__}
    i = 0
    while i < len(flags):
        name = flags[i].removeprefix("--").replace("-", "_")
        has_value = i + 1 < len(flags) and not flags[i + 1].startswith("--")
        if name in known:
            kind = type(known[name].default)
            values[name] = True if not has_value else kind(flags[i + 1])
        i += 2 if has_value else 1
    return DualConfig(model=model, **{**values, **more})


def toy_vit(toy: dict) -> nn.Module:
    return ClipViT(ViTConfig(toy["img"], toy["patch"], toy["vw"], toy["vd"], toy["vh"]))


def close(actual, expected, what: str, tolerance: float = 1e-5, scale: float = 0.0) -> None:
    """Assert closeness relative to the largest recorded value, and note the error under the first
    word of `what`.

    scale: the least divisor, for values that are zero in exact arithmetic.
    """
    case, _, quantity = what.replace("/", " ").partition(" ")
    kind = quantity.split(".")[0].split(" ")[0]
    kind = kind if kind in KINDS else "losses and accuracies"
    expected = torch.as_tensor(expected)
    try:
        compare(
            f"clip_rocket {case}",
            kind,
            torch.as_tensor(actual).reshape(expected.shape),
            expected,
            tolerance,
            scale,
        )
    except AssertionError as error:
        raise AssertionError(f"{what}: {error}") from None


def close_sums(
    actual: torch.Tensor, expected, what: str, tolerance: float, noise: float = 0.0
) -> None:
    """The recorded sum and norm of a tensor: both errors are measured by the norm.

    noise: the least divisor, where all elements are zero in exact arithmetic.
    """
    size = max(float(expected[1]), noise)
    close(
        sum_and_norm(actual) / size,
        torch.tensor(expected, dtype=torch.float64) / size,
        what,
        tolerance,
        scale=1.0,
    )


def views_of(tensors: dict, prefix: str = "image_local.") -> list[str]:
    """The keys of the local views, in order."""
    found = [name for name in tensors if re.fullmatch(re.escape(prefix) + r"\d+", name)]
    return sorted(found, key=lambda name: int(name.rpartition(".")[2]))


def sum_and_norm(x: torch.Tensor) -> torch.Tensor:
    """Sum and L2 norm, accumulated in float64: float64 [2]."""
    x = x.detach().double()
    return torch.stack([x.sum(), x.norm()])
