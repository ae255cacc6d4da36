"""The original's side of benchmarks.retrieval: the evaluation loop of Retrieval.py in a checkout of
SIMLA or ALBEF, as it is."""

import importlib
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.gauge import Stages
from benchmarks.inputs import shake, synthetic_split
from benchmarks.peers.fusion import BERT_FILES
from benchmarks.peers.stand_ins import Missing, prepare, stand_in

CONFIG = {
    "image_res": 384,
    "vision_width": 768,
    "embed_dim": 256,
    "temp": 0.07,
    "queue_size": 64,
    "momentum": 0.995,
    "mlm_probability": 0.15,
    "distill": True,  # this and the next as in its retrieval configurations
    "vit_mask_token": False,
}
UNUSED = ("dataset", "scheduler", "optim", "ruamel_yaml", "ruamel.yaml")  # by the evaluation


class Tokens(types.SimpleNamespace):
    """Result of a tokenizer."""

    def to(self, device: str) -> "Tokens":
        return Tokens(**{name: value.to(device) for name, value in vars(self).items()})


class Split:
    """The loader of a test split: batches of images, and lists of images and captions whose lengths
    are read."""

    def __init__(self, images: Tensor, captions: int, batch: int):
        self.images = images
        self.batch = batch
        self.dataset = types.SimpleNamespace(image=range(len(images)), text=list(range(captions)))

    def __iter__(self) -> Iterator[tuple[Tensor, None]]:
        for part in self.images.split(self.batch):
            yield part, None


def build_model(options: types.SimpleNamespace) -> nn.Module:
    """The checkout's retrieval model with random weights, on the CPU."""
    simla = options.system == "simla"
    name = "models.simla.retrieval" if simla else "models.model_retrieval"
    source = importlib.import_module(name)
    source.BertModel.from_pretrained = classmethod(
        lambda cls, name, config, **more: cls(config, **more)
    )
    config = dict(CONFIG, bert_config=str(Path(options.peer) / BERT_FILES[options.system]))
    if simla:
        return source.SIMLA(config=config, init_deit=False)
    return source.ALBEF(config=config)


def evaluation_loop(stages: Stages) -> types.ModuleType:
    """The checkout's Retrieval.py as a module; its progress log marks where matching begins."""
    for name in UNUSED:
        stand_in(name)
    importlib.import_module("models")
    sys.modules["models.tokenization_bert"] = Missing("models.tokenization_bert")
    script = importlib.import_module("Retrieval")
    script.args = types.SimpleNamespace(distributed=False)
    log_every = script.utils.MetricLogger.log_every

    def log_matching(logger, *args, **kwargs):
        stages.enter("matching")
        return log_every(logger, *args, **kwargs)

    script.utils.MetricLogger.log_every = log_matching
    return script


def evaluate(options: types.SimpleNamespace) -> dict:
    """Times of the stages; `peer.pt` in the folder `exchange` gets weights and scores."""
    torch.manual_seed(0)
    prepare(options)
    stages = Stages(options.device)
    script = evaluation_loop(stages)
    model = build_model(options).to(options.device)
    shake(model)
    images, ids, mask = synthetic_split(options.images, options.captions)
    split = Split(images, len(ids), options.batch)

    def tokenizer(texts: list[int], **_) -> Tokens:
        return Tokens(input_ids=ids[texts], attention_mask=mask[texts].long())

    stages.enter("encoding")
    scores = script.evaluation(
        model, split, tokenizer, torch.device(options.device), {"k_test": options.k_test}
    )
    stages.enter("end")
    weights = {
        name: value
        for name, value in model.state_dict().items()
        if "_m." not in name and "queue" not in name
    }
    matrices = [torch.from_numpy(matrix) for matrix in scores]
    torch.save({"model": weights, "scores": matrices}, Path(options.exchange) / "peer.pt")
    return {"times": stages.times()}
