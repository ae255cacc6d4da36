"""Vision transformers of others in eval_knn.py: the network is the published one, or the user is
asked; nothing about pixels, activation and LayerNorm is guessed."""

import json
from types import SimpleNamespace

import pytest
import torch

import eval_knn
from base.errors import UserError
from base.pixels import HALF, IMAGENET, Pixels, timm_statistics
from dataset.images.clip import EvalView
from dataset.images.vit import ViTEvalView
from models.layers.vit import ViT, ViTConfig
from models.weights.any_image_encoder import open_encoder, vit_sizes
from models.weights.vit import to_transformers
from models.weights.vit_facts import VitFacts
from runtime.checkpoint import read_weights
from runtime.config.from_checkpoint import description_of
from tests.helpers.tensorflow_vit import to_tensorflow

timm = pytest.importorskip("timm")
STATED = VitFacts(*IMAGENET, "gelu", 1e-6)


def network(**changes):
    """timm's transformer of 192 x 12 (vit-ti), small images, weights far from their start."""
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3}
    options |= {"num_classes": 0, "global_pool": "token"} | changes
    model = timm.models.VisionTransformer(**options).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def image():
    torch.manual_seed(1)
    return torch.randn(2, 3, 32, 32)


def same(encoder, model, tolerance: float = 1e-5) -> None:
    with torch.no_grad():
        found, expected = encoder.eval()(image()), model(image())
    assert (found - expected).norm() <= tolerance * expected.norm()


def test_bare_weights_are_asked_for_what_they_do_not_tell():
    weights = network().state_dict()
    with pytest.raises(UserError) as error:
        open_encoder(weights, {})
    text = str(error.value)
    for option in ("--mean", "--std", "--activation", "--eps", "preprocessor_config.json"):
        assert option in text
    with pytest.raises(UserError, match=r"do not tell their activation, eps:"):
        open_encoder(weights, {}, stated=VitFacts(*IMAGENET))


@pytest.mark.parametrize(
    ("activation", "layer"), [("gelu", torch.nn.GELU), ("gelu_tanh", "gelu_tanh")]
)
@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_what_the_user_states_is_what_the_network_does(activation, layer, eps):
    def norm(width: int, **_):
        return torch.nn.LayerNorm(width, eps=eps)

    model = network(act_layer=layer, norm_layer=norm)
    facts = VitFacts((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), activation, eps)
    encoder = open_encoder(model.state_dict(), {}, stated=facts)
    assert encoder.pixels.mean == (0.1, 0.2, 0.3) and encoder.pixels.std == (0.4, 0.5, 0.6)
    same(encoder, model)


@pytest.mark.parametrize(
    ("activation", "layer"), [("gelu", torch.nn.GELU), ("gelu_pytorch_tanh", "gelu_tanh")]
)
def test_hugging_faces_files_tell(tmp_path, activation, layer):
    def norm(width: int, **_):
        return torch.nn.LayerNorm(width, eps=1e-3)

    model = network(act_layer=layer, norm_layer=norm)
    torch.save(to_transformers(model.state_dict()), tmp_path / "pytorch_model.bin")
    config = {"model_type": "vit", "hidden_act": activation, "layer_norm_eps": 1e-3}
    config["num_attention_heads"] = 3
    images = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(images))
    file = tmp_path / "pytorch_model.bin"
    encoder = open_encoder(read_weights(file), description_of(file))
    assert encoder.pixels == (32, "bicubic", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    same(encoder, model)
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_attention_heads": 6}))
    with pytest.raises(UserError, match="6 attention heads"):
        open_encoder(read_weights(file), description_of(file))
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    with pytest.raises(UserError, match="hidden_act 'relu' is not supported"):
        open_encoder(read_weights(file), description_of(file))


@pytest.mark.parametrize("size", [256, {"height": 256, "width": 256}])
def test_a_centre_out_of_a_squeezed_image_is_no_view_of_ours(size):
    """As DeiT's files have it: taken for the shorter side, or for the whole image, every score of
    an oblong image would be another."""
    config = {"model_type": "vit", "num_attention_heads": 3}
    images = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": size}
    about = {"config.json": config, "preprocessor_config.json": images}
    weights = network().state_dict()
    assert open_encoder(weights, about).resize is None
    images |= {"do_center_crop": True, "crop_size": 224}
    with pytest.raises(UserError, match="before a centre crop"):
        open_encoder(weights, about)
    assert open_encoder(weights, about, stated=VitFacts(resize=256)).resize == 256


@pytest.mark.parametrize(
    ("kind", "stated"),
    [
        ("vit", {}),  # as files of the hub's first years
        ("vit_mae", {"feature_extractor_type": "ViTFeatureExtractor"}),
        ("vit", {"image_processor_type": "BitImageProcessor"}),
        ("vit", {"image_processor_type": "ViTImageProcessor", "resample": 3}),
        ("vit", {"image_processor_type": "DeiTImageProcessor", "resample": 2}),
    ],
)
def test_the_filter_is_that_of_the_librarys_processor(tmp_path, kind, stated):
    import transformers

    config = {"model_type": kind, "num_attention_heads": 3}
    images = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": 32} | stated
    about = {"config.json": config, "preprocessor_config.json": images}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(images))
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    weights = network().state_dict()
    filters = {2: "bilinear", 3: "bicubic"}
    assert open_encoder(weights, about).pixels.interpolation == filters[int(theirs.resample)]
    images["resample"] = 1
    with pytest.raises(UserError, match=r"resample is 1.*--model hf/FOLDER"):
        open_encoder(weights, about)


def test_timms_config_json_tells(tmp_path):
    config = {
        "architecture": "vit_tiny_patch16_224",
        "model_args": {"img_size": 32, "act_layer": "gelu_tanh"},
        "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4] * 3, "input_size": [3, 32, 32]},
    }
    model = network(act_layer="gelu_tanh")
    encoder = open_encoder(model.state_dict(), {"config.json": config})
    assert encoder.pixels.mean == (0.1, 0.2, 0.3) and encoder.kind == "timm"
    same(encoder, model)


def prefixed(state, prefix: str) -> dict:
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize("maker", ["dino", "moco", "mae", "mae_encoder_alone"])
def test_self_supervised_files_by_their_layout(tmp_path, maker):
    sizes = {"embed_dim": 384, "num_heads": 12} if maker == "moco" else {}
    model = network(**sizes)
    state = model.state_dict()
    head = {"head.mlp.0.weight": torch.ones(3, 3)}
    content = {
        "dino": {
            "student": prefixed({key: value + 1 for key, value in state.items()}, "backbone."),
            "teacher": prefixed(prefixed(state, "backbone.") | head, "module."),
            "epoch": 3,
        },
        "moco": {
            "arch": "vit_small",
            "state_dict": prefixed(
                state | {"head.0.weight": torch.ones(2, 2)}, "module.base_encoder."
            )
            | prefixed(
                {key: value + 1 for key, value in state.items()}, "module.momentum_encoder."
            ),
        },
        "mae": {
            "model": state | {"decoder_embed.weight": torch.ones(2, 2), "mask_token": torch.ones(1)}
        },
        "mae_encoder_alone": {"model": state},
    }[maker]
    torch.save(content, tmp_path / "file.pth")
    weights = read_weights(tmp_path / "file.pth")
    if maker == "mae_encoder_alone":  # looks like any ViT: the user is asked
        with pytest.raises(UserError, match="state them"):
            open_encoder(weights, {})
        encoder = open_encoder(weights, {}, stated=STATED)
    else:
        encoder = open_encoder(weights, {})
    assert encoder.pixels.mean == IMAGENET[0]
    same(encoder, model)


def test_dinov2_of_meta():
    model = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=28).eval()
    state = dict(model.state_dict())
    state["mask_token"] = torch.zeros(1, 384)
    encoder = open_encoder(state, {})
    assert encoder.pixels.mean == IMAGENET[0] and encoder.title == "timm/vit_small_patch14_dinov2"
    larger = torch.randn(1, 3, encoder.pixels.size, encoder.pixels.size)
    with torch.no_grad():
        reference = timm.create_model("vit_small_patch14_dinov2", num_classes=0).eval()
        from timm.models.vision_transformer import checkpoint_filter_fn

        reference.load_state_dict(checkpoint_filter_fn(dict(state), reference))
        torch.testing.assert_close(encoder.eval()(larger), reference(larger))


@pytest.mark.parametrize("lacking", ["patch_embed.proj.weight", "pos_embed"])
def test_a_file_of_half_a_vision_transformer_is_one_sentence(lacking):
    weights = {
        "patch_embed.proj.weight": torch.zeros(8, 3, 4, 4),
        "pos_embed": torch.zeros(1, 5, 8),
    }
    assert vit_sizes(weights)["image_size"] == 8
    with pytest.raises(UserError, match=f"no {lacking} in it"):
        vit_sizes({name: value for name, value in weights.items() if name != lacking})


def test_coyo_vit_is_known_by_its_names():
    weights = to_tensorflow(network().state_dict())
    encoder = open_encoder(weights, {})
    assert encoder.pixels.mean == HALF[0] and encoder.kind == "classifier"
    same(encoder, network(act_layer="gelu_tanh"))


def test_classification_says_where_its_options_differ_from_the_weights(capsys):
    from models.classification.classifier import ClassifierConfig, VisionClassifier
    from models.weights.vit_facts import load_agreeing

    weights = prefixed(network().state_dict(), "backbone.")  # DINO: exact GELU, ImageNet's pixels
    sizes = {"model": "vit-ti/16", "image_size": 32, "num_classes": 3}
    model = VisionClassifier(ClassifierConfig(**sizes))
    with pytest.raises(UserError, match="add --gelu none --pixels imagenet"):
        load_agreeing(model, weights, {}, strict=True)
    load_agreeing(model, weights, {}, strict=False)
    assert "trained with --gelu none --pixels imagenet" in capsys.readouterr().out
    torch.testing.assert_close(
        model.blocks[3].mlp.fc1.weight, weights["backbone.blocks.3.mlp.fc1.weight"]
    )
    fitting = VisionClassifier(ClassifierConfig(**sizes, gelu="none", pixels="imagenet"))
    load_agreeing(fitting, weights, {}, strict=True)
    load_agreeing(model, weights, {"network": {}}, strict=True)  # its options are the run's
    run = {"network": {"model": "vit-ti/16", "gelu": "none", "pixels": "clip"}}
    load_agreeing(model, fitting.state_dict(), run, strict=False)
    assert "trained with --gelu none --pixels clip" in capsys.readouterr().out
    with pytest.raises(UserError, match="6 attention heads, but vit-ti/16 has 3"):
        load_agreeing(model, weights, {"config.json": {"num_attention_heads": 6}}, strict=False)


def test_timms_own_file_tells_classification_and_pretraining(capsys):
    """Beside weights in the layout that ours has: GELU, pixels and heads are those of the file."""
    from models.classification.classifier import ClassifierConfig, VisionClassifier
    from models.weights.starting_vit import check_described
    from models.weights.vit_facts import load_agreeing

    sizes = {"model": "vit-ti/16", "image_size": 32, "num_classes": 3}
    model = VisionClassifier(ClassifierConfig(**sizes))
    look = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    described = {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": look}
    weights, about = network().state_dict(), {"config.json": described}
    with pytest.raises(UserError, match="add --gelu none --pixels imagenet"):
        load_agreeing(model, weights, about, strict=True)
    check_described("vit", about, 3)
    with pytest.raises(UserError, match="3 attention heads; set vision_heads"):
        check_described("vit", about, 2)
    described["model_args"] = {"act_layer": "gelu_tanh", "num_heads": 6}
    with pytest.raises(UserError, match="6 attention heads, but vit-ti/16 has 3"):
        load_agreeing(model, weights, about, strict=False)
    with pytest.raises(UserError, match="its activation is not this ViT's"):
        check_described("vit", about, 6)
    described["model_args"] = {"act_layer": "gelu_tanh"}
    load_agreeing(model, weights, about, strict=False)
    assert "trained with --pixels imagenet" in capsys.readouterr().out


def test_the_vision_transformer_of_a_run_of_simla_has_its_heads(tmp_path, capsys):
    """As the run's configuration says, in its checkpoint and beside what is exported of it: four
    of 6, not one of 24."""
    from scripts.weights import convert
    from tests.helpers.tiny_simla import tiny_model

    model = tiny_model().eval()
    image = torch.randn(2, 3, 32, 32)
    expected = model.visual_encoder(image)[:, 0]
    run = {"model": model.state_dict(), "config": {"vision_heads": 4, "image_res": 32}}
    torch.save(run, tmp_path / "run.pt")
    export = ["--to", "safetensors", "--output", str(tmp_path / "out")]
    assert convert.main([str(tmp_path / "run.pt"), *export]) == 0
    for file in (tmp_path / "run.pt", tmp_path / "out/model.safetensors"):
        encoder = open_encoder(read_weights(file), description_of(file)).eval()
        torch.testing.assert_close(encoder(image), expected)
        assert "vision_heads: 4" in (tmp_path / "out/README.md").read_text()


def test_the_vision_transformer_of_a_run_on_a_timm_tower_is_opened(tmp_path):
    """The run's configuration names the tower and the patches, which weights do not tell."""
    width, patch = 48, 32
    config = ViTConfig(64, patch, width, 1, heads=2, tower="timm/test_efficientnet")
    vit = ViT(config).eval()
    state = {f"visual_encoder.{name}": value for name, value in vit.state_dict().items()}
    about = {"vision_tower": config.tower, "patch_size": patch, "vision_heads": 2}
    torch.save({"model": state, "config": about}, tmp_path / "run.pt")
    file = tmp_path / "run.pt"
    encoder = open_encoder(read_weights(file), description_of(file)).eval()
    image = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(encoder(image), vit(image)[:, 0])
    assert encoder.pixels == (64, "bicubic", *timm_statistics(config.tower))
    with pytest.raises(UserError, match=r"keep the run's config\.yaml"):
        open_encoder(state, {})


RESIZING = {
    "a library's own": ({"kind": "library", "view": "view"}, {}, "view", "'view'"),
    "a classifier's": (
        {"kind": "classifier"},
        {"config": {"views": {"resize_small": 20}}},
        ViTEvalView(16, 20),
        "shorter side 20, centre 16",
    ),
    "a classifier's, whole": ({"kind": "classifier"}, {}, ViTEvalView(16), "squeezed to 16"),
    "a dual encoder's": (
        {"kind": "dual"},
        {},
        EvalView(16, "bicubic"),
        "CLIP_VITB16_CLIP's, 16, bicubic",
    ),
    "SIMLA's": (
        {"kind": "fusion"},
        {},
        EvalView(16, "bicubic", squeeze=True),
        "squeezed to 16, bicubic",
    ),
    "as stated": (
        {"kind": "vit", "resize": 20},
        {},
        EvalView(16, "bicubic", 20),
        "shorter side 20, centre 16, bicubic",
    ),
}


@pytest.mark.parametrize("case", RESIZING)
def test_images_are_resized_as_the_encoder_was_trained(case):
    changes, about, expected, in_words = RESIZING[case]
    facts = {"pixels": Pixels(16, "bicubic", *HALF), "title": "CLIP_VITB16_CLIP", "resize": None}
    encoder = SimpleNamespace(**facts | {"view": None} | changes)
    found, said = eval_knn.view_of(encoder, about)
    assert (type(found), said) == (type(expected), in_words)
    assert found == expected or vars(found) == vars(expected)


def test_what_the_user_states_of_a_transformer_is_what_opens_it(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(eval_knn, "weights_file", lambda file: file)
    monkeypatch.setattr(eval_knn, "read_weights", lambda file: "weights")
    monkeypatch.setattr(eval_knn, "description_of", lambda file: "about")
    monkeypatch.setattr(eval_knn, "open_encoder", lambda *given: opened.append(given))
    facts = VitFacts((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "gelu_tanh", 1e-3, resize=20)
    stated = {name: getattr(facts, name) for name in ("mean", "std", "activation", "eps", "resize")}
    eval_knn.load_encoder(eval_knn.Config(checkpoint=tmp_path, model="vit", **stated))
    assert opened == [("weights", "about", "vit", facts)]
