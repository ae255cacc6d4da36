"""Speed of retrieval evaluation with re-ranking: ViT-B/16 at 384 px + BERT-base SIMLA or ALBEF.

    python -m benchmarks.retrieval                                 # ours alone
    python -m benchmarks.retrieval --peer PATH/TO/SIMLA            # against a checkout, and are the scores equal?
    python -m benchmarks.retrieval --peer PATH/TO/ALBEF --system albef

All images and captions are encoded; then each image's `k_test` nearest captions, and each caption's
nearest images, are matched. A pair is a candidate of one direction; the same number counts for both
sides. Weights and images are random, five captions an image. The original's evaluation function
runs unchanged, with stand-ins for old libraries (or --peer-python, as in benchmarks.pretrain); its
weights are then ours. The table has the time that COCO's test would take by these rates.
"""

import itertools
import statistics
import tempfile
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
from torch import Tensor

from base.distributed import alone
from base.errors import UserError
from benchmarks.gauge import Stages
from benchmarks.inputs import PEER_FILE, left, synthetic_split
from benchmarks.pretrain import model_config
from benchmarks.runner import OURS, PEER, PeerOptions, check_peer, device_of, take_turns
from benchmarks.table import Column, publish
from evaluation.retrieval import FILL, Captions, rank
from models.fusion.retrieval import Retrieval, RetrievalConfig
from models.weights.loading import load_checkpoint
from runtime.config.cli import knob, run_script
from runtime.run import evaluating

CAPTIONS = 5  # of an image, as in COCO
COCO, COCO_K = 5000, 256  # images of the test, and its k_test
COCO_PAIRS = (1 + CAPTIONS) * COCO * COCO_K
COLUMNS = [
    Column("pairs/s", "pairs"),
    Column("pairs per CPU second", "cpu_pairs"),
    Column("encoding, s", "encoding", "{:.1f}"),
    Column(f"COCO, {COCO_PAIRS / 1e6:.1f} million pairs, extrapolated", "coco", "{:,.0f} h"),
    Column("ours is faster by", "pairs", "{:.2f} x", ratio="higher"),
    Column("by CPU time", "cpu_pairs", "{:.2f} x", ratio="higher"),
    Column("on COCO", "coco", "{:.2f} x", ratio="lower"),
]
CHECKOUT_FILES = {"simla": "models/simla/retrieval.py", "albef": "models/model_retrieval.py"}


@dataclass
class Config(PeerOptions):
    """What to measure."""

    system: str = knob("simla", "which model", choices=("simla", "albef"))
    images: int = knob(12, f"images; each has {CAPTIONS} captions", low=2)
    k_test: int = knob(8, "candidates of an image or caption; at most as many as images", low=1)
    batch: int = knob(4, "images encoded at once", low=1)

    @property
    def pairs(self) -> int:
        """Pairs matched in both directions together."""
        return (1 + CAPTIONS) * self.images * self.k_test


def build_model(options: SimpleNamespace, weights: dict | None) -> Retrieval:
    """ViT-B/16 at 384 px and BERT-base; the weights of the peer, none = random ones."""
    torch.manual_seed(0)
    config = model_config(options)
    vit = replace(config.vit, image_size=384, mask_token=False)
    model = Retrieval(RetrievalConfig(vit=vit, bert=config.bert, queue_size=64))
    if weights:
        load_checkpoint(model, weights, allowed_missing=("*_m.*", "*queue*"))
    return model.to(options.device)


def ours(options: SimpleNamespace) -> dict:
    """Times of the stages and, if the peer left scores, how far the rankings agree."""
    peer = left(options, PEER_FILE) or {"model": None}
    model = build_model(options, peer["model"])
    images, ids, mask = synthetic_split(options.images, options.captions)
    captions = Captions(ids, mask, torch.arange(len(ids)) % len(images))
    world = alone(options.device)
    stages = Stages(options.device)
    match_scores = model.match_scores

    def noted(*args) -> Tensor:
        stages.enter("matching")  # begins with the first pairs
        return match_scores(*args)

    model.match_scores = noted
    stages.enter("encoding")
    with evaluating(model):
        rankings = rank(
            model,
            lambda indices: images[indices].split(options.batch),
            len(images),
            captions,
            world,
            k=options.k_test,
            keep_text_states=options.system == "albef",
            image_batch=options.batch,
        )
    stages.enter("end")
    result = {"times": stages.times()}
    if "scores" in peer:
        pairs = zip(rankings, peer["scores"], strict=True)
        result["agreement"] = [agreement(ranking.dense(), theirs) for ranking, theirs in pairs]
    return result


def agreement(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    """How far two score matrices [Q,N] agree; FILL marks what was no candidate.

    candidates: fraction that is equal; order: fraction of queries whose common candidates come in
    the same order; difference: largest of a score, in standard deviations of the scores.
    """
    common = (ours > FILL) & (theirs > FILL)
    difference = (ours - theirs)[common].abs().max() / theirs[common].std()
    same_order = []
    for row, other, both in zip(ours, theirs, common, strict=True):
        same_order.append(torch.equal(row[both].argsort(), other[both].argsort()))
    return {
        "candidates": common.sum().item() / (theirs > FILL).sum().item(),
        "order": statistics.mean(same_order),
        "difference": difference.item(),
    }


def rates(run: dict, config: Config) -> dict[str, float]:
    """`pairs` a second and `cpu_pairs` a CPU second, seconds of `encoding`, and `coco`, the hours
    that COCO's test would take at these rates by the clock."""
    matching, matching_cpu = run["times"]["matching"]
    encoding, _ = run["times"]["encoding"]
    coco = encoding / config.images * COCO + matching / config.pairs * COCO_PAIRS
    return {
        "pairs": config.pairs / matching,
        "cpu_pairs": config.pairs / matching_cpu,
        "encoding": encoding,
        "coco": coco / 3600,
    }


def agreement_text(by_direction: list[dict[str, float]]) -> str:
    """The lowest agreement of scores and orders, in words."""
    least = {name: min(part[name] for part in by_direction) for name in by_direction[0]}
    difference = max(part["difference"] for part in by_direction)
    return (
        f"With equal weights {least['candidates']:.1%} of the candidates are the same, scores "
        f"differ by at most {difference:.1e} of their standard deviation, {least['order']:.1%} of "
        "the queries have the same order."
    )


def main(config: Config) -> None:
    if config.k_test > config.images:
        raise UserError(
            f"--k-test {config.k_test}: there are {config.images} images; give more --images"
        )
    system = config.system.upper()
    check_peer(config, CHECKOUT_FILES[config.system], system)
    sides = {PEER: "benchmarks.peers.fusion:evaluate"} if config.peer else {}  # leaves the weights
    sides[OURS] = "benchmarks.retrieval:ours"
    captions = CAPTIONS * config.images
    with tempfile.TemporaryDirectory() as folder:
        results = take_turns(config, sides, exchange=folder, captions=captions)
    for run in itertools.chain(*results.values()):
        run.update(rates(run, config))
    remark = agreement_text(results[OURS][0]["agreement"]) if config.peer else ""
    title = ["Retrieval evaluation", f"{system} at 384 px", f"{config.images} images"]
    title += [f"{captions} captions", f"k_test {config.k_test}", "fp32", device_of(config)]
    publish(config, "retrieval", title, results, COLUMNS, remark)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
