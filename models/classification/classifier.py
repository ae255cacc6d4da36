"""ViT image classification of COYO-ViT: one label (softmax) or many (sigmoid) an image.

    config = ClassifierConfig(model="vit-l/16", num_classes=21841, representation_size=1024)
    model = VisionClassifier(config)
    losses = model(image=..., labels=..., label_weights=...)      # {"loss": 0-d}

Batch (B images, K labels at most): `image` float32 [B,3,S,S]; `labels` int64 [B,K]; `label_weights`
float32 [B,K], 1 for a label, a probability for a soft one, 0 for padding. Targets never become B x
C: what a positive contributes to either loss is its logit, so K logits are gathered. Names are
timm's (`blocks.{i}.attn.qkv`, `head`), and `pre_logits.fc`.
"""

import re
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from base.errors import UserError
from base.knobs import check_choices, knob
from base.limits import CLASSES, SIDE, WIDTH
from base.memory import build_fitting
from base.names import did_you_mean
from base.pixels import STATISTICS
from models.layers.heads import exact
from models.layers.vit import ViT, ViTConfig

SIZES = {  # width, blocks, heads; the MLP is four times as wide
    "mu": (32, 2, 2),
    "xxs": (96, 2, 4),
    "xs": (128, 4, 4),
    "ti": (192, 12, 3),
    "s": (384, 12, 6),
    "b": (768, 12, 12),
    "l": (1024, 24, 16),
}
CLIP = 1e-7  # the original's smallest probability inside a logarithm


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """Network and loss."""

    model: str = knob("vit-b/16", "vit-<mu|xxs|xs|ti|s|b|l>/<patch size in pixels>")
    stem: tuple[int, ...] = knob(
        (),
        "channels of convolutional stages before the patches, each halving the image's sides",
        low=1,
        high=WIDTH,
        rare=True,
    )
    pixels: str = knob(
        "half",
        "mean and std of the pixels: half (0.5 each, as COYO-ViT), imagenet or clip",
        choices=(*STATISTICS,),
        rare=True,
    )
    image_size: int = knob(
        224, "side of the images in pixels, a multiple of the patch size", low=1, high=SIDE
    )
    num_classes: int = knob(
        21841, "number of classes, if the data do not name them", low=1, high=CLASSES
    )
    representation_size: int = knob(
        0, "width of the tanh layer before the head; 0 = none, as in fine-tuning", low=0, high=WIDTH
    )
    dropout: float = knob(
        0.0, "behind the positions, each attention and both layers of each MLP", low=0, high=1
    )
    attention_dropout: float = knob(0.0, "of attention weights", rare=True, low=0, high=1)
    drop_path: float = knob(
        0.0,
        "stochastic depth: probability that the last block leaves a sample out, rising from 0 at the "
        "first block",
        low=0,
        high=0.99,
    )
    gelu: str = knob(
        "tanh",
        "GELU by tanh, as COYO-ViT, or none: exact, as timm's and Hugging Face's weights want it",
        choices=("tanh", "none"),
        rare=True,
    )
    layer_norm_eps: float = knob(1e-6, "Hugging Face's ViT has 1e-12", rare=True, low=0)
    loss: str = knob(
        "softmax",
        "softmax: one label an image; sigmoid: any number",
        choices=("softmax", "sigmoid"),
    )
    label_smoothing: float = knob(
        0.0,
        "fraction of the target spread evenly: over all classes, or over yes and no",
        low=0,
        high=1,
    )
    head_bias: float | None = knob(
        None, "initial bias of the head; none = -10 with the sigmoid loss, else 0", rare=True
    )
    compat: str = knob(
        "none",
        "original: the numbers of the published code, see docs/DIFFERENCES.md",
        choices=("none", "original"),
    )

    @property
    def original(self) -> bool:
        return self.compat == "original"

    @property
    def vit(self) -> ViTConfig:
        """Geometry of the transformer. Raises UserError for an unknown model."""
        match = re.fullmatch(r"vit-([a-z]+)/(\d+)", self.model.lower())
        if match is None or match[1] not in SIZES or not int(match[2]):
            raise UserError(
                f"model {self.model!r} is unknown{self.near_model()} "
                f"The form is vit-<{'|'.join(SIZES)}>/<patch size>, with any patch size"
            )
        width, depth, heads = SIZES[match[1]]
        return ViTConfig(
            image_size=self.image_size,
            patch_size=int(match[2]),
            width=width,
            depth=depth,
            heads=heads,
            layer_norm_eps=self.layer_norm_eps,
            gelu=self.gelu,
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
            drop_path=self.drop_path,
            stem=tuple(self.stem),
            stem_statistics=True,
        )

    def near_model(self) -> str:
        """The model that was probably meant, as the end of a sentence; timm's ViTs by their own names."""
        name = re.sub(r"^vit_([a-z])(i?)\w*?_patch(\d+).*", r"vit-\1\2/\3", self.model.lower())
        known = [f"vit-{size}/{patch}" for size in SIZES for patch in (8, 14, 16, 32)]
        return did_you_mean(name, known) or "; other networks than plain ViTs are not here."

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and std of the pixels in [0,1]."""
        return STATISTICS[self.pixels]

    def __post_init__(self):
        check_choices(self)
        vit = self.vit
        if self.image_size % vit.patch_size:
            near = max(1, round(self.image_size / vit.patch_size)) * vit.patch_size
            raise UserError(
                f"image_size {self.image_size}: {self.model} has position embeddings for whole "
                f"patches of {vit.patch_size} pixels; the nearest size is {near}"
            )


def build_classifier(config: ClassifierConfig) -> "VisionClassifier":
    """The network with its initial weights. UserError where the free memory does not hold it."""
    return build_fitting(partial(VisionClassifier, config), config.model)


class VisionClassifier(ViT):
    """Vision transformer, optional tanh layer, linear head on the class token."""

    def __init__(self, config: ClassifierConfig):
        super().__init__(config.vit)
        self.options = config
        self.num_features = config.vit.width
        width = config.representation_size or config.vit.width
        self.pre_logits = nn.Identity()
        if config.representation_size:
            layers = [("fc", nn.Linear(config.vit.width, width)), ("act", nn.Tanh())]
            self.pre_logits = nn.Sequential(OrderedDict(layers))
        self.head = nn.Linear(width, config.num_classes)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """As COYO-ViT: Glorot's laws, positions N(0, 0.02), class token and head 0 but for the
        head's bias."""
        nn.init.xavier_uniform_(self.patch_embed.proj.weight)
        nn.init.zeros_(self.patch_embed.proj.bias)
        nn.init.zeros_(self.cls_token)
        nn.init.normal_(self.pos_embed, std=0.02)
        for block in self.blocks:
            # three square matrices, one above the other
            glorot_normal(block.attn.qkv.weight, self.config.width)
            glorot_normal(block.attn.proj.weight, self.config.width)
            glorot_normal(block.mlp.fc1.weight)
            nn.init.xavier_uniform_(block.mlp.fc2.weight)
            nn.init.normal_(block.mlp.fc1.bias, std=1e-6)
            nn.init.normal_(block.mlp.fc2.bias, std=1e-6)
        if self.options.representation_size:
            nn.init.xavier_uniform_(self.pre_logits.fc.weight)
            nn.init.zeros_(self.pre_logits.fc.bias)
        bias = self.options.head_bias
        if bias is None:
            bias = -10.0 if self.options.loss == "sigmoid" else 0.0
            if self.options.original:  # it asks for -10, but fills the bias as it does the kernel
                bias = 0.0
        nn.init.zeros_(self.head.weight)
        nn.init.constant_(self.head.bias, bias)

    def logits(self, image: Tensor) -> Tensor:
        """For evaluation: float32 [B,C] of images [B,3,S,S], not rounded under autocast."""
        return exact(nn.Sequential(self.pre_logits, self.head), self.features(image))

    def forward(self, image: Tensor, labels: Tensor, label_weights: Tensor) -> dict[str, Tensor]:
        """`loss`, a 0-d tensor, of a batch as the module describes it."""
        logits = self.head(self.pre_logits(self.features(image))).float()
        smoothing = self.options.label_smoothing
        if self.options.loss == "softmax":
            return {"loss": softmax_loss(logits, labels, label_weights, smoothing)}
        if self.options.original:
            return {"loss": clipped_sigmoid_loss(logits, labels, label_weights, smoothing)}
        return {"loss": sigmoid_loss(logits, labels, label_weights, smoothing)}


def glorot_normal(weight: Tensor, fan_out: int | None = None) -> None:
    """Truncated normal of variance 2 / (fan in + fan out), cut at two standard deviations of the
    whole normal."""
    std = (2 / (weight.shape[1] + (fan_out or weight.shape[0]))) ** 0.5 / 0.87962566103423978
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


# ---- losses


def positive_logits(logits: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Σ y z and Σ y over the labels of each image, float32 [B] each; see the module for the
    shapes."""
    return (weights * logits.gather(1, labels)).sum(1), weights.sum(1)


def sigmoid_loss(logits: Tensor, labels: Tensor, weights: Tensor, smoothing: float = 0.0) -> Tensor:
    """Binary cross entropy SUMMED over the classes, averaged over the images: Σ softplus(z) - Σ y
    z.

    Targets are y (1 - s) + s / 2 with smoothing s. float32 logits [B,C].
    """
    positive, _ = positive_logits(logits, labels, weights)
    loss = F.softplus(logits).sum(1) - (1 - smoothing) * positive
    if smoothing:
        loss = loss - smoothing / 2 * logits.sum(1)
    return loss.mean()


def softmax_loss(logits: Tensor, labels: Tensor, weights: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross entropy averaged over the images, with targets y (1 - s) + s / C. float32 logits
    [B,C]."""
    positive, mass = positive_logits(logits, labels, weights)
    normaliser = logits.logsumexp(1)
    loss = (1 - smoothing) * (mass * normaliser - positive)
    if smoothing:
        loss = loss + smoothing * (normaliser - logits.mean(1))
    return loss.mean()


def clipped_sigmoid_loss(
    logits: Tensor, labels: Tensor, weights: Tensor, smoothing: float = 0.0
) -> Tensor:
    """The original's `sigmoid_loss`: probabilities inside the logarithms are cut at 1e-7, which
    bounds a term at 16.1 and leaves it no gradient beyond.
    """
    target = dense_targets(labels, weights, logits.shape[1]) * (1 - smoothing) + smoothing / 2
    p = logits.sigmoid()
    terms = target * p.clamp(CLIP, 1).log() + (1 - target) * (1 - p).clamp(CLIP, 1).log()
    return -terms.sum(1).mean()


def dense_targets(labels: Tensor, weights: Tensor, classes: int) -> Tensor:
    """float32 [B,C] of sparse labels [B,K] and their weights; those of a label named twice, by both
    images of a mixed one, add up."""
    return weights.new_zeros(len(labels), classes).scatter_add_(1, labels, weights)


# ---- moving average


def ema_decay(updates: int, largest: float, start: int = 0) -> float:
    """Decay of the weights' moving average after update number `updates` (the first is 1).

    min(largest, (1 + k) / (10 + k)) with k = updates - start, which grows with the updates; 0 before
    update `start`, so that the average is the weights themselves.
    """
    k = updates - start
    return min(largest, (1 + k) / (10 + k)) if k >= 0 else 0.0
