"""Checkpoints of the other systems: names both ways, sizes read off shapes, archives read without
running them."""

import argparse
import json
import pickle
import zipfile

import pytest
import torch

from base.errors import UserError
from base.torch_files import unwrap_names
from models.dual_encoder.config import DualConfig
from models.dual_encoder.factory import build_dual
from models.dual_encoder.openai import OpenAICLIP
from models.layers.clip_towers import TextShape
from models.layers.openai_towers import OpenAIConfig
from models.weights import clip as adapters
from models.weights.any_dual_encoder import check_open_clip_heads
from models.weights.torchscript import is_jit_archive, jit_state_dict
from tests.helpers.clip_toys import toy, toy_batch

TEXT = TextShape(context_length=12, vocab_size=50, width=64, heads=1, layers=2)
VIT = OpenAIConfig(
    embed_dim=10, image_size=16, vision_width=64, vision_layers=2, patch_size=8, text=TEXT
)
RESNET = OpenAIConfig(
    embed_dim=10, image_size=32, vision_width=8, vision_layers=(1, 2, 1, 1), patch_size=0, text=TEXT
)


def model(config=VIT, seed=0):
    torch.manual_seed(seed)
    return OpenAICLIP(config).eval()


def same(ours, theirs, size=16):
    torch.manual_seed(1)
    image, text = torch.randn(3, 3, size, size), toy_batch()["text_ids"][:3, 0]
    with torch.no_grad():
        for name, value in ours(features_only=True, image=image, text_ids=text).items():
            torch.testing.assert_close(
                theirs(features_only=True, image=image, text_ids=text)[name], value
            )


@pytest.mark.parametrize("config", [VIT, RESNET])
def test_openai_round_trip_infers_every_size(config):
    original = model(config)
    state = original.state_dict() | {
        "input_resolution": torch.tensor(16),
        "vocab_size": torch.tensor(50),
    }
    loaded = adapters.load_openai({f"module.{k}": v for k, v in state.items()}).eval()
    assert loaded.config == config
    same(original, loaded, config.image_size)
    assert all(p.requires_grad for p in loaded.parameters())


def test_half_precision_is_cast():
    state = {k: v.half() if v.ndim > 1 else v for k, v in model().state_dict().items()}
    assert {v.dtype for v in adapters.load_openai(state).state_dict().values()} == {torch.float32}


def test_hugging_face_round_trip():
    original = model()
    there = adapters.to_hugging_face(original)
    same(original, adapters.load_openai(adapters.from_hugging_face(there)).eval())
    back = adapters.from_hugging_face(
        there | {"text_model.embeddings.position_ids": torch.arange(12)}
    )
    assert back.keys() == original.state_dict().keys()


def test_hugging_face_lacks_the_rest():
    for other in (model(RESNET), toy("CLIP_VITB16_CLIP")):
        with pytest.raises(UserError, match="open_clip"):
            adapters.to_hugging_face(other)
    with pytest.raises(UserError, match=r"text_model.pooler.weight is no weight"):
        adapters.from_hugging_face({"text_model.pooler.weight": torch.ones(1)})


def test_hugging_face_features():
    transformers = pytest.importorskip("transformers")
    ours = model()
    theirs = transformers.CLIPModel(
        transformers.CLIPConfig.from_dict(adapters.hugging_face_config(VIT))
    ).eval()
    theirs.load_state_dict(adapters.to_hugging_face(ours))
    image, text = torch.randn(3, 3, 16, 16), toy_batch()["text_ids"][:3, 0]

    def features(output):  # newer versions wrap the tensor
        return output if isinstance(output, torch.Tensor) else output.pooler_output

    for direction in (
        ours,
        adapters.load_openai(adapters.from_hugging_face(theirs.state_dict())).eval(),
    ):
        with torch.no_grad():
            expected = features(theirs.get_image_features(image))
            torch.testing.assert_close(
                direction.embed_image(image)["z"], expected, rtol=1e-5, atol=1e-5
            )
            expected = features(theirs.get_text_features(text))
            torch.testing.assert_close(
                direction.embed_text(text)["z"], expected, rtol=1e-5, atol=1e-5
            )


def compare_with_open_clip(ours, theirs, vocab_size=49408, side=224):
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, 3, side, side, generator=generator)
    text = torch.randint(1, vocab_size - 1, (2, 77), generator=generator)
    text[:, 20], text[:, 21:] = vocab_size - 1, 0
    with torch.no_grad():
        expected = theirs.encode_image(image)
        torch.testing.assert_close(ours.embed_image(image)["z"], expected, rtol=1e-5, atol=1e-5)
        expected = theirs.encode_text(text)
        torch.testing.assert_close(ours.embed_text(text)["z"], expected, rtol=1e-5, atol=1e-5)


def test_heads_of_open_clips_vit_h_are_stated():
    """80 wide; open_clip takes 64 where its configuration says nothing."""
    with torch.device("meta"):
        model = OpenAICLIP(OpenAIConfig(vision_width=1280, vision_layers=1))
    settings = adapters.open_clip_config(model)
    check_open_clip_heads(settings, model.config)
    assert settings["vision_cfg"].pop("head_width") == 80
    with pytest.raises(UserError, match="width 1280 with heads of 64"):
        check_open_clip_heads(settings, model.config)


def test_open_clips_own_vit():
    """The smallest of the package's, randomly initialised: the same features, both ways."""
    open_clip = pytest.importorskip("open_clip")
    theirs = open_clip.create_model("ViT-S-32-alt").eval()
    ours = adapters.load_openai(theirs.state_dict(), activation="gelu").eval()
    compare_with_open_clip(ours, theirs)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.mul_(1 + 0.05 * torch.randn_like(parameter))
    theirs.load_state_dict(adapters.to_open_clip(ours))
    compare_with_open_clip(ours, theirs)


@pytest.mark.parametrize(("name", "side"), [("CLIP_VITS16_CLIP", 224), ("CLIP_R50_CLIP", 64)])
def test_our_models_in_open_clip(name, side, tmp_path):
    """SLIP's are in tests/script/test_convert.py."""
    open_clip = pytest.importorskip("open_clip")
    config = DualConfig(model=name, transformer_layers=2, vocab_size=500, image_size=side)
    ours = build_dual(config).eval()
    label = f"quintet-{name.lower()}"
    (tmp_path / f"{label}.json").write_text(json.dumps(adapters.open_clip_config(ours)))
    open_clip.add_model_config(tmp_path)
    theirs = open_clip.create_model(label).eval()
    theirs.load_state_dict(adapters.to_open_clip(ours))
    compare_with_open_clip(ours, theirs, config.vocab_size, side)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(1.05)
    adapters.load_timm_open_clip(ours, theirs.state_dict())
    compare_with_open_clip(ours, theirs, config.vocab_size, side)


def test_open_clip_refusals():
    with pytest.raises(UserError, match="clip_proj_type is mlp"):
        adapters.to_open_clip(toy("CLIP_VITB16_CLIP", clip_proj_type="mlp"))
    with pytest.raises(UserError, match="VITS16MOCO"):
        adapters.open_clip_config(toy("CLIP_VITS16MOCO_CLIP"))
    with pytest.raises(UserError, match="load_timm_open_clip"):
        adapters.load_openai({"visual.trunk.cls_token": torch.ones(1)})


def test_text_tower_prefix_of_open_clip():
    state = model().state_dict()
    prefixed = {
        k if k.startswith(("visual.", "logit")) else f"text.{k}": v for k, v in state.items()
    }
    same(model(), adapters.load_openai(prefixed).eval())


def test_position_embeddings_of_another_size():
    state = adapters.fit_positions(model().state_dict(), 32)
    loaded = adapters.load_openai(state)
    assert loaded.config.image_size == 32
    assert loaded.embed_image(torch.randn(1, 3, 32, 32))["z"].isfinite().all()


def test_faults_list_the_names():
    state = model().state_dict()
    state["visual.extra"] = state.pop("visual.ln_post.bias")
    with pytest.raises(
        UserError, match=r"(?s)missing: visual.ln_post.bias.*unexpected: visual.extra"
    ):
        adapters.load_openai(state)
    with pytest.raises(UserError, match="not of OpenAI's CLIP layout"):
        adapters.load_openai(toy().state_dict())


def test_rocket_checkpoint(tmp_path):
    """The container of the original: wrapped names, a namespace of arguments, a momentum model."""
    original = toy("CL2L_VITB16_SIAMLIP", separate_proj=True)
    wrapped = {f"module.{k}": v for k, v in original.state_dict().items()}
    arguments = argparse.Namespace(
        model="CL2L_VITB16_SIAMLIP", separate_proj=True, embed_dim=12, workers=10, lr=1e-3
    )
    path = tmp_path / "checkpoint.pt"
    torch.save(
        {"state_dict": wrapped, "momentum_state_dict": wrapped, "args": arguments, "epoch": 3}, path
    )
    with torch.serialization.safe_globals([argparse.Namespace]):
        checkpoint = torch.load(path, weights_only=True)
    state = unwrap_names(checkpoint["state_dict"])
    momentum = unwrap_names(checkpoint["momentum_state_dict"])
    toy("CL2L_VITB16_SIAMLIP", separate_proj=True, seed=1).load_state_dict(state)
    assert momentum.keys() == state.keys()
    config = adapters.config_of_arguments(vars(checkpoint["args"]))
    assert (config.model, config.separate_proj, config.embed_dim) == (
        "CL2L_VITB16_SIAMLIP",
        True,
        12,
    )
    assert adapters.config_of_arguments({"model": "SLIP_VITB16"}).embed_dim == 512


def test_init_text_encoder():
    source, target = toy(seed=1), toy(seed=2)
    before = target.token_embedding.weight.clone()
    adapters.load_text_transformer(target, source.state_dict())
    name = "transformer.resblocks.1.mlp.c_fc.weight"
    torch.testing.assert_close(target.get_parameter(name), source.get_parameter(name))
    torch.testing.assert_close(target.token_embedding.weight, before)
    with pytest.raises(UserError, match="transformer"):
        adapters.load_text_transformer(target, {"visual.a": before})


# ---------------------------------------------------------------------------------------------- TorchScript archives


class Traced(torch.nn.Module):
    """OpenAI's release in miniature: half-precision weights beside three scalars."""

    def __init__(self):
        super().__init__()
        self.clip = model().half()
        self.register_buffer("input_resolution", torch.tensor(16))

    def forward(self, x):
        return x * self.input_resolution


@pytest.mark.filterwarnings("ignore")
def test_jit_archive_is_read_without_running_it(tmp_path):
    path = tmp_path / "ViT.pt"
    torch.jit.trace(Traced(), torch.ones(1)).save(str(path))
    assert is_jit_archive(path)
    state = jit_state_dict(path)
    assert state.pop("input_resolution") == 16
    expected = model().half().state_dict()
    assert {k.removeprefix("clip.") for k in state} == expected.keys()
    for name, value in expected.items():
        assert state[f"clip.{name}"].dtype == torch.float16
        torch.testing.assert_close(state[f"clip.{name}"], value)
    same(
        adapters.load_openai(expected).eval(),
        adapters.load_openai({k[5:]: v for k, v in state.items()}).eval(),
    )


class Evil:
    def __reduce__(self):
        return print, ("ran",)


@pytest.mark.parametrize("content", [b"", b"garbage", pickle.dumps(Evil()), pickle.dumps({"a": 1})])
def test_hostile_or_damaged_archives(tmp_path, capsys, content):
    path = tmp_path / "evil.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("evil/data.pkl", content)
        archive.writestr("evil/constants.pkl", b"")
    with pytest.raises(UserError, match=r"evil.pt"):
        jit_state_dict(path)
    assert "ran" not in capsys.readouterr().out
    (tmp_path / "text.pt").write_text("no zip")
    assert not is_jit_archive(tmp_path / "text.pt")
    with pytest.raises(UserError, match=r"text.pt"):
        jit_state_dict(tmp_path / "text.pt")
