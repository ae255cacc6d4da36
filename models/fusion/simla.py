"""SIMLA (Khan et al., ECCV 2022) and ALBEF (Li et al., NeurIPS 2021) pre-training.

ALBEF aligns an image encoder and a two-stage text/fusion transformer with three losses: image-text
contrast (ITA), image-text matching (ITM) and masked language modelling (MLM); ITA and MLM take soft
targets from a momentum teacher.
SIMLA makes the transformer single-stream and adds masked image modelling in the context of the
caption (MIM) and keyword prediction (pseudo-labels). One class serves both; the configuration says
which losses there are.

`compat: original` reproduces the published code's numbers where they differ: per-rank means and
keys, teacher dropout, online features inside the teacher, keyword votes for special tokens, and,
for SIMLA, the soft masked-LM loss with its log-softmax over the text axis.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from base.distributed import mean_count
from base.errors import UserError
from models.fusion.base import (
    Features,
    ImageTextConfig,
    ImageTextModel,
    Keys,
    check_batch,
    first_token,
    gather_features,
)
from models.fusion.losses import (
    IGNORE,
    distilled_binary_cross_entropy,
    distilled_cross_entropy,
    keyword_targets,
    masked_mean,
    masked_patches,
    sequence_axis_soft_loss,
)
from models.layers.vit import ViTConfig
from models.layers.xbert import BertConfig


@dataclass
class SimlaConfig(ImageTextConfig):
    """Pre-training model; the defaults are SIMLA at full size. `albef()` gives the other one."""

    vit: ViTConfig = field(default_factory=lambda: ViTConfig(mask_token=True))
    mim: bool = True  # masked image modelling; needs a single-stream BERT and vit.mask_token
    visual_vocab: int = 8192  # codes of the image tokenizer
    max_masked_patches: int = 75  # most patches masked in one image
    keywords: int = 5  # keywords taken from a caption; 0 = no keyword loss
    keyword_votes: int = 4  # positions each attention head votes for
    # [PAD] [UNK] [CLS] [SEP] [MASK]: never keywords
    special_ids: tuple[int, ...] = (0, 100, 101, 102, 103)
    cls_id: int = 101

    @classmethod
    def albef(cls) -> "SimlaConfig":
        """ALBEF: two-stage BERT with six text layers, three losses."""
        bert = BertConfig(single_stream=False, fusion_layer=6)
        return cls(vit=ViTConfig(), bert=bert, mim=False, keywords=0)


@dataclass
class Teacher:
    """What the momentum networks make of a batch, without gradient."""

    patches: Tensor  # [B,N,D] of the images, before the vision transformer
    features: Features
    mlm_logits: Tensor  # [K,V] at the masked positions
    cls_attention: Tensor | None  # [B,H,L], the last layer's [CLS] query over the unmasked caption
    stage: Tensor  # [B,L,D], its fusion input of the unmasked caption


class Simla(ImageTextModel):
    """The pre-training model of SIMLA or ALBEF; its forward returns the losses by name."""

    def __init__(self, config: SimlaConfig):
        check_config(config)
        super().__init__(config, language_model=True)
        if config.mim:
            self.mim_head = nn.Linear(config.bert.hidden_size, config.visual_vocab)
            self.momentum_of = (*self.momentum_of, "mim_head")
        if config.keywords:
            self.concept_head = nn.Linear(config.embed_dim, config.bert.vocab_size)
            self.momentum_of = (*self.momentum_of, "concept_head")
        self.add_momentum_copies()

    def forward(
        self,
        image: Tensor,
        text_ids: Tensor,
        text_mask: Tensor,
        mlm_ids: Tensor,
        mlm_positions: Tensor,
        mlm_labels: Tensor,
        alpha: Tensor | float,
        patch_mask: Tensor | None = None,
        visual_codes: Tensor | None = None,
        mim_positions: Tensor | None = None,
        mlm_count: Tensor | None = None,
        mim_count: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The losses of a batch, 0-d float32: loss_ita, loss_itm, loss_mlm; SIMLA's also loss_mim
        and loss_pseudo.

        image [B,3,S,S] normalised; text_ids int64 [B,L], text_mask bool [B,L] (True = token);
        mlm_ids int64 [B,L] with tokens masked, mlm_positions int64 [K] their flat indices into B*L,
        mlm_labels int64 [K] their ids (-100 where the list is padded); patch_mask bool [B,N];
        visual_codes int64 [B,N]; mim_positions int64 [B,K], those of the method of that name, which
        is called where they are None; mlm_count, mim_count: see `with_counts`, None where this is
        the only micro-batch; alpha = weight of the soft targets.

        In training mode the queue takes in the batch. The momentum update is the caller's, right
        before this call.
        """
        check_batch(image)
        self.clamp_temperature()
        patches = self.visual_encoder.patches(image)
        image_tokens = self.visual_encoder(patches)
        stage, masked_stage = self.text_stages(text_ids, mlm_ids, text_mask)
        text_cls = self.bert.text_from_stage(stage, text_mask, keep=first_token(stage))[:, 0]
        student = Features(self.image_feature(image_tokens), self.text_feature(text_cls))
        teacher = self.teach(image, image_tokens, text_ids, text_mask, mlm_ids, mlm_positions)

        everyone = gather_features(teacher.features)
        keys = self.key_banks(everyone, teacher.features)
        losses = {}
        losses["loss_ita"], i2t, t2i = self.ita(student, teacher.features, keys, alpha)
        same = torch.eye(len(image), dtype=torch.bool, device=image.device)
        negatives = self.sample_negatives(i2t, t2i, same)
        matched, masked = self.fuse_pairs(stage, text_mask, image_tokens, *negatives, masked_stage)
        losses["loss_itm"] = self.itm(matched)
        losses["loss_mlm"] = self.mlm(
            masked, mlm_positions, mlm_labels, teacher.mlm_logits, alpha, mlm_count
        )
        if self.config.mim:
            seen = (patches, stage)
            seen_m = (teacher.patches, stage if self.compat.student_states else teacher.stage)
            losses["loss_mim"] = self.mim(
                seen, seen_m, patch_mask, mim_positions, visual_codes, text_mask, alpha, mim_count
            )
        if self.config.keywords:
            losses["loss_pseudo"] = self.pseudo_label(student, teacher, text_ids, text_mask, alpha)
        if self.training:
            self.enqueue(everyone)
        return losses

    def example_batch(self, batch_size: int, tokens: int) -> dict[str, Tensor]:
        """A batch of the right names, shapes and types without data (meta device), to count FLOPs
        with."""
        side = self.config.vit.image_size
        patches = self.config.vit.grid**2
        ids = torch.zeros(batch_size, tokens, dtype=torch.int64, device="meta")
        masked = torch.zeros(max(32, int(0.15 * ids.numel())), dtype=torch.int64, device="meta")
        batch = {
            "image": torch.zeros(batch_size, 3, side, side, device="meta"),
            "text_ids": ids,
            "text_mask": ids.bool(),
            "mlm_ids": ids,
            "mlm_positions": masked,
            "mlm_labels": masked,
            "alpha": torch.zeros((), device="meta"),
        }
        if self.config.mim:
            codes = torch.zeros(batch_size, patches, dtype=torch.int64, device="meta")
            batch["patch_mask"] = codes.bool()
            batch["visual_codes"] = codes
        return batch

    def text_stages(
        self, text_ids: Tensor, mlm_ids: Tensor, text_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Fusion inputs [B,L,D] of the caption and of its masked version, in one pass."""
        both = self.bert.text_stage(
            torch.cat([text_ids, mlm_ids]), torch.cat([text_mask, text_mask])
        )
        return both.chunk(2)

    @torch.no_grad()
    def teach(
        self,
        image: Tensor,
        image_tokens: Tensor,
        text_ids: Tensor,
        text_mask: Tensor,
        mlm_ids: Tensor,
        mlm_positions: Tensor,
    ) -> Teacher:
        """Features, masked-LM logits and [CLS] attention of the momentum networks; the fusion
        passes are one. image_tokens: the student's."""
        patches = self.visual_encoder_m.patches(image)
        image_tokens_m = self.visual_encoder_m(patches)
        bert = self.bert_m
        both_mask = torch.cat([text_mask, text_mask])
        both = bert.text_stage(torch.cat([mlm_ids, text_ids]), both_mask)
        masked_stage, stage = both.chunk(2)
        cls_state = bert.text_from_stage(stage, text_mask, keep=first_token(stage))[:, 0]
        features = self.momentum_features(image_tokens_m, cls_state)
        if not self.config.keywords:
            masked = bert.fuse(masked_stage, text_mask, image_tokens_m)
            attention = None
        else:
            seen = image_tokens_m
            if self.compat.student_states:
                seen = torch.cat([image_tokens_m, image_tokens])  # the latter for the keywords
            top = bert.depth - 1  # the last layer: only masked captions pass through it
            below_masked, below = bert.fuse(both, both_mask, seen, last=top).chunk(2)
            masked = bert.run(below_masked, text_mask, image_tokens_m, first=top)
            attention = bert.cls_attention(below, text_mask)
        mlm_logits = self.text_encoder_m.logits(masked.flatten(0, 1).index_select(0, mlm_positions))
        return Teacher(patches, features, mlm_logits, attention, stage)

    def ita(
        self, student: Features, teacher: Features, keys: Keys, alpha: Tensor | float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Image-text contrastive loss (ALBEF: Li 2021, equation 6), 0-d, and the image-to-text and
        text-to-image logits [B,B] inside the own batch.

        The keys are momentum features; so are the soft targets, which weigh alpha.
        """
        i2t, t2i = self.similarities(student, keys)
        with torch.no_grad():
            i2t_m, t2i_m = self.similarities(teacher, keys)
        target = keys.own + torch.arange(len(i2t), device=i2t.device)
        loss_i2t = distilled_cross_entropy(i2t, target, i2t_m, alpha).mean()
        loss_t2i = distilled_cross_entropy(t2i, target, t2i_m, alpha).mean()
        return (loss_i2t + loss_t2i) / 2, keys.own_columns(i2t), keys.own_columns(t2i)

    def mlm(
        self,
        states: Tensor,
        positions: Tensor,
        labels: Tensor,
        teacher_logits: Tensor,
        alpha: Tensor,
        count: Tensor | None,
    ) -> Tensor:
        """Masked language modelling at the masked positions, given the fused states [B,L,D] of the
        masked captions."""
        valid = labels != IGNORE
        if self.compat.soft_mlm_over_text:
            everywhere = self.text_encoder.logits(states)
            hard = distilled_cross_entropy(
                everywhere.flatten(0, 1).index_select(0, positions), labels
            )
            soft = sequence_axis_soft_loss(everywhere, positions, teacher_logits)
            return masked_mean((1 - alpha) * hard + alpha * soft, valid, over_ranks=False)
        logits = self.text_encoder.logits(states.flatten(0, 1).index_select(0, positions))
        loss = distilled_cross_entropy(logits, labels, teacher_logits, alpha)
        return masked_mean(loss, valid, not self.compat.means_of_rank, count)

    def mim_positions(self, patch_mask: Tensor) -> Tensor:
        """Positions of the masked patches of bool [B,N], filled up with others: int64 [B,K]."""
        return masked_patches(patch_mask, min(self.config.max_masked_patches, patch_mask.shape[1]))

    def mim(
        self,
        seen: tuple[Tensor, Tensor],
        seen_m: tuple[Tensor, Tensor],
        patch_mask: Tensor,
        positions: Tensor | None,
        visual_codes: Tensor,
        text_mask: Tensor,
        alpha: Tensor,
        count: Tensor | None,
    ) -> Tensor:
        """Masked image modelling: the codes of masked patches from the visible ones and the
        caption's embeddings.

        seen, seen_m: the patches [B,N,D] and the caption's embedding-layer states [B,L,D], the
        student's and the teacher's. The image tokens are the transformer's queries, the caption's
        states its keys and values.
        """
        if positions is None:
            positions = self.mim_positions(patch_mask)
        valid = patch_mask.gather(1, positions)
        labels = visual_codes.gather(1, positions)

        def logits(
            encoder: nn.Module, bert: nn.Module, head: nn.Module, patches: Tensor, text: Tensor
        ) -> Tensor:
            queries = bert.embeddings(embeds=encoder(patches, patch_mask))
            fused = bert.fuse(queries, None, text, image_mask=text_mask, keep=positions + 1)
            return head(fused).flatten(0, 1)

        with torch.no_grad():
            teacher_logits = logits(self.visual_encoder_m, self.bert_m, self.mim_head_m, *seen_m)
        student_logits = logits(self.visual_encoder, self.bert, self.mim_head, *seen)
        loss = distilled_cross_entropy(student_logits, labels.flatten(), teacher_logits, alpha)
        return masked_mean(loss, valid.flatten(), not self.compat.means_of_rank, count)

    def pseudo_label(
        self,
        student: Features,
        teacher: Teacher,
        text_ids: Tensor,
        text_mask: Tensor,
        alpha: Tensor,
    ) -> Tensor:
        """Keyword prediction from the image feature; the keywords are the tokens the teacher's
        [CLS] attends to."""
        config = self.config
        allowed = None
        if not self.compat.any_keyword:
            allowed = text_mask
            for special in config.special_ids:
                allowed = allowed & (text_ids != special)
        target, _ = keyword_targets(
            teacher.cls_attention,
            text_ids,
            allowed,
            config.bert.vocab_size,
            config.keyword_votes,
            config.keywords,
        )
        if self.compat.any_keyword:
            target[:, config.cls_id] = 0.0
        teacher_logits = self.concept_head_m(teacher.features.image)
        return distilled_binary_cross_entropy(
            self.concept_head(student.image), target, teacher_logits, alpha
        )


def with_counts(batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The micro-batches of an update, to each of which is added how many masked tokens and patches
    one has, 0-d: the mean over all of them and all processes, as `mlm_count` and `mim_count`. So
    each counts the same, in whichever micro-batch it is."""
    masks = {"mlm_count": [batch["mlm_labels"] != IGNORE for batch in batches]}
    if "patch_mask" in batches[0]:
        masks["mim_count"] = [batch["patch_mask"] for batch in batches]
    for name, counted in masks.items():
        count = mean_count(counted)
        for batch in batches:
            batch[name] = count
    return batches


def check_config(config: SimlaConfig) -> None:
    """Raise UserError where the losses asked for do not fit the networks."""
    if config.mim and not config.bert.single_stream:
        raise UserError(
            "mim needs a single-stream BERT (add_cross_attention: true in the BERT JSON); set mim to "
            "false"
        )
    if config.mim and not config.vit.mask_token:
        raise UserError("mim replaces patches by vit.mask_token: set it to true, or mim to false")
    if config.mim and config.bert.hidden_size != config.bert.encoder_width:
        raise UserError(
            f"mim uses text states as keys: set vision_width to {config.bert.hidden_size}, the "
            "hidden_size of the BERT JSON"
        )
    if config.mim and config.bert.max_position_embeddings <= config.vit.grid**2:
        raise UserError(
            f"mim feeds {config.vit.grid**2 + 1} image tokens through BERT, whose "
            f"max_position_embeddings is {config.bert.max_position_embeddings}: lower image_res"
        )
    if config.max_masked_patches <= 0:
        raise UserError(f"max_masked_patches {config.max_masked_patches} must be positive")
