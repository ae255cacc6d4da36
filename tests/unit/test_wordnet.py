"""WordNet look-ups in a tiny database, where it is found, and what is said where it is not."""

import pickle
import zipfile
from pathlib import Path

import pytest

from base.errors import UserError
from dataset.text import wordnet
from dataset.text.wordnet import DEBIAN, FILES, WordNet, find_wordnet

SYNSETS = {
    "noun": [
        ["dog", "domestic_dog", "Canis_familiaris"],
        ["goose"],
        ["dog", "cad"],
        ["well-being"],
    ],
    "verb": [["run", "go"], ["chase", "dog"]],
    "adj": [["galore(ip)", "aplenty"]],
    "adv": [],
}
EXCEPTIONS = {
    "noun": "geese goose\nzzz zz\n",
    "verb": "ran run\n",
    "adj": "aaa bb\n",
    "adv": "best well\n",
}
LICENCE = "  1 This software and database\n  2 is being provided to you\n"


def write_database(folder: Path) -> Path:
    """A database of a few synsets in WordNet's format."""
    folder.mkdir(parents=True)
    for part, synsets in SYNSETS.items():
        data, places = LICENCE, {}
        for names in synsets:
            offset = len(data)
            words = " ".join(f"{name} 0" for name in names)
            data += f"{offset:08d} 05 {part[0]} {len(names):02x} {words} 001 @ 00000000 n 0000 | a gloss about it\n"
            for name in names:
                places.setdefault(name.partition("(")[0].lower(), []).append(offset)
        index = LICENCE
        for lemma in sorted(places):
            offsets = " ".join(f"{offset:08d}" for offset in places[lemma])
            index += (
                f"{lemma} {part[0]} {len(places[lemma])} 1 @ {len(places[lemma])} 0 {offsets}  \n"
            )
        (folder / f"data.{part}").write_text(data)
        (folder / f"index.{part}").write_text(index)
        (folder / f"{part}.exc").write_text(EXCEPTIONS[part])
    return folder


@pytest.fixture
def database(tmp_path) -> Path:
    return write_database(tmp_path / "corpora/wordnet")


def test_synonyms_are_those_of_all_synsets_and_base_forms(database):
    found = WordNet(database)
    assert found.synonyms("dog") == ("cad", "canis familiaris", "chase", "domestic dog")
    assert found.synonyms("dogs") == ("cad", "canis familiaris", "chase", "dog", "domestic dog")
    assert found.synonyms("Dog") == ("cad", "canis familiaris", "chase", "dog", "domestic dog")
    assert found.synonyms("running") == () and found.synonyms("runs") == ("go", "run")
    assert found.synonyms("galore") == ("aplenty",)
    assert found.synonyms("well-being") == ("well being",)
    assert found.synonyms("nothing") == found.synonyms("") == ()


def test_base_forms(database):
    found = WordNet(database)
    assert found.bases("geese", "noun") == ["goose"] and found.bases("ran", "verb") == ["run"]
    assert found.bases("dogs", "noun") == ["dog"] and found.bases("gooses", "noun") == ["goose"]
    assert found.bases("dog", "adj") == []


def test_found_on_nltks_path_as_folder_or_zip(database, tmp_path, monkeypatch):
    monkeypatch.setenv("NLTK_DATA", str(tmp_path))
    assert find_wordnet() == database
    zipped = tmp_path / "zipped/corpora/wordnet.zip"
    zipped.parent.mkdir(parents=True)
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as bundle:
        for name in FILES:
            bundle.write(database / name, f"wordnet/{name}")
    monkeypatch.setenv("NLTK_DATA", str(tmp_path / "zipped"))
    found = pickle.loads(pickle.dumps(WordNet()))
    assert found.place == zipped and found.synonyms("cad") == ("dog",)


def test_missing_names_both_ways_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("NLTK_DATA", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(wordnet, "DEBIAN", str(tmp_path / "none"))
    monkeypatch.setattr(wordnet, "PLACES", (str(tmp_path / "none"),))
    with pytest.raises(UserError, match=r"apt-get install wordnet-base.*nltk\.downloader wordnet"):
        find_wordnet()


@pytest.mark.skipif(
    not Path(DEBIAN, "data.noun").is_file(), reason="Debian's wordnet-base is not installed"
)
def test_the_real_database():
    assert {"domestic dog", "hound", "frank"} <= set(WordNet(DEBIAN).synonyms("dog"))
    assert "run" in WordNet(DEBIAN).synonyms("running")
