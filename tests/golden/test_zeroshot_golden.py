"""Zero-shot classifiers, similarities and accuracies against recorded ones, for a tiny model and CLIP's tokenizer."""

import json

import pytest
import torch

from dataset.clip_text import ClipTokenizer
from evaluation.zeroshot import best_classes, class_prompts, class_scores, score_names, text_classifier, topk_accuracy
from models.dual import build_dual
from runtime.distributed import World
from tests.golden.clip_cases import close, config_of, recipe_state, toy_vit
from tests.golden_cases import golden, golden_file

CASES = ["cl2l.imagenet", "cl2l.rendered_sst2", "cl2l.fer2013", "cl2l.pets", "clip.imagenet", "clip.fer2013"]


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
    shapes = {key: [list(value.shape), str(value.dtype)] for key, value in model.state_dict().items()}
    model.load_state_dict(recipe_state(shapes, toy["seed"], half=True))
    images = tensors["images"].float() * meta["image_scale"]
    with torch.inference_mode():
        prompts = class_prompts(case["labels"], case["templates"], name)
        classifier = text_classifier(model.embed_text, tokenizer, prompts, torch.device("cpu"), batch_size=5)
        for kind, matrix in classifier.items():
            close(matrix, tensors[f"{name}/class_embedding.{kind}_text"], f"zeroshot {name} classifier", 1e-4)
        scores = class_scores(model.embed_image(images), classifier)
        for kind in classifier:
            close(scores[kind], tensors[f"{name}/{kind}_sim"], f"zeroshot {name} similarities", 1e-4)
        world = World(0, 1, 0, torch.device("cpu"))
        batches = ({"image": part} for part in images.split(8))
        best = best_classes(model.embed_image, classifier, batches, range(30), 30, world)
    assert best[:, 0, 0].tolist() == case["predictions_z"]
    found = topk_accuracy(best, torch.tensor(case["targets"]), score_names(classifier))
    for metric, value in case["metrics"].items():
        if metric.startswith("acc1"):
            assert found[metric] == pytest.approx(value), metric
