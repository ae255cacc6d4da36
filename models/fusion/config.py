"""The networks' geometry from the knobs that every downstream script has."""

import json

from base.errors import UserError
from models.layers.vit import ViTConfig
from models.layers.xbert import BertConfig


def networks(knobs, vocab_size: int) -> tuple[ViTConfig, BertConfig]:
    """The two transformers that `knobs` describes: image_res, patch_size, vision_width,
    vision_depth, vision_heads, vision_stem and the file bert_config. Raises UserError where the
    file is missing or no BERT geometry.
    """
    try:
        given = json.loads(knobs.bert_config.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(
            f"bert_config: no file {knobs.bert_config}; name the JSON that the checkpoint was made with"
        ) from None
    except ValueError as error:
        raise UserError(f"bert_config: {knobs.bert_config} is not valid JSON ({error})") from None
    bert = BertConfig.from_json(
        given | {"encoder_width": knobs.vision_width, "vocab_size": vocab_size}
    )
    size = (
        knobs.image_res,
        knobs.patch_size,
        knobs.vision_width,
        knobs.vision_depth,
        knobs.vision_heads,
    )
    return ViTConfig(*size, stem=tuple(knobs.vision_stem)), bert
