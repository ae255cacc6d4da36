"""Options of the dual encoders: what all of them share, and every method's part in a class of its
own, whose METHODS (parts of `model`) use it; `--help` shows those of the chosen one.

Names and defaults are clip-rocket's, SLIP's and COYO-ALIGN's.
"""

from dataclasses import dataclass
from typing import ClassVar

from base.distributed import world_size
from base.errors import UserError
from base.knobs import check_choices, knob
from base.limits import BLOCKS, CLASSES, SIDE, WIDTH
from models.layers.clip_towers import TextNoise, TextShape

PROJECTORS = ("linear", "mlp")
OWN_TEXTS = "CLIP CL2L SLIP"  # methods that shape the text transformer; others' is published


@dataclass(frozen=True, kw_only=True)
class TextTowerOptions:
    """Text transformer."""

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
    text_width: int = knob(
        512, "width of the text transformer", methods=OWN_TEXTS, low=1, high=WIDTH
    )
    text_heads: int = knob(
        8,
        "attention heads of the text transformer",
        methods=OWN_TEXTS,
        low=1,
        high=WIDTH,
        rare=True,
    )
    transformer_layers: int = knob(
        12, "blocks of the text transformer", methods=OWN_TEXTS, low=1, high=BLOCKS
    )
    text_activation: str = knob(
        "quick_gelu",
        "of the text transformer",
        methods=OWN_TEXTS,
        choices=("quick_gelu", "gelu"),
        rare=True,
    )


@dataclass(frozen=True, kw_only=True)
class LocalViewOptions:
    """CL2L and its variants: local views."""

    METHODS: ClassVar = "CL2L"

    separate_proj: bool = knob(False, "local views get projectors and a temperature of their own")
    cl2l_img_proj_type: str = knob(
        "mlp", "with separate_proj, of local images", choices=PROJECTORS, rare=True
    )
    cl2l_txt_proj_type: str = knob(
        "mlp", "with separate_proj, of local texts", choices=PROJECTORS, rare=True
    )
    cl2l_hidden_dim: int = knob(
        4096, "hidden width of mlp projectors of local views", low=1, high=WIDTH, rare=True
    )
    text_dropout_prob: float = knob(
        0.0, "dropout at the entry of every text block, for local texts", low=0, high=1
    )
    text_drop_path_prob: float = knob(
        0.0, "stochastic depth of the text blocks, for local texts", rare=True, low=0, high=1
    )
    separate_proj_child: bool = knob(
        False,
        "BarLIP, SiamLIP: local views get heads of their own",
        methods="BARLIP SIAMLIP",
    )


@dataclass(frozen=True, kw_only=True)
class BarLIPOptions:
    """BarLIP."""

    METHODS: ClassVar = "BARLIP"

    barlip_proj_dim: int = knob(
        8192, "width in which cross-correlations are taken", low=1, high=WIDTH
    )
    barlip_hidden_dim: int = knob(3000, "hidden width of the expanders", low=1, high=WIDTH)
    barlip_lamb: float = knob(5e-3, "weight of the correlations off the diagonal", low=0)
    barlip_scale_loss: float = knob(0.025, "factor of its whole term", low=0)


@dataclass(frozen=True, kw_only=True)
class SiamLIPOptions:
    """SiamLIP, and BYOLIP with a momentum teacher."""

    METHODS: ClassVar = "SIAMLIP"

    siamlip_proj_dim: int = knob(128, "width of projections and predictions", low=1, high=WIDTH)
    siamlip_hidden_dim: int = knob(
        2048, "hidden width of projectors and predictors", low=1, high=WIDTH
    )
    siamlip_no_last_bn: bool = knob(False, "leave out the batch norm behind the projectors")


@dataclass(frozen=True, kw_only=True)
class SwALIPOptions:
    """SwALIP, and SWALIPV1 with prototypes."""

    METHODS: ClassVar = "SWALIPV1"

    swalip_weight: float = knob(
        0.2, "weight of the swapped assignments", methods="SWALIP SWALIPV1", low=0
    )
    sk_iters: int = knob(3, "iterations of Sinkhorn's algorithm", methods="SWALIP SWALIPV1", low=0)
    target_epsilon: float = knob(
        0.05, "temperature of the assignments", methods="SWALIP SWALIPV1", low=1e-6
    )
    swalip_proj_dim: int = knob(128, "width of projections and prototypes", low=1, high=WIDTH)
    swalip_hidden_dim: int = knob(2048, "hidden width of the projectors", low=1, high=WIDTH)
    swalip_num_proto: int = knob(3000, "number of prototypes", low=1, high=WIDTH)
    swalip_temperature: float = knob(0.1, "temperature of the scores of prototypes", low=1e-6)
    swalip_learn_temperature: bool = knob(False, "train that temperature, too")
    swalip_no_shared_proto: bool = knob(False, "one set of prototypes per modality")


@dataclass(frozen=True, kw_only=True)
class SimCLROptions:
    """SLIP and SimCLR."""

    METHODS: ClassVar = "SLIP SIMCLR"

    ssl_mlp_dim: int = knob(4096, "hidden width of the projector of images", low=1, high=WIDTH)
    ssl_emb_dim: int = knob(256, "width in which two augmentations are compared", low=1, high=WIDTH)
    ssl_temp: float = knob(0.1, "temperature of the similarities of two augmentations", low=1e-6)
    ssl_scale: float = knob(1.0, "weight of SimCLR beside CLIP", methods="SLIP", low=0)


@dataclass(frozen=True, kw_only=True)
class AlignOptions:
    """ALIGN."""

    METHODS: ClassVar = "ALIGN"

    temperature: float = knob(1.0, "at the start; learned", low=1e-6)
    virtual_batch_size: int = knob(
        16, "samples that a ghost batch norm sees; 0 = the whole batch", low=0
    )
    drop_connect: float = knob(0.2, "stochastic depth of the image tower", low=0, high=1)
    bert_dropout: float = knob(0.1, "of the text tower", low=0, high=1)


@dataclass(frozen=True, kw_only=True)
class DualConfig(
    AlignOptions,
    SimCLROptions,
    SwALIPOptions,
    SiamLIPOptions,
    BarLIPOptions,
    LocalViewOptions,
    TextTowerOptions,
):
    """Shape and loss of a dual encoder."""

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
    embed_dim: int = knob(
        256,
        "width of the common space of images and texts",
        methods="CLIP CL2L SLIP ALIGN",
        low=1,
        high=WIDTH,
    )
    clip_proj_type: str = knob(
        "linear",
        "projectors of global views",
        methods="CLIP CL2L",
        choices=PROJECTORS,
        rare=True,
    )
    clip_hidden_dim: int = knob(
        4096,
        "hidden width of mlp projectors of global views",
        methods="CLIP CL2L",
        low=1,
        high=WIDTH,
        rare=True,
    )
    detach_proj: bool = knob(
        False,
        "no gradient from the global text projector into the text tower",
        methods="CLIP CL2L",
        rare=True,
    )
    loss_avg_or_sum: str = knob(
        "avg",
        "CL2L family, ALIGN: mean of the two directions, or their sum",
        choices=("avg", "sum"),
        methods="CL2L ALIGN",
    )
    label_smoothing: float = knob(
        0.0,
        "of the local terms only; ALIGN: over the global batch",
        methods="CL2L ALIGN",
        low=0,
        high=1,
    )
    tile: int | None = knob(
        None,
        "compute logits in blocks of tile x tile to save memory; none = whole",
        rare=True,
        low=1,
    )
    compat: str = knob(
        "none",
        "none, or original: the published code's numbers (docs/DIFFERENCES.md)",
        choices=("none", "original"),
    )

    def __post_init__(self):
        check_choices(self)
        if not 0 <= self.label_smoothing < 1:
            raise UserError(
                f"label_smoothing {self.label_smoothing}: give a fraction from 0 to below 1"
            )
        if self.sk_iters < 1:
            raise UserError(f"sk_iters {self.sk_iters}: Sinkhorn needs at least one iteration")

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
    def original(self) -> bool:
        return self.compat == "original"

    # What `compat: original` changes, all of it; docs/DIFFERENCES.md has the reasons.
    @property
    def text_noise(self) -> TextNoise:
        """Regularisation of the local texts; clip-rocket's drops token positions for the whole
        batch."""
        return TextNoise(
            dropout=self.text_dropout_prob,
            drop_path=self.text_drop_path_prob,
            over_positions=self.original,
        )

    @property
    def gather_passes_gradient(self) -> bool:
        """clip-rocket's contrastive gather passes no gradient, not even to the rows of this
        rank."""
        return not self.original

    @property
    def barlip_gradient_scale(self) -> float:
        """clip-rocket divides the gradient of Barlow Twins by the number of ranks."""
        return 1 / world_size() if self.original else 1.0

    def swalip_views(self, views: int) -> int:
        """How many of the local views SwALIP swaps: clip-rocket's looks at the first two only."""
        return 2 if self.original else views


@dataclass
class TargetOptions:
    """Teacher and prototypes, which main.py updates."""

    METHODS: ClassVar = "SIAMLIP SWALIPV1"

    momentum: bool = knob(False, "SiamLIP's targets come from a momentum teacher: BYOLIP")
    momentum_tau: float = knob(0.99, "momentum of the teacher, per update", low=0, high=1)
    swalip_freeze_proto_iters: int = knob(
        100, "updates before SWALIPV1's prototypes move", low=0, methods="SWALIPV1"
    )
