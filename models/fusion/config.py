"""The networks' geometry from the options that every script of a fusion encoder has."""

from functools import partial

from torch._guards import detect_fake_mode

from base.distributed import say
from base.memory import check_fits, parameter_count
from base.pixels import OPENAI, timm_statistics
from base.reading import read_json
from models.fusion.retrieval import RetrievalConfig
from models.layers.vit import ViT, ViTConfig
from models.layers.xbert import BertConfig, XBert


def networks(knobs, vocab_size: int, mask_token: bool = False) -> tuple[ViTConfig, BertConfig]:
    """The two transformers that `knobs` describes: image_res, patch_size, vision_width,
    vision_depth, vision_heads, vision_stem, vision_tower and the file bert_config.

    mask_token: the ViT has a learned stand-in for masked patches. Raises UserError where the file
    is missing or no BERT geometry, or the memory does not suffice.
    """
    remedy = "name the JSON that the checkpoint was made with as bert_config"
    bert_json = read_json(knobs.bert_config, dict, remedy)
    bert_json["encoder_width"] = knobs.vision_width
    bert_json["vocab_size"] = vocab_size
    bert = BertConfig.from_json(bert_json)
    vit = ViTConfig(
        image_size=knobs.image_res,
        patch_size=knobs.patch_size,
        width=knobs.vision_width,
        depth=knobs.vision_depth,
        heads=knobs.vision_heads,
        mask_token=mask_token,
        stem=tuple(knobs.vision_stem),
        tower=knobs.vision_tower,
        pixels=timm_statistics(knobs.vision_tower) if knobs.vision_tower else OPENAI,
    )
    _check_memory(vit, bert, knobs)
    return vit, bert


def warn_of_queue(size: int, pairs: int) -> None:
    """Say where a queue without ids holds features of every pair of the data, and more."""
    if size > pairs:
        say(
            f"warning: queue_size {size:,} for {pairs:,} pairs: older features of a pair are among its "
            f"own negatives; start with --queue_size {pairs} or less"
        )


def _check_memory(vit: ViTConfig, bert: BertConfig, knobs) -> None:
    """UserError where the free memory would not hold the weights and the queues."""
    if detect_fake_mode() is not None:  # scripts/plan.py: nothing is allocated
        return
    parameters = parameter_count(partial(ViT, vit)) + parameter_count(partial(XBert, bert))
    queues = 2 * knobs.embed_dim * getattr(knobs, "queue_size", 0)
    check_fits(parameters + queues, "vision transformer, BERT and queues")


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
