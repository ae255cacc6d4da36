"""Annotations of VQA, SNLI-VE, NLVR2 and RefCOCO+: what becomes of them, and what is refused."""

import json

import pytest
import torch

from base.errors import BadSample, UserError
from dataset.images.albef import TestTransform
from dataset.tasks.grounding import ReferringExpressions
from dataset.tasks.ve_nlvr import NLVR2, ORIGINAL_NLVR2, SNLI_VE, Statements
from dataset.tasks.vqa import (
    QuestionAnswers,
    QuestionSet,
    VqaCollate,
    encode_answers,
    read_answer_list,
    read_official_answers,
    unreachable,
)
from dataset.text.wordpiece import TextCollate, Tokenizer


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two images, a vocabulary, and a place for annotations."""
    from PIL import Image

    monkeypatch.setenv("QUINTET_CACHE", str(tmp_path / "cache"))
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (20, 12), (200, 30, 60)).save(tmp_path / name)
    words = (
        "[PAD] [UNK] [CLS] [SEP] [MASK] what colour is it red blue on grass yes no ##ish".split()
    )
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    return tmp_path


def write(folder, entries, name="entries.json"):
    (folder / name).write_text(json.dumps(entries))
    return folder / name


def roots(folder) -> dict:
    return {"vqa": folder, "vg": folder}


def test_answers_are_weighted_by_how_many_gave_them(folder):
    build = QuestionAnswers(TestTransform(16), roots(folder))
    entry = {
        "image": "a.jpg",
        "question": "What colour, is it?",
        "answer": ["red"] * 7 + ["blue"] * 2 + ["no"],
    }
    sample = build(entry | {"dataset": "vqa"})
    assert sample["question"] == "what colour is it" and sample["answers"] == ["red", "blue", "no"]
    assert sample["weights"] == [0.7, 0.2, 0.1]
    genome = build(entry | {"dataset": "vg", "answer": "on grass"})
    assert (genome["answers"], genome["weights"]) == (["on grass"], [0.5])
    with pytest.raises(BadSample, match="empty answer"):
        build(entry | {"answer": ["red", " "]})
    with pytest.raises(BadSample, match="'gqa'"):
        build(entry | {"dataset": "gqa"})


def test_vqa_batch(folder):
    tokenizer, build = (
        Tokenizer(folder / "vocab.txt"),
        QuestionAnswers(TestTransform(16), roots(folder)),
    )
    samples = [
        build(
            {"image": "a.jpg", "question": "what colour", "answer": ["red", "blue", "red", "no"]}
        ),
        build({"image": "b.jpg", "question": "is it red", "answer": "on grass", "dataset": "vg"}),
    ]
    batch = VqaCollate(tokenizer, multiple=8)(samples)
    assert batch["image"].shape == (2, 3, 16, 16) and batch["answer_ids"].shape == (8, 4)
    assert batch["answer_question"].tolist() == [0, 0, 0, 1, 0, 0, 0, 0]
    assert batch["answer_weight"].tolist() == [0.5, 0.25, 0.25, 0.5, 0, 0, 0, 0]
    assert batch["answer_ids"][3].tolist() == [2, 11, 12, 3] and batch["answer_ids"][
        0
    ].tolist() == [2, 9, 3, 0]
    assert batch["answer_mask"].sum(1).tolist()[:4] == [3, 3, 3, 4]


def test_an_answer_ends_with_the_separator_however_written(folder):
    tokenizer = Tokenizer(folder / "vocab.txt")
    ids, mask = encode_answers(["red", "on grass"], tokenizer)
    assert ids[0][mask[0]].tolist() == tokenizer.encode("red[SEP]") and ids[1][
        mask[1]
    ].tolist() == [2, 11, 12, 3]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (["a", "a"], "listed twice"),
        (["a", ""], "not empty"),
        ([], "expected"),
        ({"a": 1}, "expected"),
        ([1], "expected"),
    ],
)
def test_answer_list_that_cannot_be_used(folder, content, words):
    with pytest.raises(UserError, match=words):
        read_answer_list(write(folder, content))


def questions(**changes) -> list[dict]:
    entry = {
        "image": "a.jpg",
        "question": "what colour",
        "question_id": 1,
        "answer": ["red"] * 6 + ["blue"] * 4,
    }
    return [entry, entry | {"question_id": 2} | changes]


def test_question_set(folder):
    data = QuestionSet(questions(question_id="7"), roots(folder), TestTransform(16))
    assert (
        data.ids == [1, 7]
        and data.truth[7]["answers"] == ["red"] * 6 + ["blue"] * 4
        and len(data) == 2
    )
    assert data.load(1)["text"] == "what colour" and data.load(1)["image"].shape == (3, 16, 16)
    assert unreachable(data, ["blue"]) == ["red"] and unreachable(data, ["red"]) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"question_id": 1}, "question_id 1 in entry 1 and in entry 0"),
        ({"question_id": "x"}, "no number"),
        ({"answer": []}, "no answers to"),
    ],
)
def test_question_set_that_cannot_be_used(folder, change, words):
    with pytest.raises(UserError, match=words):
        QuestionSet(questions(**change), roots(folder), TestTransform(16))


def test_official_answers(folder):
    entry = {
        "question_id": 1,
        "answers": [{"answer": "red"}, {"answer": "blue"}],
        "answer_type": "other",
        "image_id": 3,
    }
    found = read_official_answers(write(folder, {"annotations": [entry]}))
    assert found == {1: {"answers": ["red", "blue"], "answer_type": "other"}}
    with pytest.raises(UserError, match="VQA's annotation format"):
        read_official_answers(write(folder, [entry]))


def test_entailment(folder):
    entry = {"image": "a", "sentence": "It is RED-ish!", "label": "neutral"}
    data = Statements(
        write(folder, [entry, entry | {"label": "entailment"}]), SNLI_VE, folder, TestTransform(16)
    )
    assert data.labels.tolist() == [1, 2]
    sample = data.load(0)
    assert (
        sample["text"] == "it is red ish"
        and sample["image"].shape == (3, 16, 16)
        and sample["label"] == 1
    )
    with pytest.raises(BadSample, match="empty"):
        data(entry | {"sentence": "?!"})


@pytest.mark.parametrize("label", ["contradicts", "", 3, True])
def test_label_outside_the_set(folder, label):
    entry = {"image": "a", "sentence": "red", "label": label}
    with pytest.raises(
        UserError, match="entries.json, entry 0 .*none of contradiction, neutral, entailment"
    ):
        Statements(write(folder, [entry]), SNLI_VE, folder, TestTransform(16))


@pytest.mark.parametrize(
    ("label", "ours", "theirs"),
    [("True", 1, 1), ("False", 0, 0), (True, 1, 0), ("true", 1, 0), (1, 1, 0), (False, 0, 0)],
)
def test_truth_in_any_spelling_and_as_the_originals_read_it(folder, label, ours, theirs):
    file = write(folder, [{"images": ["a.jpg", "b.jpg"], "sentence": "red", "label": label}])
    found = [
        Statements(file, form, folder, TestTransform(16)).labels.item()
        for form in (NLVR2, ORIGINAL_NLVR2)
    ]
    assert found == [ours, theirs]


def test_pairs(folder):
    entry = {"images": ["a.jpg", "b.jpg"], "sentence": "red", "label": "True"}
    data = Statements(write(folder, [entry] * 3), NLVR2, folder, TestTransform(16))
    batch = TextCollate(Tokenizer(folder / "vocab.txt"))([data.load(i) for i in range(3)])
    assert batch["image"].shape == (3, 2, 3, 16, 16) and batch["label"].tolist() == [1, 1, 1]
    assert batch["text_ids"].shape == batch["text_mask"].shape == (3, 8)
    with pytest.raises(UserError, match="entry 0 .*images lists 1, but a pair has two"):
        Statements(
            write(folder, [entry | {"images": ["a.jpg"]}], "one.json"),
            NLVR2,
            folder,
            TestTransform(16),
        )


REFS = [
    {"ref_id": 5, "ann_id": 50, "image_id": 9, "split": "testA"},
    {"ref_id": 6, "ann_id": 51, "image_id": 9, "split": "val"},
]
INSTANCES = {
    "images": [{"id": 9, "height": 12, "width": 20}],
    "annotations": [{"id": 50, "bbox": [1, 2, 3, 4]}],
}
DETECTIONS = {"9": [[1, 2, 3, 4], [0, 0, 5, 5]]}


def expressions(
    folder, detections=DETECTIONS, instances=INSTANCES, **changes
) -> ReferringExpressions:
    record = {"image": "a.jpg", "text": "the RED, one", "ref_id": 5} | changes
    return ReferringExpressions([record], REFS, instances, detections, folder, TestTransform(16))


def test_referring_expressions(folder):
    data = expressions(folder, ref_id="5")
    assert (
        data.texts == ["the red one"]
        and data.targets[0].box == [1, 2, 3, 4]
        and data.targets[0].split == "testA"
    )
    assert data.boxes == [[[1, 2, 3, 4], [0, 0, 5, 5]]] and data.load(0)["image"].shape == (
        3,
        16,
        16,
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ref_id": 99}, "ref_id 99 is not among"),
        ({"ref_id": 6}, "ref_id 6 .*annotation is missing"),
        ({"detections": {}}, "no boxes for image_id 9"),
        ({"detections": {"9": []}}, "no boxes for image_id 9"),
        ({"detections": []}, "det_file"),
        ({"instances": {"annotations": []}}, "instances.json needs"),
    ],
)
def test_expressions_that_cannot_be_used(folder, changes, words):
    with pytest.raises(UserError, match=words):
        expressions(folder, **changes)


def test_tensors_are_plain(folder):
    assert (
        Statements(
            write(folder, [{"image": "a.jpg", "sentence": "x", "label": "neutral"}]),
            SNLI_VE,
            folder,
            TestTransform(16),
        ).labels.dtype
        == torch.int64
    )
