"""Text and image pipelines, schedule and parameter groups of dual-encoder training against recorded
numbers."""

import random

import pytest
import torch

from dataset.images.albef import resized_crop
from dataset.images.clip import (
    EvalView,
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
from tests.golden.report import compare, compare_levels, same
from tests.helpers.golden import golden, golden_json, recorded

IMAGENET_STD = (0.229, 0.224, 0.225)


def load(*parts: str) -> dict:
    return golden_json("clip_rocket", *parts)


@pytest.fixture(scope="module")
def tokenizer() -> ClipTokenizer:
    pytest.importorskip("open_clip", reason="its package brings CLIP's merges")
    return ClipTokenizer()


def test_tokenizer(tokenizer):
    strings = load("tokenizer", "strings.json")
    found = [tokenizer.vocab_size, tokenizer.start_id, tokenizer.end_id, tokenizer.context_length]
    wanted = [strings[name] for name in ("vocab_size", "sot", "eot", "context_length")]
    same("clip tokenizer", "sizes and special ids", found, wanted)
    for case in strings["cases"]:
        same("clip tokenizer", "cleaned text", clean_text(case["text"]), case["cleaned"])
        same("clip tokenizer", "ids", tokenizer.encode(case["text"]), case["encode"])
        same(
            "clip tokenizer",
            "number of ids",
            len(tokenizer.encode(case["text"])),
            case["encode_len"],
        )
        same("clip tokenizer", "rows", tokenizer.row(case["text"]), case["rocket"])
        same("clip tokenizer", "text again", tokenizer.decode(case["encode"]), case["decode"])
        openai = case["rocket"] if case["openai_truncate"] == "same" else case["openai_truncate"]
        if isinstance(openai, list):  # OpenAI's cuts as we do
            same("clip tokenizer", "rows, OpenAI's", tokenizer.row(case["text"]), openai)
        too_long = len(case["encode"]) + 2 > strings["context_length"]
        same(
            "clip tokenizer",
            "longer than the context",
            too_long,
            case["openai_raises_without_truncate"],
        )
        assert case["slip"] == "same" or too_long  # where SLIP loses the end token and we keep it


def test_stop_words():
    listed = load("tokenizer", "stopwords_english_179.json")
    same("clip tokenizer", "stop words", sorted(STOP_WORDS), sorted(listed["words"]))
    same("clip tokenizer", "number of stop words", len(STOP_WORDS), listed["count"])


def test_training_views(tokenizer):
    for case in load("tokenizer", "train_views.json")["cases"]:
        for probability, key in ((1.0, "rows_p1"), (0.0, "rows_p0")):
            options = TextOptions(
                clean_before_augment=case["clean_before_augment"], remove_stopwords_prob=probability
            )
            views = TextViews(options, local=case["num_augs"], stop_words_always=True)(
                case["caption"]
            )
            same(
                "clip tokenizer",
                "rows of training views",
                [tokenizer.row(view) for view in views],
                case[key],
            )


def test_text_operations_have_the_recorded_frequencies():
    pytest.importorskip("textaugment")
    frequencies, draws = load("tokenizer", "text_augment_frequencies.json"), 300
    random.seed(0)
    for case in frequencies["cases"]:
        probabilities = {f"{name}_prob": value for name, value in case["probs"].items()}
        options = TextOptions(text_augment=True, **rename(probabilities))
        views = TextViews(
            options, local=1, synonyms=lambda word: frequencies["synonyms"].get(word, ())
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


def transform_cases() -> list[str]:
    checks = recorded("clip_rocket", "transforms", "transforms.json", within="checks")
    suffix = ".resized_crop_box"
    return [key.removesuffix(suffix) for key in map(str, checks) if key.endswith(suffix)]


@pytest.mark.parametrize("number", transform_cases())
def test_transforms(number):
    meta, tensors = golden("clip_rocket", "transforms/transforms")
    image = tensors[f"{number}.input_uint8_hwc"].permute(2, 0, 1)
    box = [
        meta["checks"][f"{number}.resized_crop_box"][name]
        for name in ("top", "left", "height", "width")
    ]

    def worst(made: torch.Tensor, name: str, step: int) -> tuple[float, float]:
        difference = (
            made.permute(1, 2, 0)[::step, ::step].float() - tensors[f"{number}.{name}"].float()
        ).abs()
        return difference.max().item(), difference.mean().item()

    for kind in ("bicubic", "bilinear"):
        assert (
            worst(
                resized_crop(image, box, 224, interpolation=kind), f"resized_crop_{kind}_every8", 8
            )[0]
            <= 1
        )
    levels = image.float()
    assert worst(solarize(levels), "solarize", 4)[0] == 0
    assert worst(grey_levels(levels).round().expand(3, -1, -1), "grayscale3", 4)[0] <= 1
    blurred = [key for key in tensors if key.startswith(f"{number}.blur_sigma_")]
    assert blurred
    for key in blurred:  # Pillow rounds after each of six passes
        most, mean = worst(
            gaussian_blur(levels, float(key.rpartition("_")[2])).round(), key.partition(".")[2], 4
        )
        assert most <= 6 and mean < 0.6
    statistics = pixel_statistics(torch.device("cpu"))
    val = normalize(EvalView(224)(image), statistics)
    level = torch.tensor(IMAGENET_STD).view(3, 1, 1).double().reciprocal() / 255
    compare_levels(
        "clip transforms",
        "evaluation view",
        val[:, ::8, ::8],
        tensors[f"{number}.val_every8"],
        level,
    )
    total, norm = meta["checks"][f"{number}.val_sum_norm"]
    compare("clip transforms", "norm of the evaluation view", val.double().norm(), norm, 5e-4)
    assert (
        abs(float(val.double().sum()) - total) < 0.002 * val.numel()
    )  # a tenth of a grey level in the mean


def test_addresses_in_yfcc():
    for case in golden("clip_rocket", "transforms/transforms")[0]["yfcc"]:
        found = yfcc_row((case["index"], "title", ""))["image"]
        same("clip transforms", "addresses in YFCC", found, f"{case['zip']}/{case['member']}")


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
        compare("clip schedule", "learning rates", rates, case["values"], 1e-12)


def test_parameter_groups():
    for name, case in load("optim", "param_groups.json")["cases"].items():
        flags = case["flags"]
        with torch.device("meta"):
            model = build_dual(config_of(flags[1], flags[2:]))
        names = names_by_decay(model, original=True)
        same(
            name,
            "parameters with and without decay",
            list(names),
            [case["decay"], case["no_decay"]],
        )
        given = case["adamw"]
        config = Optimizer(
            lr=given["lr"],
            betas=tuple(given["betas"]),
            eps=given["eps"],
            weight_decay=given["weight_decay"],
        )
        groups = parameter_groups(model, config, names[0])
        name_of = {id(parameter): name for name, parameter in model.named_parameters()}
        found = [[name_of[id(p)] for p in group["params"]] for group in groups]
        same(name, "groups of the optimizer", found, [case["decay"], case["no_decay"]])
        decays = [group["weight_decay"] for group in groups]
        same(name, "weight decay", decays, [case["decay_value"], case["no_decay_value"]])
        frozen = [key for key, parameter in model.named_parameters() if not parameter.requires_grad]
        same(name, "frozen parameters", frozen, case["frozen"])
