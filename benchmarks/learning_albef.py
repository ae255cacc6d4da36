"""benchmarks.learning --peer: a small ALBEF, its starting weights and both sides' commands."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from base.files import write_json
from benchmarks.runner import device_of
from dataset.text.wordpiece import Tokenizer, pre_caption
from models.fusion.config import retrieval_config
from models.fusion.retrieval import Retrieval
from models.fusion.simla import Simla, SimlaConfig
from models.layers.vit import ViTConfig
from models.layers.xbert import BertConfig
from models.weights.albef import start_from
from runtime.checkpoint import read_weights, weights_file

CHECKOUT_FILE = "models/model_pretrain.py"
IMAGE_SIZE, PATCH, WIDTH, LAYERS, HEADS = 48, 8, 96, 2, 4
MAX_TOKENS = 25  # written into the original's train()
CROP = [0.8, 1.0]  # area of the image
START, END = 1e-5, 1e-5  # learning rates at the first and at the last step
BERT = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 4 * WIDTH,
    "max_position_embeddings": 128,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "layer_norm_eps": 1e-12,
    "initializer_range": 0.02,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "encoder_width": WIDTH,
    "fusion_layer": LAYERS // 2,
}
METHOD = {  # under the names that both sides give them
    "image_res": IMAGE_SIZE,
    "vision_width": WIDTH,
    "embed_dim": 64,
    "queue_size": 1024,
    "temp": 0.07,
    "mlm_probability": 0.25,
    "momentum": 0.99,
    "alpha": 0.2,
}


def tokenizer_of(config) -> Path:
    """Folder of the WordPiece tokenizer of both sides."""
    return (config.text_encoder or config.image_root / "tokenizer").absolute()


def prepare(config, seed: int) -> Path:
    """Write the geometry of BERT and the starting weights of a seed; returns the weights' file."""
    tokenizer = Tokenizer(tokenizer_of(config))
    bert = {**BERT, "vocab_size": tokenizer.vocab_size}
    write_json(config.folder / "bert.json", bert)
    torch.manual_seed(seed)
    network = SimlaConfig(
        vit=ViTConfig(IMAGE_SIZE, PATCH, WIDTH, LAYERS, HEADS),
        bert=BertConfig.from_json(bert),
        embed_dim=METHOD["embed_dim"],
        queue_size=METHOD["queue_size"],
        temp=METHOD["temp"],
        mim=False,
        keywords=0,
        special_ids=tuple(tokenizer.special_ids),
        cls_id=tokenizer.cls_id,
    )
    start = (config.folder / f"start_{seed}.pth").absolute()
    torch.save({"model": Simla(network).state_dict()}, start)
    return start


def train_ours(config, run: Path, seed: int) -> list[str]:
    """The command that trains Pretrain.py's ALBEF into the folder `run`."""
    options = {
        **METHOD,
        "method": "albef",
        "checkpoint": prepare(config, seed),
        "train_file": config.folder / "train.json",
        "text_encoder": tokenizer_of(config),
        "bert_config": config.folder / "bert.json",
        "patch_size": PATCH,
        "vision_depth": LAYERS,
        "vision_heads": HEADS,
        "max_tokens": MAX_TOKENS,
        "flip": "false",
        "augment_level": 0,
        "batch_size": config.batch,
        "duration": f"{config.epochs} epochs",
        "warmup": f"{config.warmup} steps",
        "lr": config.lr,
        "warmup_lr": START,
        "min_lr": END,
        "weight_decay": 0.02,
        "clip_grad_norm": 0,
        "device": device_of(config),
        "workers": 1,
        "tensorboard": "false",
        "seed": seed,
        "resume": "no",
        "output_dir": run,
    }
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return [sys.executable, "Pretrain.py", *flags, "--crop_scale", *map(str, CROP)]


def train_original(config, run: Path, seed: int) -> list[str]:
    """The command that trains the original's ALBEF into the folder `run` by its own main()."""
    schedule = {
        "sched": "cosine",
        "lr": config.lr,
        "epochs": config.epochs,
        "min_lr": END,
        "decay_rate": 1,
        "warmup_lr": START,
        "warmup_epochs": config.warmup // 100,  # stairs of 100 steps in its first epoch
        "cooldown_epochs": 0,
    }
    method = {
        **METHOD,
        "train_file": [str(config.folder / "train.json")],
        "bert_config": str(config.folder / "bert.json"),
        "batch_size": config.batch,
        "optimizer": {"opt": "adamW", "lr": config.lr, "weight_decay": 0.02},
        "schedular": schedule,
    }
    device = device_of(config)
    options = {
        "peer": config.peer,
        "peer_python": config.peer_python,
        "config": method,
        "vision": {"patch_size": PATCH, "embed_dim": WIDTH, "depth": LAYERS, "num_heads": HEADS},
        "crop_scale": CROP,
        "text_encoder": str(tokenizer_of(config) / "tokenizer.json"),
        "start": str(prepare(config, seed)),
        "run": str(run),
        "device": device,
        "backend": "nccl" if device == "cuda" else "gloo",
        "seed": seed,
    }
    python = config.peer_python or sys.executable
    function = "benchmarks.peers.albef_learning:train"
    return [python, "-m", "benchmarks.child", function, json.dumps(options)]


def open_checkpoint(config, file: Path) -> tuple:
    """`(embed images, embed texts, tokenize)` of either side's checkpoint by one network."""
    tokenizer = Tokenizer(tokenizer_of(config))
    options = SimpleNamespace(
        **METHOD,
        patch_size=PATCH,
        vision_depth=LAYERS,
        vision_heads=HEADS,
        vision_stem=(),
        bert_config=config.folder / "bert.json",
        distill=False,
        compat="none",
    )
    model = Retrieval(retrieval_config(options, tokenizer.vocab_size)).eval()
    start_from(model, read_weights(file), "retrieval")

    def embed_image(image: Tensor) -> Tensor:
        return model.encode_image(image)[1]

    def embed_text(ids: Tensor) -> Tensor:
        return model.encode_text(ids, ids != tokenizer.pad_id)[1]

    def tokenize(texts: list[str]) -> Tensor:
        return tokenizer([pre_caption(text) for text in texts], MAX_TOKENS, lengths=None)[0]

    return embed_image, embed_text, tokenize


def open_ours(config, run: Path) -> tuple:
    """What `open_checkpoint` makes of Pretrain.py's newest checkpoint."""
    return open_checkpoint(config, weights_file(run))


def open_original(config, run: Path) -> tuple:
    """What `open_checkpoint` makes of the original's last checkpoint."""
    return open_checkpoint(config, run / f"checkpoint_{config.epochs - 1:02d}.pth")


SIDES = {"ours": (train_ours, open_ours), "original": (train_original, open_original)}
