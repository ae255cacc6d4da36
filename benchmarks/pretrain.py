"""Speed and memory of a pre-training step: ViT-B/16 + BERT-base SIMLA or ALBEF at 256 px.

    python -m benchmarks.pretrain                               # ours alone
    python -m benchmarks.pretrain --peer PATH/TO/ALBEF --system albef --precision bf16
    python -m benchmarks.pretrain --peer PATH/TO/SIMLA --check  # do both compute the same losses?

A step is momentum update, forward, backward, gradient norm and AdamW on captions of 25 tokens, for
SIMLA with the image tokenizer (DALL-E's encoder). --precision, --compile and
--activation-checkpointing are ours.

--peer runs github.com/codezakh/SIMLA or github.com/salesforce/ALBEF: their numeric code unchanged,
with stand-ins for the old libraries around it, or by --peer-python with those of another
interpreter (transformers 4.28.1, timm 0.4.12 were tried).
"""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
from torch import Tensor

from base.errors import UserError
from benchmarks.inputs import ALPHA, QUEUE_SIZE, left, synthetic_batch
from benchmarks.runner import OURS, PEER, TrainOptions, check_peer, device_of, take_turns
from benchmarks.steps import compare_steps, mfu, settings, training_step
from benchmarks.table import Column, publish
from dataset.text.wordpiece import mlm_targets
from models.fusion.dvae import ImageTokenizer, TokenizerConfig
from models.fusion.momentum import MomentumPairs
from models.fusion.simla import Simla, SimlaConfig
from runtime.config.cli import knob, run_script
from runtime.flops import training_flops
from runtime.optim.build import Optimizer

CHECKOUT_FILES = {"simla": "models/simla/pretrain.py", "albef": "models/model_pretrain.py"}


@dataclass
class Config(TrainOptions):
    system: str = knob("simla", "which model", choices=("simla", "albef"))
    batch: int = knob(4, f"samples a step; with --peer a divisor of {QUEUE_SIZE}", low=2)
    same_losses: bool = knob(
        False, "compare both sides' losses on equal weights, measure nothing", aliases=("check",)
    )


def model_config(options: SimpleNamespace, compat: str = "none") -> SimlaConfig:
    """SIMLA or ALBEF at full size, or with two layers of width 32."""
    config = SimlaConfig() if options.system == "simla" else SimlaConfig.albef()
    config.queue_size = 64 if options.tiny else QUEUE_SIZE
    config.compat = compat
    if options.tiny:
        vit, bert = config.vit, config.bert
        vit.width = bert.hidden_size = bert.encoder_width = 32
        vit.depth = bert.num_hidden_layers = 2
        vit.heads = bert.num_attention_heads = 2
        bert.intermediate_size = 64
        bert.fusion_layer = min(bert.fusion_layer, 1)
    return config


def training_batch(options: SimpleNamespace) -> dict[str, Tensor]:
    """The common batch as the model's forward takes it."""
    batch = synthetic_batch(options.batch)
    batch["mlm_positions"], batch["mlm_labels"] = mlm_targets(batch["mlm_labels"])
    batch["alpha"] = torch.tensor(ALPHA)
    if options.system == "albef":
        del batch["token_image"], batch["patch_mask"]
    return {name: value.to(options.device) for name, value in batch.items()}


def ours(options: SimpleNamespace) -> dict:
    """A training step as Pretrain.py takes it."""
    torch.manual_seed(0)
    model = Simla(model_config(options)).to(options.device)
    batch = training_batch(options)
    token_image = batch.pop("token_image", None)
    if token_image is not None:
        config = TokenizerConfig(width=8) if options.tiny else TokenizerConfig()
        tokenizer = ImageTokenizer(config, with_decoder=False).freeze(options.precision)
        tokenizer = tokenizer.to(options.device)
        if options.compile:
            tokenizer.compiled()
    pairs = MomentumPairs(model)

    def before() -> None:
        if token_image is not None:
            positions = batch["mim_positions"] = model.mim_positions(batch["patch_mask"])
            batch["visual_codes"] = tokenizer.codes_at(token_image, positions)
        pairs.update()

    result = training_step(
        model, batch, lambda losses: sum(losses.values()), Optimizer(), options, before=before
    )
    with torch.device("meta"):  # counted last and without weights: must not raise the peak
        flops = training_flops(Simla(model_config(options)).train(), batch)
    result["mfu"] = mfu(flops, result, options)
    return result


def our_losses(options: SimpleNamespace) -> dict:
    """Losses with the peer's weights and codes, no dropout, the likeliest negatives."""
    saved = left(options)
    model = Simla(model_config(options, compat="original")).to(options.device).eval()
    model.load_state_dict(saved["model"])
    batch = training_batch(options)
    if batch.pop("token_image", None) is not None:
        batch["visual_codes"] = saved["visual_codes"].to(options.device)

    def likeliest(i2t: Tensor, t2i: Tensor, same: Tensor) -> tuple[Tensor, Tensor]:
        images = t2i.masked_fill(same, -torch.inf).argmax(-1)
        texts = i2t.masked_fill(same, -torch.inf).argmax(-1)
        return images, texts

    model.sample_negatives = likeliest
    MomentumPairs(model).update()
    with torch.no_grad():
        losses = model(**batch)
    return {"losses": {name: loss.item() for name, loss in losses.items()}}


def compare_losses(config: Config) -> None:
    """Publish both sides' losses with equal weights, masks and negatives, no dropout."""
    # the original first, it leaves the weights
    sides = {PEER: "benchmarks.peers.fusion:losses", OURS: "benchmarks.pretrain:our_losses"}
    results = take_turns(replace(config, repeats=1, busy=True), sides)
    ours, theirs = (runs[0]["losses"] for runs in results.values())
    difference = {name: abs(ours[name] - value) / abs(value) for name, value in theirs.items()}
    results = {OURS: [ours], PEER: [theirs], "relative difference": [difference]}
    columns = [Column(name, name, "{:.7g}") for name in theirs]
    title = [config.system.upper(), "same losses", f"batch {config.batch}", device_of(config)]
    remark = "The original's weights in both, ours with `compat: original`; no dropout, "
    remark += "equal masks and negatives."
    publish(config, "pretrain", title, results, columns, remark)


def main(config: Config) -> None:
    if config.same_losses and not config.peer:
        raise UserError("--check compares with the original: name its checkout with --peer PATH")
    check_peer(config, CHECKOUT_FILES[config.system], config.system.upper())
    if config.peer and QUEUE_SIZE % config.batch:
        raise UserError(f"--batch {config.batch}: the original wants a divisor of {QUEUE_SIZE}")
    if config.same_losses:
        compare_losses(config)
        return
    title = [config.system.upper(), *settings(config)]
    sides = {OURS: "benchmarks.pretrain:ours"}
    if config.peer:
        title.append("original in fp32")
        sides[PEER] = "benchmarks.peers.fusion:step"
    compare_steps(config, "pretrain", title, sides)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
