"""The sides of benchmarks.learning: networks, their training, and how the last checkpoint embeds.

CLIP, ViT-T-8, trains by main.py and by open_clip's own script, which needs `pip install
"open_clip_torch[training]"`, each from its own random weights and with its own choice of what
decays. ALBEF, of two blocks and two layers, trains by Pretrain.py and by the original's own main()
from the same weights, its temperature fixed. A side's `turn` chooses its seed.
"""

import contextlib
import shutil
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

import main as dual_encoder
import Pretrain
from base.pixels import OPENAI
from base.reading import read_json
from base.writing import write_json
from benchmarks.inputs import SMALL_IMAGE, SMALL_VIT, seed_and_run
from benchmarks.runner import OURS, PEER, ROOT
from dataset.text.bpe import ClipTokenizer
from dataset.text.wordpiece import Tokenizer, pre_caption
from models.fusion.config import retrieval_config
from models.fusion.retrieval import Retrieval
from models.weights.albef import start_from
from models.weights.any_dual_encoder import open_dual
from runtime.checkpoint import read_weights, weights_file
from runtime.config.cli import parse

HERE = "benchmarks.learning_sides"
SIDES = {
    "CLIP": {OURS: f"{HERE}:clip_ours", "open_clip": f"{HERE}:clip_open_clip"},
    "ALBEF": {OURS: f"{HERE}:albef_ours", PEER: "benchmarks.peers.albef_learning:train"},
}


def words(template: str, options: SimpleNamespace, **more) -> list[str]:
    """A command line with the options filled in."""
    return [word.format(**vars(options), **more) for word in template.split()]


# ---- CLIP
CONTEXT = 24
SAME = "--batch-size {batch} --epochs {epochs} --lr {lr} --device {device} --seed {seed} "
CLIP_OURS = SAME + (
    "--model ViT-T-8 --image-size 48 --context-length 24 --dataset pairs --root / "
    "--metadata {folder}/train.json --num-augs 0 --weak-min-scale 0.8 --flip false "
    "--warmup {warmup_steps} --lr-start {first_lr} --lr-end 0 --wd 0.1 --eps 1e-6 "
    "--precision fp32 --workers 1 --tensorboard false --resume no --output-dir {run}"
)
CLIP_OPEN_CLIP = SAME + (
    "--model open_clip_small --dataset-type csv --train-data {folder}/train.csv "
    "--aug-cfg scale=(0.8,1.0) --warmup {warmup} --wd 0.1 --beta1 0.9 --beta2 0.98 --eps 1e-6 "
    "--precision fp32 --workers 1 --save-frequency 0 --logs {folder} --name {side}_{seed}"
)
OPEN_CLIP_NETWORK = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 48, "layers": 4, "width": 128, "head_width": 64, "patch_size": 8},
    "text_cfg": {"context_length": CONTEXT, "width": 128, "heads": 2, "layers": 2},
}


def clip_words(options: SimpleNamespace) -> list[str]:
    """The command line of main.py."""
    first = options.lr / max(1, options.warmup)  # where open_clip's warm-up starts
    more = {"warmup_steps": f"{options.warmup} steps", "first_lr": first, **seed_and_run(options)}
    return words(CLIP_OURS, options, **more)


def clip_ours(options: SimpleNamespace) -> dict:
    dual_encoder.main(parse(dual_encoder.Config, clip_words(options)))
    return {}


def clip_open_clip(options: SimpleNamespace) -> dict:
    import open_clip
    from open_clip_train.main import main

    more = seed_and_run(options)
    shutil.rmtree(more["run"], ignore_errors=True)  # it trains into no folder that exists
    network = Path(options.folder, "open_clip_small.json")
    write_json(network, OPEN_CLIP_NETWORK)
    open_clip.add_model_config(network)
    main(words(CLIP_OPEN_CLIP, options, **more))
    return {}


def clip_tokens(texts: list[str]) -> Tensor:
    """Ids int64 [B,L] of CLIP's tokenizer."""
    return ClipTokenizer(None, CONTEXT)(texts, lengths=[CONTEXT])


def open_clip_run(config, run: Path) -> tuple:
    """Functions of a run of either side: images -> {"z": embeddings}, ids -> {"z": embeddings},
    texts -> ids."""
    file = run / f"checkpoints/epoch_{config.epochs}.pt"  # open_clip's
    weights = read_weights(file if file.exists() else weights_file(run))
    model = open_dual(weights, {}, "ViT-T-8", *OPENAI).model
    return model.embed_image, model.embed_text, clip_tokens


# ---- ALBEF
PEER_FILE = "models/model_pretrain.py"  # of the original's checkout
MAX_TOKENS = 25  # written into the original's train()
ENDS = 1e-5  # learning rate at the first and at the last step
WIDTH = SMALL_VIT["embed_dim"]
ALBEF_OURS = (
    "--config {folder}/albef.yaml --text_encoder {data}/tokenizer --device {device} "
    "--method albef --patch_size 8 --vision_depth 2 --vision_heads 4 --max_tokens 25 "
    "--vision_weights none --text_weights none --flip false --augment_level 0 "
    "--crop_scale 0.8 1.0 --decay_everything true --scalar_lr_scale 0 --workers 1 "
    "--tensorboard false --resume no "
)
RUN = "--checkpoint {folder}/start_{seed}.pth --seed {seed} --output_dir {run}"


def prepare_albef(config) -> None:
    """Write what both sides read: BERT's geometry, the original's configuration and the starting
    weights of each seed."""
    tokenizer = Tokenizer(config.data / "tokenizer")
    bert = read_json(ROOT / "configs/bert_small.json", dict)
    bert |= {"vocab_size": tokenizer.vocab_size, "encoder_width": WIDTH, "fusion_layer": 1}
    bert["initializer_range"] = 0.02  # the original's
    write_json(config.folder / "bert.json", bert)
    schedule = {"sched": "cosine", "lr": config.lr, "epochs": config.epochs, "decay_rate": 1}
    schedule |= {"min_lr": ENDS, "warmup_lr": ENDS, "cooldown_epochs": 0}
    schedule["warmup_epochs"] = config.warmup // 100  # stairs of 100 steps in its first epoch
    method = {
        "image_res": SMALL_IMAGE,
        "vision_width": WIDTH,
        "embed_dim": 64,
        "queue_size": 1024,
        "temp": 0.07,
        "mlm_probability": 0.25,
        "momentum": 0.99,
        "alpha": 0.2,
        "train_file": [f"{config.folder}/train.json"],
        "bert_config": f"{config.folder}/bert.json",
        "batch_size": config.batch,
        "optimizer": {"opt": "adamW", "lr": config.lr, "weight_decay": 0.02},
        "schedular": schedule,
    }
    write_json(config.folder / "albef.yaml", method)
    for seed in config.seeds:
        torch.manual_seed(seed)
        model = Pretrain.build_model(albef_recipe(config), tokenizer, None)
        torch.save({"model": model.state_dict()}, config.folder / f"start_{seed}.pth")


def albef_recipe(options, more: str = "", **filled) -> Pretrain.Config:
    """Options of Pretrain.py, which itself says what it notes of them."""
    with contextlib.redirect_stdout(None):
        return parse(Pretrain.Config, words(ALBEF_OURS + more, options, **filled))


def albef_ours(options: SimpleNamespace) -> dict:
    Pretrain.main(albef_recipe(options, RUN, **seed_and_run(options)))
    return {}


def open_albef_run(config, run: Path) -> tuple:
    """Functions of a run of either side, as open_clip_run gives them."""
    file = run / f"checkpoint_{config.epochs - 1:02d}.pth"  # the original's
    tokenizer = Tokenizer(config.data / "tokenizer")
    knobs = SimpleNamespace(**vars(albef_recipe(config)), distill=False)
    model = Retrieval(retrieval_config(knobs, tokenizer.vocab_size)).eval()
    start_from(model, read_weights(file if file.exists() else weights_file(run)), "retrieval")

    def embed_text(ids: Tensor) -> dict[str, Tensor]:
        return {"z": model.encode_text(ids, ids != tokenizer.pad_id)[1]}

    def tokenize(texts: list[str]) -> Tensor:
        return tokenizer([pre_caption(text) for text in texts], MAX_TOKENS, lengths=None)[0]

    return lambda image: {"z": model.encode_image(image)[1]}, embed_text, tokenize
