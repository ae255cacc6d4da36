"""Speed of retrieval evaluation with re-ranking: ViT-B/16 at 384 px + BERT-base SIMLA or ALBEF.

    python -m benchmarks.retrieval                                      # ours alone
    python -m benchmarks.retrieval --peer PATH/TO/ALBEF --system albef  # and are the scores equal?

All images and captions are encoded; then each image's `k_test` nearest captions, and each caption's
nearest images, are matched: a pair is a candidate of one direction. The original's evaluation runs
unchanged, with stand-ins for old libraries (or --peer-python, as in benchmarks.pretrain); its
weights are then ours. The table has the time that COCO's test would take by these rates.
"""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
from torch import Tensor

from base.distributed import alone
from base.errors import UserError
from benchmarks.child import marking, now
from benchmarks.inputs import left, synthetic_split
from benchmarks.pretrain import model_config
from benchmarks.runner import OURS, PEER, PeerOptions, check_peer, device_of, take_turns
from benchmarks.table import Column, publish
from evaluation.retrieval import FILL, Captions, rank
from models.fusion.retrieval import Retrieval, RetrievalConfig
from models.weights.albef import start_from
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
    system: str = knob("simla", "which model", choices=("simla", "albef"))
    images: int = knob(12, f"images; each has {CAPTIONS} captions", low=2)
    k_test: int = knob(8, "candidates of an image or caption; at most as many as images", low=1)
    batch: int = knob(4, "images encoded at once", low=1)

    @property
    def pairs(self) -> int:
        """Pairs matched in both directions together."""
        return (1 + CAPTIONS) * self.images * self.k_test


def ours(options: SimpleNamespace) -> dict:
    """ViT-B/16 at 384 px and BERT-base with the weights of the peer, else random ones: clock and
    CPU time at the start, where matching begins and at the end, as `marks`; and if the peer left
    scores, how far the rankings agree."""
    peer = left(options)
    torch.manual_seed(0)
    config = model_config(options)
    vit = replace(config.vit, image_size=384, mask_token=False)
    model = Retrieval(RetrievalConfig(vit=vit, bert=config.bert, queue_size=64))
    if peer:
        start_from(model, peer["model"], "retrieval")
    model.to(options.device)
    images, ids, mask = synthetic_split(options.images, options.captions)
    captions = Captions(ids, mask, torch.arange(len(ids)) % len(images))
    inputs = (lambda indices: images[indices].split(options.batch), len(images), captions)
    how = {"keep_text_states": options.system == "albef", "image_batch": options.batch}
    marks = [now(options.device)]
    model.match_scores = marking(model.match_scores, marks, options.device)
    with evaluating(model):
        rankings = rank(model, *inputs, alone(options.device), k=options.k_test, **how)
    result = {"marks": [*marks, now(options.device)]}
    if peer:
        dense = [ranking.dense() for ranking in rankings]
        result["agreement"] = agreement(zip(dense, peer["scores"], strict=True))
    return result


def agreement(pairs: Iterable[tuple[Tensor, Tensor]]) -> str:
    """How far our score matrices [Q,N] and the original's agree, in words; FILL marks what was no
    candidate."""
    same, orders, differences = [], [], []
    for ours, theirs in pairs:
        same.append((ours > FILL)[theirs > FILL])
        common = (ours > FILL) & (theirs > FILL)
        difference = (ours - theirs)[common].abs() / theirs[common].std()
        differences.append(difference.max().item())
        for row, other, both in zip(ours, theirs, common, strict=True):
            orders.append(torch.equal(row[both].argsort(), other[both].argsort()))
    return (
        f"With equal weights {torch.cat(same).float().mean():.1%} of the candidates are the same, "
        f"scores differ by at most {max(differences):.1e} of their standard deviation, "
        f"{statistics.mean(orders):.1%} of the queries have the same order."
    )


def rates(run: dict, config: Config) -> dict[str, float]:
    """`pairs` a second and `cpu_pairs` a CPU second, seconds of `encoding`, and `coco`, the hours
    that COCO's test would take at these rates by the clock."""
    (begin, _), (middle, middle_cpu), (end, end_cpu) = run["marks"]
    encoding, matching = middle - begin, end - middle
    coco = encoding / config.images * COCO + matching / config.pairs * COCO_PAIRS
    return {
        "pairs": config.pairs / matching,
        "cpu_pairs": config.pairs / (end_cpu - middle_cpu),
        "encoding": encoding,
        "coco": coco / 3600,
    }


def main(config: Config) -> None:
    if config.k_test > config.images:
        raise UserError(f"--k-test {config.k_test} of {config.images} images: give more --images")
    system = config.system.upper()
    check_peer(config, CHECKOUT_FILES[config.system], system)
    sides = {PEER: "benchmarks.peers.fusion:evaluate"} if config.peer else {}  # leaves the weights
    sides[OURS] = "benchmarks.retrieval:ours"
    captions = CAPTIONS * config.images
    results = take_turns(config, sides, captions=captions)
    for runs in results.values():
        for run in runs:
            run.update(rates(run, config))
    title = ["Retrieval evaluation", f"{system} at 384 px", f"{config.images} images"]
    title += [f"{captions} captions", f"k_test {config.k_test}", "fp32", device_of(config)]
    publish(config, "retrieval", title, results, COLUMNS, results[OURS][0].get("agreement", ""))


if __name__ == "__main__":
    run_script(main, Config, __doc__)
