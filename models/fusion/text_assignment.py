"""The text transformer for two images, and its pre-training stage: to which of two images does the
text belong?

NLVR2 needs fusion layers that alternate between two images. ALBEF (Li et al., 2021, appendix)
doubles each fusion layer, one for either image, with shared keys and values, and trains the new
arrangement on captions: a caption comes with its own image first, its own image second, or with two
others, and the model says which (text assignment).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from base.errors import UserError
from models.fusion.base import first_token
from models.fusion.losses import distilled_cross_entropy, gumbel_noise
from models.layers.vit import ViT, ViTConfig
from models.layers.xbert import BertConfig, XBert

ONLINE_LAYER = re.compile(r"text_encoder\.(?:bert\.)?encoder\.layer\.(\d+)\.")
FIRST_CROSS_ATTENTION = "encoder.layer.0.crossattention.self.key.bias"  # SIMLA's alone has one
# of the similarities that pick other images; the model's own `temp` is not used
ASSIGNMENT_TEMPERATURE = 0.07


def pair_layers(bert: XBert, first: int) -> None:
    """Layers first + 2i and first + 2i + 1 share the keys and values of their cross-attention, in
    place.

    Weights are stored under both layers' names. Raises UserError where the layers cannot be paired.
    """
    if not bert.config.fusion_layer <= first <= bert.depth or (bert.depth - first) % 2:
        raise UserError(
            f"{bert.depth} text layers, cross-attention from layer {bert.config.fusion_layer}: they "
            f"cannot be paired from layer {first} on"
        )
    for even in range(first, bert.depth, 2):
        mine = bert.layers[even].crossattention.self
        theirs = bert.layers[even + 1].crossattention.self
        mine["key"] = theirs["key"]
        mine["value"] = theirs["value"]


def for_two_images(
    bert: BertConfig, first: int | None = None, state: Mapping[str, Tensor] = MappingProxyType({})
) -> tuple[BertConfig, int]:
    """`(geometry, first paired layer)` of the transformer for two images made of a pre-trained
    one's geometry.

    Layers from `first` on are doubled: by default those that the weights `state` have doubled, else
    the later half. As published both systems have token types here; SIMLA keeps its cross-attention
    in every layer.
    """
    layers = bert.num_hidden_layers
    if first is None:
        given = layers_of(state)
        first = 2 * layers - given if given > layers else layers // 2
    everywhere = bert.single_stream or any(key.endswith(FIRST_CROSS_ATTENTION) for key in state)
    fusion_layer = 0 if everywhere else bert.fusion_layer
    if not fusion_layer <= first < layers:
        raise UserError(
            f"paired_from {first}: choose one of the text layers with cross-attention, "
            f"{fusion_layer} to {layers - 1}"
        )
    paired = replace(
        bert, num_hidden_layers=2 * layers - first, single_stream=False, fusion_layer=fusion_layer
    )
    return paired, first


def layers_of(state: Mapping[str, Tensor]) -> int:
    """Number of text layers that the weights of a model have; 0 = none of them is text."""
    numbers = [int(match[1]) for match in map(ONLINE_LAYER.match, state) if match]
    return max(numbers, default=-1) + 1


@dataclass
class TextAssignmentConfig:
    """The text-assignment model; the defaults are ALBEF's at 256 px."""

    vit: ViTConfig = field(default_factory=ViTConfig)
    bert: BertConfig = field(
        default_factory=lambda: BertConfig(
            num_hidden_layers=18, single_stream=False, fusion_layer=6
        )
    )
    paired_from: int = 6  # first text layer of the pairs
    embed_dim: int = 256  # E, joint space of the features that pick similar images


class TextAssignment(nn.Module):
    """Training forward: the loss. No momentum copies."""

    def __init__(self, config: TextAssignmentConfig):
        super().__init__()
        self.config = config
        self.visual_encoder = ViT(config.vit)
        self.vision_proj = nn.Linear(config.vit.width, config.embed_dim)
        self.text_encoder = XBert(config.bert)
        pair_layers(self.text_encoder, config.paired_from)
        # SIMLA's pre-training has no token types: starting from zeros they change nothing
        nn.init.zeros_(self.text_encoder.embeddings.token_type_embeddings.weight)
        # unused, kept for the checkpoints' sake: text_proj and temp
        self.text_proj = nn.Linear(config.bert.hidden_size, config.embed_dim)
        self.temp = nn.Parameter(torch.tensor(0.07))
        self.text_proj.requires_grad_(False)
        self.temp.requires_grad_(False)
        self.vision_proj.requires_grad_(False)  # the images are picked without gradient
        self.ta_head = nn.Linear(config.bert.hidden_size, 3)

    def forward(self, image: Tensor, text_ids: Tensor, text_mask: Tensor) -> dict[str, Tensor]:
        """loss_ta, 0-d float32: image [B,3,S,S], text_ids int64 [B,L], text_mask bool [B,L], B >=
        3."""
        if len(image) < 3:
            raise UserError(
                "text assignment needs two other images: set batch_size_train to 3 or more"
            )
        tokens = self.visual_encoder(image)
        first, second, label = self.assign(tokens)
        logits = self.logits(tokens, first, second, text_ids, text_mask)
        return {"loss_ta": distilled_cross_entropy(logits, label).mean()}

    @torch.no_grad()
    def assign(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For each text its first image, its second image and the label, int64 [B] each.

        The labels 0 (own image first), 1 (own second), 2 (absent) are equally likely; other images
        are sampled without replacement by their similarity to the own one.
        """
        feature = F.normalize(self.vision_proj(tokens[:, 0]).float(), dim=-1)
        similarity = feature @ feature.t() / ASSIGNMENT_TEMPERATURE
        # the top k of noisy logits are k samples, one after the other
        noisy = (similarity + gumbel_noise(similarity)).fill_diagonal_(-torch.inf)
        other, another = noisy.topk(2, dim=1).indices.unbind(1)
        own = torch.arange(len(feature), device=feature.device)
        label = torch.randint(3, own.shape, device=own.device)
        first = torch.where(label == 0, own, other)
        second = torch.where(label == 0, other, torch.where(label == 1, own, another))
        return first, second, label

    def logits(
        self, tokens: Tensor, first: Tensor, second: Tensor, text_ids: Tensor, text_mask: Tensor
    ) -> Tensor:
        """float32 [B,3] for image tokens [B,N+1,D], of which text b sees first[b] and second[b]."""
        images = [tokens.index_select(0, first), tokens.index_select(0, second)]
        stage = self.text_encoder.text_stage(text_ids, text_mask)
        fused = self.text_encoder.fuse(stage, text_mask, images, keep=first_token(stage))
        return self.ta_head(fused[:, 0]).float()
