"""Layer-wise learning rates for fine-tuning: the deeper a block lies below the output, the slower it
learns (Clark et al. 2020, ELECTRA; BEiT's and MAE's rule for vision transformers)."""

import re
from collections.abc import Iterable

from base.errors import UserError

# the first numbered list in a parameter's name is its stack of blocks
BLOCK = re.compile(r"((?:\w+\.)*?(?:resblocks|blocks|layers|layer|stages)\.)(\d+)\.")
INPUTS = (  # what feeds a stack
    "patch_embed",
    "class_embedding",
    "cls_token",
    "conv1.",
    "dist_token",
    "embeddings.",
    "ln_pre.",
    "mask_token",
    "pos_embed",
    "positional_embedding",
    "stem.",
    "tok_embeddings",
    "token_embedding",
)
INNER = ("transformer", "encoder", "resblocks", "blocks", "layers", "layer", "stages")


def layer_scales(names: Iterable[str], decay: float) -> dict[str, float]:
    """Multiple of the learning rate of every parameter of a network with one or several towers.

    In a tower of N blocks: decay^(N+1) for its embeddings, decay^(N-i) for block i, counted from 0,
    and 1 behind the blocks (BEiT's and MAE's get_layer_id). Raises UserError for a network without
    numbered blocks.
    """
    names = list(names)
    depths: dict[str, int] = {}
    for name in names:
        if match := BLOCK.match(name):
            tower = tower_of(match[1])
            depths[tower] = max(depths.get(tower, 0), int(match[2]) + 1)
    if not depths:
        raise UserError(
            "layer_decay: this network has no numbered blocks; it is for transformers and ConvNeXt"
        )
    return {name: decay ** layers_above(name, depths) for name in names}


def tower_of(stack: str) -> str:
    """`visual.` of `visual.transformer.resblocks.`; nothing where the stack is at the root."""
    first = stack.partition(".")[0]
    return "" if first in INNER else f"{first}."


def layers_above(name: str, depths: dict[str, int]) -> int:
    """How many layers lie between a parameter and the head of its tower."""
    if match := BLOCK.match(name):
        return depths[tower_of(match[1])] - int(match[2])
    towers = [tower for tower in depths if name.startswith(tower)]
    inside = max(towers, key=len, default=None)
    is_input = any(part in name for part in INPUTS)
    return depths[inside] + 1 if inside is not None and is_input else 0
