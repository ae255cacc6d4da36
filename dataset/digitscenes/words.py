"""Words: five captions a scene, and the short facts from which questions and statements are
made."""

from collections.abc import Iterator

import numpy as np

from dataset.digitscenes.scenes import COUNTS, Scene

CORNERS = {
    "middle": "centre",
    "upper left": "top left",
    "upper right": "top right",
    "lower left": "bottom left",
    "lower right": "bottom right",
}

SHORT_TEMPLATES = ("{}", "a {}", "a handwritten {}", "the digit {}")  # of one digit

# {a} {b} {c}: "red three"; {A} {B}: "large red three"; {g}: the ground; {p}, {q}: the place in two
# wordings. Each template names every digit with its colour, the ground and the arrangement; number
# words are kept for digits.
LONE = (
    "a {a} in the {p} of a {g} ground",
    "{g} background with a lone {a} in the {q}",
    "a handwritten {a} on {g}, placed in the {p}",
    "on a {g} ground there is a {A} in the {q}",
    "a {A} by itself in the {p}, {g} background",
)
CAPTIONS = {
    "middle": LONE,
    "upper left": LONE,
    "upper right": LONE,
    "lower left": LONE,
    "lower right": LONE,
    "row": (
        "a {a} to the left of a {b} on a {g} ground",
        "a {b} to the right of a {a}, {g} background",
        "on {g}, a {a} on the left and a {b} on the right",
        "a pair of digits side by side on a {g} ground: {a}, then {b}",
        "a {A} with a {B} on its right, drawn on {g}",
    ),
    "column": (
        "a {a} above a {b} on a {g} ground",
        "a {b} below a {a}, {g} background",
        "on {g}, a {a} at the top and a {b} at the bottom",
        "a pair of digits stacked on a {g} ground: {a} over {b}",
        "a {A} with a {B} underneath, drawn on {g}",
    ),
    "falling": (
        "a {a} in the upper left and a {b} in the lower right of a {g} ground",
        "a {b} below and to the right of a {a}, {g} background",
        "on {g}, a {a} at the top left and a {b} at the bottom right",
        "a pair of digits sloping down on a {g} ground: {a}, then {b}",
        "a {A} with a {B} to its lower right, drawn on {g}",
    ),
    "rising": (
        "a {b} in the upper right and a {a} in the lower left of a {g} ground",
        "a {b} above and to the right of a {a}, {g} background",
        "on {g}, a {a} at the bottom left and a {b} at the top right",
        "a pair of digits sloping up on a {g} ground: {a}, then {b}",
        "a {A} with a {B} to its upper right, drawn on {g}",
    ),
    "triple row": (
        "a {a}, a {b} and a {c} in a row on a {g} ground",
        "a {b} between a {a} on the left and a {c} on the right, {g} background",
        "on {g} from left to right: {a}, {b}, {c}",
        "a line of digits on a {g} ground: {a}, {b}, then {c}",
        "a {a} left of a {b} left of a {c}, drawn on {g}",
    ),
    "one above two": (
        "a {a} above a {b} and a {c} on a {g} ground",
        "a {b} beside a {c}, below a {a}, {g} background",
        "on {g}, a {a} at the top, a {b} and a {c} at the bottom",
        "a triangle of digits on a {g} ground: {a} over {b} and {c}",
        "a {b} left of a {c}, both under a {a}, drawn on {g}",
    ),
    "one below two": (
        "a {a} below a {b} and a {c} on a {g} ground",
        "a {b} beside a {c}, above a {a}, {g} background",
        "on {g}, a {b} and a {c} at the top, a {a} at the bottom",
        "a triangle of digits on a {g} ground: {b} and {c} over {a}",
        "a {b} left of a {c}, both over a {a}, drawn on {g}",
    ),
}


def captions(scene: Scene) -> list[str]:
    """Five differently worded captions; any of them identifies the scene's content."""
    fields = {"g": scene.ground, "p": scene.arrangement, "q": CORNERS.get(scene.arrangement)}
    for letter, digit in zip("abc", scene.digits, strict=False):
        fields[letter], fields[letter.upper()] = digit.name, f"{digit.size} {digit.name}"
    return [template.format(**fields) for template in CAPTIONS[scene.arrangement]]


def alt_texts(scene: Scene) -> list[str]:
    """Five short texts of an image of one digit, as the alternative texts of web images: most name
    nothing else.

    Colours are easy and tell most images of a batch apart: under fuller captions contrast learns
    digits last.
    """
    digit = scene.digits[0]
    return [template.format(digit.word) for template in SHORT_TEMPLATES] + [f"a {digit.name}"]


# arrangement -> (relation, number of a digit, number of another)
RELATIONS = {
    "row": [("left", 0, 1)],
    "falling": [("left", 0, 1), ("above", 0, 1)],
    "rising": [("left", 0, 1), ("above", 1, 0)],
    "column": [("above", 0, 1)],
    "triple row": [("left", 0, 1), ("left", 1, 2), ("left", 0, 2)],
    "one above two": [("left", 1, 2), ("above", 0, 1), ("above", 0, 2)],
    "one below two": [("left", 1, 2), ("above", 1, 0), ("above", 2, 0)],
}


def relations(scene: Scene) -> Iterator[tuple[str, str, str]]:
    """(relation, word, word): ("left", "three", "seven") says that a three stands to the left of a
    seven."""
    for relation, first, second in RELATIONS.get(scene.arrangement, ()):
        yield relation, scene.digits[first].word, scene.digits[second].word


def facts(scene: Scene) -> list[tuple[str, ...]]:
    """Everything that can be said of a scene, as (kind, word, ...) without repetition and in a
    fixed order."""
    found: dict[tuple[str, ...], None] = {
        ("count", COUNTS[len(scene.digits)]): None,
        ("ground", scene.ground): None,
    }
    for d in scene.digits:
        for fact in (
            ("digit", d.word),
            ("colour", d.colour),
            ("name", d.name),
            ("sized", f"{d.size} {d.word}"),
        ):
            found[fact] = None
    for relation, first, second in relations(scene):
        if first != second:
            found[relation, first, second] = None
    return list(found)


class FactIndex:
    """Which scenes of one split hold a fact: `facts[i]` are scene i's, `holders[fact]` the
    ascending positions."""

    def __init__(self, scenes: list[Scene]) -> None:
        self.scenes = scenes
        self.facts = [facts(scene) for scene in scenes]
        self.sets = [frozenset(found) for found in self.facts]
        self.holders: dict[tuple[str, ...], list[int]] = {}
        for i, found in enumerate(self.facts):
            for fact in found:
                self.holders.setdefault(fact, []).append(i)

    def having(self, fact: tuple[str, ...], rng: np.random.Generator) -> int:
        """Some scene that holds the fact (which some scene must)."""
        return self.holders[fact][rng.integers(len(self.holders[fact]))]

    def lacking(self, fact: tuple[str, ...], rng: np.random.Generator) -> int:
        """Some scene that does not hold the fact (which not every scene may)."""
        while True:
            i = int(rng.integers(len(self.scenes)))
            if fact not in self.sets[i]:
                return i

    def near_miss(
        self, fact: tuple[str, ...], of: int, rng: np.random.Generator, tries: int = 4
    ) -> int | None:
        """A scene where the fact is wrong but much else is as in scene `of`; None if there is no
        such scene.

        A relation is wrong where the same two digits stand the other way round.
        """
        if fact[0] in ("left", "above"):
            turned = [
                i
                for i in self.holders.get((fact[0], fact[2], fact[1]), ())
                if fact not in self.sets[i]
            ]
            return turned[rng.integers(len(turned))] if turned else None
        if len(self.holders[fact]) == len(self.scenes):
            return None
        candidates = [self.lacking(fact, rng) for _ in range(tries)]
        return max(candidates, key=lambda i: len(self.sets[i] & self.sets[of]))
