"""Annotation formats, cleaning, tokens, masks and augmentation against numbers of the original
code."""

import json
import random
import re

import numpy as np
import pytest
import torch
from PIL import Image

from base.pixels import OPENAI
from dataset.images.albef import PretrainTransform, TestTransform, TrainTransform, resize
from dataset.images.block_mask import BlockMask
from dataset.images.decode import decode_image
from dataset.images.randaugment import RandAugment
from dataset.loading.randomness import seeded
from dataset.sources.records import Records
from dataset.tasks.grounding import ReferringExpressions
from dataset.tasks.pretrain import PretrainPair
from dataset.tasks.retrieval import RetrievalPair, RetrievalSet, number_images
from dataset.tasks.ve_nlvr import ORIGINAL_NLVR2, SNLI_VE, Statements
from dataset.tasks.vqa import QuestionAnswers, QuestionSet, VqaCollate, read_answer_list
from dataset.text.wordpiece import Tokenizer, mask_tokens, pre_caption, pre_question
from models.layers.vit import Normalize
from tests.golden.report import compare, compare_levels, same
from tests.golden.simla_cases import tensors_under
from tests.helpers.golden import golden


def test_cleaning():
    meta, _ = golden("simla", "text_preprocess")
    for clean, cases in ((pre_caption, meta["pre_caption"]), (pre_question, meta["pre_question"])):
        for case in cases:
            same(
                "text_preprocess",
                clean.__name__,
                clean(case["text"], case["max_words"]),
                case["out"],
            )


@pytest.fixture
def tokenizer(tmp_path) -> Tokenizer:
    """The tokenizer of the recorded vocabulary."""
    meta, _ = golden("simla", "tokenizer")
    (tmp_path / "vocab.txt").write_text("\n".join(meta["vocab"]) + "\n", encoding="utf-8")
    return Tokenizer(tmp_path)


def test_tokenizer(tokenizer):
    meta, _ = golden("simla", "tokenizer")
    for text, tokens in zip(meta["texts"], meta["tokens"], strict=True):
        found = [tokenizer.backend.id_to_token(i) for i in tokenizer.encode(text)]
        same("tokenizer", "tokens", found, ["[CLS]", *tokens])
    for mode in meta["modes"].values():
        arguments = mode["arguments"]
        max_length = arguments["max_length"] if arguments.get("truncation") else None
        lengths = (max_length,) if arguments["padding"] == "max_length" else None
        ids, mask = tokenizer(meta["texts"], max_length, lengths)
        same("tokenizer", "token ids", ids.tolist(), mode["input_ids"])
        same("tokenizer", "masks", mask.int().tolist(), mode["attention_mask"])


def test_token_masking():
    meta, tensors = golden("simla", "mlm_mask")
    special = meta["special_ids"]
    for run in meta["runs"]:
        generator = torch.Generator().manual_seed(run["torch_seed"])
        ids, labels = mask_tokens(
            tensors["in.input_ids"],
            run["probability"],
            special["mask"],
            meta["vocab_size"],
            (special["pad"], special["cls"]),
            generator,
        )
        same("mlm_mask", "masked ids", ids, tensors[f"out.ids_{run['suffix']}"])
        same("mlm_mask", "labels", labels, tensors[f"out.labels_{run['suffix']}"])


def test_block_masks():
    meta, tensors = golden("simla", "mask_generator")
    found = [re.fullmatch(r"out\.spec(\d+)_seed(\d+)_first", key) for key in sorted(tensors)]
    runs = [tuple(int(number) for number in match.groups()) for match in found if match]
    assert {number for number, _ in runs} == set(range(len(meta["specs"])))
    for number, seed in runs:
        spec = meta["specs"][number]["spec"]
        side = spec["input_size"]
        draw = BlockMask(
            side, ratio=spec["num_masking_patches"] / side**2, min_block=spec["min_num_patches"]
        )
        random.seed(seed)
        for turn in ("first", "second"):
            same(
                "mask_generator",
                "masks",
                draw(),
                tensors[f"out.spec{number}_seed{seed}_{turn}"].bool(),
            )


def test_randaugment_operations():
    meta, tensors = golden("simla", "randaugment")
    augment = RandAugment(compat="original")
    images = [key.removeprefix("in.") for key in tensors if key.startswith("in.")]
    compared = set()
    for call in meta["op_calls"]:
        strength = call["arguments"][0] if call["arguments"] else 0.0
        for name in images:
            key = f"out.{call['op']}_{call['variant']}_{name}"
            if key in tensors:
                image = tensors[f"in.{name}"].permute(2, 0, 1)
                ours = augment.apply(image, [(call["op"], strength)]).permute(1, 2, 0)
                same("randaugment", call["op"], ours, tensors[key])
                compared.add(key)
    assert compared == {key for key in tensors if key.startswith("out.") and "pipeline" not in key}


def test_randaugment_mended_autocontrast():
    """What AutoContrast gives where the original's unsigned bytes wrap around."""
    _, tensors = golden("simla", "randaugment")
    references = tensors_under("reference.AutoContrast_0_", tensors)
    assert references
    for name, theirs in references.items():
        image = tensors[f"in.{name}"].permute(2, 0, 1)
        ours = RandAugment().apply(image, [("AutoContrast", 0.0)]).permute(1, 2, 0)
        same("randaugment", "AutoContrast, fixed", ours, theirs)


def test_randaugment_draws():
    meta, tensors = golden("simla", "randaugment")
    pipeline = meta["pipeline"]
    augment = RandAugment(pipeline["n"], pipeline["m"], compat="original")
    same("randaugment", "operations", list(augment.NAMES), pipeline["ops_in_order"])
    for seed in pipeline["numpy_seeds"]:
        operations = augment.draw(np.random.RandomState(seed))
        ours = augment.apply(tensors["in.smooth"].permute(2, 0, 1), operations).permute(1, 2, 0)
        same("randaugment", "two operations of a seed", ours, tensors[f"out.pipeline_seed{seed}"])


@pytest.fixture
def formats(tmp_path):
    """The golden annotation files and images in a folder; returns `(meta, tensors, folder)`."""
    meta, tensors = golden("simla", "datasets")
    for name, content in meta["files"].items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content["json"]))
    for name, image in tensors_under("in.image", tensors).items():
        Image.fromarray(image.numpy()).save(tmp_path / f"im{name}.png")
        Image.fromarray(image.numpy()).save(tmp_path / f"im{name}.jpg")
        (tmp_path / "sub").mkdir(exist_ok=True)
        Image.fromarray(image.numpy()).save(tmp_path / "sub" / f"im{name}.png")
    return meta, tensors, tmp_path


def test_evaluation_images(formats):
    meta, tensors, folder = formats
    recorded = tensors_under("out.test_transform_image", tensors)
    assert recorded
    for name, theirs in recorded.items():
        image, side = decode_image(folder / f"im{name}.png"), meta["image_res"]
        if (
            image.shape[-2] > image.shape[-1]
        ):  # recorded with Pillow 13, which shrinks tall images along their height first
            image = resize(image, side, image.shape[-1])
        ours = Normalize(*OPENAI)(TestTransform(side)(image))
        level = torch.tensor(OPENAI[1]).view(3, 1, 1).double().reciprocal() / 255
        compare_levels("datasets", "evaluation image", ours, theirs, level)


def test_retrieval_formats(formats):
    meta, _, folder = formats
    side = meta["image_res"]
    records = Records(folder / "retrieval_train.json", ("image", "caption", "image_id"))
    build = RetrievalPair(
        TrainTransform(side), folder, number_images(r["image_id"] for r in records)
    )
    samples = [build({**record, "index": index}) for index, record in enumerate(records)]
    returned = [{"caption": sample["caption"], "idx": sample["image_id"]} for sample in samples]
    same("datasets", "retrieval, training", returned, meta["files"]["retrieval_train"]["returns"])
    assert all(sample["image"].shape == (3, side, side) for sample in samples)

    expected = meta["files"]["retrieval_eval"]
    pairs = RetrievalSet(Records(folder / "retrieval_eval.json"), folder, TestTransform(side))
    same("datasets", "retrieval, captions", pairs.captions, expected["text"])
    same("datasets", "retrieval, images", pairs.images, expected["image"])
    for name in ("txt2img", "img2txt"):
        found = {str(number): owner for number, owner in enumerate(getattr(pairs, name))}
        same("datasets", f"retrieval, {name}", found, expected[name])
    assert pairs.load(1).shape == (3, side, side)


def test_vqa_formats(formats, tokenizer):
    meta, _, folder = formats
    expected, view = meta["files"]["vqa_train"], TestTransform(meta["image_res"])
    roots = {"vqa": folder, "vg": folder}
    build = QuestionAnswers(view, roots)
    samples = [
        build(record)
        for record in Records(folder / "vqa_train.json", ("image", "question", "answer"))
    ]
    for sample, theirs in zip(samples, expected["returns"], strict=True):
        same("datasets", "VQA, question", sample["question"], theirs["question"])
        same(
            "datasets",
            "VQA, answers",
            [f"{answer}[SEP]" for answer in sample["answers"]],
            theirs["answers"],
        )
        compare("datasets", "VQA, weights", sample["weights"], theirs["weights"], 1e-6)
    batch, theirs = VqaCollate(tokenizer)(samples), expected["collated"]
    real = batch["answer_weight"] > 0
    compare(
        "datasets", "VQA, weights of a batch", batch["answer_weight"][real], theirs["weights"], 1e-6
    )
    counts = batch["answer_question"][real].bincount().tolist()
    same("datasets", "VQA, answers per question", counts, theirs["answers_per_question"])
    rows = zip(batch["answer_ids"][real], batch["answer_mask"][real], strict=True)
    ids = [row[mask].tolist() for row, mask in rows]
    same(
        "datasets",
        "VQA, answer ids",
        ids,
        [tokenizer.encode(answer) for answer in theirs["answers"]],
    )
    rows = zip(batch["text_ids"], batch["text_mask"], strict=True)
    ids = [row[mask].tolist() for row, mask in rows]
    same(
        "datasets",
        "VQA, question ids",
        ids,
        [tokenizer.encode(question) for question in theirs["questions"]],
    )

    expected = meta["files"]["vqa_test"]
    questions = QuestionSet(
        Records(folder / "vqa_test.json", ("image", "question", "question_id")), roots, view
    )
    given = expected["returns"]
    for index, theirs in enumerate(given if isinstance(given, list) else [given]):
        same(
            "datasets", "VQA, question to answer", questions.load(index)["text"], theirs["question"]
        )
        same("datasets", "VQA, its id", questions.ids[index], theirs["question_id"])
    (folder / "answers.json").write_text(json.dumps(expected["answer_list"]))
    same(
        "datasets",
        "VQA, list of answers",
        read_answer_list(folder / "answers.json"),
        expected["answer_list"],
    )


def test_nlvr_and_entailment_formats(formats):
    meta, _, folder = formats
    for name, form in (("nlvr", ORIGINAL_NLVR2), ("visual_entailment", SNLI_VE)):
        statements = Statements(
            folder / f"{name}.json", form, folder, TestTransform(meta["image_res"])
        )
        samples = [statements.load(number) for number in range(len(statements))]
        found = [{"sentence": sample["text"], "label": sample["label"]} for sample in samples]
        same("datasets", name, found, meta["files"][name]["returns"])


def test_grounding_formats(formats):
    meta, _, folder = formats
    expected, view = meta["files"]["grounding"], TestTransform(meta["image_res"])
    records = Records(folder / "grounding.json", ("image", "text"))
    numbers = number_images(record["image"].rsplit("/", 1)[-1] for record in records)
    build = RetrievalPair(view, folder, numbers, field="text")
    samples = [build({**record, "index": index}) for index, record in enumerate(records)]
    found = [{"caption": sample["caption"], "idx": sample["image_id"]} for sample in samples]
    same("datasets", "grounding, training", found, expected["train_returns"])

    ids = [record["ref_id"] for record in records]
    refs = [{"ref_id": i, "ann_id": i, "image_id": 1, "split": "val"} for i in ids]
    boxes = [{"id": i, "bbox": [i, 0, 1, 1]} for i in ids]
    instances = {"annotations": boxes, "images": [{"id": 1, "height": 9, "width": 9}]}
    data = ReferringExpressions(records, refs, instances, {"1": [[0, 0, 1, 1]]}, folder, view)
    found = [
        {"caption": text, "ref_id": int(target.box[0])}
        for text, target in zip(data.texts, data.targets, strict=True)
    ]
    same("datasets", "grounding, evaluation", found, expected["test_returns"])


def test_pretraining_format(formats):
    meta, _, folder = formats
    entries, expected = meta["files"]["pretrain"]["json"], meta["files"]["pretrain"]["returns"]
    for entry in entries:
        entry["image"] = entry["image"].split(" ")[0]  # one recorded name explains itself
    (folder / "pretrain.json").write_text(json.dumps(entries))
    side, token_side = expected["image_shape"][-1], expected["image_for_tokens_shape"][-1]
    patches = expected["mask_shape"][-1]
    draw = BlockMask(patches, ratio=expected["mask_sum"] / patches**2)
    build = PretrainPair(PretrainTransform(side, token_side), folder, draw)
    records = Records(folder / "pretrain.json")
    (one_caption,) = [
        number for number, entry in enumerate(entries) if isinstance(entry["caption"], str)
    ]
    sample = build(records[one_caption])
    same("datasets", "pre-training caption", sample["caption"], expected["caption"])
    same("datasets", "shape of the image", list(sample["image"].shape), expected["image_shape"])
    same(
        "datasets",
        "shape of the tokens' image",
        list(sample["token_image"].shape),
        expected["image_for_tokens_shape"],
    )
    low, high = expected["image_for_tokens_range"]
    mapped = (
        0.8 * sample["token_image"] / 255 + 0.1
    )  # the original's map, here applied by the image tokenizer
    assert mapped.min() >= low - 1e-6 and mapped.max() <= high + 1e-6
    same(
        "datasets",
        "shape of the mask",
        [int(len(sample["patch_mask"]) ** 0.5)] * 2,
        expected["mask_shape"],
    )
    assert (
        expected["mask_sum"] - 5 <= sample["patch_mask"].sum() <= expected["mask_sum"]
    )  # block by block, by chance
    (several,) = [
        number for number, entry in enumerate(entries) if isinstance(entry["caption"], list)
    ]
    seen = set()
    for seed in range(20):
        with seeded(seed):
            seen.add(build(records[several])["caption"])
    assert seen == {pre_caption(text, 30) for text in entries[several]["caption"]}
