"""What all dual encoders share: their configuration, the forward pass, weight decay groups.

    model = build_dual(DualConfig(model="CL2L_R50_CL2L", separate_proj=True))
    losses = model(image=..., image_local=..., text_ids=...)  # named, 0-d; main.py weighs them

Batch (B pairs, A local views, L tokens): `image` float32 [B,3,H,W]; `text_ids` int64 [B,L], or
[B,1+A,L] whose first row is the global caption; `image_local` float32 [B,A,3,h,w] (CL2L family;
absent for A = 0); SLIP takes its two augmentations as `image_local` [B,2,3,H,W].

`features(**batch)` returns what the original models return, sample axis first, views second;
`losses(features)` reads nothing but those features, so cached features serve as well
(`models.dual_encoder.grad_cache`). For evaluation, `embed_image` and `embed_text` return `feats`,
`z` and, where the model has them, `h` embeddings, not normalised.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from base.distributed import gather, gather_with_gradient, rank, world_size
from base.errors import UserError
from base.knobs import knob
from base.limits import BLOCKS, CLASSES, SIDE, WIDTH
from models.dual_encoder.losses import Views, normalize
from models.layers.clip_towers import TextNoise, TextShape

Features = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """The losses; names and defaults are clip-rocket's and SLIP's."""

    loss_avg_or_sum: str = knob(
        "avg",
        "CL2L family, ALIGN: mean of the two directions, or their sum",
        methods="CL2L ALIGN",
    )
    label_smoothing: float = knob(
        0.0,
        "of the local terms only; ALIGN: over the global batch",
        methods="CL2L ALIGN",
        low=0,
        high=1,
    )
    barlip_lamb: float = knob(
        5e-3, "BarLIP: weight of the correlations off the diagonal", methods="BARLIP", low=0
    )
    barlip_scale_loss: float = knob(
        0.025, "BarLIP: factor of its whole term", methods="BARLIP", low=0
    )
    swalip_weight: float = knob(
        0.2, "SwALIP, SWALIPV1: weight of the swapped assignments", methods="SWALIP SWALIPV1", low=0
    )
    sk_iters: int = knob(
        3, "SwALIP, SWALIPV1: iterations of Sinkhorn's algorithm", methods="SWALIP SWALIPV1", low=0
    )
    target_epsilon: float = knob(
        0.05,
        "SwALIP, SWALIPV1: temperature of the assignments",
        methods="SWALIP SWALIPV1",
        low=1e-6,
    )
    ssl_scale: float = knob(1.0, "SLIP: weight of SimCLR beside CLIP", methods="SLIP", low=0)
    ssl_temp: float = knob(
        0.1,
        "SLIP, SimCLR: temperature of the similarities of two augmentations",
        methods="SLIP SIMCLR",
        low=1e-6,
    )
    tile: int | None = knob(
        None,
        "compute logits in blocks of tile x tile to save memory; none = whole",
        rare=True,
        low=1,
    )
    compat: str = knob(
        "none", "none, or original: the published code's numbers (docs/DIFFERENCES.md)"
    )

    def __post_init__(self):
        for name, known in (("loss_avg_or_sum", ("avg", "sum")), ("compat", ("none", "original"))):
            if getattr(self, name) not in known:
                raise UserError(
                    f"{name} {getattr(self, name)!r} is unknown; use {' or '.join(known)}"
                )
        if not 0 <= self.label_smoothing < 1:
            raise UserError(
                f"label_smoothing {self.label_smoothing}: give a fraction from 0 to below 1"
            )
        if self.sk_iters < 1:
            raise UserError(f"sk_iters {self.sk_iters}: Sinkhorn needs at least one iteration")

    @property
    def original(self) -> bool:
        return self.compat == "original"

    # What `compat: original` changes in the losses, all of it; docs/DIFFERENCES.md has the reasons.
    @property
    def gather_passes_gradient(self) -> bool:
        """clip-rocket's contrastive gather passes no gradient, not even to the rows of this
        rank.
        """
        return not self.original

    @property
    def barlip_gradient_scale(self) -> float:
        """clip-rocket divides the gradient of Barlow Twins by the number of ranks."""
        return 1 / world_size() if self.original else 1.0

    def swalip_views(self, views: int) -> int:
        """How many of the local views SwALIP swaps: clip-rocket's looks at the first two only."""
        return 2 if self.original else views


@dataclass(frozen=True, kw_only=True)
class DualConfig(LossOptions):
    """Shape and loss of a dual encoder; names and defaults are clip-rocket's."""

    model: str = knob(
        "CL2L_VITB16_CL2L",
        "<CLIP|CL2L>_<backbone>_<head>, of SLIP or ALIGN, open_clip/NAME:TAG, hf/FOLDER",
    )
    image_size: int = knob(224, "side of the square global images, pixels", low=1, high=SIDE)
    image_tower: str | None = knob(
        None, "instead of the backbone: timm/NAME (weights fetched) or timm/NAME:FILE"
    )
    text_tower: str | None = knob(
        None,
        "instead of the text transformer: hf/FOLDER or a name of the hub",
        methods="CLIP SIGLIP",
    )
    tower_classes: str | None = knob(
        None,
        "names of the image tower's classes: it gives their probabilities, too, and training starts "
        "from the names' embeddings (ConSE); a file, one name a line, or labels.json:imagenet",
        methods="CLIP SIGLIP",
        rare=True,
    )
    embed_dim: int = knob(256, "width of the common space of images and texts", low=1, high=WIDTH)
    clip_proj_type: str = knob("linear", "projectors of global views: linear or mlp", rare=True)
    clip_hidden_dim: int = knob(
        4096, "hidden width of mlp projectors of global views", low=1, high=WIDTH, rare=True
    )
    cl2l_img_proj_type: str = knob(
        "mlp", "with separate_proj, of local images: linear or mlp", methods="CL2L", rare=True
    )
    cl2l_txt_proj_type: str = knob(
        "mlp", "with separate_proj, of local texts: linear or mlp", methods="CL2L", rare=True
    )
    cl2l_hidden_dim: int = knob(
        4096,
        "hidden width of mlp projectors of local views",
        low=1,
        high=WIDTH,
        methods="CL2L",
        rare=True,
    )
    separate_proj: bool = knob(
        False, "local views get projectors and a temperature of their own", methods="CL2L"
    )
    separate_proj_child: bool = knob(
        False, "BarLIP, SiamLIP: local views get heads of their own", methods="BARLIP SIAMLIP"
    )
    detach_proj: bool = knob(
        False, "no gradient from the global text projector into the text tower", rare=True
    )
    text_dropout_prob: float = knob(
        0.0,
        "dropout at the entry of every text block, for local texts",
        methods="CL2L",
        low=0,
        high=1,
    )
    text_drop_path_prob: float = knob(
        0.0,
        "stochastic depth of the text blocks, for local texts",
        methods="CL2L",
        rare=True,
        low=0,
        high=1,
    )
    barlip_proj_dim: int = knob(
        8192,
        "width in which BarLIP's cross-correlations are taken",
        low=1,
        high=WIDTH,
        methods="BARLIP",
    )
    barlip_hidden_dim: int = knob(
        3000, "hidden width of BarLIP's expanders", low=1, high=WIDTH, methods="BARLIP"
    )
    siamlip_proj_dim: int = knob(
        128, "width of SiamLIP's projections and predictions", low=1, high=WIDTH, methods="SIAMLIP"
    )
    siamlip_hidden_dim: int = knob(
        2048,
        "hidden width of SiamLIP's projectors and predictors",
        low=1,
        high=WIDTH,
        methods="SIAMLIP",
    )
    siamlip_no_last_bn: bool = knob(
        False, "leave out the batch norm behind SiamLIP's projectors", methods="SIAMLIP"
    )
    swalip_proj_dim: int = knob(
        128, "SWALIPV1: width of projections and prototypes", low=1, high=WIDTH, methods="SWALIPV1"
    )
    swalip_hidden_dim: int = knob(
        2048, "SWALIPV1: hidden width of the projectors", low=1, high=WIDTH, methods="SWALIPV1"
    )
    swalip_num_proto: int = knob(
        3000, "SWALIPV1: number of prototypes", low=1, high=WIDTH, methods="SWALIPV1"
    )
    swalip_temperature: float = knob(
        0.1, "SWALIPV1: temperature of the scores of prototypes", methods="SWALIPV1", low=1e-6
    )
    swalip_learn_temperature: bool = knob(
        False, "SWALIPV1: train that temperature, too", methods="SWALIPV1"
    )
    swalip_no_shared_proto: bool = knob(
        False, "SWALIPV1: one set of prototypes per modality", methods="SWALIPV1"
    )
    ssl_mlp_dim: int = knob(
        4096,
        "hidden width of SLIP's and SimCLR's projector of images",
        low=1,
        high=WIDTH,
        methods="SLIP SIMCLR",
    )
    ssl_emb_dim: int = knob(
        256,
        "width in which SLIP and SimCLR compare two augmentations",
        low=1,
        high=WIDTH,
        methods="SLIP SIMCLR",
    )
    context_length: int = knob(
        77, "longest text in tokens, start and end included", low=1, high=WIDTH
    )
    vocab_size: int = knob(
        49408,
        "tokens known; main.py takes it from the merges (bpe_path)",
        low=1,
        high=CLASSES,
        rare=True,
    )
    text_width: int = knob(512, "width of the text transformer", low=1, high=WIDTH)
    text_heads: int = knob(
        8, "attention heads of the text transformer", low=1, high=WIDTH, rare=True
    )
    transformer_layers: int = knob(12, "blocks of the text transformer", low=1, high=BLOCKS)
    text_activation: str = knob(
        "quick_gelu", "of the text transformer: quick_gelu or gelu", rare=True
    )
    temperature: float = knob(1.0, "ALIGN's at the start; learned", methods="ALIGN", low=1e-6)
    virtual_batch_size: int = knob(
        16, "samples a ghost batch norm of ALIGN sees; 0 = the whole batch", methods="ALIGN", low=0
    )
    drop_connect: float = knob(
        0.2, "stochastic depth of ALIGN's image tower", methods="ALIGN", low=0, high=1
    )
    bert_dropout: float = knob(0.1, "of ALIGN's text tower", methods="ALIGN", low=0, high=1)

    @property
    def text(self) -> TextShape:
        """Geometry of the text transformer."""
        return TextShape(
            context_length=self.context_length,
            vocab_size=self.vocab_size,
            width=self.text_width,
            heads=self.text_heads,
            layers=self.transformer_layers,
            activation=self.text_activation,
        )

    @property
    def text_noise(self) -> TextNoise:
        """Regularisation of the local texts; clip-rocket's drops token positions for the whole
        batch.
        """
        return TextNoise(
            dropout=self.text_dropout_prob,
            drop_path=self.text_drop_path_prob,
            over_positions=self.original,
        )


class DualEncoder(nn.Module):
    """Base of all dual encoders; a subclass has `features`, `losses`, `embed_image`, `embed_text`.

    `momentum_model`, where main.py has set one, is the momentum teacher (BYOLIP).
    """

    config: DualConfig
    of_library: ClassVar[bool] = False  # both towers are: `load` reads their published weights
    towers: ClassVar = {  # tower -> how the names of its parameters begin
        "image": ("visual.", "vision_model."),
        "text": (
            "text_tower.",
            "text_model.",
            "transformer.",
            "token_embedding.",
            "positional_embedding",
            "ln_final.",
        ),
    }

    def forward(
        self,
        features_only: bool = False,
        feature_grads: Features | None = None,
        **batch: Tensor,
    ) -> Features:
        """Named losses of a batch, 0-d each; main.py minimises their weighted sum (`total_loss`).

        The two other modes are those of gradient caching (`grad_cache.py`), which must pass through
        the wrapped module, too. features_only: return the features. feature_grads: return
        `surrogate` = sum of <feature, its given gradient>, whose backward pass continues that of
        the cached features.
        """
        if features_only:
            return self.features(**batch)
        if feature_grads is not None:
            features = self.features(**batch)
            terms = [
                (features[k].float() * grad.float()).sum() for k, grad in feature_grads.items()
            ]
            return {"surrogate": sum(terms)}
        targets = self.teacher_features(**batch)
        features = self.features(**batch)
        with torch.autocast(next(iter(features.values())).device.type, enabled=False):
            return self.losses(in_float32(features), in_float32(targets))

    def features(self, **batch: Tensor) -> Features:
        """The features the losses are made of, by name; sample axis first, views second."""
        raise NotImplementedError

    def losses(self, features: Features, targets: Features | None = None) -> Features:
        """Named losses and accuracies, 0-d. targets: features of the momentum teacher."""
        raise NotImplementedError

    @torch.no_grad()
    def teacher_features(self, **batch: Tensor) -> Features | None:
        """What the momentum teacher makes of the batch; None where there is no teacher."""
        teacher = getattr(self, "momentum_model", None)
        return None if teacher is None else teacher.features(**batch)

    @property
    def options(self) -> LossOptions:
        """Options of the loss; a dual encoder's configuration holds them."""
        return self.config

    def gather(self, features: Tensor) -> Tensor:
        """Features [b,...] of this rank -> [N,...] of all ranks in rank order, for the contrastive
        losses.
        """
        if world_size() == 1 or self.options.gather_passes_gradient:
            return gather_with_gradient(features)
        return gather(features)

    def single_views(self, image: Tensor, text: Tensor) -> Views:
        """This rank's embeddings [b,E] of images and texts, of any length, as one view each, and
        those of all ranks; one collective."""
        image = normalize(image)[:, None]
        text = normalize(text)[:, None]
        all_image, all_text = image, text
        if world_size() > 1:
            all_image, all_text = self.gather(torch.stack([image, text], 1)).unbind(1)
        return Views(image, text, all_image, all_text, first=rank() * len(image))

    def example_batch(
        self, pairs: int, images: int, captions: int, tokens: int = 32
    ) -> dict[str, Tensor]:
        """A batch with so many local images and captions, without data (meta device), to count
        FLOPs with.
        """
        image = torch.zeros(pairs, 3, self.config.image_size, self.config.image_size, device="meta")
        length = min(tokens, self.config.context_length)
        ids = torch.zeros(pairs, 1 + captions, length, dtype=torch.int64, device="meta")
        batch = {"image": image, "text_ids": ids if captions else ids[:, 0]}
        if images:
            batch["image_local"] = image[:, None].expand(-1, images, -1, -1, -1)
        return batch

    def after_update(self) -> None:
        """What follows every optimizer step, on all ranks."""
        self.clamp_scales()


def in_float32(features: Features | None) -> Features | None:
    """The features without the rounding of autocast (float64 stays).

    Losses are computed in float32: logits rounded to bfloat16 change their gradients by 8 % at
    temperature 0.01.
    """
    if features is None:
        return None
    exact = {}
    for name, value in features.items():
        exact[name] = value.to(torch.promote_types(value.dtype, torch.float32))
    return exact


# in checkpoints, but not of the network: the teacher, and what only transformers' AlignModel holds
NOT_LOADED = ("momentum_model.*", "text_model.pooler.*")


def names_by_decay(model: nn.Module, original: bool = False) -> tuple[list[str], list[str]]:
    """Trainable parameters with and without weight decay, each in module order.

    Without: vectors and scalars, token and position embeddings, the class token. `original` follows
    clip-rocket: without are vectors, scalars and whatever has `bias`, `ln` or `bn` in its name;
    embeddings decay. ALIGN: without are the parameters of batch norms alone.
    """
    embeddings = ("positional_embedding", "token_embedding", "cls_token", "pos_embed")
    substrings = ("bias", "ln", "bn") if original else embeddings
    free_names = model.free_of_decay() if hasattr(model, "free_of_decay") else None
    decay = []
    no_decay = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if free_names is not None:
            free = name in free_names
        else:
            free = parameter.ndim < 2 or any(part in name for part in substrings)
        (no_decay if free else decay).append(name)
    return decay, no_decay
