"""What a task takes over from the run that made its checkpoint."""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest
import torch

import Recognition
from base.errors import UserError
from base.writing import write_json
from runtime.checkpoint import CheckpointFolder
from runtime.config.cli import knob, parse, section
from runtime.config.from_checkpoint import check_architecture, description_of, saved_config
from runtime.config.networks import Geometry, fill_geometry
from runtime.config.nxtp import fill_network
from runtime.sharded import write_part

MADE_WITH = {
    "image_res": 64,
    "patch_size": 8,
    "bert_config": "configs/mine.json",
    "embed_dim": 32,
    "vision_heads": 2,
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


def test_files_of_a_run_are_found_from_another_folder(tmp_path, monkeypatch):
    run = tmp_path / "project/output/mine"
    named = {"text_encoder": "output/mine/text_tokenizer", "bert_config": "configs/mine.json"}
    for file in named.values():
        (tmp_path / "project" / file).mkdir(parents=True)
    named |= {"answer_list": "absent.json", "tokenizer": "bert-base-uncased"}
    config = {"output_dir": "output/mine", **named}
    CheckpointFolder(run).save({"model": {"w": torch.zeros(2)}, "config": config}, 3)
    monkeypatch.chdir(tmp_path / "project")
    assert saved_config("output/mine") == config  # as they are where they are right
    monkeypatch.chdir(tmp_path)
    found = {
        name: str(tmp_path / "project" / named[name]) for name in ("text_encoder", "bert_config")
    }
    assert saved_config(run) == config | found
    run.rename(tmp_path / "moved")
    moved = {"text_encoder": "moved/text_tokenizer"}
    assert saved_config("moved") == config | moved


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 half of one"])
def test_unreadable_file_has_no_configuration(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    assert saved_config(tmp_path / "x.pt") == {}
    assert saved_config(tmp_path / "absent.pt") == {}
    assert saved_config(None) == {}


def test_given_then_saved_then_published(tmp_path, capsys):
    config = Config(image_res=96, checkpoint=checkpoints(tmp_path)[0])
    fill_geometry(config, ())
    assert (config.image_res, config.patch_size, config.embed_dim) == (96, 8, 32)
    assert config.bert_config == Path("configs/mine.json")
    assert (config.vision_width, config.queue_size, config.text_encoder) == (
        768,
        65536,
        "bert-base-uncased",
    )
    taken = "patch_size 8, vision_heads 2, bert_config configs/mine.json, embed_dim 32"
    assert capsys.readouterr().err == f"note: as in {config.checkpoint}: {taken}\n"


NXTP_RUN = {
    "network": {"decoder_heads": 9, "norm_eps": 1e-6, "image_size": 48},
    "whole_picture": True,  # its old name
    "llama": "weights/llama",
}


def recognition(tmp_path: Path, *flags: str) -> Recognition.Config:
    torch.save({"model": {}, "config": NXTP_RUN}, tmp_path / "run.pt")
    return parse(Recognition.Config, ["--checkpoint", str(tmp_path / "run.pt"), *flags])


def test_recognition_takes_what_is_not_given_from_the_run(tmp_path):
    config = recognition(tmp_path)
    fill_network(config)
    network = config.network
    assert (network.decoder_heads, network.norm_eps, network.image_size) == (9, 1e-6, 48)
    assert (config.whole_image, config.tokenizer) == (True, Path("weights/llama"))
    config = recognition(tmp_path, "--no-whole-image", "--image-size", "96", "--tokenizer", "t")
    fill_network(config)
    assert (config.whole_image, config.network.image_size) == (False, 96)
    assert (config.tokenizer, config.network.decoder_heads) == (Path("t"), 9)


def test_sizes_of_a_checkpoint_that_cannot_be_are_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(NXTP_RUN["network"], "decoder_heads", 0)
    with pytest.raises(UserError, match=r"run.pt: its configuration has network.decoder_heads: 0"):
        fill_network(recognition(tmp_path))


def test_heads_of_a_decoder_must_be_those_of_the_run(tmp_path):
    with pytest.raises(UserError, match="trained with decoder_heads 9, not 4: leave out"):
        fill_network(recognition(tmp_path, "--decoder_heads", "4"))


def test_token_types_mark_albef():
    simla, albef = Config(), Config()
    fill_geometry(simla, ["text_encoder.embeddings.word_embeddings.weight"])
    fill_geometry(albef, ["text_encoder.embeddings.token_type_embeddings.weight"])
    assert (simla.bert_config.name, albef.bert_config.name) == (
        "shared_bert.json",
        "config_bert.json",
    )


def test_value_of_the_wrong_type_is_named(tmp_path):
    torch.save({"config": {"image_res": "large"}}, tmp_path / "x.pth")
    with pytest.raises(
        UserError, match=r"x.pth: its configuration has image_res: 'large'; give --image_res"
    ):
        fill_geometry(Config(checkpoint=tmp_path / "x.pth"), ())


OTHER_THAN_RECORDED = {
    "vision_heads": {"vision_heads": 4},
    "bert_config.num_attention_heads": {"bert_config": Path("configs/bert_small.json")},
}


@pytest.mark.parametrize("name", OTHER_THAN_RECORDED)
def test_what_shapes_the_network_must_agree_with_the_checkpoint(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for file, heads in (("configs/mine.json", 2), ("configs/bert_small.json", 4)):
        write_json(tmp_path / file, {"num_attention_heads": heads})
    for checkpoint in checkpoints(tmp_path):
        with pytest.raises(UserError, match=f"was trained with {name} .*, not") as error:
            fill_geometry(Config(checkpoint=checkpoint, **OTHER_THAN_RECORDED[name]), ())
        assert str(checkpoint) in str(error.value)
        (flag,) = OTHER_THAN_RECORDED[name]
        assert f"leave out --{flag}, or" in str(error.value)
        fill_geometry(Config(checkpoint=checkpoint, vision_heads=2, image_res=32), ())


@dataclass(frozen=True)
class Frozen:
    width: int = knob(8, "width", low=1)
    heads: int = knob(2, "heads", low=1)


@dataclass
class Scored:
    OF_CHECKPOINT = ("network", "classes")
    evaluate: bool = knob(False, "no training")
    checkpoint: Path | None = knob(None, "weights to score")
    classes: Path | None = knob(None, "names")
    network: Frozen = section(Frozen, flat=True)


def test_evaluation_takes_what_the_command_line_leaves_open(tmp_path):
    saved = {"network": {"width": 64, "heads": 4}, "classes": "names.txt"}
    torch.save({"config": saved}, tmp_path / "x.pth")
    words = ["--checkpoint", str(tmp_path / "x.pth"), "--evaluate"]
    taken = parse(Scored, [*words, "--heads", "8"])
    assert (taken.network, taken.classes) == (Frozen(64, 8), Path("names.txt"))
    assert parse(Scored, [*words, "--classes", "none"]).classes is None
    assert parse(Scored, words[:2]).network == Frozen()


def test_grounding_is_scored_by_the_maps_that_chose_the_checkpoint(tmp_path):
    config = import_module("Grounding").Config
    torch.save({"config": {"gradcam_mode": "itc", "block_num": 1}}, tmp_path / "x.pth")
    words = ["--checkpoint", str(tmp_path / "x.pth"), "--evaluate"]
    taken = parse(config, words)
    assert (taken.gradcam_mode, taken.block_num) == ("itc", 1)
    given = parse(config, [*words, "--block_num", "0"])
    assert (given.gradcam_mode, given.block_num) == ("itc", 0)


@dataclass
class Towers:
    text_heads: int = 8
    swalip_weight: float = 0.2


@dataclass
class ScriptConfig:
    checkpoint: Path
    network: Towers


def test_weights_of_another_number_of_heads_are_not_read(tmp_path):
    made_with = {"network": {"text_heads": 2, "swalip_weight": 0.5}}
    state = {"model": {"w": torch.ones(2)}, "config": made_with}
    file = CheckpointFolder(tmp_path).save(state, 3)
    with pytest.raises(UserError, match="trained with text_heads 2, not 8: leave out --text_heads"):
        check_architecture(ScriptConfig(file, Towers()), saved_config(file))
    check_architecture(ScriptConfig(file, Towers(text_heads=2)), saved_config(file))


def test_a_sharded_checkpoint_says_what_it_was_made_with(tmp_path):
    folder = CheckpointFolder(tmp_path)
    part = write_part(folder.unfinished(3), 0, {}, {}, "")
    saved = folder.commit({"model": {}, "config": {**MADE_WITH, "network": {"w": 1}}}, [part], 3)
    for path in (saved, tmp_path):
        assert saved_config(path)["embed_dim"] == 32
    assert description_of(saved)["network"] == {"w": 1}
