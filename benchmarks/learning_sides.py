"""The sides of benchmarks.learning: the command that trains each, and how its last checkpoint embeds.

A command is made by a function of the options, the folder `run` that it trains into and the seed.
`open_clip(config, run)` and `open_albef(config, run)` give functions: images -> {"z": embeddings},
ids -> {"z": embeddings}, texts -> ids. They open the checkpoints of both sides in one network.
"""

import contextlib
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

import Pretrain
from base.pixels import OPENAI
from base.writing import write_json
from benchmarks.runner import OURS, PEER, child_command, device_of
from dataset.text.bpe import ClipTokenizer
from dataset.text.wordpiece import Tokenizer, pre_caption
from models.fusion.config import retrieval_config
from models.fusion.retrieval import Retrieval
from models.layers.xbert import BertConfig
from models.weights.albef import start_from
from models.weights.any_dual_encoder import open_dual
from runtime.checkpoint import read_weights, weights_file
from runtime.config.cli import parse

IMAGE_SIZE = 48


def flags(**values) -> list[str]:
    """--NAME VALUE ..., as a command line has them."""
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def same(config, seed: int) -> dict:
    """Options that main.py and open_clip call the same."""
    return {
        "batch-size": config.batch,
        "epochs": config.epochs,
        "lr": config.lr,
        "device": device_of(config),
        "seed": seed,
    }


# ---- CLIP by main.py and by open_clip
CONTEXT = 24
CLIP_OURS = (
    "main.py --model ViT-T-8 --image-size 48 --context-length 24 --dataset pairs --root / "
    "--num-augs 0 --weak-min-scale 0.8 --flip false --lr-end 0 --wd 0.1 --eps 1e-6 "
    "--precision fp32 --workers 1 --tensorboard false --resume no"
)
CLIP_OPEN_CLIP = (
    "--model open_clip_small --dataset-type csv --aug-cfg scale=(0.8,1.0) --wd 0.1 --beta1 0.9 "
    "--beta2 0.98 --eps 1e-6 --precision fp32 --workers 1 --save-frequency 0"
)
OPEN_CLIP_NETWORK = {  # ViT-T-8 of models.layers.openai_towers
    "embed_dim": 128,
    "vision_cfg": {"image_size": 48, "layers": 4, "width": 128, "head_width": 64, "patch_size": 8},
    "text_cfg": {"context_length": CONTEXT, "width": 128, "heads": 2, "layers": 2},
}
START_OPEN_CLIP = (
    "import sys, open_clip; open_clip.add_model_config(sys.argv.pop(1)); "
    "from open_clip_train.main import main; main(sys.argv[1:])"
)


def clip_ours(config, run: Path, seed: int) -> list[str]:
    more = {
        "metadata": config.folder / "train.json",
        "warmup": f"{config.warmup} steps",
        "lr-start": config.lr / max(1, config.warmup),  # where open_clip's warm-up starts
        "output-dir": run,
    }
    return [sys.executable, *CLIP_OURS.split(), *flags(**same(config, seed), **more)]


def clip_open_clip(config, run: Path, seed: int) -> list[str]:
    network = config.folder / "open_clip_small.json"
    write_json(network, OPEN_CLIP_NETWORK)
    more = {
        "train-data": config.folder / "train.csv",
        "warmup": config.warmup,
        "logs": run.parent,
        "name": run.name,
    }
    words = [str(network), *CLIP_OPEN_CLIP.split(), *flags(**same(config, seed), **more)]
    return [sys.executable, "-c", START_OPEN_CLIP, *words]


def clip_tokens(texts: list[str]) -> Tensor:
    """Ids int64 [B,L] of CLIP's tokenizer."""
    return ClipTokenizer(None, CONTEXT)(texts, lengths=[CONTEXT])


def open_clip(config, run: Path) -> tuple:
    file = run / f"checkpoints/epoch_{config.epochs}.pt"  # open_clip's
    weights = read_weights(file if file.exists() else weights_file(run))
    model = open_dual(weights, {}, "ViT-T-8", *OPENAI).model
    return model.embed_image, model.embed_text, clip_tokens


# ---- ALBEF by Pretrain.py and by the original
ALBEF_FILE = "models/model_pretrain.py"  # of the original's checkout
MAX_TOKENS = 25  # written into the original's train()
CROP = [0.8, 1.0]  # area of the image
ENDS = 1e-5  # learning rate at the first and at the last step
VISION = {"patch_size": 8, "embed_dim": 96, "depth": 2, "num_heads": 4}  # in the original's code
ALBEF_OURS = (
    "--method albef --patch_size 8 --vision_depth 2 --vision_heads 4 --max_tokens 25 "
    "--vision_weights none --text_weights none --flip false --augment_level 0 "
    "--crop_scale 0.8 1.0 --decay_everything true --scalar_lr_scale 0 --workers 1 "
    "--tensorboard false --resume no"
)


def tokenizer_of(config) -> Path:
    """Folder of the WordPiece tokenizer of both sides."""
    return (config.text_encoder or config.image_root / "tokenizer").absolute()


def albef_config(config) -> dict:
    """The original's configuration, of both sides; writes the geometry of BERT that it names."""
    width, layers = VISION["embed_dim"], VISION["depth"]
    bert = BertConfig(
        vocab_size=Tokenizer(tokenizer_of(config)).vocab_size,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=VISION["num_heads"],
        intermediate_size=4 * width,
        max_position_embeddings=128,
        encoder_width=width,
        single_stream=False,
        fusion_layer=layers // 2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.02,
    )
    write_json(config.folder / "bert.json", {**asdict(bert), "hidden_act": "gelu"})
    schedule = {
        "sched": "cosine",
        "lr": config.lr,
        "epochs": config.epochs,
        "min_lr": ENDS,
        "decay_rate": 1,
        "warmup_lr": ENDS,
        "warmup_epochs": config.warmup // 100,  # stairs of 100 steps in its first epoch
        "cooldown_epochs": 0,
    }
    return {
        "train_file": [str(config.folder / "train.json")],
        "bert_config": str(config.folder / "bert.json"),
        "image_res": IMAGE_SIZE,
        "vision_width": width,
        "embed_dim": 64,
        "queue_size": 1024,
        "temp": 0.07,
        "mlm_probability": 0.25,
        "momentum": 0.99,
        "alpha": 0.2,
        "batch_size": config.batch,
        "optimizer": {"opt": "adamW", "lr": config.lr, "weight_decay": 0.02},
        "schedular": schedule,
    }


def pretrain_flags(config) -> list[str]:
    """The flags of Pretrain.py; writes the configuration that they name."""
    file = config.folder / "albef.yaml"
    write_json(file, albef_config(config))
    more = flags(config=file, text_encoder=tokenizer_of(config), device=device_of(config))
    return [*more, *ALBEF_OURS.split()]


def recipe_of(config) -> Pretrain.Config:
    """Options of Pretrain.py, which itself says what it notes of them."""
    with contextlib.redirect_stdout(None):
        return parse(Pretrain.Config, pretrain_flags(config))


def write_start(config, seed: int) -> Path:
    """Write the starting weights of a seed; returns their file."""
    torch.manual_seed(seed)
    model = Pretrain.build_model(recipe_of(config), Tokenizer(tokenizer_of(config)), None)
    start = (config.folder / f"start_{seed}.pth").absolute()
    torch.save({"model": model.state_dict()}, start)
    return start


def albef_ours(config, run: Path, seed: int) -> list[str]:
    more = flags(checkpoint=write_start(config, seed), seed=seed, output_dir=run)
    return [sys.executable, "Pretrain.py", *pretrain_flags(config), *more]


def albef_original(config, run: Path, seed: int) -> list[str]:
    given = {
        **asdict(config),
        "config": albef_config(config),
        "vision": VISION,
        "crop_scale": CROP,
        "text_encoder": tokenizer_of(config) / "tokenizer.json",
        "start": write_start(config, seed),
        "run": run,
        "device": device_of(config),
        "seed": seed,
    }
    return child_command("benchmarks.peers.albef_learning:train", given)


def open_albef(config, run: Path) -> tuple:
    file = run / f"checkpoint_{config.epochs - 1:02d}.pth"  # the original's
    tokenizer = Tokenizer(tokenizer_of(config))
    knobs = SimpleNamespace(**vars(recipe_of(config)), distill=False)
    network = retrieval_config(knobs, tokenizer.vocab_size)
    model = Retrieval(network).eval()
    start_from(model, read_weights(file if file.exists() else weights_file(run)), "retrieval")

    def embed_image(image: Tensor) -> dict[str, Tensor]:
        return {"z": model.encode_image(image)[1]}

    def embed_text(ids: Tensor) -> dict[str, Tensor]:
        return {"z": model.encode_text(ids, ids != tokenizer.pad_id)[1]}

    def tokenize(texts: list[str]) -> Tensor:
        return tokenizer([pre_caption(text) for text in texts], MAX_TOKENS, lengths=None)[0]

    return embed_image, embed_text, tokenize


COMMANDS = {
    "CLIP": {OURS: clip_ours, "open_clip": clip_open_clip},
    "ALBEF": {OURS: albef_ours, PEER: albef_original},
}
OPEN = {"CLIP": open_clip, "ALBEF": open_albef}
