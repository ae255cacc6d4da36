"""The first look at the training data: what is noticed, in how much time, and that a run takes it."""

import json

import pytest

from dataset.health import start
from dataset.health.start import look_over
from dataset.loading.filtered import Filtered
from dataset.loading.stream import RecordSource, StreamLoader
from dataset.sources.records import Records
from dataset.sources.shard_list import find_shards
from dataset.sources.shards import ShardSource
from dataset.sources.tar_writer import write_shard
from dataset.tasks.captions import CaptionCollate
from dataset.tasks.retrieval import RetrievalCollate
from dataset.tasks.ve_nlvr import NLVR2, SNLI_VE, Statements
from dataset.tasks.vqa import QuestionAnswers
from dataset.text.bpe import ClipTokenizer
from dataset.text.wordpiece import Tokenizer, pre_caption
from tests.helpers.images import of_colour
from tests.unit.test_run import options, train


class Pair:
    """What makes samples: here it only knows where the images lie."""

    def __init__(self, root):
        self.image_root = root


def encoded(side: int) -> bytes:
    return of_colour("black", (40, side))


@pytest.fixture
def tokenizer(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    return Tokenizer(tmp_path / "vocab.txt")


def annotated(folder, name: str, rows: list[dict], sides=None) -> Records:
    for row in rows:
        side = (sides or {}).get(row["image"], 40)
        if side:
            (folder / row["image"]).write_bytes(encoded(side))
    (folder / name).write_text(json.dumps(rows))
    return Records(folder / name, ())


def pairs(count: int, caption: str = "a dog") -> list[dict]:
    return [{"image": f"{n}.png", "caption": caption} for n in range(count)]


def test_sound_data_is_passed_over_in_silence(tmp_path, tokenizer):
    records = annotated(tmp_path, "train.json", pairs(100))
    source = RecordSource(records, Pair(tmp_path), "train_file")
    held_out = annotated(tmp_path, "val.json", [{"image": "v.png", "caption": "a"}])
    assert len(held_out) == 1
    files = {"val_file": [str(tmp_path / "val.json")]}
    assert look_over([source], RetrievalCollate(tokenizer, 3), files) == []


@pytest.mark.parametrize("missing", [False, True])
def test_images_are_looked_for_where_the_reader_finds_them(missing, tmp_path):
    """SNLI-VE names them without .jpg, NLVR2 two of them."""
    for name in ("1.jpg", "2.png"):
        (tmp_path / name).write_bytes(encoded(40))
    entailment = {"image": 1, "sentence": "a", "label": "neutral"}
    pair = {"images": ["1.jpg", "2.png"], "sentence": "a", "label": "True"}
    for number, (entry, kind) in enumerate([(entailment, SNLI_VE), (pair, NLVR2)], 1):
        (tmp_path / "a.json").write_text(json.dumps([entry]))
        source = Statements(tmp_path / "a.json", kind, tmp_path, None).source()
        if missing:
            (tmp_path / "1.jpg").unlink(missing_ok=True)
        found = look_over([source], None, {})
        assert len(found) == 2 * missing
        assert not missing or f"1 of {number} images cannot be opened" in found[0]
        (tmp_path / "1.jpg").write_bytes(encoded(40))


def test_long_captions_tiny_and_missing_images_are_one_line(tmp_path, tokenizer):
    rows = pairs(20)
    for n in (1, 2, 3, 4, 5):
        rows[n]["caption"] = "A dog, a dog!"  # cleaned, four tokens and [CLS]
    sides = {"7.png": 31, "8.png": None}
    records = annotated(tmp_path, "train.json", rows, sides)
    lines = look_over(
        [RecordSource(records, Pair(tmp_path), "train_file")], RetrievalCollate(tokenizer, 4), {}
    )
    assert lines == [
        "warning: train_file: 25% of captions exceed 4 tokens and are cut; 1 of 20 images cannot be "
        "opened, such as 8.png; 1 of 20 images are under 32 px, such as 7.png",
        start.MORE,
    ]


def test_an_image_of_many_captions_and_a_long_one_take_no_longer(tmp_path, tokenizer, monkeypatch):
    """They took a minute: the bound of two seconds was looked at between two images."""
    looked_at = []

    def clean(text, words):
        looked_at.append(len(text))
        return pre_caption(text, words)

    monkeypatch.setattr(start, "pre_caption", clean)
    rows = [
        {"image": "0.png", "caption": ["a dog"] * 1000},
        {"image": "1.png", "caption": "a " * 9999},
    ]
    records = annotated(tmp_path, "train.json", rows)
    lines = look_over(
        [RecordSource(records, Pair(tmp_path), "train_file")], RetrievalCollate(tokenizer, 4), {}
    )
    assert lines == [] and len(looked_at) == start.SAMPLED + 1
    assert max(looked_at) == 4 * start.LETTERS


def test_the_samples_are_spread_over_long_lists(tmp_path, monkeypatch):
    monkeypatch.setattr(start, "SAMPLED", 10)
    records = [{"image": f"{n}.png", "caption": "x", "index": n} for n in range(105)]
    looked = [record["index"] for record in start.sampled(RecordSource(records, None))]
    assert looked == list(range(0, 100, 10))
    kept = Filtered(RecordSource(records, None), lambda record: True, "")
    assert len(list(start.sampled(kept))) == 10


def test_shards_on_this_machine_are_looked_at_and_others_left_alone(tmp_path):
    text = b"word " * 90
    samples = [(f"{n}", {"png": encoded(20), "txt": text}) for n in range(6)]
    write_shard(tmp_path / "0.tar", samples)
    source = ShardSource(find_shards(str(tmp_path / "0.tar"), 6), Pair(""))
    lines = look_over([source], CaptionCollate(ClipTokenizer()), {})
    assert "100% of captions exceed 77 tokens" in lines[0] and "6 of 6 images are under" in lines[0]
    source.shards = ["s3://nobody/0.tar"]
    assert look_over([source], CaptionCollate(ClipTokenizer()), {}) == []


def test_repeated_ids_and_images_that_a_split_shares(tmp_path):
    rows = [{"image": f"{n}.png", "question": "what?", "question_id": n % 9} for n in range(10)]
    records = annotated(tmp_path, "train.json", rows)
    build = QuestionAnswers(None, {"vqa": tmp_path})
    annotated(tmp_path, "val.json", [{"image": "./3.png"}, {"image": "v.png"}, {"image": "3.png"}])
    (tmp_path / "test.csv").write_text("image,question\nv.png,why?\n9.png,who?\n1.png,how?\n")
    files = {"val_file": [str(tmp_path / "val.json")], "test_file": [str(tmp_path / "test.csv")]}
    lines = look_over([RecordSource(records, build, "train")], None, files)
    assert lines[0] == "warning: train: question_id 0 comes more than once"
    assert lines[1].endswith("val.json: training has 1 of 2 images, too: 3.png")
    assert lines[2].endswith("test.csv: training has 2 of 3 images, too: 9.png")
    missing = {"val_file": [str(tmp_path / "none.json")]}  # its own reader says so
    assert len(look_over([RecordSource(records, build, "train")], None, missing)) == 2


def test_no_time_no_look(tmp_path, tokenizer, monkeypatch):
    records = annotated(tmp_path, "train.json", pairs(5, "a dog a dog a dog"), {"1.png": 5})
    source = RecordSource(records, Pair(tmp_path))
    files = {"val_file": [str(tmp_path / "train.json")]}
    assert len(look_over([source], RetrievalCollate(tokenizer, 3), files)) == 3
    monkeypatch.setattr(start, "SECONDS", -1.0)
    assert look_over([source], RetrievalCollate(tokenizer, 3), files) == []


def test_a_run_looks_once_and_says_what_it_noticed(tmp_path, monkeypatch, capsys):
    calls = []

    def look(loader, held_out):
        calls.append(held_out)
        return ["warning: something is odd"]

    monkeypatch.setattr(StreamLoader, "look_over", look)
    with pytest.raises(SystemExit):
        train(options(tmp_path / "one", max_steps=2))
    assert calls == [{}] and "warning: something is odd" in capsys.readouterr().out
    train(options(tmp_path / "one"))  # resumes
    train(options(tmp_path / "two", check_data=False))
    assert len(calls) == 1
    config = options(tmp_path / "three")
    config.val_file, config.test_file = tmp_path / "v.json", ["t.json"]
    train(config)
    assert calls[1] == {"val_file": [str(tmp_path / "v.json")], "test_file": ["t.json"]}
