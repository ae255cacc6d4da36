"""Shared by the golden tests of SIMLA and ALBEF: sizes of a case, its weights, and its hard
negatives."""

import torch

from models.layers.vit import ViTConfig
from models.layers.xbert import BertConfig
from tests.golden.report import same
from tests.helpers.golden import golden


def vit_of(config: dict) -> ViTConfig:
    """The vision transformer of a case's `config`; a null is a setting the origin does not have."""
    given = {name: value for name, value in config["vit"].items() if value is not None}
    return ViTConfig(config["image_size"], **given)


def bert_of(config: dict) -> BertConfig:
    """The text transformer of a case's `config`; all recorded cases run without dropout."""
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertConfig.from_json({**config["bert"], **no_dropout})


def tensors_under(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors whose name begins with a prefix, by the rest of their name."""
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def pretrained(system: str) -> dict[str, torch.Tensor]:
    """The pre-training state from which the downstream cases start."""
    return tensors_under("state.", golden("simla", f"pretrain_{system}")[1])


def draw_recorded_negatives(model, recorded: list[tuple[torch.Tensor, torch.Tensor]]) -> list:
    """Let each forward use the recorded hard negatives; with two samples the model has no other
    choice.

    Returns the list that receives, per forward, (image for each text, text for each image).
    """
    draw, used = model.sample_negatives, []

    def draw_as_recorded(*args, **kwargs):
        chosen = recorded[len(used)]
        own = draw(*args, **kwargs)
        for ours, theirs in zip(own, chosen, strict=True):
            assert ours.shape == theirs.shape
            if len(theirs) == 2:
                same("hard negatives", "of two samples, the other one", ours, theirs)
        used.append(chosen)
        return chosen

    model.sample_negatives = draw_as_recorded
    return used
