"""Annotation files of the SIMLA / ALBEF tasks, of the caption data sets and of the class folders.

Every function writes into `root` and puts paths relative to it into the files.
"""

import pickle
from pathlib import Path

import numpy as np

from base.writing import write_json, write_json_lines
from dataset.digitscenes.scenes import COLOURS, DIGITS, GROUNDS, Scene
from dataset.digitscenes.tasks import detections, entailment, expressions, pair_sentences, questions
from dataset.digitscenes.words import SHORT_TEMPLATES, FactIndex, captions

Split = dict[str, list[Scene]]
CLASS_FOLDERS = sorted(DIGITS)  # an image folder's classes come in alphabetical order
LABELS = (*DIGITS, *COLOURS, *GROUNDS)
TEMPLATES = (
    "a {}.",
    "a handwritten {}.",
    *(
        f"a {colour} {{}} on a {ground} ground."
        for colour, ground in zip(COLOURS, (*GROUNDS, "black"), strict=True)
    ),
)


def write_captions(root: Path, splits: Split) -> None:
    """Pre-training pairs, retrieval, COCO captions and the Karpathy file."""
    for split in ("train", "val"):
        pairs = [{"image": s.path, "caption": captions(s)} for s in splits[split]]
        write_json(root / f"pretrain_{split}.json", pairs)
    train = [
        {"image": s.path, "caption": c, "image_id": s.image_id}
        for s in splits["train"]
        for c in captions(s)
    ]
    write_json(root / "retrieval_train.json", train)
    for split in ("val", "test"):
        raw_images = [{"image": s.path, "caption": captions(s)} for s in splits[split]]
        write_json(root / f"retrieval_{split}.json", raw_images)
    for split, scenes in splits.items():
        images = [
            {"id": s.image_id, "file_name": Path(s.path).name, "width": s.width, "height": s.height}
            for s in scenes
        ]
        texts = [(s.image_id, k, c) for s in scenes for k, c in enumerate(captions(s))]
        rows = [
            {"image_id": image, "id": image * 5 + k, "caption": caption}
            for image, k, caption in texts
        ]
        write_json(
            root / f"coco/captions_{split}2017.json", {"images": images, "annotations": rows}
        )
    write_json(root / "dataset_digitscenes.json", karpathy(splits))


def karpathy(splits: Split) -> dict:
    """The layout of `dataset_coco.json` / `dataset_flickr30k.json`: all splits in one file,
    captions as sentences."""
    images = []
    for split, scenes in splits.items():
        for s in scenes:
            ids = [s.image_id * 5 + k for k in range(5)]
            sentences = [
                {
                    "raw": c,
                    "tokens": c.replace(",", "").replace(":", "").split(),
                    "imgid": s.image_id,
                    "sentid": i,
                }
                for c, i in zip(captions(s), ids, strict=True)
            ]
            folder = str(Path(s.path).parent)
            name = Path(s.path).name
            images.append(
                {
                    "filepath": folder,
                    "filename": name,
                    "imgid": s.image_id,
                    "cocoid": s.image_id,
                    "split": split,
                }
                | {"sentids": ids, "sentences": sentences}
            )
    return {"dataset": "digitscenes", "images": images}


def write_vqa(root: Path, indices: dict[str, FactIndex], seed: int) -> dict[str, list[dict]]:
    """VQA questions of all splits, Visual-Genome-style pairs, the answer list; returns the entries
    of every split.

    The test file has no answers; they lie beside it in the layout of the official VQA v2
    annotations.
    """
    made = {
        split: questions(index, np.random.default_rng([seed, 3, k]))
        for k, (split, index) in enumerate(indices.items())
    }
    number = 0
    for split, entries in made.items():
        for entry in entries:
            number += 1
            scene = indices[split].scenes[entry["scene"]]
            entry |= {"question_id": number, "image": scene.path, "image_id": scene.image_id}
    for split in ("train", "val"):
        rows = [
            {"dataset": "vqa", **pick(e, "image", "question"), "answer": e["answers"]}
            for e in made[split]
        ]
        rows = [row | pick(e, "question_id") for row, e in zip(rows, made[split], strict=True)]
        write_json(root / f"vqa_{split}.json", rows)
    test = [{"dataset": "vqa", **pick(e, "image", "question", "question_id")} for e in made["test"]]
    write_json(root / "vqa_test.json", test)
    write_json(root / "vqa_test_answers.json", official_answers(made["test"]))
    genome = questions(indices["train"], np.random.default_rng([seed, 4]), per_scene=2)
    scenes = indices["train"].scenes
    rows = [
        {"dataset": "vg", "image": scenes[e["scene"]].path, **pick(e, "question", "answer")}
        for e in genome
    ]
    write_json(root / "vg_qa.json", rows)
    write_json(
        root / "answer_list.json",
        sorted({a for entries in made.values() for e in entries for a in e["answers"]}),
    )
    return made


def pick(entry: dict, *keys: str) -> dict:
    return {key: entry[key] for key in keys}


def official_answers(entries: list[dict]) -> dict:
    """The annotations of VQA v2: per question the ten answers, the most common one and the
    types."""
    rows = []
    for e in entries:
        answer_type = {"yes/no": "yes/no", "how many": "number"}.get(e["type"], "other")
        answers = []
        for k, answer in enumerate(e["answers"], 1):
            answers.append({"answer_id": k, "answer": answer, "answer_confidence": "yes"})
        rows.append(
            {
                **pick(e, "question_id", "image_id"),
                "question_type": e["type"],
                "answer_type": answer_type,
                "multiple_choice_answer": e["answer"],
                "answers": answers,
            }
        )
    return {"data_type": "digitscenes", "data_subtype": "test2017", "annotations": rows}


def write_statements(
    root: Path, indices: dict[str, FactIndex], seed: int
) -> dict[str, dict[str, list[dict]]]:
    """SNLI-VE (`image` is the path without ".jpg") and NLVR2; returns {task: {split: entries}}."""
    made: dict[str, dict[str, list[dict]]] = {"ve": {}, "nlvr": {}}
    for k, (split, index) in enumerate(indices.items()):
        paths = [scene.path for scene in index.scenes]
        rows = []
        for e in entailment(index, np.random.default_rng([seed, 5, k])):
            image = paths[e["scene"]].removesuffix(".jpg")
            rows.append({"image": image, **pick(e, "sentence", "label")})
        pairs = []
        for e in pair_sentences(index, np.random.default_rng([seed, 6, k])):
            images = [paths[i] for i in e["scenes"]]
            pairs.append({"images": images, **pick(e, "sentence", "label")})
        made["ve"][split] = rows
        made["nlvr"][split] = pairs
        write_json(root / f"ve_{split}.json", rows)
        write_json(root / f"nlvr_{split}.json", pairs)
    return made


def write_refcoco(root: Path, splits: Split, seed: int) -> list[dict]:
    """RefCOCO+ on every scene with two or three digits; returns the refs.

    Of the test scenes those with two digits are testA and those with three are testB.
    """
    refs = []
    annotations = []
    images = []
    boxes = {}
    files: dict[str, list[dict]] = {"train": [], "test": []}
    for scene in (s for scenes in splits.values() for s in scenes if len(s.digits) > 1):
        rng = np.random.default_rng([seed, 7, scene.image_id])
        split = scene.split
        if split == "test":
            split = "testA" if len(scene.digits) == 2 else "testB"
        name = Path(scene.path).name
        images.append(
            {"id": scene.image_id, "file_name": name, "width": scene.width, "height": scene.height}
        )
        boxes[str(scene.image_id)] = detections(scene, rng)
        for k, digit in enumerate(scene.digits):
            ids = {"image_id": scene.image_id, "category_id": digit.digit + 1}
            ann_id = scene.image_id * 3 + k
            area = digit.box[2] * digit.box[3]
            annotations.append(
                {
                    "id": ann_id,
                    **ids,
                    "bbox": list(digit.box),
                    "area": area,
                    "iscrowd": 0,
                    "segmentation": [],
                }
            )
            texts = expressions(scene, digit, rng)
            sentences = [
                {"sent_id": ann_id * 2 + n, "sent": t, "raw": t, "tokens": t.split()}
                for n, t in enumerate(texts)
            ]
            ref = {"ref_id": len(refs), "ann_id": ann_id, **ids, "split": split, "file_name": name}
            ref["sentences"] = sentences
            ref["sent_ids"] = [sentence["sent_id"] for sentence in sentences]
            refs.append(ref)
            for text in texts:
                row = {"image": scene.path, "text": text}
                if split == "train":
                    files["train"].append(row)
                else:
                    files["test"].append(row | {"ref_id": ref["ref_id"]})
    categories = []
    for k, word in enumerate(DIGITS, 1):
        categories.append({"id": k, "name": word, "supercategory": "digit"})
    folder = root / "refcoco+"
    instances = {"images": images, "annotations": annotations, "categories": categories}
    write_json(folder / "instances.json", instances)
    write_json(folder / "dets.json", boxes)
    (folder / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
    for split, rows in files.items():
        write_json(root / f"refcoco+_{split}.json", rows)
    return refs


def visible_labels(scene: Scene) -> list[int]:
    """Positions in LABELS of everything the scene shows: its digits, their colours and the ground,
    ascending."""
    shown = {d.word for d in scene.digits} | {d.colour for d in scene.digits} | {scene.ground}
    return [k for k, label in enumerate(LABELS) if label in shown]


def write_labels(root: Path, splits: Split, classes: Split, seed: int) -> None:
    """Multi-label targets (COYO-Labeled), list files (NXTP), class names, templates, file lists and
    the catalogue.

    As COYO-Labeled-300M has its labels from a teacher: shown ones at a probability above 0.5, wrong
    ones below 0.1.
    """
    for split, scenes in splits.items():
        rng = np.random.default_rng([seed, 8])
        rows = []
        for s in scenes:
            shown = visible_labels(s)
            probability = np.round(rng.uniform(0, 0.1, len(LABELS)), 4)
            probability[shown] = np.round(rng.uniform(0.5, 1, len(shown)), 4)
            order = np.argsort(-probability, kind="stable")[:10].tolist()
            row = {
                "id": s.image_id,
                "url": s.path,
                "labels": order,
                "label_probs": probability[order].tolist(),
            }
            rows.append(row | {"width": s.width, "height": s.height})
        write_json_lines(root / f"coyo_labeled/{split}.jsonl", rows)
        names = "".join(
            f"{s.path} : {','.join(LABELS[k] for k in visible_labels(s))}\n" for s in scenes
        )
        (root / "nxtp").mkdir(exist_ok=True)
        (root / f"nxtp/{split}.list").write_text(names)
        described = (
            {"labels": [LABELS[k] for k in visible_labels(s)], "caption": captions(s)}
            for s in scenes
        )
        rows = ({"image": s.path, **text} for s, text in zip(scenes, described, strict=True))
        write_json_lines(root / f"nxtp/{split}.jsonl", rows)
    (root / "coyo_labeled/classes.txt").write_text("".join(f"{label}\n" for label in LABELS))
    for split, scenes in classes.items():
        targets = [CLASS_FOLDERS.index(s.digits[0].word) for s in scenes]
        names = "".join(f"{s.path} : {s.digits[0].word}\n" for s in scenes)
        (root / f"imagefolder/{split}.list").write_text(names)
        np.save(
            root / f"imagefolder/{split}_images.npy",
            np.array([s.path.removeprefix("imagefolder/") for s in scenes]),
        )
        np.save(root / f"imagefolder/{split}_labels.npy", np.array(targets))
    # ImageNet-ReaL leaves images without an acceptable label out of the score; here every fiftieth.
    real = [
        [CLASS_FOLDERS.index(s.digits[0].word)] if i % 50 != 49 else []
        for i, s in enumerate(classes["val"])
    ]
    write_json(root / "imagefolder/real.json", real)
    (root / "imagefolder/classnames.txt").write_text("".join(f"{name}\n" for name in CLASS_FOLDERS))
    sets = ("digitscenes", "digitscenes_filelist")
    write_json(root / "labels.json", dict.fromkeys(sets, CLASS_FOLDERS))
    write_json(root / "templates.json", {name: list(TEMPLATES) for name in sets})
    write_json(root / "templates_short.json", {name: list(SHORT_TEMPLATES) for name in sets})
    catalogue = {"path": "imagefolder", "type": "imagefolder", "train": "train", "test": "test"}
    listed = {"path": "imagefolder", "type": "filelist", "train": "train", "test": "test"}
    write_json(root / "dataset_catalog.json", dict(zip(sets, (catalogue, listed), strict=True)))
