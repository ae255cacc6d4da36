"""Zero-shot classifiers, similarities and accuracies against recorded ones, for a tiny model and
CLIP's tokenizer."""

import json

import pytest
import torch

from base.distributed import World
from dataset.text.bpe import ClipTokenizer
from evaluation.zeroshot import (
    best_classes,
    class_prompts,
    class_scores,
    classify,
    score_names,
    text_classifier,
    topk_accuracy,
)
from evaluation.zeroshot_metrics import mean_per_class, measure, roc_auc
from models.dual_encoder.factory import build_dual
from tests.golden.clip_cases import close, config_of, recipe_state, toy_vit
from tests.helpers.golden import golden, golden_file

CASES = ["cl2l.imagenet", "cl2l.rendered_sst2", "cl2l.fer2013", "cl2l.pets", "cl2l.hateful_memes"]
CASES += ["clip.imagenet", "clip.rendered_sst2", "clip.fer2013"]
METRIC = {"pets": "mean_per_class", "hateful_memes": "roc_auc"}


@pytest.fixture(scope="module")
def tokenizer() -> ClipTokenizer:
    pytest.importorskip("open_clip", reason="its package brings CLIP's merges")
    return ClipTokenizer()


@pytest.mark.parametrize("name", CASES)
def test_zero_shot(name, tokenizer):
    meta = json.loads(golden_file("clip_rocket", "zeroshot", "zeroshot.json").read_text())
    tensors = golden("clip_rocket", "zeroshot/zeroshot")[1]
    case, toy = meta["cases"][name], meta["config"]
    model = build_dual(config_of(case["model"], case["flags"], toy), toy_vit(toy)).eval()
    shapes = {
        key: [list(value.shape), str(value.dtype)] for key, value in model.state_dict().items()
    }
    model.load_state_dict(recipe_state(shapes, toy["seed"], half=True))
    world = World(0, 1, 0, torch.device("cpu"))
    images = tensors["images"].float() * meta["image_scale"]
    with torch.inference_mode():
        prompts = class_prompts(case["labels"], case["templates"], name)
        classifier = text_classifier(model.embed_text, tokenizer, prompts, world, batch_size=5)
        for kind, matrix in classifier.items():
            close(
                matrix,
                tensors[f"{name}/class_embedding.{kind}_text"],
                f"zeroshot {name} classifier",
                1e-4,
            )
        scores = class_scores(model.embed_image(images), classifier)
        for kind in classifier:
            close(
                scores[kind], tensors[f"{name}/{kind}_sim"], f"zeroshot {name} similarities", 1e-4
            )
        batches = ({"image": part} for part in images.split(8))
        best = best_classes(model.embed_image, classifier, batches, range(30), 30, world)
        metric, targets = METRIC.get(case["dataset"], "acc1"), torch.tensor(case["targets"])
        parts = zip(images.split(8), targets.split(8), strict=True)
        batches = ({"image": image, "target": target} for image, target in parts)
        own = classify(model.embed_image, classifier, batches, range(30), 30, world, metric)
    assert best[:, 0, 0].tolist() == case["predictions_z"]
    found = topk_accuracy(best, targets, score_names(classifier))
    assert case["metrics"]
    for key, value in case["metrics"].items():  # acc1_z, or of other metrics than top-1 plain z
        assert own[f"{metric}_{key.removeprefix('acc1_')}"] == pytest.approx(value), key
        assert not key.startswith("acc1") or found[key] == pytest.approx(value), key


def test_metrics():
    expected, tensors = golden("clip_rocket", "metrics/metrics")
    best, targets = tensors["outputs"].topk(5).indices, tensors["targets"]
    found = measure("acc1", best, targets)
    assert found["acc1"] == pytest.approx(expected["top1"]) and found["acc5"] == pytest.approx(
        expected["top5"]
    )
    assert found["acc1_acc5"] == pytest.approx(expected["kinetics_mean_top1_top5"])
    assert mean_per_class(best[:, 0], targets) == pytest.approx(expected["mean_per_class"])
    binary = tensors["outputs_binary"]
    assert roc_auc(binary[:, 1] - binary[:, 0], tensors["targets_binary"]) == pytest.approx(
        expected["roc_auc"]
    )
