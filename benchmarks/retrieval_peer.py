"""The original's side of benchmarks/retrieval.py: the evaluation loop of Retrieval.py in a
checkout, as it is.

    python -m benchmarks.retrieval_peer '{"peer": "PATH", "system": "simla", ...}'      # by benchmarks.retrieval

Leaves weights and score matrices in the folder `exchange` and prints one line of JSON.
"""

import importlib
import json
import sys
import types
from pathlib import Path

import torch
from torch import nn

from benchmarks.common import Stages, about, chosen_device, shake, synthetic_split
from benchmarks.pretrain_peer import Missing, keep_old_names, replace_libraries, stand_in

CONFIG = {
    "image_res": 384,
    "vision_width": 768,
    "embed_dim": 256,
    "temp": 0.07,
    "queue_size": 64,
    "momentum": 0.995,
}
CONFIG |= {
    "mlm_probability": 0.15,
    "distill": True,
    "vit_mask_token": False,
}  # as in its retrieval configurations


class Words(types.SimpleNamespace):
    """What a tokenizer gives."""

    def to(self, device: torch.device) -> "Words":
        return Words(**{name: value.to(device) for name, value in vars(self).items()})


def build_model(options: dict) -> nn.Module:
    """The checkout's retrieval model with random weights, on the CPU."""
    root, simla = Path(options["peer"]), options["system"] == "simla"
    source = importlib.import_module(
        "models.simla.retrieval" if simla else "models.model_retrieval"
    )
    source.BertModel.from_pretrained = classmethod(
        lambda cls, name, config, **options: cls(config, **options)
    )
    config = CONFIG | {
        "bert_config": str(root / "configs" / ("shared_bert.json" if simla else "config_bert.json"))
    }
    return source.SIMLA(config=config, init_deit=False) if simla else source.ALBEF(config=config)


def evaluation_loop(options: dict, stages: Stages) -> types.ModuleType:
    """The checkout's Retrieval.py as a module; its progress log tells when matching begins."""
    for name in (
        "dataset",
        "scheduler",
        "optim",
        "ruamel_yaml",
        "ruamel.yaml",
    ):  # of no use in the evaluation
        stand_in(name)
    importlib.import_module("models")
    sys.modules["models.tokenization_bert"] = Missing("models.tokenization_bert")
    script = importlib.import_module("Retrieval")
    script.args = types.SimpleNamespace(distributed=False)
    log_every = script.utils.MetricLogger.log_every

    def noted(logger, *args, **kwargs):
        stages.enter("matching")
        return log_every(logger, *args, **kwargs)

    script.utils.MetricLogger.log_every = noted
    return script


class Split:
    """The loader of a test split: batches of images, and lists of images and captions to be
    counted."""

    def __init__(self, images: torch.Tensor, captions: int, batch: int):
        self.batches = [(part, None) for part in images.split(batch)]
        self.dataset = types.SimpleNamespace(image=range(len(images)), text=list(range(captions)))

    def __iter__(self):
        return iter(self.batches)


def main() -> None:
    options = json.loads(sys.argv[1])
    device = chosen_device(options["device"])
    torch.manual_seed(0)
    sys.path.insert(0, options["peer"])
    if options["stand_ins"]:
        replace_libraries()
    keep_old_names()
    stages = Stages(device)
    script, model = evaluation_loop(options, stages), build_model(options).to(device)
    shake(model)
    images, ids, mask = synthetic_split(options["images"], options["captions"])
    split = Split(images, len(ids), options["batch"])

    def tokenizer(texts: list[int], **_) -> Words:
        return Words(input_ids=ids[texts], attention_mask=mask[texts].long())

    stages.enter("encoding")
    scores = script.evaluation(model, split, tokenizer, device, {"k_test": options["k_test"]})
    stages.enter(None)
    weights = {
        name: value
        for name, value in model.state_dict().items()
        if "_m." not in name and "queue" not in name
    }
    matrices = [torch.from_numpy(matrix) for matrix in scores]
    torch.save({"model": weights, "scores": matrices}, Path(options["exchange"]) / "peer.pt")
    print(json.dumps({"times": stages.times} | about(device)))


if __name__ == "__main__":
    main()
