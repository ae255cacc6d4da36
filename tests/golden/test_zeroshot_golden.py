"""Zero-shot classifiers, similarities and accuracies against recorded ones, for a tiny model and
CLIP's tokenizer."""

import pytest
import torch

from base.distributed import World
from dataset.tasks.catalog import METRICS, class_prompts
from dataset.text.bpe import ClipTokenizer
from evaluation.zeroshot import (
    best_classes,
    class_scores,
    classify,
    score_names,
    text_classifier,
    topk_accuracy,
    zero_shot_accuracy,
)
from evaluation.zeroshot_metrics import mean_per_class, measure, roc_auc
from models.dual_encoder.factory import build_dual
from tests.golden.clip_cases import close, config_of, recipe_state, toy_vit
from tests.golden.report import compare, same
from tests.helpers.golden import golden, recorded

ALONE = World(0, 1, 0, torch.device("cpu"))
BATCH = 8


@pytest.fixture(scope="module")
def tokenizer() -> ClipTokenizer:
    pytest.importorskip("open_clip", reason="its package brings CLIP's merges")
    return ClipTokenizer()


def cases_of(in_training: bool) -> list:
    names = recorded("clip_rocket", "zeroshot", "zeroshot.json", within="cases")
    return [name for name in names if str(name).endswith(".in_training") == in_training]


def setting(name: str) -> tuple[dict, dict, torch.nn.Module, torch.Tensor]:
    """(case, recorded tensors, model, images)."""
    meta, tensors = golden("clip_rocket", "zeroshot/zeroshot")
    case, toy = meta["cases"][name], meta["config"]
    model = build_dual(config_of(case["model"], case["flags"], toy), toy_vit(toy)).eval()
    shapes = {
        key: [list(value.shape), str(value.dtype)] for key, value in model.state_dict().items()
    }
    model.load_state_dict(recipe_state(shapes, toy["seed"], half=True))
    return case, tensors, model, tensors["images"].float() * meta["image_scale"]


@pytest.mark.parametrize("name", cases_of(in_training=False))
def test_zero_shot(name, tokenizer):
    case, tensors, model, images = setting(name)
    count, targets = len(images), torch.tensor(case["targets"])
    metric = METRICS.get(case["dataset"], "acc1")
    with torch.inference_mode():
        prompts = class_prompts(case["labels"], case["templates"], name)
        classifier = text_classifier(model.embed_text, tokenizer, prompts, ALONE, batch_size=5)
        scores = class_scores(model.embed_image(images), classifier)
        recorded_scores = {
            key.removeprefix(f"{name}/") for key in tensors if key.startswith(f"{name}/")
        }
        same(
            name,
            "scores",
            {f"{kind}_sim" for kind in classifier},
            {key for key in recorded_scores if "_sim" in key},
        )
        for kind, matrix in classifier.items():
            close(
                matrix,
                tensors[f"{name}/class_embedding.{kind}_text"],
                f"zeroshot {name} classifier",
                1e-5,
            )
            close(
                scores[kind], tensors[f"{name}/{kind}_sim"], f"zeroshot {name} similarities", 1e-5
            )
        batches = ({"image": part} for part in images.split(BATCH))
        best = best_classes(model.embed_image, classifier, batches, range(count), count, ALONE)
        parts = zip(images.split(BATCH), targets.split(BATCH), strict=True)
        batches = ({"image": image, "target": target} for image, target in parts)
        own = classify(
            model.embed_image, classifier, batches, range(count), count, ALONE, metric
        ).scores
    same(name, "predictions", best[:, 0, 0].tolist(), case["predictions_z"])
    found = topk_accuracy(best, targets, score_names(classifier))
    assert case["metrics"]
    for key, value in case["metrics"].items():  # acc1_z, or of other metrics than top-1 plain z
        compare(name, "metrics", own[f"{metric}_{key.removeprefix('acc1_')}"], value, 1e-6)
        if key.startswith("acc1"):
            compare(name, "metrics", found[key], value, 1e-6)


@pytest.mark.parametrize("name", cases_of(in_training=True))
def test_zero_shot_in_training(name, tokenizer):
    case, _, model, images = setting(name)
    with torch.inference_mode():
        prompts = class_prompts(case["labels"], case["templates"], name)
        classifier = text_classifier(model.embed_text, tokenizer, prompts, ALONE)
        batches = ({"image": part} for part in images.split(BATCH))
        targets = torch.tensor(case["targets"])
        found = zero_shot_accuracy(
            model.embed_image, classifier, batches, range(len(images)), targets, ALONE
        )
    same(name, "names of the metrics", set(found), set(case["metrics"]))
    for key, value in case["metrics"].items():
        compare(name, "metrics", found[key], value, 1e-6)  # float32 means of batches there


def test_metrics():
    expected, tensors = golden("clip_rocket", "metrics/metrics")
    best, targets = tensors["outputs"].topk(5).indices, tensors["targets"]
    binary, binary_targets = tensors["outputs_binary"], tensors["targets_binary"]
    found = measure("acc1", best, targets)
    ours = {
        "top1": found["acc1"],
        "top5": found["acc5"],
        "kinetics_mean_top1_top5": found["acc1_acc5"],
        "mean_per_class": mean_per_class(best[:, 0], targets),
        "roc_auc": roc_auc(binary[:, 1] - binary[:, 0], binary_targets),
    }
    assert ours.keys() == expected.keys()
    for name, theirs in expected.items():
        compare("clip_rocket metrics", name, ours[name], theirs, 1e-6)
    through = measure("roc_auc", binary, binary_targets)
    compare("clip_rocket metrics", "roc_auc", through["roc_auc"], expected["roc_auc"], 1e-6)
