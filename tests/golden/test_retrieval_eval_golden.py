"""Retrieval evaluation, features to recalls, against the originals' score matrices and metrics."""

import pytest
import torch

from base.distributed import World
from evaluation.retrieval import Captions, rank, recalls
from models.fusion.retrieval import Retrieval, RetrievalConfig
from models.weights.albef import start_from
from tests.golden.report import compare, same
from tests.golden.simla_cases import bert_of, pretrained, tensors_under, vit_of
from tests.helpers.golden import decode_image, golden

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


def retrieval_case(system: str):
    """(meta, tensors, the retrieval model started from the golden pre-training checkpoint, in eval
    mode)."""
    meta, t = golden("simla", f"retrieval_{system}")
    c = meta["config"]
    space = {"embed_dim": c["embed_dim"], "queue_size": c["queue_size"], "compat": "original"}
    model = Retrieval(RetrievalConfig(vit=vit_of(c), bert=bert_of(c), **space))
    start_from(model, pretrained(system), "retrieval")
    model.load_state_dict(tensors_under("new.", t), strict=False)
    return meta, t, model.eval()


def captions_of(meta: dict, t: dict) -> Captions:
    owners = meta["eval"]["txt2img"]
    owner = torch.tensor([owners[str(i)] for i in range(len(owners))])
    return Captions(t["in.eval.input_ids"], t["in.eval.attention_mask"].bool(), owner)


@pytest.mark.parametrize("system", ["simla", "albef"])
@pytest.mark.parametrize(("image_batch", "pairs", "keep_states"), [(32, 512, True), (2, 3, False)])
def test_score_matrices_and_recalls(system, image_batch, pairs, keep_states):
    meta, t, model = retrieval_case(system)
    images, captions = decode_image(t["in.eval.images"]), captions_of(meta, t)
    rankings = rank(
        model,
        lambda indices: images[indices].split(image_batch),
        len(images),
        captions,
        ALONE,
        k=meta["config"]["k_test"],
        keep_text_states=keep_states,
        image_batch=image_batch,
        pairs=pairs,
    )
    for ranking, key in zip(rankings, ("score_i2t", "score_t2i"), strict=True):
        found, theirs = ranking.dense(), t[f"out.eval.{key}"]
        scored = theirs != -100
        same(f"retrieval_{system}", "scored pairs", found != -100, scored)
        compare(f"retrieval_{system}", "evaluation scores", found[scored], theirs[scored], 1e-5)
    found = recalls(*rankings, captions.image)
    assert found.keys() == meta["eval"]["metrics"].keys()
    for name, theirs in meta["eval"]["metrics"].items():
        compare(f"retrieval_{system}", "recalls", found[name], theirs, 1e-9)
    owners = {
        str(image): (captions.image == image).nonzero().flatten().tolist()
        for image in range(len(images))
    }
    same(f"retrieval_{system}", "captions of an image", owners, meta["eval"]["img2txt"])
