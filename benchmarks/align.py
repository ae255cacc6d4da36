"""Speed and memory of a training step of ALIGN, beside transformers' towers.

    python -m benchmarks.align
    python -m benchmarks.align --peer PATH/TO/coyo-align --peer-python PATH  # and TensorFlow's COYO-ALIGN

A step is forward, backward and LAMB of EfficientNet-B3 and BERT-mini at 289 pixels and 64 tokens,
on random images and captions. Loss, optimizer, loop, --precision and --compile are ours for the two
in PyTorch; the original runs its own, in float32 and as one graph, with the ghost batch of ours.
"""

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from benchmarks.inputs import CLS, VOCABULARY
from benchmarks.runner import OURS, TrainOptions, check_peer
from benchmarks.steps import compare_steps, settings, training_step
from main import total_loss
from models.dual_encoder.align import Align
from models.dual_encoder.base import DualEncoder, names_by_decay
from models.dual_encoder.config import DualConfig
from models.dual_encoder.factory import build_dual
from models.weights.align import hugging_face_config
from runtime.config.cli import knob, run_script
from runtime.optim.build import Optimizer


@dataclass
class Config(TrainOptions):
    model: str = knob("ALIGN_B3_MINI", "network")
    batch: int = knob(8, "pairs a step", low=2)
    virtual_batch: int = knob(8, "samples of a ghost batch", low=2)
    image_size: int = knob(289, "side of the images in pixels", low=32)
    length: int = knob(64, "tokens of a caption", low=2)


class Foreign(DualEncoder):
    """transformers' AlignModel, with the image projection that it lacks, under our loss."""

    losses = Align.losses

    def __init__(self, model: Align):
        from transformers import AlignConfig, AlignModel

        super().__init__()
        self.config = model.config
        self.align = AlignModel(AlignConfig.from_dict(hugging_face_config(model)))
        self.image_projection = model.image_projection or nn.Identity()

    def features(self, image: Tensor, text_ids: Tensor) -> dict[str, Tensor]:
        pixels = self.align.vision_model(pixel_values=image)[1]
        states = self.align.text_model(input_ids=text_ids, attention_mask=text_ids != 0)[0]
        return {
            "z_image": self.image_projection(pixels),
            "z_text": self.align.text_projection(states[:, 0]),
            "temperature": self.align.temperature,
        }


def step(options: SimpleNamespace) -> dict:
    """A step of one side in PyTorch, with random weights."""
    torch.manual_seed(0)
    config = DualConfig(
        model="ALIGN_B0_TINY" if options.tiny else options.model,
        image_size=options.image_size,
        embed_dim=640,
        vocab_size=VOCABULARY,
        label_smoothing=0.1,
        loss_avg_or_sum="sum",
        virtual_batch_size=options.virtual_batch,
    )
    model = build_dual(config)
    decayed = names_by_decay(model)[0]
    if options.side != OURS:
        model = Foreign(model)
        names = [name for name, _ in model.named_parameters()]
        decayed = [name for name in names if "bn." not in name and "norm." not in name]
    size, side = options.batch, options.image_size
    ids = torch.randint(1000, VOCABULARY, (size, options.length))
    ids[:, 0] = CLS
    batch = {"image": torch.rand(size, 3, side, side) * 2 - 1, "text_ids": ids}
    lamb = Optimizer(opt="lamb", lr=5e-3, weight_decay=1e-5, eps=1e-6)
    return training_step(
        model, batch, lambda losses: total_loss(losses, config), lamb, options, decayed
    )


def main(config: Config) -> None:
    check_peer(config, "models/efficientnet.py", "coyo-align", tensorflow=True)
    sides = dict.fromkeys((OURS, "transformers"), "benchmarks.align:step")
    if config.peer:
        sides["original (TensorFlow)"] = "benchmarks.peers.tensorflow:align"
    title = ["ALIGN step", config.model, f"{config.image_size} pixels"]
    compare_steps(config, "align", title + settings(config), sides)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
