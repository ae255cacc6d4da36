"""Annotation files of every kind are read in place; a faulty one is refused with file, entry, field
and remedy."""

import json
import pickle

import numpy as np
import pytest

from base.errors import UserError
from dataset.sources import json_entries
from dataset.sources.records import Records

ENTRIES = [
    {"image": f"{n}.jpg", "caption": [f'naïve }} ] , \\ " {n}', "漢字"], "id": n}
    for n in range(300)
]


def write(folder, text, name="pairs.json"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("chunk", [7, 1 << 20])
@pytest.mark.parametrize(
    "text",
    [
        json.dumps(ENTRIES),
        json.dumps(ENTRIES, ensure_ascii=False, indent=2),
        "\n".join(map(json.dumps, ENTRIES)),
        "\n\n".join(json.dumps(entry, ensure_ascii=False) for entry in ENTRIES) + "\n",
        "\ufeff" + json.dumps(ENTRIES) + "\r\n",
    ],
    ids=["list", "indented", "lines", "spaced lines", "byte order mark"],
)
def test_reads_lists_and_lines(tmp_path, monkeypatch, text, chunk):
    monkeypatch.setattr(json_entries, "CHUNK", chunk)
    records = Records(write(tmp_path, text))
    assert list(records) == ENTRIES
    assert records[-1] == ENTRIES[-1]
    with pytest.raises(IndexError):
        records[len(ENTRIES)]


def test_joins_files_and_pickles_as_paths(tmp_path):
    files = [
        write(tmp_path, json.dumps(part), f"{n}.json")
        for n, part in enumerate((ENTRIES[:10], ENTRIES[10:]))
    ]
    records = Records(files)
    assert [record["id"] for record in records] == list(range(300))
    pickled = pickle.dumps(records)
    assert len(pickled) < 1000
    assert pickle.loads(pickled)[299] == ENTRIES[299]


def test_index_is_reused_until_the_file_changes(tmp_path, cache):
    path = write(tmp_path, json.dumps(ENTRIES))
    Records(path)
    made = {file: file.stat().st_mtime_ns for file in cache.glob("*.index")}
    Records(path)
    assert {file: file.stat().st_mtime_ns for file in cache.glob("*.index")} == made
    write(tmp_path, json.dumps(ENTRIES[:5]))
    assert len(Records(path)) == 5
    assert not list(cache.glob("*.tmp"))


GOOD = '{"image": "a.jpg", "caption": "x"}'
FAULTS = {
    "": ("empty file",),
    "  \n": ("begins with ''", "JSON list"),
    "[]": ("no entries",),
    '"text"': ("expected a JSON list of objects",),
    '{"images": []}': ("entry 0", "no field 'image'", "it has images"),
    f'[{GOOD}, {{"image": "b", "caption": "c", "image": "d"}}]': (
        "entry 1",
        "'image' stands twice",
    ),
    f'{GOOD}\n{{"image": "b", "caption": "c", "more": [{{"é": 1, "é": 1}}]}}': ("line 2", "twice"),
    f"[{GOOD}, 3]": ("entry 1", "expected an object", "found 3"),
    f'[{GOOD}, {{"image": "b"}}]': ("entry 1", "no field 'caption'", "add the field or remove"),
    f'[{GOOD}, {{"image": "b", "caption": true}}]': (
        "entry 1",
        "'caption' must be str or list, not bool",
    ),
    '[{"url": "http://x/1.jpg", "caption": "c"}]': ("no field 'image'", "as img2dataset does"),
    f'[{GOOD}, {{"image": ["b"], "caption": "c"}}]': ("entry 1", "'image' must be str"),
    '[{"image": "b", "caption": []}]': ("every entry's caption is empty",),
    '{"info": {}, "images": [], "annotations": []}': ("no field 'image'", "--dataset coco"),
    f"[{GOOD}": ("entry 1", "the end of the file", "cut off"),
    f"[{GOOD},": ("entry 1", "not valid JSON"),
    f'[{GOOD}, {{"image": "b", "cap': ("entry 1", "not valid JSON", "cut off"),
    f"[{GOOD} {GOOD}]": ("entry 1", "expected ',' or ']'"),
    f"[{GOOD},]": ("entry 1", "not valid JSON"),
    f"[{GOOD}] []": ("text after the end",),
    f'{GOOD}\n{GOOD}\n{{"image": "b",\n': ("entry 2", "line 3", "not valid JSON"),
}


@pytest.mark.parametrize("text", FAULTS, ids=range(len(FAULTS)))
def test_faults_are_named(tmp_path, cache, text):
    with pytest.raises(UserError) as caught:
        Records(write(tmp_path, text))
    for words in (*FAULTS[text], "pairs.json"):
        assert words in str(caught.value)
    assert not list(cache.glob("*.index")) and not list(cache.glob("*.tmp"))


def test_other_faults(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no such annotation file"):
        Records(tmp_path / "missing.json")
    with pytest.raises(UserError, match="name at least one"):
        Records([])
    with pytest.raises(UserError, match="not UTF-8"):
        Records(write(tmp_path, b'[{"image": "\xff", "caption": "x"}]'))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QUINTET_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="QUINTET_CACHE"):
        Records(write(tmp_path, f"[{GOOD}]"))


def test_an_endless_entry_does_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(json_entries, "CHUNK", 1 << 10)
    monkeypatch.setattr(json_entries, "ENTRY_BYTES", 1 << 12)
    seen = []
    monkeypatch.setattr(
        json_entries._Window,
        "error",
        lambda self, what: seen.append(len(self.text)) or UserError(what),
    )
    with pytest.raises(UserError, match="not valid JSON"):
        Records(write(tmp_path, '[{"image": "' + "x" * 100_000))
    assert seen[0] < 1 << 13


@pytest.mark.parametrize("text", [json.dumps, lambda rows: "\n".join(map(json.dumps, rows))])
def test_an_entry_without_a_caption_of_very_many_is_left_out_and_said(tmp_path, capsys, text):
    entries = [{"image": f"{number}.jpg", "caption": "x"} for number in range(200)]
    entries[7] = {"image": "7.jpg", "sentence": "x"}
    entries[9] = 3
    records = Records(write(tmp_path, text(entries)))
    assert [record["image"] for record in records][6:9] == ["6.jpg", "8.jpg", "10.jpg"]
    said = capsys.readouterr().err
    assert "2 of 200 entries are unusable and left out" in said and len(records) == 198
    assert "entry 7 (the first is 0)" in said and "no field 'caption'" in said
    assert "entry 9" in said and "found 3" in said
    with pytest.raises(UserError, match=r"entry 7 .*; an evaluation needs every entry"):
        records.complete()
    entries[11] = {}
    with pytest.raises(UserError, match=r"entry 7 .*3 of 200 entries are unusable, more than 1%"):
        Records(write(tmp_path, text(entries)))


@pytest.mark.filterwarnings("ignore:.*1 of 5 entries")
def test_one_odd_entry_does_not_condemn_a_file(tmp_path):
    entries = [
        {"image": "a.jpg", "caption": ["x"]},
        {"image": "b.jpg", "caption": []},
        {"image": 4705552913, "caption": ["y", None, 7, ["z"]]},
        {"image": "d.jpg", "caption": None},
        {"image": "e.jpg", "caption": 2012},
    ]
    with pytest.warns(UserWarning, match="2 of 5 entries have no caption; training skips them"):
        records = Records(write(tmp_path, json.dumps(entries)))
    assert [(record["image"], record["caption"]) for record in records] == [
        ("a.jpg", ["x"]),
        ("b.jpg", []),
        ("4705552913", ["y", "7"]),
        ("d.jpg", []),
        ("e.jpg", "2012"),
    ]


def test_ids_stay_what_the_file_says(tmp_path):
    entries = [{"question_id": "01827492"}, {"question_id": 1827492}, {"question_id": "5"}]
    records = Records(write(tmp_path, json.dumps(entries)), ("question_id",))
    assert [record["question_id"] for record in records] == ["01827492", 1827492, "5"]


def test_deep_entries_are_one_sentence(tmp_path):
    deep = "[" * 50_000
    closed = "[" * 900 + "]" * 900  # json parses it; what walks through it would not
    texts = [deep, f'[{{"image": "a", "caption": {deep}', f'{{"image": {deep}']
    for text in (*texts, f'{{"image": "a", "caption": "x", "more": {closed}}}'):
        path = write(tmp_path, text)
        for address in (path, f"{path}?caption=caption"):
            with pytest.raises(UserError, match="nested deeper than 200 levels"):
                Records(address)


def test_brackets_in_texts_are_no_levels(tmp_path):
    entry = {"image": "a", "caption": "[" * 300 + '"{', "boxes": [[1, 2]] * 300}
    path = write(tmp_path, json.dumps([entry]))
    assert list(Records(path)) == list(Records(f"{path}?caption=caption")) == [entry]


@pytest.mark.parametrize("damage", [b"", b"\0" * 8, b"\xff" * 16, b"abc", b"\0" * 24])
def test_a_damaged_index_is_made_again(tmp_path, cache, damage):
    path = write(tmp_path, json.dumps(ENTRIES))
    Records(path)
    (index,) = cache.glob("*.index")
    whole = index.read_bytes()
    index.write_bytes(damage or whole[:-3])
    assert list(Records(path)) == ENTRIES and index.read_bytes() == whole


@pytest.mark.parametrize("text", ["", "[]", '[{"image": "b.jpg", "caption": "another"}, {}]' * 9])
def test_a_list_that_is_written_to_while_it_is_read_is_named(text, tmp_path):
    """Beyond the end of a file that became shorter a process is killed (SIGBUS)."""
    entries = [{"image": f"{number}.jpg", "caption": "a"} for number in range(20)]
    file = write(tmp_path, json.dumps(entries))
    records = Records(file)
    assert records[19]["image"] == "19.jpg"
    whole = file.with_name("new.json")
    whole.write_text(text)
    whole.replace(file)  # another file under the name: what is read stays
    assert records[19]["image"] == "19.jpg"
    file = write(tmp_path, json.dumps(entries), "other.json")
    records = Records(file)
    file.write_text(text)
    with pytest.raises(UserError, match=r"other\.json: was written to while it is read"):
        records[19]


def test_an_index_damaged_in_the_middle_is_one_sentence(tmp_path, cache):
    path = write(tmp_path, json.dumps(ENTRIES))
    Records(path)
    (index,) = cache.glob("*.index")
    starts = np.fromfile(index, np.uint64)
    starts[5] += 3
    starts.tofile(index)
    with pytest.raises(UserError, match=r"\.index: damaged; delete it"):
        list(Records(path))
