"""ALIGN (Jia 2021) as COYO-ALIGN trains it: EfficientNet and BERT under a label-smoothed
contrastive loss.

    model = build_dual(DualConfig(model="ALIGN_B3_MINI", image_size=289, embed_dim=640))

ALIGN_<image>_<text>: EfficientNet B0 to B7, or NANO for small images; BERT MINI, BASE, LARGE or
TINY. Parameters have the names of transformers' `AlignModel` (kakaobrain/align-base), and
`image_projection`, which B0 to B6 have and transformers lacks. BERT's pooler, which nothing reads,
is left out.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from base.errors import UserError
from models.dual_encoder.base import DualEncoder, Features
from models.dual_encoder.config import DualConfig
from models.dual_encoder.losses import clip_loss
from models.layers.batchnorm import GhostBatchNorm, average_statistics
from models.layers.efficientnet import SHAPES, EfficientNet, EfficientNetShape
from models.layers.xbert import BertConfig, XBert

TEXTS = {  # layers, width
    "TINY": (2, 128),
    "MINI": (4, 256),
    "BASE": (12, 768),
    "LARGE": (24, 1024),
}
TINY_STD = 0.1  # with BERT's 0.02 texts of a tower so narrow are all alike at first (cosine 0.9998)
PAD = 0  # id in every BERT vocabulary
LOWEST_TEMPERATURE = 1e-3  # a scale of 1000


class Align(DualEncoder):
    """Image and text tower, each with a linear layer into the common space (z); B7's features are z
    as they are.

    image, text: other geometries than those that the model string names.
    """

    def __init__(
        self,
        config: DualConfig,
        image: EfficientNetShape | None = None,
        text: BertConfig | None = None,
    ):
        super().__init__()
        _, image_name, text_name = config.model.split("_")
        self.config = config
        self.vision_model = EfficientNet(image or image_shape(image_name, config))
        self.text_model = TextTower(text or text_shape(text_name, config))
        self.text_projection = projection(self.text_model.config.hidden_size, config.embed_dim)
        self.image_projection = None
        features = self.vision_model.num_features
        if image_name != "B7":
            self.image_projection = projection(features, config.embed_dim)
        elif features != config.embed_dim:
            raise UserError(
                f"embed_dim {config.embed_dim}: ALIGN_B7 has no projection of its {features} image "
                f"features; set embed_dim to {features}"
            )
        self.temperature = nn.Parameter(torch.tensor(float(config.temperature)))

    def features(
        self, image: Tensor, text_ids: Tensor, image_local: Tensor | None = None
    ) -> Features:
        """`feats_*` [B,C], [B,T], `z_*` [B,E], and the temperature."""
        # not texts first, as in the others: EfficientNet's own peak comes in its forward pass
        images = self.embed_image(image)
        texts = self.embed_text(text_ids[:, 0] if text_ids.ndim == 3 else text_ids)
        return {
            "feats_image": images["feats"],
            "z_image": images["z"],
            "feats_text": texts["feats"],
            "z_text": texts["z"],
            "temperature": self.temperature * 1.0,  # a feature, not the parameter itself
        }

    def losses(self, features: Features, targets: Features | None = None) -> Features:
        """ALIGN's (Jia 2021, equations 1 and 2): InfoNCE both ways, labels smoothed over the global
        batch.

        `clip_loss` is the mean of both directions; COYO-ALIGN minimises their sum (loss_avg_or_sum:
        sum).
        """
        found = clip_loss(
            self.single_views(features["z_image"], features["z_text"]),
            scale=1 / features["temperature"],
            label_smoothing=self.options.label_smoothing,
            tile=self.options.tile,
        )
        return {
            "clip_loss": found.loss,
            "clip_loss_image": found.loss_image,
            "clip_loss_text": found.loss_text,
            "clip_acc": found.acc_image,
            "temperature": features["temperature"].detach(),
        }

    def embed_image(self, image: Tensor) -> Features:
        """Images float32 [B,3,H,W], values -1..1 -> `feats` [B,C], `z` [B,E]."""
        feats = self.vision_model(image)
        if self.image_projection is None:
            return {"feats": feats, "z": feats}
        return {"feats": feats, "z": in_weights_dtype(self.image_projection, feats)}

    def embed_text(self, text_ids: Tensor) -> Features:
        """Texts int64 [B,L], padded with 0 -> `feats` [B,T], the state of the first token, and `z`
        [B,E].
        """
        feats = self.text_model.first_state(text_ids)
        return {"feats": feats, "z": in_weights_dtype(self.text_projection, feats)}

    def free_of_decay(self) -> set[str]:
        """Names of the parameters that LAMB neither decays nor scales: those of batch norms, and no
        others.
        """
        norms = [
            name for name, module in self.named_modules() if isinstance(module, GhostBatchNorm)
        ]
        return {f"{name}.{kind}" for name in norms for kind in ("weight", "bias")}

    @torch.no_grad()
    def clamp_scales(self) -> None:
        """Keep the temperature above 0: LAMB moves it by its fraction lr at most, other optimizers
        may step over 0.
        """
        self.temperature.clamp_(min=LOWEST_TEMPERATURE)

    def after_update(self) -> None:
        super().after_update()
        average_statistics(self)


class TextTower(XBert):
    """BERT without cross-attention and pooler."""

    def __init__(self, config: BertConfig):
        super().__init__(
            replace(config, single_stream=False, fusion_layer=config.num_hidden_layers)
        )
        del self.embeddings.position_ids  # transformers' files have none
        std = config.initializer_range
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)

    def first_state(self, text_ids: Tensor) -> Tensor:
        """int64 [B,L] -> the last layer's state of the first token [B,D]; the others are not
        computed there.
        """
        first = text_ids.new_zeros(text_ids.shape[0], 1)
        return self.run(self.embeddings(text_ids), text_ids != PAD, keep=first)[:, 0]


def image_shape(name: str, config: DualConfig) -> EfficientNetShape:
    """EfficientNet's geometry (Tan 2019, table 1, scaled), with the configuration's noise."""
    return replace(
        SHAPES[name], drop_connect=config.drop_connect, virtual_batch=config.virtual_batch_size
    )


def text_shape(name: str, config: DualConfig) -> BertConfig:
    """BERT's geometry (Devlin 2019; Turc 2019 for the smaller ones)."""
    layers, width = TEXTS[name]
    return BertConfig(
        vocab_size=config.vocab_size,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
        initializer_range=TINY_STD if name == "TINY" else 0.02,
        hidden_dropout_prob=config.bert_dropout,
        attention_probs_dropout_prob=config.bert_dropout,
    )


def projection(width: int, out: int) -> nn.Linear:
    """Linear layer, Glorot uniform, bias 0."""
    linear = nn.Linear(width, out)
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def in_weights_dtype(linear: nn.Linear, x: Tensor) -> Tensor:
    """linear(x) in the dtype of its weights, whatever the autocast."""
    with torch.autocast(x.device.type, enabled=False):
        return linear(x.to(linear.weight.dtype))
