"""scripts/data/get_stamps.py makes every format of a Debian package of stamps."""

import io
import json
import lzma
import re
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from base.errors import UserError
from dataset.sources.records import Records
from dataset.sources.shard_list import samples_of
from dataset.sources.shards import read_shard
from dataset.tasks.recognition import label_records
from dataset.tasks.record import captions_of
from scripts.data import get_stamps
from tests.helpers.images import encoded


def stamp(seed, kind=None):
    """A PNG on transparent ground, of its own colours."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 4)).astype(np.uint8)
    coarse[..., 3] = 255
    image = Image.new("RGBA", (50, 40))
    image.paste(Image.fromarray(coarse).resize((30, 30), Image.Resampling.BICUBIC), (10, 5))
    return encoded(image)


def package(path, files):
    """A Debian package with data.tar.xz in it."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    parts = {"debian-binary": b"2.0\n", "control.tar": b"odd"}
    return ar_archive(path, parts | {"data.tar.xz": lzma.compress(data.getvalue())})


def ar_archive(path, parts):
    content = b"!<arch>\n"
    for name, part in parts.items():
        content += f"{name:<16}{0:<12}{0:<6}{0:<6}{644:<8}{len(part):<10}`\n".encode()
        content += part + b"\n" * (len(part) % 2)
    path.write_bytes(content)
    return path


@pytest.fixture(scope="module")
def deb(tmp_path_factory):
    files = {get_stamps.COPYRIGHT: b"GPL-2"}
    for n in range(20):
        kind = "animals/birds" if n < 10 else "food"
        files[f"{get_stamps.STAMPS}{kind}/s{chr(97 + n)}.png"] = stamp(n)
        text = f"Thing {chr(97 + n)}.\nde.utf8=Ding {n}.\nfr.utf8=\n"
        files[f"{get_stamps.STAMPS}{kind}/s{chr(97 + n)}.txt"] = text.encode()
    for name, seed in (("animals/birds/sa-1", 50), ("food/o.ther", 3)):  # a name and a look again
        files[f"{get_stamps.STAMPS}{name}.png"] = stamp(seed)
        files[f"{get_stamps.STAMPS}{name}.txt"] = f"About {name}.".encode()
    for name in ("symbols/one", "food/cartoon/two"):
        files[f"{get_stamps.STAMPS}{name}.png"] = stamp(60)
        files[f"{get_stamps.STAMPS}{name}.txt"] = b"Left out."
    files[f"{get_stamps.STAMPS}food/sa_mirror.png"] = stamp(61)  # without a caption
    return package(tmp_path_factory.mktemp("deb") / "stamps.deb", files)


def test_every_format_with_whole_subjects_held_out(deb, tmp_path, capsys):
    stamps = {}
    for fold in range(get_stamps.FOLDS):
        out = tmp_path / str(fold)
        assert get_stamps.main([str(out), "--deb", str(deb), "--fold", str(fold)]) == 0
        rows = {split: list(Records(out / f"pairs_{split}.json")) for split in ("train", "test")}
        names = {split: {row["stamp"] for row in rows[split]} for split in rows}
        assert not names["train"] & names["test"] and len(names["train"] | names["test"]) == 22
        for pair in (
            ("animals/birds/sa", "animals/birds/sa-1"),
            ("animals/birds/sd", "food/o.ther"),
        ):
            assert len({name in names["test"] for name in pair}) == 1, pair
        stamps[fold] = names["test"]
        named = list(label_records(out / "names_train.json"))
        assert [row["image"] for row in named] == [row["image"] for row in rows["train"]]
        assert all(re.fullmatch(r"(thing \w|about .*)", row["labels"][0]) for row in named)
        assert len(rows["train"]) == 5 * len(names["train"])
        shard = str(out / "wds/train/00000.tar")
        packed = [record for record in read_shard(shard) if captions_of(record)]
        assert samples_of([shard]) == [len(rows["train"])] == [len(packed)]
        assert read(out / "wds/train", "00000_stats")["successes"] == len(packed)
        assert {path.name for path in (out / "classes/test").iterdir()} == {"animals", "food"}
        in_classes = [file.name for file in (out / "classes/train").rglob("*.jpg")]
        assert len(in_classes) == len(names["train"]) and all("-white" in n for n in in_classes)
        assert Image.open(out / rows["test"][0]["image"]).size == (256, 256)
    assert sorted(name for names in stamps.values() for name in names) == sorted(
        set().union(*stamps.values())
    )
    assert (
        tmp_path / "0/LICENCE"
    ).read_text() == "GPL-2" and "22 stamps" in capsys.readouterr().out
    assert Image.open(tmp_path / "0/sheet.jpg").size == (20 * 96, 2 * 96)
    assert json.loads((tmp_path / "0/labels.json").read_text())["stamps"][0] == ["an animal"]


@pytest.mark.parametrize(
    ("caption", "name"),
    [
        ("A crow (Corvus), flying.", "crow"),
        ("An albino peahen", "albino peahen"),
        ("Some jalapeño peppers!", "jalapeño peppers"),
        ("The", ""),
    ],
)
def test_what_a_caption_names(caption, name):
    assert get_stamps.subject(caption) == name


@pytest.mark.parametrize(
    ("path", "caption", "names"),
    [
        ("animals/birds/crow", "A hooded crow, flying.", ["hooded crow", "crow", "bird", "animal"]),
        ("food/fruit/plum", "A plum.", ["plum", "fruit", "food"]),
        ("plants/flowers/f1", "A flower.", ["flower", "plant"]),
        ("town/sign", "A sign that tells cars to stop.", []),
    ],
)
def test_the_names_of_an_image(path, caption, names):
    assert get_stamps.names_of(get_stamps.Stamp(path, b"", {"en": caption})) == names


def test_transparent_ground_takes_the_colour():
    image = np.asarray(get_stamps.on_ground(get_stamps.cut_out(stamp(1)), (10, 200, 30)))
    assert image.shape == (256, 256, 3) and (image[0, 0] == (10, 200, 30)).all()
    assert not (image[128, 128] == (10, 200, 30)).all()


def read(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def test_captions_in_chosen_languages(deb, tmp_path):
    for name, languages in (("de", ["de"]), ("both", ["en", "de"])):
        get_stamps.make(tmp_path / name, deb, languages, fold=4)
    german, both = (read(tmp_path / name, "pairs_test") for name in ("de", "both"))
    numbers = [row["stamp"][-1] for row in german]
    assert [row["caption"][0] for row in german] == [f"Ding {ord(n) - 97}." for n in numbers]
    assert {row["stamp"] for row in german} < {row["stamp"] for row in both}
    assert ["Thing n.", "Ding 13."] in [row["caption"] for row in both]
    of_german = read(tmp_path / "both", "pairs_test_de")
    assert [row["caption"] for row in of_german] == [row["caption"][0] for row in german]
    catalog = read(tmp_path / "both", "dataset_catalog")
    assert catalog["captions_de"]["path"] == "pairs_test_de.json" and "captions_fr" not in catalog
    assert set(read(tmp_path / "de", "dataset_catalog")) == {"stamps", "captions"}
    assert not (tmp_path / "de/pairs_test_de.json").exists(), "pairs_test.json is that"
    with pytest.raises(UserError, match="no captions in xx; it has de, en"):
        get_stamps.make(tmp_path / "x", deb, ["xx"], 0)


def test_what_cannot_be_used_is_refused_in_one_sentence(deb, tmp_path, capsys, monkeypatch):
    (tmp_path / "a.deb").write_bytes(b"!<arch>\nnothing")
    cut = deb.read_bytes()[: -deb.stat().st_size // 2]
    (tmp_path / "b.deb").write_bytes(cut)
    ar_archive(tmp_path / "c.deb", {"data.tar": b"no tar"})
    ar_archive(tmp_path / "d.deb", {"data.tar.zst": b"no zstd"})
    for name, said in (
        ("a.deb", "no Debian package"),
        ("b.deb", "damaged"),
        ("c.deb", "damaged"),
        ("d.deb", "damaged" if shutil.which("zstd") else "zstd"),
        ("none.deb", "no Debian package"),
    ):
        assert get_stamps.main([str(tmp_path / "out"), "--deb", str(tmp_path / name)]) == 2
        error = capsys.readouterr().err
        assert name in error and said in error, error
    assert get_stamps.main([str(tmp_path), "--deb", str(deb)]) == 2
    assert "not empty" in capsys.readouterr().err
    monkeypatch.setenv("PATH", str(tmp_path))
    assert get_stamps.main([str(tmp_path / "out"), "--deb", str(tmp_path / "d.deb")]) == 2
    assert "zstd, a program that is not here" in capsys.readouterr().err
    assert get_stamps.main([str(tmp_path / "out")]) == 2
    assert "no apt-get on this machine" in capsys.readouterr().err
