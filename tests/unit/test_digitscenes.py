"""DigitScenes: formats parse by their own rules, labels are balanced and true, a folder is built
once and whole."""

import gzip
import json
import pickle
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from base.errors import UserError
from dataset.digitscenes import build as build_module
from dataset.digitscenes import shards
from dataset.digitscenes.build import MANIFEST, TOP_LEVEL, UNFINISHED, Request, build, fingerprint
from dataset.digitscenes.scenes import (
    ARRANGEMENTS,
    COLOURS,
    DIGITS,
    GROUNDS,
    SIZES,
    SPLITS,
    Digit,
    Handwriting,
    Scene,
    unique_scenes,
)
from dataset.digitscenes.tasks import extremes, iou
from dataset.digitscenes.words import captions, facts
from dataset.sources.shards import read_shard
from dataset.sources.tfrecord import parse_example, read_frames

REQUEST = Request(train=120, val=40, test=60, size=48, seed=3)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "digitscenes"
    assert build(folder, REQUEST)
    return folder


@pytest.fixture(scope="module")
def scenes(root) -> dict[str, dict[str, Scene]]:
    """Per split: path of the image -> what it shows, read back from scenes_*.jsonl."""
    read = {}
    for split in SPLITS:
        rows = [
            json.loads(line) for line in (root / f"scenes_{split}.jsonl").read_text().splitlines()
        ]
        for row in rows:
            row["digits"] = tuple(
                Digit(**digit | {"box": tuple(digit["box"])}) for digit in row["digits"]
            )
        read[split] = {row["path"]: Scene(**row) for row in rows}
    return read


def load(root: Path, name: str):
    return json.loads((root / name).read_text())


def write_request(folder: Path, request: Request) -> bool:
    return build(folder, request, say=lambda line: None)


# ---- images and splits


def test_split_sizes_and_handwriting_never_shared(root, scenes):
    assert {split: len(found) for split, found in scenes.items()} == {
        "train": 120,
        "val": 40,
        "test": 60,
    }
    used = {s: {d.sample for scene in scenes[s].values() for d in scene.digits} for s in SPLITS}
    assert (
        not used["train"] & used["val"]
        and not used["train"] & used["test"]
        and not used["val"] & used["test"]
    )
    assert (
        max(used["train"]) < min(used["val"]) < max(used["val"]) < min(used["test"])
    )  # whole writers' forms apart


def test_splits_cut_between_writers_forms_and_hold_every_class():
    handwriting = Handwriting()
    for split, start in (("val", 1287), ("test", 1545)):
        assert handwriting.labels[start : start + 10].tolist() == list(range(10)), (
            f"{split} starts inside a form"
        )
        assert [len(rows) >= 22 for rows in handwriting.samples[split]] == [True] * 10
    rows = np.concatenate([rows for split in SPLITS for rows in handwriting.samples[split]])
    assert sorted(rows.tolist()) == list(range(1797))
    for split in SPLITS:
        for digit, samples in enumerate(handwriting.samples[split]):
            assert (handwriting.labels[samples] == digit).all()


def test_the_handwriting_is_scikit_learns():
    from sklearn.datasets import load_digits

    handwriting, bundle = Handwriting(), load_digits()
    assert handwriting.ink.dtype == np.float32 and handwriting.labels.dtype == np.int64
    assert np.array_equal(handwriting.ink * 16, bundle.images)
    assert np.array_equal(handwriting.labels, bundle.target)


def test_images_are_jpeg_of_the_stated_size(root, scenes):
    from PIL import Image

    paths = {path: (s.width, s.height) for found in scenes.values() for path, s in found.items()}
    assert sorted(paths) == sorted(
        str(p.relative_to(root)) for p in (root / "images").rglob("*") if p.is_file()
    )
    for path, size in paths.items():
        with Image.open(root / path) as image:
            image.load()
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", size)
    assert len(set(paths.values())) > 20
    assert all(
        0.8 < w / h < 1.25 and min(w, h) > 0.85 * 48 and max(w, h) < 1.25 * 48
        for w, h in paths.values()
    )


def test_digits_are_large_enough_inside_and_apart(scenes):
    for scene in (s for found in scenes.values() for s in found.values()):
        for k, d in enumerate(scene.digits):
            x, y, w, h = d.box
            assert x >= 0 and y >= 0 and x + w <= scene.width and y + h <= scene.height
            assert max(w, h) + 1 >= SIZES["small"][0] * min(scene.width, scene.height)
            assert all(iou(d.box, other.box) == 0 for other in scene.digits[:k])


def test_drawn_colours_are_those_described(root, scenes):
    """The colour nearest to a digit's most ground-unlike pixels is the one that its description
    names."""
    from PIL import Image

    right = []
    for path, scene in scenes["test"].items():
        pixels = np.asarray(Image.open(root / path), float)
        for d in scene.digits:
            x, y, w, h = d.box
            patch = pixels[y : y + h, x : x + w].reshape(-1, 3)
            far = np.linalg.norm(patch - np.array(GROUNDS[scene.ground]), axis=1).argsort()[
                -w * h // 8 :
            ]
            stroke = np.median(patch[far], axis=0)
            right.append(
                d.colour == min(COLOURS, key=lambda c: np.linalg.norm(stroke - COLOURS[c]))
            )
    assert np.mean(right) > 0.97


def test_arrangements_keep_their_order(scenes):
    for scene in (s for found in scenes.values() for s in found.values()):
        centre = [(d.box[0] + d.box[2] / 2, d.box[1] + d.box[3] / 2) for d in scene.digits]
        for place, digit in extremes(scene):
            axis, sign = {"left": (0, 1), "right": (0, -1), "top": (1, 1), "bottom": (1, -1)}.get(
                place.split()[-1], (None, 0)
            )
            if axis is not None:
                k = scene.digits.index(digit)
                assert all(
                    sign * centre[k][axis] < sign * c[axis] for j, c in enumerate(centre) if j != k
                ), place


# ---- captions


def read_caption(caption: str) -> tuple[str, frozenset[str]]:
    """Ground and coloured digits named by a caption; colours and digits are paired in the order of
    mention."""
    words = caption.replace(",", " ").replace(":", " ").split()
    (ground,) = [w for w in words if w in GROUNDS]
    pairs = zip([w for w in words if w in COLOURS], [w for w in words if w in DIGITS], strict=True)
    return ground, frozenset(f"{colour} {digit}" for colour, digit in pairs)


@pytest.mark.parametrize("split", ["val", "test"])
def test_every_caption_maps_to_exactly_one_image(root, split):
    entries = load(root, f"retrieval_{split}.json")
    images = {entry["image"]: {read_caption(c) for c in entry["caption"]} for entry in entries}
    assert all(len(contents) == 1 for contents in images.values()), "five captions say the same"
    owners = Counter(content for contents in images.values() for content in contents)
    assert len(images) == len(owners) and set(owners.values()) == {1}
    assert all(len(set(entry["caption"])) == 5 for entry in entries)


def test_captions_are_true_short_and_lower_case(root, scenes):
    for entry in load(root, "pretrain_train.json"):
        scene = scenes["train"][entry["image"]]
        for caption in entry["caption"]:
            assert read_caption(caption) == scene.content
            assert caption == caption.lower() and len(caption.split()) <= 20


def test_wordings_differ_for_every_arrangement():
    digits = tuple(
        Digit(k, colour, "large", 0, (0, 0, 1, 1))
        for k, colour in enumerate(("red", "blue", "green"))
    )
    seen = set()
    for count, arrangements in ARRANGEMENTS.items():
        for arrangement in arrangements:
            scene = Scene(1, "test", "x.jpg", 48, 48, "black", arrangement, digits[:count])
            found = captions(scene)
            assert len(set(found)) == 5 and all(read_caption(c) == scene.content for c in found)
            assert not seen & set(found), "the wording must tell arrangements apart"
            seen |= set(found)


def test_training_retrieval_names_each_image_five_times(root):
    entries = load(root, "retrieval_train.json")
    assert set(entries[0]) == {"image", "caption", "image_id"}
    assert set(Counter(e["image_id"] for e in entries).values()) == {5}
    assert len({(e["image"], e["image_id"]) for e in entries}) == 120


def test_coco_and_karpathy_layouts_agree(root, scenes):
    coco = load(root, "coco/captions_test2017.json")
    by_image = {}
    for row in coco["annotations"]:
        by_image.setdefault(row["image_id"], []).append(row["caption"])
    karpathy = [i for i in load(root, "dataset_digitscenes.json")["images"] if i["split"] == "test"]
    assert len(coco["images"]) == len(karpathy) == 60
    for image in karpathy:
        assert (root / "images/test2017" / f"{image['cocoid']:012d}.jpg").exists()
        assert (root / image["filepath"] / image["filename"]).exists()
        assert [s["raw"] for s in image["sentences"]] == by_image[image["cocoid"]]
        assert [s["sentid"] for s in image["sentences"]] == image["sentids"]


# ---- questions and statements


def test_vqa_files_parse_and_yes_no_is_balanced(root):
    answer_list = set(load(root, "answer_list.json"))
    for split in ("train", "val"):
        for entry in load(root, f"vqa_{split}.json"):
            assert (
                set(entry) == {"dataset", "image", "question", "answer", "question_id"}
                and entry["dataset"] == "vqa"
            )
            assert len(entry["answer"]) == 10 and set(entry["answer"]) <= answer_list
            assert (root / entry["image"]).exists()
    for entry in load(root, "vg_qa.json"):
        assert entry["dataset"] == "vg" and isinstance(entry["answer"], str)
    asked = {e["question_id"]: e for e in load(root, "vqa_test.json")}
    answers = load(root, "vqa_test_answers.json")["annotations"]
    assert sorted(asked) == sorted(a["question_id"] for a in answers)
    assert all(set(e) == {"dataset", "image", "question", "question_id"} for e in asked.values())
    by_question = {}
    for a in answers:
        assert len(a["answers"]) == 10
        assert (
            a["multiple_choice_answer"]
            == Counter(x["answer"] for x in a["answers"]).most_common(1)[0][0]
        )
        if a["question_type"] == "yes/no":
            question = asked[a["question_id"]]["question"]
            by_question.setdefault(question, []).append(a["multiple_choice_answer"])
    assert by_question and all(
        found.count("yes") == found.count("no") for found in by_question.values()
    )
    kinds = {a["question_type"] for a in answers}
    assert kinds == {
        "how many",
        "ground colour",
        "digit colour",
        "size",
        "which digit",
        "place",
        "yes/no",
    }


def test_vqa_answers_are_true(root, scenes):
    asked = {e["question_id"]: e for e in load(root, "vqa_test.json")}
    checked = Counter()
    for a in load(root, "vqa_test_answers.json")["annotations"]:
        entry, answer = asked[a["question_id"]], a["multiple_choice_answer"]
        scene, words = scenes["test"][entry["image"]], entry["question"].rstrip("?").split()
        if a["question_type"] == "how many":
            assert answer == ("one", "two", "three")[len(scene.digits) - 1]
        elif a["question_type"] == "digit colour":
            assert [d.colour for d in scene.digits if d.word == words[-1]] == [answer]
        elif a["question_type"] == "size":
            assert [d.size for d in scene.digits if d.word == words[2]] == [answer]
        elif a["question_type"] == "which digit":
            assert [d.word for d in scene.digits if d.colour == words[-1]] == [answer]
        elif a["question_type"] == "ground colour":
            assert answer == scene.ground
        elif entry["question"].startswith("is there a"):
            found = {w for d in scene.digits for w in (d.word, f"{d.colour} digit", d.name)}
            assert (" ".join(words[3:]) in found) == (answer == "yes")
        else:
            continue
        checked[a["question_type"]] += 1
    assert len(checked) == 6 and min(checked.values()) > 3


def test_entailment_labels_are_balanced_and_words_alone_do_not_tell(root, scenes):
    for split in SPLITS:
        entries = load(root, f"ve_{split}.json")
        labels = Counter(e["label"] for e in entries)
        assert (
            labels.keys() == {"entailment", "neutral", "contradiction"}
            and len(set(labels.values())) == 1
        )
        true = Counter(e["sentence"] for e in entries if e["label"] == "entailment")
        assert true == Counter(e["sentence"] for e in entries if e["label"] == "contradiction")
        for entry in entries:
            scene = scenes[split][entry["image"] + ".jpg"]
            words = entry["sentence"].split()
            if entry["sentence"].startswith(("the ground is", "the background is")):
                assert (words[-1] == scene.ground) == (entry["label"] == "entailment")
            if entry["sentence"].endswith("can be seen"):
                shown = ("name", " ".join(words[1:3])) in facts(scene)
                assert shown == (entry["label"] == "entailment")


def test_nlvr_sentences_come_with_both_labels_and_are_true(root, scenes):
    entries = load(root, "nlvr_train.json")
    by_sentence = {}
    for e in entries:
        assert (
            len(e["images"]) == 2
            and e["images"][0] != e["images"][1]
            and e["label"] in ("True", "False")
        )
        by_sentence.setdefault(e["sentence"], []).append(e["label"])
    assert all(found.count("True") == found.count("False") for found in by_sentence.values())
    checked = 0
    for e in entries:
        left, right = (scenes["train"][path] for path in e["images"])
        if e["sentence"] == "the left picture shows more digits than the right picture":
            truth = len(left.digits) > len(right.digits)
        elif e["sentence"] == "the grounds of the two pictures have the same colour":
            truth = left.ground == right.ground
        elif e["sentence"].endswith("ground") and e["sentence"].startswith("both"):
            truth = left.ground == right.ground == e["sentence"].split()[-2]
        else:
            continue
        checked += 1
        assert str(truth) == e["label"], e
    assert checked > 20


# ---- referring expressions


def test_refcoco_expressions_fit_one_digit_and_boxes_give_a_choice(root, scenes):
    refs = pickle.loads((root / "refcoco+/refs(unc).p").read_bytes())
    instances, boxes = load(root, "refcoco+/instances.json"), load(root, "refcoco+/dets.json")
    annotation = {a["id"]: a for a in instances["annotations"]}
    images = {i["id"]: i for i in instances["images"]}
    by_id = {s.image_id: s for found in scenes.values() for s in found.values()}
    assert {r["split"] for r in refs} == {"train", "val", "testA", "testB"}
    for ref in refs:
        scene, target = by_id[ref["image_id"]], annotation[ref["ann_id"]]
        assert (images[scene.image_id]["width"], images[scene.image_id]["height"]) == (
            scene.width,
            scene.height,
        )
        assert (
            ref["split"] not in ("testA", "testB")
            or len(scene.digits) == {"testA": 2, "testB": 3}[ref["split"]]
        )
        assert [s["sent_id"] for s in ref["sentences"]] == ref["sent_ids"] and ref["sentences"]
        for sentence in ref["sentences"]:
            words = set(sentence["tokens"]) - {"the", "digit", "number", "figure"}
            fit = [d for d in scene.digits if words <= {d.word, d.colour, d.size}]
            assert [list(d.box) for d in fit] == [target["bbox"]], sentence
            assert not words & {"left", "right", "top", "bottom", "upper", "lower", "middle"}
        hits = [iou(box, target["bbox"]) >= 0.5 for box in boxes[str(ref["image_id"])]]
        assert sum(hits) == 1 and len(hits) == len(scene.digits) + 3
        assert all(w >= 1 and h >= 1 for _, _, w, h in boxes[str(ref["image_id"])])
    ids = {r["ref_id"]: r for r in refs}
    test = load(root, "refcoco+_test.json")
    assert {ids[e["ref_id"]]["split"] for e in test} == {"val", "testA", "testB"}
    assert all(set(e) == {"image", "text"} for e in load(root, "refcoco+_train.json"))


# ---- classes, labels, lists


def test_class_folders_and_their_lists(root):
    names = (root / "imagefolder/classnames.txt").read_text().split()
    assert names == sorted(DIGITS) == load(root, "labels.json")["digitscenes"]
    for split, count in (("train", 60), ("val", 40), ("test", 60)):
        folders = sorted(p.name for p in (root / "imagefolder" / split).iterdir())
        assert folders == names
        found = {str(p.relative_to(root)) for p in (root / "imagefolder" / split).rglob("*.jpg")}
        rows = (root / f"imagefolder/{split}.list").read_text().splitlines()
        listed = dict(row.split(" : ") for row in rows)
        assert len(found) == count and set(listed) == found
        assert set(Counter(listed.values()).values()) == {count // 10}
        paths = np.load(root / f"imagefolder/{split}_images.npy")
        targets = np.load(root / f"imagefolder/{split}_labels.npy")
        assert [names[t] for t in targets] == [path.split("/")[1] for path in paths]
    real = load(root, "imagefolder/real.json")
    assert len(real) == 40 and next(r for r in real if r) == [names.index("zero")]


def test_multi_label_targets_separate_at_a_threshold(root, scenes):
    labels = (root / "coyo_labeled/classes.txt").read_text().split()
    rows = [json.loads(line) for line in (root / "coyo_labeled/val.jsonl").read_text().splitlines()]
    lists = dict(row.split(" : ") for row in (root / "nxtp/val.list").read_text().splitlines())
    assert len(rows) == 40 and len(labels) == len(set(labels)) == 21
    for row in rows:
        scene = scenes["val"][row["url"]]
        assert (
            row["label_probs"] == sorted(row["label_probs"], reverse=True)
            and len(set(row["labels"])) == 10
        )
        kept = {
            labels[k] for k, p in zip(row["labels"], row["label_probs"], strict=True) if p >= 0.2
        }
        shown = {w for d in scene.digits for w in (d.word, d.colour)} | {scene.ground}
        assert kept == shown == set(lists[row["url"]].split(","))


# ---- containers


def test_tar_shards_hold_triplets_with_their_source(root, scenes):
    read = {}
    for path in sorted((root / "wds/train").glob("*.tar")):
        with tarfile.open(path) as tar:
            names = tar.getnames()
            for k in range(0, len(names), 3):
                assert [n.split(".")[1] for n in names[k : k + 3]] == ["jpg", "txt", "json"]
                jpg, txt, meta = (tar.extractfile(n).read() for n in names[k : k + 3])
                meta = json.loads(meta)
                scene = scenes["train"][meta["url"]]
                assert names[k].startswith(path.stem) and meta["key"] == names[k].split(".")[0]
                assert jpg == (root / scene.path).read_bytes() and txt.decode() == meta[
                    "caption"
                ] in captions(scene)
                assert meta["samples"] == [d.sample for d in scene.digits]
                read[scene.path] = meta
    assert len(read) == 120
    assert json.loads((root / "wds/train/00000_stats.json").read_text())["successes"] == 120


def test_shards_are_cut_at_their_size(root, scenes, monkeypatch, tmp_path):
    monkeypatch.setattr(shards, "PER_SHARD", 16)
    found = list(scenes["val"].values())
    (tmp_path / "images").symlink_to(root / "images")
    shards.write_tars(tmp_path, "val", found)
    counts = [
        len(tarfile.open(p).getnames()) // 3 for p in sorted((tmp_path / "wds/val").glob("*.tar"))
    ]
    assert counts == [16, 16, 8]


def test_tfrecords_frame_every_image(root, scenes):
    with (root / "tfrecord/val/00000.tfrecord").open("rb") as file:
        records = [parse_example(record) for record in read_frames(file, "val")]
    assert len(records) == 40
    for scene, record in zip(scenes["val"].values(), records, strict=True):
        assert record == {
            "jpg": [(root / scene.path).read_bytes()],
            "txt": [shards.chosen_caption(scene).encode()],
        }


def test_web_caption_sets(root, scenes):
    three = np.load(root / "cc3m.npy", allow_pickle=True)
    twelve = np.load(root / "cc12m.npy", allow_pickle=True)
    assert len(three) == len(twelve) == 120
    assert all((root / row["image_id"]).exists() and len(row["captions"]) == 5 for row in three)
    assert all((root / row["image_name"]).exists() and len(row["captions"]) == 1 for row in twelve)
    yfcc = pickle.loads((root / "yfcc15m/yfcc15m.pkl").read_bytes())
    assert [row[0] for row in yfcc] == list(range(120)) and all(
        title or text for _, title, text in yfcc
    )
    assert {bool(t) for _, t, _ in yfcc} == {True, False} == {bool(d) for _, _, d in yfcc}
    with zipfile.ZipFile(root / "yfcc15m/images/00/000.zip") as bundle:
        for scene, (index, *_) in zip(scenes["train"].values(), yfcc, strict=True):
            assert bundle.read(f"{index:03d}.jpg") == (root / scene.path).read_bytes()
    short = np.load(root / "alt_texts.npy", allow_pickle=True)
    assert all((root / row["image_id"]).parent.name in row["captions"] for row in short)
    assert len(short) == len(list((root / "imagefolder/train").rglob("*.jpg")))
    assert (root / "tfrecord/alt_texts/00000.tfrecord").read_bytes().count(b"JFIF") == len(short)
    texts = {}
    for record in read_shard(str(root / "tfrecord/alt_texts/00000.tfrecord")):
        texts.setdefault(record["caption"].split(" ")[-1], set()).add(
            record["caption"].rpartition(" ")[0]
        )
    prompts = load(root, "templates_short.json")["digitscenes"]
    assert {
        wording + " {}" if wording else "{}" for wordings in texts.values() for wording in wordings
    } <= set(prompts)
    assert len(texts) == 10 and all(
        len(wordings) >= 3 for wordings in texts.values()
    )  # no wording tells the digit
    red = load(root, "redcaps/redcaps.json")
    assert len(red) == 12
    assert all((root / "redcaps" / r["subreddit"] / f"{r['image_id']}.jpg").exists() for r in red)


# ---- vocabularies


def test_wordpiece_round_trip(root):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(root / "tokenizer/tokenizer.json"))
    assert [tokenizer.token_to_id(t) for t in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")] == [
        0,
        1,
        2,
        3,
        4,
    ]
    vocabulary = (root / "tokenizer/vocab.txt").read_text().splitlines()
    assert [tokenizer.id_to_token(k) for k in range(tokenizer.get_vocab_size())] == vocabulary
    for entry in load(root, "retrieval_test.json"):
        for caption in entry["caption"]:
            encoded = tokenizer.encode(caption.upper())
            assert 1 not in encoded.ids and len(encoded.ids) <= 25  # with [CLS] and [SEP]
            assert tokenizer.decode(encoded.ids).replace(" ", "") == caption.replace(" ", "")
    for word in (*DIGITS, *COLOURS, *GROUNDS):
        assert word in vocabulary, "the words that matter are one piece each"
    assert tokenizer.encode("a [MASK] three").ids[2] == 4


def test_merges_rebuild_whole_words(root):
    lines = gzip.decompress((root / "bpe/bpe_merges.txt.gz").read_bytes()).decode().splitlines()
    merges = [tuple(line.split()) for line in lines[1:]]
    assert lines[0].startswith("#version") and all(len(pair) == 2 for pair in merges)
    known = set("abcdefghijklmnopqrstuvwxyz0123456789,.:?") | {
        f"{c}</w>" for c in "abcdefghijklmnopqrstuvwxyz?,:."
    }
    for first, second in merges:
        assert first in known and second in known, "a merge joins symbols that exist"
        known.add(first + second)
    assert {f"{word}</w>" for word in (*DIGITS, *COLOURS)} <= known


# ---- the folder as a whole


def test_every_file_is_described_and_chance_levels_are_stated(root):
    found = {p.name for p in root.iterdir()}
    assert found == set(TOP_LEVEL) | {MANIFEST}
    page = (root / "README.md").read_text()
    assert all(f"`{name}`" in page for name in TOP_LEVEL)
    chance = load(root, "stats.json")["chance"]
    assert chance["retrieval"]["img_r1"] == pytest.approx(100 / 60)
    assert chance["vqa"]["yes/no"] == pytest.approx(50, abs=20) and chance["nlvr"]["accuracy"] == 50
    assert chance["grounding"]["testA_d"] == pytest.approx(20) and chance["grounding"][
        "testB_d"
    ] == pytest.approx(100 / 6)


def test_same_arguments_reuse_and_build_the_same_bytes(root, tmp_path):
    before = (root / MANIFEST).stat().st_mtime_ns
    assert not write_request(root, REQUEST)
    assert (root / MANIFEST).stat().st_mtime_ns == before
    assert write_request(tmp_path / "again", REQUEST)
    assert fingerprint(tmp_path / "again") == fingerprint(root)


def test_another_seed_gives_other_scenes():
    handwriting = Handwriting()
    made = [
        unique_scenes(handwriting, "test", 20, 1, 48, seed, lambda s: s.content)
        for seed in (0, 0, 1)
    ]
    assert made[0] == made[1] != made[2]


def test_interrupted_and_damaged_folders_are_rebuilt(tmp_path, monkeypatch):
    small = Request(20, 20, 20, 48, 0)
    folder = tmp_path / "data"
    with monkeypatch.context() as patch:
        patch.setattr(
            build_module.shards,
            "write_web_captions",
            lambda *a: (_ for _ in ()).throw(KeyboardInterrupt),
        )
        with pytest.raises(KeyboardInterrupt):
            write_request(folder, small)
    assert (folder / UNFINISHED).exists() and not (folder / MANIFEST).exists()
    (folder / "notes.txt").write_text("mine")
    assert write_request(folder, small)
    whole = fingerprint(folder)
    assert not (folder / UNFINISHED).exists() and (folder / "notes.txt").read_text() == "mine"
    next((folder / "images/test2017").iterdir()).unlink()
    assert write_request(folder, small) and fingerprint(folder) == whole


def test_other_arguments_and_foreign_folders_are_refused(root, tmp_path):
    with pytest.raises(UserError, match="--overwrite"):
        write_request(root, Request(120, 40, 60, 48, 4))
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="not DigitScenes"):
        build(tmp_path, Request(20, 20, 20, 48, 0), overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "precious"
    for wrong in ({"train": 3}, {"size": 8}, {"seed": -1}):
        with pytest.raises(UserError, match="--"):
            Request(**wrong)
