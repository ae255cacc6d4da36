"""scripts/doctor.py finds what was planted, and nothing else."""

import io
import json
from collections import Counter
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance

from base.errors import UserError
from base.reading import read_json_lines
from dataset.health import classes as class_checks
from dataset.health import survey
from dataset.health.classes import class_findings, names_of, similar_names
from dataset.health.duplicates import near_duplicates
from dataset.health.samples import box_inside, shrunk, signature, text_problems
from dataset.sources.tar_writer import write_shard
from dataset.tasks.classification import FolderRecords
from scripts import doctor
from tests.helpers.images import encoded
from tests.helpers.processes import run_script


def scene(seed, size=(96, 64)):
    """A smooth image of its own."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def jpeg(image, **options):
    return encoded(image, "JPEG", **options)


def plant(root):
    """Twelve sound images and one of every fault; returns the entries."""
    for n in range(12):
        (root / f"{n}.jpg").write_bytes(jpeg(scene(n), quality=95))
    turned = Image.Exif()
    turned[0x0112] = 6
    whole = jpeg(scene(20, (400, 300)))
    planted = {
        "unreadable.jpg": b"no image",
        "truncated.jpg": whole[: len(whole) // 2],
        "tiny.jpg": jpeg(scene(21, (20, 20))),
        "thin.jpg": jpeg(scene(22, (700, 60))),
        "rotated.jpg": jpeg(scene(23), exif=turned.tobytes()),
        "flat.jpg": jpeg(Image.new("RGB", (64, 64), (9, 9, 9))),
        "same.jpg": (root / "3.jpg").read_bytes(),
        "near.jpg": jpeg(scene(4).resize((80, 54)), quality=60),
    }
    for name, content in planted.items():
        (root / name).write_bytes(content)
    names = [*(f"{n}.jpg" for n in range(12)), *planted, "missing.jpg"]
    entries = [{"image": name, "caption": f"this shows {name}"} for name in names]
    entries[5]["caption"] = ["", "\u200b"]
    entries[6]["caption"] = "a caf\u00c3\u00a9 by night"
    entries[7]["caption"] = "word " * 90
    return [*entries, dict(entries[0])]


def run(capsys, *arguments):
    """(exit status, printed text) of the script."""
    config = doctor.Config(workers=1, **arguments[0])
    status = 0
    try:
        doctor.main(config)
    except SystemExit as exit:
        status = exit.code
    return status, capsys.readouterr().out


def found(text):
    """Problem -> number printed for it."""
    table = {}
    for line in text.splitlines():
        name, count = line[2:26].strip(), line[27:45].split()
        if line.startswith("  ") and count:
            table.setdefault(name, count[0])
    return table


def test_every_planted_fault_is_found_and_the_fixed_list_is_clean(tmp_path, capsys):
    entries = plant(tmp_path)
    (tmp_path / "pairs.json").write_text(json.dumps(entries))
    config = {
        "data": [str(tmp_path / "pairs.json")],
        "image_root": tmp_path,
        "fix": tmp_path / "clean",
        "page": tmp_path / "page.html",
    }
    status, text = run(capsys, config)
    expected = {
        "missing": "1", "unreadable": "1", "no text": "1", "empty text": "1", "truncated": "1",
        "tiny": "1", "thin": "1", "rotated by EXIF": "1", "one colour": "1", "overlong": "1",
        "wrongly encoded": "1", "repeated sample": "1", "same bytes": "1", "near duplicates": "1",
    }  # fmt: skip
    table = found(text)
    assert status == 1 and {name: table.get(name) for name in expected} == expected, text
    assert table["samples"] == "22" and "near.jpg" in text and "a caf" in text
    clean = list(read_json_lines(tmp_path / "clean/pairs.jsonl"))
    images = {entry["image"] for entry in clean}
    dropped = [e["image"] for e in entries if e["image"] not in images]
    assert clean[5]["caption"] == "a café by night"
    assert dropped == ["5.jpg", "unreadable.jpg", "missing.jpg"] and len(clean) == 18
    page = (tmp_path / "page.html").read_text()
    assert "near duplicates" in page and page.count("data:image/jpeg") > 10
    status, text = run(
        capsys, config | {"data": [str(tmp_path / "clean/pairs.jsonl")], "fix": None}
    )
    assert status == 0 and not set(found(text)) & {"missing", "unreadable", "repeated sample"}


def test_images_that_splits_share(tmp_path, capsys):
    for n in range(8):
        (tmp_path / f"{n}.png").write_bytes(jpeg(scene(n)))
    (tmp_path / "6_again.jpg").write_bytes(jpeg(scene(6), quality=70))
    splits = {"train": [0, 1, 2, 3, 4, 6], "val": [4, 5], "test": [1, "6_again", 7]}
    for split, members in splits.items():
        names = [f"{n}.png" if isinstance(n, int) else f"{n}.jpg" for n in members]
        entries = [{"image": name, "caption": f"a {name}"} for name in names]
        (tmp_path / f"{split}.json").write_text(json.dumps(entries))
    data = [str(tmp_path / f"{split}.json") for split in splits]
    status, text = run(capsys, {"data": data, "image_root": tmp_path, "fix": tmp_path / "clean"})
    assert status == 1 and found(text)["in a later split"] == "3"
    kept = [entry["image"] for entry in read_json_lines(tmp_path / "clean/train.jsonl")]
    assert kept == ["0.png", "2.png", "3.png"]
    assert len(list(read_json_lines(tmp_path / "clean/test.jsonl"))) == 3


def test_class_folders_and_recognition_lists_that_share_images(tmp_path, capsys):
    splits = {"train": {"cat": [0, 1, 2], "dog": [3, 4]}, "val": {"cat": [5, 1], "dog": [6]}}
    for split, classes in splits.items():
        lines = []
        for name, members in classes.items():
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for n in members:
                path = tmp_path / "images" / split / name / f"{split}{n}.jpg"
                path.write_bytes(jpeg(scene(n), quality=90 if split == "train" else 70))
                lines.append(f"images/{split}/{name}/{path.name} : {name}")
        (tmp_path / f"{split}.list").write_text("\n".join(lines))
    status, text = run(capsys, {"data": [str(tmp_path / "images")]})  # its train/ and val/
    assert status == 1 and found(text)["in a later split"] == "1"
    assert text.index("in a later split") < text.index("images/val\n"), "of the training set"
    lists = [str(tmp_path / f"{split}.list") for split in splits]
    status, text = run(capsys, {"data": lists, "image_root": tmp_path})
    assert status == 1 and found(text)["in a later split"] == "1"
    assert survey.split_folders([str(tmp_path / "images/train"), "x.csv"])[1:] == ["x.csv"]


def test_questions_answers_ids_and_boxes(tmp_path, capsys):
    (tmp_path / "a.jpg").write_bytes(jpeg(scene(1)))
    (tmp_path / "answers.json").write_text('["red", "two"]')
    entries = [
        {"image": "a.jpg", "question": "what?", "question_id": "01", "answer": ["red", "x"]},
        {"image": "a.jpg", "question": "how many?", "question_id": "01", "answer": "three"},
        {"image": "a.jpg", "question": "why?", "question_id": "1", "answer": [""]},
        {"image": "a.jpg", "text": "left", "ref_id": 3, "bbox": [10, 10, 90, 10]},
        {"image": "a.jpg", "text": "right", "ref_id": 4, "bbox": [10, 10, 86, 54]},
        {"image": "a.jpg", "text": "above", "ref_id": 5, "bbox": [10, 10, "9", 9]},
        {"image": "a.jpg", "text": "below", "ref_id": 6, "bbox": {"x": 1}},
    ]
    (tmp_path / "q.json").write_text(json.dumps(entries))
    config = {"data": [str(tmp_path / "q.json")], "image_root": tmp_path}
    status, text = run(capsys, config | {"answer_list": tmp_path / "answers.json"})
    table = found(text)
    assert status == 1
    names = ("answer not in the list", "no answer", "repeated id", "box outside", "no box")
    assert [table[name] for name in names] == ["1", "1", "1", "1", "2"]
    (tmp_path / "answers.json").write_text('["red", ["two"]]')
    with pytest.raises(UserError, match=r"gone\.json: no such file"):
        run(capsys, config | {"answer_list": tmp_path / "gone.json"})
    with pytest.raises(UserError, match=r"answers\.json: expected a JSON list of answers"):
        run(capsys, config | {"answer_list": tmp_path / "answers.json"})
    (tmp_path / "v2.json").write_text('{"questions": [{"question": "what?"}]}')
    with pytest.raises(UserError, match="no images in it; these are VQA's own questions"):
        run(capsys, {"data": [str(tmp_path / "v2.json")]})
    assert not box_inside([0, 0, 0, 5], (9, 9)) and box_inside([0, 0, 9, 9], (9, 9))


QUESTION = {"image": "a.jpg", "question": "what?"}


@pytest.mark.parametrize(
    "entries, problem",
    [
        ([QUESTION | {"answer": "red"}], None),
        ([QUESTION | {"answer": "blue"}], "answer not in the list"),
        ([QUESTION | {"answer": [""]}], "no answer"),
        ([{"image": "a.jpg", "caption": "a"}] * 2, "repeated sample"),
        ([{"image": "a.jpg", "caption": "dog " * 76}], "overlong"),  # 78 tokens: cut, no harm
    ],
)
def test_each_harm_alone_is_one(tmp_path, capsys, entries, problem):
    (tmp_path / "a.jpg").write_bytes(jpeg(scene(1)))
    (tmp_path / "answers.json").write_text('["red"]')
    (tmp_path / "q.json").write_text(json.dumps(entries))
    config = {"data": [str(tmp_path / "q.json")], "image_root": tmp_path}
    status, text = run(capsys, config | {"answer_list": tmp_path / "answers.json"})
    assert status == (problem not in (None, "overlong"))
    assert found(text).get(problem or "nothing wrong") in ("1", None)
    assert (problem or "nothing wrong") in text


def test_figures_of_the_texts(tmp_path, capsys):
    (tmp_path / "a.jpg").write_bytes(jpeg(scene(1)))
    entries = [{"image": "a.jpg", "caption": "dog " * words} for words in range(56, 76)]
    (tmp_path / "q.json").write_text(json.dumps(entries))
    status, text = run(capsys, {"data": [str(tmp_path / "q.json")], "image_root": tmp_path})
    assert status == 0 and "nothing wrong" in text, "77 tokens fit"
    assert "67.5 on average, 95 % up to 76, most 77" in text
    part = SimpleNamespace(
        images=lambda: [SimpleNamespace(size=(4, 9))] * 6,
        samples=lambda: 60,
        facts=[],
        classes=Counter(),
        seconds=2.0,
    )
    rows = dict(doctor.figures(part, workers=4))
    assert rows["reading"] == "3 images a second and core; an epoch 5 s"


def test_rows_of_what_was_found():
    found = [{"overlong": "long one"}, {"missing": "gone.jpg"}]
    part = SimpleNamespace(
        counts=lambda: Counter(overlong=9, missing=1),
        samples=lambda: 10,
        facts=[SimpleNamespace(problems=problems) for problems in found],
        findings=[],
        repeated_texts=lambda: [(f"text {n}", 9 - n) for n in range(5)],
        repeated_ids=lambda: ["7", "8"],
        same=[],
        near=[[SimpleNamespace(name=f"{n}.jpg") for n in range(4)]],
    )
    assert doctor.problem_rows(part) == [
        ("missing", "1 (10.0 %)", "gone.jpg"),  # what cannot be trained on comes first
        ("overlong", "9 (90.0 %)", "long one"),
        *(("repeated text", f"{9 - n}", f"text {n}") for n in range(3)),
        ("repeated id", "2", "7"),
        ("near duplicates", "1 groups", "0.jpg, 1.jpg, 2.jpg"),
    ]


def test_class_folders_and_shards(tmp_path, capsys):
    for name, numbers in (("cat", (1, 2, 3)), ("dog", (4,))):
        (tmp_path / "set" / name).mkdir(parents=True)
        for n in numbers:
            (tmp_path / f"set/{name}/{n}.jpg").write_bytes(jpeg(scene(n)))
    status, text = run(capsys, {"data": [str(tmp_path / "set")]})
    assert status == 0 and "2; cat: 3 … dog: 1" in text
    samples = [(f"{n}", {"jpg": jpeg(scene(n)), "txt": b"a scene"}) for n in range(3)]
    samples[1][1]["jpg"] = b"no image"
    write_shard(tmp_path / "0.tar", samples)
    status, text = run(capsys, {"data": [str(tmp_path / "0.tar")]})
    assert status == 1 and found(text)["unreadable"] == "1" and found(text)["samples"] == "3"
    for data, remedy in (("0.tar", "are shards; clean the list"), ("set", "leave out --fix")):
        with pytest.raises(UserError, match=remedy):  # before anything is looked at
            doctor.main(doctor.Config([str(tmp_path / data)], fix=tmp_path / "clean", workers=1))
        assert capsys.readouterr().out == ""


def test_ranges_kept_as_files_give_the_report_of_one_look(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(survey, "BLOCK", 2)
    samples = [(f"{n}", {"jpg": jpeg(scene(n % 3)), "txt": b"a scene"}) for n in range(4)]
    write_shard(tmp_path / "0.tar", samples[:2])
    write_shard(tmp_path / "1.tar", [*samples[2:], ("bad", {"jpg": b"no", "txt": b"\xe9t\xe9"})])
    (tmp_path / "a.jpg").write_bytes(jpeg(scene(1)))
    entries = [{"image": f"{name}.jpg", "caption": "a text"} for name in ("a", "gone", "a")]
    (tmp_path / "list.json").write_text(json.dumps(entries))
    data = [str(tmp_path / "{0,1}.tar"), str(tmp_path / "list.json")]

    def look(**more):
        config = {"data": data, "image_root": tmp_path} | more
        status, text = run(capsys, config)
        return status, [line for line in text.splitlines() if "images a second" not in line]

    whole = look()
    facts = {"facts": tmp_path / "facts"}
    for text in ("0/2", "1/2"):
        status, said = look(**facts, sharing=doctor.Sharing(range=text))
        assert status == 0 and said == [f"{tmp_path}/facts: 2 of 4 pieces, 0 of them kept"]
    merged = {**facts, "sharing": doctor.Sharing(merge=True)}
    assert look(**merged) == look(**facts) == whole
    kept = tmp_path / "facts/000001.jsonl"
    kept.write_text("".join(kept.read_text().splitlines(keepends=True)[:-1]))  # cut off
    assert look(**facts) == whole
    assert "in a later split" in str(whole) and "unreadable" in str(whole)
    (tmp_path / "facts/000001.jsonl").unlink()
    (tmp_path / "a.jpg").write_bytes(jpeg(scene(9)))  # of entries 0 and 2: pieces 2 and 3
    with pytest.raises(UserError, match=r"facts: pieces 1-3 of 0-3 are missing"):
        look(**merged)
    _, said = look(**facts, sharing=doctor.Sharing(range="0/1"))
    assert said == [f"{tmp_path}/facts: 4 of 4 pieces, 1 of them kept"]
    (tmp_path / "answers.json").write_text('["red"]')
    changes = {"most": 5, "answer_list": tmp_path / "answers.json", "image_root": tmp_path / "x"}
    changed = {}
    for name, value in changes.items():  # each beside those before
        changed[name] = value
        _, said = look(**facts | changed, sharing=doctor.Sharing(range="0/1"))
        assert said == [f"{tmp_path}/facts: 4 of 4 pieces, 0 of them kept"], name
    monkeypatch.setattr(doctor, "submit_array", lambda *_: pytest.fail("submitted"))
    with pytest.raises(UserError, match=r"gone/vocab\.txt"):  # before a job is submitted
        look(**facts, tokenizer="gone/vocab.txt", sharing=doctor.Sharing(slurm=2))
    with pytest.raises(UserError, match="--facts: name a folder"):
        look(sharing=doctor.Sharing(range="0/2"))


def test_near_duplicates_are_told_from_other_images():
    signatures = []
    for n in range(300):
        for size, quality in (((96, 64), 95), ((75, 50), 50)):
            image = scene(n, (96, 64)).resize(size)
            pixels = np.array(Image.open(io.BytesIO(jpeg(image, quality=quality))))
            small = shrunk(doctor_tensor(pixels))
            signatures.append(signature(small))
    groups = near_duplicates(signatures)
    pairs = {tuple(group) for group in groups}
    assert {group for group in pairs if len(group) != 2 or group[1] != group[0] + 1} == set()
    assert len(pairs) >= 297
    assert near_duplicates([]) == near_duplicates([b"", b""]) == []


def signatures_of(images):
    stored = [np.array(Image.open(io.BytesIO(jpeg(image)))) for image in images]
    return [signature(shrunk(doctor_tensor(pixels))) for pixels in stored]


def test_near_duplicates_may_be_cropped_or_brightened_and_drawings_differ_by_their_outlines():
    drawings = []
    for draw, colour in product(("ellipse", "rectangle"), ((220, 40, 40), (30, 160, 60))):
        for x, y, side in ((10, 8, 84), (130, 90, 110)):
            drawing = Image.new("RGB", (256, 208), (245, 245, 240))
            getattr(ImageDraw.Draw(drawing), draw)([x, y, x + side, y + side], fill=colour)
            drawings.append(drawing)
    assert near_duplicates(signatures_of(drawings)) == []
    cropped = brightened = 0
    for photo in (scene(seed) for seed in range(20)):
        width, height = photo.size
        for box in ((0.05 * width, 0, width, height), (0, 0, 0.95 * width, 0.95 * height)):
            pair = [photo, photo.crop([round(edge) for edge in box])]
            cropped += near_duplicates(signatures_of(pair)) == [[0, 1]]
        for factor in (0.85, 1.15):
            pair = [photo, brighter(photo, factor)]
            brightened += near_duplicates(signatures_of(pair)) == [[0, 1]]
    assert cropped >= 36 and brightened == 40
    same = [drawings[0], drawings[0].resize((180, 146)), brighter(drawings[0], 0.85)]
    assert near_duplicates(signatures_of(same)) == [[0, 1, 2]]


def brighter(image, factor):
    return ImageEnhance.Brightness(image).enhance(factor)


def doctor_tensor(pixels):
    import torch

    return torch.from_numpy(pixels).permute(2, 0, 1)


def test_texts():
    assert text_problems("naïve café, 漢字 “quoted”", 5, 77) == []
    assert text_problems("half \ufffd", 5, 77) == ["wrongly encoded"]
    assert text_problems("\u200b", 2, 77) == ["empty text"]


def test_the_command_line_takes_the_data_first(tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg(scene(1)))
    (tmp_path / "p.csv").write_text("filepath,title\na.jpg,a scene\n")
    flags = [tmp_path / "p.csv", "--image-root", tmp_path, "--workers", "1"]
    flags += ["--page", tmp_path / "page.html"]
    assert "nothing wrong" in run_script("scripts/doctor.py", flags)
    assert "nothing wrong" in (tmp_path / "page.html").read_text()


# ---- classes
def findings(shown, listed=(), trained=None):
    found = class_findings(Counter(shown), listed, trained)
    return {each.problem: (each.classes, each.example, each.harmful) for each in found}


def test_class_names_are_compared_with_the_list_and_the_training_set():
    listed = ["cat", "hot dog", "crane", "crane", "zebra"]
    found = findings({"cat": 3, "hotdog": 2, "Crane": 1}, listed)
    unknown = (2, "hotdog, Crane; did the list mean hot dog?", True)
    assert found["class not in the list"] == unknown
    assert found["class without images"] == (3, "hot dog, crane, zebra", False)
    assert found["repeated class name"] == (1, "crane", False)
    assert found["similar class names"] == (2, "hotdog = hot dog; Crane = crane", False)
    assert findings({"cat": 3, "dog": 1}) == {}
    never = findings({"cat": 3, "cow": 1}, trained=["cat", "dog"])
    assert never == {"class never trained": (1, "cow", True)}


def test_classes_of_very_different_sizes():
    found = findings({"cat": 500, "dog": 11, "cow": 10, "ape": 1})
    assert found == {"unbalanced classes": (2, "cat: 500 … ape: 1 images", False)}


@pytest.mark.parametrize(
    ("names", "groups"),
    [
        (["Hot_dog", "hot-dog", "hotdogs"], [["Hot_dog", "hot-dog", "hotdogs"]]),
        (["café", "Cafe"], [["café", "Cafe"]]),
        (["glass", "glas", "bus", "bu"], []),
        (["漢", "字", "-", "_"], []),
    ],
)
def test_names_that_are_alike(names, groups):
    assert similar_names(names) == groups


def test_labels_become_names():
    labels = Counter({"0": 2, "2": 1})
    assert names_of(labels, ["a", "b"]) == {"0": "a", "2": "2"}


def test_class_folders_without_images_are_found_beside_the_rest(tmp_path, capsys):
    for number, name in enumerate(("ape", "cow")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.jpg").write_bytes(jpeg(scene(number)))
    (tmp_path / "bee").mkdir()
    (tmp_path / "cow/2.jpg").write_bytes(b"no image")
    status, text = run(capsys, {"data": [str(tmp_path)]})
    assert status == 1 and "folder without images    1 classes          bee" in text
    assert found(text)["unreadable"] == "1" and "cow: 2 … ape: 1" in text
    with pytest.raises(UserError, match=r"bee: no images of this class"):  # as training says
        FolderRecords(tmp_path)


def test_folders_are_no_classes_where_the_samples_have_others(tmp_path):
    """As those beside the shards of a folder."""
    for name in ("cat", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "cat/a.jpg").write_bytes(jpeg(scene(1)))
    found = []
    for labels in ({"0": 2}, {"0": 2, "bird": 2}):
        part = SimpleNamespace(data=str(tmp_path), balance=partial(Counter, labels))
        class_checks.look_at_classes([part])
        found.append([finding.problem for finding in part.findings])
    assert found == [["folder without images"], []]


def test_class_folders_are_compared_with_a_list_of_names(tmp_path, capsys, monkeypatch):
    for split, names in (("train", ("cat", "dog")), ("val", ("cat", "doge"))):
        for number, name in enumerate(names):
            (tmp_path / split / name).mkdir(parents=True)
            seed = number + 10 * (split == "val")
            (tmp_path / split / name / "1.jpg").write_bytes(jpeg(scene(seed)))
    (tmp_path / "names.txt").write_text("cat\ndog\ncow\n")
    data = [str(tmp_path / "train"), str(tmp_path / "val")]
    asked = []
    real = class_checks.class_folders
    monkeypatch.setattr(
        class_checks, "class_folders", lambda path: asked.append(path) or real(path)
    )
    status, text = run(capsys, {"data": data, "classes": tmp_path / "names.txt"})
    first, second = text.split(f"\n{data[1]}\n")
    assert found(first)["class without images"] == "1" and "class not in" not in first
    assert found(second)["class not in the list"] == "1" and "did the list mean dog?" in second
    assert found(second)["class never trained"] == "1" and status == 1
    assert asked == [tmp_path / "train", tmp_path / "val"]  # not once for each label
    assert run(capsys, {"data": data[:1]})[0] == 0


# ---- fixes
def test_what_can_be_fixed_in_a_list_is_fixed_and_the_rest_left_out(tmp_path, capsys):
    for number in range(8):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(scene(number)))  # 96 x 64
    (tmp_path / "answers.json").write_text('["red"]')
    captions = ["a caf\u00c3\u00a9", "\ufeff", "a dog"]
    entries = [
        {"image": "0.jpg", "caption": captions, "caption_weights": [1, 2, 3]},
        {"image": "1.jpg", "question": "what?", "question_id": 1, "answer": "red"},
        {"image": "2.jpg", "question": "who?", "question_id": 1, "answer": "red"},
        {"image": "3.jpg", "question": "why?", "question_id": 2, "answer": ["blue"]},
        {"image": "4.jpg", "text": "left", "ref_id": 1, "bbox": [-10, 20, 30, 60]},
        {"image": "5.jpg", "text": "right", "ref_id": 2, "bbox": [100, 0, 5, 5]},
        {"image": "6.jpg", "caption": "two", "boxes": [[90, 0, 10, 10, 0.5], [0, 0, 5, 5, 0.75]]},
        {"image": "4.jpg", "text": "the second expression of a box", "ref_id": 1},
    ]
    (tmp_path / "a.json").write_text(json.dumps(entries))
    config = {"data": [str(tmp_path / "a.json")], "image_root": tmp_path, "fix": tmp_path / "out"}
    status, text = run(capsys, config | {"answer_list": tmp_path / "answers.json"})
    fixed = list(read_json_lines(tmp_path / "out/a.jsonl"))
    assert status == 1 and f"{tmp_path}/out/a.jsonl: 5 of 8 entries" in text
    assert fixed[0] == {"image": "0.jpg", "caption": ["a café", "a dog"], "caption_weights": [1, 3]}
    assert fixed[1:] == [
        entries[1],
        {**entries[4], "bbox": [0, 20, 20, 44]},
        {**entries[6], "boxes": [[90, 0, 6, 10, 0.5], [0, 0, 5, 5, 0.75]]},
        entries[7],
    ]
    done = dict(line.strip().rsplit(None, 1) for line in text.split("entries\n")[1].splitlines())
    assert done == {
        "repeated id: left out": "1", "answer not in the list: left out": "1",
        "encodings fixed": "1", "blank captions removed": "1", "boxes clipped": "2",
        "boxes without area left out": "1",
    }  # fmt: skip
    again = config | {"data": [str(tmp_path / "out/a.jsonl")], "fix": None}
    status, text = run(capsys, again | {"answer_list": tmp_path / "answers.json"})
    assert status == 0 and "nothing wrong" in text


def test_no_list_is_written_over_by_the_fixed_ones(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.jpg").write_bytes(jpeg(scene(ord(name))))
        rows = [{"image": f"{name}/0.jpg", "caption": name}]
        (tmp_path / name / "train.jsonl").write_text(json.dumps(rows[0]) + "\n")
    lists = [str(tmp_path / name / "train.jsonl") for name in ("a", "b")]
    for data, folder, said in (
        (lists, "out", f"{lists[0]} and of {lists[1]} would both be called train"),
        (lists[:1], "a", "write to another folder"),
    ):
        with pytest.raises(UserError, match=said):
            run(capsys, {"data": data, "image_root": tmp_path, "fix": tmp_path / folder})
    run(capsys, {"data": lists[:1] * 2, "image_root": tmp_path, "fix": tmp_path / "out"})
    assert Path(lists[0]).read_text() == json.dumps({"image": "a/0.jpg", "caption": "a"}) + "\n"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["train.jsonl"]


def test_classes_that_are_not_in_the_list_are_left_out(tmp_path, capsys):
    entries = []
    for number, label in enumerate(("cat", "doge", "dog")):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(scene(number)))
        entries.append({"image": f"{number}.jpg", "label": label})
    (tmp_path / "a.json").write_text(json.dumps(entries))
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    config = {"data": [str(tmp_path / "a.json")], "image_root": tmp_path, "fix": tmp_path / "out"}
    status, text = run(capsys, config | {"classes": tmp_path / "names.txt"})
    assert status == 1 and "class not in the list: left out" in text
    assert list(read_json_lines(tmp_path / "out/a.jsonl")) == [entries[0], entries[2]]
