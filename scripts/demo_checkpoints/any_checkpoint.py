"""From a checkpoint to what it can do; what it is, its weights tell."""

from pathlib import Path

import eval_knn
from base.distributed import World
from base.libraries import of_library
from evaluation.demo.abilities import Abilities
from models.weights.albef import checkpoint_kind
from models.weights.libraries import LibraryDual
from models.weights.torchscript import is_jit_archive
from runtime.checkpoint import read_weights, weights_file
from scripts.demo_checkpoints import embedders, fusion, recognition

FUSION = {  # kind of a checkpoint of SIMLA's and ALBEF's -> what opens it
    "pretrain": fusion.retrieval,
    "retrieval": fusion.retrieval,
    "vqa": fusion.answering,
    "ve": fusion.entailment,
}


def open_abilities(source: Path | None, config, world: World) -> Abilities:
    """What a checkpoint, or the library's model that config.model names, can do. UserError where it
    is none of ours or others' that the evaluation scripts open."""
    if of_library(config.model):
        if _images_alone(source, config):
            return embedders.images_alone(source, config, world)
        return embedders.dual(source, config, world)
    file = weights_file(source)
    if is_jit_archive(file):
        return embedders.dual(file, config, world)
    weights = read_weights(source)
    if any(name.startswith("language_decoder.") for name in weights):
        return recognition.recognition(file, config, world)
    if any(name.startswith("visual_encoder.") for name in weights):
        open_task = FUSION.get(checkpoint_kind(weights))
        if open_task:
            return open_task(file, config, world)
        return embedders.images_alone(file, config, world)
    if _images_alone(file, config):
        return embedders.images_alone(file, config, world)
    return embedders.dual(file, config, world)


def _images_alone(source: Path | None, config) -> bool:
    """Whether the network has no text encoder."""
    if (config.model or "").startswith("open_clip/"):
        return False
    options = {"model": config.model, "random_weights": config.random_weights}
    encoder = eval_knn.load_encoder(eval_knn.Config(checkpoint=source, **options))
    if encoder.kind == "dual":
        return encoder.title.startswith("SIMCLR")
    return not isinstance(encoder.network, LibraryDual)
