"""Builds the data folder: draws the images, writes every format, and signs the result with a
manifest.

A folder is finished when its manifest exists and fits its files; one that an interruption left
behind is marked by `.unfinished`, and the next run starts it afresh. Only what this module makes
(TOP_LEVEL) is ever deleted.
"""

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

from base.errors import UserError
from base.reading import read_json
from base.writing import make_folder, write_json, write_json_lines
from dataset.digitscenes import annotations, chance, shards
from dataset.digitscenes.drawing import contact_sheet, jpeg
from dataset.digitscenes.scenes import SPLITS, Handwriting, Scene, class_scenes, unique_scenes
from dataset.digitscenes.words import FactIndex, captions
from dataset.text import vocabulary

VERSION = 2
MANIFEST, UNFINISHED = "manifest.json", ".unfinished"
TOP_LEVEL = {
    "README.md": "this page",
    "stats.json": "sizes of the splits, and what guessing scores on every task",
    "overview.png": "24 test scenes with a caption",
    "images": "the images: {train,val,test}2017/<12-digit id>.jpg (COCO's naming)",
    "scenes_train.jsonl": "what every training image shows: digits, colours, boxes (pixels), handwriting sample",
    "scenes_val.jsonl": "the same, validation",
    "scenes_test.jsonl": "the same, test",
    "pretrain_train.json": "pre-training pairs [{image, caption: [5]}]",
    "pretrain_val.json": "the same, validation",
    "retrieval_train.json": "retrieval, one entry a caption [{image, caption, image_id}]",
    "retrieval_val.json": "retrieval [{image, caption: [5]}]",
    "retrieval_test.json": "the same, test",
    "dataset_digitscenes.json": "captions of all splits in the layout of Karpathy's COCO / Flickr30k files",
    "coco": "captions_{train,val,test}2017.json in the layout of COCO captions; images under images/",
    "vqa_train.json": "VQA [{dataset, image, question, answer: [10], question_id}]",
    "vqa_val.json": "the same, validation",
    "vqa_test.json": "the same without answers",
    "vqa_test_answers.json": "their answers in the layout of the VQA v2 annotations, with question types",
    "vg_qa.json": "Visual-Genome-style questions on training images, one answer each",
    "answer_list.json": "all answers that occur, for ranking",
    "ve_train.json": "SNLI-VE [{image: path without .jpg, sentence, label}], labels equally frequent",
    "ve_val.json": "the same, validation",
    "ve_test.json": "the same, test",
    "nlvr_train.json": "NLVR2 [{images: [2], sentence, label}]; each sentence is true of one pair, false of another",
    "nlvr_val.json": "the same, validation",
    "nlvr_test.json": "the same, test",
    "refcoco+": "refs(unc).p, instances.json and dets.json (boxes [x, y, w, h] by image id) of the RefCOCO+ task",
    "refcoco+_train.json": "expressions [{image, text}]",
    "refcoco+_test.json": "expressions [{image, text, ref_id}] of val, testA (two digits) and testB (three digits)",
    "imagefolder": "one digit an image: {train,val,test}/<class>/*.jpg, classnames.txt, lists, file lists, real.json",
    "labels.json": "class names in folder order for zero-shot classification",
    "templates.json": "prompt templates for zero-shot classification",
    "templates_short.json": "the wordings of tfrecord/alt_texts, which name no colours",
    "dataset_catalog.json": "zero-shot catalogue entries of the class folders",
    "coyo_labeled": "multi-label targets in the fields of COYO-Labeled-300M, and classes.txt",
    "nxtp": "list files `path : name,name,...`, the same with captions as JSON lines, and a tokenizer.model",
    "wds": "WebDataset shards (jpg, txt, json) as img2dataset writes them: {train,val,test}/00000.tar ...",
    "tfrecord": "TFRecord shards (jpg, txt): {train,val,test}/00000.tfrecord ...",
    "alt_texts.npy": "the class folders' training images with short texts, in CC3M's layout; also tfrecord/alt_texts",
    "cc3m.npy": "CC3M metadata of the training images [{image_id: path, captions}]",
    "cc12m.npy": "CC12M metadata of the training images [{image_name, image_id, captions}]",
    "yfcc15m": "YFCC15M: yfcc15m.pkl [(index, title, description)] and images/AB/CDE.zip",
    "redcaps": "RedCaps: redcaps.json [{image_id, subreddit, caption}] and <subreddit>/<id>.jpg, every tenth image",
    "tokenizer": "a lower-casing WordPiece tokenizer trained on the training texts, as a Hugging Face folder",
    "bpe": "bpe_merges.txt.gz: byte-pair merges trained on the same texts, in CLIP's layout",
}


@dataclass(frozen=True)
class Request:
    """What to build: scenes per split, the side in pixels about which images vary, and the seed."""

    train: int = 6000
    val: int = 300
    test: int = 300
    size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for split in SPLITS:
            if getattr(self, split) < 20:
                raise UserError(
                    f"--{split} {getattr(self, split)}: every split needs at least 20 scenes"
                )
        if not 32 <= self.size <= 1024:
            raise UserError(f"--size {self.size}: choose a side between 32 and 1024 pixels")
        if self.seed < 0:
            raise UserError(f"--seed {self.seed}: the seed must not be negative")

    def arguments(self) -> dict:
        return asdict(self) | {"version": VERSION}


def build(
    root: Path, request: Request, overwrite: bool = False, say: Callable[[str], None] = print
) -> bool:
    """Makes `root` hold the data of `request`; returns whether anything had to be built.

    Raises UserError if the folder holds other data; `overwrite` replaces DigitScenes made with
    other arguments.
    """
    root = Path(root)
    if not must_build(root, request, overwrite, say):
        return False
    make_folder(root, "--out")
    write_json(root / UNFINISHED, request.arguments())
    (root / MANIFEST).unlink(missing_ok=True)
    clear(root)
    fill(root, request)
    manifest = {"arguments": request.arguments(), **fingerprint(root)}
    write_json(root / MANIFEST, manifest)
    (root / UNFINISHED).unlink()
    return True


def must_build(root: Path, request: Request, overwrite: bool, say: Callable[[str], None]) -> bool:
    """Whether the folder has to be filled; raises UserError if that would replace something
    else."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return True
    if not root.is_dir():
        raise UserError(f"{root} is a file: name a folder for the data")
    if (root / UNFINISHED).exists():
        say(f"{root} was left unfinished by an interruption: starting it afresh")
        return True
    if not (root / MANIFEST).exists():
        raise UserError(
            f"{root} holds files that are not DigitScenes: name another folder, or empty this one"
        )
    try:
        manifest = read_json(root / MANIFEST, dict)
    except UserError:
        manifest = {}
    if manifest.get("arguments", request.arguments()) != request.arguments():
        if not overwrite:
            raise UserError(
                f"{root} was built with {manifest['arguments']}, now asked for {request.arguments()}: "
                "name another folder, or add --overwrite to replace it"
            )
        return True
    found = fingerprint(root)
    if {key: manifest.get(key) for key in found} == found:
        return False
    say(f"{root} has lost or changed files since it was built: building it again")
    return True


def clear(root: Path) -> None:
    """Deletes what an earlier run made."""
    for name in TOP_LEVEL:
        path = root / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def fingerprint(root: Path) -> dict:
    """Number of the files under TOP_LEVEL, their bytes, and one hash over names and contents."""
    digest = sha256()
    count = 0
    size = 0
    for name in sorted(TOP_LEVEL):
        top = root / name
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.is_file():
                content = path.read_bytes()
                digest.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode())
                digest.update(content)
                count += 1
                size += len(content)
    return {"files": count, "bytes": size, "sha256": digest.hexdigest()}


def fill(root: Path, request: Request) -> None:
    """Draws the images and writes every format, with a progress bar counted in images."""
    from tqdm import tqdm

    handwriting = Handwriting()
    splits = {}
    first = 1
    for split in SPLITS:
        key = (lambda s: s.description) if split == "train" else (lambda s: s.content)
        count = getattr(request, split)
        splits[split] = unique_scenes(
            handwriting, split, count, first, request.size, request.seed, key
        )
        first += count
    counts = {"train": request.train // 2, "val": request.val, "test": request.test}
    classes = {}
    for split, count in counts.items():
        classes[split] = class_scenes(handwriting, split, count, first, request.size, request.seed)
        first += count
    everything = [
        scene for group in (splits, classes) for scenes in group.values() for scene in scenes
    ]
    for folder in sorted({(root / scene.path).parent for scene in everything}):
        folder.mkdir(parents=True)
    with tqdm(total=len(everything), unit=" images", desc="DigitScenes", disable=None) as bar:
        for scene in everything:
            (root / scene.path).write_bytes(jpeg(scene, handwriting, request.seed))
            bar.update()
        bar.set_postfix_str("annotations")
        statistics = write_formats(root, splits, classes, request.seed)
        write_overview(root, splits["test"])
        write_readme(root, request, statistics)


def write_formats(
    root: Path, splits: dict[str, list[Scene]], classes: dict[str, list[Scene]], seed: int
) -> dict:
    """All annotation files, containers and vocabularies; returns the content of stats.json."""
    for split, scenes in splits.items():
        write_json_lines(root / f"scenes_{split}.jsonl", (asdict(scene) for scene in scenes))
        shards.write_tars(root, split, scenes)
        shards.write_tfrecords(root, split, scenes)
    annotations.write_captions(root, splits)
    indices = {split: FactIndex(scenes) for split, scenes in splits.items()}
    asked = annotations.write_vqa(root, indices, seed)
    stated = annotations.write_statements(root, indices, seed)
    refs = annotations.write_refcoco(root, splits, seed)
    annotations.write_labels(root, splits, classes, seed)
    shards.write_web_captions(root, splits["train"])
    shards.write_alt_texts(root, classes["train"])

    texts = {caption for scene in splits["train"] for caption in captions(scene)}
    texts |= {text for e in asked["train"] for text in (e["question"], *e["answers"])}
    texts |= {e["sentence"] for entries in stated.values() for e in entries["train"]}
    texts |= {s["sent"] for ref in refs if ref["split"] == "train" for s in ref["sentences"]}
    vocabulary.write_wordpiece(root / "tokenizer", texts)
    vocabulary.write_merges(root / "bpe" / "bpe_merges.txt.gz", texts)
    vocabulary.write_pieces(root / "nxtp" / "tokenizer.model", texts)

    instances = read_json(root / "refcoco+/instances.json")
    boxes = read_json(root / "refcoco+/dets.json")
    statistics = {
        "images": {split: len(scenes) for split, scenes in splits.items()},
        "class_images": {split: len(scenes) for split, scenes in classes.items()},
        "questions": {split: len(entries) for split, entries in asked.items()},
        "statements": {split: len(entries) for split, entries in stated["ve"].items()},
        "image_pairs": {split: len(entries) for split, entries in stated["nlvr"].items()},
        "references": {
            s: sum(r["split"] == s for r in refs) for s in ("train", "val", "testA", "testB")
        },
        "chance": {
            "retrieval": chance.retrieval_chance(len(splits["test"])),
            "vqa": chance.vqa_chance(asked["train"], asked["test"]),
            "ve": {"accuracy": 100 / 3, "words_alone": 200 / 3},
            "nlvr": {"accuracy": 50.0},
            "grounding": chance.grounding_chance(refs, instances, boxes),
            "classification": {"top1": 10.0, "top5": 50.0},
            "multi_label": {"mean_average_precision": chance.multi_label_chance(splits["test"])},
        },
    }
    write_json(root / "stats.json", statistics)
    return statistics


def write_overview(root: Path, scenes: list[Scene], count: int = 24) -> None:
    """`overview.png`: the first scenes of a split, the five wordings in turn."""
    from PIL import Image

    shown = scenes[:count]
    images = [Image.open(root / scene.path) for scene in shown]
    contact_sheet(images, [captions(s)[i % 5] for i, s in enumerate(shown)]).save(
        root / "overview.png"
    )


def write_readme(root: Path, request: Request, statistics: dict) -> None:
    """`README.md`: one line a file, then what guessing scores."""
    asked = " ".join(f"--{key} {value}" for key, value in asdict(request).items())
    lines = [
        "# DigitScenes",
        "",
        "One to three coloured handwritten digits on a coloured ground, from the 1,797 real samples of the UCI optical",
        "digits that scikit-learn bundles. The writers of the test and validation splits are never trained on.",
        f"Made by `scripts/data/make_digitscenes.py OUT {asked}`; paths in all files are relative to this folder.",
        "",
        "A horizontally flipped image no longer fits words such as left and right: train without horizontal flips.",
        "",
        "| file | content |",
        "|---|---|",
        *(f"| `{name}` | {text.replace('|', '/')} |" for name, text in TOP_LEVEL.items()),
        "",
        "## What guessing scores on the test split (percent)",
        "",
        "VQA: the most frequent training answer to the same words. VE: the labels are equally frequent; `words_alone`",
        "knows which statements no image decides. Grounding: a detection box drawn at random.",
        "",
        "| task | chance |",
        "|---|---|",
    ]
    for task, values in statistics["chance"].items():
        lines.append(
            f"| {task} | {', '.join(f'{name} {value:.2f}' for name, value in values.items())} |"
        )
    (root / "README.md").write_text("\n".join(lines) + "\n")
