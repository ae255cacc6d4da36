"""Speed and memory of a dual encoder's training step, ViT-B/16.

    python -m benchmarks.dual                             # CLIP beside open_clip
    python -m benchmarks.dual --peer PATH/TO/clip-rocket  # CL2L with two local views, beside it
    python -m benchmarks.dual --tokens 77                 # captions that fill the whole context

A step is forward, contrastive loss, backward, gradient norm and fused AdamW, by one loop, on random
images of 224 px. Captions have 8 tokens to --tokens; the others always compute all 77 positions,
ours the longest caption, rounded up to a multiple of 8, as main.py's loader pads. Networks and
losses of github.com/facebookresearch/clip-rocket run as they are. --precision and --compile are for
all sides, --activation-checkpointing is ours.
"""

import importlib
import math
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from benchmarks.inputs import CONTEXT, random_batch
from benchmarks.peers.stand_ins import open_checkout, stand_in
from benchmarks.runner import OURS, TrainOptions, check_peer
from benchmarks.steps import ADAMW, compare_steps, mfu, settings, training_step
from main import total_loss
from models.dual_encoder.config import DualConfig
from models.dual_encoder.factory import build_dual
from runtime.config.cli import knob, run_script
from runtime.flops import training_flops


@dataclass
class Config(TrainOptions):
    tokens: int = knob(24, "longest caption in tokens, start and end included", low=8, high=77)


def ours(options: SimpleNamespace) -> dict:
    """A step of our CLIP, or with --peer of CL2L."""
    torch.manual_seed(0)
    kind = {"model": "CLIP_VITB16_CLIP"}
    if options.peer:
        kind = {"model": "CL2L_VITB16_CL2L", "separate_proj": True, "loss_avg_or_sum": "sum"}
    elif options.tiny:
        kind = {"model": "CLIP_VITT8_CLIP", "image_size": 32, "transformer_layers": 2}
    config = DualConfig(embed_dim=512, **kind)
    model = build_dual(config)
    batch = random_batch(options)
    length = min(CONTEXT, 8 * math.ceil(options.tokens / 8))
    batch["text_ids"] = batch["text_ids"][..., :length].contiguous()
    flops = training_flops(model, batch)
    result = training_step(model, batch, lambda found: total_loss(found, config), ADAMW, options)
    result["mfu"] = mfu(flops, result, options)
    return result


def open_clip(options: SimpleNamespace) -> dict:
    """A step of open_clip's ViT-B-16 under its ClipLoss."""
    import open_clip as library

    torch.manual_seed(0)
    if options.tiny:
        vision = {"image_size": 32, "layers": 4, "width": 128, "head_width": 32, "patch_size": 8}
        model = library.CLIP(512, vision, {"layers": 2})
    else:
        model = library.create_model("ViT-B-16")
    options.activation_checkpointing = False  # is ours
    batch = random_batch(options)
    batch["text"] = batch.pop("text_ids")
    criterion = library.ClipLoss()
    return training_step(model, batch, lambda found: criterion(*found[:3]), ADAMW, options)


def clip_rocket(options: SimpleNamespace) -> dict:
    """A step of the checkout's CL2L under its loss, as its command line makes them. Replaced are
    libraries that they do not use, and timm's table of networks."""
    torch.manual_seed(0)
    batch = random_batch(options)
    open_checkout(options.peer)
    for unused in ("xformers.ops", "tkinter", "tokenizer", "datasets"):
        stand_in(unused)
    importlib.import_module("timm.models.registry")
    script = importlib.import_module("main")
    vit_b16 = importlib.import_module("vit").VisionTransformer
    script.models.timm.create_model = lambda name, **given: vit_b16(num_classes=0)
    words = "--model CL2L_VITB16_CL2L --embed-dim 512 --separate-proj --loss-avg-or-sum sum"
    args = script.get_args_parser().parse_args(words.split())
    model, criterion = script.models.get_model(args), script.models.get_loss(args)
    forward = model.forward

    def with_our_names(image: Tensor, text_ids: Tensor, image_local: Tensor) -> dict:
        return forward(image, text_ids, *image_local.unbind(1))

    model.forward = with_our_names
    nn.Module.cuda = lambda self, *args, **kwargs: self.to(options.device)
    options.activation_checkpointing = False  # is ours
    return training_step(model, batch, lambda found: criterion(found)["loss"], ADAMW, options)


def main(config: Config) -> None:
    check_peer(config, "losses.py", "clip-rocket")
    title, other = ["CLIP ViT-B/16"], "open_clip"
    if config.peer:
        title, other = ["CL2L ViT-B/16", "two local views"], "clip-rocket"
    title += [f"up to {config.tokens} tokens", *settings(config), f"beside {other}"]
    sides = {OURS: "benchmarks.dual:ours", other: f"benchmarks.dual:{other.replace('-', '_')}"}
    compare_steps(config, "dual", title, sides)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
