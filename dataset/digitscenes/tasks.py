"""Annotations of the tasks: questions, statements about one or two images, expressions that refer
to one digit.

Where a model could guess from the words alone, the guess is made worthless: a yes/no question, an
entailed statement and an NLVR2 sentence each come back word for word with an image for which the
opposite is right.
"""

from collections import Counter
from collections.abc import Iterator

import numpy as np

from dataset.digitscenes.scenes import COUNTS, Digit, Scene
from dataset.digitscenes.words import FactIndex

# Some of the ten annotators use the other word.
SYNONYMS = {"grey": "gray", "navy": "dark blue", "large": "big", "small": "little"}
YES_NO = {
    "ground": "is the ground {0}?",
    "digit": "is there a {0}?",
    "colour": "is there a {0} digit?",
    "name": "is there a {0}?",
    "left": "is the {0} to the left of the {1}?",
    "above": "is the {0} above the {1}?",
}
STATEMENTS = {
    "count": ("the number of digits is {0}", "counting the digits gives {0}"),
    "ground": ("the ground is {0}", "the background is painted {0}"),
    "digit": ("there is a {0} in the picture", "somebody wrote a {0}"),
    "colour": ("there is a {0} digit", "something here is written in {0}"),
    "name": ("there is a {0}", "a {0} can be seen"),
    "sized": ("there is a {0}", "the picture shows a {0}"),
    "left": ("a {0} is to the left of a {1}", "a {1} is to the right of a {0}"),
    "above": ("a {0} is above a {1}", "a {1} is below a {0}"),
}
UNDECIDABLE = (
    "a child wrote the {0}",
    "the {0} was written in a hurry",
    "the {0} was written yesterday",
    "the {0} is part of a phone number",
    "the {0} stands for a price",
    "the writer of the {0} is left handed",
    "whoever wrote the {0} was tired",
    "the {0} hangs in a classroom",
)
NOUN_PHRASES = {
    "digit": "a {0}",
    "colour": "a {0} digit",
    "name": "a {0}",
    "ground": "a {0} ground",
    "sized": "a {0}",
}
# NLVR2: a sentence about two images, and whether (left, right) hold the fact when it is true and
# when it is false.
PAIR_SENTENCES = (
    ("both pictures show {0}", [(1, 1)], [(1, 0), (0, 1)]),
    ("exactly one of the two pictures shows {0}", [(1, 0), (0, 1)], [(1, 1), (0, 0)]),
    ("at least one of the two pictures shows {0}", [(1, 0), (0, 1), (1, 1)], [(0, 0)]),
    (
        "the left picture shows {0} but the right picture does not",
        [(1, 0)],
        [(0, 1), (1, 1), (0, 0)],
    ),
    ("neither picture shows {0}", [(0, 0)], [(1, 0), (0, 1), (1, 1)]),
)


# ---- questions and answers
def unique(digits: tuple[Digit, ...], attribute: str) -> list[Digit]:
    """The digits that no other digit of the scene equals in `attribute`."""
    counts = Counter(getattr(d, attribute) for d in digits)
    return [d for d in digits if counts[getattr(d, attribute)] == 1]


def extremes(scene: Scene) -> Iterator[tuple[str, Digit]]:
    """(place, digit) for every place that exactly one digit takes: ("on the left", ...), ("at the
    top", ...)."""
    d = scene.digits
    if scene.arrangement in ("row", "falling", "rising", "triple row"):
        yield from (("on the left", d[0]), ("on the right", d[-1]))
    if scene.arrangement in ("column", "falling"):
        yield from (("at the top", d[0]), ("at the bottom", d[1]))
    if scene.arrangement == "rising":
        yield from (("at the top", d[1]), ("at the bottom", d[0]))
    if scene.arrangement == "triple row":
        yield "in the middle", d[1]
    if scene.arrangement == "one above two":
        yield "at the top", d[0]
    if scene.arrangement == "one below two":
        yield "at the bottom", d[0]


def open_questions(scene: Scene) -> list[tuple[str, str, str]]:
    """(question type, question, answer) of everything that can be asked of the scene besides yes/no
    questions."""
    asked = [
        ("how many", "how many digits are there?", COUNTS[len(scene.digits)]),
        ("ground colour", "what colour is the ground?", scene.ground),
    ]
    for d in unique(scene.digits, "digit"):
        asked.append(("digit colour", f"what colour is the {d.word}?", d.colour))
        asked.append(("size", f"is the {d.word} large or small?", d.size))
    for d in unique(scene.digits, "colour"):
        asked.append(("which digit", f"which digit is {d.colour}?", d.word))
    for place, d in extremes(scene):
        asked.append(("place", f"which digit is {place}?", d.word))
    return asked


def yes_no_questions(
    index: FactIndex, i: int, rng: np.random.Generator
) -> list[tuple[int, str, str, str]]:
    """A question about scene i with the answer yes, and the same about a scene where it is no; []
    if there is none."""
    kinds = sorted({fact[0] for fact in index.facts[i]} & YES_NO.keys())
    kind = kinds[rng.integers(len(kinds))]
    choices = [fact for fact in index.facts[i] if fact[0] == kind]
    fact = choices[rng.integers(len(choices))]
    other = index.near_miss(fact, i, rng)
    if other is None:
        return []
    question = YES_NO[kind].format(*fact[1:])
    return [(i, "yes/no", question, "yes"), (other, "yes/no", question, "no")]


def ten_answers(answer: str, rng: np.random.Generator) -> list[str]:
    """The answers of ten annotators: unanimous, or up to three of them with the other word for the
    same."""
    other = int(rng.integers(1, 4)) if answer in SYNONYMS and rng.random() < 0.5 else 0
    return [SYNONYMS.get(answer, answer)] * other + [answer] * (10 - other)


def questions(index: FactIndex, rng: np.random.Generator, per_scene: int = 4) -> list[dict]:
    """Per scene some open questions and, every second scene, a balanced yes/no pair.

    Entries {scene, type, question, answer, answers} with `scene` a position in the index and
    `answers` ten strings.
    """
    asked: dict[tuple[int, str], tuple[str, str]] = {}
    for i, scene in enumerate(index.scenes):
        choices = open_questions(scene)
        kinds = sorted({kind for kind, _, _ in choices})
        for kind in rng.permutation(kinds)[: per_scene - 1]:
            of_kind = [(q, a) for k, q, a in choices if k == kind]
            question, answer = of_kind[rng.integers(len(of_kind))]
            asked[i, question] = (str(kind), answer)
        pair = yes_no_questions(index, i, rng) if i % 2 == 0 else []
        if not any((j, question) in asked for j, _, question, _ in pair):
            asked.update({(j, question): (kind, answer) for j, kind, question, answer in pair})
    entries = []
    for (i, question), (kind, answer) in sorted(asked.items()):
        answers = ten_answers(answer, rng)
        about = {"scene": i, "type": kind, "question": question}
        entries.append({**about, "answer": answer, "answers": answers})
    return entries


# ---- statements
def entailment(index: FactIndex, rng: np.random.Generator) -> list[dict]:
    """Per scene an entailed statement, the same statement contradicted by another scene, and one no
    image can decide.

    Entries {scene, sentence, label}. The three labels are equally frequent.
    """
    entries = []
    for i, scene in enumerate(index.scenes):
        kinds = sorted({fact[0] for fact in index.facts[i]})
        kind = kinds[rng.integers(len(kinds))]
        of_kind = [fact for fact in index.facts[i] if fact[0] == kind]
        fact = of_kind[rng.integers(len(of_kind))]
        other = index.near_miss(fact, i, rng)
        if other is None:
            continue
        sentence = STATEMENTS[kind][rng.integers(len(STATEMENTS[kind]))].format(*fact[1:])
        digit = scene.digits[rng.integers(len(scene.digits))]
        undecidable = UNDECIDABLE[rng.integers(len(UNDECIDABLE))]
        name = digit.name if rng.random() < 0.5 else digit.word
        undecidable = undecidable.format(name)
        entries += [
            {"scene": i, "sentence": sentence, "label": "entailment"},
            {"scene": other, "sentence": sentence, "label": "contradiction"},
            {"scene": i, "sentence": undecidable, "label": "neutral"},
        ]
    return entries


def pair_of(
    index: FactIndex, fact: tuple, holds: tuple[int, int], rng: np.random.Generator
) -> tuple[int, int]:
    """Two different scenes (left, right) that hold the fact or not as `holds` says."""

    def sampled(holding: int) -> int:
        return index.having(fact, rng) if holding else index.lacking(fact, rng)

    while True:
        left = sampled(holds[0])
        right = sampled(holds[1])
        if left != right:
            return left, right


def compared_pairs(
    index: FactIndex, i: int, rng: np.random.Generator
) -> Iterator[tuple[str, bool, tuple[int, int]]]:
    """(sentence, label, (left, right)) for sentences that compare the two images, each with both
    labels."""
    scene = index.scenes[i]
    count = len(scene.digits)
    ground = ("ground", scene.ground)
    digits = ("count", COUNTS[count])
    if rng.random() < 0.5 and 2 <= len(index.holders[ground]) < len(index.scenes):
        same = i
        while same == i:
            same = index.having(ground, rng)
        other = index.lacking(ground, rng)
        sentence = "the grounds of the two pictures have the same colour"
        yield sentence, True, (i, same)
        yield sentence, False, (i, other)
    elif len(index.holders[digits]) < len(index.scenes):
        other = index.lacking(digits, rng)
        more = count > len(index.scenes[other].digits)
        sentence = "the left picture shows more digits than the right picture"
        yield sentence, more, (i, other)
        yield sentence, not more, (other, i)


def pair_sentences(index: FactIndex, rng: np.random.Generator) -> list[dict]:
    """NLVR2: per scene one sentence about two images, with a pair for which it is true and one for
    which it is not.

    Entries {scenes: (left, right), sentence, label: "True" | "False"}; facts that a single scene
    holds are not used.
    """
    entries = []
    for i in range(len(index.scenes)):
        usable = []
        for fact in index.facts[i]:
            holders = len(index.holders[fact])
            if fact[0] in NOUN_PHRASES and 2 <= holders <= len(index.scenes) - 2:
                usable.append(fact)
        if rng.random() < 0.25 or not usable:
            made = list(compared_pairs(index, i, rng))
        else:
            kinds = sorted({fact[0] for fact in usable})
            kind = kinds[rng.integers(len(kinds))]
            of_kind = [fact for fact in usable if fact[0] == kind]
            fact = of_kind[rng.integers(len(of_kind))]
            template, *cases = PAIR_SENTENCES[rng.integers(len(PAIR_SENTENCES))]
            sentence = template.format(NOUN_PHRASES[kind].format(fact[1]))
            made = []
            for label, case in zip((True, False), cases, strict=True):
                holds = case[rng.integers(len(case))]
                made.append((sentence, label, pair_of(index, fact, holds, rng)))
        for sentence, label, pair in made:
            entries.append({"scenes": pair, "sentence": sentence, "label": str(label)})
    return entries


# ---- referring expressions
def expressions(scene: Scene, target: Digit, rng: np.random.Generator, count: int = 2) -> list[str]:
    """Up to `count` expressions that fit `target` alone, without words of place (as in
    RefCOCO+)."""
    ways = (
        ("word",),
        ("colour",),
        ("size",),
        ("size", "word"),
        ("size", "colour"),
        ("colour", "word"),
    )

    def words_of(digit: Digit, way: tuple[str, ...]) -> list[str]:
        return [getattr(digit, attribute) for attribute in way]

    fitting = []
    for way in ways:
        alike = [digit for digit in scene.digits if words_of(digit, way) == words_of(target, way)]
        if len(alike) == 1:
            fitting.append(way)
    found = []
    for k in rng.permutation(len(fitting))[:count]:
        way = fitting[k]
        noun = "" if "word" in way else ("digit", "number", "figure")[rng.integers(3)]
        article = ("the ", "")[rng.integers(2)]
        words = " ".join([*words_of(target, way), noun]).strip()
        found.append(article + words)
    return found


def iou(a: tuple, b: tuple) -> float:
    """Intersection over union of two boxes (x, y, w, h) in continuous coordinates."""
    wide = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    high = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    overlap = max(0.0, wide) * max(0.0, high)
    return overlap / (a[2] * a[3] + b[2] * b[3] - overlap)


def inside(box: tuple, scene: Scene) -> tuple[float, ...]:
    """The part of a box within the image, at least one pixel, rounded to hundredths."""
    x = min(max(box[0], 0), scene.width - 1)
    y = min(max(box[1], 0), scene.height - 1)
    right = min(box[0] + box[2], scene.width)
    bottom = min(box[1] + box[3], scene.height)
    return round(x, 2), round(y, 2), round(max(1.0, right - x), 2), round(max(1.0, bottom - y), 2)


def detections(scene: Scene, rng: np.random.Generator, distractors: int = 3) -> list[list[float]]:
    """Boxes [x, y, w, h] as a detector gives them: every digit's a little off (IoU > 0.6), and
    wrong ones (< 0.4)."""
    found = []
    for d in scene.digits:
        x, y, w, h = d.box
        while True:
            dx, dy, dw, dh = rng.uniform(-0.08, 0.08, 4)
            moved = (x + dx * w, y + dy * h, w * (1 + dw), h * (1 + dh))
            box = inside(moved, scene)
            if iou(box, d.box) > 0.6:
                break
        found.append(box)
    while len(found) < len(scene.digits) + distractors:
        w, h = rng.uniform(0.25, 0.6, 2) * (scene.width, scene.height)
        x = rng.uniform(0, scene.width - w)
        y = rng.uniform(0, scene.height - h)
        box = inside((x, y, w, h), scene)
        if all(iou(box, d.box) < 0.4 for d in scene.digits):
            found.append(box)
    return [[float(v) for v in found[k]] for k in rng.permutation(len(found))]


def detections_hit(
    boxes: list[list[float]], target: list[float], threshold: float = 0.5
) -> list[bool]:
    """Which boxes count as finding the target."""
    return [iou(box, target) >= threshold for box in boxes]
