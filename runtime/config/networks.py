"""The options of a fusion encoder's networks: set for pre-training, left open for what starts from a
checkpoint."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from base.knobs import knob, restated
from base.limits import BLOCKS, QUEUE, SIDE, WIDTH
from runtime.config import originals
from runtime.config.from_checkpoint import take_from_checkpoint
from runtime.config.old_names import FLAGS_OF_PRETRAINING, PRETRAINING

SIMLA_BERT, ALBEF_BERT = Path("configs/shared_bert.json"), Path("configs/config_bert.json")


@dataclass
class FusionNetworks:
    """The networks."""

    IGNORED = PRETRAINING
    NEW_NAMES = FLAGS_OF_PRETRAINING
    OLD_NAMES = ("from_scratch",)
    translate = staticmethod(originals.pretraining)

    image_res: int = knob(
        256, "side of the square input, pixels; positions are interpolated to it", low=8, high=SIDE
    )
    patch_size: int = knob(16, "side of a patch, pixels", low=1, high=SIDE)
    vision_width: int = knob(768, "width of the vision transformer", low=1, high=WIDTH)
    vision_depth: int = knob(12, "blocks of the vision transformer", low=1, high=BLOCKS)
    vision_heads: int = knob(12, "attention heads of the vision transformer", low=1, high=WIDTH)
    vision_stem: list[int] = knob(
        [],
        "channels of convolutional stages before the patches, whose batch norms stay as loaded; [] = none",
        low=1,
        high=WIDTH,
        rare=True,
    )
    vision_tower: str | None = knob(
        None,
        "timm/NAME[:FILE], locked, before the patches: its last feature map instead of pixels",
        rare=True,
    )
    bert_config: Path = knob(
        Path("configs/shared_bert.json"), "geometry of the text and fusion transformer (JSON)"
    )
    embed_dim: int = knob(256, "width of the joint space", low=1, high=WIDTH)
    text_encoder: str = knob(
        "bert-base-uncased", "tokenizer: Hugging Face folder, hub name, or trained on the captions"
    )


@dataclass
class Geometry:
    """The networks; none = as the run that made the checkpoint says, else as published."""

    image_res: int | None = restated(FusionNetworks, "image_res")
    patch_size: int | None = restated(FusionNetworks, "patch_size", rare=True)
    vision_width: int | None = restated(FusionNetworks, "vision_width", rare=True)
    vision_depth: int | None = restated(FusionNetworks, "vision_depth", rare=True)
    vision_heads: int | None = restated(FusionNetworks, "vision_heads", rare=True)
    vision_stem: list[int] | None = restated(FusionNetworks, "vision_stem", rare=True)
    vision_tower: str | None = restated(FusionNetworks, "vision_tower", rare=True)
    bert_config: Path | None = restated(FusionNetworks, "bert_config", rare=True)
    embed_dim: int | None = restated(FusionNetworks, "embed_dim", rare=True)
    queue_size: int | None = knob(
        None, "momentum features kept as further negatives", low=0, high=QUEUE
    )
    text_encoder: str | None = restated(FusionNetworks, "text_encoder", rare=True)


def fill_geometry(config: Any, weights: Iterable[str]) -> None:
    """Fill the options of `Geometry` that are None: as the run that made config.checkpoint has them,
    else as published.

    weights: keys of the checkpoint; token types among them mark ALBEF's text transformer.
    UserError, see `take_from_checkpoint`.
    """
    two_stage = any("token_type_embeddings" in key for key in weights)
    published = vars(FusionNetworks()) | {"image_res": 384, "queue_size": 65536}  # downstream
    published["bert_config"] = ALBEF_BERT if two_stage else SIMLA_BERT
    take_from_checkpoint(config, options=published)
    for name, value in published.items():
        if getattr(config, name) is None:
            setattr(config, name, value)
