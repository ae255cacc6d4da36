"""What a task takes over from the run that made its checkpoint."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from base.errors import UserError
from runtime.checkpoint import CheckpointFolder
from runtime.config.cli import knob
from runtime.config.from_checkpoint import Geometry, inherit, saved_config

MADE_WITH = {
    "image_res": 64,
    "patch_size": 8,
    "bert_config": "configs/mine.json",
    "embed_dim": 32,
    "alpha": 0.4,
}


@dataclass
class Config(Geometry):
    checkpoint: Path | None = knob(None, "weights to start from")


def checkpoints(tmp_path: Path) -> list[Path]:
    """The same run's configuration in every place it may stand."""
    run = tmp_path / "run"
    ours = CheckpointFolder(run).save({"model": {"w": torch.zeros(2)}, "config": MADE_WITH}, 3)
    (run / "config.yaml").write_text(
        "\n".join(f"{key}: {value}" for key, value in MADE_WITH.items())
    )
    (run / "model.safetensors").write_bytes(b"")
    torch.save({"model": {"w": torch.zeros(2)}, "config": MADE_WITH}, tmp_path / "original.pth")
    return [ours, run, run / "model.safetensors", tmp_path / "original.pth"]


def test_configuration_is_found_wherever_it_stands(tmp_path):
    for path in checkpoints(tmp_path):
        assert saved_config(path) == MADE_WITH, path


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 half of one"])
def test_unreadable_file_has_no_configuration(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    assert saved_config(tmp_path / "x.pt") == {}
    assert saved_config(tmp_path / "absent.pt") == {}
    assert saved_config(None) == {}


def test_given_then_saved_then_published(tmp_path):
    config = Config(image_res=96, checkpoint=checkpoints(tmp_path)[0])
    taken = inherit(config)
    assert (config.image_res, config.patch_size, config.embed_dim) == (96, 8, 32)
    assert config.bert_config == Path("configs/mine.json")
    assert (config.vision_width, config.queue_size, config.text_encoder) == (
        768,
        65536,
        "bert-base-uncased",
    )
    assert taken == ["patch_size: 8", "bert_config: configs/mine.json", "embed_dim: 32"]


def test_token_types_mark_albef():
    simla, albef = Config(), Config()
    inherit(simla, ["text_encoder.embeddings.word_embeddings.weight"])
    inherit(albef, ["text_encoder.embeddings.token_type_embeddings.weight"])
    assert (simla.bert_config.name, albef.bert_config.name) == (
        "shared_bert.json",
        "config_bert.json",
    )


def test_value_of_the_wrong_type_is_named(tmp_path):
    torch.save({"config": {"image_res": "large"}}, tmp_path / "x.pth")
    with pytest.raises(
        UserError, match=r"x.pth: its configuration has image_res: 'large'; give --image_res"
    ):
        inherit(Config(checkpoint=tmp_path / "x.pth"))
