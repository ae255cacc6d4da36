"""OpenAI's CLIP behind the interface of a dual encoder."""

import math

from torch import Tensor

from models.dual_encoder.base import DualEncoder, Features
from models.dual_encoder.config import DualConfig
from models.layers.clip_towers import TwoTowers
from models.layers.openai_towers import ModifiedResNet, OpenAIConfig, OpenAIViT


class OpenAICLIP(DualEncoder, TwoTowers):
    """OpenAI's CLIP, trained with the same loss and evaluated through the same methods as the other
    dual encoders.
    """

    def __init__(self, config: OpenAIConfig, options: DualConfig | None = None):
        visual = ModifiedResNet(config) if config.is_resnet else OpenAIViT(config)
        matrices = {"text_projection": (config.text.width, config.embed_dim)}
        super().__init__(visual, config.text, {"logit_scale": math.log(1 / 0.07)}, matrices)
        self.config = config
        self.loss_options = options or DualConfig()

    @property
    def options(self) -> DualConfig:
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

    def embed_image(self, image: Tensor) -> Features:
        """Images [B,3,S,S] -> `z` [B,E]."""
        return {"z": self.visual(image)}

    def embed_text(self, text_ids: Tensor) -> Features:
        """Texts int64 [B,L] -> `z` [B,E]."""
        return {"z": self.text_features(text_ids) @ self.text_projection}
