"""scripts/embed.py: embeddings in clip-retrieval's layout, the same on any number of processes."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from base.errors import UserError
from base.names import name_of
from base.writing import write_json
from dataset.images.decode import decode_image
from dataset.sources.tar_writer import write_shard
from models.dual_encoder.config import DualConfig
from models.dual_encoder.factory import build_dual
from runtime.checkpoint import export_safetensors
from runtime.config.cli import parse
from scripts import embed as script
from tests.helpers.processes import run_script

SHAPE = {"image_size": 32, "embed_dim": 16, "text_width": 32, "text_heads": 2, "context_length": 16}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A run's folder with an untrained CLIP."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    config = DualConfig(model="CLIP_VITT8_CLIP", transformer_layers=1, **SHAPE)
    export_safetensors(build_dual(config).state_dict(), folder / "model.safetensors")
    write_json(folder / "config.yaml", {"network": asdict(config)})  # JSON is YAML
    return folder


@pytest.fixture
def images(tmp_path):
    """Seven images of 32 x 32 with captions, in a list and in two shards."""
    random = np.random.default_rng(0)
    rows = []
    for n in range(7):
        pixels = random.integers(0, 256, (32, 32, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{n}.png")
        rows.append({"image": f"{n}.png", "caption": [f"number {n}", "another"]})
    write_json(tmp_path / "pairs.json", rows)
    for shard, numbers in enumerate((range(4), range(4, 7))):
        samples = [
            (str(n), {"png": (tmp_path / f"{n}.png").read_bytes(), "txt": f"number {n}".encode()})
            for n in numbers
        ]
        write_shard(tmp_path / f"{shard:05d}.tar", samples)
    return tmp_path


def run(*words):
    script.main(parse(script.Config, [*map(str, words), "--device", "cpu", "--workers", "0"]))


def test_a_missing_checkpoint_is_named_before_a_job_is_submitted(images, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "submit_array", lambda *_: pytest.fail("submitted"))
    with pytest.raises(UserError, match="gone: no such checkpoint"):
        run("--data", images / "pairs.json", "--checkpoint", tmp_path / "gone", "--slurm", 2)


def test_what_stands_beside_an_embedding(tmp_path):
    assert script.first_caption({"caption": [" ", "\u200b", "x", "y"]}) == "x"
    assert script.first_caption({"caption": [" "]}) == script.first_caption({"key": "0"}) == ""
    assert script.image_path({"image": "a.jpg", "url": "http://x/b.jpg"}, Path("r")) == "r/a.jpg"
    table = {"image": b"...", "key": "k", "url": "http://x/b.jpg"}
    assert script.image_path(table, Path("r")) == "http://x/b.jpg"
    assert script.image_path(table | {"url": None}, Path("r")) == name_of(table)
    assert script.part_names(2) == ["0000", "0001"] and script.part_names(10_000)[-1] == "9999"
    assert script.part_names(10_001)[-1] == "10000"
    found = {"z": torch.ones(1), "h": torch.zeros(1)}
    assert script.choose(found, "h") is found["h"]
    assert script.choose({"feats": found["z"]}, "z") is found["z"]
    with pytest.raises(UserError, match="--score feats: the network has z, h"):
        script.choose(found, "feats")
    rows = [{"image": f"{n}.png", "caption": "a"} for n in range(7)]
    write_json(tmp_path / "p.json", rows)
    cuts = [(part.start, part.stop) for part in script.parts_of(str(tmp_path / "p.json"), 3)]
    assert cuts == [(0, 3), (3, 6), (6, 7)]
    write_shard(tmp_path / "0.tar", [("0", {"png": b"x", "txt": b"a", "alt": b"b"})])
    addresses = (f"{tmp_path}/0.tar", f"{tmp_path}/0.tar?caption=alt")
    one, other = (script.identity(script.Part(each, None), tmp_path) for each in addresses)
    assert one != other
    (tmp_path / "out/parts").mkdir(parents=True)
    (tmp_path / "out/parts/0002.json").touch()
    config = script.Config(data=[str(tmp_path / "p.json")], out=tmp_path / "out", part=4)
    with pytest.raises(
        UserError, match="holds part 0002, but this data has the parts 0000 to 0001"
    ):
        script.all_parts(config)


def rows(folder, kind):
    return np.concatenate([np.load(path) for path in sorted((folder / kind).glob("*.npy"))])


def test_embeddings_are_the_networks_and_parts_are_kept(checkpoint, images, tmp_path, capsys):
    from pyarrow import parquet

    out = tmp_path / "out"
    words = ("--data", images / "pairs.json", "--root", images, "--checkpoint", checkpoint)
    run(*words, "--out", out, "--part", 4, "--half", "false", "--batch_size", 3)
    opened = script.eval_zeroshot.open_encoder(
        script.eval_zeroshot.Config(checkpoint=checkpoint / "model.safetensors", device="cpu"),
        script.distributed.init("cpu"),
    ).opened
    pixels = torch.stack([decode_image(images / f"{n}.png") for n in range(7)])
    statistics = script.pixel_statistics(torch.device("cpu"), opened.pixels.mean, opened.pixels.std)
    with torch.no_grad():
        image = opened.model.embed_image(script.normalize(pixels, statistics))["z"]
        text = opened.model.embed_text(opened.tokenize([f"number {n}" for n in range(7)]))["z"]
    for found, expected in ((rows(out, "img_emb"), image), (rows(out, "text_emb"), text)):
        torch.testing.assert_close(torch.from_numpy(found), F.normalize(expected, dim=-1))
    about = parquet.read_table(out / "metadata/metadata_0001.parquet").to_pydict()
    assert about["caption"] == ["number 4", "number 5", "number 6"] and all(about["readable"])
    assert about["key"] == ["4.png", "5.png", "6.png"]
    of_class_folder = {"image": images / "5.png", "label": 0}
    assert script.image_path(of_class_folder, Path()) == name_of(of_class_folder)
    assert name_of(of_class_folder) == str(images / "5.png")
    capsys.readouterr()
    run(*words, "--out", out, "--part", 4, "--half", "false", "--batch_size", 3)
    assert "2 parts, 2 of them kept" in capsys.readouterr().out
    Image.new("RGB", (32, 32)).save(images / "5.png")
    run(*words, "--out", out, "--part", 4, "--half", "false", "--batch_size", 3)
    assert "2 parts, 1 of them kept" in capsys.readouterr().out
    whole = {file: file.read_bytes() for file in out.rglob("*_0000.npy")}
    cut, gone = whole
    cut.write_bytes(whole[cut][:-4])
    run(*words, "--out", out, "--part", 4, "--half", "false", "--batch_size", 3)
    assert "2 parts, 1 of them kept" in capsys.readouterr().out
    gone.unlink()
    (out / "parts/0001.json").write_text("{")
    run(*words, "--out", out, "--part", 4, "--half", "false", "--batch_size", 3)
    assert "2 parts, 0 of them kept" in capsys.readouterr().out
    assert {file: file.read_bytes() for file in whole} == whole


def test_other_pixels_are_other_embeddings(tmp_path):
    """What states them lies beside the weights, and may change alone."""
    from base.distributed import ALONE
    from tests.script.test_convert import VIT, openai_files

    files = openai_files(tmp_path / "files", VIT)
    config = script.Config(data=["x"], checkpoint=files)
    before = script.dual_embedder(config, ALONE).signature
    assert script.dual_embedder(config, ALONE).signature == before
    about = json.loads((files / "open_clip_config.json").read_text())
    for name, value in (("mean", [0.5, 0.5, 0.5]), ("interpolation", "bilinear")):
        changed = about | {"preprocess_cfg": about["preprocess_cfg"] | {name: value}}
        (files / "open_clip_config.json").write_text(json.dumps(changed))
        assert script.dual_embedder(config, ALONE).signature != before


def test_another_precision_is_other_features(tmp_path):
    """By the signature alone the demo knows whether its index is of them."""
    from base.distributed import ALONE

    words = {"data": ["x"], "model": "timm/test_vit", "random_weights": True, "texts": False}
    found = [
        script.image_embedder(script.Config(**words, precision=precision), ALONE).signature
        for precision in ("fp32", "bf16", "fp32")
    ]
    assert found[0] == found[2] != found[1]


def test_shards_and_two_processes_give_the_same(checkpoint, images, tmp_path):
    words = ["--data", images / "{00000..00001}.tar", "--checkpoint", checkpoint, "--batch_size", 2]
    words += ["--half", "false"]
    run(*words, "--out", tmp_path / "one")
    flags = [*words, "--out", tmp_path / "two", "--device", "cpu", "--workers", "0"]
    run_script("scripts/embed.py", flags, processes=2)
    for kind in ("img_emb", "text_emb"):
        one, two = rows(tmp_path / "one", kind), rows(tmp_path / "two", kind)
        assert one.dtype == np.float32 and one.shape == (7, 16) and (one == two).all()
    assert json.loads((tmp_path / "one/parts/0001.json").read_text())["samples"] == 3


def test_ranges_merge_into_the_files_of_one_run_as_clip_retrieval_reads_them(
    checkpoint, images, tmp_path, capsys
):
    from pyarrow import parquet

    data = [images / "{00000..00001}.tar", images / "pairs.json"]
    words = ["--data", *data, "--root", images, "--checkpoint", checkpoint, "--part", 3]
    run(*words, "--out", tmp_path / "whole")
    run(*words, "--out", tmp_path / "parts", "--range", "0/2")
    with pytest.raises(UserError, match=r"parts: parts 2-4 of 0-4 are missing"):
        run(*words, "--out", tmp_path / "parts", "--merge")
    run(*words, "--out", tmp_path / "parts", "--range", "1/2")
    capsys.readouterr()
    run(*words, "--out", tmp_path / "parts", "--merge")
    assert "5 parts are whole, 14 samples" in capsys.readouterr().out
    folders = ("img_emb", "text_emb", "metadata", "parts")
    for folder in folders:
        whole = sorted((tmp_path / "whole" / folder).iterdir())
        parts = sorted((tmp_path / "parts" / folder).iterdir())
        assert [file.name for file in whole] == [file.name for file in parts] and len(whole) == 5
        for one, other in zip(whole, parts, strict=True):
            assert one.read_bytes() == other.read_bytes(), one
    # clip-retrieval pairs the files of both folders in alphabetical order, row by row
    tables = [parquet.read_table(file) for file in sorted((tmp_path / "whole/metadata").iterdir())]
    arrays = [np.load(file) for file in sorted((tmp_path / "whole/img_emb").iterdir())]
    assert [len(table) for table in tables] == [len(rows) for rows in arrays] == [4, 3, 3, 3, 1]
    assert {"image_path", "caption"} <= set(tables[0].column_names)
    assert tables[2]["image_path"].to_pylist() == [str(images / f"{n}.png") for n in range(3)]
    assert script.part_names(10_001)[9999:] == ["09999", "10000"]
    with pytest.raises(
        UserError, match=r"holds part 0002, but this data has the parts 0000 to 0001"
    ):
        run("--data", data[0], "--checkpoint", checkpoint, "--out", tmp_path / "whole")


def test_an_unreadable_image_is_flagged_within_the_budget(checkpoint, images, tmp_path):
    from pyarrow import parquet

    (images / "2.png").write_bytes(b"no image")
    words = ("--data", images / "pairs.json", "--root", images, "--checkpoint", checkpoint)
    with pytest.raises(UserError, match=r"1 of 7 images are unreadable, such as 2.png"):
        run(*words, "--out", tmp_path / "out")
    run(*words, "--out", tmp_path / "out", "--error_budget", 0.2)
    about = parquet.read_table(tmp_path / "out/metadata/metadata_0000.parquet").to_pydict()
    assert about["readable"] == [n != 2 for n in range(7)]


def test_samples_of_a_shard_without_an_image_are_within_the_budget(checkpoint, images, tmp_path):
    """One whose image holds no bytes is an unreadable one, as an empty file is; one that has no
    such member is left out."""
    from pyarrow import parquet

    samples = [(str(n), {"png": (images / f"{n}.png").read_bytes(), "txt": b"x"}) for n in range(3)]
    samples[1][1]["png"] = b""
    del samples[2][1]["png"]
    write_shard(tmp_path / "odd.tar", samples)
    words = ("--data", tmp_path / "odd.tar", "--checkpoint", checkpoint, "--out", tmp_path / "out")
    with pytest.raises(UserError, match="1 of 3 samples are unusable"):
        run(*words)
    with pytest.raises(UserError, match=r"1 of 2 images are unreadable, such as .*odd\.tar/1"):
        run(*words, "--error_budget", 0.4)
    run(*words, "--error_budget", 0.5)
    about = parquet.read_table(tmp_path / "out/metadata/metadata_0000.parquet").to_pydict()
    assert about["readable"] == [True, False]
    write_shard(tmp_path / "none.tar", samples[2:])
    with pytest.raises(
        UserError, match=r"none\.tar: no sample is usable, such as .*none\.tar/2: no image"
    ):
        run("--data", tmp_path / "none.tar", *words[2:], "--error_budget", 1)


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_numbers_beyond_float16_are_refused(tmp_path):
    found = {"image": torch.full((1, 2), 7e4), "metadata": {"key": ["0"]}}
    half, whole = (
        parse(script.Config, ["--data", "x", "--out", str(tmp_path), "--half", answer])
        for answer in ("yes", "no")
    )
    with pytest.raises(UserError, match="float16 does not hold; add --half no"):
        script.write_part("0000", found, half, "key")
    assert not script.is_written("0000", "key", half)
    script.write_part("0000", found, whole, "key")
    assert (rows(tmp_path, "img_emb") == 7e4).all() and script.is_written("0000", "key", whole)


def test_features_of_an_image_encoder(images, tmp_path):
    import timm

    words = ("--data", images / "pairs.json", "--root", images, "--texts", "false")
    run(*words, "--model", "timm/test_vit", "--random_weights", "--out", tmp_path / "out")
    found = rows(tmp_path / "out", "img_emb")
    assert found.shape == (7, timm.create_model("test_vit").num_features)
    assert not (tmp_path / "out/text_emb").exists()
    with pytest.raises(UserError, match="--data: is needed: shards"):
        run("--model", "timm/test_vit")
