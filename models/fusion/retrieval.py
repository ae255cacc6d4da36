"""Image-text retrieval on top of SIMLA or ALBEF: fine-tuning with ITA + ITM, and the scores
evaluation ranks by.

Captions of one image carry the same image id: they are positives of each other's image in ITA, in
the batch and in the queue, and never negatives in ITM. `compat: original` reproduces the published
code: SIMLA forgets the ids of the queue, ALBEF leaves the temperature unclamped, both contrast with
this rank's batch and the queue alone.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from base.distributed import gather
from models.fusion.base import (
    Features,
    ImageTextConfig,
    ImageTextModel,
    check_batch,
    first_token,
    gather_features,
)
from models.fusion.losses import distilled_cross_entropy
from models.layers.vit import ViTConfig


@dataclass
class RetrievalConfig(ImageTextConfig):
    """Retrieval model; the defaults are SIMLA at 384 px."""

    vit: ViTConfig = field(default_factory=lambda: ViTConfig(image_size=384))
    distill: bool = True  # soft targets from the momentum teacher


class Retrieval(ImageTextModel):
    """Training forward: losses by name. Evaluation: `encode_image`, `encode_text`,
    `match_scores`."""

    def __init__(self, config: RetrievalConfig):
        super().__init__(config, language_model=False)
        self.register_buffer("idx_queue", torch.full((1, config.queue_size), -100))
        self.add_momentum_copies()

    def forward(
        self,
        image: Tensor,
        text_ids: Tensor,
        text_mask: Tensor,
        image_id: Tensor,
        alpha: Tensor | float,
    ) -> dict[str, Tensor]:
        """loss_ita and loss_itm, 0-d float32, of a batch: image [B,3,S,S], text_ids int64 [B,L],
        text_mask bool [B,L], image_id int64 [B] >= 0; alpha = weight of the soft targets.

        In training mode the queue takes in the batch. The momentum update is the caller's, right
        before this call.
        """
        check_batch(image)
        if not self.compat.free_temperature:
            self.clamp_temperature()
        image_tokens, image_feature = self.encode_image(image)
        stage, text_feature = self.encode_text(text_ids, text_mask)
        with torch.no_grad():
            keep = first_token(text_ids)
            cls_state_m = self.bert_m.encode_text(text_ids, text_mask, keep=keep)[:, 0]
            teacher = self.momentum_features(self.visual_encoder_m(image), cls_state_m)

        everyone = gather_features(teacher)
        everyone_id = gather(image_id)
        keys = self.key_banks(everyone, teacher)
        i2t, t2i = self.similarities(Features(image_feature, text_feature), keys)
        i2t_m = t2i_m = None
        if self.config.distill:
            with torch.no_grad():
                i2t_m, t2i_m = self.similarities(teacher, keys)
        target = self.positives(image_id, everyone_id)
        loss_i2t = distilled_cross_entropy(i2t, target, i2t_m, alpha).mean()
        loss_t2i = distilled_cross_entropy(t2i, target, t2i_m, alpha).mean()
        loss_ita = (loss_i2t + loss_t2i) / 2

        same = image_id[:, None] == image_id[None, :]
        negative_image, negative_text = self.sample_negatives(
            keys.own_columns(i2t), keys.own_columns(t2i), same
        )
        cls_states, _ = self.fuse_pairs(
            stage, text_mask, image_tokens, negative_image, negative_text
        )
        has_negative = ~same.all(1)
        valid = torch.cat([torch.ones_like(has_negative), has_negative, has_negative])
        loss_itm = self.itm(cls_states, valid)
        if self.training:
            self.enqueue_with_ids(everyone, everyone_id)
        return {"loss_ita": loss_ita, "loss_itm": loss_itm}

    @torch.no_grad()
    def positives(self, image_id: Tensor, everyone_id: Tensor) -> Tensor:
        """Hard targets [B,G+Q]: uniform over the keys of the same image."""
        batch_id = image_id if self.compat.keys_of_rank else everyone_id
        same = image_id[:, None] == torch.cat([batch_id, self.idx_queue[0]])[None, :]
        return same.float() / same.sum(1, keepdim=True)

    @torch.no_grad()
    def enqueue_with_ids(self, everyone: Features, everyone_id: Tensor) -> None:
        """Enqueue the features and, except as published for SIMLA, their image ids."""
        columns = self.enqueue(everyone)
        if len(columns) and not self.compat.ids_not_queued:
            self.idx_queue.index_copy_(1, columns, everyone_id[None, -len(columns) :])

    def encode_image(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """[B,3,S,S] -> (tokens [B,N+1,D] for `match_scores`, normalised features [B,E] float32)."""
        tokens = self.visual_encoder(image)
        return tokens, self.image_feature(tokens)

    def encode_text(self, text_ids: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor]:
        """ids int64 [B,L], mask bool [B,L] -> (states [B,L,D] for `match_scores`, normalised
        features [B,E] float32).

        The states are what fusion starts from: ALBEF's text half, worth keeping; SIMLA's
        embeddings, as cheap to recompute from the ids.
        """
        stage = self.bert.text_stage(text_ids, text_mask)
        cls_state = self.bert.text_from_stage(stage, text_mask, keep=first_token(stage))[:, 0]
        return stage, self.text_feature(cls_state)

    def match_scores(
        self, text: Tensor, text_mask: Tensor, image_tokens: Tensor, rows: Tensor | None
    ) -> Tensor:
        """ITM logit of "match" of R pairs, float32 [R].

        text: int64 ids [R,L] or `encode_text`'s states [R,L,D]; text_mask bool [R,L]; image_tokens
        [B,N+1,D]; rows int64 [R], the image of each text, None: row r reads image r mod B. The
        images' keys are computed once, however many texts share them.
        """
        stage = text if text.is_floating_point() else self.bert.text_stage(text, text_mask)
        fused = self.bert.fuse(stage, text_mask, image_tokens, rows=rows, keep=first_token(stage))
        return self.match_logits(fused[:, 0])[:, 1]
