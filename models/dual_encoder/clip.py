"""CLIP (Radford et al., 2021) and SigLIP (Zhai et al., 2023) with two towers."""

import math

from torch import Tensor, nn

from models.dual_encoder.base import DualEncoder, Features
from models.dual_encoder.config import DualConfig
from models.layers.clip_towers import TwoTowers, linear_projector, mlp_projector


class CLIP(DualEncoder, TwoTowers):
    """Image tower and text transformer, each with a projector into the common space (z)."""

    def __init__(
        self,
        config: DualConfig,
        visual: nn.Module,
        scales: dict[str, float] | None = None,
        text_tower: nn.Module | None = None,
    ):
        all_scales = {"logit_scale": math.log(1 / 0.07)}
        all_scales.update(scales or {})
        super().__init__(visual, config.text, all_scales, text_tower=text_tower)
        self.config = config
        self.image_projector = self._projector(visual.num_features)
        text_width = config.text_width if text_tower is None else text_tower.num_features
        self.text_projector = self._projector(text_width)

    def _projector(self, width: int) -> nn.Module:
        out = self.config.embed_dim
        if self.config.clip_proj_type == "linear":
            return linear_projector(width, out, std=width**-0.5)
        return mlp_projector(width, self.config.clip_hidden_dim, out)

    def project_text(self, feats: Tensor) -> Tensor:
        """Text features [B,T] -> z [B,E]."""
        return self.text_projector(feats.detach() if self.config.detach_proj else feats)

    def features(
        self,
        image: Tensor,
        text_ids: Tensor,
        image_local: Tensor | None = None,
        feats_image: Tensor | None = None,
        feats_text: Tensor | None = None,
    ) -> Features:
        """`feats_*` [B,C], [B,T], `z_*` [B,E], and the scale of the logits. Local views are
        ignored; given `feats_*` are not computed again.
        """
        # texts first, so that the backward pass begins with the images and frees what they hold
        if feats_text is None:
            feats_text = self.text_features(text_ids[:, 0] if text_ids.ndim == 3 else text_ids)
        z_text = self.project_text(feats_text)
        if feats_image is None:
            feats_image = self.visual(image)
        return {
            "feats_image": feats_image,
            "z_image": self.image_projector(feats_image),
            "feats_text": feats_text,
            "z_text": z_text,
            "logit_scale": self.logit_scale.exp(),
        }

    def fixed_features(self) -> list[str]:
        if type(self) not in (CLIP, SigLIP):  # heads that look at local views besides
            return []
        towers = {"feats_image": self.visual, "feats_text": self.text_tower or self.transformer}
        return [name for name, tower in towers.items() if tower in self.locked]

    def embed_image(self, image: Tensor) -> Features:
        """Images [B,3,H,W] -> `feats` [B,C], `z` [B,E]."""
        feats = self.visual(image)
        return {"feats": feats, "z": self.image_projector(feats)}

    def embed_text(self, text_ids: Tensor) -> Features:
        """Texts int64 [B,L] -> `feats` [B,T], `z` [B,E]."""
        feats = self.text_features(text_ids)
        return {"feats": feats, "z": self.project_text(feats)}


class SigLIP(CLIP):
    """CLIP's towers under SigLIP's pairwise loss: a learned bias beside the scale, from which
    training starts at 10.
    """

    is_siglip = True

    def __init__(self, config: DualConfig, visual: nn.Module, text_tower: nn.Module | None = None):
        super().__init__(config, visual, {"logit_bias": -10.0}, text_tower)
        nn.init.constant_(self.logit_scale, math.log(10))

    def features(
        self, image: Tensor, text_ids: Tensor, image_local: Tensor | None = None, **feats: Tensor
    ) -> Features:
        """CLIP's, and the bias of the logits."""
        features = super().features(image, text_ids, **feats)
        features["logit_bias"] = self.logit_bias * 1.0  # a feature, not the parameter itself
        return features
