"""What the files beside weights state about their network is what ours computes, or is refused.

Weights of one shape may belong to networks of another activation, epsilon or number of heads, which
score differently without a word.
"""

from collections.abc import Mapping
from typing import Any

from base.errors import UnfitWeights, brief
from base.pixels import RESAMPLING, processor_statistics

OPEN_FOLDER = "open the folder with --model hf/FOLDER"  # remedies
OPEN_CLIP_FOLDER = "open the folder with --model open_clip/local-dir:FOLDER"
BILINEAR = 2  # Pillow's number
FILTERS = (3, BILINEAR, None)  # that images are resized by here; the first is CLIP's default
OF_OPEN_CLIP = {  # text_cfg and vision_cfg: what OpenAI's towers compute; other keys are sizes
    "act_kwargs": ({}, None),
    "norm_kwargs": ({}, None),
    "no_causal_mask": (False,),
    "no_ln_pre": (False,),
    "final_ln_after_pool": (False,),
    "attentional_pool": (False,),
    "pool_type": ("tok", "argmax"),
    "hf_model_name": (None,),
    "timm_pool": ("token", "avg", ""),  # "": as the tower itself pools
    "timm_proj": ("linear",),
    "embed_cls": (False,),
}


def check_stated(
    where: str, stated: Mapping[str, Any], computed: Mapping[str, tuple], remedy: str
) -> None:
    """UserError where `stated` has another value than those of `computed`, by key; a key that is
    left out is at the library's default, which ours computes."""
    for name, values in computed.items():
        if name in stated and stated[name] not in values:
            raise UnfitWeights(
                f"{where}: {name} is {brief(stated[name])}, and this network computes "
                f"{brief(values[0])}; {remedy}"
            )


def check_open_clip(settings: Mapping[str, Any], preprocess: Mapping[str, Any]) -> None:
    """UserError for what open_clip_config.json asks for beyond OpenAI's towers and transform."""
    for part in ("vision_cfg", "text_cfg"):
        where = f"open_clip_config.json, {part}"
        check_stated(where, settings.get(part) or {}, OF_OPEN_CLIP, OPEN_CLIP_FOLDER)
    resized = {"resize_mode": ("shortest",)}
    check_stated("open_clip_config.json, preprocess_cfg", preprocess, resized, OPEN_CLIP_FOLDER)


def processor_pixels(
    images: Mapping[str, Any], side: int, large: int | None = None
) -> dict[str, Any]:
    """Fields of `Pixels` that preprocessor_config.json tells. UserError for another geometry.

    The view: shorter side to `side`, then the centre; large: the whole image, bilinear, to a square
    of `large`, then the centre of `side`.
    """
    remedy = f"{OPEN_FOLDER}, which uses its image processor"
    square = {"height": large, "width": large}
    whole = (square, large) if large else ({"shortest_edge": side}, side)
    crop = ({"height": side, "width": side}, side)
    computed = {"size": whole, "crop_size": crop, "do_center_crop": (True,), "do_resize": (True,)}
    computed["resample"] = (BILINEAR,) if large else FILTERS
    check_stated("preprocessor_config.json", images, computed, remedy)
    found = {"interpolation": RESAMPLING.get(images.get("resample"))}
    if statistics := processor_statistics(images):
        found["mean"], found["std"] = statistics
    return {name: value for name, value in found.items() if value is not None}
