"""Labels as sequences, list files, shards with nouns, noun extraction; and what is said about bad
ones."""

import io
import json
import pickle
import tarfile
from types import SimpleNamespace

import pytest
import torch

from base.errors import BadSample, UserError
from dataset.loading.stream import StreamLoader
from dataset.sources.tfrecord import encode_example, write_records
from dataset.tasks.recognition import (
    CAPTION_PROMPTS,
    LABEL_PROMPTS,
    ImageSet,
    ImageView,
    RecognitionCollate,
    RecognitionSample,
    Sequences,
    label_records,
    names_of,
    pad_batch,
    read_list,
    training_stream,
)
from dataset.text.nouns import Nouns, clean, make_tagger, parse_nouns, perceptron_tagger
from dataset.text.sentencepiece import PieceTokenizer
from dataset.text.wordnet import WordNet
from evaluation.recognition import similarity_scores
from scripts.data import extract_nouns
from tests.helpers import tiny_nxtp
from tests.helpers.images import of_colour
from tests.unit.test_wordnet import write_database


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_nxtp.tokenizer(tmp_path_factory.mktemp("pieces"))


PROMPT = LABEL_PROMPTS[0]


class TestSequences:
    def test_every_label_is_ended_and_sees_itself(self, tokenizer):
        text = Sequences(tokenizer, 80).labels(["dog", "living room", "sky"], PROMPT)
        before = len(Sequences(tokenizer, 80).opening)
        words, segments = tokenizer.decode(text["text_ids"][before:]), text["segments"]
        assert words == "dog, living room, sky,"
        assert segments[:before] == [0] * before and segments[before] == 1 and segments[-1] == 3
        ends = [i for i, token in enumerate(text["text_ids"]) if token == tokenizer.delimiter]
        assert [segments[i] for i in ends] == [1, 2, 3]  # a delimiter belongs to the label it ends
        assert text["targets"] == [*text["text_ids"][1:], -100]

    def test_the_published_form_leaves_the_last_label_open(self, tokenizer):
        text = Sequences(tokenizer, 80, original=True).labels(["dog", "sky"], PROMPT)
        assert text["text_ids"][-1] == tokenizer.eos and text["targets"][-2] == -100
        assert text["segments"][-1] == -1 and text["segments"].count(-1) > 1
        assert max(text["segments"]) == 1

    def test_labels_may_see_those_before(self, tokenizer):
        assert set(
            Sequences(tokenizer, 80, decouple=False).labels(["dog", "sky"], PROMPT)["segments"]
        ) == {0}

    def test_order_and_prompt_are_drawn(self, tokenizer):
        made = Sequences(tokenizer, 90)
        torch.manual_seed(0)
        texts = {tuple(made.labels(["dog", "cat", "sky", "tree"])["text_ids"]) for _ in range(10)}
        assert len(texts) > 5
        fixed = Sequences(tokenizer, 90, many_prompts=False)
        opening = fixed.opening
        assert all(
            fixed.labels(["dog", "cat"])["text_ids"][: len(opening)] == opening for _ in range(5)
        )

    def test_what_does_not_fit_is_left_out_whole(self, tokenizer):
        labels = [f"living room {i}" for i in range(30)]
        text = Sequences(tokenizer, 80).labels(labels, PROMPT)
        assert len(text["text_ids"]) <= 80 and text["text_ids"][-1] == tokenizer.delimiter
        kept = (
            tokenizer.decode(text["text_ids"][len(Sequences(tokenizer, 80).opening) :])
            .rstrip(",")
            .split(", ")
        )
        assert kept == labels[: len(kept)] and kept

    def test_a_label_longer_than_the_budget(self, tokenizer):
        with pytest.raises(BadSample, match=r"label 'xyxy.*longer than the \d+ tokens"):
            Sequences(tokenizer, 60).labels(["xy" * 60], PROMPT)

    def test_no_labels(self, tokenizer):
        with pytest.raises(BadSample, match=r"no labels.*extract_nouns"):
            Sequences(tokenizer, 80).labels([], PROMPT)

    def test_a_budget_without_room(self, tokenizer):
        with pytest.raises(UserError, match="max_text 16: the longest prompt alone"):
            Sequences(tokenizer, 16)

    def test_captions_are_read_from_left_to_right(self, tokenizer):
        text = Sequences(tokenizer, 120).caption("a dog", CAPTION_PROMPTS[0])
        assert set(text["segments"]) == {0} and text["text_ids"][-1] == tokenizer.eos
        assert text["targets"][-2] == tokenizer.eos

    def test_padding(self):
        one = {"text_ids": [1, 2, 3], "segments": [0, 0, 1], "targets": [2, 3, -100]}
        two = {"text_ids": [4] * 10, "segments": [0] * 10, "targets": [5] * 9 + [-100]}
        batch = pad_batch([one, two], pad=9)
        assert (
            batch["text_ids"].shape == (2, 16)
            and batch["text_ids"][0].tolist() == [1, 2, 3] + [9] * 13
        )
        assert batch["segments"][0].tolist() == [0, 0, 1] + [-1] * 13
        assert len(batch["positions"]) == 32
        counted = batch["labels"] != -100
        assert batch["positions"][counted].tolist() == [0, 1, *range(16, 25)]
        assert batch["labels"][counted].tolist() == [2, 3] + [5] * 9

    def test_prompts(self):
        assert LABEL_PROMPTS[0] == "The objects in the image are" and len(
            set(LABEL_PROMPTS)
        ) == len(LABEL_PROMPTS)
        assert all(prompt.endswith(" are") for prompt in LABEL_PROMPTS)
        assert CAPTION_PROMPTS[0] == "A brief description of the given image is that"


class TestTokenizer:
    def test_special_tokens_stand_behind_the_pieces(self, tokenizer):
        assert (
            tokenizer.image == tokenizer.vocab_size - 2
            and tokenizer.pad == tokenizer.vocab_size - 1
        )
        ids = tokenizer.encode("<|image|>dog")
        assert ids[0] == tokenizer.image and tokenizer.decode(ids) == "<|image|>dog"
        assert tokenizer.decode(tokenizer.encode("living room, dog")) == "living room, dog"

    def test_it_travels_to_loader_workers(self, tokenizer):
        again = pickle.loads(pickle.dumps(tokenizer))
        assert (
            again.encode("dog, sky") == tokenizer.encode("dog, sky")
            and again.vocab_size == tokenizer.vocab_size
        )

    def test_the_folder_above_is_looked_at(self, tokenizer):
        below = tokenizer.path.parent / "llama-2-7b"
        below.mkdir(exist_ok=True)
        assert PieceTokenizer(below).path == tokenizer.path

    def test_refused(self, tmp_path, tokenizer):
        with pytest.raises(UserError, match=r"no such file; name LLaMA's tokenizer.model"):
            PieceTokenizer(tmp_path / "tokenizer.model")
        damaged = tokenizer.path.read_bytes().replace(b"<0x00>", b"\xff" * 6)
        for content in (b"nothing", damaged):
            (tmp_path / "tokenizer.model").write_bytes(content)
            with pytest.raises(UserError, match=r"no SentencePiece model .*fetch it again"):
                PieceTokenizer(tmp_path)


# ---- nouns
TAGS = {
    "dogs": "NNS",
    "dog": "NN",
    "geese": "NNS",
    "laptop": "NN",
    "lap": "NN",
    "b2b": "NN",
    "runs": "VBZ",
}


@pytest.fixture
def nouns(tmp_path):
    index = WordNet(write_database(tmp_path / "wordnet"))
    return lambda **changes: Nouns(
        lambda words: [TAGS.get(word, "DT") for word in words], index, words=str.split, **changes
    )


def test_nouns_of_a_caption(nouns):
    assert nouns()("The dogs and GEESE runs") == ["dog", "goose"]
    assert nouns()("the runs") == [] == nouns()("")


def test_defects_of_the_published_rules_and_their_mending(nouns):
    assert nouns()("laptop dogs dog") == ["lap", "dog", "dog"]
    assert nouns(fixed=True)("laptop dogs dog") == ["laptop", "dog"]
    assert nouns(numbers=True)("b2b") == ["b2b"] and nouns()("b2b") == []
    assert clean("A top-notch Person, & dogs!") == "a -notch dogs"
    assert clean("a person at the shop", whole_words=True) == "a at the shop"


def test_taggers_are_never_downloaded(tmp_path):
    with pytest.raises(
        UserError,
        match=r"no taggers/averaged_perceptron_tagger_eng in it.*or use the tagger `lexicon`",
    ):
        perceptron_tagger(tmp_path)
    with pytest.raises(UserError, match="tagger nltk: name the folder"):
        make_tagger("nltk", None)
    tags = make_tagger("auto", None)(["two", "dogs", "run", "in", "paris", "happily"])
    assert tags[1] == "NNS" and len(tags) == 6 and make_tagger("lexicon", None)([]) == []


def test_the_perceptron_of_nltk_is_read_from_its_folder(tmp_path):
    """A tiny model in NLTK's JSON layout: every word a noun."""
    folder = tmp_path / "taggers/averaged_perceptron_tagger_eng"
    folder.mkdir(parents=True)
    contents = {"weights": {"bias": {"NN": 1.0}}, "tagdict": {"the": "DT"}, "classes": ["DT", "NN"]}
    for name, content in contents.items():
        (folder / f"averaged_perceptron_tagger_eng.{name}.json").write_text(json.dumps(content))
    assert make_tagger("auto", tmp_path)(["the", "dog"]) == ["DT", "NN"]


def test_names_in_lists():
    assert parse_nouns(b" Great  White dog, cat,,") == ["great white dog", "cat"]


# ---- files
def write_shard(path, samples: dict[str, dict[str, bytes]]) -> None:
    with tarfile.open(path, "w") as archive:
        for key, members in samples.items():
            for kind, data in members.items():
                header = tarfile.TarInfo(f"{key}.{kind}")
                header.size = len(data)
                archive.addfile(header, io.BytesIO(data))


def jpeg(side: int = 20) -> bytes:
    return of_colour("red", (2 * side, side), "JPEG")


def test_list_files(tmp_path):
    (tmp_path / "a.list").write_text("C:/x 1.jpg : great white shark,white shark\n\nb.jpg:tench\n")
    records = label_records(tmp_path / "a.list")
    assert list(records) == [
        {"image": "C:/x 1.jpg", "labels": ["great white shark", "white shark"]},
        {"image": "b.jpg", "labels": ["tench"]},
    ]
    (tmp_path / "n.list").write_text("a.jpg : dog\nb.jpg : \nc.jpg:\n")  # kept for evaluation
    assert [record["labels"] for record in label_records(tmp_path / "n.list")] == [["dog"], [], []]
    (tmp_path / "o.list").write_text("a.jpg : dog\n" * 100 + "b.jpg\n" + "c.jpg : cat\n")
    records = label_records(tmp_path / "o.list")
    assert len(records) == 101 and records[100]["labels"] == ["cat"]
    with pytest.raises(UserError, match=r"o\.list, line 101.*an evaluation needs every entry"):
        records.complete()
    (tmp_path / "b.list").write_text("b.jpg\n")
    with pytest.raises(UserError, match=r"b.list, line 1: expected `path : name,name,...`"):
        label_records(tmp_path / "b.list")
    with pytest.raises(UserError, match="no such list"):
        label_records(tmp_path / "c.list")


def test_samples_and_batches(tmp_path, tokenizer):
    (tmp_path / "a.jpg").write_bytes(jpeg())
    build = RecognitionSample(ImageView(16), Sequences(tokenizer, 80), tmp_path, captions=True)
    listed = {"image": "a.jpg", "labels": ["Dog", "Sky"], "caption": "a dog"}
    stored = {"image": jpeg(), "key": "s/1", "nouns": b"dog,cat", "caption": "a cat"}
    batch = RecognitionCollate(tokenizer.pad)([build(listed), build(stored)])
    assert batch["image"].shape == (2, 3, 16, 16) and batch["image"].dtype == torch.uint8
    assert {"text_ids", "segments", "positions", "labels", "caption_text_ids"} <= batch.keys()
    one_prompt = Sequences(tokenizer, 80, many_prompts=False)
    draw = RecognitionSample(ImageView(16), one_prompt, tmp_path, captions=True)
    blanks = [draw({**listed, "caption": ["", "a dog", "\u200b"]})["caption"] for _ in range(20)]
    assert blanks == [draw(listed)["caption"]] * 20
    for broken, message in (
        (
            {"image": jpeg(), "key": "s/2", "caption": ""},
            "s/2: no member .nouns; run scripts/data/extract_nouns.py",
        ),
        ({"image": jpeg(), "key": "s/3", "nouns": b""}, "s/3: no labels"),
        ({"image": b"no image", "key": "s/4", "nouns": b"dog", "caption": ""}, "s/4"),
        ({"image": "gone.jpg", "labels": ["dog"], "caption": ""}, "gone.jpg: No such file"),
        ({"image": "a.jpg", "labels": ["dog"]}, "a.jpg: no caption"),
    ):
        with pytest.raises(BadSample, match=message):
            build(broken)


def test_images_whole_or_their_centre():
    image = torch.zeros(3, 10, 30, dtype=torch.uint8)
    image[:, :, :10] = 255
    assert ImageView(10)(image).float().mean() < 10  # the centre is black
    assert ImageView(10, whole=True)(image).float().mean() == pytest.approx(85, abs=3)
    torch.manual_seed(0)
    noise = torch.randint(0, 255, (3, 30, 30), dtype=torch.uint8)
    crops = [ImageView(10, whole=True, crop=0.5)(noise) for _ in range(4)]
    assert all(crop.shape == (3, 10, 10) for crop in crops) and not torch.equal(crops[0], crops[1])


def test_the_images_of_a_split(tmp_path):
    members = {"jpg": jpeg(), "txt": b"a dog", "nouns": b"dog,cat"}
    write_shard(tmp_path / "00000.tar", {"000000": members, "000001": members | {"nouns": b"sky"}})
    data = ImageSet(tmp_path, ImageView(8))
    assert len(data) == 2 and data.references == [["dog", "cat"], ["sky"]]
    assert (
        data.load(1)["image"].shape == (3, 8, 8)
        and data.image(0) == jpeg()
        and "00000.tar" in data.name(0)
    )
    without = {"txt": b"a dog", "nouns": b"dog"}
    write_shard(tmp_path / "00000.tar", {"000000": members, "000001": without})
    assert len(ImageSet(tmp_path, ImageView(8), error_budget=0.5)) == 1
    with pytest.raises(UserError, match="1 of 2 samples are unusable"):
        ImageSet(tmp_path, ImageView(8), error_budget=0.4)
    write_shard(tmp_path / "00000.tar", {"000000": members, "000001": members | {"nouns": b"sky"}})
    (tmp_path / "a.jpg").write_bytes(jpeg())
    (tmp_path / "a.list").write_text("a.jpg : Dog,cat\n")
    listed = ImageSet(tmp_path / "a.list", ImageView(8), tmp_path)
    assert listed.references == [["dog", "cat"]] and listed.load(0)["image"].shape == (3, 8, 8)
    with pytest.raises(UserError, match="image_root"):
        ImageSet(tmp_path / "a.list", ImageView(8), tmp_path / "elsewhere")
    write_shard(tmp_path / "00001.tar", {"000002": {"jpg": jpeg(), "txt": b"a dog"}})
    with pytest.raises(UserError, match=r"000002: no member .nouns"):
        ImageSet(tmp_path, ImageView(8))
    (tmp_path / "00001.tar").write_bytes(b"x" * 600)
    with pytest.raises(
        UserError, match=r"1 of 3 samples are unusable.*\n.*00001.tar: a damaged header"
    ):
        ImageSet(tmp_path, ImageView(8))


def labelled_shard(folder, monkeypatch, captions=("a dog", "", "wow", "dog dog"), settings=()):
    """A shard of captions, and the same with nouns; a stand-in finds the nouns."""
    monkeypatch.setattr(extract_nouns, "extractor", lambda *_: stand_in)
    (folder / "nouns").mkdir(exist_ok=True)
    samples = {
        f"{i:03d}": {"jpg": jpeg(), "txt": caption.encode()} for i, caption in enumerate(captions)
    }
    write_shard(folder / "0.tar", samples)
    target = folder / "nouns/0.tar"
    return extract_nouns.label_shard(str(folder / "0.tar"), target, settings), target


def stand_in(caption: str) -> list[str]:
    return [word for word in caption.split() if word in ("dog", "wolf")]


def test_images_without_nouns_stay_in_evaluation_against_the_empty_text(tmp_path, monkeypatch):
    counts, _ = labelled_shard(tmp_path, monkeypatch)
    assert counts == {"successes": 2, "without_caption": 1, "without_nouns": 1}
    images = ImageSet(str(tmp_path / "nouns"), ImageView(16))
    assert images.references == [["dog"], [], [], ["dog", "dog"]]
    table = {"": torch.tensor([1.0, 0.0]), "dog": torch.tensor([0.0, 1.0])}
    found = similarity_scores(
        [["dog"], ["dog"], [""], ["dog"]],
        images.references,
        lambda texts: torch.stack([table[text] for text in texts]),
    )
    assert [round(each["f1"], 3) for each in found] == [1.0, 0.0, 1.0, 1.0]


def test_training_passes_over_images_without_nouns(tmp_path, monkeypatch, tokenizer):
    labelled_shard(tmp_path, monkeypatch)
    sequences = Sequences(tokenizer, 80)
    shards = [str(tmp_path / "nouns")]
    options = {"shards": shards, "samples": [], "shuffle_buffer": 10, "weights": [], "exif": False}
    data = SimpleNamespace(train_list=[], image_root=tmp_path, **options)
    stream = training_stream(ImageView(16), sequences, data, captions=False)
    assert len(stream) == 2
    mixed = SimpleNamespace(**vars(data) | {"shards": [*shards, *shards], "weights": [1.0, 3.0]})
    assert training_stream(ImageView(16), sequences, mixed, False).shares == [0.25, 0.75]
    loader = StreamLoader(stream, 2, workers=0)
    for _ in range(4):
        assert len(next(loader)["image"]) == 2
    assert sum(loader.errors.values()) == 0
    labelled_shard(tmp_path, monkeypatch, captions=("wow", ""))
    (tmp_path / "nouns/0_stats.json").write_text('{"successes": 2}')
    stream = training_stream(ImageView(16), sequences, data, captions=False)
    with pytest.raises(UserError, match="no caption has a noun"):
        next(StreamLoader(stream, 2, workers=0))


def test_labelled_shards_are_made_again_for_other_settings_or_sources(tmp_path, monkeypatch):
    _, target = labelled_shard(tmp_path, monkeypatch)
    made = target.stat().st_mtime_ns
    shard = str(tmp_path / "0.tar")
    counts = extract_nouns.label_shard(shard, target, ())
    assert counts == {"successes": 2, "without_caption": 1, "without_nouns": 1}
    assert target.stat().st_mtime_ns == made
    whole = target.read_bytes()
    target.write_bytes(whole[:1024])  # cut off later, as by a copy
    assert extract_nouns.label_shard(shard, target, ()) == counts and target.read_bytes() == whole
    (target.parent / "0_stats.json").write_text("{")
    assert extract_nouns.label_shard(shard, target, ()) == counts
    made = target.stat().st_mtime_ns
    assert extract_nouns.label_shard(shard, target, ("nltk",))["successes"] == 2
    assert target.stat().st_mtime_ns > made
    counts, _ = labelled_shard(tmp_path, monkeypatch, ("a wolf", "a dog", "a wolf"), ("nltk",))
    assert counts["successes"] == 3
    one, other = (extract_nouns.state_of(f"{shard}?caption={name}", ()) for name in "ab")
    assert one != other
    with monkeypatch.context() as patch:  # killed before the statistics of the new shard
        patch.setattr(extract_nouns, "write_json", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            extract_nouns.label_shard(shard, target, ())
    assert not (target.parent / "0_stats.json").exists()


def test_what_is_damaged_or_labelled_already(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(extract_nouns, "extractor", lambda *_: stand_in)
    about = {"0": b"{}", "1": b'"a dog"', "2": b'"a wolf"'}  # the first is no text
    samples = {
        key: {"jpg": jpeg(), "json": b'{"cap": %s}' % text, "nouns": b"cat"}
        for key, text in about.items()
    }
    write_shard(tmp_path / "0.tar", samples)
    whole = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(whole[:-11_000])  # ends in the last sample
    shard = f"{tmp_path}/0.tar?caption=json.cap"
    counts = extract_nouns.label_shard(shard, tmp_path / "out.tar", ())
    assert counts == {"successes": 1, "without_caption": 0, "without_nouns": 0, "damaged": 2}
    said = capsys.readouterr().err
    assert "0.tar?caption=json.cap/2: " in said and "0.tar?caption=json.cap/0" in said
    with tarfile.open(tmp_path / "out.tar") as archive:
        assert archive.getnames() == ["1.jpg", "1.json", "1.nouns", "1.txt"]
        assert archive.extractfile("1.nouns").read() == b"dog"
        assert archive.extractfile("1.txt").read() == b"a dog"


def test_every_setting_reaches_the_nouns(monkeypatch):
    monkeypatch.setattr(extract_nouns, "make_tagger", lambda *given: given)
    monkeypatch.setattr(extract_nouns, "treebank_words", lambda folder: folder)
    monkeypatch.setattr(extract_nouns, "Nouns", lambda tagger, **given: (tagger, given))
    config = extract_nouns.Config(tagger="nltk", nltk_data="data", numbers=True)
    made = extract_nouns.extractor.__wrapped__(*extract_nouns.settings_of(config))
    assert made == (("nltk", "data"), {"words": "data", "numbers": True, "fixed": False})


def test_shards_are_not_labelled_where_one_would_replace_another(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(extract_nouns, "extractor", lambda *_: stand_in)
    for name in ("in/a/0.tar", "in/b/0.tar", "out/7.tar"):
        (tmp_path / name).parent.mkdir(parents=True)
        write_shard(tmp_path / name, {"000": {"jpg": jpeg(), "txt": b"a dog"}})
    (tmp_path / "link").symlink_to(tmp_path / "in/a")
    for source, target, said in (
        ("in", "x", "several shards are called 0.tar; label their folders one by one"),
        ("in/a?caption=txt", "in/a", "holds the shards themselves"),
        ("in/a", "link", "holds the shards themselves"),
    ):
        config = extract_nouns.Config(f"{tmp_path}/{source}", tmp_path / target, workers=1)
        with pytest.raises(UserError, match=said):
            extract_nouns.main(config)
    with pytest.raises(UserError, match=r"s3://b/t: .*--target"):
        extract_nouns.main(extract_nouns.Config(f"{tmp_path}/in/a", "s3://b/t"))
    extract_nouns.main(extract_nouns.Config(f"{tmp_path}/in/a", tmp_path / "out", workers=1))
    assert "out: also holds 1 shards of other sources" in capsys.readouterr().err


def test_a_remote_shard_that_was_replaced_is_labelled_again(tmp_path, monkeypatch):
    from fsspec.implementations.memory import MemoryFileSystem

    monkeypatch.setattr(extract_nouns, "extractor", lambda *_: stand_in)
    url = "memory://nouns/0.tar"
    for captions, labelled in (("a dog", 1), ("a dog and a wolf beside it", 2)):
        write_shard(tmp_path / "0.tar", {"000": {"jpg": jpeg(), "txt": captions.encode()}})
        MemoryFileSystem().pipe_file("/nouns/0.tar", (tmp_path / "0.tar").read_bytes() * labelled)
        for _ in range(2):
            counts = extract_nouns.label_shard(url, tmp_path / "out.tar", ())
            assert counts["successes"] == labelled


def test_nouns_of_tfrecords_are_refused(tmp_path):
    write_records(tmp_path / "in/0.tfrecord", [encode_example({"jpg": jpeg(), "txt": "a dog"})])
    config = extract_nouns.Config(str(tmp_path / "in"), tmp_path / "out")
    with pytest.raises(UserError, match=r"0\.tfrecord: TFRecord"):
        extract_nouns.main(config)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"\xef\xbb\xbfa.jpg : dog\r\n\r\n", b"a.jpg:dog"])
def test_lists_with_a_byte_order_mark_or_other_line_ends(tmp_path, content):
    (tmp_path / "a.list").write_bytes(content)
    assert list(read_list(tmp_path / "a.list")) == [{"image": "a.jpg", "labels": ["dog"]}]
    (tmp_path / "a.list").write_bytes(b"a.jpg : \xff\n")
    with pytest.raises(UserError, match=r"a\.list: not UTF-8"):
        list(read_list(tmp_path / "a.list"))


def test_labels_that_are_a_text_are_names_joined_by_commas():
    assert names_of({"labels": "Dog, living room"}) == ["dog", "living room"]
    with pytest.raises(BadSample, match="labels is 5"):
        names_of({"labels": 5, "image": "a.jpg"})


def test_ranges_of_shards_are_labelled_and_merged(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(extract_nouns, "extractor", lambda *_: stand_in)
    captions = ("a dog", "wow", "a wolf")
    (tmp_path / "in").mkdir()
    for number, caption in enumerate(captions):
        sample = {"000": {"jpg": jpeg(), "txt": caption.encode()}}
        write_shard(tmp_path / f"in/{number}.tar", sample)

    def run(target, **sharing):
        config = extract_nouns.Config(str(tmp_path / "in"), tmp_path / target, workers=1)
        config.sharing = extract_nouns.Sharing(**sharing)
        extract_nouns.main(config)
        return json.loads(capsys.readouterr().out)

    whole = run("whole")
    assert whole == {"shards": 3, "successes": 2, "without_caption": 0, "without_nouns": 1}
    assert run("parts", range="0/2")["shards"] == 1
    with pytest.raises(UserError, match=r"parts: shards 1-2 of 0-2 are missing"):
        run("parts", merge=True)
    assert run("none", range="0/9") == {"shards": 0}, "a task without a shard"
    assert run("parts", range="1/2")["shards"] == 2
    assert run("parts", merge=True) == whole
    for number in range(3):
        one, other = tmp_path / f"whole/{number}.tar", tmp_path / f"parts/{number}.tar"
        assert one.read_bytes() == other.read_bytes()
