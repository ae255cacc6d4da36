"""The page of a split of visual question answering."""

from collections.abc import Sequence

import torch
from torch import Tensor

from evaluation.report.examples import answer_case, gallery
from evaluation.report.page import card, score_table
from evaluation.vqa import answer_score, prior_accuracy


def answer_report(
    split: str,
    data,
    answers: Sequence[str],
    best: Tensor,
    probability: Tensor,
    scores: dict,
    one_sided: bool = False,
) -> list[str]:
    """Accuracies by kind of question, and questions answered rightly and wrongly.

    data: has `ids`, `written` (questions), `images` (files) and `truth`, which is empty where the
    annotators' answers are unknown. best int64 [Q,K]: indices into `answers`, likeliest first;
    probability [Q,K]; scores: VQA accuracies in percent; one_sided: how they were counted, see
    `answer_score`.
    """
    if not data.truth:
        unknown = "annotators' answers are not known here"
        return [card(split, intro=f"{len(data)} questions answered; {unknown}.")]
    prior = prior_accuracy(data.truth, one_sided)
    rows = [("all", scores["overall"], prior["overall"])]
    for name, value in scores.get("question_type", {}).items():
        rows.append((name, value, prior["question_type"][name]))
    for name, value in scores.get("answer_type", {}).items():
        rows.append((f"answers: {name}", value, prior["answer_type"][name]))
    given = [data.truth[question]["answers"] for question in data.ids]
    right = []
    for row, annotated in zip(best.tolist(), given, strict=True):
        right.append(answer_score(answers[row[0]], annotated, one_sided) >= 0.5)

    def case(i: int) -> str:
        guesses = []
        for answer, p in zip(best[i].tolist(), probability[i].tolist(), strict=True):
            guesses.append((answers[answer], p))
        true = max(set(given[i]), key=given[i].count)
        return answer_case([data.images[i]], data.written[i], guesses, true, right[i])

    head = ["VQA accuracy in %", split, "most frequent answer"]
    return [
        card(f"{split}: {len(data)} questions", score_table(head, rows)),
        gallery(f"Answers, {split}", torch.tensor(right), case),
    ]
