"""Tables, saved data sets and folders are read as annotation files."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from base.errors import BadSample, UserError
from dataset.health.survey import open_list
from dataset.loading.randomness import seeded
from dataset.loading.stream import RecordSource, Stream, StreamLoader
from dataset.sources import left_out
from dataset.sources.encoded_table import encoded_table
from dataset.sources.records import Records
from dataset.sources.shards import read_shard
from dataset.sources.tables import BATCH_ROWS, parse_address, rows_at_a_time
from dataset.tasks.captions import caption_records
from dataset.tasks.recognition import label_records
from dataset.tasks.record import captions_of, weights_of
from dataset.text.augment import TextOptions, TextViews
from dataset.text.wordpiece import choose_caption
from scripts.data import pack
from tests.helpers.images import of_colour

ROWS = [("a.jpg", "a café, by night"), ("b/c.png", 'she said "no"\nand left'), ("漢.jpg", "漢字")]


def write_table(path, names, rows, separator=","):
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file, delimiter=separator).writerows([names, *rows])
    return path


def pairs(records):
    return [(record["image"], record["caption"]) for record in records]


def test_comma_tab_and_semicolon_tables_give_the_same_entries(tmp_path):
    for separator, name in ((",", "a.csv"), ("\t", "b.tsv"), ("\t", "c.csv"), (";", "d.csv")):
        table = write_table(tmp_path / name, ("filepath", "title"), ROWS, separator)
        assert pairs(Records(table)) == ROWS, name


@pytest.mark.filterwarnings("ignore:.*have no caption")
def test_columns_by_name_and_several_captions(tmp_path):
    rows = [("x", "a.jpg", "one", "two"), ("y", "b.jpg", "three", "")]
    table = write_table(tmp_path / "t.csv", ("id", "where", "first", "second"), rows)
    records = Records(f"{table}?image=where&caption=first,second")
    assert pairs(records) == [("a.jpg", ["one", "two"]), ("b.jpg", ["three"])]
    assert [record["id"] for record in records] == ["x", "y"]
    assert pairs(Records(f"{table}?image=where&caption=second"))[1] == ("b.jpg", "")


def test_lists_in_cells_and_other_fields(tmp_path):
    rows = [("1.jpg", "7", "what?", json.dumps(["red", "blue"]))]
    table = write_table(tmp_path / "q.csv", ("image", "question_id", "question", "answer"), rows)
    (record,) = Records(table, ("image", "question_id", "question", "answer"))
    assert record["answer"] == ["red", "blue"] and record["question_id"] == "7"
    texts = ["it's red, he said", 'a "dog"']
    for cell, text in ((repr(texts), texts), ("['a' 'b']", "['a' 'b']"), ("[a, b]", "[a, b]")):
        table = write_table(tmp_path / "p.csv", ("image", "caption"), [("1.jpg", cell)])
        assert Records(table)[0]["caption"] == text  # as pandas saves a list; NumPy's has no commas
    deep = "[" * 900 + "]" * 900
    table = write_table(tmp_path / "p.csv", ("image", "caption", "more"), [("1.jpg", "x", deep)])
    assert Records(table)[0]["more"] == deep


def test_a_text_that_spells_a_list_of_texts_is_that_list(tmp_path):
    cells = {"image": ["1", "2", "3"], "caption": ['["a", "b"]', "['c']", "[1]"], "alt": ["x"] * 3}
    parquet.write_table(pyarrow.table(cells), tmp_path / "list.parquet")
    (tmp_path / "list.csv").write_text(
        'image,caption,alt\n1,"[""a"", ""b""]",x\n2,[\'c\'],x\n3,"[1,",x\n'
    )
    for table in ("list.parquet", "list.csv"):
        records = Records(tmp_path / table)
        assert [record["caption"] for record in records][:2] == [["a", "b"], ["c"]]
        several = Records(f"{tmp_path}/{table}?caption=alt,caption")
        assert [record["caption"] for record in several][:2] == [["x", "a", "b"], ["x", "c"]]
        weights = Records(f"{tmp_path}/{table}?caption=alt:0.5,caption:0.5")[0]["caption_weights"]
        assert weights == [0.5, 0.25, 0.25]
    assert Records(tmp_path / "list.parquet")[2]["caption"] == "[1]", "numbers are no captions"


def test_a_field_does_not_take_the_column_of_another_field(tmp_path):
    table = write_table(tmp_path / "g.csv", ("image", "text"), [("a.jpg", "left")])
    assert Records(table, ("image", "text"))[0]["text"] == "left"
    with pytest.raises(UserError, match=r"no column for caption .*it has image, text"):
        Records(table, ("image", "text", "caption"))


@pytest.mark.filterwarnings("ignore:.*have no caption")
def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table(
        {"filepath": [row[0] for row in ROWS], "caption": [["a", "b"], None, ["c"]], "n": [1, 2, 3]}
    )
    parquet.write_table(table, tmp_path / "p.parquet")
    records = Records(tmp_path / "p.parquet")
    assert pairs(records) == [("a.jpg", ["a", "b"]), ("b/c.png", []), ("漢.jpg", ["c"])]
    assert [record["n"] for record in records] == [1, 2, 3]
    (tmp_path / "hub").mkdir()
    for number in range(2):  # as a data set of the hub is downloaded
        rows = table.slice(2 * number, 2)
        parquet.write_table(rows, tmp_path / f"hub/train-0000{number}-of-00002.parquet")
    assert pairs(Records(tmp_path / "hub")) == pairs(records)
    parquet.write_table(table, tmp_path / "hub/test-00000-of-00001.parquet")
    with pytest.raises(UserError, match=r"several splits, test, train; name one: '.*/test\*\.parq"):
        Records(tmp_path / "hub")
    assert pairs(Records(tmp_path / "hub/train-*.parquet")) == pairs(records)
    (tmp_path / "d.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(UserError, match=r"d.parquet: no Parquet file"):
        Records(tmp_path / "d.parquet")


def test_encoded_images_of_parquet_are_files_in_the_cache(tmp_path, cache, capsys):
    """As Hugging Face's and img2dataset's Parquet files hold them; each is written once."""
    images = [of_colour((level, 9, 9), kind="PNG") for level in (1, 2)]
    structs = [{"bytes": each, "path": None} for each in images]
    table = {"image": structs, "mask": structs, "text": ["a", "b"], "labels": [[3], [4]]}
    parquet.write_table(pyarrow.table(table), tmp_path / "hf.parquet")
    records = Records(tmp_path / "hf.parquet")
    assert [Path(record["image"]).read_bytes() for record in records] == images
    assert [record["caption"] for record in records] == ["a", "b"] and "mask" not in records[0]
    assert "its images become files in" in capsys.readouterr().out
    Path(records[1]["image"]).write_bytes(images[0])  # of the same size: not written again
    again = Records(tmp_path / "hf.parquet", ("image", "labels"))
    assert [record["labels"] for record in again] == [[3], [4]]
    assert [record["image"] for record in again] == [record["image"] for record in records]
    assert Path(again[1]["image"]).read_bytes() == images[0]
    parquet.write_table(
        pyarrow.table({"jpg": images, "caption": ["c", "d"]}), tmp_path / "i.parquet"
    )
    own = Records(f"{tmp_path}/i.parquet?image=jpg")
    assert [Path(record["image"]).read_bytes() for record in own] == images
    assert all(Path(record["image"]).is_relative_to(cache) for record in own)
    classes = pyarrow.table({"image": structs, "label": [1, 0]})  # as classification asks for it
    parquet.write_table(classes, tmp_path / "classes.parquet")
    for required in ((), ("label",)):
        record = Records(tmp_path / "classes.parquet", required)[0]
        assert Path(record["image"]).read_bytes() == images[0] and record["label"] == 1
    beside = pyarrow.table({"url": ["a.jpg"], "mask": structs[:1], "labels": [[1]]})
    parquet.write_table(beside, tmp_path / "beside.parquet")
    assert Records(tmp_path / "beside.parquet", ("labels",))[0]["mask"] == {"path": None}
    capsys.readouterr()
    paths = pyarrow.table({"image": [{"bytes": None, "path": "a.jpg"}], "text": ["a"]})
    schema = pyarrow.schema([("image", pyarrow.struct([("bytes", "binary"), ("path", "string")]))])
    schema = schema.append(pyarrow.field("text", pyarrow.string()))
    parquet.write_table(paths.cast(schema), tmp_path / "paths.parquet")
    assert Records(tmp_path / "paths.parquet")[0]["image"] == "a.jpg"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("column", ["../../../elsewhere", "/{}/elsewhere", "..", "left image"])
def test_images_stay_in_the_cache_whatever_their_column_is_called(tmp_path, cache, column):
    """A data set of anybody's must not choose where its files are written."""
    column = column.format(tmp_path)
    image = of_colour((1, 9, 9), kind="PNG")
    table = pyarrow.table({column: [image], column + "_": [image], "caption": ["a"]})
    parquet.write_table(table, tmp_path / "i.parquet")
    found = Path(Records(f"{tmp_path}/i.parquet?image={column}")[0]["image"])
    assert found.read_bytes() == image and found == found.resolve()
    assert found.is_relative_to(cache.resolve()) and not (tmp_path / "elsewhere").exists()


def test_images_are_bytes_of_any_type_of_arrows(tmp_path, cache):
    kinds = ["binary", "large_binary"]
    if int(pyarrow.__version__.split(".")[0]) >= 21:  # older ones read it, but do not write it
        kinds.append("binary_view")
    for kind in kinds:
        image = pyarrow.array([of_colour((1, 9, 9), kind="PNG")], getattr(pyarrow, kind)())
        table = pyarrow.table({"image": image, "caption": ["a"]})
        parquet.write_table(table, tmp_path / f"{kind}.parquet")
        found = Path(Records(tmp_path / f"{kind}.parquet")[0]["image"])
        assert found.read_bytes() == image[0].as_py()


def test_saved_data_set(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import ipc

    folder = tmp_path / "saved/train"
    folder.mkdir(parents=True)
    (tmp_path / "saved/dataset_dict.json").write_text('{"splits": ["train"]}')
    (folder / "dataset_info.json").write_text("{}")
    for part, rows in enumerate((ROWS[:2], ROWS[2:])):
        images = [{"bytes": None, "path": image} for image, _ in rows]
        table = pyarrow.table({"image": images, "caption": [text for _, text in rows]})
        with ipc.new_stream(str(folder / f"data-{part:05d}.arrow"), table.schema) as stream:
            stream.write_table(table)
    assert pairs(Records(folder)) == ROWS
    with pytest.raises(UserError, match=r"several splits; name one: .*saved/train"):
        Records(tmp_path / "saved")

    # what map, filter and an earlier save leave there is no part of it
    other = pyarrow.table({"image": [{"bytes": None, "path": "z.jpg"}], "caption": ["not mine"]})
    for name in ("cache-3f2751c8d6d6b219.arrow", "data-00002-of-00003.arrow"):
        with ipc.new_stream(str(folder / name), other.schema) as stream:
            stream.write_table(other)
    listed = [{"filename": f"data-{part:05d}.arrow"} for part in (0, 1)]
    (folder / "state.json").write_text(json.dumps({"_data_files": listed}))
    assert pairs(Records(folder)) == ROWS
    assert len(encoded_table(str(folder), ("image", "caption"))) == len(ROWS)
    (folder / "state.json").unlink()
    (folder / "data-00002-of-00003.arrow").unlink()
    assert pairs(Records(folder)) == ROWS
    (folder / "data-00001.arrow").rename(folder / "pets-test.arrow")
    with pytest.raises(UserError, match="several splits, data, pets-test"):
        Records(folder)


def test_columns_in_capitals(tmp_path):
    (tmp_path / "p.csv").write_text("Image,CAPTION\na.jpg,one\n")
    assert pairs(Records(tmp_path / "p.csv")) == [("a.jpg", "one")]


def test_folder_of_images_and_texts(tmp_path, capsys):
    pixels = Image.fromarray(np.zeros((4, 4, 3), np.uint8))
    folder = tmp_path / "own"
    (folder / "00000").mkdir(parents=True)
    for name, text in (("000000001.jpg", "one\n\ntwo\n"), ("000000002.png", "three")):
        pixels.save(folder / "00000" / name)
        (folder / "00000" / name).with_suffix(".txt").write_text(text)
        (folder / "00000" / name).with_suffix(".json").write_text('{"status": "success"}')
    pixels.save(folder / "alone.jpg")
    (folder / "phone.heic").write_bytes(b"x")
    (folder / "phone.txt").write_text("of an image that is not read")
    expected = [
        (str(folder / "00000/000000001.jpg"), ["one", "two"]),
        (str(folder / "00000/000000002.png"), ["three"]),
    ]
    assert pairs(Records(folder)) == expected
    said = capsys.readouterr().out
    assert "1 images have no .txt" in said
    assert "1 texts have no image beside them that can be read, such as phone.txt" in said
    (folder / "alone.caption").write_text("four")  # Kohya's; the cached list is made again
    assert pairs(Records(folder))[-1] == (str(folder / "alone.jpg"), ["four"])
    (folder / "alone.txt").write_text("five")
    assert pairs(Records(folder))[-1] == (str(folder / "alone.jpg"), ["five"])
    with pytest.raises(UserError, match="a folder gives images and captions"):
        Records(folder, ("image", "question"))


def test_folder_with_metadata(tmp_path):
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / "metadata.jsonl").write_text('{"file_name": "a.jpg", "text": "one"}\n')
    assert pairs(Records(folder)) == [(str(folder / "a.jpg"), "one")]
    (folder / "metadata.csv").write_text("file_name,text\nb.jpg,two\n")
    assert pairs(Records(folder)) == [(str(folder / "b.jpg"), "two")]
    table = pyarrow.table({"file_name": ["c.jpg"], "text": ["three"]})
    (tmp_path / "new").mkdir()
    parquet.write_table(table, tmp_path / "new/metadata.parquet")
    assert pairs(Records(tmp_path / "new")) == [(str(tmp_path / "new/c.jpg"), "three")]


SPREADSHEETS = {
    "rows of separators alone": "filepath,title\na.jpg,x\n,\n,,,,\nb.jpg,y\n,\n",
    "separators behind the names": "filepath,title,,\na.jpg,x\nb.jpg,y,,\n",
    "the separator in the first line": "sep=;\r\nfilepath;title\r\na.jpg;x\r\nb.jpg;y\r\n",
    "the separator quoted": '"sep=;"\r\nfilepath;title\r\na.jpg;x\r\nb.jpg;y\r\n',
    "empty lines in front": "\n,\nfilepath,title\na.jpg,x\nb.jpg,y\n",
    "upright strokes": "filepath|title\na.jpg|x\nb.jpg|y\n",
}


@pytest.mark.parametrize("kind", SPREADSHEETS)
def test_tables_as_spreadsheets_write_them(kind, tmp_path):
    (tmp_path / "t.csv").write_text(SPREADSHEETS[kind])
    assert pairs(Records(tmp_path / "t.csv").complete()) == [("a.jpg", "x"), ("b.jpg", "y")]


def test_a_row_whose_quotes_do_not_pair_is_left_out_and_counted(tmp_path, capsys):
    rows = [f"{number}.jpg,x\n" for number in range(200)]
    rows[5] = '5.jpg,"x" y\n'
    (tmp_path / "t.csv").write_text("filepath,title\n" + "".join(rows))
    assert len(Records(tmp_path / "t.csv")) == 199
    said = capsys.readouterr().err
    assert "1 of 200 entries are unusable" in said and "row 6: lines 7 to 7" in said


SWALLOWED = '5.jpg\t"Hello there\n6.jpg\tgoodbye"\n'  # two rows whose texts have quotes


@pytest.mark.parametrize("separator", ["\t", ","])
def test_rows_that_quotes_swallow_are_left_out_and_counted(tmp_path, capsys, separator):
    rows = [f"{number}.jpg\tx, y\n" for number in range(5)] * 50
    text = "".join(["filepath\ttitle\n", SWALLOWED, *rows])
    if separator == ",":
        text = text.replace(", y", "").replace("\t", ",")
    (tmp_path / "t.csv").write_text(text)
    assert "goodbye" not in str(pairs(Records(tmp_path / "t.csv")))
    assert "2 of 252 entries are unusable" in capsys.readouterr().err


def test_texts_of_several_lines_stay(tmp_path):
    written = 'filepath{0}title\na.jpg{0}"one, two\nthree, four"\n'
    for separator in "\t,":
        (tmp_path / "t.csv").write_text(written.format(separator))
        assert pairs(Records(tmp_path / "t.csv")) == [("a.jpg", "one, two\nthree, four")]


def test_missing_numbers_are_null_and_ids_written_as_floats_are_ids(tmp_path):
    table = {"image": [1.0, 2.0], "caption": ["a", "b"], "score": [0.5, float("nan")]}
    parquet.write_table(pyarrow.table(table), tmp_path / "t.parquet")
    records = Records(tmp_path / "t.parquet")
    assert pairs(records) == [("1", "a"), ("2", "b")]
    assert [record["score"] for record in records] == [0.5, None]
    row = '{"file_name": "a.jpg", "text": "x \\ud83d", "score": NaN}\n'
    (tmp_path / "metadata.jsonl").write_text(row)
    (record,) = Records(tmp_path)
    assert record["caption"] == "x \ufffd" and record["score"] is None


def test_rows_that_img2dataset_could_not_fetch_are_left_out(tmp_path, cache, capsys):
    image = of_colour((1, 2, 3), kind="PNG")
    table = {"url": ["u", "v", "w"], "caption": ["a", "b", "c"], "jpg": [image, None, image]}
    table["status"] = ["success", "failed_to_download", "success"]
    parquet.write_table(pyarrow.table(table), tmp_path / "00000.parquet")
    records = Records(tmp_path / "00000.parquet").complete()
    assert [record["caption"] for record in records] == ["a", "c"]
    assert [Path(record["image"]).read_bytes() for record in records] == [image, image]
    assert "1 of 3 rows have no image, by their status" in "".join(capsys.readouterr())


def test_the_table_beside_shards_says_to_name_the_shards(tmp_path):
    (tmp_path / "00000.tar").touch()
    table = pyarrow.table({"url": ["u"], "caption": ["a"]})
    parquet.write_table(table, tmp_path / "00000.parquet")
    for data in (tmp_path, tmp_path / "00000.parquet"):
        with pytest.raises(UserError, match="name its folder with --shards"):
            Records(data)


def test_flickr30ks_results_are_a_table(tmp_path):
    header = "image_name| comment_number| comment\n"
    (tmp_path / "results.csv").write_text(header + "a.jpg| 0| Two men\n")
    assert pairs(Records(tmp_path / "results.csv")) == [("a.jpg", "Two men")]


def test_dual_encoders_read_tables_for_any_collection(tmp_path):
    table = write_table(tmp_path / "t.csv", ("filepath", "title"), ROWS)
    assert pairs(caption_records("yfcc15m", table, read_plain=None)) == ROWS


@pytest.mark.parametrize(
    ("content", "query", "message"),
    [
        (b"filepath,title\na.jpg\n", "", r"row 1: 1 cells under 2 names"),
        (b"filepath,title\na.jpg,x\n,y\n", "", r"row 2: '' is no path of an image"),
        (b"filepath,words\na.jpg,x\n", "", r"no column for caption .*it has filepath, words"),
        (b"a dog\thttp://x/1.jpg\na cat\thttp://x/2.jpg\n", "", "as img2dataset does"),  # CC3M
        (b"Datei;Satz\na.jpg;x\n", "", r"image and caption .*\?image=COLUMN&caption=COLUMN'"),
        (b"filepath,title\na.jpg,x\n", "?caption=titel", r"no column titel; did you mean title"),
        (b"filepath,title\na.jpg,x\n", "?caption=", r"no column given for caption"),
        (b"filepath,title\na.jpg,x\n", "?", r"expected FILE\?field=column"),
        (b"filepath,title\na.jpg,\xff\n", "", r"not UTF-8"),
        (b'filepath,title\na.jpg,"x\n' + b"b.jpg,y\n" * 99, "", r"100 of 100 entries"),
        ("filepath,title\n".encode("utf-16-le"), "", r"it looks like UTF-16"),
        (b'filepath,title\na.jpg,"x\n', "", r"row 1: lines 2 to 2: unexpected end of data"),
        (b"", "", r"no columns, it is empty"),
        (b"filepath,title\n", "", r"no entries|empty"),
    ],
)
def test_faulty_tables_are_refused_in_one_sentence(tmp_path, content, query, message):
    table = tmp_path / "t.csv"
    table.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        Records(f"{table}{query}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "metadata.csv"])
def test_a_few_unusable_rows_are_left_out_and_said_at_every_start(tmp_path, capsys, name):
    """A row that is cut off, one with too many cells, and one without an image, of 300."""
    rows = [(f"{number}.jpg", "x") for number in range(300)]
    rows[7], rows[100], rows[299] = ("7.jpg",), ("100.jpg", "a", "b"), ("", "x")
    separator = "\t" if name.endswith(".tsv") else ","
    table = write_table(tmp_path / name, ("image", "caption"), rows, separator)
    for _ in range(2):
        left_out._SAID.clear()  # as in another process
        found = Records(tmp_path if name == "metadata.csv" else table)
        said = capsys.readouterr().err
        assert len(found) == 297 and Path(found[7]["image"]).name == "8.jpg"
        assert "3 of 300 entries are unusable and left out" in said
        assert "row 8: 1 cells under 2 names" in said
        assert "row 101: 3 cells" in said and "row 300: '' is no path" in said
        with pytest.raises(UserError, match=r"row 8: 1 cells .*; an evaluation needs every entry"):
            found.complete()
    rows[0] = ("0.jpg",)
    write_table(table, ("image", "caption"), rows, separator)
    with pytest.raises(UserError, match=r"row 1: 1 cells .*4 of 300 entries are unusable, more"):
        Records(tmp_path if name == "metadata.csv" else table)


@pytest.mark.parametrize("renames", [0, 1])
@pytest.mark.parametrize("read", [Records, label_records])
def test_a_kill_hides_no_row_that_was_left_out(tmp_path, monkeypatch, capsys, read, renames):
    """Between the file of the others and the note of what was left out."""
    path = tmp_path / ("t.csv" if read is Records else "t.list")
    rows = [f"{n}.jpg,x" if read is Records else f"{n}.jpg : x" for n in range(200)]
    path.write_text(
        "\n".join(["image,caption", *rows, "odd"] if read is Records else [*rows, "odd"])
    )
    made = []

    def rename(source, target, replace=os.replace):
        if len(made) == renames:
            raise KeyboardInterrupt
        made.append(replace(source, target))

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", rename)
        with pytest.raises(KeyboardInterrupt):
            read(path)
    assert len(read(path)) == 200
    assert "1 of 201 entries are unusable and left out" in capsys.readouterr().err


def test_separators_at_the_end_of_a_line_are_no_cells(tmp_path):
    (tmp_path / "t.csv").write_text("image,caption\na.jpg,x,,\nb.jpg,,\n")
    with pytest.warns(UserWarning, match="1 of 2 entries have no caption"):
        assert [each["image"] for each in Records(tmp_path / "t.csv")] == ["a.jpg", "b.jpg"]


def test_a_file_with_a_question_mark_in_its_name_is_itself(tmp_path):
    table = write_table(tmp_path / "what?image=x.csv", ("image", "caption"), ROWS)
    assert parse_address(table).columns == {} and pairs(Records(table)) == ROWS
    with pytest.raises(UserError, match="only tables and JSON have columns"):
        Records(f"{tmp_path}/a.txt?image=x")
    with pytest.raises(UserError, match="no such annotation file"):
        Records(tmp_path / "gone.csv")


def test_labels_of_a_table(tmp_path, cache):
    from dataset.tasks.classification import LabelOptions, Labels, open_records
    from dataset.tasks.recognition import label_records

    (tmp_path / "a.jpg").write_bytes(b"")
    table = write_table(tmp_path / "c.csv", ("image", "label"), [("a.jpg", "3"), ("a.jpg", "0")])
    labels = Labels(4, LabelOptions(), "c.csv")
    assert [labels(record)[0] for record in open_records(str(table), tmp_path, "train")] == [
        [3],
        [0],
    ]
    table = write_table(tmp_path / "n.tsv", ("image", "labels"), [("a.jpg", "hot dog, cat")], "\t")
    assert label_records(table)[0]["labels"] == ["hot dog", "cat"]
    encoded = {"image": [of_colour((1, 9, 9))], "labels": ["hot dog, cat"]}
    parquet.write_table(pyarrow.table(encoded), tmp_path / "encoded.parquet")
    assert label_records(tmp_path / "encoded.parquet")[0]["labels"] == ["hot dog", "cat"]


def test_spreadsheets_write_utf_16(tmp_path):
    (tmp_path / "t.csv").write_bytes("image,caption\n0.png,caf\u00e9\n".encode("utf-16"))
    assert Records(tmp_path / "t.csv")[0]["caption"] == "caf\u00e9"


def test_half_an_emoji_in_a_table(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"image,caption\n0.png,a dog \xed\xa0\xbd\n")
    assert Records(tmp_path / "t.csv")[0]["caption"] == "a dog \ufffd"


@pytest.mark.parametrize("letters, rows", [(9, BATCH_ROWS), (1 << 20, 16)])
def test_long_texts_become_pythons_a_few_rows_at_a_time(letters, rows):
    """A dictionary holds one text for a million cells; as Python's objects each takes its bytes."""
    texts = pyarrow.array(["x" * letters] * 3).dictionary_encode()
    assert rows_at_a_time("t.parquet", pyarrow.RecordBatch.from_pydict({"caption": texts})) == rows


def test_a_column_that_is_there_twice(tmp_path):
    (tmp_path / "t.csv").write_text("image,caption,caption\n0.png,a,b\n")
    with pytest.raises(UserError, match=r"t\.csv: two columns are called caption; rename one"):
        Records(tmp_path / "t.csv")
    columns = [pyarrow.array([text]) for text in ("0.png", "a", "b")]
    names = ["image", "caption", "caption"]
    parquet.write_table(pyarrow.Table.from_arrays(columns, names), tmp_path / "t.parquet")
    with pytest.raises(UserError, match=r"t\.parquet: two columns are called caption; rename one"):
        Records(tmp_path / "t.parquet")


def test_entries_of_a_map_are_no_captions(tmp_path):
    texts = pyarrow.array([[("en", "a dog")]], pyarrow.map_(pyarrow.string(), pyarrow.string()))
    parquet.write_table(
        pyarrow.table({"image": ["0.png"], "caption": texts}), tmp_path / "t.parquet"
    )
    with pytest.raises(
        UserError, match=r"field 'caption' must be texts, not list \(\['en', 'a dog'"
    ):
        Records(tmp_path / "t.parquet")


def test_parquet_under_another_name_is_named(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"PAR1\x15\x04")
    with pytest.raises(UserError, match=r"a Parquet file, whose name must end in \.parquet"):
        Records(tmp_path / "t.csv")


# ---- weights of captions
def test_columns_with_weights_give_a_weight_for_every_caption(tmp_path):
    rows = [("a.jpg", "one", '["two", "three"]'), ("b.jpg", "", "four"), ("c.jpg", "five", "six")]
    rows.append(("d.jpg", '[""]', "seven"))  # a list of which nothing is left
    table = write_table(tmp_path / "t.csv", ("image", "alt", "synthetic"), rows)
    records = Records(f"{table}?caption=alt:0.3,synthetic:0.7")
    assert [record["caption"] for record in records] == [
        ["one", "two", "three"],
        ["four"],
        ["five", "six"],
        ["seven"],
    ]
    assert [record["caption_weights"] for record in records] == [
        [0.3, 0.35, 0.35],
        [0.7],
        [0.3, 0.7],
        [0.7],
    ]


def test_a_column_whose_name_has_a_colon_needs_no_weight(tmp_path):
    table = write_table(tmp_path / "t.csv", ("image", "dc:2", "dc"), [("a.jpg", "one", "two")])
    assert pairs(Records(f"{table}?caption=dc:2")) == [("a.jpg", "one")]
    (record,) = Records(f"{table}?caption=dc:2:1,dc:3")
    assert record["caption"] == ["one", "two"] and record["caption_weights"] == [1.0, 3.0]


def test_json_names_columns_too(tmp_path):
    entries = [
        {"image": "a.jpg", "alt": "café", "made": "漢字"},
        {"image": "b.jpg", "made": "two"},
    ]
    (tmp_path / "list.json").write_text(json.dumps(entries, ensure_ascii=False, indent=1))
    lines = "\n".join(json.dumps(entry) for entry in entries)
    (tmp_path / "lines.jsonl").write_text(lines)
    for name in ("list.json", "lines.jsonl"):
        records = Records(f"{tmp_path / name}?caption=alt:1,made:2")
        assert [record["caption"] for record in records] == [["café", "漢字"], ["two"]]
        assert [record["caption_weights"] for record in records] == [[1.0, 2.0], [2.0]]
        assert (
            caption_records("pairs", f"{tmp_path / name}?caption=made", None)[1]["caption"] == "two"
        )


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("caption=alt:0.3,made", r"every column a weight: caption=alt:0.5,made:0.5"),
        ("caption=alt:0,made:1", r"alt:0: the weight of a column must be above 0"),
        ("caption=alt:inf,made:1", r"alt:inf: the weight"),
        ("caption=atl:1,made:1", r"no column atl; did you mean alt"),
        ("caption=alt:high,made:1", r"no column alt:high"),
        ("image=image:2", r"image: only columns of captions have weights"),
    ],
)
def test_mistakes_in_weights_are_one_sentence(tmp_path, query, message):
    table = write_table(tmp_path / "t.csv", ("image", "alt", "made"), [("a.jpg", "one", "two")])
    with pytest.raises(UserError, match=message):
        Records(f"{table}?{query}", ("image", "caption"))


@pytest.mark.parametrize("weights", [[1], [1, 0], [1, "2"], 3, [1, True], [1, float("nan")]])
def test_weights_of_an_annotation_are_checked(tmp_path, weights):
    entry = {"image": "a.jpg", "caption": ["one", "two"], "caption_weights": weights}
    (tmp_path / "a.json").write_text(json.dumps([entry]))
    with pytest.raises(UserError, match=r"a.json, entry 0 .*caption_weights"):
        Records(tmp_path / "a.json")


def weighted_stream(table):
    """Images and captions drawn, as a stream of pairs; no image is read."""

    def build(record):
        captions = captions_of(record)
        return {
            "index": record["index"],
            "text": choose_caption(captions, 30, weights_of(record, captions)),
        }

    def collate(samples):
        return {"drawn": [(sample["index"], sample["text"]) for sample in samples]}

    return Stream([RecordSource(Records(table), build)], collate)


def test_weighted_draws_follow_the_weights_on_any_workers_and_after_a_resume(tmp_path):
    rows = [(f"{n}.jpg", "plain", "synthetic") for n in range(600)]
    table = write_table(tmp_path / "t.csv", ("image", "caption", "synthetic"), rows)
    address = f"{table}?caption=caption:0.3,synthetic:0.7"
    drawn = {}
    for workers in (0, 2):
        loader = StreamLoader(weighted_stream(address), batch_size=20, workers=workers, seed=5)
        batches = [next(loader)["drawn"] for _ in range(30)]
        if workers:
            state = loader.state_dict()
            following = [next(loader)["drawn"] for _ in range(4)]
            again = StreamLoader(
                weighted_stream(address), batch_size=20, workers=workers, seed=5, state=state
            )
            assert [next(again)["drawn"] for _ in range(4)] == following
            again.close()
        loader.close()
        drawn[workers] = sorted(pair for batch in batches for pair in batch)
    assert drawn[0] == drawn[2] and len(drawn[0]) == 600  # an epoch
    made = sum(text == "synthetic" for _, text in drawn[0]) / 600
    assert abs(made - 0.7) < 4 * (0.3 * 0.7 / 600) ** 0.5


def test_packed_shards_keep_the_weights(tmp_path):
    pixels = Image.fromarray(np.zeros((4, 4, 3), np.uint8))
    pixels.save(tmp_path / "a.jpg")
    rows = [("a.jpg", "one", "two")]
    table = write_table(tmp_path / "t.csv", ("image", "alt", "made"), rows)
    settings = {"image_root": tmp_path, "target": tmp_path / "shards", "workers": 1}
    pack.main(pack.Config(data=f"{table}?caption=alt:1,made:3", **settings))
    (record,) = read_shard(str(tmp_path / "shards/00000.tar"))
    captions = captions_of(record)
    assert captions == ["one", "two"] and weights_of(record, captions) == [1.0, 3.0]
    assert weights_of(record, "one") is None
    record["json"] = record["json"].replace(b"3.0", b"-3")
    with pytest.raises(BadSample, match="caption_weights: -3 is no number above 0"):
        weights_of(record, captions)


def test_views_of_dual_encoders_draw_by_the_weights():
    with seeded(3):
        single = [TextViews(TextOptions(), local=1)(["a", " ", "b"], [1, 5, 3]) for _ in range(300)]
        multi = TextViews(TextOptions(caption_sampling="multi"), local=1)
        several = [multi(["a", " ", "b"], [1, 5, 3]) for _ in range(300)]
    assert all(first == second for first, second in single)
    assert any(first != second for first, second in several)
    for views in (single, several):
        fraction = sum(view == "b" for pair in views for view in pair) / 600
        assert abs(fraction - 0.75) < 0.1 and not any(" " in pair for pair in views)


@pytest.mark.parametrize("separator", [", ", "; ", "| ", "\t "])
def test_a_blank_behind_every_separator_is_no_part_of_the_cells(separator, tmp_path):
    head = separator.join(("caption", "image"))
    text = f'{head}\n"a cat{separator}asleep"{separator}0.jpg\na  dog{separator}"1.jpg"\n'
    (tmp_path / "t.csv").write_text(text)
    found = [(f"a cat{separator}asleep", "0.jpg"), ("a  dog", "1.jpg")]
    assert [(row["caption"], row["image"]) for row in Records(tmp_path / "t.csv")] == found
    (tmp_path / "t.csv").write_text(text.replace(head, head.replace(" ", ""), 1))
    assert [row["image"] for row in Records(tmp_path / "t.csv")] == [" 0.jpg", ' "1.jpg"']


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"filepath": "0.jpg", "text": "a"}], r"write FILE\?image=filepath"),
        ([{"Image": "0.jpg", "Caption": "a"}], r"write FILE\?image=Image"),
        ([{"image": "0.jpg", "title": "a"}], r"write FILE\?caption=title"),
        ({"data": [{"image": "0.jpg", "caption": "a"}]}, "in its list 'data': write that"),
    ],
)
def test_json_of_other_names_says_how_to_name_them(content, message, tmp_path):
    file = tmp_path / "a.json"
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        Records(file)
    if isinstance(content, dict) or "image" not in content[0]:
        with pytest.raises(UserError, match=message):
            open_list(str(file))
    query = message.rpartition("FILE")[2].replace("\\", "")
    if query.startswith("?"):
        assert pairs(Records(f"{file}{query}")) == [("0.jpg", "a")]


def test_answers_of_a_okvqa_say_how_to_name_them(tmp_path):
    file = tmp_path / "a.json"
    file.write_text(json.dumps([{"image": "0.jpg", "direct_answers": ["red", "red"]}]))
    with pytest.raises(UserError, match=r"write FILE\?answer=direct_answers"):
        Records(file, ("image", "answer"))
    (record,) = Records(f"{file}?answer=direct_answers", ("image", "answer"))
    assert record["answer"] == ["red", "red"]


def test_tables_without_names_of_columns_and_in_folders_below(tmp_path):
    (tmp_path / "t.csv").write_text("0.jpg,a cat\n1.jpg,a dog\n")
    with pytest.raises(UserError, match="its first row holds no names: put a row of them above"):
        Records(tmp_path / "t.csv")
    (tmp_path / "hub/data").mkdir(parents=True)
    table = pyarrow.table({"image": ["0.jpg"], "caption": ["a"]})
    parquet.write_table(table, tmp_path / "hub/data/train.parquet")
    with pytest.raises(UserError, match=r"its Parquet files lie in .*hub/data; name that folder"):
        Records(tmp_path / "hub")
