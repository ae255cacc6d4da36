"""SLIP, its CLIP and SimCLR (Mu et al., ECCV 2022), with linear projections."""

import math

import torch
from torch import Tensor, nn

from models.dual_encoder import objectives as dual_losses
from models.dual_encoder.base import DualConfig, DualEncoder
from models.dual_encoder.objectives import Features
from models.layers.clip_towers import (
    TwoTowers,
    has_batch_norm,
    mlp_projector,
)


class SlipCLIP(DualEncoder, TwoTowers):
    """SLIP's CLIP: projections are plain matrices at the root."""

    loss = staticmethod(dual_losses.slip_clip)

    def __init__(self, config: DualConfig, visual: nn.Module):
        widths = {"image_projection": visual.num_features, "text_projection": config.text_width}
        matrices = {name: (width, config.embed_dim) for name, width in widths.items()}
        super().__init__(visual, config.text, {"logit_scale": math.log(1 / 0.07)}, matrices)
        self.config = config

    def features(
        self, image: Tensor, text_ids: Tensor, image_local: Tensor | None = None
    ) -> Features:
        """`image_embed`, `text_embed` [B,E] and the scale."""
        return self._language(self.visual(image), text_ids)

    def _language(self, image_feats: Tensor, text_ids: Tensor) -> Features:
        text_feats = self.text_features(text_ids[:, 0] if text_ids.ndim == 3 else text_ids)
        return {
            "image_embed": image_feats @ self.image_projection,
            "text_embed": text_feats @ self.text_projection,
            "logit_scale": self.logit_scale.exp(),
        }

    def embed_image(self, image: Tensor) -> Features:
        feats = self.visual(image)
        return {"feats": feats, "z": feats @ self.image_projection}

    def embed_text(self, text_ids: Tensor) -> Features:
        feats = self.text_features(text_ids)
        return {"feats": feats, "z": feats @ self.text_projection}


class Slip(SlipCLIP):
    """SLIP: CLIP on the image, SimCLR on two augmentations of it, one tower for all three."""

    loss = staticmethod(dual_losses.slip)

    def __init__(self, config: DualConfig, visual: nn.Module):
        super().__init__(config, visual)
        self.image_mlp = mlp_projector(visual.num_features, config.ssl_mlp_dim, config.ssl_emb_dim)

    def features(self, image: Tensor, text_ids: Tensor, image_local: Tensor) -> Features:
        """CLIP's, and `aug1_embed`, `aug2_embed` [B,D]; `image_local` [B,2,3,H,W] are the
        augmentations."""
        if has_batch_norm(self.visual):
            feats = [self.visual(view) for view in (image, *image_local.unbind(1))]
        else:
            feats = self.visual(torch.cat([image, *image_local.unbind(1)])).chunk(3)
        augmented = {f"aug{i}_embed": self.image_mlp(view) for i, view in enumerate(feats[1:], 1)}
        return augmented | self._language(feats[0], text_ids)


class SimCLR(DualEncoder):
    """SLIP's self-supervised baseline: the image tower and its projector."""

    loss = staticmethod(dual_losses.slip_simclr)

    def __init__(self, config: DualConfig, visual: nn.Module):
        super().__init__()
        self.config, self.visual = config, visual
        self.image_mlp = mlp_projector(visual.num_features, config.ssl_mlp_dim, config.ssl_emb_dim)

    def features(
        self, image_local: Tensor, image: Tensor | None = None, text_ids: Tensor | None = None
    ) -> Features:
        """`aug1_embed`, `aug2_embed` [B,D] of `image_local` [B,2,3,H,W]; the other inputs are
        ignored."""
        if has_batch_norm(self.visual):
            feats = [self.visual(view) for view in image_local.unbind(1)]
        else:
            feats = self.visual(torch.cat(image_local.unbind(1))).chunk(2)
        return {f"aug{i}_embed": self.image_mlp(view) for i, view in enumerate(feats, 1)}

    def embed_image(self, image: Tensor) -> Features:
        return {"feats": self.visual(image)}

    def clamp_scales(self) -> None:
        """Nothing to clamp; here so that scripts need not ask."""
