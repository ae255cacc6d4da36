"""Speed and memory of a pre-training step: ViT-B/16 + BERT-base SIMLA or ALBEF at 256 px, ours and
the original's.

    python -m benchmarks.pretrain --system simla --batch 4                        # ours alone
    python -m benchmarks.pretrain --peer PATH/TO/SIMLA                            # against a checkout, alternating
    python -m benchmarks.pretrain --peer PATH/TO/ALBEF --system albef --precision bf16 --activation-checkpointing
    python -m benchmarks.pretrain --peer PATH/TO/SIMLA --check                    # do both compute the same losses?

A step is momentum update, forward, backward, gradient norm and AdamW on captions of 25 tokens, for
SIMLA with the image tokenizer (DALL-E's encoder, full size). Weights are random, nothing is
downloaded. --precision, --compile and --activation-checkpointing are ours.

--peer runs github.com/codezakh/SIMLA or github.com/salesforce/ALBEF. Their numeric code runs
unchanged; small stand-ins take the place of the old libraries around it. --peer-python PYTHON uses
the libraries of another interpreter instead (transformers 4.28.1, timm 0.4.12 were tried).
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from base.distributed import World
from base.errors import UserError
from benchmarks.gauge import measure
from benchmarks.inputs import ALPHA, QUEUE_SIZE, synthetic_batch
from benchmarks.runner import OURS, Side, TrainOptions, check_peer, device_of, run_side
from benchmarks.steps import mfu
from benchmarks.table import compare_steps, markdown, publish, settings
from models.fusion.dvae import ImageTokenizer, TokenizerConfig
from models.fusion.momentum import MomentumPairs
from models.fusion.simla import Simla, SimlaConfig
from models.layers.vit import ViTConfig
from models.layers.xbert import BertConfig
from runtime.config.cli import knob, run_script
from runtime.log import training_flops
from runtime.optim.build import Optimizer, Precision, build_optimizer
from runtime.parallel import Features, parallelize

PEER = "original"
CHECKOUT_FILES = {"simla": "models/simla/pretrain.py", "albef": "models/model_pretrain.py"}


@dataclass
class Config(TrainOptions):
    """What to measure."""

    system: str = knob("simla", "which model", choices=("simla", "albef"))
    batch: int = knob(4, f"samples a step; with --peer a divisor of {QUEUE_SIZE}", low=2)
    compat: str = knob(
        "none", "ours: original = with the original's defects", choices=("none", "original")
    )
    peer_precision: str = knob(
        "fp32", "original: fp32 as published, or with TF32 products", choices=("fp32", "tf32")
    )
    check: bool = knob(
        False, "compare the losses of both sides on equal weights instead of measuring"
    )


def model_config(options: SimpleNamespace) -> SimlaConfig:
    """SIMLA or ALBEF at full size, or tiny."""
    simla = options.system == "simla"
    config = SimlaConfig() if simla else SimlaConfig.albef()
    config.queue_size = QUEUE_SIZE
    config.compat = options.compat
    if options.tiny:
        config.queue_size = 64
        config.vit = ViTConfig(width=32, depth=2, heads=2, mask_token=simla)
        config.bert = BertConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            encoder_width=32,
            single_stream=simla,
            fusion_layer=0 if simla else 1,
        )
    return config


def build_tokenizer(options: SimpleNamespace) -> ImageTokenizer:
    """The image tokenizer with DALL-E's full-size encoder, random weights, in the type of the
    run."""
    dtypes = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    config = TokenizerConfig(width=8) if options.tiny else TokenizerConfig()
    return ImageTokenizer(config, with_decoder=False).freeze(dtypes[options.precision])


def training_batch(options: SimpleNamespace) -> dict[str, Tensor]:
    """The common batch under the names of the model's forward, masked positions padded to a
    multiple of 32."""
    batch = synthetic_batch(options.batch)
    labels = batch["mlm_labels"].flatten()
    positions = (labels >= 0).nonzero().flatten()
    padding = (0, -len(positions) % 32)
    batch["mlm_positions"] = nn.functional.pad(positions, padding)
    batch["mlm_labels"] = nn.functional.pad(labels[positions], padding, value=-100)
    batch["alpha"] = torch.tensor(ALPHA)
    if options.system == "albef":
        del batch["token_image"]
        del batch["patch_mask"]
    return {name: value.to(options.device) for name, value in batch.items()}


def ours(options: SimpleNamespace) -> dict:
    """A training step as Pretrain.py takes it."""
    torch.manual_seed(0)
    device = torch.device(options.device)
    model = Simla(model_config(options)).train()
    batch = training_batch(options)
    tokenizer = None
    if options.system == "simla":
        tokenizer = build_tokenizer(options).to(device)
        token_image = batch.pop("token_image")
        batch["visual_codes"] = torch.zeros_like(batch["patch_mask"], dtype=torch.int64)
    features = Features(
        compile=options.compile, activation_checkpointing=options.activation_checkpointing
    )
    model = parallelize(model, World(0, 1, 0, device), features)
    pairs = MomentumPairs(model)
    precision = Precision(options.precision, device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = build_optimizer(model, Optimizer())

    def step() -> None:
        if tokenizer is not None:
            batch["visual_codes"] = tokenizer.codes(token_image).flatten(1)
        pairs.update()
        with precision.autocast():
            losses = model(**batch)
        precision.backward(sum(losses.values()))
        precision.step(optimizer, parameters)

    result = measure(step, options)
    with torch.device("meta"):  # counted last and without weights: must not raise the peak
        flops = training_flops(Simla(model_config(options)).train(), batch)
    result["mfu"] = mfu(flops, result, options)
    result["parameters"] = sum(parameter.numel() for parameter in parameters)
    return result


def our_losses(options: SimpleNamespace) -> dict:
    """Losses with the peer's weights and codes, no dropout, the likeliest negatives."""
    file = Path(options.exchange) / "peer.pt"
    saved = torch.load(file, weights_only=True, mmap=True, map_location=options.device)
    model = Simla(model_config(SimpleNamespace(**{**vars(options), "compat": "original"})))
    model = model.to(options.device).eval()
    model.load_state_dict(saved["model"])
    batch = training_batch(options)
    if batch.pop("token_image", None) is not None:
        batch["visual_codes"] = saved["visual_codes"]
    del saved

    def likeliest(i2t: Tensor, t2i: Tensor, same: Tensor) -> tuple[Tensor, Tensor]:
        images = t2i.masked_fill(same, -torch.inf).argmax(-1)
        texts = i2t.masked_fill(same, -torch.inf).argmax(-1)
        return images, texts

    model.draw_negatives = likeliest
    MomentumPairs(model).update()
    with torch.no_grad():
        losses = model(**batch)
    return {"losses": {name: loss.item() for name, loss in losses.items()}}


def check_config(config: Config) -> None:
    """Raise UserError if the settings cannot be measured."""
    if config.check and not config.peer:
        raise UserError("--check compares with the original: name its checkout with --peer PATH")
    check_peer(config, CHECKOUT_FILES[config.system], config.system.upper())
    if config.peer and QUEUE_SIZE % config.batch:
        raise UserError(
            f"--batch {config.batch}: the original's queue wants a divisor of {QUEUE_SIZE}"
        )


def compare_losses(config: Config) -> str:
    """Table of both sides' losses with equal weights, masks and negatives, no dropout."""
    with tempfile.TemporaryDirectory() as folder:
        peer = run_side(
            Side(PEER, "benchmarks.peers.fusion:losses", True), config, exchange=folder
        )["losses"]
        mine = run_side(Side(OURS, "benchmarks.pretrain:our_losses"), config, exchange=folder)
    rows = []
    for name, theirs in peer.items():
        value = mine["losses"][name]
        difference = abs(value - theirs) / abs(theirs)
        rows.append([name, f"{value:.7g}", f"{theirs:.7g}", f"{difference:.1e}"])
    text = "The original's weights in both, ours with `compat: original`; no dropout, equal masks "
    text += "and negatives.\n\n"
    return text + markdown(["loss", OURS, PEER, "relative difference"], rows)


def main(config: Config) -> None:
    check_config(config)
    system = config.system.upper()
    if config.check:
        title = [system, "same losses", f"batch {config.batch}", device_of(config)]
        publish(config, "pretrain", title, compare_losses(config), load=None)
        return
    title = [system, *settings(config)]
    sides = [Side(OURS, "benchmarks.pretrain:ours")]
    if config.peer:
        title.append(f"original in {config.peer_precision}")
        sides.append(Side(PEER, "benchmarks.peers.fusion:step", original=True))
    if config.compat != "none":
        title.append("compat original")
    compare_steps(config, "pretrain", title, sides)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
