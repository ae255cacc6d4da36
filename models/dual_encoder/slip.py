"""SLIP, its CLIP and SimCLR (Mu et al., ECCV 2022), with linear projections."""

import math

import torch
from torch import Tensor, nn

from models.dual_encoder.base import DualEncoder, Features
from models.dual_encoder.config import DualConfig
from models.dual_encoder.losses import clip_loss, simclr
from models.layers.clip_towers import TwoTowers, has_batch_norm, mlp_projector


class SlipCLIP(DualEncoder, TwoTowers):
    """SLIP's CLIP: projections are plain matrices at the root."""

    def __init__(self, config: DualConfig, visual: nn.Module):
        matrices = {
            "image_projection": (visual.num_features, config.embed_dim),
            "text_projection": (config.text_width, config.embed_dim),
        }
        super().__init__(visual, config.text, {"logit_scale": math.log(1 / 0.07)}, matrices)
        self.config = config

    def features(
        self, image: Tensor, text_ids: Tensor, image_local: Tensor | None = None
    ) -> Features:
        """`image_embed`, `text_embed` [B,E] and the scale."""
        features = self._language(text_ids)  # first: the backward pass begins with the images
        features["image_embed"] = self.visual(image) @ self.image_projection
        return features

    def _language(self, text_ids: Tensor) -> Features:
        text_feats = self.text_features(text_ids[:, 0] if text_ids.ndim == 3 else text_ids)
        return {
            "text_embed": text_feats @ self.text_projection,
            "logit_scale": self.logit_scale.exp(),
        }

    def losses(self, features: Features, targets: Features | None = None) -> Features:
        """CLIP's, see the base."""
        views = self.single_views(features["image_embed"], features["text_embed"])
        found = clip_loss(views, features["logit_scale"], tile=self.options.tile)
        return {"clip_loss": found.loss, "clip_acc": found.acc_image}

    def embed_image(self, image: Tensor) -> Features:
        """Images [B,3,H,W] -> `feats` [B,C], `z` [B,E]."""
        feats = self.visual(image)
        return {"feats": feats, "z": feats @ self.image_projection}

    def embed_text(self, text_ids: Tensor) -> Features:
        """Texts int64 [B,L] -> `feats` [B,T], `z` [B,E]."""
        feats = self.text_features(text_ids)
        return {"feats": feats, "z": feats @ self.text_projection}


class SimCLR(DualEncoder):
    """SLIP's self-supervised baseline: the image tower and its projector."""

    def __init__(self, config: DualConfig, visual: nn.Module):
        super().__init__()
        self.config = config
        self.visual = visual
        self.image_mlp = mlp_projector(visual.num_features, config.ssl_mlp_dim, config.ssl_emb_dim)

    def features(
        self, image_local: Tensor, image: Tensor | None = None, text_ids: Tensor | None = None
    ) -> Features:
        """`aug1_embed`, `aug2_embed` [B,D] of `image_local` [B,2,3,H,W]; the other inputs are
        ignored.
        """
        first, second = image_views(self.visual, image_local.unbind(1))
        return {"aug1_embed": self.image_mlp(first), "aug2_embed": self.image_mlp(second)}

    def losses(self, features: Features, targets: Features | None = None) -> Features:
        """`ssl_loss`, SimCLR's of the two augmentations, and `ssl_acc` of the first in percent."""
        loss, acc = simclr(features["aug1_embed"], features["aug2_embed"], self.options.ssl_temp)
        return {"ssl_loss": loss, "ssl_acc": acc}

    def embed_image(self, image: Tensor) -> Features:
        """Images [B,3,H,W] -> `feats` [B,C]."""
        return {"feats": self.visual(image)}

    def clamp_scales(self) -> None:
        """Nothing to clamp; here so that scripts need not ask."""


class Slip(SlipCLIP):
    """SLIP: CLIP on the image, SimCLR on two augmentations of it, one tower for all three."""

    def __init__(self, config: DualConfig, visual: nn.Module):
        super().__init__(config, visual)
        self.image_mlp = mlp_projector(visual.num_features, config.ssl_mlp_dim, config.ssl_emb_dim)

    def features(self, image: Tensor, text_ids: Tensor, image_local: Tensor) -> Features:
        """CLIP's, and `aug1_embed`, `aug2_embed` [B,D]; `image_local` [B,2,3,H,W] are the
        augmentations.
        """
        features = self._language(text_ids)
        image_feats, first, second = image_views(self.visual, (image, *image_local.unbind(1)))
        features["image_embed"] = image_feats @ self.image_projection
        features["aug1_embed"] = self.image_mlp(first)
        features["aug2_embed"] = self.image_mlp(second)
        return features

    def losses(self, features: Features, targets: Features | None = None) -> Features:
        """CLIP's and SimCLR's."""
        losses = super().losses(features)
        loss, acc = simclr(features["aug1_embed"], features["aug2_embed"], self.options.ssl_temp)
        losses["ssl_loss"] = loss
        losses["ssl_acc"] = acc
        return losses


def image_views(visual: nn.Module, views: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Features [B,C] of each view [B,3,H,W], in one pass where no batch statistics enter them."""
    if has_batch_norm(visual):
        return tuple(visual(view) for view in views)
    return visual(torch.cat(views)).chunk(len(views))
