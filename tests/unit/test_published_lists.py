"""Annotations as VQA, NLVR2 and SNLI-VE publish them are the lists that the tasks read."""

import json

import pytest

from base.errors import UserError
from dataset.health.survey import open_list
from dataset.sources.records import Records

QUESTIONS = "v2_OpenEnded_mscoco_{}_questions.json"


def write_vqa(folder, split, answers):
    head = {"info": {}, "task_type": "Open-Ended", "data_type": "mscoco", "license": {}}
    questions = [{"image_id": 458752, "question": "What is it?", "question_id": 458752000}]
    path = folder / QUESTIONS.format(split)
    path.write_text(json.dumps({**head, "data_subtype": split, "questions": questions}))
    if answers:
        given = [{"answer": answer, "answer_id": n} for n, answer in enumerate(answers)]
        row = {"question_id": 458752000, "image_id": 458752, "answers": given}
        beside = folder / f"v2_mscoco_{split}_annotations.json"
        beside.write_text(json.dumps({**head, "annotations": [row]}))
    return path


def test_questions_of_vqa_with_the_answers_beside_them(tmp_path, cache):
    path = write_vqa(tmp_path, "train2014", ["net"] * 9 + ["mesh"])
    (record,) = Records(path, ("image", "question", "answer"))
    assert record == {
        "dataset": "vqa",
        "image": "train2014/COCO_train2014_000000458752.jpg",
        "question": "What is it?",
        "question_id": 458752000,
        "answer": ["net"] * 9 + ["mesh"],
    }
    write_vqa(tmp_path, "train2014", ["rope"] * 10)  # other answers, the same questions
    assert Records(path, ("image", "question", "answer"))[0]["answer"] == ["rope"] * 10
    test = write_vqa(tmp_path, "test-dev2015", [])
    (record,) = Records(test, ("image", "question"))
    assert record["image"] == "test2015/COCO_test2015_000000458752.jpg" and "answer" not in record
    with pytest.raises(UserError, match="no field 'answer'"):
        Records(test, ("image", "question", "answer"))


def test_damaged_files_of_vqa_are_one_sentence(tmp_path, cache):
    path = write_vqa(tmp_path, "val2014", ["a"])
    beside = tmp_path / "v2_mscoco_val2014_annotations.json"
    beside.write_text('{"annotations": [{"question_id": 1, "answers": ["yes"]}]}')
    with pytest.raises(UserError, match=r"v2_mscoco_val2014_annotations.json, entry 0 .*published"):
        Records(path, ("image", "question"))
    path.write_text(path.read_text().replace("458752,", '"x",', 1))
    beside.unlink()
    with pytest.raises(UserError, match=r"entry 0 .*not as published"):
        Records(path, ("image", "question"))


def test_lines_of_nlvr2(tmp_path, cache):
    own = {"sentence": "both are red.", "label": "True", "left_url": "http://a", "right_url": ""}
    rows = [
        {"identifier": "train-10171-0-0", "directory": 72, **own},
        {"identifier": "dev-850-0-2", **own},
    ]
    (tmp_path / "train.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = Records(tmp_path / "train.json", ("images", "sentence", "label"))
    assert first["images"] == [f"images/train/72/train-10171-0-img{n}.png" for n in (0, 1)]
    assert second["images"] == ["dev/dev-850-0-img0.png", "dev/dev-850-0-img1.png"]
    assert (second["sentence"], second["label"]) == ("both are red.", "True")


def test_lines_of_snli_ve(tmp_path, cache):
    row = {"gold_label": "neutral", "sentence1": "a", "sentence2": "ein Hünd", "Flickr30K_ID": "12"}
    file = tmp_path / "snli_ve_dev.jsonl"
    file.write_text(json.dumps(row, ensure_ascii=False))
    for records in (Records(file, ("image", "sentence", "label")), open_list(str(file))):
        assert list(records) == [{"image": "12", "sentence": "ein Hünd", "label": "neutral"}]
    ours = tmp_path / "ours.jsonl"
    ours.write_text(json.dumps({**row, "image": "b", "sentence": "c", "label": "entailment"}))
    assert Records(ours, ("image", "sentence", "label"))[0]["sentence"] == "c"
