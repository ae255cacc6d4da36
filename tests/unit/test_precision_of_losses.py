"""Under bf16 autocast the losses are those of float32 features: no logit is rounded to bfloat16."""

import pytest
import torch

from models.dual_encoder import objectives
from models.dual_encoder.base import DualConfig, DualEncoder

METHODS = ["clip", "siglip", "align", "cl2l", "barlip", "siamlip", "swalip", "slip"]


def features() -> dict[str, torch.Tensor]:
    """Features of every method for 32 pairs, partners alike, at CLIP's temperature of 0.01."""
    torch.manual_seed(0)
    base = torch.nn.functional.normalize(torch.randn(32, 64), dim=-1)

    def near(*views: int) -> torch.Tensor:
        shape = base[:, None].expand(-1, *views, -1) if views else base
        return (shape + 0.1 * torch.randn(shape.shape)).requires_grad_()

    out = {
        name: near()
        for name in ("z_image", "z_text", "z_image_global", "z_text_global", "v_image", "v_text")
    }
    out |= {
        name: near()
        for name in ("image_embed", "text_embed", "aug1_embed", "aug2_embed", "p_image", "p_text")
    }
    out |= {f"{kind}_{side}_local": near(2) for kind in "hvp" for side in ("image", "text")}
    scale = torch.tensor(100.0)
    return out | {
        "logit_scale": scale,
        "h_logit_scale": scale,
        "logit_bias": -scale / 10,
        "temperature": 1 / scale,
    }


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tile", [None, 16])
def test_losses_in_float32(method, tile):
    class Method(DualEncoder):
        loss = staticmethod(getattr(objectives, method))

    model = Method()
    model.config = DualConfig(tile=tile, label_smoothing=0.0)
    results = []
    for autocast in (False, True):
        out = features()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            losses = model.losses(out)
        losses["loss"].backward()
        results.append(
            (losses["loss"], {name: x.grad for name, x in out.items() if x.grad is not None})
        )
    (plain, gradients), (cast, cast_gradients) = results
    assert cast.dtype == torch.float32
    assert torch.equal(plain, cast)
    assert gradients.keys() == cast_gradients.keys() and gradients
    for name, gradient in gradients.items():
        assert torch.equal(gradient, cast_gradients[name]), name
