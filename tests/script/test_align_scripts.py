"""ALIGN through main.py's real main, the conversion of its weights, and the packing of retrieval
sets."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import main as script
from base.errors import UserError
from dataset.sources.shards import read_shard
from dataset.sources.tfrecord import encode_example, write_records
from dataset.tasks.catalog import Entry, Prompts
from dataset.tasks.zeroshot import open_set
from models.layers.efficientnet import SHAPES, EfficientNet
from runtime.config.cli import parse
from scripts.data import pack_karpathy
from scripts.weights import convert
from tests.helpers.classification_runs import neighbours
from tests.helpers.main_runs import ROOT, arguments, finish
from tests.helpers.runs import lines

CONFIG = ROOT / "configs/main/debug_align.yaml"


def flags(data, output, *more, **changes) -> list[str]:
    shards = changes.pop("shards", data / "tfrecord/train")
    values = {"config": CONFIG, "tokenizer": data / "tokenizer", "shards": shards} | changes
    found = arguments(data, output, *more, **values)
    unused = [found.index(f"--{name}") for name in ("metadata", "root", "bpe-path")]
    return [
        word for place, word in enumerate(found) if place not in unused and place - 1 not in unused
    ]


def run_main(words):
    script.main(parse(script.Config, words))


def test_it_trains_validates_and_evaluates(digitscenes, tmp_path, capsys):
    run_main(flags(digitscenes, tmp_path / "run", epochs="3 steps"))
    written = lines(tmp_path / "run")
    steps = [line for line in written if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3] and [line["lr"] for line in steps] == [
        0,
        0.01,
        0.02,
    ]
    for line in steps:
        assert line["loss"] == pytest.approx(line["clip_loss_image"] + line["clip_loss_text"])
    assert steps[0]["temperature"] == 1 and abs(steps[2]["temperature"] - 1) == pytest.approx(
        0.01, rel=1e-3
    )
    capsys.readouterr()
    weights = tmp_path / "run/model.safetensors"
    run_main(flags(digitscenes, tmp_path / "other", "--evaluate", checkpoint=weights))
    scores = json.loads(capsys.readouterr().out)
    assert scores == {
        name[4:]: value for name, value in written[-1].items() if name.startswith("val_")
    }


def test_a_stopped_run_goes_on_exactly(digitscenes, tmp_path):
    noise = ["--bert-dropout", "0.1", "--drop-connect", "0.2"]
    run_main(flags(digitscenes, tmp_path / "straight", *noise))
    with pytest.raises(SystemExit):
        run_main(flags(digitscenes, tmp_path / "stopped", *noise, max_steps=4))
    run_main(flags(digitscenes, tmp_path / "stopped", *noise))
    assert lines(tmp_path / "stopped") == lines(tmp_path / "straight")
    paths = [tmp_path / name / "checkpoint_00000006.pt" for name in ("straight", "stopped")]
    one, two = (torch.load(path, weights_only=True) for path in paths)
    assert all(torch.equal(value, two["model"][name]) for name, value in one["model"].items())
    moments = [
        state["optimizer"]["state"]["vision_model.embeddings.convolution.weight"]
        for state in (one, two)
    ]
    assert all(
        torch.equal(moments[0][name], moments[1][name])
        for name in ("exp_avg", "exp_avg_sq", "step")
    )


def test_tar_shards_and_the_originals_unrounded_pixels(digitscenes, tmp_path, monkeypatch):
    """The images of the first step; losses of so small a network swing with the last grey level."""
    images = []
    normalized = script.normalized

    def remember(batch, pixels):
        images.append(batch["image"].clone())
        return normalized(batch, pixels)

    monkeypatch.setattr(script, "normalized", remember)
    more = {"shards": digitscenes / "wds/train", "epochs": "1 steps", "val_folder": "none"}
    run_main(flags(digitscenes, tmp_path / "rounded", **more))
    run_main(flags(digitscenes, tmp_path / "exact", "--compat", "original", **more))
    rounded, exact = images
    assert rounded.dtype == torch.uint8 and exact.dtype == torch.float32
    apart = (rounded - exact).abs()
    assert 0 < apart.mean() < 0.5 and apart.max() < 1.001
    assert all("loss" in lines(tmp_path / name)[0] for name in ("rounded", "exact"))


def test_two_processes_are_one(digitscenes, tmp_path):
    """One worker each: of records rank r has every second, so that the virtual batches are the
    same."""
    more = {
        "config": CONFIG,
        "tokenizer": digitscenes / "tokenizer",
        "dataset": "cc3m",
        "val_folder": "none",
    }
    more |= {"overrides": "shards=[]", "workers": 1, "epochs": "3 steps"}
    finish(1, arguments(digitscenes, tmp_path / "one", batch_size=16, **more))
    finish(2, arguments(digitscenes, tmp_path / "two", batch_size=8, **more))
    one, two = (lines(tmp_path / name) for name in ("one", "two"))
    assert [line["lr"] for line in one] == [line["lr"] for line in two]
    for step in (0, 1):  # later ones see float32 rounding that LAMB has made full steps of
        assert one[step]["loss"] == pytest.approx(two[step]["loss"], rel=1e-5)
    assert one[2]["loss"] == pytest.approx(two[2]["loss"], rel=1e-2)


def test_broken_records_are_counted(digitscenes, tmp_path):
    records = list(read_shard(str(next((digitscenes / "tfrecord/train").iterdir()))))[:40]
    examples = [encode_example({"jpg": r["image"], "txt": r["caption"]}) for r in records]
    write_records(tmp_path / "a.tfrecord", examples)
    data = bytearray((tmp_path / "a.tfrecord").read_bytes())
    data[40] ^= 1
    (tmp_path / "a.tfrecord").write_bytes(data)
    more = {"shards": tmp_path / "a.tfrecord", "val_folder": "none"}
    run_main(flags(digitscenes, tmp_path / "patient", error_budget=0.1, **more))
    assert lines(tmp_path / "patient")[-1]["errors"] >= 1
    with pytest.raises(Exception, match=r"record 0.*checksum is wrong") as caught:
        run_main(flags(digitscenes, tmp_path / "strict", **more))
    assert isinstance(caught.value, UserError)


def test_neighbours_of_a_run(digitscenes, tmp_path):
    """Features are kept by weights and by view: another of either is computed again, the same is
    not."""
    run_main(flags(digitscenes, tmp_path / "run", epochs="1 steps", val_folder="none"))
    saved = torch.load(tmp_path / "run/checkpoint_00000001.pt", weights_only=True)
    network = {
        key: saved["config"]["network"][key]
        for key in ("model", "vocab_size", "embed_dim", "context_length")
    }
    state = saved["model"]
    other = state | {"image_projection.bias": state["image_projection.bias"] + 1}
    cache, files = tmp_path / "cache", 0
    for name, weights, side, new in (
        ("a", state, 32, 4),
        ("b", state, 32, 0),
        ("c", state, 48, 4),
        ("d", other, 32, 4),
    ):
        file = tmp_path / f"{name}.pt"
        torch.save({"model": weights, "config": {"network": network | {"image_size": side}}}, file)
        scores = neighbours(
            digitscenes, tmp_path / name, checkpoint=file, cache=cache, features="z", k=1
        )
        assert (
            scores["model"] == network["model"]
            and scores["width"] == 16
            and {"knn1", "probe"} <= scores.keys()
        )
        files += new
        assert len(list(cache.rglob("*.npy"))) == files
    whole = neighbours(digitscenes, tmp_path / "whole", checkpoint=tmp_path / "run", cache=cache)
    assert whole["width"] == EfficientNet(SHAPES["NANO"]).num_features


@pytest.mark.slow
def test_one_command_scores_neighbours_and_retrieval(digitscenes, tmp_path):
    run_main(flags(digitscenes, tmp_path / "run", epochs="1 steps", val_folder="none"))
    command, out = ["bash", str(ROOT / "scripts/evaluate_align.sh")], tmp_path / "scores"
    assert "IMAGENET" in subprocess.run(command, capture_output=True, text=True).stdout
    paths = {
        "IMAGENET": digitscenes / "imagefolder",
        "RETRIEVAL": f"retrieval:{digitscenes}/dataset_digitscenes.json",
    }
    python = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    surroundings = (
        os.environ | {name: str(value) for name, value in paths.items()} | {"PATH": python}
    )
    done = subprocess.run(
        [*command, tmp_path / "run", out], env=surroundings, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    neighbour, retrieved = (
        json.loads((out / name / "result/metrics.json").read_text())
        for name in ("knn", "retrieval")
    )
    assert {"knn1", "knn10"} <= neighbour.keys() and neighbour["width"] == 16
    assert {"txt_r1_z", "img_r1_z"} <= retrieved["results"]["dataset_digitscenes"].keys()


MISTAKES = {
    "unknown model": ({"model": "ALIGN_B3_MINNI"}, "did you mean ALIGN_B3_MINI"),
    "virtual batch": ({"virtual_batch_size": 3}, "make batch_size a multiple of 3"),
    "label smoothing": (
        {"label_smoothing": 1.5},
        "--label-smoothing: expected a finite number >= 0 and <= 1",
    ),
    "image size": ({"image_size": 20}, "give 32 or more"),
    "projection of B7": ({"model": "ALIGN_B7_TINY"}, "set embed_dim to 640"),
    "tokenizer": ({"tokenizer": "no/such/vocab.txt"}, "no/such/vocab.txt"),
    "shards": ({"shards": "no/shards"}, "no/shards"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_clear_message(mistake, digitscenes, tmp_path):
    changes, named = MISTAKES[mistake]
    with pytest.raises(Exception) as caught:
        run_main(flags(digitscenes, tmp_path / "run", **changes))
    assert isinstance(caught.value, UserError), repr(caught.value)
    assert named in str(caught.value)


def test_weights_go_to_transformers_and_back(tmp_path, capsys):
    from models.dual_encoder.config import DualConfig
    from models.dual_encoder.factory import build_dual
    from runtime.checkpoint import export_safetensors, read_weights

    with torch.device("meta"):  # the smallest that transformers can hold has 62 million parameters
        model = build_dual(
            DualConfig(model="ALIGN_B7_TINY", image_size=289, embed_dim=640, vocab_size=40)
        )
    ours = {
        k: torch.full(v.shape, n).to(v.dtype) for n, (k, v) in enumerate(model.state_dict().items())
    }
    export_safetensors(ours, tmp_path / "model.safetensors")
    assert (
        convert.main(["align-to-hf", str(tmp_path / "model.safetensors"), str(tmp_path / "hf")])
        == 0
    )
    from transformers import AlignConfig, AlignModel

    with torch.device("meta"):
        theirs = AlignModel(AlignConfig.from_pretrained(tmp_path / "hf"))
    read = read_weights(tmp_path / "hf/model.safetensors")
    assert {k: v.shape for k, v in read.items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }
    assert all(torch.equal(read[name], value) for name, value in ours.items())
    capsys.readouterr()
    assert convert.main(["align-to-hf", str(tmp_path / "nowhere"), str(tmp_path / "x")]) == 2
    assert convert.main(["align-from-tf", str(tmp_path / "nowhere"), str(tmp_path / "x")]) == 2
    assert "give the prefix of a TensorFlow checkpoint" in capsys.readouterr().err
    (tmp_path / "bad.index").write_bytes(b"x" * 100)
    assert convert.main(["align-from-tf", str(tmp_path / "bad"), str(tmp_path / "x")]) == 2
    assert "no TensorFlow checkpoint" in capsys.readouterr().err


def test_packing_a_retrieval_set(digitscenes, tmp_path, capsys):
    annotations = digitscenes / "dataset_digitscenes.json"
    rows = [r for r in json.loads(annotations.read_text())["images"] if r["split"] == "test"]
    words = [str(annotations), "--images", str(digitscenes), "--out"]
    assert pack_karpathy.main([*words, str(tmp_path / "test.tfrecord")]) == 0
    assert pack_karpathy.main([*words, str(tmp_path / "wds"), "--format", "webdataset"]) == 0
    entry = Entry("packed", "webdataset", str(tmp_path / "wds"))
    opened = open_set(entry, Prompts(), tmp_path / "cache", None)
    assert len(opened.images) == 24 and opened.images.captions[0] == rows[0]["sentences"][0]["raw"]
    records = list(read_shard(str(tmp_path / "test.tfrecord")))
    packed = list(read_shard(str(tmp_path / "wds/test/0.tar")))
    assert len(rows) == len(records) == len(packed) == 24
    for row, record, tar in zip(rows, records, packed, strict=True):
        captions = [sentence["raw"] for sentence in row["sentences"]]
        image = (digitscenes / row["filepath"] / row["filename"]).read_bytes()
        assert record["image"] == tar["image"] == image
        assert (
            [text.decode() for text in record["captions/text"]]
            == captions
            == tar["caption"].split("\n")
        )
        assert record["image/id"] == [row["imgid"]] == [json.loads(tar["json"])["imgid"]]
        assert record["captions/id"] == row["sentids"] and record["image/filename"] == [
            row["filename"].encode()
        ]
    assert pack_karpathy.main([*words, str(tmp_path / "x"), "--split", "tset"]) == 2
    assert (
        pack_karpathy.main([words[0], "--images", str(tmp_path), "--out", str(tmp_path / "x")]) == 2
    )
    errors = capsys.readouterr().err
    assert "use train, restval, val or test" in errors and "set --images" in errors
