"""A dual encoder out of any kind of checkpoint: the same embeddings as the network that was
stored."""

import argparse
import json

import pytest
import torch

from base.errors import UnfitWeights, UserError
from base.pixels import IMAGENET, OPENAI
from models.dual_encoder.config import DualConfig
from models.dual_encoder.factory import build_dual
from models.dual_encoder.openai import OpenAICLIP
from models.layers.clip_towers import TextShape
from models.layers.openai_towers import OpenAIConfig
from models.weights import clip as adapters
from models.weights.any_dual_encoder import (
    check_clip_described,
    config_of_shapes,
    embedding_model,
    open_dual,
)
from runtime.checkpoint import read_weights
from runtime.config.from_checkpoint import description_of
from tests.helpers.clip_toys import TOY

SMALL = {**TOY, "text_width": 32, "text_heads": 4}
TEXT = TextShape(context_length=12, vocab_size=50, width=64, heads=1, layers=2)


def built(**changes):
    torch.manual_seed(0)
    return build_dual(DualConfig(**{**SMALL, **changes})).eval()


def openai(activation: str = "quick_gelu"):
    torch.manual_seed(0)
    text = TextShape(12, 50, 64, 1, 2, activation)
    config = OpenAIConfig(
        embed_dim=10,
        image_size=16,
        vision_width=64,
        vision_layers=12,
        patch_size=8,
        text=text,
        vision_activation=activation,
    )
    return OpenAICLIP(config).eval()


def same(found, original, size: int | None = None) -> None:
    torch.manual_seed(1)
    size = size or original.config.image_size
    inputs = {
        "embed_image": torch.randn(2, 3, size, size),
        "embed_text": torch.randint(1, 50, (2, 9)),
    }
    for method, value in inputs.items():
        with torch.no_grad():
            expected = getattr(original, method)(value)
            actual = getattr(found.model, method)(value)
        assert actual.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(actual[name], expected[name])


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "CLIP_VITT8_CLIP", "clip_proj_type": "mlp"},
        {"model": "CLIP_VITT8_SIGLIP"},
        {"model": "CLIP_VITT8_SWALIPV1"},
        {"model": "CL2L_VITT8_CL2L", "separate_proj": True},
        {"model": "CL2L_VITT8_BARLIP", "separate_proj_child": True},
        {"model": "CL2L_VITT8_SIAMLIP"},
        {"model": "CL2L_VITT8_SWALIP", "separate_proj": True, "cl2l_img_proj_type": "linear"},
    ],
)
@pytest.mark.parametrize("kind", ["network", "args"])
def test_runs_of_ours_and_of_clip_rocket(changes, kind):
    model = built(**changes)
    about = {kind: {**SMALL, **changes, "epochs": 25, "root": "somewhere"}}
    weights = model.state_dict() | {"momentum_model.logit_scale": torch.ones(())}
    found = open_dual({f"module.{name}": value for name, value in weights.items()}, about)
    assert found.title == changes["model"] and found.pixels == (16, "bilinear", *IMAGENET)
    assert (found.context_length, found.vocab_size) == (12, 50)
    assert not found.model.training
    same(found, model)


def test_heads_of_training_are_left_out():
    assert embedding_model("CL2L_R50_SIAMLIP") == "CL2L_R50_CL2L"
    assert (
        embedding_model("SLIP_VITB16") == "CLIP_VITB16"
        and embedding_model("CLIP_R50_CLIP") == "CLIP_R50_CLIP"
    )
    with pytest.raises(UserError, match="SimCLR has no text encoder"):
        embedding_model("SIMCLR_VITB16")


def test_slip():
    changes = {
        "model": "SLIP_VITS16",
        "text_width": 32,
        "ssl_mlp_dim": 16,
        "ssl_emb_dim": 8,
        "image_size": 32,
    }
    model = built(**changes)
    same(open_dual(model.state_dict(), {"args": {**SMALL, **changes}}), model)
    only = {
        name: value
        for name, value in model.state_dict().items()
        if name.startswith(("visual", "image_mlp"))
    }
    with pytest.raises(UserError, match="SimCLR"):
        open_dual(only, {})


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "CLIP_VITT8_CLIP", "clip_proj_type": "mlp"},
        {"model": "CL2L_VITT8_CL2L", "separate_proj": True, "cl2l_txt_proj_type": "linear"},
        {"model": "CL2L_VITT8_BARLIP"},
    ],
)
def test_bare_weights_need_the_name_alone(changes):
    changes = {**changes, "text_width": 512, "text_heads": 8}
    model = built(**changes)
    with pytest.raises(UserError, match="add --model"):
        open_dual(model.state_dict(), {})
    same(open_dual(model.state_dict(), {}, changes["model"]), model)
    small = built(model="CLIP_VITT8_CLIP").state_dict()
    with pytest.raises(UserError, match="heads of a text transformer of width 32"):
        config_of_shapes(small, "CLIP_VITT8_CLIP")


def test_openais_archive_and_state_dict():
    model = openai()
    weights = {
        name: value.half() if value.ndim > 1 else value
        for name, value in model.state_dict().items()
    }
    halved = adapters.load_openai(weights).eval()
    for given, about in (
        (weights, {"archive": True}),
        (weights | {"input_resolution": torch.tensor(16)}, {}),
    ):
        found = open_dual(given, about)
        assert found.pixels == (16, "bicubic", *OPENAI) and "quick_gelu" in found.title
        same(found, halved)


@pytest.mark.parametrize(
    ("name", "activation"),
    [("ViT-B/32", "quick_gelu"), ("ViT-B-32-quickgelu", "quick_gelu"), ("ViT-B-32", "gelu")],
)
def test_the_activation_is_asked_for(name, activation):
    model = openai(activation)
    with pytest.raises(UserError, match="do not tell their activation: add --model"):
        open_dual(model.state_dict(), {})
    same(open_dual(model.state_dict(), {}, name), model)
    with pytest.raises(UserError, match="another network"):
        open_dual(model.state_dict(), {}, "ViT-L/14")


def test_open_clip_with_its_configuration():
    model = openai("gelu")
    weights = {
        f"text.{n}" if not n.startswith(("visual", "logit")) else n: v
        for n, v in model.state_dict().items()
    }
    about = {
        "open_clip_config.json": {
            "model_cfg": {},
            "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3},
        }
    }
    found = open_dual(weights, about)
    assert found.pixels.mean == (0.5, 0.5, 0.5) and found.pixels.interpolation == "bicubic"
    same(found, model)
    about["open_clip_config.json"]["model_cfg"] = {"vision_cfg": {"head_width": 32}}
    with pytest.raises(UserError, match="heads of 32"):
        open_dual(weights, about)


def test_open_clip_with_a_timm_tower():
    model = built(model="CLIP_VITS32_CLIP", image_size=32, text_activation="gelu")
    weights, settings = adapters.to_open_clip(model), adapters.open_clip_config(model)
    found = open_dual(weights, {"open_clip_config.json": {"model_cfg": settings}})
    assert found.title.startswith("CLIP_VITS32_CLIP") and found.pixels.size == 32
    same(found, model)
    settings["vision_cfg"]["timm_model_name"] = "vit_giant"
    with pytest.raises(UserError, match=r"timm tower vit_giant.*--model CLIP_"):
        open_dual(weights, {"open_clip_config.json": {"model_cfg": settings}})


def test_hugging_face():
    model = openai("gelu")
    about = {"config.json": adapters.hugging_face_config(model.config)}
    about["preprocessor_config.json"] = {
        "image_mean": [0.4] * 3,
        "image_std": [0.2] * 3,
        "resample": 2,
    }
    found = open_dual(adapters.to_hugging_face(model), about)
    assert found.pixels == (16, "bilinear", (0.4,) * 3, (0.2,) * 3)
    same(found, model)
    with pytest.raises(UserError, match=r"without its config\.json"):
        open_dual(adapters.to_hugging_face(model), {})
    bare = {"config.json": about["config.json"]}
    with pytest.raises(UserError, match="do not tell mean and std of their pixels"):
        open_dual(adapters.to_hugging_face(model), bare)
    stated = open_dual(adapters.to_hugging_face(model), bare, mean=(0.5,) * 3, std=(0.3,) * 3)
    assert stated.pixels == (16, "bicubic", (0.5,) * 3, (0.3,) * 3)
    about["config.json"]["vision_config"]["num_attention_heads"] = 4
    with pytest.raises(UserError, match=r"num_attention_heads is 4.*computes 1"):
        open_dual(adapters.to_hugging_face(model), about)


def test_names_and_checkpoints_nobody_knows():
    with pytest.raises(UserError, match="did you mean CL2L_R50_CL2L"):
        open_dual({}, {}, "CL2L_R50_CL2")
    with pytest.raises(UserError, match="did you mean ViT-B-32"):
        open_dual({}, {}, "ViT-B-33")
    with pytest.raises(UserError, match="no known dual encoder; its first keys are a, b"):
        open_dual({"a": torch.ones(1), "b": torch.ones(1)}, {})
    model = built(model="CLIP_VITT8_CLIP")
    with pytest.raises(UserError, match="the checkpoint is a CLIP_VITT8_CLIP"):
        open_dual(
            model.state_dict(),
            {"network": {**SMALL, "model": "CLIP_VITT8_CLIP"}},
            "CL2L_VITT8_CL2L",
        )


def test_what_lies_in_and_beside_a_file(tmp_path):
    model = built(model="CL2L_VITT8_CL2L")
    arguments = argparse.Namespace(**SMALL, model="CL2L_VITT8_CL2L", lr=0.1)
    file = tmp_path / "checkpoint_best.pt"
    torch.save({"state_dict": model.state_dict(), "args": arguments, "epoch": 3}, file)
    about = description_of(file)
    assert about["args"]["model"] == "CL2L_VITT8_CL2L"
    same(open_dual(read_weights(file), about), model)
    (tmp_path / "config.json").write_text(json.dumps({"a": 1}))
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    assert description_of(tmp_path / "bare.pt") == {"config.json": {"a": 1}}
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not valid JSON"):
        description_of(tmp_path / "bare.pt")


def test_align():
    changes = {
        "model": "ALIGN_NANO_TINY",
        "image_size": 32,
        "embed_dim": 12,
        "context_length": 16,
        "vocab_size": 50,
    }
    model = built(**changes)
    with torch.no_grad():
        model(
            image=torch.randn(16, 3, 32, 32), text_ids=torch.randint(1, 50, (16, 9))
        )  # some statistics
    found = open_dual(model.state_dict(), {"network": {**SMALL, **changes}})
    assert found.title == "ALIGN_NANO_TINY" and found.pixels == (32, "bilinear", *((0.5,) * 3,) * 2)
    same(found, model)
    theirs = model.state_dict() | {"text_model.pooler.dense.weight": torch.ones(1)}
    same(open_dual(theirs, {}, "ALIGN_NANO_TINY"), model, size=32)
    same(open_dual(theirs, {}), model, size=32)  # the shapes of the weights tell


def test_aligns_folder_tells_size_and_pixels():
    """As `AlignModel`'s own image processor computes them."""
    transformers = pytest.importorskip("transformers")
    model = built(model="ALIGN_NANO_TINY", image_size=32, embed_dim=12, vocab_size=50)
    about = {
        "config.json": {"vision_config": {"image_size": 600}},
        "preprocessor_config.json": {
            "size": {"height": 57, "width": 57},
            "crop_size": {"height": 48, "width": 48},
            "resample": 2,
            "do_rescale": True,
            "rescale_factor": 1 / 127.5,
            "rescale_offset": True,
            "do_normalize": True,
            "image_mean": [0.1, 0.2, 0.3],
            "image_std": [0.4, 0.5, 0.6],
            "include_top": False,
        },
    }
    found = open_dual(model.state_dict(), about)
    assert found.pixels[:2] == (48, "bilinear")
    grey = torch.full((3, 57, 57), 100, dtype=torch.uint8)
    processor = transformers.EfficientNetImageProcessor(**about["preprocessor_config.json"])
    expected = processor(grey, return_tensors="pt")["pixel_values"][0, :, 0, 0]
    mean, std = torch.tensor(found.pixels.mean), torch.tensor(found.pixels.std)
    torch.testing.assert_close((100 / 255 - mean) / std, expected)
    about["preprocessor_config.json"]["size"] = {"height": 48, "width": 48}
    with pytest.raises(UserError, match=r"size is .*48.* computes .*57.*--model hf/FOLDER"):
        open_dual(model.state_dict(), about)


def test_heads_that_a_configuration_leaves_out_are_transformers_default():
    """8 of a text encoder, of any width; OpenAI's are 64 wide."""
    text = {"hidden_size": 768, "num_attention_heads": 12}
    shape = OpenAIConfig(text=TextShape(width=768, heads=12))
    described = {"model_type": "clip", "text_config": text}
    check_clip_described(described, shape)
    del text["num_attention_heads"]
    with pytest.raises(UserError, match=r"heads is 8.*computes 12"):
        check_clip_described(described, shape)


@pytest.mark.parametrize(
    ("layout", "path", "value", "message"),
    [
        ("align", "config text_config hidden_act", "relu", "hidden_act is 'relu'.*computes 'gelu'"),
        ("align", "config text_config layer_norm_eps", 1e-5, "layer_norm_eps is 1e-05"),
        ("align", "config vision_config batch_norm_eps", 1e-5, "batch_norm_eps is 1e-05"),
        ("align", "config vision_config strides", [1, 2, 2, 2, 1, 1, 1], "strides is"),
        ("align", "preprocessor_config resample", 3, "resample is 3.*computes 2"),
        ("hf", "config model_type", "metaclip_2", "model_type is 'metaclip_2'.*hf/FOLDER"),
        ("hf", "config text_config layer_norm_eps", 1e-6, "layer_norm_eps is 1e-06"),
        ("hf", "config vision_config intermediate_size", 80, "intermediate_size is 80.*hf/FOLDER"),
        ("hf", "config text_config num_attention_heads", 2, "heads is 2.*computes 1"),
        ("hf", "preprocessor_config size", {"height": 16, "width": 16}, "size is .*hf/FOLDER"),
        ("hf", "preprocessor_config resample", 1, "resample is 1.*computes 3.*hf/FOLDER"),
        ("hf", "preprocessor_config do_center_crop", False, "do_center_crop is False"),
        ("open_clip", "open_clip_config model_cfg vision_cfg no_ln_pre", True, "local-dir:FOLDER"),
        ("open_clip", "open_clip_config model_cfg text_cfg norm_kwargs", {"eps": 1e-6}, "1e-06"),
        ("open_clip", "open_clip_config model_cfg text_cfg heads", 2, "width 64 with 2 heads"),
        ("open_clip", "open_clip_config preprocess_cfg resize_mode", "squash", "is 'squash'"),
    ],
)
def test_what_a_folder_states_is_computed_or_refused(layout, path, value, message):
    """Weights of one shape, but another network than ours, or another view of the image."""
    model = openai("gelu")
    weights, about = model.state_dict(), {"open_clip_config.json": {"model_cfg": {}}}
    if layout == "align":
        small = {"image_size": 32, "embed_dim": 12, "vocab_size": 50}
        weights = built(model="ALIGN_NANO_TINY", **small).state_dict()
    if layout == "hf":
        weights = adapters.to_hugging_face(model)
        about = {"config.json": adapters.hugging_face_config(model.config)}
    file, *parts, name = path.split()
    stated = about.setdefault(f"{file}.json", {})
    for part in parts:
        stated = stated.setdefault(part, {})
    stated[name] = value
    with pytest.raises(UserError, match=message):
        open_dual(weights, about)


def test_a_tower_of_transformers_alone_is_no_clip():
    model = openai("gelu")
    weights = adapters.to_hugging_face(model)
    about = {"config.json": adapters.hugging_face_config(model.config)}
    tower = {name: value for name, value in weights.items() if not name.startswith("text_")}
    with pytest.raises(UserError, match=r"no text_projection .*give those of a whole CLIP"):
        open_dual(tower, about)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (
            ["itm_head.weight", "text_encoder.x"],
            "ALBEF, SIMLA or BLIP: evaluate the first two with Retr",
        ),
        (["image_mlp.layer1.weight"], "a SimCLR checkpoint"),
        (["blocks.0.attn.qkv.weight"], "no known dual encoder"),
    ],
)
def test_weights_of_others_are_named(names, words):
    with pytest.raises(UnfitWeights, match=words):  # a script says of which file they are
        open_dual({name: torch.zeros(2, 4) for name in names}, {})
