"""Networks that cannot fit are refused before they are built."""

import importlib

import pytest
import torch
from torch import nn

import Recognition
from base import memory
from base.distributed import World
from base.errors import UserError
from base.memory import check_fits, free_memory, parameter_count
from models.classification.classifier import ClassifierConfig, build_classifier
from models.dual_encoder.config import DualConfig
from models.dual_encoder.factory import build_dual
from models.fusion.config import retrieval_config
from models.recognition.decoding import Decoding
from models.weights.build_nxtp import NetworkOptions
from runtime.config.cli import parse, run_script
from runtime.run import Run
from tests.helpers.configs import NEEDED


class Tokens:
    vocab_size, image = 32001, 32000


def test_counting_takes_no_memory_and_no_random_numbers():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert parameter_count(lambda: nn.Linear(10**6, 10**6)) == 10**12 + 10**6
    assert torch.equal(torch.get_rng_state(), before)


def test_networks_without_data_always_fit():
    with torch.device("meta"):
        check_fits(10**15, "a decoder")
    with pytest.raises(UserError, match="a decoder: 1e"):
        check_fits(10**15, "a decoder")


def test_the_bound_is_what_is_free(monkeypatch, tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:       4096 kB\n")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert free_memory() == 4 << 20
    (tmp_path / "memory.max").write_text(f"{3 << 20}\n")
    (tmp_path / "memory.current").write_text(f"{2 << 20}\n")
    (tmp_path / "memory.stat").write_text(
        f"anon 7\nactive_file {1 << 19}\ninactive_file {1 << 19}\n"
    )
    assert free_memory() == 2 << 20, "1 MiB that nobody has, and 1 MiB of cached files"
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory() == 4 << 20
    older = {"limit_in_bytes": 5 << 19, "usage_in_bytes": 2 << 20}
    older["stat"] = f"active_file 1\ntotal_active_file {1 << 18}\ntotal_inactive_file {1 << 18}"
    (tmp_path / "memory").mkdir()
    for name, value in older.items():
        (tmp_path / f"memory/memory.{name}").write_text(f"{value}\n")
    assert free_memory() == 1 << 20
    (tmp_path / "memory/memory.limit_in_bytes").write_text(f"{1 << 63}\n")  # none
    assert free_memory() == 4 << 20
    check_fits(1 << 20, "a network")
    with pytest.raises(UserError, match=r"a network: .* \(1 float32 copy\), but .* are free"):
        check_fits((1 << 20) + 1, "a network")
    with pytest.raises(UserError, match="4 float32 copies"):
        check_fits((1 << 18) + 1, "a network", copies=4)


def test_a_random_decoder_that_does_not_fit(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda _: 20 << 30)
    built = []
    monkeypatch.setattr(nn.Module, "load_state_dict", lambda *_, **__: built.append(1))
    with pytest.raises(UserError, match=r"NXTP's network: 7\.\d+ billion parameters need .* GiB"):
        NetworkOptions().build(Tokens())
    assert not built


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--decoder", "4096", "100000"], "decoder: 100,000 blocks are more than 1000"),
        (["--vision", "0", "2", "3"], r"--vision: expected .* >= 1"),
        (["--decoder", "1000000000", "2"], "--decoder: expected .* <= 131072"),
        (["--decoder_layers", "0"], "--decoder_layers: expected .* >= 1"),
        (["--image_size", "-3"], "--image_size: expected .* >= 1"),
    ],
)
def test_sizes_that_cannot_be(flags, message):
    with pytest.raises(UserError, match=message):
        parse(Recognition.Config, flags)


def test_patches_must_fill_the_image():
    small = NetworkOptions(vision=(64, 1, 14), decoder=(64, 1), image_size=30)
    with pytest.raises(UserError, match="image_size 30: no multiple of the patch size 14"):
        small.build(Tokens())


FUSION = ("vision_width", "vision_depth", "vision_heads", "image_res", "patch_size", "embed_dim")
SIZES = {
    "Pretrain": (*FUSION, "queue_size"),
    "Retrieval": (*FUSION, "queue_size"),
    "Classification": ("image_size", "num_classes", "representation_size"),
    "main": ("image_size", "embed_dim", "text_width", "transformer_layers", "context_length")
    + ("cl2l_hidden_dim", "barlip_proj_dim", "siamlip_hidden_dim", "ssl_mlp_dim", "num_augs"),
    **dict.fromkeys(("VQA", "VE", "NLVR", "Grounding"), FUSION),
    "Recognition": ("max_text", "num_labels", "max_label_len", "max_gen_len", "beam_size"),
}


@pytest.mark.parametrize("script", SIZES)
@pytest.mark.parametrize("value", ["1000000000000", "-1"])
def test_sizes_that_no_network_has(script, value):
    config = importlib.import_module(script).Config
    for option in (*SIZES[script], "workers"):
        with pytest.raises(UserError, match=rf"--{option}: expected a whole number.* >= \d"):
            parse(config, [f"--{option}", value])


@pytest.mark.parametrize("script", SIZES)
def test_batches_that_do_not_fit(script, tmp_path):
    """Before the folder of the run is made."""
    folder = tmp_path / "run"
    config = parse(
        importlib.import_module(script).Config,
        [*NEEDED.get(script, ()), "--output_dir", str(folder), "--batch_size", "1000000000"],
    )
    with pytest.raises(UserError, match=r"batch_size\w* 1,000,000,000: images of .* are free"):
        Run(config, World(0, 1, 0, torch.device("cpu")))
    assert not folder.exists()


@pytest.mark.parametrize("script", ["eval_knn", "eval_zeroshot", "Recognition", "VQA"])
def test_batches_of_an_evaluation_that_do_not_fit(script, capsys):
    """In every script, by its own door, before a checkpoint is read."""
    module = importlib.import_module(script)
    name = "batch_size" if script.startswith("eval") else "batch_size_test"
    words = [f"--{name}", "10000000000", "--checkpoint", "none.pt"]
    words += [] if script.startswith("eval") else ["--evaluate"]
    words += ["--train-data", "a", "--val-data", "b"] if script == "eval_knn" else []
    with pytest.raises(SystemExit, match="2"):
        run_script(module.main, module.Config, argv=words)
    assert f"{name} 10,000,000,000: images of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_labels": 101}, "num_labels 101, but the vocabulary has 100"),
        ({"strategy": "top_k", "top_k": 101}, "top_k 101"),
        ({"strategy": "beam", "beam_size": 100}, "beam_size 100"),
        ({"num_labels": 100, "max_label_len": 1 << 17}, r"1,600 texts of 16 images .* GiB"),
    ],
)
def test_decoding_that_cannot_be(options, message, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda *_: 1 << 30)
    Decoding(num_labels=100).check(vocabulary=100, images=16)
    with pytest.raises(UserError, match=message):
        Decoding(**options).check(vocabulary=100, images=16)


def test_networks_that_do_not_fit(monkeypatch):
    """Counted without memory: 10 ** 11 parameters would be 400 GB."""
    monkeypatch.setattr(memory, "free_memory", lambda *_: 4 << 30)
    wide = parse(importlib.import_module("Retrieval").Config, [])
    wide.image_res, wide.patch_size, wide.vision_stem, wide.embed_dim = 256, 16, [], 256
    wide.vision_width, wide.vision_depth, wide.vision_heads = 768, 12, 12
    wide.bert_config, wide.queue_size = "configs/shared_bert.json", 65536
    retrieval_config(wide, 30522)
    for name, value in (("vision_width", 96_000), ("vision_depth", 200), ("queue_size", 1 << 24)):
        before = getattr(wide, name)
        setattr(wide, name, value)
        with pytest.raises(UserError, match=r"vision transformer, BERT and queues: .* GiB"):
            retrieval_config(wide, 30522)
        setattr(wide, name, before)
    with pytest.raises(UserError, match=r"CLIP_VITB16_CLIP: .* billion parameters"):
        build_dual(DualConfig(model="CLIP_VITB16_CLIP", text_width=65536, text_heads=64))
    with pytest.raises(UserError, match=r"vit-l/16: .* billion parameters"):
        build_classifier(ClassifierConfig(model="vit-l/16", num_classes=1 << 26))


@pytest.mark.parametrize(
    ("key", "value"),
    [("hidden_size", 10**6), ("num_hidden_layers", 10**9), ("vocab_size", "x"), ("hidden_size", 0)],
)
def test_sizes_in_a_bert_json(key, value):
    from models.layers.xbert import BertConfig

    with pytest.raises(UserError, match=f"{key} .* in the BERT JSON: expected 1 to"):
        BertConfig.from_json({"fusion_layer": 6, key: value})


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_memory_that_is_used_up_is_one_sentence(error, capsys):
    def fail(_):
        raise error

    with pytest.raises(SystemExit, match="2"):
        run_script(fail, type("Config", (), {"__dataclass_fields__": {}}), argv=[])
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: out of memory (") and "batch_size smaller" in line
