"""Annotations of VQA, SNLI-VE, NLVR2 and RefCOCO+: what becomes of them, and what is refused."""

import importlib
import json
import re
from pathlib import Path

import pytest
import torch

from base.errors import BadSample, UserError
from dataset.images.albef import TestTransform
from dataset.images.decode import decode_image
from dataset.loading.eval import EvalLoader
from dataset.loading.stream import Stream, StreamLoader
from dataset.tasks.grounding import ReferringExpressions, read_detections, referred_boxes, targets
from dataset.tasks.ve_nlvr import NLVR2, ORIGINAL_NLVR2, SNLI_VE, Statements
from dataset.tasks.vqa import (
    QuestionAnswers,
    QuestionSet,
    VqaCollate,
    encode_answers,
    read_answer_list,
    read_official_answers,
)
from dataset.text.wordpiece import TextCollate, Tokenizer, WholeTexts
from evaluation.vqa import save_answers
from tests.helpers.configs import load


@pytest.fixture
def folder(tmp_path):
    """Two images, a vocabulary, and a place for annotations."""
    from PIL import Image

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
    some = build(
        entry | {"answer": ["red", "\u200b", "blue", ""]}
    )  # an empty one condemns no other
    assert (some["answers"], some["weights"]) == (["red", "blue"], [0.25, 0.25])
    for nothing in ([], ["", "\u200b"], ""):
        with pytest.raises(BadSample, match="no answer to"):
            build(entry | {"answer": nothing})
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
    assert data.ids == [1, "7"] and len(data) == 2
    official = [{"question_id": id, "answers": [{"answer": "red"}]} for id in (1.0, 7)]
    official = write(folder, {"annotations": official}, "official.json")
    again = QuestionSet(
        questions(question_id="7.0", dataset=None), roots(folder), TestTransform(16), 9, official
    )
    assert list(again.truth) == [1, "7.0"]
    assert data.truth["7"]["answers"] == ["red"] * 6 + ["blue"] * 4
    assert data.load(1)["text"] == "what colour" and data.load(1)["image"].shape == (3, 16, 16)
    mixed = QuestionSet(questions(answer=["red", 2, None])[1:], roots(folder), TestTransform(16))
    assert [known["answers"] for known in mixed.truth.values()] == [["red", "2"]]  # as in training


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"question_id": 1}, "question_id 1 in entry 1 and in entry 0"),
        ({"question_id": "1.0"}, "question_id 1.0 in entry 1 and in entry 0"),
        ({"answer": []}, "no answers to"),
        ({"answer": [{"answer": "red"}]}, r"answer {'answer': 'red'} is neither"),
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
    assert found == {"1": {"answers": ["red", "blue"], "answer_type": "other"}}
    found = read_official_answers(write(folder, {"annotations": [entry | {"answer_type": 5}]}))
    assert found["1"]["answer_type"] == "5"  # types are sorted by their names
    again = [entry, entry | {"question_id": "1"}]
    with pytest.warns(UserWarning, match="1 entries are listed again, e.g. of question_id 1"):
        assert len(read_official_answers(write(folder, {"annotations": again}))) == 1
    again[1] |= {"answers": entry["answers"][:1]}
    with pytest.raises(UserError, match="question_id 1 has two entries that differ") as error:
        read_official_answers(write(folder, {"annotations": again}))
    assert "not VQA's annotation format" not in str(error.value)
    for wrong in ([entry], {"annotations": [entry | {"answer_type": ["other"]}]}):
        with pytest.raises(UserError, match="VQA's annotation format"):
            read_official_answers(write(folder, wrong))


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
        UserError, match=r"entries.json, entry 0 .*none of contradiction, neutral, entailment"
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
    with pytest.raises(UserError, match=r"entry 0 .*images lists 1, but a pair has two"):
        Statements(
            write(folder, [entry | {"images": ["a.jpg"]}], "one.json"),
            NLVR2,
            folder,
            TestTransform(16),
        )


def test_a_text_of_more_tokens_than_the_network_takes_is_named(folder):
    """One of a Chinese text's one word has many tokens: training leaves it out, evaluation ends."""
    texts = ["红" * 11, "红" * 12, *["red"] * 18]
    entries = [{"image": "a.jpg", "sentence": text, "label": "neutral"} for text in texts]
    data = Statements(write(folder, entries), SNLI_VE, folder, TestTransform(16))
    collate = WholeTexts(Tokenizer(folder / "vocab.txt"), 12)
    named = "text '红{12}' has 13 tokens, of which the network takes 12"
    with pytest.raises(UserError, match=f"^{named}.*; shorten it; evaluation needs every sample"):
        list(EvalLoader(data.load, range(20), 4, collate, workers=0))
    loader = StreamLoader(Stream([data.source()], collate), 4, workers=0, error_budget=0.05)
    lengths = {next(loader)["text_ids"].shape[1] for _ in range(20)}
    assert lengths == {8, 16} and 1 <= loader.errors["train_file"] <= 5
    assert re.search(named, loader.bad_samples[0])


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


def test_question_ids_are_what_the_file_says(folder):
    """ "01827492" is no number, and not the question 1827492."""
    ids = ["01827492", 1827492, "x-1", 5]
    records = [questions()[0] | {"question_id": each, "answer": None} for each in ids]
    data = QuestionSet(records, roots(folder), TestTransform(16))
    assert data.ids == ids
    save_answers(folder / "result.json", dict.fromkeys(data.ids, "yes"))
    rows = json.loads((folder / "result.json").read_text())
    assert [row["question_id"] for row in rows] == ids


def test_answers_of_another_file_are_matched_by_the_text_of_their_ids(folder):
    annotations = [
        {"question_id": each, "answers": [{"answer": answer}]}
        for each, answer in ((1, "one"), ("2", "two"), ("03", "three"))
    ]
    file = write(folder, {"annotations": annotations})
    records = [questions()[0] | {"question_id": each} for each in ("1", 2, "03")]
    data = QuestionSet(records, roots(folder), TestTransform(16), answers_file=file)
    assert {key: known["answers"] for key, known in data.truth.items()} == {
        "1": ["one"],
        2: ["two"],
        "03": ["three"],
    }
    with pytest.raises(UserError, match="no answers to question_id 3"):
        wrong = [questions()[0] | {"question_id": 3}]
        QuestionSet(wrong, roots(folder), TestTransform(16), answers_file=file)


def test_an_answer_listed_again_counts_once(folder):
    file = folder / "answers.json"
    file.write_bytes(b"\xef\xbb\xbf" + b'["yes", "no", "yes", "red"]')
    with pytest.warns(UserWarning, match="1 answers are listed again, e.g. 'yes'"):
        assert read_answer_list(file) == ["yes", "no", "red"]


def test_a_numeric_image_of_snli_ve_is_read(folder):
    (folder / "4705552913.jpg").write_bytes((folder / "a.jpg").read_bytes())
    entry = {"image": 4705552913, "sentence": "red", "label": "neutral"}
    data = Statements(write(folder, [entry]), SNLI_VE, folder, TestTransform(16))
    assert data.load(0)["image"].shape == (3, 16, 16)


DETECTIONS = {
    "plain": [[1, 2, 20, 20], [3, 4, 5, 6]],
    "with scores": [[1, 2, 20, 20, 0.9], [3, 4, 5, 6, 0.1]],
    "objects": [{"box": [1, 2, 20, 20], "score": 0.9}, {"bbox": [3, 4, 5, 6, 1.0]}],
}


@pytest.mark.parametrize("kind", DETECTIONS)
def test_detections_in_any_published_form(folder, kind):
    data = grounding(folder, {"9": DETECTIONS[kind]})
    assert data.boxes == [[[1.0, 2.0, 20.0, 20.0], [3.0, 4.0, 5.0, 6.0]]]


@pytest.mark.parametrize(
    "boxes",
    [
        [[1, 2, 3]],
        [[1, 2, 3, 4, 5, 6]],
        [{"score": 1}],
        [["a", 1, 2, 3]],
        [[1, 2, 3, None]],
        [[1, 2, -3, 4]],
        [[1, 2, 3, -0.5, 0.9]],
        [[1, 2, 1e308, 1e308]],
        [[10**400, 2, 3, 4]],
        "abcd",
        5,
    ],
    ids=str,
)
def test_unusable_detections_are_one_sentence_before_any_training(folder, boxes):
    with pytest.raises(UserError, match="det_file, image_id 9"):
        grounding(folder, {"9": boxes})


def grounding(folder, detections, ref_id="r-01", **changes):
    """One expression with ids of text in one file and numbers in another."""
    instances = {
        "images": [{"id": "9", "height": 48, "width": 64}],
        "annotations": [{"id": 77, "image_id": 9, "bbox": [1.5, 2, 20, 20]}],
    }
    refs = [{"ref_id": "r-01", "ann_id": "77", "image_id": 9, "split": "val"} | changes]
    records = [{"image": "a.jpg", "text": "a man", "ref_id": ref_id}]
    return ReferringExpressions(records, refs, instances, detections, folder, TestTransform(16))


def test_splits_may_be_numbers_and_references_have_one_target(folder):
    assert grounding(folder, {"9": [[1, 2, 3, 4]]}, split=7).targets[0].split == "7"
    instances = {"images": [{"id": 9, "height": 4, "width": 4}], "annotations": []}
    instances["annotations"] = [{"id": number, "bbox": [0, 0, 1, number]} for number in (1, 2)]
    ref = {"ref_id": 5, "ann_id": 1, "image_id": 9, "split": "val"}
    assert len(targets([ref, {**ref, "ref_id": "5"}], instances)) == 1
    with pytest.raises(UserError, match="ref_id 5 has two targets"):
        targets([ref, {**ref, "ann_id": 2}], instances)


def test_ids_of_references_may_be_texts(folder):
    data = grounding(folder, {"9": [[1, 2, 3, 4]]})
    assert data.targets[0].box == [1.5, 2.0, 20.0, 20.0] and data.targets[0].height == 48
    with pytest.raises(UserError, match="ref_id x is not among the references"):
        grounding(folder, {"9": [[1, 2, 3, 4]]}, ref_id="x")


def test_refcoco_recipe_evaluates_val_which_chooses_the_checkpoint():
    recipe = Path(__file__).parents[2] / "configs/Grounding/refcoco.yaml"
    files = load(importlib.import_module("Grounding").Config, recipe).test_file
    assert files == [Path("data/refcoco+_val.json"), Path("data/refcoco+_test.json")]


def test_expressions_may_carry_their_boxes_and_detections_be_a_list_of_results(folder, tmp_path):
    entries = [
        {"image": "a.jpg", "text": "left", "bbox": [0, 1, 5, 6]},
        {"image": "a.jpg", "text": "right", "bbox": [7, 1, 5, 6], "split": "val"},
    ]
    records, refs, instances = referred_boxes(entries, folder)
    parts = [folder, TestTransform(16)]
    boxes = read_detections(None, instances)
    data = ReferringExpressions(records, refs, instances, boxes, *parts)
    assert [target.split for target in data.targets] == ["test", "val"]
    assert data.targets[1].box == [7.0, 1.0, 5.0, 6.0]
    height, width = decode_image(folder / "a.jpg").shape[1:]
    assert (data.targets[0].height, data.targets[0].width) == (height, width)
    assert data.boxes == [[[0.0, 1.0, 5.0, 6.0], [7.0, 1.0, 5.0, 6.0]]] * 2

    # two expressions of one box are no two boxes to choose from: chance is 1 in 2, not 2 in 3
    records, refs, instances = referred_boxes([*entries, {**entries[0], "text": "l"}], folder)
    again = ReferringExpressions(records, refs, instances, read_detections(None, instances), *parts)
    assert again.boxes == [data.boxes[0]] * 3
    assert [target.box for target in again.targets] == [data.boxes[0][i] for i in (0, 1, 0)]
    with pytest.raises(UserError, match=r"test_file, entry 0 .the first is 0.: .* is no box"):
        referred_boxes([{**entries[0], "bbox": [1, 2]}], folder)
    records, refs, instances = referred_boxes(entries, folder)

    results = tmp_path / "detections.json"
    results.write_text(json.dumps([{"image_id": "a.jpg", "bbox": [1, 1, 2, 2], "score": 0.5}]))
    data = ReferringExpressions(
        records, refs, instances, read_detections(results, instances), *parts
    )
    assert data.boxes == [[[1.0, 1.0, 2.0, 2.0]]] * 2
    results.write_text("[[1, 2, 3, 4]]")
    with pytest.raises(UserError, match=r"a list of {image_id, bbox}"):
        read_detections(results, instances)
    with pytest.raises(UserError, match=r"none.jpg.*remove its entries"):
        referred_boxes([{**entries[0], "image": "none.jpg"}], folder)
