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
    chance = {f"img_r{k}": 100 * min(1, k / images) for k in (1, 5, 10)}
    for k in (1, 5, 10):
        chance[f"txt_r{k}"] = (
            100 * (1 - comb(total - captions, k) / comb(total, k)) if k <= total else 100.0
        )
    return chance


def vqa_score(answer: str, annotators: list[str]) -> float:
    """VQA accuracy in percent without normalisation: three of ten annotators make a full point."""
    return 100 * min(1, annotators.count(answer) / 3)


def vqa_chance(train: list[dict], test: list[dict]) -> dict[str, float]:
    """Accuracy in percent, by type and overall, of the answer most often right for the same words
    in training."""
    by_question, by_type = defaultdict(Counter), defaultdict(Counter)
    for e in train:
        by_question[e["question"]][e["answer"]] += 1
        by_type[e["type"]][e["answer"]] += 1
    scores = defaultdict(list)
    for e in test:
        votes = by_question[e["question"]] or by_type[e["type"]]
        score = vqa_score(votes.most_common(1)[0][0] if votes else "", e["answers"])
        scores[e["type"]].append(score)
        scores["overall"].append(score)
    return {kind: sum(values) / len(values) for kind, values in sorted(scores.items())}


def grounding_chance(refs: list[dict], instances: dict, boxes: dict[str, list]) -> dict[str, float]:
    """Percent correct of a box drawn at random from the detections, per split, each sentence
    counted once."""
    bbox = {a["id"]: a["bbox"] for a in instances["annotations"]}
    hits = defaultdict(list)
    for ref in refs:
        found = detections_hit(boxes[str(ref["image_id"])], bbox[ref["ann_id"]])
        hits[ref["split"]] += [100 * sum(found) / len(found)] * len(ref["sentences"])
    return {f"{split}_d": sum(h) / len(h) for split, h in sorted(hits.items()) if split != "train"}


def multi_label_chance(scenes: list[Scene]) -> float:
    """Mean average precision in percent of a random order: the mean fraction of images that show a
    label."""
    return 100 * sum(len(visible_labels(s)) for s in scenes) / (len(scenes) * len(LABELS))
