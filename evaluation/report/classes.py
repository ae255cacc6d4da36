"""Cards of a classified split: its scores by name, a table of all classes, which are taken for
which, and images with what was said of them."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import itemgetter

import torch
from markupsafe import Markup

from base import distributed
from evaluation.classification import Validation
from evaluation.predict import Guesses
from evaluation.report import page
from evaluation.report.examples import SEVERAL_LABELS, gallery, kind
from evaluation.report.images import LazyImages
from evaluation.report.names import BESIDE_CHANCE, FACTS, score_name
from evaluation.zeroshot import Classified

MOST_CLASSES = 1000  # rows of the table
CONFUSIONS = 12  # pairs of classes shown
ALIKE = 5  # images of each
SHOWN = 5  # guesses of an image, or as many as it has labels
EXAMPLES = 8  # right ones, and wrong ones
SORTED = "The hardest first; click on a heading to sort by it."


def score_card(
    title: str, metrics: Mapping[str, float], truth: Sequence[Sequence[int]] = ()
) -> Markup:
    """The scores in percent by name, beside chance where it is known, and the other figures.

    truth: labels of the images, from which chance among k guesses is known, too.
    """
    frequent = most_frequent(truth)
    rows = []
    for key, value in metrics.items():
        name = score_name(key)
        if name is None:
            continue
        by_chance = key in BESIDE_CHANCE or (key.startswith("knn") and not key.endswith("top5"))
        among = "top5" if key.endswith("top5") else key
        rows.append((name, value, metrics.get("chance") if by_chance else frequent.get(among)))
    facts = []
    for key, value in metrics.items():
        if key != "chance" and score_name(key) is None:
            facts.append(f"{FACTS.get(key, key)}: {_figure(value)}")
    return page.card(
        title, page.score_table(["in %", "score", "chance"], rows, None), intro=" · ".join(facts)
    )


def most_frequent(truth: Sequence[Sequence[int]]) -> dict[str, float]:
    """What always naming the most frequent labels scores, in percent: `hit@k` and `precision@k` for
    k = 1, 5, and `top5` where every image has one label."""
    counts = Counter(label for labels in truth for label in labels)
    named = [label for label, _ in counts.most_common(5)]
    scores = {}
    for k in (1, 5) if truth else ():
        right = [len({*labels} & {*named[:k]}) for labels in truth]
        scores[f"hit@{k}"] = 100 * sum(map(bool, right)) / len(truth)
        scores[f"precision@{k}"] = 100 * sum(right) / (k * len(truth))
    if truth and all(len(labels) == 1 for labels in truth):
        scores["top5"] = scores["hit@5"]
    return scores


def classification_report(
    title: str,
    names: Sequence[str | Sequence[str]],
    validation: Validation,
    image: Callable[[int], object],
) -> list[Markup]:
    """All cards of a split: scores, classes, confusions, images. image(i): see `LazyImages`."""
    guesses = validation.guesses
    images = LazyImages(image, len(guesses.truth))
    scores = score_card(title, validation.metrics, guesses.truth)
    return [scores, *class_cards(title, names, guesses, images)]


def _figure(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def class_cards(
    title: str,
    names: Sequence[str | Sequence[str]],
    guesses: Guesses,
    images: Sequence,
    beside: Callable[[int], Markup] | None = None,
) -> list[Markup]:
    """Cards of the classes, of the confusions, and of right and wrong images. Nothing on other
    processes than the first.

    names: of the classes, in the order of their numbers; of several names the first is shown.
    images: of the split, as `page.thumbnail` takes them. beside(i): what else is known of image i.
    """
    if distributed.rank() != 0:
        return []
    name_of = ClassNames(names)
    right = torch.zeros(len(guesses.truth), dtype=torch.bool)
    for number, said, truth in guesses.rows():
        right[number] = bool(truth) and set(truth) <= set(said[: len(truth)])

    def example(number: int) -> Markup:
        more = beside(number) if beside else Markup()
        return class_case(number, guesses, name_of, images[number], bool(right[number]), more)

    cards = [class_table(title, guesses, name_of), confusion_card(title, guesses, name_of, images)]
    verdicts = SEVERAL_LABELS if any(len(t) > 1 for t in guesses.truth) else ("Wrong", "Right")
    shown = gallery(f"Images, {title}", right, example, EXAMPLES, verdicts=verdicts)
    return [*filter(None, cards), shown]


class ClassNames:
    """Names of classes by their numbers."""

    def __init__(self, names: Sequence[str | Sequence[str]]):
        self.names = names

    def __call__(self, number: int) -> str:
        if number >= len(self.names):
            return f"class {number}"
        name = self.names[number]
        return name if isinstance(name, str) else name[0]


def class_table(title: str, guesses: Guesses, name_of: ClassNames) -> Markup:
    """Images, recall and precision of every class, the worst first, and what it is taken for.

    The labels that count as said of an image are the first n of the guesses, where it has n.
    """
    shown: Counter[int] = Counter()
    found: Counter[int] = Counter()
    said_often: Counter[int] = Counter()
    taken_for: dict[int, Counter[int]] = {}
    for _, said, truth in guesses.rows():
        first = said[: len(truth)]
        shown.update(truth)
        said_often.update(first)
        found.update(set(truth) & set(first))
        if len(truth) == 1 and first != truth:
            taken_for.setdefault(truth[0], Counter())[first[0]] += 1
    rows = []
    for number, count in shown.most_common(MOST_CLASSES):
        recall = 100 * found[number] / count
        precision = ""
        if said_often[number]:
            precision = f"{100 * found[number] / said_often[number]:.1f}"
        most = ""
        if number in taken_for:
            ((wrong, times),) = taken_for[number].most_common(1)
            most = f"{name_of(wrong)} ({times:,})"
        rows.append(
            (
                name_of(number),
                f"{count:,}",
                f"{recall:.1f}",
                page.bar(recall),
                precision,
                most,
            )
        )
    rows.sort(key=lambda row: float(row[2]))
    what = "accuracy" if all(len(truth) < 2 for truth in guesses.truth) else "recall"
    head = ["class", "images", f"{what}, %", "", "precision, %", "most often taken for"]
    if not taken_for:  # images have several labels, or nothing was confused
        head.pop()
        rows = [row[:-1] for row in rows]
    intro = SORTED
    if len(shown) > MOST_CLASSES:
        intro += f" {MOST_CLASSES:,} of {len(shown):,} classes, those with the most images."
    return page.card(f"Classes, {title}", page.sortable_table(head, rows, (0, 5)), intro=intro)


def confusion_card(
    title: str, guesses: Guesses, name_of: ClassNames, images: Sequence
) -> Markup | None:
    """The pairs of classes that are confused most often, with images; None where there are none."""
    pairs: dict[tuple[int, int], list[int]] = {}
    shown: Counter[int] = Counter()
    for number, said, truth in guesses.rows():
        shown.update(truth)
        if len(truth) == 1 and said[0] != truth[0]:
            pairs.setdefault((truth[0], said[0]), []).append(number)
    cases = []
    for (true, said), numbers in sorted(pairs.items(), key=lambda item: -len(item[1]))[:CONFUSIONS]:
        alt = f"{name_of(true)}, taken for {name_of(said)}"
        thumbs = [page.thumbnail(images[number], 72, alt=alt) for number in numbers[:ALIKE]]
        count = f"{len(numbers):,} of {shown[true]:,}"
        pair = page.bold(f"{name_of(true)} → {name_of(said)}")
        shown_pair = page.join(page.badge(count, False), pair, page.group("hits", thumbs))
        cases.append(page.case(None, shown_pair))
    if not cases:
        return None
    intro = "True class → what it was taken for; how many of its images."
    return page.card(f"Confusions, {title}", page.group("cases", cases), intro=intro)


def class_case(
    number: int,
    guesses: Guesses,
    name_of: ClassNames,
    image: object,
    right: bool,
    beside: Markup,
) -> Markup:
    """An image, the likeliest classes with their scores, what it shows, and what else is known."""
    truth = guesses.truth[number]
    items = []
    shown = max(SHOWN, len(truth))
    for rank, label in enumerate(guesses.classes[number, :shown].tolist()):
        text, fill = score_of(guesses, number, rank)
        items.append((name_of(label), text, kind(label in truth, said=rank < len(truth)), fill))
    shows = ", ".join(name_of(label) for label in truth) or "nothing known"
    good, bad = ("right", "wrong") if len(truth) < 2 else ("all found", "not all")
    verdict = page.badge(good if right else bad, right)
    said = page.join(verdict, page.ranked(items, f"true: {shows}"), beside)
    return page.case(page.thumbnail(image, 112, alt=shows), said)


def score_of(guesses: Guesses, number: int, rank: int) -> tuple[str, float | None]:
    """The probability of a guess in words, and as the fraction of its line that is shaded."""
    if guesses.scores is None:
        return "", None
    score = float(guesses.scores[number, rank])
    return f"{score:.1%}", score


def neighbour_hits(images: Iterable, right: Iterable[bool], texts: Iterable[str]) -> Markup:
    """The nearest training images of one, framed green where they are of its class."""
    hits = []
    for image, same, text in zip(images, right, texts, strict=True):
        alt = "a neighbour of its class" if same else "a neighbour of another class"
        hits.append(page.figure(page.thumbnail(image, 64, same, alt), text))
    return page.group("hits", hits)


# ---- zero-shot
class Shown(LazyImages):
    """The pixels of the images of a data set for zero-shot evaluation."""

    def __init__(self, images):
        super().__init__(self._pixels, len(images))
        self.images = images

    def _pixels(self, number: int) -> torch.Tensor:
        return self.images[number]["image"]


def classification_card(
    name: str, images: Sequence, classes: Sequence, found: Classified
) -> Markup:
    """The classes, confusions and images of a data set, folded up; of images with several labels
    the average precision of every class. Nothing on other processes than the first."""
    if distributed.rank() != 0:
        return Markup()
    if found.targets.ndim == 1:
        guesses = Guesses(found.best, None, [[label] for label in found.targets.tolist()])
        return page.folded(
            f"{name}: classes and images", class_cards(name, classes, guesses, images)
        )
    rows = [row for row in class_rows(classes, found) if row["figure"] is not None]
    rows.sort(key=itemgetter("figure"))
    cells = []
    for row in rows[:MOST_CLASSES]:
        bar = page.bar(row["figure"])
        cells.append((row["class"], f"{row['images']:,}", f"{row['figure']:.1f}", bar))
    head = ["class", "images", "11-point average precision, %", ""]
    card = page.card(f"Classes, {name}", page.sortable_table(head, cells), intro=SORTED)
    return page.folded(f"{name}: classes", [card])


def class_rows(classes: Sequence, found: Classified) -> list[dict]:
    """Of every class its name, its images and its figure in percent, None without images."""
    if found.targets.ndim == 1:
        shown = found.targets.bincount(minlength=len(classes))
    else:
        shown = (found.targets == 1).sum(0)
    rows = []
    for number, names in enumerate(classes):
        figure = found.by_class[number]
        rows.append(
            {
                "class": names if isinstance(names, str) else names[0],
                "images": int(shown[number]),
                "figure": None if torch.isnan(figure) else figure.item(),
            }
        )
    return rows
