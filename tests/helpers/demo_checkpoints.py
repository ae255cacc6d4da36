"""Tiny checkpoints with random weights, of every kind that scripts/demo.py opens."""

from dataclasses import asdict
from pathlib import Path

import torch

import Recognition
import Retrieval
import VE
import VQA
from base import distributed
from base.writing import write_json
from dataset.text.sentencepiece import PieceTokenizer
from dataset.text.wordpiece import Tokenizer
from models.dual_encoder.config import DualConfig
from models.dual_encoder.factory import build_dual
from runtime.checkpoint import export_safetensors
from runtime.config.cli import parse
from runtime.config.yaml import to_dict

ROOT = Path(__file__).resolve().parents[2]
SIZES = {
    "image_res": 32,
    "patch_size": 16,
    "vision_width": 32,
    "vision_depth": 2,
    "vision_heads": 2,
    "vision_stem": [],
    "bert_config": ROOT / "configs/bert_debug.json",
    "embed_dim": 16,
    "queue_size": 8,
}
SHAPE = {"image_size": 32, "embed_dim": 16, "text_width": 32, "text_heads": 2, "context_length": 16}


def fusion(task: str, data: Path, file: Path) -> Path:
    """A checkpoint of Retrieval.py, VQA.py or VE.py on DigitScenes in `data`."""
    script = {"retrieval": Retrieval, "vqa": VQA, "ve": VE}[task]
    config = script.Config(**SIZES, text_encoder=str(data / "tokenizer"))
    torch.manual_seed(0)
    tokenizer = Tokenizer(config.text_encoder)
    if task == "vqa":
        config.answer_list = data / "answer_list.json"
        model = VQA.build_model(config, tokenizer, {})
    else:
        model = script.build_model(config, tokenizer)
    torch.save({"model": model.state_dict(), "config": to_dict(config)}, file)
    return file


def dual(folder: Path, name: str = "CLIP_VITT8_CLIP") -> Path:
    """The folder of a run of main.py."""
    torch.manual_seed(0)
    config = DualConfig(model=name, transformer_layers=1, **SHAPE)
    export_safetensors(build_dual(config).state_dict(), folder / "model.safetensors")
    write_json(folder / "config.yaml", {"network": asdict(config)})  # JSON is YAML
    return folder


def align(data: Path, folder: Path) -> Path:
    """The folder of a run of main.py that trained ALIGN."""
    torch.manual_seed(0)
    vocabulary = Tokenizer(data / "tokenizer").vocab_size
    sizes = {"image_size": 32, "embed_dim": 8, "context_length": 24, "vocab_size": vocabulary}
    config = DualConfig(model="ALIGN_NANO_TINY", **sizes)
    export_safetensors(build_dual(config).state_dict(), folder / "model.safetensors")
    about = {"network": asdict(config), "tokenizer": str(data / "tokenizer")}
    write_json(folder / "config.yaml", about)
    return folder


def nxtp(data: Path, file: Path) -> Path:
    """A checkpoint of Recognition.py."""
    flags = ["--config", str(ROOT / "configs/Recognition/debug.yaml"), "--device", "cpu"]
    config = parse(Recognition.Config, flags)
    config.tokenizer = data / "nxtp/tokenizer.model"
    torch.manual_seed(0)
    tokenizer = PieceTokenizer(config.tokenizer)
    model = Recognition.build_model(config, tokenizer, distributed.init("cpu"))
    torch.save({"model": model.state_dict(), "config": to_dict(config)}, file)
    return file
