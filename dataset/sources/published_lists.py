"""Annotations as their makers publish them, as the lists that ALBEF made of them: VQA's questions and
answers, NLVR2's and SNLI-VE's lines."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from base.errors import UserError
from base.reading import parse_first_entry, read_json, read_json_lines, read_start
from base.text import id_text

HEAD = 1 << 16  # bytes by which a file is known
T = TypeVar("T")


def rows_as_published(path: Path) -> Iterator[dict] | None:
    """The entries of a published file that names no images itself; None for any other file.
    UserError."""
    head = read_start(path, HEAD) if path.is_file() else b""
    if b'"mscoco"' in head and b'"data_subtype"' in head and b'"questions"' in head:
        return vqa_rows(path)
    try:
        first = parse_first_entry(head.lstrip().partition(b"\n")[0])
    except (ValueError, RecursionError):
        return None
    if not isinstance(first, dict) or first.keys() & {"image", "images"}:
        return None
    if first.keys() >= {"identifier", "left_url", "sentence", "label"}:
        return made_of(path, read_json_lines(path), nlvr_row)
    if first.keys() >= {"Flickr30K_ID", "sentence2", "gold_label"}:
        return made_of(path, read_json_lines(path), entailment_row)
    return None


def made_of(path: Path, rows: Iterable[Any], make: Callable[[dict], T]) -> Iterator[T]:
    """What `make` makes of every row. UserError names the one that lacks something."""
    for number, row in enumerate(rows):
        try:
            yield make(row)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            where = f"{path}, entry {number} (the first is 0)"
            raise UserError(f"{where}: not as published ({error!r:.80}); fetch it again") from None


def answers_beside(questions: Path) -> Path:
    """Where VQA's answers to a file of its questions lie, if there are any."""
    name = questions.name.replace("OpenEnded_", "").replace("_questions", "_annotations")
    return questions.with_name(name)


def vqa_rows(path: Path) -> Iterator[dict]:
    """{dataset, image, question, question_id}, and `answer`, the annotators' ten, where their file
    lies beside that of the questions."""
    content = read_json(path, dict)
    split = str(content.get("data_subtype"))
    folder = "test2015" if split == "test-dev2015" else split
    beside = answers_beside(path)
    answers = {}
    if beside != path and beside.is_file():
        annotations = read_json(beside, dict).get("annotations") or []
        answers = dict(made_of(beside, annotations, answers_row))

    def question_row(row: dict) -> dict:
        image = f"{folder}/COCO_{folder}_{int(row['image_id']):012d}.jpg"
        entry = {"dataset": "vqa", "image": image, "question": row["question"]}
        entry["question_id"] = row["question_id"]
        return entry | ({"answer": answers.get(id_text(row["question_id"]), [])} if answers else {})

    yield from made_of(path, content.get("questions") or [], question_row)


def answers_row(row: dict) -> tuple[str, list[str]]:
    return id_text(row["question_id"]), [each["answer"] for each in row["answers"]]


def nlvr_row(row: dict) -> dict:
    """{images, sentence, label}: train-4100-0-0 is about train-4100-0-img0.png and -img1.png, in
    images/train/DIRECTORY; the other splits have one folder each."""
    pair = str(row["identifier"]).rpartition("-")[0]
    split = pair.partition("-")[0]
    folder = f"images/{split}/{row['directory']}" if "directory" in row else split
    images = [f"{folder}/{pair}-img{side}.png" for side in (0, 1)]
    return {"images": images, "sentence": row["sentence"], "label": row["label"]}


def entailment_row(row: dict) -> dict:
    return {"image": row["Flickr30K_ID"], "sentence": row["sentence2"], "label": row["gold_label"]}
