"""main.py starts from OpenAI's, open_clip's and Hugging Face's files, and names those that do not
fit."""

import json
from dataclasses import replace

import pytest
import torch

from base.errors import UserError
from base.pixels import IMAGENET
from models.dual_encoder.config import DualConfig
from models.dual_encoder.factory import build_dual, openai_shape, parts_of
from models.dual_encoder.openai import OpenAICLIP
from models.layers import openai_towers
from models.layers.clip_towers import TextShape
from models.layers.openai_towers import OpenAIConfig
from models.weights import clip
from models.weights.start_dual import load_any_layout, start_dual
from runtime.checkpoint import export_safetensors, read_weights
from runtime.config.from_checkpoint import description_of
from tests.helpers.clip_toys import toy

TEXT = TextShape(width=64, heads=1, layers=2)
SIZES = {"image_size": 32, "context_length": 12, "vocab_size": 50}


@pytest.fixture(autouse=True)
def small_models(monkeypatch):
    """Two models of OpenAI's kind that no name stands for otherwise."""
    vit = OpenAIConfig(embed_dim=10, vision_width=64, vision_layers=2, patch_size=8, text=TEXT)
    resnet = replace(vit, vision_width=8, vision_layers=(1, 1, 1, 1), patch_size=0)
    monkeypatch.setitem(openai_towers.OPENAI_MODELS, "ViT-S-8", vit)
    monkeypatch.setitem(openai_towers.OPENAI_MODELS, "RN5", resnet)


def build(name: str, **changes) -> OpenAICLIP:
    return build_dual(DualConfig(model=name, **(SIZES | changes))).eval()


def published(name: str) -> OpenAICLIP:
    torch.manual_seed(0)
    return build(name)


@pytest.mark.parametrize("name", ["ViT-S-8", "ViT-S/8", "RN5"])
@pytest.mark.parametrize("layout", ["openai", "open_clip", "hf"])
def test_every_layout(name, layout, tmp_path):
    theirs = published(name)
    state = theirs.state_dict()
    if layout == "open_clip":  # its models of two parts
        text = ("transformer.", "token_emb", "positional", "ln_final", "text_projection")
        state = {f"text.{k}" if k.startswith(text) else k: v for k, v in state.items()}
    if layout == "hf":
        if name == "RN5":
            return
        state = clip.to_hugging_face(theirs)
        (tmp_path / "config.json").write_text(json.dumps(clip.hugging_face_config(theirs.config)))
    export_safetensors({k: v.half() for k, v in state.items()}, tmp_path / "model.safetensors")
    ours = build(name)
    start_dual(ours, tmp_path, read_weights, description_of)
    for parameter, value in ours.state_dict().items():
        expected = theirs.state_dict()[parameter]
        torch.testing.assert_close(value, expected, atol=2e-3, rtol=2e-3, check_dtype=False)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}


STATED = [
    ("config text_config layer_norm_eps", 1e-6, "layer_norm_eps is 1e-06"),
    ("config text_config eos_token_id", 7, "eos_token_id is 7"),
    ("config text_config num_attention_heads", 2, "num_attention_heads is 2"),
    ("config vision_config num_attention_heads", 4, "num_attention_heads is 4"),
    ("config vision_config hidden_act", "quick_gelu", "hidden_act is 'quick_gelu'.*'gelu'"),
    ("preprocessor_config image_mean", [0.5] * 3, "mean .0.5, 0.5, 0.5.*eval_zeroshot.py"),
    ("open_clip_config model_cfg text_cfg no_causal_mask", True, "no_causal_mask is True"),
    ("open_clip_config model_cfg text_cfg heads", 2, "width 64 with 2 heads"),
    ("open_clip_config model_cfg vision_cfg head_width", 16, "width 64 with heads of 16"),
    ("open_clip_config preprocess_cfg mean", [0.5] * 3, "mean .0.5, 0.5, 0.5.*eval_zeroshot.py"),
]


@pytest.mark.parametrize(("path", "value", "message"), STATED)
def test_what_lies_beside_the_weights_is_computed_or_refused(path, value, message, capsys):
    """Weights of one shape, but features of another network than the one they are loaded into."""
    theirs = published("ViT-S-8")
    described = clip.hugging_face_config(theirs.config)
    pixels = {"image_mean": [0.48145466, 0.4578275, 0.40821073]}
    pixels["image_std"] = [0.26862954, 0.26130258, 0.27577711]
    about = {"config.json": described, "preprocessor_config.json": pixels}
    state = clip.to_hugging_face(theirs)
    if path.startswith("open_clip"):
        preprocess = {"mean": pixels["image_mean"], "std": pixels["image_std"]}
        about = {"open_clip_config.json": {"model_cfg": {}, "preprocess_cfg": preprocess}}
        state = theirs.state_dict()
    load_any_layout(build("ViT-S-8"), state, about, evaluates=True)
    assert not capsys.readouterr().err
    file, *parts, name = path.split()
    stated = about[f"{file}.json"]
    for part in parts:
        stated = stated.setdefault(part, {})
    stated[name] = value
    with pytest.raises(UserError, match=message):
        load_any_layout(build("ViT-S-8"), state, about, evaluates=True)
    if "mean" in name:  # training adapts to it
        load_any_layout(build("ViT-S-8"), state, about)
        assert "mean (0.5, 0.5, 0.5)" in "".join(capsys.readouterr())


def test_an_align_of_another_epsilon_is_refused():
    theirs = toy("ALIGN_NANO_TINY", image_size=32)
    start = toy("ALIGN_NANO_TINY", seed=1, image_size=32)
    about = {"config.json": {"text_config": {"layer_norm_eps": 1e-12}}}
    load_any_layout(start, theirs.state_dict(), about)
    about["config.json"]["text_config"]["layer_norm_eps"] = 1e-5
    with pytest.raises(UserError, match="layer_norm_eps is 1e-05"):
        load_any_layout(start, theirs.state_dict(), about)


def test_positions_fit_other_images():
    theirs = published("ViT-S-8")
    ours = build("ViT-S-8", image_size=48)
    load_any_layout(ours, theirs.state_dict(), {})
    assert ours.visual.positional_embedding.shape == (37, 64)
    corner = theirs.visual.positional_embedding[0]
    assert torch.equal(ours.visual.positional_embedding[0], corner)  # the class token's
    resnet = build("RN5", image_size=64)
    load_any_layout(resnet, published("RN5").state_dict(), {})
    assert resnet.embed_image(torch.randn(1, 3, 64, 64))["z"].shape == (1, 10)


def test_a_shorter_context_reads_the_first_positions():
    theirs, ours = published("ViT-S-8"), build("ViT-S-8", context_length=8)
    load_any_layout(ours, theirs.state_dict(), {})
    ids = torch.tensor([[5, 6, 7, 49, 0, 0, 0, 0]])
    with torch.no_grad():
        torch.testing.assert_close(ours.embed_text(ids), theirs.embed_text(ids))
    with pytest.raises(UserError, match="positional_embedding"):
        load_any_layout(build("ViT-S-8", context_length=20), theirs.state_dict(), {})


def test_open_clips_timm_towers_start_ours():
    theirs = toy("CLIP_RT_CLIP", visual=None)
    torch.manual_seed(3)
    ours = toy("CLIP_RT_CLIP", seed=1)
    load_any_layout(ours, clip.to_open_clip(theirs), {})
    assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in ours.state_dict().items())


@pytest.mark.parametrize(
    ("part", "name", "value", "message"),
    [
        ("model_cfg", "quick_gelu", False, "add --text-activation gelu"),
        ("text_cfg", "heads", 1, "add --text-heads 1"),
        ("text_cfg", "no_causal_mask", True, "no_causal_mask is True"),
        ("vision_cfg", "timm_pool", "token", "timm_pool is 'token'"),
        ("preprocess_cfg", "mean", (0.5, 0.5, 0.5), "mean .0.5, 0.5, 0.5.*eval_zeroshot.py"),
    ],
)
def test_what_lies_beside_a_timm_tower_is_computed_or_refused(part, name, value, message, capsys):
    theirs = toy("CLIP_RT_CLIP", visual=None)
    state, settings = clip.to_open_clip(theirs), clip.open_clip_config(theirs)
    pixels = dict(zip(("mean", "std"), IMAGENET, strict=True))
    about = {"open_clip_config.json": {"model_cfg": settings, "preprocess_cfg": pixels}}
    load_any_layout(toy("CLIP_RT_CLIP", visual=None), state, about, evaluates=True)
    assert not capsys.readouterr().out
    {"model_cfg": settings, "preprocess_cfg": pixels, **settings}[part][name] = value
    with pytest.raises(UserError, match=message):
        load_any_layout(toy("CLIP_RT_CLIP", visual=None), state, about, evaluates=True)


def test_our_own_files_start_as_before():
    theirs = toy("CL2L_VITB16_CL2L")
    ours = toy("CL2L_VITB16_CL2L", seed=1)
    load_any_layout(ours, theirs.state_dict() | {"momentum_model.x": torch.zeros(1)}, {})
    assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in ours.state_dict().items())


@pytest.mark.parametrize("name", ["ALIGN_NANO_TINY", "ViT-S-8"])
def test_towers_that_belong_together_take_no_other(name):
    with pytest.raises(UserError, match="has towers of its own"):
        build(name, image_tower="timm/test_resnet")


def test_flops_are_counted_on_a_batch_without_data():
    batch = build("ViT-S-8").example_batch(2, 0, 0)
    assert batch["image"].shape == (2, 3, 32, 32) and batch["text_ids"].shape == (2, 12)


def test_names_and_activations():
    for name, activation in (("ViT-S-8", "gelu"), ("ViT-S/8", "quick_gelu")):
        assert parts_of(name) == (OpenAICLIP, name, 0)
        shape = openai_shape(DualConfig(model=name, **SIZES))
        assert shape.text.activation == shape.vision_activation == activation
    assert openai_shape(DualConfig(model="ViT-S-8-quickgelu")).text.activation == "quick_gelu"
    with pytest.raises(UserError, match="did you mean ViT-B-32"):
        parts_of("ViT-B-33")


def mark(state):
    return state | {"input_resolution": torch.tensor(32)}  # OpenAI's own files have it


@pytest.mark.parametrize(
    ("model", "state", "message"),
    [
        ("ViT-S-8", lambda: mark(published("ViT-S-8").state_dict()), "trained with quick_gelu"),
        (
            "RN5",
            lambda: published("ViT-S-8").state_dict(),
            "use --model ViT-S-8, or ViT-S-8-quickgelu",
        ),
        ("CLIP_VITT8_CLIP", lambda: published("ViT-S-8").state_dict(), "use --model ViT-S-8"),
        ("ViT-S-8", lambda: toy("CLIP_VITB16_CLIP").state_dict(), "not of OpenAI's CLIP"),
        ("ViT-S-8", lambda: {"visual.trunk.attn_pool.latent": torch.zeros(1)}, "weights of SigLIP"),
        ("ViT-S-8", lambda: {"vision_model.head.probe": torch.zeros(1)}, "weights of SigLIP"),
    ],
)
def test_weights_that_do_not_fit(model, state, message):
    with pytest.raises(UserError, match=message):
        load_any_layout(build(model), state(), {})


def test_a_tokenizer_that_does_not_fit():
    with pytest.raises(UserError, match=r"token_embedding.weight \[50, 64\] instead of \[60, 64\]"):
        load_any_layout(build("ViT-S-8", vocab_size=60), published("ViT-S-8").state_dict(), {})


def test_networks_of_a_library_may_begin_at_random(monkeypatch):
    """open_clip's architectures are pre-trained, too; the published weights are not read then."""
    import main
    from models.layers.library_towers import TimmTower
    from runtime.config.cli import parse

    read = []
    monkeypatch.setattr(TimmTower, "load", lambda self, read_weights: read.append(self.name))
    words = ["--model", "CLIP_VITT8_CLIP", "--image-tower", "timm/test_vit", "--text-width", "32"]
    words += ["--transformer-layers", "1", "--vocab-size", "50"]
    for more, expected in (["--random-weights"], []), ([], ["test_vit"]):
        model = main.build_model(parse(main.Config, [*words, *more]))
        assert isinstance(model.visual, TimmTower) and read == expected
    for more in (["--lock", "image"], ["--checkpoint", "f.pt"], ["--tower-classes", "names.txt"]):
        config = [*words, "--random-weights", *more]
        with pytest.raises(UserError, match="--random-weights excludes"):
            parse(main.Config, config)
