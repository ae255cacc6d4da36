"""WordNet's database files, read where they lie: synonyms and base forms of English words.

Nothing is loaded beforehand: the files are mapped into memory, which all processes of a machine
share, and searched. NLTK's own reader takes neither Debian's folder (it needs a file `lexnames`, and
since 3.10 refuses folders outside its data path) nor less than a copy of the index a process.
Format: wndb(5WN) and morphy(7WN) of Princeton's WordNet.
"""

import mmap
import os
import zipfile
import zlib
from functools import lru_cache
from pathlib import Path

from base.errors import UserError

PARTS = ("noun", "verb", "adj", "adv")
FILES = tuple(f"{kind}.{part}" for kind in ("index", "data") for part in PARTS) + tuple(
    f"{part}.exc" for part in PARTS
)
SUFFIXES = {  # morphy's rules: ending -> ending of the base form
    "noun": "s: ses:s ves:f xes:x zes:z ches:ch shes:sh men:man ies:y",
    "verb": "s: ies:y es:e es: ed:e ed: ing:e ing:",
    "adj": "er: est: er:e est:e",
    "adv": "",
}
RULES = {
    part: [tuple(rule.split(":")) for rule in rules.split()] for part, rules in SUFFIXES.items()
}
DEBIAN = "/usr/share/wordnet"
PLACES = (
    "~/nltk_data",
    "/usr/local/share/nltk_data",
    "/usr/share/nltk_data",
)  # NLTK's, besides $NLTK_DATA


def find_wordnet() -> Path:
    """Folder (or .zip) with the database: `corpora/wordnet` on NLTK's data path, else Debian's.
    UserError if absent."""
    roots = [Path(root) for root in os.environ.get("NLTK_DATA", "").split(os.pathsep) if root]
    roots += [Path(root).expanduser() for root in PLACES]
    places = [root / "corpora" / name for root in roots for name in ("wordnet", "wordnet.zip")] + [
        Path(DEBIAN)
    ]
    for place in places:
        if place.is_file() or all((place / name).is_file() for name in FILES):
            return place
    raise UserError(
        "text augmentation by synonyms needs WordNet, and it is not on this machine. Either `apt-get install "
        f"wordnet-base` (puts it into {DEBIAN}), or `python -m nltk.downloader wordnet` (puts it on NLTK's data path, "
        "$NLTK_DATA or ~/nltk_data); or switch synonyms off: --synonym-replacement-prob 0"
    )


class WordNet:
    """Look-ups in the database at `place` (see find_wordnet)."""

    def __init__(self, place: str | Path | None = None):
        self.place = Path(place) if place else find_wordnet()
        read = _zip_members if self.place.is_file() else _mapped_files
        self.files = read(self.place)

    def __reduce__(self):
        return WordNet, (self.place,)

    @lru_cache(maxsize=1 << 16)  # noqa: B019 - one object per process
    def synonyms(self, word: str) -> tuple[str, ...]:
        """What textaugment calls synonyms, sorted: names in all synsets of the word and its base
        forms, `_` and `-` turned to blanks, lower case, letters and blanks only, without the word
        itself. A name may be empty.
        """
        found = set()
        for part in PARTS:
            for base in self.bases(word.lower(), part):
                for name in self.names(base, part):
                    spaced = name.lower().replace("_", " ").replace("-", " ")
                    found.add("".join(letter for letter in spaced if letter in KEPT))
        return tuple(sorted(found - {word}))

    def bases(self, word: str, part: str) -> list[str]:
        """The word and its base forms that are in the database as `part` of speech, the word first
        (morphy)."""
        exceptions = self._line(f"{part}.exc", word)
        forms = exceptions[1:]
        if not exceptions:
            for old, new in RULES[part]:
                if word.endswith(old):
                    forms.append(word.removesuffix(old) + new)
        return [
            form
            for form in dict.fromkeys([word, *forms])
            if form and self._line(f"index.{part}", form)
        ]

    def names(self, base: str, part: str) -> list[str]:
        """Names in all synsets of a base form, as the database spells them."""
        # lemma pos synsets pointers symbol... senses tagged offset...
        entry = self._line(f"index.{part}", base)
        found = []
        for offset in entry[6 + int(entry[3]) :]:
            data = self.files[f"data.{part}"]
            fields = data[int(offset) : data.find(b"\n", int(offset))].decode().split(" ")
            names = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
            # galore(ip): where an adjective may stand
            found += [name.partition("(")[0] for name in names]
        return found

    def _line(self, name: str, key: str) -> list[str]:
        """Fields of the line that begins with `key` in a sorted file; empty if there is none."""
        data = self.files[name]
        wanted = key.replace(" ", "_").encode()
        low = 0
        high = len(data)
        while low < high:  # first line whose key is >= wanted begins in [low, high]
            middle = data.rfind(b"\n", 0, (low + high) // 2) + 1
            end = _end_of_line(data, middle)
            if data[middle:end].partition(b" ")[0] < wanted:
                low = end + 1
            else:
                high = middle
        found: list[str] = []
        while True:  # of several exceptions NLTK takes the last
            end = _end_of_line(data, low)
            line = data[low:end].decode().split()
            if line[:1] != [wanted.decode()]:
                return found
            found = line
            low = end + 1


def _end_of_line(data: mmap.mmap | bytes, place: int) -> int:
    end = data.find(b"\n", place)
    return len(data) if end < 0 else end


KEPT = " abcdefghijklmnopqrstuvwxyz"


def _mapped_files(folder: Path) -> dict[str, mmap.mmap]:
    files = {}
    for name in FILES:
        try:
            with (folder / name).open("rb") as file:
                files[name] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            message = f"{folder / name}: cannot be read ({error}); install WordNet again"
            raise UserError(message) from None
    return files


def _zip_members(archive: Path) -> dict[str, bytes]:
    """NLTK's downloader leaves corpora in zip files, which cannot be mapped."""
    try:
        with zipfile.ZipFile(archive) as bundle:
            names = {Path(name).name: name for name in bundle.namelist()}
            missing = [name for name in FILES if name not in names]
            if missing:
                raise UserError(f"{archive}: no WordNet, {missing[0]} is not in it; fetch it again")
            return {name: bundle.read(names[name]) for name in FILES}
    except (zipfile.BadZipFile, zlib.error, OSError, NotImplementedError) as error:
        raise UserError(f"{archive}: cannot be read ({error}); fetch it again") from None
