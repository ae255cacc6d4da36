"""Checkpoints of NXTP: labels with probabilities and what they attend to."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import Recognition
from base.distributed import World
from dataset.images.clip import normalize
from dataset.tasks.recognition import ImageView, image_statistics
from dataset.text.sentencepiece import PieceTokenizer
from evaluation.demo.abilities import Abilities, Ranked


def recognition(file: Path, config, world: World) -> Abilities:
    """A checkpoint of Recognition.py, or NXTP's published one with --clip."""
    task = Recognition.Config(checkpoint=file, clip=config.clip, device=config.device)
    task.tokenizer = config.tokenizer and Path(config.tokenizer)
    Recognition.check(task, world)
    tokenizer = PieceTokenizer(task.tokenizer)
    model = Recognition.build_model(task, tokenizer, world).to(world.device).eval()
    reader = Recognition.labeller(model, tokenizer, task, world)
    view = ImageView(task.network.image_size, task.whole_image)
    statistics = image_statistics(task.network.image_tower, world.device)

    @torch.no_grad()
    def recognise(image: Tensor) -> Ranked:
        inputs = normalize(view(image)[None].to(world.device), statistics)
        return reader.labels(reader.drafts(inputs), 0)

    @torch.no_grad()
    def attention(image: Tensor, labels: Sequence[str]) -> tuple[Tensor, list[Tensor]]:
        seen = view(image)
        maps = reader.attention(normalize(seen[None].to(world.device), statistics), list(labels))
        return seen, maps

    return Abilities(str(file), recognise=recognise, attention=attention)
