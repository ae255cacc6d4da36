"""The score of an evaluation in one line, beside what chance scores."""

import json
import sys
from collections.abc import Mapping

from base import distributed

# the score that counts, of whichever evaluation: the first that is there
HEADLINES = (
    "accuracy",
    "overall",
    "r_mean",
    "top1",
    "mAP",
    "f1",
    "exact_f1",
    "knn1",
    "acc1_z",
    "r_mean_z",
    "mean_per_class_z",
    "acc1_acc5_z",
    "roc_auc_z",
    "map11_z",
    "text_acc",
    "text_acc_z",
)
DAMAGES = {"unreadable_images": "unreadable", "truncated_images": "truncated"}


def score_line(scores: Mapping, metric: str | None = None) -> str:
    """`accuracy 52.08, chance 33.33; 3 unreadable images`, or nothing where there is no score.

    scores: of one evaluation, by name. `chance`: what guessing scores by the same metric, or such
    figures by metric; METRIC_chance for another metric. metric: the score that counts; None = the
    first of HEADLINES that is there.
    """
    metric = metric or next((name for name in HEADLINES if name in scores), None)
    if metric is None or metric not in scores:
        return ""
    chance = scores.get(f"{metric}_chance", scores.get("chance"))
    if isinstance(chance, Mapping):
        chance = chance.get(metric.removesuffix("_z"))
    line = f"{metric} {scores[metric]:.4g}"
    if chance is not None:
        line += f", chance {chance:.4g}"
    counts = [f"{scores[name]} {word} images" for name, word in DAMAGES.items() if name in scores]
    return "; ".join([line, *counts])


def print_scores(scores: Mapping) -> None:
    """The scores as JSON on stdout, their `score_line` on stderr; rank 0 does."""
    if distributed.rank() == 0:
        print(json.dumps(scores, indent=2), flush=True)
        print(score_line(scores), file=sys.stderr)


def score_lines(metrics: Mapping) -> list[str]:
    """`score_line` of metrics, or of each split or data set in them, with its name."""
    own = score_line(metrics)
    lines = [own] if own else []
    for name, inner in metrics.items():
        if not isinstance(inner, Mapping):
            continue
        if line := score_line(inner):
            lines.append(f"{name}: {line}")
        elif name == "results":  # of several data sets
            lines += score_lines(inner)
    return lines


def rounded(value: object, digits: int = 6) -> object:
    """Plain data with every float to `digits` significant digits, to be read."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, Mapping):
        return {key: rounded(each, digits) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(each, digits) for each in value]
    return value
