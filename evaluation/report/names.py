"""What the scores and other figures of an evaluation are called on its page."""

import re

NAMES = {
    "top1": "top-1 accuracy",
    "top5": "top-5 accuracy",
    "best_top1": "best top-1 accuracy of the training",
    "real": "ReaL accuracy",
    "mAP": "mean average precision over classes",
    "mAP_micro": "average precision over all labels",
    "best_mAP": "best mean average precision of the training",
    "F1_macro": "F1 over classes",
    "F1_micro": "F1 over all labels",
    "precision@1": "precision of the first label",
    "precision@5": "precision of the first five labels",
    "hit@1": "first label right",
    "hit@5": "one of the first five labels right",
    "probe": "linear probe",
    "probe_top5": "linear probe, top 5",
    "probe_mean_per_class": "linear probe, mean per class",
    "probe_val": "linear probe on held-out images",
    "probe_train": "linear probe on its training images",
}
BESIDE_CHANCE = ("top1", "best_top1", "real", "mAP", "best_mAP", "probe")
FACTS = {
    "images": "images",
    "train_images": "training images",
    "real_images": "images with ReaL labels",
    "width": "features",
    "classes_shown": "classes that occur",
    "probe_l2": "weight decay of the probe",
    "loss": "mean loss",
    "bce": "mean binary cross entropy",
    "auc": "area under the ROC curve over classes, % (50 of a random order)",
    "accuracy": "accuracy of pairs of image and class, %",
    "unreadable_images": "unreadable images",
    "truncated_images": "truncated images",
}


def score_name(key: str) -> str | None:
    """What a score in percent is called; None for another figure."""
    neighbours = re.fullmatch(r"knn(\d+)(_weighted)?(_top5)?", key)
    if neighbours is None:
        return NAMES.get(key)
    k, weighted, top5 = neighbours.groups()
    name = "nearest neighbour" if k == "1" else f"{k} nearest neighbours"
    votes = ", weighted votes" if weighted else ""
    return name + votes + (", top 5" if top5 else "")


def recall_names(captions: str, images: str) -> dict[str, str]:
    """`txt_r1` to `img_r10` with their titles, such as `captions R@1`, by what is retrieved."""
    names = {}
    for way, retrieved in (("txt", captions), ("img", images)):
        for k in (1, 5, 10):
            names[f"{way}_r{k}"] = f"{retrieved} R@{k}"
    return names
