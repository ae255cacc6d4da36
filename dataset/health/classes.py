"""What can be wrong with the classes of labelled images: names that are unknown, unused, alike, and
classes of very different sizes."""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from base.names import nearest, some
from dataset.sources.class_folder import class_folders

UNBALANCED = 50  # times as many images in the largest class as in the smallest
SHOWN = 3  # names of a finding


class Finding(NamedTuple):
    """A problem, how many classes have it, and which. harmful: training or its test would suffer."""

    problem: str
    classes: int
    example: str
    harmful: bool = False


def look_at_classes(parts: Sequence, listed: Sequence[str] = ()) -> None:
    """Note in every part, a `survey.Surveyed`, its classes and what is wrong with them; the first
    part is the training set. listed: names that the classes may have, none = any."""
    trained = None
    for part in parts:
        balance = part.balance()
        folders = class_folders(Path(part.data)) if Path(part.data).is_dir() else []
        names = names_of(balance, folders or listed)
        part.classes = Counter()
        for label, name in names.items():
            part.classes[name] += balance[label]
        if part.classes:
            part.findings = class_findings(part.classes, listed, trained)
            empty = [name for name in folders if name not in part.classes]
            if empty and not {*part.classes} - {*folders}:  # folders are the classes
                finding = Finding("folder without images", len(empty), some(empty, SHOWN), True)
                part.findings.insert(0, finding)
            known = set(listed)
            part.unknown_labels = {label for label in names if known and names[label] not in known}
            trained = trained or set(part.classes)


def names_of(balance: Counter, names: Sequence[str]) -> dict[str, str]:
    """The name of the class of every label: of `names`, class folders or a list, or as the label
    has it.

    balance: images by label, as texts; numbers are positions in `names`.
    """
    found = {}
    for label in balance:
        known = label.isdigit() and int(label) < len(names)
        found[label] = names[int(label)] if known else label
    return found


def class_findings(
    shown: Counter, listed: Sequence[str] = (), trained: Iterable[str] | None = None
) -> list[Finding]:
    """The findings of a data set, harmful ones first.

    shown: images by class; listed: the names that the classes may have, none = any; trained: the
    classes of the training set, where this is a later split.
    """
    found = []
    known = set(listed)
    unknown = [name for name in shown if known and name not in known]
    if unknown:
        like = nearest(unknown[0], listed)
        hint = f"; did the list mean {like}?" if like else ""
        found.append(
            Finding("class not in the list", len(unknown), some(unknown, SHOWN) + hint, True)
        )
    trained = None if trained is None else set(trained)
    alone = [name for name in shown if trained and name not in trained]
    if alone:
        found.append(Finding("class never trained", len(alone), some(alone, SHOWN), True))
    unused = [name for name in dict.fromkeys(listed) if name not in shown]
    if unused:
        found.append(Finding("class without images", len(unused), some(unused, SHOWN)))
    twice = [name for name, count in Counter(listed).items() if count > 1]
    if twice:
        found.append(Finding("repeated class name", len(twice), some(twice, SHOWN)))
    alike = similar_names([*shown, *listed])
    if alike:
        example = "; ".join(" = ".join(group) for group in alike[:SHOWN])
        found.append(Finding("similar class names", len(alike), example))
    if len(shown) > 1:
        by_size = shown.most_common()
        most, high = by_size[0]
        least, low = by_size[-1]
        if high >= UNBALANCED * low:
            rare = sum(count * UNBALANCED <= high for count in shown.values())
            found.append(
                Finding("unbalanced classes", rare, f"{most}: {high:,} … {least}: {low:,} images")
            )
    return found


def similar_names(names: Iterable[str]) -> list[list[str]]:
    """Groups of names that differ in case, accents, blanks, hyphens, or a plural's s alone."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in dict.fromkeys(names):
        groups[_plain(name)].append(name)
    return [group for key, group in groups.items() if len(group) > 1 and key]


def _plain(name: str) -> str:
    apart = unicodedata.normalize("NFKD", name.casefold())
    letters = "".join(letter for letter in apart if not unicodedata.combining(letter))
    words = re.sub(r"[\s_\-]+", "", letters)
    return words[:-1] if len(words) > 3 and words.endswith("s") and words[-2] != "s" else words
