"""Our side of benchmarks/retrieval.py: evaluation/retrieval.py as Retrieval.py calls it.

    python -m benchmarks.retrieval_ours '{"system": "simla", "images": 12, ...}'      # by benchmarks.retrieval

With the weights and scores that the peer left in the folder `exchange`, says how well the rankings
agree. Prints one line of JSON.
"""

import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from base.distributed import World
from base.files import read_json
from benchmarks.common import Stages, about, chosen_device, synthetic_split
from evaluation.retrieval import FILL, Captions, rank
from models.fusion.retrieval import Retrieval, RetrievalConfig
from models.layers.xbert import BertConfig
from runtime.optim.build import Precision
from runtime.run import evaluating

ROOT = Path(__file__).resolve().parents[1]


def build_model(system: str, folder: Path) -> Retrieval:
    """ViT-B/16 at 384 px and BERT-base; weights of the peer, where it left some, else at random."""
    file = ROOT / "configs" / ("shared_bert.json" if system == "simla" else "config_bert.json")
    bert = BertConfig.from_json(read_json(file) | {"encoder_width": 768})
    model = Retrieval(RetrievalConfig(bert=bert, queue_size=64))
    saved = folder / "peer.pt"
    if saved.exists():
        weights = torch.load(saved, weights_only=True, mmap=True, map_location="cpu")["model"]
        missing, unexpected = model.load_state_dict(weights, strict=False)
        left = [name for name in missing if "_m." not in name and "queue" not in name]
        if left or unexpected:
            raise SystemExit(
                f"the original's weights do not fit: missing {left}, unexpected {unexpected}"
            )
    return model


class Noted:
    """The network; its first matching begins a stage."""

    def __init__(self, model: Retrieval, stages: Stages):
        self.encode_image, self.encode_text = model.encode_image, model.encode_text
        self.model, self.stages = model, stages

    def match_scores(self, *args) -> Tensor:
        self.stages.enter("matching")
        return self.model.match_scores(*args)


def agreement(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    """How far two score matrices [Q,N] agree; FILL marks what was no candidate.

    `candidates`: share of equal ones; `difference`: largest of a score, in standard deviations of
    the scores;
    `order`: share of queries whose common candidates come in the same order; `spearman`: mean rank
    correlation.
    """
    common = (ours > FILL) & (theirs > FILL)
    difference = (ours - theirs)[common].abs().max() / theirs[common].std()
    order, spearman = [], []
    for row, other, both in zip(ours, theirs, common, strict=True):
        places = [scores[both].argsort().argsort().double() for scores in (row, other)]
        order.append(torch.equal(*places))
        n = len(places[0])
        spearman.append(
            1 - 6 * (places[0] - places[1]).square().sum().item() / max(1, n * (n * n - 1))
        )
    shares = {
        "candidates": common.sum().item() / (theirs > FILL).sum().item(),
        "order": sum(order) / len(order),
    }
    return shares | {"difference": difference.item(), "spearman": sum(spearman) / len(spearman)}


def main() -> None:
    options = json.loads(sys.argv[1])
    device, folder = chosen_device(options["device"]), Path(options["exchange"])
    torch.manual_seed(0)
    model = build_model(options["system"], folder).to(device)
    images, ids, mask = synthetic_split(options["images"], options["captions"])
    captions = Captions(ids, mask, torch.arange(len(ids)) % len(images))
    stages, precision = Stages(device), Precision(options["precision"], device)
    stages.enter("encoding")
    with evaluating(model), precision.autocast():
        rankings = rank(
            Noted(model, stages),
            lambda indices: images[indices].split(options["batch"]),
            len(images),
            captions,
            World(0, 1, 0, device),
            k=options["k_test"],
            keep_text_states=not model.config.bert.single_stream,
            image_batch=options["batch"],
            progress=False,
        )
    stages.enter(None)
    result = {"times": stages.times} | about(device)
    if (folder / "peer.pt").exists():
        theirs = torch.load(folder / "peer.pt", weights_only=True, mmap=True)["scores"]
        pairs = zip(("images", "captions"), rankings, theirs, strict=True)
        result["agreement"] = {
            name: agreement(ranking.dense(), scores) for name, ranking, scores in pairs
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
