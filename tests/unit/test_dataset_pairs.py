"""Pre-training and retrieval pairs: from annotation files and shards to the batches the models
take."""

import io
import json
import os
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from base.distributed import World
from base.errors import BadSample, UserError
from dataset.images.albef import PretrainTransform, TestTransform, TrainTransform
from dataset.images.block_mask import BlockMask
from dataset.loading.stream import RecordSource, Stream, StreamLoader
from dataset.sources.records import Records
from dataset.sources.shard_list import find_shards
from dataset.sources.shards import ShardSource
from dataset.tasks import pretrain
from dataset.tasks.pretrain import CodeCache, PretrainCollate, PretrainPair, write_codes
from dataset.tasks.record import captions_of
from dataset.tasks.retrieval import RetrievalCollate, RetrievalPair, RetrievalSet, number_images
from dataset.text.wordpiece import Tokenizer
from evaluation.retrieval import nearest, recalls

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "dog", "cat", "ball"]
pytestmark = pytest.mark.filterwarnings("ignore:The image decoding")


@pytest.fixture
def folder(tmp_path):
    """Twelve images, one of them cut off, and a vocabulary."""
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    rng = np.random.default_rng(0)
    for number in range(12):
        image = Image.fromarray(rng.integers(0, 256, (50, 70, 3), dtype=np.uint8))
        image.save(tmp_path / f"{number}.jpg")
    (tmp_path / "5.jpg").write_bytes((tmp_path / "5.jpg").read_bytes()[:300])
    return tmp_path


def pairs(folder, captions=("a red dog", "Blue ball?")):
    entries = [
        {"image": f"{n}.jpg", "caption": list(captions), "image_id": n // 2} for n in range(12)
    ]
    (folder / "pairs.json").write_text(json.dumps(entries))
    return Records(folder / "pairs.json")


def check_pretraining_batch(batch, size, side, tokens):
    assert batch["image"].shape == (size, 3, side, side)
    assert batch["token_image"].shape == (size, 3, tokens, tokens)
    assert batch["token_image"].dtype == batch["image"].dtype == torch.uint8
    patches = (side // 16) ** 2
    assert batch["patch_mask"].shape == (size, patches) and batch["patch_mask"].dtype == torch.bool
    assert batch["patch_mask"].any(1).all() and not batch["patch_mask"].all(1).any()
    length = batch["text_ids"].shape[1]
    assert length % 8 == 0 and batch["mlm_ids"].shape == batch["text_mask"].shape == (size, length)
    chosen = batch["mlm_labels"] != -100
    assert len(chosen) % 32 == 0
    places = batch["mlm_positions"][chosen]
    assert torch.equal(batch["text_ids"].flatten()[places], batch["mlm_labels"][chosen])
    unchanged = torch.ones(size * length, dtype=torch.bool)
    unchanged[places] = False
    assert torch.equal(
        batch["mlm_ids"].flatten()[unchanged], batch["text_ids"].flatten()[unchanged]
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_pretraining_batches_from_annotations(folder, workers):
    build = PretrainPair(PretrainTransform(64, 32), folder, BlockMask(4))
    collate = PretrainCollate(Tokenizer(folder), mlm_probability=0.5)
    loader = StreamLoader(
        Stream([RecordSource(pairs(folder), build, "pairs")], collate), 4, workers, error_budget=0.2
    )
    for _ in range(6):
        check_pretraining_batch(next(loader), 4, 64, 32)
    assert loader.errors["pairs"] >= 1 and "5.jpg" in loader.bad_samples[0]
    loader.close()


def test_pretraining_batches_from_shards(folder):
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for number in range(12):
            for kind, data in (
                ("jpg", (folder / f"{number}.jpg").read_bytes()),
                ("txt", b"a red cat"),
            ):
                member = tarfile.TarInfo(f"{number}.{kind}")
                member.size = len(data)
                if not (number == 7 and kind == "txt"):
                    tar.addfile(member, io.BytesIO(data))
    build = PretrainPair(PretrainTransform(64, 32), patch_mask=BlockMask(4))
    source = ShardSource(find_shards(str(folder / "00000.tar"), 12), build)
    loader = StreamLoader(
        Stream([source], PretrainCollate(Tokenizer(folder))), 5, 0, error_budget=0.5
    )
    for _ in range(2):
        check_pretraining_batch(next(loader), 5, 64, 32)
    next(loader)
    assert any("00000.tar/5" in message for message in loader.bad_samples)
    assert any("00000.tar/7: no caption" in message for message in loader.bad_samples)


def test_albef_batches_carry_no_masks(folder):
    build = PretrainPair(PretrainTransform(64), folder)
    batch = PretrainCollate(Tokenizer(folder))([build(pairs(folder)[n]) for n in (0, 1)])
    assert sorted(batch) == [
        "image",
        "mlm_ids",
        "mlm_labels",
        "mlm_positions",
        "text_ids",
        "text_mask",
    ]
    with pytest.raises(BadSample, match="empty after cleaning"):
        build({"image": "0.jpg", "caption": "?!"})


def test_visual_codes_from_a_cache(folder):
    codes = np.arange(12 * 16, dtype=np.int16).reshape(12, 16)
    np.save(folder / "codes.npy", codes)
    transform = PretrainTransform(64, fixed_geometry=True)
    build = PretrainPair(transform, folder, BlockMask(4), CodeCache(folder / "codes.npy", 12))
    source = RecordSource(pairs(folder), build)
    loader = StreamLoader(
        Stream([source], PretrainCollate(Tokenizer(folder))), 4, 1, error_budget=0.5
    )
    batch = next(loader)
    loader.close()
    assert batch["visual_codes"].dtype == torch.int64 and "token_image" not in batch
    assert set(batch["visual_codes"][:, 0].tolist()) <= set(range(0, 192, 16))
    with pytest.raises(UserError, match="fixed_geometry"):
        PretrainPair(
            PretrainTransform(64), folder, BlockMask(4), CodeCache(folder / "codes.npy", 12)
        )
    with pytest.raises(UserError, match="does not fit 13 records"):
        CodeCache(folder / "codes.npy", 13)
    np.save(folder / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    for name in ("objects.npy", "missing.npy", "vocab.txt"):
        with pytest.raises(UserError, match=r"no readable .npy"):
            CodeCache(folder / name, 1)


class MeanTokenizer(torch.nn.Module):
    """Codes of a 16 x 16 grid: the mean of each square, in grey levels times a weight."""

    def __init__(self, weight: float = 1.0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(weight))

    @torch.no_grad()
    def codes(self, image):
        grey = image.float().mean(1, keepdim=True)
        means = torch.nn.functional.avg_pool2d(grey, 2)[:, 0]
        return (means * self.weight).long()


def codes_of(folder, entries, tokenizer=None, side=32, exif=False) -> np.ndarray:
    """Codes by `write_codes` of a list in a cache that each call shares."""
    (folder / "list.json").write_text(json.dumps(entries))
    records = Records(folder / "list.json")
    build = PretrainPair(PretrainTransform(64, side, fixed_geometry=True), folder)
    path = folder / "cache.npy"
    write_codes(path, records, build, tokenizer or MeanTokenizer(), batch_size=5, exif=exif)
    return CodeCache(path, len(records)).codes.copy()


@pytest.mark.filterwarnings("ignore:.*made of other annotations")
def test_codes_are_of_the_image_as_the_training_turns_it(tmp_path):
    """Else the labels of patches would be those of the image on its side."""
    half = np.zeros((64, 64, 3), np.uint8)
    half[:32] = 200
    tags = Image.Exif()
    tags[0x0112] = 6  # a quarter turn clockwise
    Image.fromarray(half).save(tmp_path / "a.png", exif=tags)
    stored, turned, again = (
        codes_of(tmp_path, [{"image": "a.png", "caption": "x"}], exif=exif).reshape(16, 16)
        for exif in (False, True, False)
    )
    assert (stored == again).all() and (turned == np.rot90(stored, -1)).all()
    assert stored[0].mean() > 150 > stored[-1].mean()


def test_the_table_of_codes_has_its_disk_space_before_it_is_filled(tmp_path):
    """A write to a mapped hole on a full disk would end the process by SIGBUS."""
    table = pretrain._CodeTable(tmp_path / "codes.npy", "key", records=5000, batch_size=8)
    table.create(width=16)
    made = table.partial.stat()
    assert 4 * 16 * 5000 <= made.st_size <= 512 * made.st_blocks


def test_visual_codes_are_kept_for_the_same_list_images_sizes_and_weights_alone(folder):
    entries = [{"image": f"{n}.jpg", "caption": "x"} for n in range(4)]
    first = codes_of(folder, entries)
    made = (folder / "cache.npy").stat().st_mtime_ns
    assert (codes_of(folder, entries) == first).all()
    assert (folder / "cache.npy").stat().st_mtime_ns == made
    other = [*entries[:3], {"image": "6.jpg", "caption": "x"}]

    def changed(*arguments, **options) -> np.ndarray:
        """Codes of something else than `entries`, whose codes are in the cache before and after."""
        with pytest.warns(UserWarning, match="making it again"):
            found = codes_of(folder, *arguments, **options)
        with pytest.warns(UserWarning, match="making it again"):
            assert (codes_of(folder, entries) == first).all()
        return found

    twins = [(folder / name).read_bytes() for name in ("3.jpg", "6.jpg")]
    for name, data in zip(("3.jpg", "6.jpg"), twins, strict=True):  # of one size and time
        (folder / name).write_bytes(data.ljust(max(map(len, twins)), b"\0"))
        os.utime(folder / name, (1, 1))
    with pytest.warns(UserWarning, match="making it again"):
        assert (codes_of(folder, entries) == first).all()
    assert (changed(entries[::-1]) == first[::-1]).all()  # another order
    assert (changed(other)[3] != first[3]).any()  # another list of the same length
    assert (changed(entries, MeanTokenizer(0.5)) != first).any()  # other weights
    assert changed(entries, side=16).shape == (4, 64)  # another resolution
    (folder / "1.jpg").write_bytes((folder / "7.jpg").read_bytes())
    with pytest.warns(UserWarning, match="making it again"):  # another image under the same name
        again = codes_of(folder, entries)
    assert (again[1] != first[1]).any() and (again[0] == first[0]).all()


class Interrupted(MeanTokenizer):
    """Ends with an error at the third batch of images; counts the batches."""

    def __init__(self, last: int):
        super().__init__()
        self.last = last
        self.batches = 0

    def codes(self, image):
        self.batches += 1
        if self.batches > self.last:
            raise KeyboardInterrupt
        return super().codes(image)


def test_interrupted_visual_codes_are_computed_on(folder, monkeypatch):
    monkeypatch.setattr(pretrain, "UNSAVED", 1)
    entries = [{"image": f"{n}.jpg", "caption": "x"} for n in range(12)]
    (folder / "list.json").write_text(json.dumps(entries))
    records = Records(folder / "list.json")
    build = PretrainPair(PretrainTransform(64, 32, fixed_geometry=True), folder)
    with pytest.raises(KeyboardInterrupt):  # a grey image, then two batches
        write_codes(folder / "c.npy", records, build, Interrupted(3), batch_size=2)
    assert not (folder / "c.npy").exists()
    second = Interrupted(99)
    write_codes(folder / "c.npy", records, build, second, batch_size=2, workers=2)
    assert second.batches == 1 + 6 - 2
    whole = codes_of(folder, entries)
    assert (CodeCache(folder / "c.npy", 12).codes == whole).all() and len(np.unique(whole)) > 20
    left = [path.name for path in folder.iterdir() if path.name[0] == "." or "lock" in path.name]
    assert left == []


def test_visual_codes_are_kept_where_a_run_is_killed_at_its_end(folder, monkeypatch):
    entries = [{"image": f"{n}.jpg", "caption": "x"} for n in range(12)]
    build = PretrainPair(PretrainTransform(64, 32, fixed_geometry=True), folder)
    given, second = (folder / "c.npy", entries, build), Interrupted(99)

    def killed(*_paths):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pretrain, "replace_synced", killed)
        write_codes(*given, MeanTokenizer())
    write_codes(*given, second)
    assert second.batches == 1  # the grey image


def test_two_runs_that_make_the_same_codes_do_not_meet(folder):
    """The second one begins and ends while the first is at its first batch."""
    entries = [{"image": f"{n}.jpg", "caption": "x"} for n in range(12)]
    (folder / "list.json").write_text(json.dumps(entries))
    records = Records(folder / "list.json")
    build = PretrainPair(PretrainTransform(64, 32, fixed_geometry=True), folder)

    class Overtaken(MeanTokenizer):
        def codes(self, image):
            if len(image) > 1 and not (folder / "c.npy").exists():
                write_codes(folder / "c.npy", records, build, MeanTokenizer(), batch_size=2)
            return super().codes(image)

    write_codes(folder / "c.npy", records, build, Overtaken(), batch_size=2)
    assert (CodeCache(folder / "c.npy", 12).codes == codes_of(folder, entries)).all()
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_visual_codes_without_a_key_are_taken_and_said(folder):
    np.save(folder / "cache.npy", np.zeros((2, 256), dtype=np.int32))
    entries = [{"image": f"{n}.jpg", "caption": "x"} for n in range(2)]
    with pytest.warns(UserWarning, match="without a key"):
        assert (codes_of(folder, entries) == 0).all()


def test_retrieval_batches(folder):
    records = pairs(folder)
    ids = number_images(record["image_id"] for record in records)
    assert (
        ids.tolist() == [n // 2 for n in range(12)] and ids.dtype == torch.int32 and ids.is_shared()
    )
    build = RetrievalPair(TrainTransform(48), folder, ids)
    source = RecordSource(records, build)
    loader = StreamLoader(
        Stream([source], RetrievalCollate(Tokenizer(folder), 30)), 4, 0, error_budget=0.5
    )
    batch = next(loader)
    assert batch["image"].shape == (4, 3, 48, 48) and batch["image_id"].dtype == torch.int64
    assert batch["image_id"].max() < 6 and batch["text_mask"].dtype == torch.bool


ROWS = [
    {"image": "a.jpg", "caption": "x one"},
    {"image": "b.jpg", "caption": "y"},
    {"image": "./a.jpg", "caption": ["x two", "x three"]},
    {"image": "c.jpg", "caption": []},
]


def test_a_row_for_every_caption_counts_the_image_once(tmp_path):
    data = RetrievalSet(ROWS, tmp_path, TestTransform(32))
    assert data.images == ["a.jpg", "b.jpg", "c.jpg"] and len(data) == 3
    assert data.captions == ["x one", "y", "x two", "x three"]
    assert data.txt2img == [0, 1, 0, 0] and data.img2txt == [[0, 2, 3], [1], []]
    assert number_images(row["image"] for row in ROWS).tolist() == [0, 1, 0, 2]


def test_perfect_features_score_perfectly_with_a_row_for_every_caption(tmp_path):
    """R@1 was 20 where the rows of one image counted as five images."""
    rows = [{"image": f"{n // 5}.jpg", "caption": f"{n}"} for n in range(50)]
    data = RetrievalSet(rows, tmp_path, TestTransform(32))
    image, owner = torch.eye(10), torch.tensor(data.txt2img)
    rankings = [
        nearest(*pair, 10, ALONE) for pair in ((image, image[owner]), (image[owner], image))
    ]
    found = recalls(*rankings, owner)
    assert (len(data), found["txt_r1"], found["img_r1"]) == (10, 100.0, 100.0)


def test_a_record_without_usable_caption_is_a_bad_sample(folder):
    build = PretrainPair(PretrainTransform(64), folder)
    for caption in ([], True, {"a": 1}, [None], [["a"], "b"], b""):
        with pytest.raises(BadSample):
            build({"image": "0.jpg", "caption": caption, "index": 4})
    with pytest.raises(BadSample, match=r"x\.tar/1: no caption"):
        build({"image": b"", "key": "x.tar/1"})
    assert captions_of({"caption": [b"a cat"]}) == ["a cat"]
    assert captions_of({"captions/text": [b"a cat", b"une chatte"]}) == ["a cat", "une chatte"]
    assert captions_of({"caption": "x \ud83d"}) == "x \ufffd"


def test_retrieval_evaluation_set(folder):
    pairs_of = RetrievalSet(pairs(folder, ("One!", "a-cat")), folder, TestTransform(32))
    assert len(pairs_of) == 12 and pairs_of.captions[:2] == ["one", "a cat"]
    assert pairs_of.txt2img[:4] == [0, 0, 1, 1] and pairs_of.img2txt[1] == [2, 3]
    assert pairs_of.load(2).shape == (3, 32, 32)
    with pytest.raises(BadSample, match=r"5.jpg"):
        pairs_of.load(5)
