"""What SIMLA / ALBEF pre-training and retrieval share: two encoders with momentum copies, the joint
space with its queue, image-text contrast (ITA) and image-text matching (ITM) with hard
negatives."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from base.distributed import gather, rank, world_size
from base.errors import UserError
from models.fusion.compat import Compat
from models.fusion.losses import hard_negatives, masked_mean
from models.fusion.momentum import MomentumModel
from models.layers.vit import ViT, ViTConfig
from models.layers.xbert import BertConfig, XBert, XBertLM


def check_widths(vit: ViTConfig, bert: BertConfig) -> None:
    """UserError where cross-attention does not fit the image tokens."""
    if bert.encoder_width != vit.width:
        raise UserError(
            f"bert.encoder_width {bert.encoder_width} must equal the width of the image tokens, "
            f"{vit.width}"
        )


@dataclass
class Keys:
    """The contrastive key banks of one step; columns are the batch's momentum features, then the
    queue."""

    image: Tensor  # [E,G+Q] float32
    text: Tensor  # [E,G+Q]
    own: int  # first column that belongs to this rank's batch

    def own_columns(self, logits: Tensor) -> Tensor:
        """Those of this rank's batch, [B,B] of logits [B,G+Q], without gradient."""
        return logits[:, self.own : self.own + len(logits)].detach()


@dataclass
class Features:
    """Normalised joint-space features [B,E] float32 of a batch."""

    image: Tensor
    text: Tensor


@dataclass
class ImageTextConfig:
    """Both encoders and the joint space; the defaults are SIMLA at full size."""

    vit: ViTConfig = field(default_factory=ViTConfig)
    bert: BertConfig = field(default_factory=BertConfig)
    embed_dim: int = 256  # E, joint space
    queue_size: int = 65536  # Q, momentum features kept as further negatives
    temp: float = 0.07  # initial temperature
    compat: str = field(default="none", kw_only=True)  # "original": the published code's numbers


class ImageTextModel(MomentumModel):
    """Encoders, momentum copies (`X_m`), projections, matching head, temperature, queue; base of
    the tasks' models."""

    momentum_of = ("visual_encoder", "vision_proj", "text_encoder", "text_proj")

    def __init__(self, config: ImageTextConfig, language_model: bool):
        vit, bert = config.vit, config.bert
        super().__init__(Compat.of(config.compat, simla=bert.single_stream))
        check_widths(vit, bert)
        self.config = config
        self.temp = nn.Parameter(torch.tensor(float(config.temp)))
        queue = (config.embed_dim, config.queue_size)
        self.register_buffer("image_queue", F.normalize(torch.randn(queue), dim=0))
        self.register_buffer("text_queue", F.normalize(torch.randn(queue), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.int64))
        self.visual_encoder = ViT(vit)
        self.text_encoder = XBertLM(bert) if language_model else XBert(bert)
        self.vision_proj = nn.Linear(vit.width, config.embed_dim)
        self.text_proj = nn.Linear(bert.hidden_size, config.embed_dim)
        self.itm_head = nn.Linear(bert.hidden_size, 2)

    @property
    def bert(self) -> XBert:
        """The text and fusion transformer without head."""
        return without_head(self.text_encoder)

    @property
    def bert_m(self) -> XBert:
        """Its momentum copy."""
        return without_head(self.text_encoder_m)

    def image_feature(self, image_tokens: Tensor) -> Tensor:
        """[B,N+1,D] -> normalised [B,E] float32."""
        return F.normalize(self.vision_proj(image_tokens[:, 0]).float(), dim=-1)

    def text_feature(self, cls_state: Tensor) -> Tensor:
        """[CLS] states [B,D] -> normalised [B,E] float32."""
        return F.normalize(self.text_proj(cls_state).float(), dim=-1)

    @torch.no_grad()
    def momentum_features(self, image_tokens_m: Tensor, cls_state_m: Tensor) -> Features:
        """The teacher's features from the teacher's states."""
        image = F.normalize(self.vision_proj_m(image_tokens_m[:, 0]).float(), dim=-1)
        text = F.normalize(self.text_proj_m(cls_state_m).float(), dim=-1)
        return Features(image, text)

    @torch.no_grad()
    def clamp_temperature(self) -> None:
        """Keep the temperature in [0.001, 0.5]."""
        self.temp.clamp_(0.001, 0.5)

    @torch.no_grad()
    def key_banks(self, everyone: Features, local: Features) -> Keys:
        """Key banks [batch | queue]; the batch part is the global batch, or this rank's own where
        compat is original.

        The concatenation is the one copy of the queue (64 MiB each at full size, 0.1 ms of a GPU):
        backward needs the keys as the loss saw them, while the enqueue overwrites the queue in
        place.
        """
        batch = everyone
        own = rank() * len(local.image)
        if self.compat.keys_of_rank:
            batch = local
            own = 0
        return Keys(
            image=torch.cat([batch.image.t(), self.image_queue.float()], dim=1),
            text=torch.cat([batch.text.t(), self.text_queue.float()], dim=1),
            own=own,
        )

    def similarities(self, features: Features, keys: Keys) -> tuple[Tensor, Tensor]:
        """Logits of the images against all text keys and of the texts against all image keys.

        Cosine over temperature, float32 [B,G+Q] each: what the image-text contrastive loss (ITA)
        and its soft targets are made of (ALBEF: Li 2021, equations 1 and 6).
        """
        with torch.autocast(features.image.device.type, enabled=False):
            i2t = features.image @ keys.text / self.temp
            t2i = features.text @ keys.image / self.temp
        return i2t, t2i

    def sample_negatives(self, i2t: Tensor, t2i: Tensor, same: Tensor) -> tuple[Tensor, Tensor]:
        """Hard negatives inside the own batch: (image for each text, text for each image), int64
        [B] each.

        i2t, t2i: similarity logits [B,B]; same: bool [B,B], pairs that are no negatives.
        """
        return hard_negatives(t2i, same), hard_negatives(i2t, same)

    def fuse_pairs(
        self,
        stage: Tensor,
        text_mask: Tensor,
        image_tokens: Tensor,
        negative_image: Tensor,
        negative_text: Tensor,
        masked_stage: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """ITM's and, where there are masked captions, MLM's fusion in one pass whose image keys are
        computed once.

        Returns the [CLS] states [3B,D] of own pairs, sampled images, sampled texts, and the states
        [B,L,D] of the masked captions. In the pass the rows that keep image b come first, in groups
        of B; those with a sampled image last.
        """
        other_text = stage.index_select(0, negative_text)
        other_mask = text_mask.index_select(0, negative_text)
        if masked_stage is None:
            rows = torch.cat([stage, other_text, stage])
            mask = torch.cat([text_mask, other_mask, text_mask])
            keep = first_token(rows)
            fused = self.bert.fuse(rows, mask, image_tokens, rows=negative_image, keep=keep)
            own, with_text, with_image = fused.chunk(3)
            masked = None
        else:
            rows = torch.cat([stage, other_text, masked_stage, stage])
            mask = torch.cat([text_mask, other_mask, text_mask, text_mask])
            fused = self.bert.fuse(rows, mask, image_tokens, rows=negative_image)
            own, with_text, masked, with_image = fused.chunk(4)
        return torch.cat([own[:, 0], with_image[:, 0], with_text[:, 0]]), masked

    def match_logits(self, cls_states: Tensor) -> Tensor:
        """ITM's logits of "no match" and "match", float32 [R,2], of fused [CLS] states [R,D]; not
        rounded under autocast, where many candidates of a query would tie."""
        with torch.autocast(cls_states.device.type, enabled=False):
            return self.itm_head(cls_states.float())

    def itm(self, cls_states: Tensor, valid: Tensor | None = None) -> Tensor:
        """Image-text matching loss (ALBEF: Li 2021, equation 3) of the fused [CLS] states of 3B
        pairs, of which the first B match: binary cross-entropy, 0-d; valid: bool [3B]."""
        pairs = len(cls_states)
        target = (torch.arange(pairs, device=cls_states.device) < pairs // 3).long()
        loss = F.cross_entropy(self.match_logits(cls_states), target, reduction="none")
        return loss.mean() if valid is None else masked_mean(loss, valid)

    @torch.no_grad()
    def enqueue(self, everyone: Features) -> Tensor:
        """Write the global batch's momentum features over the oldest of the queue; returns the
        columns written.

        Any queue size and any batch: the write wraps around, a batch larger than the queue leaves
        its last Q rows.
        """
        size = self.image_queue.shape[1]
        rows = len(everyone.image)
        written = min(rows, size)
        if size == 0:
            return self.queue_ptr.new_empty(0)
        newest = torch.arange(rows - written, rows, device=self.queue_ptr.device)
        columns = (self.queue_ptr + newest) % size
        image = everyone.image[-written:].t().to(self.image_queue.dtype)
        text = everyone.text[-written:].t().to(self.text_queue.dtype)
        self.image_queue.index_copy_(1, columns, image)
        self.text_queue.index_copy_(1, columns, text)
        self.queue_ptr.copy_((self.queue_ptr + rows) % size)
        return columns


def without_head(encoder: XBert | XBertLM) -> XBert:
    """The transformer itself."""
    return encoder.bert if isinstance(encoder, XBertLM) else encoder


def gather_features(local: Features) -> Features:
    """The features of all ranks in rank order, [G,E], without gradient; one collective."""
    if world_size() == 1:
        return local
    both = gather(torch.stack([local.image, local.text], dim=1))
    return Features(both[:, 0], both[:, 1])


def first_token(states: Tensor) -> Tensor:
    """Position 0 of every row of states [R,L,D] or ids [R,L], int64 [R,1]."""
    return torch.zeros(states.shape[0], 1, dtype=torch.int64, device=states.device)


def check_batch(image: Tensor) -> None:
    """Raise UserError where hard negatives cannot exist."""
    if len(image) < 2:
        raise UserError(
            "a batch of 1 per process holds no negative for image-text matching: set batch_size "
            "(batch_size_train) to 2 or more"
        )
