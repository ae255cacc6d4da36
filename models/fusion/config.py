"""The networks' geometry from the options that every script of a fusion encoder has."""

from base.files import read_json
from base.pixels import OPENAI
from models.fusion.retrieval import RetrievalConfig
from models.layers.vit import ViTConfig
from models.layers.xbert import BertConfig


def networks(knobs, vocab_size: int, mask_token: bool = False) -> tuple[ViTConfig, BertConfig]:
    """The two transformers that `knobs` describes: image_res, patch_size, vision_width, vision_depth, vision_heads,
    vision_stem and the file bert_config. mask_token: the ViT has a learned stand-in for masked patches. Raises
    UserError where the file is missing or no BERT geometry.
    """
    remedy = "name the JSON that the checkpoint was made with as bert_config"
    given = read_json(knobs.bert_config, dict, remedy)
    bert = BertConfig.from_json(
        given | {"encoder_width": knobs.vision_width, "vocab_size": vocab_size}
    )
    vit = ViTConfig(
        image_size=knobs.image_res,
        patch_size=knobs.patch_size,
        width=knobs.vision_width,
        depth=knobs.vision_depth,
        heads=knobs.vision_heads,
        mask_token=mask_token,
        stem=tuple(knobs.vision_stem),
        pixels=OPENAI,
    )
    return vit, bert


def retrieval_config(knobs, vocab_size: int) -> RetrievalConfig:
    """The retrieval network that `knobs` describes: see `networks`, and embed_dim, queue_size, temp,
    distill and compat."""
    vit, bert = networks(knobs, vocab_size)
    return RetrievalConfig(
        vit=vit,
        bert=bert,
        embed_dim=knobs.embed_dim,
        queue_size=knobs.queue_size,
        temp=knobs.temp,
        distill=knobs.distill,
        compat=knobs.compat,
    )
