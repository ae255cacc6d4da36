"""Files as others publish them: the doctor, both trainings and the packer find the same samples in
them, with the same texts."""

import io
import json
import tarfile
import zipfile
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from base.errors import BadSample, UserError
from base.text import as_list, is_blank
from dataset.health.samples import Examiner
from dataset.health.survey import Looking, plan, survey
from dataset.sources.records import Records
from dataset.sources.shard_index import ShardIndex
from dataset.sources.shard_list import find_shards
from dataset.sources.shards import read_shard
from dataset.tasks.caption_lists import retrieval_list
from dataset.tasks.captions import ImageTextPair, caption_records
from dataset.tasks.catalog import Entry
from dataset.tasks.classification import LabelOptions, Labels, is_shards
from dataset.tasks.pretrain import PretrainPair
from dataset.tasks.record import captions_of
from dataset.text.augment import TextOptions, TextViews
from scripts import doctor, embed
from scripts.data import pack
from tests.helpers.images import of_colour

pytestmark = pytest.mark.filterwarnings("ignore:.*have no caption")
IMAGE = of_colour((200, 30, 30), (40, 36), "JPEG")
NAMES = ("0.jpg", "1.jpg", "2.jpg")


@pytest.fixture
def root(tmp_path):
    for name in NAMES:
        (tmp_path / name).write_bytes(IMAGE)
    return tmp_path


def examined(data: str, root: Path, tokenizer: Path | None = None) -> list:
    """The facts that doctor.py finds of every sample."""
    examiner = Examiner(root, len, 77)
    if tokenizer:
        examiner = doctor.make_examiner(root, str(tokenizer), 77, None)
    (part,) = survey([data], plan([data]), Looking(lambda: examiner), 1)
    return part.facts


def records_of(data: str, for_pairs: bool) -> list:
    if is_shards(data):
        found = find_shards(data)
        return [record for name in found.names for record in read_shard(name, found.expected(name))]
    records = caption_records("pairs", data, None) if for_pairs else Records(data)
    return [{**record, "index": number} for number, record in enumerate(records)]


def trained(data: str, build, for_pairs: bool = False) -> list[list[str]]:
    """The texts of the samples that a training uses."""
    texts = []
    for record in records_of(data, for_pairs):
        try:
            if isinstance(record, BadSample):
                raise record
            build(record)
        except BadSample:
            continue
        texts.append(as_list(captions_of(record)))
    return texts


def packed(data: str, root: Path) -> int:
    config = pack.Config(data=data, image_root=root, target=root / "out")
    rows = pack.open_rows(config)
    complaints: list[str] = []
    return len(list(pack.samples(rows, range(len(rows)), config, complaints)))


def embedded(data: str, root: Path) -> list[str]:
    """The caption that embed.py takes of every sample; it reads all images."""
    (part,) = embed.parts_of(data, 100)
    part = embed.with_records(part, 1.0)
    rows = [embed.beside_image(part.records, number) for number in range(part.start, part.stop)]
    for number in range(len(rows)):
        assert embed.image_of_part(part, lambda image: image, root, False, number)["readable"]
    return [embed.first_caption(row) for row in rows]


def assert_same(data: str, root: Path, texts: list[list[str]]) -> None:
    """Whoever reads the data finds the samples with these texts usable."""
    usable = [facts.texts for facts in examined(data, root) if facts.usable]
    assert usable == texts
    fusion = PretrainPair(lambda image: (image, None), root)
    assert trained(data, fusion) == texts
    dual = ImageTextPair(lambda image: (image, None), TextViews(TextOptions()), root)
    assert trained(data, dual, for_pairs=True) == texts
    if not is_shards(data):
        assert packed(data, root) == len(texts)
    first = [next(text for text in captions if not is_blank(text)) for captions in texts]
    assert [text for text in embedded(data, root) if text] == first


def write_parquet(path: Path, **columns) -> Path:
    path.parent.mkdir(exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path)
    return path


@pytest.mark.parametrize(
    ("captions", "texts"),
    [
        (["a cat", None, "a dog"], [["a cat"], ["a dog"]]),
        (["a cat", float("nan"), 7], [["a cat"], ["7"]]),
        ([5.0, 5.5, "a dog"], [["5"], ["5.5"], ["a dog"]]),
        (["", " \u200b\xa0", "a dog"], [["a dog"]]),
        ([["", "\0"], ["a", None, 3], ["", "b"]], [["a", "3"], ["", "b"]]),
        (["😀", "\u202eשלום", "a\0b"], [["😀"], ["\u202eשלום"], ["a\0b"]]),
    ],
)
def test_captions_of_a_list(captions, texts, root):
    rows = [{"image": n, "caption": c} for n, c in zip(NAMES, captions, strict=True)]
    (root / "pairs.json").write_text(json.dumps(rows))
    assert_same(str(root / "pairs.json"), root, texts)
    (root / "pairs.txt").write_text("\n".join(map(json.dumps, rows)))
    assert_same(str(root / "pairs.txt"), root, texts)


@pytest.mark.parametrize("encoded", [False, True])
@pytest.mark.parametrize(
    ("captions", "texts"),
    [
        (["a cat", None, ""], [["a cat"]]),
        ([1, None, 3], [["1"], ["3"]]),
        ([["a cat", None], [], None], [["a cat"]]),
        ([b"a cat", b"caf\xc3\xa9", None], [["a cat"], ["café"]]),
    ],
)
def test_captions_of_parquet(captions, texts, encoded, root):
    images = {"jpg": [IMAGE] * 3} if encoded else {"image": list(NAMES)}
    file = write_parquet(root / "t/train-00000-of-00001.parquet", **images, caption=captions)
    assert_same(str(file), root, texts)
    assert_same(str(file.parent), root, texts)


def test_files_of_one_table_may_have_their_columns_in_any_order(root):
    write_parquet(root / "t/0.parquet", jpg=[IMAGE], caption=["a"])
    write_parquet(root / "t/1.parquet", caption=["b"], jpg=[IMAGE])
    assert_same(str(root / "t"), root, [["a"], ["b"]])
    write_parquet(root / "u/0.parquet", image=[NAMES[0]], caption=["a"])
    write_parquet(root / "u/1.parquet", text=["b"], filepath=[NAMES[1]])
    assert_same(str(root / "u"), root, [["a"], ["b"]])


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> str:
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    return str(path)


@pytest.mark.parametrize(
    ("ending", "contents", "query", "texts"),
    [
        ("txt", [b"a cat", b"", b" \n"], "", [["a cat"]]),
        ("txt", ["a cat".encode("utf-16"), b"caf\xe9", b"\0"], "", [["a cat"], ["caf\ufffd"]]),
        ("json", [b'{"c": 5}', b'{"c": null}', b'{"c": "a"}'], "?caption=json.c", [["5"], ["a"]]),
        ("json", [b'{"c": ["a", null, 7]}', b"{}", b'{"c": []}'], "?caption=json.c", [["a", "7"]]),
    ],
)
def test_captions_of_shards(ending, contents, query, texts, root):
    members = []
    for number, content in enumerate(contents):
        members += [(f"{number}.jpg", IMAGE), (f"{number}.{ending}", content)]
    assert_same(write_tar(root / "0.tar", members) + query, root, texts)


def test_samples_that_a_shard_has_no_more_are_found(root):
    """As its statistics say: training counts them as lost."""
    members = [("0.jpg", IMAGE), ("0.txt", b"a cat")]
    shard = write_tar(root / "00000.tar", members)
    (root / "00000_stats.json").write_text('{"count": 3, "successes": 3}')
    assert [facts.lost for facts in examined(shard, root) if not facts.usable] == [2]
    assert_same(shard, root, [["a cat"]])


@pytest.mark.parametrize("member", [("cls", b"1\n"), ("json", b'{"label": 1}')])
def test_labels_of_shards_need_no_captions(member, root):
    ending, content = member
    members = [("0.jpg", IMAGE), (f"0.{ending}", content), ("1.jpg", IMAGE)]
    shard = write_tar(root / "0.tar", members)
    found = examined(shard, root)
    assert [(facts.usable, facts.labels) for facts in found] == [(True, ["1"]), (False, [])]
    labels = Labels(2, LabelOptions(), shard)
    first, second = ShardIndex([shard])
    assert labels(first) == ([1], [1.0])
    with pytest.raises(BadSample, match="no label"):
        labels(second)


def test_labelled_images_may_lack_a_caption(root):
    rows = [{"image": NAMES[0], "caption": None, "label": 0}, {"image": NAMES[1], "label": 1}]
    (root / "labels.json").write_text(json.dumps(rows))
    found = examined(str(root / "labels.json"), root)
    assert [facts.usable for facts in found] == [True, True]
    assert [list(facts.problems) for facts in found] == [["empty text"], []]


def test_a_list_in_place_of_an_image_is_none(root):
    (root / "a.json").write_text(json.dumps([{"image": list(NAMES), "caption": ["a", "b", "c"]}]))
    (facts,) = examined(str(root / "a.json"), root)
    assert not facts.usable and "no image" in facts.problems


def test_texts_of_punctuation_alone_are_none_to_a_bert(root):
    """SIMLA and ALBEF drop punctuation from captions; a CLIP reads it."""
    rows = [{"image": NAMES[0], "caption": "..."}, {"image": NAMES[1], "caption": ["!", "a"]}]
    (root / "pairs.json").write_text(json.dumps(rows))
    (root / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    data = str(root / "pairs.json")
    found = examined(data, root, root / "vocab.txt")
    assert [facts.usable for facts in found] == [False, True]
    assert found[1].lengths == [1, 2]
    fusion = PretrainPair(lambda image: (image, None), root)
    assert trained(data, fusion) == [["!", "a"]]
    assert all(facts.usable for facts in examined(data, root))


def test_a_caption_that_is_null_takes_its_weight_along(root):
    rows = [{"image": NAMES[0], "caption": ["a", None, "b"], "caption_weights": [1, None, 3]}]
    rows.append({"image": NAMES[1], "caption": ["c", None], "caption_weights": [1, 2]})
    (root / "pairs.json").write_text(json.dumps(rows))
    assert_same(str(root / "pairs.json"), root, [["a", "b"], ["c"]])
    assert [row["caption_weights"] for row in Records(root / "pairs.json")] == [[1, 3], [1]]
    rows[0]["caption_weights"] = [1, None, 0]
    (root / "pairs.json").write_text(json.dumps(rows))
    found = examined(str(root / "pairs.json"), root)
    assert [facts.usable for facts in found] == [False, True]
    with pytest.raises(UserError, match="0 is no number above 0"):
        Records(root / "pairs.json")


def test_texts_beside_images_may_be_in_capitals(root):
    (root / "own").mkdir()
    (root / "own/A.JPG").write_bytes(IMAGE)
    (root / "own/A.TXT").write_text("a cat\n")
    assert_same(str(root / "own"), root, [["a cat"]])


def test_members_of_zip_files_and_one_that_is_missing(root):
    """An evaluation scores it as a grey image, as a file that is missing."""
    with zipfile.ZipFile(root / "z.zip", "w") as archive:
        archive.writestr("0.jpg", IMAGE)
    rows = [{"image": f"z.zip/{number}.jpg", "caption": "a"} for number in range(2)]
    (root / "pairs.json").write_text(json.dumps(rows))
    images, captions = retrieval_list(Entry("x", "retrieval", str(root / "pairs.json")))
    assert captions == [["a"], ["a"]] and images[0] == root / "z.zip/0.jpg"
    (part,) = embed.parts_of(str(root / "pairs.json"), 100)
    found = [embed.image_of_part(part, lambda image: image, root, False, n) for n in range(2)]
    assert [row["readable"] for row in found] == [True, False]
    assert [facts.usable for facts in examined(str(root / "pairs.json"), root)] == [True, False]
