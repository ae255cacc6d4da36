"""scripts/weights/convert.py for COYO-ViT: from TensorFlow's checkpoints, and to transformers."""

import re

import pytest
import torch
from safetensors.torch import load_file

from base.errors import UserError
from models.classification.classifier import ClassifierConfig, VisionClassifier
from runtime.checkpoint import export_safetensors
from scripts.weights import convert
from scripts.weights.tf_checkpoint import read_checkpoint
from tests.helpers.exported import save_run
from tests.helpers.golden import golden_file
from tests.helpers.tensorflow_vit import to_tensorflow
from tests.helpers.tf_bundle import BIG_ENDIAN, write_bundle


def test_from_tensorflow(tmp_path):
    from models.weights.vit import native

    prefix = golden_file("coyo_vit", "tf_checkpoint_tiny", "last_checkpoint.index").with_suffix("")
    assert convert.main(["coyo-vit-from-tf", str(prefix), str(tmp_path / "vit.safetensors")]) == 0
    ours = to_tensorflow(load_file(tmp_path / "vit.safetensors"))
    stored = load_file(prefix.with_name("expected.safetensors"))
    assert len(ours) == len(to_tensorflow(native(stored))) == 42
    for key, value in ours.items():
        assert torch.equal(value, stored[f"{key}/.ATTRIBUTES/VARIABLE_VALUE"])


VALUES = {f"backbone/{name}": torch.arange(6.0).view(2, 3) for name in ("class_emb", "pos_emb")}
QUERY = "backbone/enc_layers/0/att/{}_dense/kernel"


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def of_two(prefix):
    data = prefix.with_name(f"{prefix.name}.data-00000-of-00001")
    data.rename(prefix.with_name(f"{prefix.name}.data-00000-of-00002"))


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("data-00000-of-00001", lambda content: flipped(content, 3), "checksum of backbone/"),
        ("data-00000-of-00001", lambda content: content[:-1], "a data file is cut off"),
        ("index", lambda content: flipped(content, 3), "the checksum of a block is wrong"),
        # behind the end of the first block, the number of whose restarts is its last
        ("index", lambda c: flipped(c, c.index(b"\0\0\0\0\1\0\0\0") + 8), "a compressed table"),
        ("index", lambda content: content[:-8] + bytes(8), "no magic number"),
        (None, of_two, "1 data files lie beside the index; fetch all of them"),
    ],
)
def test_a_damaged_checkpoint_of_tensorflow_is_not_read(file, change, message, tmp_path):
    write_bundle(tmp_path / "step", VALUES)
    if file is None:
        change(tmp_path / "step")
    else:
        path = tmp_path / f"step.{file}"
        path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=message):
        read_checkpoint(tmp_path / "step")


def test_the_moving_average_goes_before_the_weights(tmp_path):
    slot = "backbone/pos_emb/.OPTIMIZER_SLOT/optimizer/"
    averaged = torch.full((2, 3), 7.0)
    more = {f"{slot}average": averaged, f"{slot}m": torch.zeros(2, 3)}
    write_bundle(tmp_path / "step", VALUES | more)
    assert read_checkpoint(tmp_path / "step").keys() == VALUES.keys()
    kept = read_checkpoint(tmp_path / "step.index", slot="average")
    assert kept.keys() == {*VALUES, f"{slot}average"}
    written = tmp_path / "vit.safetensors"
    assert convert.main(["coyo-vit-from-tf", str(tmp_path / "step"), str(written)]) == 0
    assert torch.equal(load_file(written)["pos_embed"], averaged)


@pytest.mark.parametrize(
    ("beside", "options", "message"),
    [
        ((), {}, ""),
        ((), {"header": BIG_ENDIAN}, "big-endian"),
        (
            (),
            {"types": {"backbone/pos_emb": 11}},
            "backbone/pos_emb/.* is of TensorFlow's dtype 11",
        ),
        (("query", "key", "value"), {}, ""),
        (("key", "value"), {}, "blocks.0.attn.k.weight: the query, key or value"),
    ],
)
def test_from_tensorflow_with_all_of_its_values_or_not_at_all(
    beside, options, message, tmp_path, capsys
):
    prefix = tmp_path / "step[3]"
    values = VALUES | {QUERY.format(name): torch.eye(3) for name in beside}
    write_bundle(prefix, values, **options)
    weights = tmp_path / "vit.safetensors"
    status = convert.main(["coyo-vit-from-tf", str(prefix), str(weights)])
    assert status == (2 if message else 0) and weights.exists() == (not message)
    assert re.search(message, capsys.readouterr().err)
    if not message:
        found = load_file(weights)
        assert torch.equal(found["pos_embed"], VALUES["backbone/pos_emb"])
        assert len(found) == 2 + bool(beside)


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


def test_to_transformers_with_the_activation_and_epsilon_of_the_run(tmp_path):
    from transformers import ViTForImageClassification

    network = {"model": "vit-mu/8", "image_size": 32, "num_classes": 5, "gelu": "none"}
    network |= {"layer_norm_eps": 1e-2, "pixels": "imagenet"}
    torch.manual_seed(0)
    model = VisionClassifier(ClassifierConfig(**network)).eval()
    torch.nn.init.normal_(model.head.weight)
    save_run(tmp_path / "run", model, {"network": network})
    assert convert.main(["coyo-vit-to-hf", str(tmp_path / "run"), str(tmp_path / "hf")]) == 0
    image = torch.randn(2, 3, 32, 32)
    theirs = ViTForImageClassification.from_pretrained(tmp_path / "hf").eval()
    torch.testing.assert_close(theirs(image).logits, model.logits(image), rtol=1e-5, atol=1e-5)


def test_mistakes_are_one_line(tmp_path, capsys):
    export_safetensors({"conv.weight": torch.zeros(1)}, tmp_path / "net.safetensors")
    assert (
        convert.main(["coyo-vit-to-hf", str(tmp_path / "net.safetensors"), str(tmp_path / "hf")])
        == 2
    )
    assert "no weights of a vision transformer" in capsys.readouterr().err
