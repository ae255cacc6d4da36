"""OpenAI's CLIP behind the interface of a dual encoder."""

import math

from torch import Tensor

from models.dual_encoder.base import DualEncoder, Features, LossOptions
from models.dual_encoder.losses import clip_loss
from models.layers.clip_towers import TwoTowers
from models.layers.openai_towers import ModifiedResNet, OpenAIConfig, OpenAIViT


class OpenAICLIP(DualEncoder, TwoTowers):
    """OpenAI's CLIP, trained with the same loss and evaluated through the same methods as the other
    dual encoders.
    """

    def __init__(self, config: OpenAIConfig, options: LossOptions | None = None):
        visual = ModifiedResNet(config) if config.is_resnet else OpenAIViT(config)
        matrices = {"text_projection": (config.text.width, config.embed_dim)}
        super().__init__(visual, config.text, {"logit_scale": math.log(1 / 0.07)}, matrices)
        self.config = config
        self.loss_options = options or LossOptions()

    @property
    def options(self) -> LossOptions:
        return self.loss_options

    def features(
        self, image: Tensor, text_ids: Tensor, image_local: Tensor | None = None
    ) -> Features:
        """`z_image`, `z_text` [B,E] and the scale of the logits."""
        text = self.embed_text(text_ids[:, 0] if text_ids.ndim == 3 else text_ids)
        return {
            "z_image": self.visual(image),
            "z_text": text["z"],
            "logit_scale": self.logit_scale.exp(),
        }

    def losses(self, features: Features, targets: Features | None = None) -> Features:
        """`clip_loss`, the mean of both directions, and `clip_acc`, the top-1 accuracy of the
        images in percent."""
        views = self.single_views(features["z_image"], features["z_text"])
        found = clip_loss(views, features["logit_scale"], tile=self.options.tile)
        return {"clip_loss": found.loss, "clip_acc": found.acc_image}

    def embed_image(self, image: Tensor) -> Features:
        """Images [B,3,S,S] -> `z` [B,E]."""
        return {"z": self.visual(image)}

    def embed_text(self, text_ids: Tensor) -> Features:
        """Texts int64 [B,L] -> `z` [B,E]."""
        return {"z": self.text_features(text_ids) @ self.text_projection}
