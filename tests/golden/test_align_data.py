"""COYO-ALIGN's recorded data: preprocessing, tokens, records, TensorFlow checkpoints, tables of
checkpoint keys."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from base.distributed import World
from dataset.images.align import AlignView
from dataset.images.decode import decode_image
from dataset.sources.shards import read_shard
from dataset.text.align import AlignTokenizer
from evaluation.zeroshot import retrieve
from models.dual_encoder.align import Align
from models.dual_encoder.config import DualConfig
from models.weights.align import from_tensorflow_names, to_hugging_face
from scripts.weights import convert as convert
from scripts.weights.tf_checkpoint import SUFFIX, read_checkpoint
from tests.golden.align_cases import state_of, tiny_align
from tests.golden.report import compare, record, same
from tests.helpers.golden import golden, golden_file, golden_json

PIXELS = 2e-5  # of 255 grey levels: TensorFlow interpolates in float32


def on_grid(view: torch.Tensor, meta: dict) -> torch.Tensor:
    """Values of [3,H,W] at the recorded rows and columns, [R,C,3]."""
    return view[:, meta["rows"]][:, :, meta["cols"]].permute(1, 2, 0)


def view_of(meta: dict, **options) -> AlignView:
    """The view whose middle begins at the recorded offset; 289 pixels out of 346, as published."""
    view = AlignView(289, exact=True, **options)
    assert [(view.large - view.side) // 2] * 2 == meta["eval_offset"]
    return view


def test_evaluation_view():
    meta, t = golden("align", "preprocess")
    image = t["image_u8"].permute(2, 0, 1)
    same("align preprocess", "size of the image", list(image.shape[1:]), meta["image_hw"])
    view = view_of(meta)(image)
    compare("align preprocess", "evaluation view", on_grid(view, meta), t["eval_grid"], PIXELS)
    compare("align preprocess", "channel means", view.mean((1, 2)), t["eval_channel_mean"], PIXELS)
    spread = view.std((1, 2), correction=0)
    compare("align preprocess", "channel std", spread, t["eval_channel_std"], PIXELS)
    rounded = AlignView(289)(image)
    assert rounded.dtype == torch.uint8 and (rounded.float() - view).abs().max() <= 1


def test_whole_image_before_the_crop():
    meta, t = golden("align", "preprocess")
    view = view_of(meta)
    view.side = view.large
    whole = view(t["image_u8"].permute(2, 0, 1))
    rows, cols = ([*meta[name], meta["resized_grid_extra"]] for name in ("rows", "cols"))
    ours = on_grid(whole, {"rows": rows, "cols": cols})
    compare("align preprocess", "resized image", ours, t["resized_grid"], PIXELS)


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_training_view(monkeypatch, flip):
    meta, t = golden("align", "preprocess")
    monkeypatch.setattr(
        torch, "randint", lambda high, size: torch.tensor(meta["train_offset_used"])
    )
    view = view_of(meta, train=True, flip=flip)(t["image_u8"].permute(2, 0, 1))
    expected = t["train_crop_flipped_grid" if flip else "train_crop_grid"]
    compare("align preprocess", "training view", on_grid(view, meta), expected, PIXELS)


def test_tokens(tmp_path):
    meta, t = golden("align", "tokenizer")
    (tmp_path / "vocab.txt").write_text("\n".join(meta["vocab"]) + "\n")
    tokenizer = AlignTokenizer(tmp_path / "vocab.txt", meta["seq_length"])
    ids = tokenizer(meta["captions"])
    for own, expected in zip(ids, t["input_ids"].long(), strict=True):
        same("align tokenizer", "token ids", own, expected)
    same("align tokenizer", "mask", ids != 0, t["attention_mask"].bool())
    assert not t["token_type_ids"].any()  # which our text tower takes for granted
    special = [tokenizer.pieces.pad_id, tokenizer.pieces.cls_id, tokenizer.pieces.sep_id]
    same("align tokenizer", "special ids", special, [meta[name] for name in ("pad", "cls", "sep")])
    same("align tokenizer", "unknown", tokenizer.pieces.backend.token_to_id("[UNK]"), meta["unk"])


def test_training_records():
    meta, t = golden("align", "train_toy")
    samples = list(read_shard(str(golden_file("align", "train_toy.tfrecord"))))
    same("align records", "captions", [sample["caption"] for sample in samples], meta["captions"])
    for number, sample in enumerate(samples):
        compare_jpeg("training images", decode_image(sample["image"]), t[f"image.{number}"])


def compare_jpeg(quantity: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """uint8 [3,H,W] against [H,W,3] of TensorFlow's fast integer DCT: a few grey levels apart."""
    difference = ours.int() - theirs.permute(2, 0, 1).int()
    record("align records", quantity, float(difference.abs().max()) / 255)
    assert difference.abs().max() <= 8 and difference.float().mean().abs() < 1.5


def test_retrieval_records():
    meta, t = golden("align", "retrieval_toy")
    records = list(read_shard(str(golden_file("align", "retrieval_toy.tfrecord"))))
    for number, (found, expected) in enumerate(zip(records, meta["records"], strict=True)):
        same("align records", "image id", found["image/id"], [expected["id"]])
        same("align records", "caption ids", found["captions/id"], expected["caption_ids"])
        same(
            "align records",
            "captions",
            [text.decode() for text in found["captions/text"]],
            expected["captions"],
        )
        same("align records", "file name", found["image/filename"], [expected["filename"].encode()])
        image = decode_image(found["image"])
        same("align records", "size of the image", list(image.shape[1:]), expected["hw"])
        compare_jpeg("evaluation images", image, t[f"image.{number}"])
        kinds = {"int64_list": int, "bytes_list": bytes}
        for name, kind in meta["feature_kinds"].items():
            given = found[name] if isinstance(found[name], list) else [found[name]]
            assert all(isinstance(value, kinds[kind]) for value in given), name


def test_retrieval_recalls():
    meta, t = golden("align", "retrieval")
    image, text = F.normalize(t["image_embeds"], dim=1), F.normalize(t["text_embeds"], dim=1)
    compare("align retrieval", "similarity", image @ text.T, t["similarity"], 1e-5)
    places = {number: place for place, number in enumerate(t["image_ids"].tolist())}
    owner = torch.tensor([places[number] for number in t["text_image_ids"].tolist()])
    same("align retrieval", "captions of an image", owner.bincount(), t["captions_per_image"])
    same("align retrieval", "sizes", [len(image), len(text)], [meta["images"], meta["captions"]])
    found = retrieve({"z": image}, {"z": text}, owner, World(0, 1, 0, torch.device("cpu")))
    compared = 0
    for direction, ours in (("I2T", "txt"), ("T2I", "img")):
        for name, printed in meta["recalls"][direction].items():
            score = found[f"{ours}_r{name.removeprefix('R@')}_z"]
            same("align retrieval", "recalls", f"{score:.3f}", printed)
            compared += 1
    assert compared


def test_checkpoint_is_bit_exact():
    _, t = golden("align", "train_steps")
    prefix = golden_file("align", "tf_checkpoint_tiny", "model-weights.index")
    expected = golden_json("align", "tf_checkpoint_tiny", "expected.json")["entries"]
    found = read_checkpoint(str(prefix))
    variables = {key for key in t if key.startswith("final.") and not key.endswith("_embeds")}
    same(
        "align checkpoint",
        "variables",
        {entry["final_key"] for entry in expected.values()} - {None},
        variables,
    )
    for key, entry in expected.items():
        if entry["final_key"]:
            value = found[key.removesuffix(SUFFIX)][1]
            same("align checkpoint", "shapes", list(value.shape), entry["shape"])
            same("align checkpoint", "values", value, t[entry["final_key"]])


def test_checkpoint_becomes_our_weights(tmp_path):
    _, t = golden("align", "train_steps")
    prefix = str(golden_file("align", "tf_checkpoint_tiny", "model-weights.index")).removesuffix(
        ".index"
    )
    assert convert.main(["align-from-tf", prefix, str(tmp_path / "align.safetensors")]) == 0
    weights = load_file(tmp_path / "align.safetensors")
    expected = state_of({k: v for k, v in t.items() if "_embeds" not in k}, "final.")
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    counts = {name for name in weights if name.endswith("num_batches_tracked")}
    assert weights.keys() == expected.keys() | counts
    embed_dim = t["final.eval_image_embeds"].shape[1]
    assert tiny_align(embed_dim).state_dict().keys() == {
        name for name in weights if "pooler" not in name
    }


@pytest.mark.parametrize(
    "case, model", [("b7_base", "ALIGN_B7_BASE"), ("b3_mini", "ALIGN_B3_MINI")]
)
def test_key_tables(case, model):
    """Every variable of the published systems has its place, of the same shape, in ours;
    transformers' names agree."""
    table = golden_json("align", f"checkpoint_keys_{case}.json")
    with torch.device("meta"):
        ours = Align(
            DualConfig(model=model, image_size=289, embed_dim=640, vocab_size=30522)
        ).state_dict()
        variables, theirs = {}, {}
        for key, name, shape, *hugging_face in table["rows"]:
            tower = key.partition("/")[0]
            name = key if key == "temperature" else f"{tower}/{name}"
            variables[name] = torch.empty(shape)
            theirs |= {name: hugging_face[0]} if hugging_face else {}
        converted = from_tensorflow_names(variables)
    shapes = {name: value.shape for name, value in converted.items() if "pooler" not in name}
    assert shapes == {
        name: v.shape for name, v in ours.items() if not name.endswith("num_batches_tracked")
    }
    for name, target in theirs.items():
        assert list(from_tensorflow_names({name: variables[name]}, variables)) == [target]
    counts = table["counts"]
    sizes = {name: value.numel() for name, value in converted.items()}
    statistics = sum(size for name, size in sizes.items() if "running_" in name)
    text = sum(size for name, size in sizes.items() if name.startswith("text_"))
    (image,) = (value for name, value in counts.items() if name.startswith("image_params"))
    same("align keys", "statistics", statistics, counts["image_bn_statistics"])
    same("align keys", "text parameters", text, counts["text_params"])
    rest = {
        name: size
        for name, size in sizes.items()
        if "running_" not in name and not name.startswith("text_")
    }
    rest.pop("temperature")
    same("align keys", "image parameters", sum(rest.values()), image)
    for key, name, shape in table.get("projection", ()):
        assert [key, name, shape] in [row[:3] for row in table["rows"]]
    if theirs:
        assert to_hugging_face(ours).keys() == {*theirs.values()} | {
            k for k in ours if k.endswith("_tracked")
        }
