"""What scripts/doctor.py --fix does to an entry of a list: texts and boxes are fixed, entries that
training or evaluation would stumble over are left out."""

from collections import Counter
from collections.abc import Container, Iterable, Iterator

from base.text import is_blank
from dataset.health.samples import TEXT_FIELDS, Facts, box_inside, boxes_of


def unfit_samples(facts: Iterable[Facts], unknown_classes: Container[str]) -> dict[int, str]:
    """Index in the facts -> why a sample is left out, beside what is unreadable, repeated or leaks:
    no answer that may be given, an id that came before, a class that is not in the list.

    unknown_classes: labels, as the facts have them.
    """
    found: dict[int, str] = {}
    seen: set[str] = set()
    for place, each in enumerate(facts):
        for problem in ("no answer", "answer not in the list"):
            if problem in each.problems:
                found.setdefault(place, problem)
        if seen.intersection(each.ids):
            found.setdefault(place, "repeated id")
        seen.update(each.ids)
        if any(label in unknown_classes for label in each.labels):
            found.setdefault(place, "class not in the list")
    return found


def fixed_entries(entries: Iterable[tuple[dict, Facts]], counts: Counter) -> Iterator[dict]:
    """The entries with their texts and boxes fixed; counts: how many of each fix, by its name.

    An entry whose box has no area within its image is left out.
    """
    for entry, facts in entries:
        fixed = dict(entry)
        if "wrongly encoded" in facts.problems:
            counts["encodings fixed"] += _fix_texts(fixed)
        if "empty text" in facts.problems:
            counts["blank captions removed"] += _remove_blanks(fixed)
        if "box outside" in facts.problems:
            if not _clip_boxes(fixed, facts.images[0].size):
                counts["boxes without area left out"] += 1
                continue
            counts["boxes clipped"] += 1
        yield fixed


def _fix_texts(entry: dict) -> int:
    """Undo wrong encodings in place, as ftfy does; returns how many texts changed."""
    from ftfy import fix_encoding

    changed = 0
    for field in TEXT_FIELDS:
        given = entry.get(field)
        texts = [given] if isinstance(given, str) else given
        if not isinstance(texts, list):
            continue
        fixed = [fix_encoding(text) if isinstance(text, str) else text for text in texts]
        changed += sum(before != after for before, after in zip(texts, fixed, strict=True))
        entry[field] = fixed[0] if isinstance(given, str) else fixed
    return changed


def _remove_blanks(entry: dict) -> int:
    """Take blank captions out of several, with their weights; returns how many."""
    captions = entry.get("caption")
    weights = entry.get("caption_weights")
    if not isinstance(captions, list):
        return 0
    kept = [place for place, text in enumerate(captions) if not is_blank(str(text))]
    entry["caption"] = [captions[place] for place in kept]
    if isinstance(weights, list) and len(weights) == len(captions):
        entry["caption_weights"] = [weights[place] for place in kept]
    return len(captions) - len(kept)


def _clip_boxes(entry: dict, size: tuple[int, int]) -> bool:
    """Cut the boxes of an entry at the border of its image of (height, width); False where one has
    no area in it."""
    clipped = [[*_clipped(box, size)] for box in boxes_of(entry)]
    if not all(box_inside(box, size) for box in clipped):
        return False
    if entry.get("boxes"):
        rests = [box[4:] for box in entry["boxes"]]
        entry["boxes"] = [[*box, *rest] for box, rest in zip(clipped, rests, strict=True)]
    else:
        entry["bbox"] = [*clipped[0], *entry["bbox"][4:]]
    return True


def _clipped(box: list[float], size: tuple[int, int]) -> tuple[float, float, float, float]:
    x, y, w, h = box
    height, width = size
    left = max(0, x)
    top = max(0, y)
    right = min(width, x + w)
    bottom = min(height, y + h)
    return left, top, right - left, bottom - top
