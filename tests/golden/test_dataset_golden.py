"""Annotation formats, cleaning, tokens, masks and augmentation against numbers of the original code."""

import json
import random

import numpy as np
import pytest
import torch
from PIL import Image

from dataset.images import decode_image
from dataset.masking import BlockMask
from dataset.pretrain import PretrainPair
from dataset.randaugment import RandAugment
from dataset.randomness import seeded
from dataset.records import Records
from dataset.retrieval import RetrievalPair, RetrievalSet, number_images
from dataset.text import Tokenizer, mask_tokens, pre_caption, pre_question
from dataset.transforms import PretrainTransform, TestTransform, TrainTransform, resize
from tests.helpers.golden import golden


def test_cleaning():
    meta, _ = golden("simla", "text_preprocess")
    for clean, cases in ((pre_caption, meta["pre_caption"]), (pre_question, meta["pre_question"])):
        for case in cases:
            assert clean(case["text"], case["max_words"]) == case["out"], case["text"]


def test_tokenizer(tmp_path):
    meta, _ = golden("simla", "tokenizer")
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(meta["vocab"]) + "\n", encoding="utf-8")
    tokenizer = Tokenizer(tmp_path)
    for text, tokens in zip(meta["texts"], meta["tokens"], strict=True):
        ids = tokenizer.encode(text)
        assert [tokenizer.backend.id_to_token(i) for i in ids] == ["[CLS]", *tokens]
    for mode in meta["modes"].values():
        arguments = mode["arguments"]
        max_length = arguments["max_length"] if arguments.get("truncation") else None
        lengths = (max_length,) if arguments["padding"] == "max_length" else None
        ids, mask = tokenizer(meta["texts"], max_length, lengths)
        assert ids.tolist() == mode["input_ids"]
        assert mask.int().tolist() == mode["attention_mask"]


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
        assert torch.equal(ids, tensors[f"out.ids_{run['suffix']}"])
        assert torch.equal(labels, tensors[f"out.labels_{run['suffix']}"])


def test_block_masks():
    meta, tensors = golden("simla", "mask_generator")
    compared = 0
    for number, entry in enumerate(meta["specs"]):
        side, total = entry["spec"]["input_size"], entry["spec"]["num_masking_patches"]
        draw = BlockMask(side, ratio=total / side**2, min_block=entry["spec"]["min_num_patches"])
        for seed in (0, 1, 2, 42):
            random.seed(seed)
            for turn in ("first", "second"):
                assert torch.equal(draw(), tensors[f"out.spec{number}_seed{seed}_{turn}"].bool())
                compared += 1
    assert compared == 16


def test_randaugment_operations():
    meta, tensors = golden("simla", "randaugment")
    augment = RandAugment(compat="original")
    for call in meta["op_calls"]:
        for name in ("noise", "smooth"):
            image = tensors[f"in.{name}"].permute(2, 0, 1)
            strength = call["arguments"][0] if call["arguments"] else 0.0
            ours = augment.apply(image, [(call["op"], strength)]).permute(1, 2, 0)
            assert torch.equal(ours, tensors[f"out.{call['op']}_{call['variant']}_{name}"]), call
    image = tensors["in.high_minimum"].permute(2, 0, 1)
    white = augment.apply(image, [("AutoContrast", 0.0)]).permute(1, 2, 0)
    assert torch.equal(white, tensors["out.AutoContrast_0_high_minimum"])
    right = RandAugment().apply(image, [("AutoContrast", 0.0)]).permute(1, 2, 0)
    assert torch.equal(right, tensors["reference.AutoContrast_0_high_minimum"])


def test_randaugment_draws():
    meta, tensors = golden("simla", "randaugment")
    pipeline = meta["pipeline"]
    augment = RandAugment(pipeline["n"], pipeline["m"], compat="original")
    assert list(augment.NAMES) == pipeline["ops_in_order"]
    for seed in pipeline["numpy_seeds"]:
        operations = augment.draw(np.random.RandomState(seed))
        ours = augment.apply(tensors["in.smooth"].permute(2, 0, 1), operations).permute(1, 2, 0)
        assert torch.equal(ours, tensors[f"out.pipeline_seed{seed}"]), seed


@pytest.fixture
def formats(tmp_path, monkeypatch):
    """The golden annotation files and pictures in a folder; returns `(meta, tensors, folder)`."""
    meta, tensors = golden("simla", "datasets")
    monkeypatch.setenv("QUINTET_CACHE", str(tmp_path / "cache"))
    for name, content in meta["files"].items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content["json"]))
    for number in (0, 1):
        Image.fromarray(tensors[f"in.image{number}"].numpy()).save(tmp_path / f"im{number}.png")
    return meta, tensors, tmp_path


def test_evaluation_pictures(formats):
    meta, tensors, folder = formats
    for number in (0, 1):
        image, side = decode_image(folder / f"im{number}.png"), meta["image_res"]
        if number == 1:  # recorded with Pillow 13, which shrinks tall pictures along their height first
            image = resize(image, side, image.shape[-1])
        ours = TestTransform(side)(image)
        theirs = tensors[f"out.test_transform_image{number}"]
        assert (ours - theirs).abs().max() < meta["tolerance"]["test_transform_atol"]


def test_retrieval_formats(formats):
    meta, _, folder = formats
    records = Records(folder / "retrieval_train.json", ("image", "caption", "image_id"))
    build = RetrievalPair(TrainTransform(24), folder, number_images(r["image_id"] for r in records))
    samples = [build({**record, "index": index}) for index, record in enumerate(records)]
    returned = [{"caption": sample["caption"], "idx": sample["image_id"]} for sample in samples]
    assert returned == meta["files"]["retrieval_train"]["returns"]
    assert all(sample["image"].shape == (3, 24, 24) for sample in samples)

    expected = meta["files"]["retrieval_eval"]
    pairs = RetrievalSet(Records(folder / "retrieval_eval.json"), folder, TestTransform(24))
    assert pairs.captions == expected["text"] and pairs.images == expected["image"]
    assert dict(enumerate(pairs.txt2img)) == {int(k): v for k, v in expected["txt2img"].items()}
    assert dict(enumerate(pairs.img2txt)) == {int(k): v for k, v in expected["img2txt"].items()}
    assert pairs.load(1).shape == (3, 24, 24)


def test_pretraining_format(formats):
    meta, _, folder = formats
    entry = meta["files"]["pretrain"]["json"]
    entry[0]["image"] = "im0.png"  # the recorded text explains itself here
    (folder / "pretrain.json").write_text(json.dumps(entry))
    expected = meta["files"]["pretrain"]["returns"]
    build = PretrainPair(PretrainTransform(256, 128), folder, BlockMask(16))
    records = Records(folder / "pretrain.json")
    sample = build(records[1])
    assert sample["caption"] == expected["caption"]
    assert list(sample["image"].shape) == expected["image_shape"]
    assert list(sample["token_image"].shape) == expected["image_for_tokens_shape"]
    low, high = expected["image_for_tokens_range"]
    mapped = 0.8 * sample["token_image"] + 0.1  # the original's map, here applied by the image tokenizer
    assert mapped.min() >= low - 1e-6 and mapped.max() <= high + 1e-6
    assert expected["mask_sum"] - 5 <= sample["patch_mask"].sum() <= expected["mask_sum"]
    seen = set()
    for seed in range(20):
        with seeded(seed):
            seen.add(build(records[0])["caption"])
    assert seen == {"a dog", "a cat"}
