"""Text and image pipelines, schedule and parameter groups of dual-encoder training against recorded
numbers."""

import json
import random

import pytest
import torch

from dataset.images.clip import (
    EvalView,
    crop_resize,
    gaussian_blur,
    grey_levels,
    normalize,
    pixel_statistics,
    solarize,
)
from dataset.tasks.captions import yfcc_row
from dataset.text.augment import STOP_WORDS, TextOptions, TextViews
from dataset.text.bpe import ClipTokenizer, clean_text
from models.dual_encoder.base import names_by_decay
from models.dual_encoder.factory import build_dual
from runtime.optim.build import Optimizer, parameter_groups
from runtime.optim.schedule import Plan, Schedule
from tests.golden.clip_cases import config_of
from tests.helpers.golden import golden, golden_file


def load(*parts: str) -> dict:
    return json.loads(golden_file("clip_rocket", *parts).read_text())


@pytest.fixture(scope="module")
def tokenizer() -> ClipTokenizer:
    pytest.importorskip("open_clip", reason="its package brings CLIP's merges")
    return ClipTokenizer()


def test_tokenizer(tokenizer):
    recorded = load("tokenizer", "strings.json")
    assert tokenizer.vocab_size == recorded["vocab_size"]
    assert (tokenizer.start_id, tokenizer.end_id) == (recorded["sot"], recorded["eot"])
    for case in recorded["cases"]:
        assert clean_text(case["text"]) == case["cleaned"]
        assert tokenizer.encode(case["text"]) == case["encode"], case["text"]
        assert tokenizer.row(case["text"]) == case["rocket"], case["text"]
        assert tokenizer.decode(case["encode"]) == case["decode"]


def test_stop_words():
    recorded = load("tokenizer", "stopwords_english_179.json")
    words = (
        recorded
        if isinstance(recorded, list)
        else next(v for v in recorded.values() if isinstance(v, list))
    )
    assert sorted(STOP_WORDS) == sorted(words)


def test_training_views(tokenizer):
    for case in load("tokenizer", "train_views.json")["cases"]:
        for probability, key in ((1.0, "rows_p1"), (0.0, "rows_p0")):
            options = TextOptions(
                clean_before_augment=case["clean_before_augment"], remove_stopwords_prob=probability
            )
            views = TextViews(options, local=case["num_augs"], stop_words_always=True)(
                case["caption"]
            )
            assert [tokenizer.row(view) for view in views] == case[key], case["caption"]


def test_text_operations_have_the_recorded_frequencies():
    pytest.importorskip("textaugment")
    recorded, draws = load("tokenizer", "text_augment_frequencies.json"), 300
    random.seed(0)
    for case in recorded["cases"]:
        probabilities = {f"{name}_prob": value for name, value in case["probs"].items()}
        options = TextOptions(text_augment=True, **rename(probabilities))
        views = TextViews(
            options, local=1, synonyms=lambda word: recorded["synonyms"].get(word, ())
        )
        counts: dict[str, int] = {}
        for _ in range(draws):
            text = views([case["text"]])[1]
            counts[text] = counts.get(text, 0) + 1
        assert len(counts) <= case["outcomes"] + 5
        for text, count in case["top"]:
            share = count / case["draws"]
            tolerance = 5 * (share * (1 - share) / draws) ** 0.5 + 5 / draws
            assert abs(counts.get(text, 0) / draws - share) < tolerance, (
                case["probs"],
                case["text"],
                text,
            )


def rename(probabilities: dict[str, float]) -> dict[str, float]:
    known = TextOptions.__dataclass_fields__
    assert all(name in known for name in probabilities), probabilities
    return probabilities


@pytest.mark.parametrize("number", range(3))
def test_transforms(number):
    meta, tensors = golden("clip_rocket", "transforms/transforms")
    image = tensors[f"{number}.input_uint8_hwc"].permute(2, 0, 1)
    box = meta["checks"][f"{number}.resized_crop_box"].values()

    def worst(made: torch.Tensor, name: str, step: int) -> tuple[float, float]:
        difference = (
            made.permute(1, 2, 0)[::step, ::step].float() - tensors[f"{number}.{name}"].float()
        ).abs()
        return difference.max().item(), difference.mean().item()

    for kind in ("bicubic", "bilinear"):
        assert worst(crop_resize(image, *box, 224, kind), f"resized_crop_{kind}_every8", 8)[0] <= 1
    levels = image.float()
    assert worst(solarize(levels), "solarize", 4)[0] == 0
    assert worst(grey_levels(levels).round().expand(3, -1, -1), "grayscale3", 4)[0] <= 1
    for sigma in (0.1, 0.7, 2.0):  # Pillow rounds after each of six passes
        most, mean = worst(gaussian_blur(levels, sigma).round(), f"blur_sigma_{sigma}", 4)
        assert most <= 6 and mean < 0.6
    val = normalize(EvalView(224)(image), pixel_statistics(torch.device("cpu")))
    torch.testing.assert_close(
        val[:, ::8, ::8], tensors[f"{number}.val_every8"], rtol=0, atol=0.018
    )  # a grey level


def test_addresses_in_yfcc():
    for case in golden("clip_rocket", "transforms/transforms")[0]["yfcc"]:
        assert yfcc_row((case["index"], "title", ""))["image"] == f"{case['zip']}/{case['member']}"


def test_schedule():
    for case in load("schedule", "cosine.json")["cases"]:
        schedule = Schedule(
            "rocket",
            f"{case['epochs']} epochs",
            case["final"],
            case["start_warmup"],
            f"{case['warmup_epochs']} epochs",
        )
        plan = Plan.of(
            schedule, case["base"], loader_steps=case["iters_per_epoch"], accumulate=1, batch=8
        )
        rates = [plan.lr(step) for step in range(plan.total)]
        assert rates == pytest.approx(case["values"], rel=1e-12)


def test_parameter_groups():
    for case in load("optim", "param_groups.json")["cases"].values():
        flags = case["flags"]
        with torch.device("meta"):
            model = build_dual(config_of(flags[1], flags[2:]))
        names = names_by_decay(model, original=True)
        groups = parameter_groups(
            model, Optimizer(weight_decay=case["adamw"]["weight_decay"]), names[0]
        )
        name_of = {id(parameter): name for name, parameter in model.named_parameters()}
        found = [[name_of[id(p)] for p in group["params"]] for group in groups]
        assert found == [case["decay"], case["no_decay"]]
        assert [group["weight_decay"] for group in groups] == [case["adamw"]["weight_decay"], 0.0]
