"""VQA accuracy as the official evaluation counts it (Antol et al., 2015), and the result file of
its server."""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from base.distributed import say
from base.errors import UserError
from base.writing import write_json

FEW = 4  # answers: with fewer, leaving one out leaves less than the three equal ones that count 1
ARTICLES = {"a", "an", "the"}
DIGITS = {
    word: str(i)
    for i, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
DIGITS["none"] = "0"
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# What the official table spells right; it knows each with exactly one apostrophe missing.
CONTRACTIONS = (
    "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's I'm "
    "I've isn't it'd it'll ma'am might've mightn't must've mustn't needn't not've o'clock oughtn't shan't should've "
    "shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're "
    "there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd "
    "where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're "
    "you've I'd've couldn't've hadn't've he'd've it'd've mightn't've 'ow's'at she'd've shouldn't've somebody'd've "
    "someone'd've something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'd've y'all'll you'd've"
).split()


def _misspelt(word: str) -> list[str]:
    return [word[:i] + word[i + 1 :] for i, letter in enumerate(word) if letter == "'"]


SPELLING = {wrong: word for word in CONTRACTIONS for wrong in _misspelt(word)} | {
    "somebody'd": "somebodyd"
}


def without_punctuation(answer: str) -> str:
    """Punctuation beside a blank goes, elsewhere it becomes a blank; a comma between digits removes
    all of it."""
    in_number = re.search(r"\d,\d", answer) is not None
    cleaned = answer
    for mark in PUNCTUATION:
        beside_blank = f"{mark} " in answer or f" {mark}" in answer
        cleaned = cleaned.replace(mark, "" if beside_blank or in_number else " ")
    # 32 periods at most: the official code passes a flag in place of the count
    return re.sub(r"\.(?!\d)", "", cleaned, count=32)


@lru_cache(maxsize=1 << 16)  # ten annotators, and every validation, give the same few answers
def normalise(answer: str) -> str:
    """The form in which the official evaluation compares a prediction with the annotators' answers."""
    answer = without_punctuation(answer.replace("\n", " ").replace("\t", " ").strip())
    words = (DIGITS.get(word, word) for word in answer.lower().split())
    return " ".join(SPELLING.get(word, word) for word in words if word not in ARTICLES)


def answer_score(prediction: str, answers: Sequence[str], one_sided: bool = False) -> float:
    """Accuracy in 0..1 of one prediction: min(1, n / 3) of the others' answers, averaged over who
    is left out.

    Four or more equal answers among ten give 1, one gives 0.3. Of fewer than four answers, which
    could never give 1 that way, any is right.

    one_sided: as the official code, which takes punctuation out of the annotators' answers (where
    they differ), but turns number words into digits, drops articles and spells contractions out in
    the prediction alone. VQA's own annotations are in that form already; where annotations say "two"
    or "the dog", no prediction could ever be right.
    """
    answers = _comparable(answers, one_sided)
    found = normalise(prediction)
    if len(answers) < FEW and not one_sided:
        return float(found in answers)
    same = Counter(answers)
    others = [same[found] - (answer == found) for answer in answers]
    return sum(min(1.0, n / 3) for n in others) / len(others)


def _comparable(answers: Sequence[str], one_sided: bool) -> list[str]:
    """The annotators' answers to a question in the forms that a prediction's is looked for among."""
    if not one_sided:
        return [normalise(answer) for answer in answers]
    if len(set(answers)) > 1:
        return [without_punctuation(answer) for answer in answers]
    return list(answers)


def unreachable(
    truth: Mapping[str | int, dict], answers: Sequence[str], one_sided: bool = False
) -> list[str]:
    """Most frequent answers to the questions that none of the closed list counts as, each once."""
    listed = {normalise(answer) for answer in answers}
    lacking = {}
    for annotation in truth.values():
        forms = _comparable(annotation["answers"], one_sided)
        wanted = Counter(forms).most_common(1)[0][0]
        if wanted not in listed:
            lacking.setdefault(wanted, annotation["answers"][forms.index(wanted)])
    return list(lacking.values())


def check_answer_list(
    file: Path,
    answers: Sequence[str],
    truth: Mapping[str | int, dict],
    split: str,
    one_sided: bool = False,
) -> None:
    """Report which true answers of a split the closed list lacks, as they are scored; UserError if it
    has none of them. truth, one_sided: see `vqa_accuracy`."""
    lacking = unreachable(truth, answers, one_sided)
    if not lacking:
        return
    given = (_comparable(annotation["answers"], one_sided) for annotation in truth.values())
    if set().union(*given).isdisjoint(map(normalise, answers)):
        known = f"holds no answer to any question of {split}_file"
        raise UserError(f"answer_list {file}: {known}; is it the list of another data set?")
    say(f"answer_list {file}: lacks {len(lacking)} answers of {split}_file, e.g. {lacking[:5]}")


def vqa_accuracy(
    predictions: Mapping[str | int, str], truth: Mapping[str | int, dict], one_sided: bool = False
) -> dict:
    """Accuracy in percent: `overall`, and by `question_type` and `answer_type` where the
    annotations name them.

    truth: for each question id `answers` (the annotators' texts) and maybe `question_type`, `answer_type`.
    """
    groups: dict[str, dict[str, list[float]]] = {
        "question_type": defaultdict(list),
        "answer_type": defaultdict(list),
    }
    scores = []
    for question, annotation in truth.items():
        scores.append(answer_score(predictions[question], annotation["answers"], one_sided))
        for group, values in groups.items():
            if annotation.get(group):
                values[annotation[group]].append(scores[-1])
    result = {"overall": _percent(scores)}
    for group, values in groups.items():
        if values:
            result[group] = {name: _percent(found) for name, found in sorted(values.items())}
    return result


def _percent(scores: list[float]) -> float:
    return round(100 * sum(scores) / len(scores), 2)


def prior_accuracy(truth: Mapping[str | int, dict], one_sided: bool = False) -> dict:
    """`vqa_accuracy` of always giving the most frequent answer to questions of the same type, or,
    where no types are known, of all answers."""
    votes: dict[str, Counter] = defaultdict(Counter)
    for annotation in truth.values():
        votes[annotation.get("question_type", "")].update(
            _comparable(annotation["answers"], one_sided)
        )
    best = {kind: counts.most_common(1)[0][0] for kind, counts in votes.items()}
    given = {q: best[annotation.get("question_type", "")] for q, annotation in truth.items()}
    return vqa_accuracy(given, truth, one_sided)


def save_answers(path: Path, predictions: Mapping[str | int, str]) -> None:
    """The VQA server's format: a list of {question_id, answer}."""
    rows = [{"question_id": question, "answer": answer} for question, answer in predictions.items()]
    write_json(path, rows)


def likeliest_answers(ids: Sequence, answers: Sequence[str], best: Tensor) -> dict:
    """The first answer of each question, by question id. best: int64 [Q,K], indices into `answers`."""
    return {question: answers[row[0]] for question, row in zip(ids, best.tolist(), strict=True)}
