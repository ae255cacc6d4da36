"""Layer-wise learning rates for fine-tuning: the deeper a block lies below the output, the slower it
learns (Clark et al. 2020, ELECTRA; BEiT's and MAE's rule for vision transformers)."""

import re
from collections.abc import Iterable
from itertools import takewhile

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
    "pre_layrnorm.",  # transformers spells it so
    "stem.",
    "tok_embeddings",
    "token_embedding",
)
INNER = ("transformer", "encoder", "resblocks", "blocks", "layers", "layer", "stages")
AT_INPUT = re.compile(rf"(?:(?:{'|'.join(INNER)})\.)*(?:{'|'.join(map(re.escape, INPUTS))})")


def layer_scales(names: Iterable[str], decay: float) -> dict[str, float]:
    """Multiple of the learning rate of every parameter of a network with one or several towers.

    In a tower of N blocks: decay^(N+1) for its embeddings, decay^(N-i) for block i, counted from 0,
    and 1 behind the blocks (BEiT's and MAE's get_layer_id). A tower without numbered blocks, as a
    ResNet, learns at the full rate. Raises UserError where no tower has any.
    """
    names = list(names)
    depths: dict[str, int] = {}
    for name in names:
        if block := block_of(name):
            tower, number = block
            depths[tower] = max(depths.get(tower, 0), number + 1)
    if not depths:
        raise UserError(
            "layer_decay: this network has no numbered blocks; it is for transformers and ConvNeXt"
        )
    return {name: decay ** layers_above(name, depths) for name in names}


def block_of(name: str) -> tuple[str, int] | None:
    """Tower and number of the block that a parameter belongs to; None where it is in none, or in a
    stem of several stages, which feeds the blocks."""
    match = BLOCK.match(name)
    if match is None or any(part in match[1] for part in INPUTS):
        return None
    return tower_of(match[1]), int(match[2])


def tower_of(stack: str) -> str:
    """`visual.` of `visual.transformer.resblocks.`; nothing where the stack is at the root."""
    own = takewhile(lambda part: part not in INNER, stack.split("."))
    return "".join(f"{part}." for part in own)


def layers_above(name: str, depths: dict[str, int]) -> int:
    """How many layers lie between a parameter and the head of its tower."""
    if block := block_of(name):
        tower, number = block
        return depths[tower] - number
    towers = [tower for tower in depths if name.startswith(tower)]
    inside = max(towers, key=len, default=None)
    if inside is None or not AT_INPUT.match(name.removeprefix(inside)):
        return 0
    return depths[inside] + 1
