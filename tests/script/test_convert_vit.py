"""scripts/weights/convert.py for COYO-ViT: from TensorFlow's checkpoints, and to transformers."""

import pytest
import torch
from safetensors.torch import load_file

from models.classification.classifier import ClassifierConfig, VisionClassifier
from runtime.checkpoint import export_safetensors
from scripts.weights import convert
from tests.helpers.golden import golden_file


def test_from_tensorflow(tmp_path):
    from models.weights.vit import native, to_tensorflow

    prefix = golden_file("coyo_vit", "tf_checkpoint_tiny", "last_checkpoint.index").with_suffix("")
    assert convert.main(["coyo-vit-from-tf", str(prefix), str(tmp_path / "vit.safetensors")]) == 0
    ours = to_tensorflow(load_file(tmp_path / "vit.safetensors"))
    stored = load_file(prefix.with_name("expected.safetensors"))
    assert len(ours) == len(to_tensorflow(native(stored))) == 42
    for key, value in ours.items():
        assert torch.equal(value, stored[f"{key}/.ATTRIBUTES/VARIABLE_VALUE"])


@pytest.mark.parametrize("width", [0, 16])
def test_to_transformers(width, tmp_path):
    from transformers import ViTForImageClassification, ViTModel

    sizes = {"model": "vit-mu/8", "image_size": 32, "num_classes": 5, "representation_size": width}
    model = VisionClassifier(ClassifierConfig(**sizes)).eval()
    torch.nn.init.normal_(model.head.weight)
    export_safetensors(model.state_dict(), tmp_path / "model.safetensors")
    assert (
        convert.main(["coyo-vit-to-hf", str(tmp_path / "model.safetensors"), str(tmp_path / "hf")])
        == 0
    )
    image = torch.randn(2, 3, 32, 32)
    if width:
        theirs = ViTModel.from_pretrained(tmp_path / "hf").eval()
        ours = model.pre_logits(model.features(image))
        torch.testing.assert_close(theirs(image).pooler_output, ours, rtol=1e-5, atol=1e-5)
    else:
        theirs = ViTForImageClassification.from_pretrained(tmp_path / "hf").eval()
        torch.testing.assert_close(theirs(image).logits, model.logits(image), rtol=1e-5, atol=1e-5)


def test_mistakes_are_one_line(tmp_path, capsys):
    export_safetensors({"conv.weight": torch.zeros(1)}, tmp_path / "net.safetensors")
    assert (
        convert.main(["coyo-vit-to-hf", str(tmp_path / "net.safetensors"), str(tmp_path / "hf")])
        == 2
    )
    assert "no weights of a vision transformer" in capsys.readouterr().err
