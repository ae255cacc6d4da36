"""Object recognition as next-token prediction (Yue et al., 2024): CLIP's image tower as the prefix
of a cut LLaMA.

The decoder reads [image tokens, <|image|>, BOS, prompt, label, delimiter, label, delimiter ...] and
predicts the next token. Labels do not see one another, so that none depends on the order they are
listed in.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from base.distributed import mean_count
from base.errors import UserError
from models.layers.heads import exact
from models.layers.library_towers import TimmGrid
from models.layers.llama import Cache, Llama, LlamaConfig, PrefixMask
from models.layers.openai_towers import ModifiedResNet, OpenAIConfig, OpenAIViT

IGNORED = -100  # label of a position without a target


@dataclass(frozen=True)
class NxtpConfig:
    """Both networks and how they are joined; vision.embed_dim must be the decoder's width."""

    vision: OpenAIConfig
    decoder: LlamaConfig
    prefix: bool = True  # image tokens see one another, else only those before them
    # token ids whose embeddings are trained; none = all
    trained_rows: tuple[int, ...] | None = None
    trained_outputs: tuple[int, ...] | None = None  # the same of the head's rows
    image_tower: str | None = None  # timm/NAME[:FILE] instead of CLIP's

    def __post_init__(self):
        if self.vision.embed_dim != self.decoder.dim:
            raise UserError(
                f"image tokens of width {self.vision.embed_dim}, decoder of width {self.decoder.dim}"
            )


class ViTEncoder(OpenAIViT):
    """CLIP's ViT whose patches, all normed, are projected to the decoder: [B,3,S,S] -> [B,1+N,D],
    class token first."""

    def __init__(self, config: OpenAIConfig):
        super().__init__(config)
        del self.proj  # CLIP's own projection, of the class token
        self.proj = nn.Linear(config.vision_width, config.embed_dim, bias=False)
        nn.init.normal_(self.proj.weight, std=config.vision_width**-0.5)
        with torch.no_grad():
            self.positional_embedding.copy_(grid_positions(*self.positional_embedding.shape))

    def forward(self, image: Tensor) -> Tensor:
        return self.proj(self.ln_post(self.tokens(image)))


class ResNetEncoder(ModifiedResNet):
    """CLIP's ResNet whose last feature map, normed position by position, is projected to the decoder.

    [B,3,S,S] -> [B,1+N,D], their mean first, where a ViT has its class token. It has as many stages
    as `vision_layers` names; the grid begins at S / 4, and each stage after the first halves it. A
    random one starts with open residual branches, since small towers learn shapes sooner that way.
    A frozen one keeps the statistics of its batch norms.
    """

    def __init__(self, config: OpenAIConfig):
        super().__init__(config)
        del self.attnpool
        self.stages = [f"layer{number}" for number in range(1, len(config.vision_layers) + 1)]
        for stage in self.stages:
            for block in self.get_submodule(stage):
                nn.init.ones_(block.bn3.weight)
        width = config.vision_width * 2 ** (len(self.stages) + 1)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Linear(width, config.embed_dim, bias=False)
        nn.init.normal_(self.proj.weight, std=width**-0.5)

    def train(self, mode: bool = True) -> "ResNetEncoder":
        return super().train(mode and self.conv1.weight.requires_grad)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image.contiguous(memory_format=torch.channels_last))
        for stage in self.stages:
            x = getattr(self, stage)(x)  # get_submodule stops TorchDynamo 2.6
        tokens = self.proj(self.ln_post(x.flatten(2).transpose(1, 2)))
        return torch.cat([tokens.mean(1, keepdim=True), tokens], 1)


class LibraryEncoder(TimmGrid):
    """timm's image tower, whose patches are normed and projected to the decoder.

    [B,3,S,S] -> [B,1+N,D], their mean first, where a ViT of CLIP has its class token. A frozen one
    keeps the statistics of its batch norms.
    """

    def __init__(self, tower: str, width: int):
        super().__init__(tower)
        self.ln_post = nn.LayerNorm(self.num_features)
        self.proj = nn.Linear(self.num_features, width, bias=False)
        nn.init.normal_(self.proj.weight, std=self.num_features**-0.5)

    def train(self, mode: bool = True) -> "LibraryEncoder":
        super().train(mode)
        self.trunk.train(mode and next(self.trunk.parameters()).requires_grad)
        return self

    def forward(self, image: Tensor) -> Tensor:
        tokens = self.proj(self.ln_post(super().forward(image)))
        return torch.cat([tokens.mean(1, keepdim=True), tokens], 1)


def grid_positions(count: int, width: int) -> Tensor:
    """Where a random tower's position embeddings start: sines and cosines of row and column,
    [1+g*g, width].

    The class token's are zeros. Periods go from 2 pi to 8 pi grids, and the values are as large as
    those of patches, so that attention can tell neighbours apart from the first step on: small
    towers learn shapes sooner.
    """
    side = math.isqrt(count - 1)
    frequencies = math.ceil(width / 4)  # a sine and a cosine each, of row and of column
    rates = (4.0 * side) ** (-torch.arange(frequencies) / frequencies)
    angles = torch.arange(side)[:, None] * rates
    waves = torch.cat([angles.sin(), angles.cos()], 1)
    of_row = waves[:, None].expand(side, side, -1)
    of_column = waves[None].expand(side, side, -1)
    grid = torch.cat([of_row, of_column], 2).flatten(0, 1)
    class_token = torch.zeros(1, width)
    return torch.cat([class_token, grid[:, :width]])


def text_mask(segments: Tensor, images: int) -> Tensor:
    """What T text positions see behind `images` image positions: int64 [B,T] -> bool
    [B,1,T,images+T].

    segments: 0 of the prompt, which all later positions see; j >= 1 of label j and its delimiter,
    which only they see; -1 of positions nobody sees, themselves included (padding; with compat
    original the last label).
    """
    order = torch.arange(segments.shape[1], device=segments.device)
    ordered = order[:, None] >= order  # [T,T]
    prompt = (segments == 0)[:, None, :]
    label = (segments > 0)[:, None, :]
    same = segments[:, :, None] == segments[:, None, :]
    text = ordered & (prompt | (label & same))  # [B,T,T]
    image = text.new_ones(*text.shape[:2], images)
    return torch.cat([image, text], 2)[:, None]


class Nxtp(nn.Module):
    """Labels of an image as text."""

    def __init__(self, config: NxtpConfig):
        super().__init__()
        self.config = config
        if config.image_tower:
            self.vision_encoder = LibraryEncoder(config.image_tower, config.decoder.dim)
        else:
            encoder = ResNetEncoder if config.vision.is_resnet else ViTEncoder
            self.vision_encoder = encoder(config.vision)
        self.language_decoder = Llama(config.decoder)

    @property
    def rows_in_training(self) -> dict[str, tuple[int, ...]]:
        """Numbers of the rows with a gradient, of the tables that have others, too; by the name of
        the table."""
        tables = {
            "language_decoder.tok_embeddings.weight": self.config.trained_rows,
            "language_decoder.output.weight": self.config.trained_outputs,
        }
        return {name: rows for name, rows in tables.items() if rows}

    def encode_image(self, image: Tensor) -> Tensor:
        """[B,3,S,S] -> the N image tokens [B,N,D]; the class token is left out."""
        return self.vision_encoder(image)[:, 1:]

    def embed(self, ids: Tensor) -> Tensor:
        """int64 [B,T] -> [B,T,D]. Rows that are not trained get no gradient: without weight decay
        they stay as is."""
        rows = self.language_decoder.tok_embeddings(ids)
        if self.config.trained_rows is None or not rows.requires_grad:
            return rows
        trained = among(ids, self.config.trained_rows)[..., None]
        return torch.where(trained, rows, rows.detach())

    def sequence(self, images: Tensor, ids: Tensor) -> Tensor:
        """Image tokens [B,N,D] and the embeddings of int64 [B,T] behind them, in the embeddings'
        type: [B,N+T,D]."""
        rows = self.embed(ids)
        return torch.cat([images.to(rows.dtype), rows], 1)

    def logits(self, states: Tensor) -> Tensor:
        """[...,D] -> float32 [...,V]"""
        head = self.language_decoder.output
        if self.config.trained_outputs is None or not head.weight.requires_grad:
            return head(states).float()
        rows = torch.arange(len(head.weight), device=states.device)
        trained = among(rows, self.config.trained_outputs)[:, None]
        weight = torch.where(trained, head.weight, head.weight.detach())
        return F.linear(states, weight).float()

    def exact_logits(self, states: Tensor) -> Tensor:
        """For decoding: as `logits`, not rounded under autocast."""
        return exact(self.language_decoder.output, states).float()

    def prefix_mask(self, images: int, segments: Tensor) -> PrefixMask:
        """Positions and mask of `images` image tokens and text; segments as in `text_mask`."""
        positions = torch.arange(images + segments.shape[1], device=segments.device)
        mask = text_mask(segments, images)
        return PrefixMask(positions, mask, prefix=images, bidirectional=self.config.prefix)

    def states(self, images: Tensor, text_ids: Tensor, segments: Tensor) -> Tensor:
        """Normed states [B,T,D] of the text behind the image tokens [B,N,D]."""
        x = self.sequence(images, text_ids)
        mask = self.prefix_mask(images.shape[1], segments)
        states, _ = self.language_decoder(x, mask, keep=text_ids.shape[1])
        return states

    def next_token_loss(
        self,
        images: Tensor,
        text_ids: Tensor,
        segments: Tensor,
        positions: Tensor,
        labels: Tensor,
        count: Tensor | None = None,
    ) -> Tensor:
        """Mean cross-entropy over the targets of all processes' batches, and of all micro-batches.

        text_ids, segments int64 [B,T]; positions int64 [K], flat in B*T, of the predicting tokens;
        labels int64 [K], the tokens to predict, IGNORED where there is none; count: see
        `with_counts`, None where this is the only micro-batch.
        """
        states = self.states(images, text_ids, segments).flatten(0, 1)
        logits = self.logits(states.index_select(0, positions))
        total = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
        count = mean_count([labels != IGNORED]) if count is None else count
        return total / torch.where(count > 0, count, 1.0)  # below 1: fewer targets than processes

    def forward(
        self,
        image: Tensor,
        text_ids: Tensor,
        segments: Tensor,
        positions: Tensor,
        labels: Tensor,
        caption_text_ids: Tensor | None = None,
        caption_segments: Tensor | None = None,
        caption_positions: Tensor | None = None,
        caption_labels: Tensor | None = None,
        count: Tensor | None = None,
        caption_count: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """`loss_objs` of the labels and, where captions are given, `loss_caps` of these, 0-d
        float32; image [B,3,S,S], the rest as in `next_token_loss`."""
        images = self.encode_image(image)
        losses = {}
        losses["loss_objs"] = self.next_token_loss(
            images, text_ids, segments, positions, labels, count
        )
        if caption_text_ids is not None:
            losses["loss_caps"] = self.next_token_loss(
                images,
                caption_text_ids,
                caption_segments,
                caption_positions,
                caption_labels,
                caption_count,
            )
        return losses

    # ---- for decoding
    def prefill(self, images: Tensor, prompt: Tensor) -> tuple[Tensor, Cache]:
        """Image tokens [B,N,D] and prompt int64 [P] -> logits [B,V] of the first label token, and
        the cache."""
        ids = prompt.expand(images.shape[0], -1)
        x = self.sequence(images, ids)
        segments = torch.zeros(1, len(prompt), dtype=torch.int64, device=prompt.device)
        mask = self.prefix_mask(images.shape[1], segments)
        states, cache = self.language_decoder(x, mask, keep=1)
        return self.exact_logits(states[:, 0]), cache

    def step(
        self, tokens: Tensor, positions: Tensor, mask: Tensor, cache: Cache
    ) -> tuple[Tensor, Cache]:
        """One more token for each of M branches of B images.

        tokens int64 [B,M]; positions int64 [M] or [B,M], rotary; mask bool [B,1,M,S+M] over the
        cached keys and these; -> logits [B,M,V] and the cache with them.
        """
        x = self.embed(tokens)
        states, cache = self.language_decoder(x, PrefixMask(positions, mask), cache)
        return self.exact_logits(states), cache


def with_counts(batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The micro-batches of an update, to each of which is added how many targets one has, 0-d: the
    mean over all of them and all processes, as `count` and, of captions, `caption_count`. So every
    target counts the same, in whichever micro-batch it is."""
    for prefix in ("", "caption_"):
        if f"{prefix}labels" in batches[0]:
            count = mean_count([batch[f"{prefix}labels"] != IGNORED for batch in batches])
            for batch in batches:
                batch[f"{prefix}count"] = count
    return batches


def among(ids: Tensor, chosen: tuple[int, ...]) -> Tensor:
    """Whether each id is one of a few, bool of the shape of ids."""
    return torch.stack([ids == one for one in chosen]).any(0)
