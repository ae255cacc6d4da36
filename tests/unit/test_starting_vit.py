"""Pretrain.py's ViT starts from models of timm and transformers and computes what they compute."""

from pathlib import Path

import pytest
import torch

from base.errors import UserError
from base.pixels import OPENAI, STATISTICS
from models.classification.classifier import ClassifierConfig, VisionClassifier
from models.layers.vit import ViT, ViTConfig
from models.weights.loading import load_checkpoint
from models.weights.starting_vit import start_vision, starting_vit
from runtime.checkpoint import read_weights
from runtime.config.from_checkpoint import description_of

SHAPE = {"image_size": 32, "patch_size": 16, "width": 64, "depth": 6, "heads": 2, "mlp_ratio": 3.0}


def ours(source, heads=2, **changes):
    config = ViTConfig(**(SHAPE | changes | {"heads": heads}), pixels=OPENAI)
    vit = ViT(config).eval()
    load_checkpoint(vit, starting_vit(source, read_weights, description_of, heads, config.grid))
    return vit


@pytest.fixture(scope="module")
def image():
    torch.manual_seed(1)
    return torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)


def normalised(image, mean, std):
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    return (image / 255 - mean) / std


def test_a_vit_of_timm_with_its_own_pixels(tmp_path, image):
    import timm

    torch.manual_seed(0)
    name = "vit_tiny_patch16_224"  # mean and std 0.5
    theirs = timm.create_model(name, num_classes=7).eval()
    file = tmp_path / "vit.pth"
    torch.save(theirs.state_dict(), file)
    shape = {"image_size": 224, "width": 192, "depth": 12, "mlp_ratio": 4.0}
    vit = ours(Path(f"timm/{name}:{file}"), heads=3, **shape)
    large = image.repeat_interleave(7, 2).repeat_interleave(7, 3)
    with torch.no_grad():
        expected = theirs.forward_features(normalised(large, (0.5,) * 3, (0.5,) * 3))
        found = vit(large)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
    with pytest.raises(UserError, match="3 attention heads; set vision_heads to it"):
        starting_vit(Path(f"timm/{name}:{file}"), read_weights, description_of, 4, 14)


def test_a_vit_of_transformers(tmp_path, image):
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.ViTConfig(
        **sizes, image_size=32, patch_size=16, intermediate_size=128, layer_norm_eps=1e-6
    )
    theirs = transformers.ViTModel(config, add_pooling_layer=False).eval()
    theirs.save_pretrained(tmp_path)
    mean, std = (0.1, 0.2, 0.3), (0.2, 0.3, 0.4)
    processor = transformers.ViTImageProcessor(image_mean=mean, image_std=std)
    processor.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = theirs(normalised(image, mean, std)).last_hidden_state
    for source in (Path(f"hf/{tmp_path}"), tmp_path):
        with torch.no_grad():
            found = ours(source, depth=2, mlp_ratio=2.0)(image)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(UserError, match=r"num_attention_heads is 2.* computes 4; set vision_h"):
            starting_vit(path, read_weights, description_of, 4, 2)


def tokens_of(model, image):
    x = model.embed(image)
    for block in model.blocks:
        x = block(x)
    return model.norm(x)


def classification_run(folder, **options) -> tuple[VisionClassifier, Path]:
    """A network of two heads, and its checkpoint."""
    options = {"model": "vit-mu/16", "image_size": 32, "gelu": "none", **options}
    model = VisionClassifier(ClassifierConfig(**options)).eval()
    torch.save({"model": model.state_dict(), "config": {"network": options}}, folder / "run.pt")
    return model, folder / "run.pt"


@pytest.mark.parametrize("pixels", ["half", "clip"])
def test_a_run_of_classification_computes_the_same(tmp_path, image, pixels):
    model, file = classification_run(tmp_path, pixels=pixels)
    vit = ours(file, width=32, depth=2, mlp_ratio=4.0)
    with torch.no_grad():
        expected = tokens_of(model, normalised(image, *STATISTICS[pixels]))
        torch.testing.assert_close(vit(image), expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(UserError, match="2 attention heads; set vision_heads to it"):
        starting_vit(file, read_weights, description_of, 4, 2)


def test_what_a_run_computes_otherwise_is_said(tmp_path, capsys):
    _, file = classification_run(tmp_path, gelu="tanh")
    with pytest.raises(UserError, match=r"the exact GELU .*--gelu none"):
        starting_vit(file, read_weights, description_of, 2, 2)
    model, file = classification_run(tmp_path, stem=(8, 16))
    weights = starting_vit(file, read_weights, description_of, 2, 2)
    assert torch.equal(weights["patch_embed.proj.weight"], model.patch_embed.proj.weight)
    assert "its stem was trained on pixels of mean (0.5, 0.5, 0.5)" in capsys.readouterr().out


def test_what_is_no_such_vit_is_refused(tmp_path):
    import timm

    file = tmp_path / "other.pth"
    torch.save(timm.create_model("test_resnet").state_dict(), file)
    with pytest.raises(UserError, match="no vision transformer"):
        starting_vit(Path(f"timm/test_resnet:{file}"), read_weights, description_of, 2, 2)


@pytest.mark.parametrize("weights", [{"a.weight": torch.ones(1)}, {"a.weight": torch.ones(1) / 0}])
def test_what_is_wrong_names_the_option_and_the_file_once(tmp_path, weights):
    """A recipe may name four files of weights."""
    file = tmp_path / "other.pth"
    torch.save(weights, file)
    vit = ViT(ViTConfig(**SHAPE))
    with pytest.raises(UserError) as caught:
        start_vision(vit, file, read_weights, description_of)
    assert str(caught.value).count(str(file)) == 1
    assert str(caught.value).startswith((f"vision_weights {file}: no weights of a", f"{file}: a."))
