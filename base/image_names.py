"""Names of images in lists: which of them are one image, and which file a name means; the texts
beside images.

Lists are written on other systems than they are read on: a name may be relative or absolute, hold
`./` or `../`, have its accents composed (NFC) or not (NFD, as macOS stores names), or backslashes.
"""

import os
import posixpath
import unicodedata
from collections.abc import Hashable, Iterable
from pathlib import Path

from base.errors import UserError
from base.text import composed

FETCH = "fetch the images of its URLs, as img2dataset does"
BESIDE = (".txt", ".TXT", ".caption")  # endings of a text beside an image; the last is Kohya's


def check_fetched(names: Iterable[str]) -> None:
    """UserError where one of the names of images is an address of the web."""
    for name in names:
        if str(name).startswith(("http://", "https://")):
            raise UserError(
                f"{name}: an image's address, not a file; {FETCH}, and name what it wrote"
            )


class ImageKeys:
    """keys(name): the same for all names of one image in lists whose paths start from `root`; ids
    that are no text stay. The disk is asked only about names with `..`, a backslash or accents that
    are not composed."""

    def __init__(self, root: str | Path = ""):
        self.root = os.path.abspath(root)
        tops = dict.fromkeys((self.root, os.path.realpath(root)))
        self.tops = [composed(top.rstrip("/")) + "/" for top in tops]

    def __call__(self, name: Hashable) -> Hashable:
        if not isinstance(name, str):
            return name
        if "\\" in name and not os.path.lexists(os.path.join(self.root, name)):
            name = name.replace("\\", "/")
        name = self._without_parents(name) if ".." in name else posixpath.normpath(name)
        usual = composed(name)
        if usual != name and self._are_two_files(name, usual):
            return name
        top = next((top for top in self.tops if usual.startswith(top)), "")
        return usual[len(top) :]

    def _without_parents(self, name: str) -> str:
        """The absolute path; `link/..` stays where `link` leads elsewhere."""
        parts = [""]
        for part in os.path.join(self.root, name).split("/"):
            if part == ".." and parts[-1] != ".." and not os.path.islink("/".join(parts)):
                parts = parts[:-1] or [""]
            elif part not in ("", "."):
                parts.append(part)
        return "/".join(parts)

    def _are_two_files(self, *names: str) -> bool:
        try:
            return not os.path.samefile(*(os.path.join(self.root, name) for name in names))
        except (OSError, ValueError):  # one of them is not there
            return False


def existing(path: str | Path) -> Path:
    """The file that a path means: its own, or where there is none, the only one whose name differs
    in how accents are composed, or in `/` for each backslash."""
    path = Path(path)
    text = str(path)
    is_plain = text.isascii() and "\\" not in text and ".." not in path.parts
    if is_plain or os.path.lexists(path):
        return path
    found = Path()
    waiting = list(reversed(path.parts))
    while waiting:
        part = waiting.pop()
        if part == ".." and not os.path.lexists(found):
            found = found.parent
            continue
        there = [each for each in spellings(part) if os.path.lexists(found / each)]
        if not there and "\\" in part:
            waiting += reversed(part.split("\\"))
            continue
        is_clear = part not in there and len(there) == 1
        found = found / (there[0] if is_clear else part)
    return found


def spellings(name: str) -> list[str]:
    """A name as it is, composed, and decomposed: each once."""
    forms = ("NFC", "NFD") if not name.isascii() else ()
    return list(dict.fromkeys((name, *(unicodedata.normalize(form, name) for form in forms))))


def text_beside(image: Path) -> Path | None:
    """The file with an image's captions that has its name and stands beside it."""
    return next(filter(Path.is_file, map(image.with_suffix, BESIDE)), None)
