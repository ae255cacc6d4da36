"""What the options say about images and texts is what each script's data are made with: of training,
and of evaluation, whose images are never cropped, flipped or augmented; and what chooses the best
checkpoint."""

import contextlib
import json
from dataclasses import replace
from functools import partial
from itertools import chain

import pytest

import Classification
import Grounding
import main
import NLVR
import Pretrain
import Recognition
import Retrieval
import VE
import VQA
from base.distributed import ALONE
from dataset.images.albef import TestTransform, TrainTransform
from dataset.images.randaugment import RandAugment
from dataset.images.vit import ViTEvalView, ViTTrainView
from dataset.loading.filtered import Filtered
from dataset.tasks.dual_inputs import text_tokenizer
from dataset.text.sentencepiece import PieceTokenizer
from dataset.text.wordpiece import Tokenizer
from models.fusion.dvae import ImageTokenizer
from runtime.config.cli import parse
from tests.helpers import classification_runs, downstream, main_runs, pretraining, recognition_runs

FINE_TUNING = {
    "Retrieval": Retrieval,
    "VQA": VQA,
    "VE": VE,
    "NLVR": NLVR,
    "NLVR_TA": NLVR,
    "Grounding": Grounding,
}
OPTIONS = ["--image_res", "48", "--crop_scale", "0.3", "0.4", "--flip", "false", "--exif", "true"]
OPTIONS += ["--augment_level", "3", "--compat", "original", "--max_words", "3"]
MOST_TOKENS = {"VQA": 4, "NLVR_TA": 4}  # of training; others keep what the text encoder holds
POSITIONS = {"Retrieval": 128, "Grounding": 128}  # of configs/bert_debug.json
METRIC = {"Retrieval": "r_mean", "VQA": "overall", "NLVR_TA": None}  # others: accuracy


def fine_tuning(task: str, data, out, *more) -> list[str]:
    given = [*OPTIONS, *more]
    if task in ("VQA", "NLVR_TA", "Retrieval"):
        given += ["--max_tokens", "4"]
    if task == "Retrieval":
        files = {name: f"{data}/retrieval_{name}.json" for name in ("train", "val", "test")}
        files = [word for name, file in files.items() for word in (f"--{name}_file", file)]
        files += ["--config", "configs/Retrieval/debug.yaml", "--image_root", str(data)]
        files += [
            "--text_encoder",
            f"{data}/tokenizer",
            "--output_dir",
            str(out),
            "--device",
            "cpu",
        ]
        return [*files, *given]
    return downstream.flags(task, data, out, *given)


def made(task: str, config, monkeypatch) -> tuple:
    """`(sources, collate, metric of the best checkpoint)` of the training that the script begins."""
    script = FINE_TUNING[task]
    metrics, found = [], []

    class Run(script.Run):
        def __init__(self, config, world, metric):
            super().__init__(config, world, metric)
            metrics.append(metric)

    def noted(sources, collate, *_):
        found.append((sources, collate, *metrics))
        raise EOFError  # far enough

    monkeypatch.setattr(script, "Run", Run)
    monkeypatch.setattr(script, "train_loader", noted)
    with contextlib.suppress(EOFError):
        script.main(config)
    return found[0]


def check_augmentation(found: RandAugment, count: int, level: float, compat: str) -> None:
    expected = RandAugment(count, level, compat)
    assert vars(found) == vars(expected)


@pytest.mark.parametrize("task", FINE_TUNING)
def test_training_of_a_task(task, digitscenes, tmp_path, monkeypatch):
    config = parse(FINE_TUNING[task].Config, fine_tuning(task, digitscenes, tmp_path))
    sources, collate, metric = made(task, config, monkeypatch)
    assert metric == METRIC.get(task, "accuracy")
    for source in sources:
        view = source.build.transform
        assert type(view) is TrainTransform
        assert (view.resolution, view.scale, view.flip) == (48, (0.3, 0.4), False)
        check_augmentation(view.augment, 2, 3, "original")
        assert source.build.max_words == 3
    assert collate.max_tokens == MOST_TOKENS.get(task, POSITIONS.get(task))


@pytest.mark.parametrize("task", ["Retrieval", "VQA", "VE", "NLVR", "Grounding"])
def test_evaluation_of_a_task(task, digitscenes, tmp_path):
    words = fine_tuning(task, digitscenes, tmp_path)
    words += ["--max_words_test", "5"] if task == "VQA" else []
    config = parse(FINE_TUNING[task].Config, words)
    read = Grounding.test_data if task == "Grounding" else FINE_TUNING[task].evaluation_data
    found = read(config)
    if task == "VQA":
        found = found[0]  # the second are answers
    elif task == "Grounding":
        found = {"test": found}
    for split, data in found.items():
        assert type(data.transform) is TestTransform and data.transform.resolution == 48
        if task in ("VE", "NLVR"):
            assert data.max_words == 3
            texts = [data.load(number)["text"] for number in range(len(data))]
            written = [record["sentence"] for record in data.records]
        else:
            name = {"Retrieval": "captions", "VQA": "questions", "Grounding": "texts"}[task]
            texts, written = getattr(data, name), data.written
        name = {"Grounding": "refcoco+"}.get(task, task.lower())
        entries = json.loads((digitscenes / f"{name}_{split}.json").read_text())
        field = {"Retrieval": "caption", "VQA": "question", "Grounding": "text"}
        listed = [entry[field.get(task, "sentence")] for entry in entries]
        if task == "Retrieval":  # several of an image
            listed = list(chain.from_iterable(listed))
        assert written == listed  # of this split
        assert len(texts) == len(written)
        kept, before = (max(len(text.split()) for text in each) for each in (texts, written))
        assert kept == (5 if task == "VQA" else 3) < before


@pytest.mark.parametrize("fixed", [False, True])
def test_pre_training(fixed, digitscenes, image_tokenizer, tmp_path):
    changes = {
        "image_res": 48,
        "patch_size": 16,
        "crop_scale": [0.3, 0.4],
        "flip": fixed,
        "exif": "true",
    }
    changes |= {"augment_level": 0 if fixed else 3, "compat": "none" if fixed else "original"}
    changes |= {"max_words": 3, "max_tokens": 4, "mlm_probability": 0.5, "mask_ratio": 0.5}
    changes |= {"fixed_geometry": fixed, "shards": digitscenes / "wds/train", "weights": [3, 1]}
    words = pretraining.arguments(digitscenes, image_tokenizer, tmp_path / "out", **changes)
    config = parse(Pretrain.Config, words)
    codes = Pretrain.load_image_tokenizer(config, ALONE)
    assert isinstance(codes, ImageTokenizer)
    vocabulary = Tokenizer(config.text_encoder)
    stream = Pretrain.training_data(config, vocabulary, codes, ALONE, None).stream
    assert stream.exif and stream.shares == [0.75, 0.25]
    for source in stream.sources:
        view, mask = source.build.transform, source.build.patch_mask
        assert (view.resolution, view.token_resolution) == (48, 48 // 16 * 4)
        assert (view.scale, view.flip) == (None if fixed else (0.3, 0.4), False)
        assert (view.shared_view, view.fixed_geometry) == (fixed, fixed)
        check_augmentation(view.augment, *((0, 0, "none") if fixed else (2, 3, "original")))
        assert source.build.max_words == 3 and (mask.side, mask.total) == (3, 4)
    assert (stream.collate.max_tokens, stream.collate.mlm_probability) == (4, 0.5)


@pytest.mark.parametrize("compat", ["none", "original"])
def test_classification(compat, digitscenes, tmp_path):
    changes = {"image_size": 48, "crop_area": [0.3, 0.4], "flip": "false", "exif": "true"}
    changes |= {"resize_small": 56, "compat": compat, "samples": [7, 9]}
    changes["train_data"] = [digitscenes / "coyo_labeled/train.jsonl"] * 2
    words = classification_runs.flags(digitscenes, tmp_path, **changes)
    config = parse(Classification.Config, words)
    names = config.classes.read_text().split("\n")
    config.network = replace(config.network, num_classes=len(names))
    stream = Classification.training_data(config, names, ALONE, None).stream
    assert stream.exif
    for source in stream.sources:
        view = source.build.view
        assert type(view) is ViTTrainView and view.exact is (compat == "original")
        assert (view.side, view.options.crop_area, view.options.flip) == (48, (0.3, 0.4), False)
    view = Classification.evaluation_data(config, names).build.view
    assert type(view) is ViTEvalView and view.exact is (compat == "original")
    assert (view.side, view.resize_small) == (48, 56)


def test_every_source_of_classification_has_its_own_number_of_samples(
    digitscenes, tmp_path, monkeypatch
):
    noted = []
    monkeypatch.setattr(Classification, "training_source", lambda *given: noted.append(given[-1]))
    monkeypatch.setattr(Classification, "Stream", lambda *_, **__: None)
    monkeypatch.setattr(Classification, "stream_loader", lambda *_: None)
    changes = {"samples": [7, 9], "train_data": ["a.tar", "b.tar"]}
    words = classification_runs.flags(digitscenes, tmp_path, **changes)
    Classification.training_data(parse(Classification.Config, words), [], ALONE, None)
    assert noted == [7, 9]


@pytest.mark.parametrize("original", [False, True])
def test_recognition(original, digitscenes, tmp_path):
    changes = {"image_size": 48, "crop": 0.6, "whole_image": not original, "max_text": 99}
    changes |= {"many_prompts": not original, "decouple_labels": original, "exif": "true"}
    changes |= {"compat": "original" if original else "none", "caption_weight": float(original)}
    words = recognition_runs.arguments(digitscenes, tmp_path, **changes)
    config = parse(Recognition.Config, words)
    tokenizer = PieceTokenizer(config.tokenizer)
    stream = Recognition.training_data(config, tokenizer, ALONE, None).stream
    assert stream.exif
    (source,) = stream.sources
    assert isinstance(source, Filtered) is not original
    view, text = source.build.view, source.build.sequences
    assert (view.side, view.crop, view.whole) == (48, 0.6, not original)
    assert source.build.captions is original and text.max_text == 99
    assert (text.many_prompts, text.original, text.decouple) == (not original, original, original)
    for split, data in Recognition.evaluation_data(config).items():
        assert data.source == str(digitscenes / f"nxtp/{split}.list")
        assert (data.view.side, data.view.crop, data.view.whole) == (48, 1.0, not original)


@pytest.mark.parametrize(
    ("model", "views"),
    [("CL2L_VITT8_CL2L", (3, 3)), ("SLIP_VITT8", (2, 0)), ("CLIP_VITT8", (0, 0))],
)
def test_dual_encoders(model, views, digitscenes, tmp_path):
    changes = {"model": model, "num_augs": 3, "exif": "true", "text_lengths": [9, 16]}
    changes |= {"image_size": 48, "strong_min_scale": 0.3, "compat": "original"}
    config = parse(main.Config, main_runs.arguments(digitscenes, tmp_path, **changes))
    network = config.network
    tokenizer = text_tokenizer(model, network.context_length, config.bpe_path, None)
    stream = main.training_data(config, tokenizer, ALONE, None).stream
    assert stream.exif and stream.collate.lengths == [9, 16]
    for source in stream.sources:
        images, texts = source.build.image_views, source.build.text_views
        assert (images.local_count, texts.local) == views
        assert texts.shorten and images.local[0].scale[0] == 0.3


def test_what_chooses_the_best_checkpoint(digitscenes, tmp_path, monkeypatch):
    noted = []

    def run(config, world, metric):
        noted.append(metric)
        raise EOFError  # far enough

    for script in (main, Classification, Recognition):
        monkeypatch.setattr(script, "Run", run)
    dual = parse(main.Config, main_runs.arguments(digitscenes, tmp_path))
    words = recognition_runs.arguments(digitscenes, tmp_path)
    labels = parse(Recognition.Config, words)
    words = classification_runs.flags(digitscenes, tmp_path)
    many = parse(Classification.Config, words)
    begun = [partial(main.main, dual), partial(main.main, replace(dual, val_folder=None))]
    begun += [partial(Classification.train, many, [], val, ALONE, None) for val in ([0], None)]
    one = replace(many, multi_label=False)
    begun.append(partial(Classification.train, one, [], [0], ALONE, None))
    for encoder in (None, "by meaning"):
        begun.append(partial(Recognition.train, labels, None, [0], encoder, None, ALONE, None))
    for each in begun:
        with pytest.raises(EOFError):
            each()
    assert noted == ["acc1_z", None, "mAP", None, "top1", "exact_f1", "f1"]


def begins_with(script, words: list[str], monkeypatch) -> float:
    """What a run is begun with as the FLOPs of an update, where a batch has as many as it has
    numbers."""
    noted = []

    def begin(run, title, model, loader, precision, decayed=None, flops=0.0):
        noted.append(flops)
        raise EOFError  # far enough

    def counted(model, example) -> int:
        return sum(each.numel() for each in example.values())

    monkeypatch.setattr(script, "training_flops", counted)
    monkeypatch.setattr(script.Run, "begin", begin)
    with pytest.raises(EOFError):
        script.main(parse(script.Config, words))
    return noted[0]


def test_an_update_has_the_operations_of_all_views_and_micro_batches(
    digitscenes, tmp_path, monkeypatch
):
    def clip(out: str, **changes) -> float:
        changes |= {"peak_tflops": 1, "val_folder": "none"}
        words = main_runs.arguments(digitscenes, tmp_path / out, **changes)
        return begins_with(main, words, monkeypatch)

    def albef(out: str, accumulate: int) -> float:
        changes = {"peak_tflops": 1, "method": "albef", "accumulate": accumulate}
        words = pretraining.arguments(digitscenes, "none", tmp_path / out, **changes)
        return begins_with(Pretrain, words, monkeypatch)

    views = [clip(f"{count} local", num_augs=count) for count in (1, 3)]
    assert clip("twice", num_augs=1, accumulate=2) == 2 * views[0] == views[1] > 0
    assert albef("two", 2) == 2 * albef("one", 1) > 0


def test_the_seed_is_that_of_the_run_and_the_same_on_every_rank(digitscenes, tmp_path, monkeypatch):
    """Initial weights, which DDP and FSDP2 take from each process."""
    noted = []

    def seeded(seed, rank):
        noted.append((seed, rank))
        raise EOFError  # far enough

    made = {
        main: main_runs.arguments(digitscenes, tmp_path),
        Pretrain: pretraining.arguments(digitscenes, "none", tmp_path),
        Classification: classification_runs.flags(digitscenes, tmp_path),
        Recognition: recognition_runs.arguments(digitscenes, tmp_path),
    }
    for script, words in made.items():
        monkeypatch.setattr(script, "seed_everything", seeded)
        with pytest.raises(EOFError):
            script.main(parse(script.Config, [*words, "--seed", "7"]))
    assert noted == [(7, 0)] * len(made)
