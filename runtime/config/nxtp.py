"""Options of the data that NXTP is trained and scored on."""

from dataclasses import dataclass
from pathlib import Path

from base.errors import UserError
from base.knobs import knob
from base.limits import WIDTH
from runtime.checkpoint import weights_file
from runtime.config.from_checkpoint import take_from_checkpoint
from runtime.config.old_names import FLAGS_OF_NXTP
from runtime.options import StreamConfig, ValidationConfig

# what the network's weights do not tell
OF_CHECKPOINT = (
    "network.decoder_heads",
    "network.norm_eps",
    "network.rope_theta",
    "network.rope_scaling",
    "network.vision_activation",
    "network.prefix_image",
    "network.image_tower",
    "network.image_size",
    "whole_image",
    "tokenizer",
)


@dataclass
class RecognitionData(StreamConfig, ValidationConfig):
    """Images with labels."""

    NEW_NAMES = FLAGS_OF_NXTP

    train_list: list[Path] = knob(
        [],
        "lists of `path : name,name,...`, or JSON entries {image, labels}",
        aliases=("train_file",),
    )
    shards: list[str] = knob(
        [], "WebDataset shards with .nouns (scripts/data/extract_nouns.py), beside or instead"
    )
    image_root: Path = knob(Path("."), "folder that the lists' paths start from")
    val: str | None = knob(
        None,
        "list or shards (folder, pattern) that choose the best checkpoint; none = the last",
        aliases=("val_file", "val_list"),
    )
    test: str | None = knob(
        None, "the same for the final scores and --evaluate", aliases=("test_file", "test_list")
    )
    whole_image: bool = knob(
        False, "resize the whole image to a square, without a crop", aliases=("whole_picture",)
    )
    crop: float = knob(
        1.0,
        "smallest area of random training crops, of the image; 1 = as published",
        low=0.05,
        high=1,
    )
    max_text: int = knob(
        256, "tokens of an image's text at most, prompt included", low=16, high=WIDTH
    )
    batch_size: int = knob(16, "images per process and micro-batch", low=1)
    batch_size_test: int = knob(16, "images per forward pass in evaluation", low=1)
    many_prompts: bool = knob(True, "a prompt is sampled for each image")
    decouple_labels: bool = knob(True, "labels do not attend to one another")


def fill_network(config) -> None:
    """Take over what the run that made config.checkpoint says about the network's form, the image
    size, the way images are cut, and the tokenizer. UserError."""
    config.tokenizer = config.tokenizer or config.llama
    saved = take_from_checkpoint(config, options=OF_CHECKPOINT)
    found = config.tokenizer or saved.get("llama")
    if found is None:
        if config.checkpoint:
            weights_file(Path(config.checkpoint))  # a misspelt one knows of no tokenizer
        raise UserError("tokenizer: name a SentencePiece tokenizer.model, or a folder with --llama")
    config.tokenizer = Path(found)
