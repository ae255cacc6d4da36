"""scripts/data/make_dataset.py and scripts/data/convert_metadata.py, run as users run them."""

import bz2
import json
import re

import numpy as np
import pytest

from base.errors import UserError
from dataset.tasks.captions import metadata_rows
from runtime.config.cli import parse
from scripts.data import convert_metadata, make_dataset


def table_line(number: int, title: str, description: str) -> str:
    columns = [
        str(number),
        *(f"column{i}" for i in range(1, 8)),
        title,
        description,
        *["rest"] * 15,
    ]
    return "\t".join(columns) + "\n"


@pytest.fixture
def published(tmp_path):
    """YFCC100M's table of six images, of which four were downloaded and three are on OpenAI's
    list."""
    titles = ["A+red%20dog", "two", "see+http%3A%2F%2Fx.y+now", "four", "<b>five</b>", ""]
    titles[4] += "%2Bwww.x.y+6"
    lines = [
        table_line(n, title, f"<a+href=%22u%22>words</a>+%26+more+{n}")
        for n, title in enumerate(titles)
    ]
    (tmp_path / "table.txt").write_text("\ufeff" + "".join(lines) + "\n")
    (tmp_path / "table.txt.bz2").write_bytes(bz2.compress("".join(lines).encode()))
    np.save(tmp_path / "ids.npy", np.array([4, 0, 2, 5, 5]))
    (tmp_path / "subset.tsv").write_text("".join(f"{n}.0\tid\thash\n" for n in (0, 1, 2, 4)))
    return tmp_path


@pytest.mark.parametrize("table", ["table.txt", "table.txt.bz2"])
def test_yfcc15m(published, table, capsys):
    flags = ["--captions", published / table, "--available", published / "ids.npy"]
    flags += ["--subset", published / "subset.tsv", "--output", published / "out.jsonl"]
    make_dataset.main(parse(make_dataset.Config, list(map(str, flags))))
    rows = [json.loads(line) for line in (published / "out.jsonl").read_text().splitlines()]
    assert [row["image"] for row in rows] == [f"images/00/000.zip/00{n}.jpg" for n in (0, 2, 4)]
    assert rows[0]["caption"] == ["A red dog", "words & more 0"]
    assert rows[1]["caption"][0] == "see  now" and rows[2]["caption"][0] == "five  6"
    assert "3 captioned images (4 available, 4 on the list)" in capsys.readouterr().out


def test_tables_are_found_packed_as_they_are_published(published, monkeypatch):
    monkeypatch.chdir(published)
    (published / "table.txt").unlink()
    (published / "table.txt.bz2").rename("yfcc100m_dataset.bz2")
    (published / "ids.npy").rename("flickr_unique_ids.npy")
    packed = bz2.compress((published / "subset.tsv").read_bytes())
    (published / "yfcc100m_subset_data.tsv.bz2").write_bytes(packed)
    make_dataset.main(parse(make_dataset.Config, []))
    assert len((published / "yfcc15m.jsonl").read_text().splitlines()) == 3


def test_mistakes_of_make_dataset(published):
    def run(**changes):
        files = {
            "captions": "table.txt",
            "available": "ids.npy",
            "subset": "subset.tsv",
            "output": "o.jsonl",
        } | changes
        flags = [
            word for name, file in files.items() for word in (f"--{name}", str(published / file))
        ]
        make_dataset.main(parse(make_dataset.Config, flags))

    with pytest.raises(UserError, match=r"none\.tsv: no such file"):
        run(subset="none.tsv")
    (published / "bad.txt").write_text("1\t2\n")
    with pytest.raises(UserError, match=r"bad\.txt, line 0.*columns"):
        run(captions="bad.txt")
    np.save(published / "floats.npy", np.array([0.5]))
    with pytest.raises(UserError, match=r"floats\.npy.*line numbers"):
        run(available="floats.npy")
    table = (published / "table.txt.bz2").read_bytes()
    damaged = {
        "captions": {
            "cut.bz2": table[:-9],
            "no.bz2": b"x",
            "latin.txt": b"0\t\xe9",
            "other.txt": b"",
        },
        "available": {"no.npy": b"\x93NUMPY\1", "pickle.npy": b"x"},
        "subset": {
            "huge.tsv": b"9" * 30,
            "negative.tsv": b"-1",
            "half.tsv": b"0.5",
            "none.tsv": b"",
        },
    }
    for option, files in damaged.items():
        for name, content in files.items():
            (published / name).write_bytes(content)
            with pytest.raises(UserError, match=re.escape(name)):
                run(**{option: name})
    with pytest.raises(UserError, match="first column must be line numbers, not '-1'"):
        run(subset="negative.tsv")
    assert not (published / "o.jsonl").exists()


def test_conversion(digitscenes, tmp_path, capsys):
    flags = [
        "--dataset",
        "yfcc15m",
        "--metadata",
        digitscenes / "yfcc15m/yfcc15m.pkl",
        "--output",
        tmp_path / "o.jsonl",
    ]
    convert_metadata.main(parse(convert_metadata.Config, list(map(str, flags))))
    rows = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert len(rows) == 64 and rows[3]["image"] == "images/00/000.zip/003.jpg"
    with pytest.raises(UserError, match="--output"):
        convert_metadata.main(parse(convert_metadata.Config, ["--metadata", "x"]))
    assert capsys.readouterr().out == f"{tmp_path}/o.jsonl: 64 samples\n"


def test_conversion_counts_what_is_left_out_and_replaces_no_metadata(tmp_path, capsys, monkeypatch):
    def with_a_fault(*arguments):
        yield from metadata_rows(*arguments)
        arguments[-1].add("entry 7: no image")

    monkeypatch.setattr(convert_metadata, "metadata_rows", with_a_fault)
    rows = [{"image_id": 2, "caption": "a dog"}]
    (tmp_path / "captions_x.json").write_text(json.dumps({"images": [], "annotations": rows}))
    (tmp_path / "link.json").symlink_to(tmp_path / "captions_x.json")

    def run(metadata, output):
        flags = ["--dataset", "coco", "--metadata", f"{tmp_path}/{metadata}"]
        flags += ["--output", f"{tmp_path}/{output}"]
        convert_metadata.main(parse(convert_metadata.Config, flags))

    before = (tmp_path / "captions_x.json").read_text()
    with pytest.raises(UserError, match=r"--output .*link\.json: is the metadata itself"):
        run("captions_x.json", "link.json")
    with pytest.raises(UserError, match=r"--metadata .*none\.json: no such file"):
        run("none.json", "o.jsonl")
    run("captions_x.json", "o.jsonl")
    assert (tmp_path / "captions_x.json").read_text() == before
    said = capsys.readouterr().out
    assert "o.jsonl: 1 samples\n" in said and "1 entries are left out, such as entry 7:" in said
