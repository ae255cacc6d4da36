"""COYO-ALIGN's recorded data: preprocessing, tokens, records, TensorFlow checkpoints, tables of checkpoint keys."""

import json

import pytest
import torch

from dataset.images.align import AlignView
from dataset.images.decode import decode_image
from dataset.sources.shards import read_shard
from dataset.text.align import AlignTokenizer
from models.dual_encoder.align import Align
from models.dual_encoder.base import DualConfig
from models.weights.align import from_tensorflow_names, to_hugging_face
from scripts.weights import convert
from scripts.weights.tf_checkpoint import SUFFIX, read_checkpoint
from tests.helpers.golden import golden, golden_file


def on_grid(view: torch.Tensor, meta: dict) -> torch.Tensor:
    """Values of [3,H,W] at the recorded rows and columns, [R,C,3]."""
    return view[:, meta["rows"]][:, :, meta["cols"]].permute(1, 2, 0)


def test_evaluation_view():
    meta, t = golden("align", "preprocess")
    image = t["image_u8"].permute(2, 0, 1)
    view = AlignView(289, exact=True)(image)
    torch.testing.assert_close(on_grid(view, meta), t["eval_grid"], rtol=0, atol=5e-3)
    torch.testing.assert_close(view.mean((1, 2)), t["eval_channel_mean"], rtol=0, atol=5e-3)
    rounded = AlignView(289)(image)
    assert rounded.dtype == torch.uint8 and (rounded.float() - view).abs().max() <= 1


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_training_view(monkeypatch, flip):
    meta, t = golden("align", "preprocess")
    monkeypatch.setattr(torch, "randint", lambda high, size: torch.tensor(meta["train_offset_used"]))
    view = AlignView(289, train=True, flip=flip, exact=True)(t["image_u8"].permute(2, 0, 1))
    expected = t["train_crop_flipped_grid" if flip else "train_crop_grid"]
    torch.testing.assert_close(on_grid(view, meta), expected, rtol=0, atol=5e-3)


def test_tokens(tmp_path):
    meta, t = golden("align", "tokenizer")
    (tmp_path / "vocab.txt").write_text("\n".join(meta["vocab"]) + "\n")
    ids = AlignTokenizer(tmp_path / "vocab.txt", meta["seq_length"])(meta["captions"])
    for caption, own, expected in zip(meta["captions"], ids, t["input_ids"].long(), strict=True):
        assert torch.equal(own, expected), caption
    assert torch.equal(ids != 0, t["attention_mask"].bool())


def test_training_records():
    meta, t = golden("align", "train_toy")
    records = list(read_shard(str(golden_file("align", "train_toy.tfrecord")), {}))
    assert [record["caption"] for record in records] == meta["captions"]
    for number, record in enumerate(records):
        difference = decode_image(record["image"]).int() - t[f"image.{number}"].permute(2, 0, 1).int()
        assert difference.abs().max() <= 8


def test_retrieval_records():
    meta, _ = golden("align", "retrieval_toy")
    records = list(read_shard(str(golden_file("align", "retrieval_toy.tfrecord")), {}))
    for record, expected in zip(records, meta["records"], strict=True):
        assert record["image/id"] == [expected["id"]] and record["captions/id"] == expected["caption_ids"]
        assert [text.decode() for text in record["captions/text"]] == expected["captions"]
        assert record["image/filename"] == [expected["filename"].encode()]
        assert list(decode_image(record["image"]).shape[1:]) == expected["hw"]


def test_checkpoint_is_bit_exact():
    _, t = golden("align", "train_steps")
    prefix = golden_file("align", "tf_checkpoint_tiny", "model-weights.index")
    expected = json.loads(golden_file("align", "tf_checkpoint_tiny", "expected.json").read_text())["entries"]
    found = read_checkpoint(str(prefix))
    named = {key.removesuffix(SUFFIX): entry["final_key"] for key, entry in expected.items() if entry["final_key"]}
    assert len(named) > 150
    for key, name in named.items():
        assert torch.equal(found[key][1], t[name]), key


def test_checkpoint_becomes_our_weights(tmp_path):
    from safetensors.torch import load_file

    from tests.golden.align_cases import state_of, tiny_align

    _, t = golden("align", "train_steps")
    prefix = str(golden_file("align", "tf_checkpoint_tiny", "model-weights.index")).removesuffix(".index")
    assert convert.main(["align-from-tf", prefix, str(tmp_path / "align.safetensors")]) == 0
    weights = load_file(tmp_path / "align.safetensors")
    expected = state_of({k: v for k, v in t.items() if "_embeds" not in k}, "final.")
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    counts = {name for name in weights if name.endswith("num_batches_tracked")}
    assert weights.keys() == expected.keys() | counts
    assert tiny_align().state_dict().keys() == {name for name in weights if "pooler" not in name}


@pytest.mark.parametrize("case, model", [("b7_base", "ALIGN_B7_BASE"), ("b3_mini", "ALIGN_B3_MINI")])
def test_key_tables(case, model):
    """Every variable of the published systems has its place, of the same shape, in ours; transformers' names agree."""
    table = json.loads(golden_file("align", f"checkpoint_keys_{case}.json").read_text())
    with torch.device("meta"):
        ours = Align(DualConfig(model=model, image_size=289, embed_dim=640, vocab_size=30522)).state_dict()
        variables, theirs = {}, {}
        for key, name, shape, *hugging_face in table["rows"]:
            tower = key.partition("/")[0]
            name = key if key == "temperature" else f"{tower}/{name}"
            variables[name] = torch.empty(shape)
            theirs |= {name: hugging_face[0]} if hugging_face else {}
        converted = from_tensorflow_names(variables)
    shapes = {name: value.shape for name, value in converted.items() if "pooler" not in name}
    assert shapes == {name: v.shape for name, v in ours.items() if not name.endswith("num_batches_tracked")}
    for name, target in theirs.items():
        assert list(from_tensorflow_names({name: variables[name]}, variables)) == [target]
    if theirs:
        assert to_hugging_face(ours).keys() == {*theirs.values()} | {k for k in ours if k.endswith("_tracked")}
