"""scripts/data/pack.py: any annotation file becomes shards that training and evaluation read."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from base.errors import UserError
from dataset.images.decode import decode_image
from dataset.sources.shard_list import samples_of
from dataset.sources.shards import read_shard
from dataset.tasks.record import captions_of
from runtime.config.cli import parse
from scripts.data import pack
from scripts.data.pack import Config
from tests.helpers.images import encoded as encoded_image
from tests.helpers.images import of_colour


def encoded(number, kind="PNG", size=(6, 4)):
    return of_colour((number, 2 * number, 0), size, kind)


@pytest.fixture
def pairs(tmp_path):
    """Seven images of which one is missing and one has no caption."""
    (tmp_path / "images").mkdir()
    rows = ["filepath,title,second,id"]
    for number in range(7):
        if number != 3:
            (tmp_path / f"images/{number}.png").write_bytes(encoded(number))
        text = "\u200b" if number == 5 else f'"caption\n {number}"'
        second = "more" if number == 1 else ""
        rows.append(f"{number}.png,{text},{second},n{number}")
    (tmp_path / "pairs.csv").write_text("\n".join(rows))
    return f"{tmp_path}/pairs.csv?caption=title,second"


def packed(target):
    return [record for shard in sorted(target.glob("*.tar")) for record in read_shard(str(shard))]


def test_shards_hold_what_can_be_packed_and_say_the_rest(tmp_path, pairs, capsys, monkeypatch):
    monkeypatch.setattr(pack, "SHOWN", 1)
    target = tmp_path / "wds"
    config = Config(pairs, tmp_path / "images", target, samples_per_shard=3, workers=2)
    assert pack.pack(config) == {"shards": 3, "kept": 0, "samples": 5, "failed": 2}
    assert "/3.png: No such file" in capsys.readouterr().err
    records = packed(target)
    assert len({record["key"][-9:] for record in records}) == 5, "a key is one of all shards"
    assert [captions_of(record) for record in records] == [
        "caption 0", ["caption 1", "more"], "caption 2", "caption 4", "caption 6"
    ]  # fmt: skip
    assert [json.loads(record["json"])["id"] for record in records] == [
        "n0",
        "n1",
        "n2",
        "n4",
        "n6",
    ]
    for record, number in zip(records, (0, 1, 2, 4, 6), strict=True):
        assert record["image"] == encoded(number) and "png" not in record
    shards = [str(path) for path in sorted(target.glob("*.tar"))]
    assert samples_of(shards) == [3, 1, 1]
    about = json.loads((target / "00001_stats.json").read_text())
    assert about["count"] == 3 and about["failed"] == 2
    assert len(about["errors"]) == 1 and "3.png" in about["errors"][0]


def test_shards_of_the_same_data_are_kept_and_others_are_made_again(tmp_path, pairs, capsys):
    config = Config(pairs, tmp_path / "images", tmp_path / "wds", samples_per_shard=3, workers=1)
    pack.pack(config)
    assert pack.pack(config)["kept"] == 3
    assert "replacing" not in capsys.readouterr().err
    (tmp_path / "wds/00001.tar").unlink()
    first = (tmp_path / "wds/00000.tar").stat().st_mtime_ns
    assert pack.pack(config)["kept"] == 2
    assert (tmp_path / "wds/00000.tar").stat().st_mtime_ns == first
    assert len(packed(tmp_path / "wds")) == 5
    whole = (tmp_path / "wds/00000.tar").read_bytes()
    (tmp_path / "wds/00000.tar").write_bytes(whole[:-1024])  # cut off later, as by a copy
    (tmp_path / "wds/00001_stats.json").write_text('{"successes": 1')
    assert pack.pack(config)["kept"] == 1
    assert (tmp_path / "wds/00000.tar").read_bytes() == whole
    config.resize = 2
    for change in ({}, {"quality": 50}):
        assert pack.pack(replace(config, **change))["kept"] == 0
        assert f"{tmp_path}/wds: 3 shards there are damaged or of other" in capsys.readouterr().err


def test_shards_of_a_larger_packing_are_refused(tmp_path, pairs):
    """Training on the folder would read them along."""
    config = Config(pairs, tmp_path / "images", tmp_path / "wds", samples_per_shard=2, workers=1)
    assert pack.pack(config)["shards"] == 4
    before = {path: path.read_bytes() for path in (tmp_path / "wds").iterdir()}
    with pytest.raises(UserError, match=r"00003\.tar: one of 1 shards .* of 3 shards"):
        pack.pack(replace(config, samples_per_shard=3))
    assert {path: path.read_bytes() for path in (tmp_path / "wds").iterdir()} == before
    (tmp_path / "wds/00003.tar").unlink()
    assert pack.pack(replace(config, samples_per_shard=3))["shards"] == 3
    assert len(packed(tmp_path / "wds")) == 5


def test_tasks_of_a_slurm_array_share_the_shards(tmp_path, pairs, monkeypatch):
    config = Config(pairs, tmp_path / "images", tmp_path / "wds", samples_per_shard=2, workers=1)
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "3")
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "1")
    written = []
    for task in (1, 2, 3):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
        written.append(pack.pack(config)["shards"])
    assert written == [1, 1, 2]
    monkeypatch.setenv("SLURM_ARRAY_TASK_MAX", "5")
    with pytest.raises(UserError, match="has gaps"):
        pack.pack(config)


def test_ranges_make_the_shards_of_one_run_and_the_merge_names_what_is_missing(
    tmp_path, pairs, monkeypatch
):
    monkeypatch.setattr(pack, "SHOWN", 0)  # merged are all that failed

    def config(target, **sharing):
        common = {"samples_per_shard": 2, "workers": 1, "sharing": pack.Sharing(**sharing)}
        return Config(pairs, tmp_path / "images", tmp_path / target, **common)

    pack.pack(config("whole"))
    for number in (0, 2):
        pack.pack(config("parts", range=f"{number}/3"))
    with pytest.raises(UserError, match=r"parts: shards 1 of 0-3 are missing"):
        pack.main(config("parts", merge=True))
    pack.pack(config("parts", range="1/3"))
    merged = pack.merge(config("parts", merge=True))
    assert merged == {"shards": 4, "samples": 5, "failed": 2}
    for number in range(4):
        for name in (f"{number:05d}.tar", f"{number:05d}_stats.json"):
            one, other = tmp_path / "whole" / name, tmp_path / "parts" / name
            assert one.read_bytes() == other.read_bytes(), name


def test_a_shard_that_was_begun_again_does_not_pass_for_the_earlier_one(
    tmp_path, pairs, monkeypatch
):
    config = Config(pairs, tmp_path / "images", tmp_path / "wds", samples_per_shard=9, workers=1)
    pack.pack(config)

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # after the shard was replaced, before its statistics
        patch.setattr(pack, "write_statistics", killed)
        with pytest.raises(KeyboardInterrupt):
            pack.pack(replace(config, resize=2))
    assert pack.pack(config)["kept"] == 0


def test_large_images_are_reduced(tmp_path):
    (tmp_path / "a.jpg").write_bytes(encoded(9, "JPEG", (40, 20)))
    (tmp_path / "b.jpg").write_bytes(encoded(9, "JPEG", (12, 10)))
    (tmp_path / "pairs.json").write_text(
        json.dumps([{"image": f"{n}.jpg", "caption": [" ", n]} for n in "ab"])
    )
    config = Config(str(tmp_path / "pairs.json"), tmp_path, tmp_path / "wds", resize=10, workers=1)
    pack.pack(config)
    large, small = packed(tmp_path / "wds")
    assert decode_image(large["image"]).shape == (3, 10, 20)
    assert small["image"] == (tmp_path / "b.jpg").read_bytes()
    stripes = np.tile(np.uint8([[0], [255]]), (10, 40))
    smaller = pack.reduced(encoded_image(Image.fromarray(stripes), "PNG"), config, "stripes")
    assert 100 < decode_image(smaller).float().mean() < 155, "of all rows"
    rough = replace(config, quality=10)
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3)).astype(np.uint8)
    noise = encoded_image(Image.fromarray(noise), "PNG")
    assert len(pack.reduced(noise, rough, "n")) < 0.9 * len(pack.reduced(noise, config, "n"))
    long = encoded(9, "PNG", (80_000, 11))  # longer than a JPEG can be
    assert pack.reduced(long, config, "long") == long
    cut = encoded(9, "JPEG", (400, 200))
    cut = cut[: len(cut) // 2]  # whole again, training would not count it
    assert pack.reduced(cut, config, "cut") == cut


@pytest.mark.parametrize("resize", [0, 2])
def test_what_training_could_not_read_is_not_packed(tmp_path, resize):
    whole = encoded(9, "PNG", (40, 20))
    (tmp_path / "a.png").write_bytes(whole)
    (tmp_path / "b.png").write_bytes(whole[:50] + b"\0" * 20 + whole[70:])
    rows = [{"image": f"{n}.png", "caption": n} for n in "ab"]
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    sizes = {"resize": resize, "workers": 1}
    done = pack.pack(Config(str(tmp_path / "pairs.json"), tmp_path, tmp_path / "wds", **sizes))
    assert (done["samples"], done["failed"]) == (1, 1)
    about = json.loads((tmp_path / "wds/00000_stats.json").read_text())
    assert about["errors"][0].startswith("b.png: ")


def test_tables_of_encoded_images(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import ipc, parquet

    images = [{"bytes": encoded(n), "path": f"{n}.png"} for n in range(5)]
    table = pyarrow.table({"image": images, "text": [f"caption {n}" for n in range(5)]})
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved/dataset_info.json").write_text("{}")
    with ipc.new_stream(str(tmp_path / "saved/data-00000.arrow"), table.schema) as stream:
        stream.write_table(table, max_chunksize=2)
    img2dataset = pyarrow.table(
        {"jpg": [encoded(n) for n in range(5)], "caption": list("abcde"), "alt": list("vwxyz")}
    )
    parquet.write_table(img2dataset, tmp_path / "i.parquet")
    (tmp_path / "hub").mkdir()
    for start, stop in ((0, 3), (3, 5)):
        parquet.write_table(table[start:stop], tmp_path / f"hub/train-0000{start}-of-00002.parquet")
    for name in ("hub", "saved", "i.parquet?image=jpg"):
        target = tmp_path / f"wds_{name[0]}"
        done = pack.pack(
            Config(str(tmp_path / name), target=target, samples_per_shard=3, workers=2)
        )
        assert done["samples"] == 5, name
        assert [record["image"] for record in packed(target)] == [encoded(n) for n in range(5)]
        assert captions_of(packed(target)[3]) == ("d" if name[0] == "i" else "caption 3")
    fewer = Config(str(tmp_path / "saved"), target=tmp_path / "wds_s", samples_per_shard=4)
    assert pack.pack(replace(fewer, workers=1))["kept"] == 0
    other = Config(f"{tmp_path}/i.parquet?image=jpg&caption=alt", target=tmp_path / "wds_i")
    assert pack.pack(replace(other, samples_per_shard=3, workers=1))["kept"] == 0
    parquet.write_table(img2dataset[:0], tmp_path / "n.parquet")
    with pytest.raises(UserError, match=r"n\.parquet.*: no rows in it"):
        pack.pack(Config(f"{tmp_path}/n.parquet?image=jpg", target=tmp_path / "wds"))


def test_nothing_to_pack_is_refused(tmp_path, pairs):
    with pytest.raises(UserError, match="none of its images can be read below"):
        pack.pack(Config(pairs, tmp_path / "elsewhere", tmp_path / "wds", workers=1))
    with pytest.raises(UserError, match=r"^--target: is needed: folder"):
        parse(Config, ["--data", pairs])
    with pytest.raises(UserError, match=r"^s3://b/t: .*--target"):
        pack.main(Config(pairs, target="s3://b/t"))
    (tmp_path / "wds2").mkdir()
    (tmp_path / "wds2/00009.tar").touch()
    with pytest.raises(UserError, match=r"00009.tar: one of 1 shards"):
        pack.main(Config(pairs, target=tmp_path / "wds2", sharing=pack.Sharing(slurm=2)))


def test_shards_are_made_again_where_an_image_or_its_folder_is_another(tmp_path, pairs):
    config = Config(pairs, tmp_path / "images", tmp_path / "wds", samples_per_shard=3, workers=1)
    pack.pack(config)
    (tmp_path / "images/4.png").write_bytes(encoded(40))
    (tmp_path / "images/3.png").write_bytes(encoded(3))  # was missing
    assert pack.pack(config)["kept"] == 2
    assert pack.merge(config) == {"shards": 3, "samples": 6, "failed": 1}
    assert encoded(40) in [record["image"] for record in packed(tmp_path / "wds")]
    (tmp_path / "others").mkdir()
    for number in range(7):
        (tmp_path / f"others/{number}.png").write_bytes(encoded(100 + number))
    config.image_root = tmp_path / "others"
    assert pack.pack(config)["kept"] == 0
    found = [record["image"] for record in packed(tmp_path / "wds")]
    assert found == [encoded(100 + number) for number in (0, 1, 2, 3, 4, 6)]
