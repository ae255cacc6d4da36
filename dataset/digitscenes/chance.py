"""What guessing scores on every task: the numbers a trained model has to beat."""

from collections import Counter, defaultdict
from math import comb

from dataset.digitscenes.annotations import LABELS, visible_labels
from dataset.digitscenes.scenes import Scene
from dataset.digitscenes.tasks import detections_hit


def retrieval_chance(images: int, captions: int = 5) -> dict[str, float]:
    """Recall in percent of a random order, text to image (`img_r*`) and image to text
    (`txt_r*`)."""
    total = images * captions
    chance = {}
    for k in (1, 5, 10):
        chance[f"img_r{k}"] = 100 * min(1, k / images)
    for k in (1, 5, 10):
        missed = comb(total - captions, k) / comb(total, k) if k <= total else 0.0
        chance[f"txt_r{k}"] = 100 * (1 - missed)
    return chance


def vqa_score(answer: str, annotators: list[str]) -> float:
    """VQA accuracy in percent without normalisation: three of ten annotators make a full point."""
    return 100 * min(1, annotators.count(answer) / 3)


def vqa_chance(train: list[dict], test: list[dict]) -> dict[str, float]:
    """Accuracy in percent, by type and overall, of the answer most often right for the same words
    in training."""
    by_question: defaultdict = defaultdict(Counter)
    by_type: defaultdict = defaultdict(Counter)
    for row in train:
        by_question[row["question"]][row["answer"]] += 1
        by_type[row["type"]][row["answer"]] += 1
    scores = defaultdict(list)
    for row in test:
        votes = by_question[row["question"]] or by_type[row["type"]]
        answer = votes.most_common(1)[0][0] if votes else ""
        score = vqa_score(answer, row["answers"])
        scores[row["type"]].append(score)
        scores["overall"].append(score)
    return {kind: sum(values) / len(values) for kind, values in sorted(scores.items())}


def grounding_chance(refs: list[dict], instances: dict, boxes: dict[str, list]) -> dict[str, float]:
    """Percent correct of a box drawn at random from the detections, per split, each sentence
    counted once."""
    annotated = {each["id"]: each["bbox"] for each in instances["annotations"]}
    scores = defaultdict(list)
    for ref in refs:
        if ref["split"] == "train":
            continue
        found = detections_hit(boxes[str(ref["image_id"])], annotated[ref["ann_id"]])
        score = 100 * sum(found) / len(found)
        scores[f"{ref['split']}_d"] += [score] * len(ref["sentences"])
    return {split: sum(values) / len(values) for split, values in sorted(scores.items())}


def multi_label_chance(scenes: list[Scene]) -> float:
    """Mean average precision in percent of a random order: the mean fraction of images that show a
    label."""
    shown = sum(len(visible_labels(scene)) for scene in scenes)
    return 100 * shown / (len(scenes) * len(LABELS))
