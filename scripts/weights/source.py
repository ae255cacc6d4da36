"""A checkpoint to convert: its weights, what lies in or beside it, and its family."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from base.errors import UserError
from models.weights.align import is_align
from models.weights.torchscript import is_jit_archive, jit_state_dict
from models.weights.vit import native
from runtime.checkpoint import read_weights, weights_file
from runtime.config.from_checkpoint import description_of

State = Mapping[str, Tensor]
FAMILIES = {  # family: how messages call it
    "clip": "a CLIP-like dual encoder",
    "align": "ALIGN",
    "vit": "a vision transformer",
    "fusion": "SIMLA or ALBEF",
    "nxtp": "NXTP",
    "dvae": "an image tokenizer (dVAE)",
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the file may not tell, as in eval_zeroshot.py and Recognition.py."""

    model: str | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    bpe_path: Path | None = None
    tokenizer: str | None = None
    clip: Path | None = None
    repository: str | None = None  # USER/NAME that the folder will be pushed to


@dataclass(frozen=True, kw_only=True)
class Source:
    """file: of the weights. about: as `runtime.config.from_checkpoint.description_of` reads it."""

    file: Path
    weights: State
    about: Mapping[str, Any]
    family: str


class Written(NamedTuple):
    """What an export wrote: the library that reads it, the hub's name of its task, and a Python
    program that uses the folder it runs in."""

    library: str
    task: str
    example: str


def open_source(path: Path) -> Source:
    """The checkpoint in a file, a run's folder or a folder of Hugging Face. UserError."""
    file = weights_file(path)
    if is_jit_archive(file):
        return Source(
            file=file, weights=jit_state_dict(file), about={"archive": True}, family="clip"
        )
    weights = read_weights(path)
    return Source(file=file, weights=weights, about=description_of(file), family=family_of(weights))


def family_of(weights: State) -> str:
    """A key of FAMILIES; `clip` where no other fits, which its reader checks."""
    names = list(weights)
    if any(name.startswith("language_decoder.") for name in names):
        return "nxtp"
    if any(name.startswith("encoder.blocks.") for name in names):
        return "dvae"
    if any(name.startswith(("visual_encoder.", "text_encoder.")) for name in names):
        return "fusion"
    if is_align(weights):
        return "align"
    try:
        native(weights)
    except UserError:
        return "clip"
    return "vit"
