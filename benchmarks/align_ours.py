"""One measurement of benchmarks.align: a training step with our towers or transformers', under one
loop.

Called by benchmarks.align with its settings as JSON; prints the result as JSON.
"""

import json
import sys

import torch
from torch import Tensor, nn

from benchmarks.common import CLS, VOCABULARY, chosen_device, measure_training
from main import total_loss
from models.dual_encoder.align import Align
from models.dual_encoder.base import DualConfig, DualEncoder, names_by_decay
from models.dual_encoder.factory import build_dual
from models.weights.align import hugging_face_config
from runtime.optim.build import Optimizer, Precision, build_optimizer


class Foreign(DualEncoder):
    """transformers' AlignModel, with the image projection that it lacks, under our loss."""

    def __init__(self, model: nn.Module):
        super().__init__()
        from transformers import AlignConfig, AlignModel

        values = {
            k: v
            for k, v in hugging_face_config(model).items()
            if k not in ("architectures", "model_type")
        }
        self.config, self.align = model.config, AlignModel(AlignConfig(**values))
        self.image_projection = model.image_projection or nn.Identity()

    losses = Align.losses

    def features(self, image: Tensor, text_ids: Tensor) -> dict[str, Tensor]:
        pixels = self.align.vision_model(pixel_values=image)[1]
        states = self.align.text_model(input_ids=text_ids, attention_mask=text_ids != 0)[0]
        return {
            "z_image": self.image_projection(pixels),
            "z_text": self.align.text_projection(states[:, 0]),
            "temperature": self.align.temperature,
        }


class WithTotal(nn.Module):
    """A dual encoder whose only loss is the weighted sum."""

    def __init__(self, model: DualEncoder):
        super().__init__()
        self.model = model

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        return {"loss": total_loss(self.model(**batch), self.model.config)}


def main(options: dict) -> dict:
    torch.manual_seed(0)
    torch.set_num_threads(options["threads"])
    device = chosen_device(options["device"])
    config = DualConfig(
        model=options["model"],
        image_size=options["image_size"],
        embed_dim=640,
        vocab_size=VOCABULARY,
        label_smoothing=0.1,
        loss_avg_or_sum="sum",
        virtual_batch_size=options["virtual_batch"],
    )
    model = build_dual(config)
    decayed = names_by_decay(model)[0]
    if options["library"] == "transformers":
        model = Foreign(model)
        decayed = [
            name
            for name, _ in model.named_parameters()
            if "bn." not in name and "norm." not in name
        ]
    model = WithTotal(model).to(device).train()
    decayed = [f"model.{name}" for name in decayed]
    if options["compile"]:
        model.compile()
    optimizer = build_optimizer(
        model, Optimizer(opt="lamb", lr=5e-3, weight_decay=1e-5, eps=1e-6), decayed
    )
    precision = Precision(options["precision"], device)
    size, side = options["batch"], options["image_size"]
    ids = torch.randint(1000, VOCABULARY, (size, options["length"]), device=device)
    ids[:, 0] = CLS
    batch = {"image": torch.rand(size, 3, side, side, device=device) * 2 - 1, "text_ids": ids}
    return measure_training(model, batch, optimizer, precision, options)


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
