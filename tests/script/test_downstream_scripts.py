"""VQA.py, VE.py, NLVR.py and Grounding.py through their real main: training, resume, evaluation,
mistakes, reports."""

import inspect
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

import NLVR
import VQA
from base.errors import UserError
from dataset.text.wordpiece import Tokenizer
from runtime.checkpoint import read_weights
from runtime.config.cli import parse, run_script
from runtime.safe_pickle import load_plain
from scripts.data import convert_expressions
from tests.helpers.downstream import SCRIPTS, flags, pretraining_checkpoint, start
from tests.helpers.runs import log_lines

MORE = {("Grounding", True): ["--block_num", "1"], ("NLVR_TA", True): ["--paired_from", "1"]}
METRIC = {"VQA": "overall", "VE": "accuracy", "NLVR": "accuracy", "Grounding": "accuracy"}
TASKS = pytest.mark.parametrize("task", list(METRIC))


@pytest.fixture(scope="module")
def finetuned(digitscenes, tmp_path_factory):
    """finetuned(task): the folder of a finished debug run, made once."""
    runs = {}

    def get(task: str) -> Path:
        if task not in runs:
            runs[task] = tmp_path_factory.mktemp(task) / "run"
            start(task, digitscenes, runs[task])
        return runs[task]

    return get


@TASKS
def test_training_validates_keeps_the_best_and_reports(digitscenes, finetuned, task):
    out = finetuned(task)
    lines = log_lines(out)
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6, 8]
    validations = {
        line["step"]: line[f"val_{METRIC[task]}"] for line in lines if f"val_{METRIC[task]}" in line
    }
    assert list(validations) == [4, 8]
    best = torch.load(out / "checkpoint_best.pt", weights_only=True)
    score = validations[best["step"]]
    assert score == max(validations.values())
    metrics = json.loads((out / "result/metrics.json").read_text())
    assert metrics["val"][METRIC[task]] == pytest.approx(score)
    assert metrics["checkpoint"] == str(out / "checkpoint_best.pt")
    page = (out / "result/report.html").read_text()
    assert "data:image/jpeg;base64," in page and "<script" not in page and 'class="case"' in page
    assert "http" not in re.sub(r"data:image/jpeg;base64,[A-Za-z0-9+/=]*", "", page)


@TASKS
def test_interrupted_run_ends_with_the_same_weights(digitscenes, finetuned, task, tmp_path):
    straight = finetuned(task)
    with pytest.raises(SystemExit) as left:
        start(task, digitscenes, tmp_path, "--max_steps", 5)
    assert left.value.code == 0
    start(task, digitscenes, tmp_path)
    weights = [
        torch.load(d / "checkpoint_00000008.pt", weights_only=True)["model"]
        for d in (straight, tmp_path)
    ]
    for key, value in weights[0].items():
        assert torch.equal(value, weights[1][key]), key
    logged, best = [], []
    for folder in (straight, tmp_path):
        logged.append(
            [(line.get("loss"), line.get(f"val_{METRIC[task]}")) for line in log_lines(folder)]
        )
        saved = torch.load(folder / "checkpoint_best.pt", weights_only=True)
        best.append((saved["step"], saved["scores"]))
    assert logged[0] == logged[1] and best[0] == best[1]


@TASKS
def test_evaluation_inherits_the_network_and_repeats_the_scores(
    digitscenes, finetuned, task, tmp_path
):
    out = finetuned(task)
    bare = tmp_path / "bare.yaml"
    bare.write_text(
        {"VQA": "k_test: 4\n", "Grounding": "block_num: 0\n"}.get(task, "") + "workers: 0\n"
    )
    given = flags(task, digitscenes, tmp_path / "out", "--evaluate", "--checkpoint", out)
    given[given.index("--config") + 1] = str(bare)
    tokenizer = given.index("--text_encoder")
    del given[tokenizer : tokenizer + 2]
    script = SCRIPTS[task]
    run_script(script.main, script.Config, None, given)
    before, after = (
        json.loads((d / "result/metrics.json").read_text()) for d in (out, tmp_path / "out")
    )
    assert {k: v for k, v in before.items() if k != "checkpoint"} == {
        k: v for k, v in after.items() if k != "checkpoint"
    }
    assert not (tmp_path / "out/log.jsonl").exists()


@TASKS
def test_unreadable_images_are_counted_beside_the_scores(digitscenes, finetuned, task, tmp_path):
    """In metrics.json, by split; RefCOCO+'s one list has several."""
    name = {"Grounding": "refcoco+"}.get(task, task.lower())
    entries = json.loads((digitscenes / f"{name}_test.json").read_text())[:5]
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    if task == "NLVR":
        entries[1]["images"][1] = str(broken)
    else:
        entries[1]["image"] = str(broken)
    (tmp_path / "test.json").write_text(json.dumps(entries))
    more = ["--evaluate", "--checkpoint", finetuned(task), "--error_budget", "0.2"]
    more += ["--test_file", tmp_path / "test.json"]
    if task != "Grounding":
        more += ["--val_file", "none"]
    if task == "VQA":
        more += ["--test_answers", "none"]
    found = start(task, digitscenes, tmp_path / "out", *more)
    found = found if task == "Grounding" else found["test"]
    assert found["unreadable_images"] == 1 and "truncated_images" not in found
    if task == "VQA":
        assert found["questions"] == 5  # whose answers are not known
    if task in ("VE", "NLVR"):
        more = ["--val_file", tmp_path / "test.json", "--scheduler.epochs", "1 steps"]
        start(task, digitscenes, tmp_path / "trained", *more, "--error_budget", "0.2")
        assert log_lines(tmp_path / "trained")[-1]["val_unreadable_images"] == 1


@pytest.mark.parametrize("two_stage", [False, True], ids=["simla", "albef"])
@pytest.mark.parametrize("task", ["VQA", "VE", "NLVR_TA", "Grounding"])
def test_start_from_a_pretraining_checkpoint(digitscenes, tmp_path, task, two_stage, capfd):
    given = pretraining_checkpoint(digitscenes, tmp_path, two_stage)
    given += ["--scheduler.epochs", "2 steps", *MORE.get((task, two_stage), [])]
    start(task, digitscenes, tmp_path / "out", *given)
    assert "only in the file" in capfd.readouterr().out  # what was left out is reported
    state = torch.load(tmp_path / "out/checkpoint_00000002.pt", weights_only=True)["model"]
    assert all(value.isfinite().all() for value in state.values())


@pytest.mark.parametrize("two_stage", [False, True], ids=["simla", "albef"])
def test_nlvr_stages_follow_each_other(digitscenes, tmp_path, two_stage):
    """Pre-training -> text assignment -> fine-tuning; the teacher starts as a copy of what was
    loaded."""
    given = pretraining_checkpoint(digitscenes, tmp_path, two_stage) + MORE.get(
        ("NLVR_TA", two_stage), []
    )
    start("NLVR_TA", digitscenes, tmp_path / "first", *given, "--scheduler.epochs", "2 steps")
    second = ["--checkpoint", tmp_path / "first", *given[2:4], "--scheduler.epochs", "1 steps"]
    metrics = start("NLVR", digitscenes, tmp_path / "second", *second)
    assert 0 <= metrics["test"]["accuracy"] <= 100
    first = torch.load(tmp_path / "first/checkpoint_00000002.pt", weights_only=True)["model"]
    exported = read_weights(tmp_path / "first/model.safetensors")
    assert exported and all(torch.equal(value, first[key]) for key, value in exported.items())
    state = torch.load(tmp_path / "second/checkpoint_00000001.pt", weights_only=True)["model"]
    for name in ("key", "value"):
        last = max(
            int(key.split(".")[3]) for key in state if key.startswith("text_encoder.encoder.layer.")
        )
        twins = [
            f"text_encoder.encoder.layer.{i}.crossattention.self.{name}.weight"
            for i in (last - 1, last)
        ]
        assert torch.equal(state[twins[0]], state[twins[1]])
    key = "visual_encoder.patch_embed.proj.weight"
    assert torch.allclose(state[key.replace("encoder.", "encoder_m.")], first[key], atol=1e-2)
    given = flags("NLVR", digitscenes, tmp_path / "third", *second, "--compat", "original")
    config = parse(NLVR.Config, given)
    model = NLVR.build_model(config, Tokenizer(config.text_encoder), NLVR.prepare(config).weights)
    teacher = model.state_dict()[key.replace("encoder.", "encoder_m.")]
    assert not torch.allclose(teacher, first[key], atol=1e-2)  # random, as in the published code
    assert model.config.compat == "original"


def test_vqa_answers_are_in_the_servers_format(digitscenes, finetuned):
    rows = json.loads((finetuned("VQA") / "result/vqa_result_test.json").read_text())
    asked = [
        entry["question_id"] for entry in json.loads((digitscenes / "vqa_test.json").read_text())
    ]
    assert [row["question_id"] for row in rows] == asked
    assert {row["answer"] for row in rows} <= set(
        json.loads((digitscenes / "answer_list.json").read_text())
    )


@pytest.mark.parametrize(("compat", "k"), [("none", 3), ("original", 10**6)])
def test_vqa_counts_as_the_originals_do_where_it_is_asked_to(
    digitscenes, finetuned, tmp_path, monkeypatch, compat, k
):
    """The score, what chance is, what the page shows and the warning about the list; of the answers
    no more are scored whole than there are."""
    noted = {}

    def note(owner, name: str) -> None:
        function = getattr(owner, name)
        names = inspect.signature(function).parameters

        def called(*given, **options):
            noted.setdefault(name, []).append(dict(zip(names, given, strict=False)) | options)
            return function(*given, **options)

        monkeypatch.setattr(owner, name, called)

    for name in ("vqa_accuracy", "prior_accuracy", "check_answer_list"):
        note(VQA.vqa, name)
    note(VQA, "answer_report")
    note(VQA.Vqa, "rank_answers")
    more = [
        "--evaluate",
        "--checkpoint",
        finetuned("VQA"),
        "--compat",
        compat,
        "--val_file",
        "none",
    ]
    metrics = start("VQA", digitscenes, tmp_path, *more, "--k_test", k)
    kept = min(k, len(json.loads((digitscenes / "answer_list.json").read_text())))
    assert metrics["k_test"] == kept
    assert {call["k"] for call in noted.pop("rank_answers")} == {kept}
    assert noted.keys() == {"vqa_accuracy", "prior_accuracy", "check_answer_list", "answer_report"}
    for calls in noted.values():
        assert {call["one_sided"] for call in calls} == {compat == "original"}
    probability = noted["answer_report"][0]["probability"]
    assert (probability.diff() <= 0).all() and probability.max() <= 1  # likeliest first


@pytest.mark.parametrize("mode", ["itm", "itc"])
def test_grounding_by_either_map(digitscenes, finetuned, tmp_path, mode):
    given = [
        "--evaluate",
        "--checkpoint",
        finetuned("Grounding"),
        "--gradcam_mode",
        mode,
        "--block_num",
        "1",
    ]
    metrics = start("Grounding", digitscenes, tmp_path, *given)
    assert metrics["gradcam_mode"] == mode and {"val", "testA", "testB"} <= set(metrics)


def said(task, given, capsys, monkeypatch) -> str:
    """What the script says about a mistake, as one message and exit status 2."""
    script = SCRIPTS[task]
    monkeypatch.setattr(sys, "argv", [f"{task}.py"])
    with pytest.raises(SystemExit) as left:
        run_script(script.main, script.Config, script.__doc__, given)
    message = capsys.readouterr().err
    assert left.value.code == 2 and "Traceback" not in message
    return message


@pytest.mark.parametrize(
    ("task", "change", "words"),
    [
        ("VQA", ["--evaluate"], "--evaluate needs --checkpoint"),
        ("VQA", ["--train_file", "[]"], "train_file: none is given"),
        ("VQA", ["--answer_list", "nowhere.json"], "nowhere.json"),
        ("VQA", ["--vqa_root", "/nowhere"], "/nowhere"),
        ("VE", ["--train_file", "none"], "give train_file"),
        ("VE", ["--bert_config", "nowhere.json"], "nowhere.json: no such file; name the JSON"),
        ("VE", ["--checkpoint", "nowhere.pth"], "nowhere.pth"),
        ("NLVR", ["--stage", "text_assignment"], "leave out"),
        ("NLVR", ["--parallel", "fsdp"], "use ddp"),
        ("NLVR", ["--paired_from", "2"], "paired_from 2"),
        (
            "Grounding",
            ["--block_num", "7"],
            "block_num 7: cross-attention is in the text layers 0..1",
        ),
        ("Grounding", ["--det_file", "nowhere.json"], "nowhere.json"),
        (
            "Grounding",
            ["--evaluate", "--test_file", "[]", "--checkpoint", "nowhere.pth"],
            "--evaluate needs test_file",
        ),
        ("Grounding", ["--batch_size_train", "1"], "batch_size"),
    ],
)
def test_mistakes_are_one_clear_line(
    digitscenes, tmp_path, capsys, monkeypatch, task, change, words
):
    assert words in said(
        task, flags(task, digitscenes, tmp_path / "out", *change), capsys, monkeypatch
    )


@pytest.mark.parametrize("task", ["VE", "NLVR", "Grounding"])
def test_the_kind_of_checkpoint_is_checked_before_the_tokenizer(
    digitscenes, tmp_path, capsys, monkeypatch, task
):
    torch.save({"model": {"text_decoder.weight": torch.ones(1)}}, tmp_path / "vqa.pth")
    change = ["--checkpoint", tmp_path / "vqa.pth", "--text_encoder", "/no/tokenizer"]
    given = flags(task, digitscenes, tmp_path / "out", *change)
    assert "this is a vqa checkpoint" in said(task, given, capsys, monkeypatch)


def edited(data: Path, folder: Path, name: str, change) -> Path:
    """A copy of an annotation file on which `change` was called."""
    content = json.loads((data / name).read_text())
    changed = change(content)
    content = (
        changed
        if isinstance(changed, list) and changed and isinstance(changed[0], str)
        else content
    )
    path = folder / Path(name).name
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("task", "flag", "name", "change", "words"),
    [
        ("VQA", "--test_file", "vqa_test.json", lambda e: e[1].update(e[0]), "question_id"),
        (
            "VQA",
            "--answer_list",
            "answer_list.json",
            lambda e: ["nothing", "of this"],
            "holds no answer",
        ),
        ("VQA", "--answer_list", "answer_list.json", lambda e: e.append(5), "expected a JSON list"),
        (
            "VQA",
            "--test_answers",
            "vqa_test_answers.json",
            lambda e: e["annotations"].clear(),
            "no answers to question_id",
        ),
        (
            "VE",
            "--val_file",
            "ve_val.json",
            lambda e: e[3].update(label="maybe"),
            "label 'maybe' is none of",
        ),
        (
            "NLVR",
            "--val_file",
            "nlvr_val.json",
            lambda e: e[2].update(label="perhaps"),
            "label 'perhaps' is none of",
        ),
        (
            "NLVR",
            "--val_file",
            "nlvr_val.json",
            lambda e: e[2].update(images=["one.jpg"]),
            "a pair has two",
        ),
        (
            "Grounding",
            "--test_file",
            "refcoco+_test.json",
            lambda e: e[4].update(ref_id=999999),
            "ref_id 999999",
        ),
        (
            "Grounding",
            "--det_file",
            "refcoco+/dets.json",
            lambda e: e.clear(),
            "no boxes for image_id",
        ),
    ],
)
def test_bad_annotations_are_named(
    digitscenes, tmp_path, capsys, monkeypatch, task, flag, name, change, words
):
    path = edited(digitscenes, tmp_path, name, change)
    assert words in said(
        task, flags(task, digitscenes, tmp_path / "out", flag, path), capsys, monkeypatch
    )


def test_answers_the_list_lacks_are_told(digitscenes, tmp_path, capfd):
    path = edited(
        digitscenes,
        tmp_path,
        "answer_list.json",
        lambda e: [answer for answer in e if answer != "yes"],
    )
    start(
        "VQA", digitscenes, tmp_path / "out", "--answer_list", path, "--scheduler.epochs", "1 steps"
    )
    assert re.search(r"lacks \d+ answers of val_file, e.g. \['yes'", capfd.readouterr().out)


def test_refs_with_code_in_them_are_refused(digitscenes, tmp_path, capsys, monkeypatch):
    import os
    import pickle

    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    folder = tmp_path / "refcoco+"
    shutil.copytree(digitscenes / "refcoco+", folder)
    (folder / "refs(unc).p").write_bytes(pickle.dumps([Attack()]))
    given = flags("Grounding", digitscenes, tmp_path / "out", "--refcoco_data", tmp_path)
    assert "refs(unc).p" in said("Grounding", given, capsys, monkeypatch)
    given = flags(
        "Grounding", digitscenes, tmp_path / "out", "--train_file", folder / "refs(unc).p"
    )
    assert "convert_expressions.py" in said("Grounding", given, capsys, monkeypatch)
    with pytest.raises(UserError, match=r"refs\(unc\)\.p"):
        convert_expressions.main(convert_expressions.Config([folder], tmp_path / "lists"))
    assert not (tmp_path / "ran").exists()


def test_expressions_of_refer_mdetr_and_uninext_are_the_same_lists(
    digitscenes, finetuned, tmp_path
):
    """REFER's files become MDETR's and UNINEXT's here; all three convert to one list, on which
    Grounding.py scores what it scores with REFER's ids."""
    refer = digitscenes / "refcoco+"
    instances = json.loads((refer / "instances.json").read_text())
    names = {image["id"]: image["file_name"] for image in instances["images"]}
    boxes = {each["id"]: each["bbox"] for each in instances["annotations"]}
    mdetr = {"images": [], "annotations": []}
    uninext = {"images": [], "annotations": []}
    for number, ref in enumerate(load_plain(refer / "refs(unc).p")):
        if ref["split"] != "testA":
            continue
        box = {"bbox": boxes[ref["ann_id"]]}
        phrases = [sentence["sent"] for sentence in ref["sentences"]]
        file = {"file_name": names[ref["image_id"]]}
        uninext["images"].append({"id": number, **file})
        uninext["annotations"].append({"image_id": float(number), "phrases": phrases, **box})
        for phrase in phrases:
            own = len(mdetr["images"])
            mdetr["images"].append({"id": str(own), "caption": phrase, **file})
            mdetr["annotations"].append({"image_id": own, **box})
    sources = {"refer": refer}
    for maker, content in (("mdetr", mdetr), ("uninext", uninext)):
        sources[maker] = tmp_path / f"{maker}_testA.json"
        sources[maker].write_text(json.dumps(content))
    found = {}
    for maker, source in sources.items():
        convert_expressions.main(convert_expressions.Config([source], tmp_path / maker))
        found[maker] = json.loads((tmp_path / maker / "testA.json").read_text())
    published = json.loads((digitscenes / "refcoco+_test.json").read_text())
    texts = {(row["ref_id"], row["text"]) for row in published}
    assert {(row["ref_id"], row["text"]) for row in found["refer"]} <= texts
    plain = [
        {key: row[key] for key in ("image", "text", "bbox", "split")} for row in found["refer"]
    ]
    assert found["mdetr"] == found["uninext"] == plain and len(plain) > 10
    listed = (tmp_path / "refer/testA.json", tmp_path / "mdetr/testA.json")
    given = ["--evaluate", "--checkpoint", finetuned("Grounding")]
    given += ["--image_root", digitscenes / "images/test2017"]
    by_id = start("Grounding", digitscenes, tmp_path / "ids", *given, "--test_file", listed[0])
    given += ["--test_file", listed[1], "--refcoco_data", "none", "--det_file", "none"]
    by_box = start("Grounding", digitscenes, tmp_path / "boxes", *given)
    assert by_box["testA"]["expressions"] == by_id["testA"]["expressions"] == len(plain)
    assert by_box["testA"]["pointing"] == by_id["testA"]["pointing"]
