"""The networks' geometry from the knobs that every downstream script has."""

from base.files import read_json
from models.layers.vit import ViTConfig
from models.layers.xbert import BertConfig


def networks(knobs, vocab_size: int) -> tuple[ViTConfig, BertConfig]:
    """The two transformers that `knobs` describes: image_res, patch_size, vision_width,
    vision_depth, vision_heads, vision_stem and the file bert_config. Raises UserError where the
    file is missing or no BERT geometry.
    """
    remedy = "name the JSON that the checkpoint was made with as bert_config"
    given = read_json(knobs.bert_config, dict, remedy)
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
