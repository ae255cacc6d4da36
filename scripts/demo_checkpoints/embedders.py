"""Dual encoders and image encoders as embedders, opened as scripts/embed.py opens them."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from base.distributed import World
from evaluation.demo.abilities import Abilities, Embedder
from models.weights.any_dual_encoder import logit_scale
from scripts import embed

PHOTO = "a photo of a {}."  # the template of CLIP's paper that fits most names


def dual(source: Path | None, config, world: World) -> Abilities:
    """Search, and zero-shot classification."""
    found = embed.dual_embedder(options(source, config), world)

    @torch.no_grad()
    def texts(sentences: Sequence[str]) -> Tensor:
        rows = []
        for start in range(0, len(sentences), config.batch_size):
            ids = found.tokenize(list(sentences[start : start + config.batch_size]))
            rows.append(found.texts(ids.to(world.device))["z"])
        return F.normalize(torch.cat(rows).float(), dim=-1).cpu()

    embedder = Embedder(
        view=found.view,
        images=image_rows(found, world),
        texts=texts,
        scale=logit_scale(found.model),
        signature=found.signature,
        template=PHOTO,
    )
    return Abilities(title_of(source, config), embedder)


def images_alone(source: Path | None, config, world: World) -> Abilities:
    """Search by image."""
    found = embed.image_embedder(options(source, config), world)
    rows = image_rows(found, world)
    return Abilities(title_of(source, config), Embedder(found.view, rows, None, 1, found.signature))


def options(source: Path | None, config) -> embed.Config:
    """The same checkpoint for scripts/embed.py."""
    return embed.Config(
        checkpoint=source,
        model=config.model,
        random_weights=config.random_weights,
        tokenizer=config.tokenizer,
        precision=config.precision,
    )


def image_rows(found: embed.BatchEmbedder, world: World):
    """inputs [B,...] -> unit float32 [B,E] on the CPU."""
    found.model.eval()

    @torch.no_grad()
    def rows(images: Tensor) -> Tensor:
        return F.normalize(found.images(images.to(world.device))["z"].float(), dim=-1).cpu()

    return rows


def title_of(source: Path | None, config) -> str:
    """What the page is called after."""
    name = config.model or str(source)
    return f"{name} (random weights)" if config.random_weights else name
