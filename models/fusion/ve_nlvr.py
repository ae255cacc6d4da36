"""Judging a statement about one image (visual entailment) or about two (NLVR2), on top of SIMLA or
ALBEF."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from models.fusion.base import check_widths, first_token
from models.fusion.compat import Compat
from models.fusion.losses import distilled_cross_entropy
from models.fusion.momentum import MomentumModel
from models.fusion.text_assignment import pair_layers
from models.layers.heads import exact
from models.layers.vit import ViT, ViTConfig
from models.layers.xbert import BertConfig, XBert


@dataclass
class StatementConfig:
    """The judge of statements; the defaults are SIMLA's visual entailment at 384 px."""

    vit: ViTConfig = field(default_factory=lambda: ViTConfig(image_size=384))
    bert: BertConfig = field(default_factory=BertConfig)
    classes: int = 3  # C
    # two images: first text layer of the pairs, see `text_assignment.pair_layers`
    paired_from: int | None = None
    distill: bool = True  # soft targets from the momentum teacher
    compat: str = "none"  # "original" = the published code's numbers


class StatementModel(MomentumModel):
    """Training forward: the loss. Evaluation: `logits`."""

    momentum_of = ("visual_encoder", "text_encoder", "cls_head")

    def __init__(self, config: StatementConfig):
        super().__init__(Compat.of(config.compat, simla=config.bert.single_stream))
        check_widths(config.vit, config.bert)
        self.config = config
        self.visual_encoder = ViT(config.vit)
        self.text_encoder = XBert(config.bert)
        if config.paired_from is not None:
            pair_layers(self.text_encoder, config.paired_from)
        width = config.bert.hidden_size
        self.cls_head = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, config.classes)
        )
        if config.distill:
            self.add_momentum_copies()

    def forward(
        self,
        image: Tensor,
        text_ids: Tensor,
        text_mask: Tensor,
        label: Tensor,
        alpha: Tensor | float,
    ) -> dict[str, Tensor]:
        """loss_cls, 0-d float32, of a batch: image [B,3,S,S], or [B,2,3,S,S] for two images;
        text_ids int64 [B,L], text_mask bool [B,L], label int64 [B]; alpha = weight of the teacher's
        soft targets.

        The momentum update is the caller's, right before this call.
        """
        state = fused_cls(self.visual_encoder, self.text_encoder, image, text_ids, text_mask)
        logits = self.cls_head(state)
        soft = None
        if self.config.distill:
            with torch.no_grad():
                state_m = fused_cls(
                    self.visual_encoder_m, self.text_encoder_m, image, text_ids, text_mask
                )
                soft = self.cls_head_m(state_m)
        return {"loss_cls": distilled_cross_entropy(logits, label, soft, alpha).mean()}

    def logits(self, image: Tensor, text_ids: Tensor, text_mask: Tensor) -> Tensor:
        """For evaluation: float32 [B,C], not rounded under autocast; arguments as in `forward`."""
        state = fused_cls(self.visual_encoder, self.text_encoder, image, text_ids, text_mask)
        return exact(self.cls_head, state)


def fused_cls(vit: ViT, bert: XBert, image: Tensor, text_ids: Tensor, text_mask: Tensor) -> Tensor:
    """Fused [CLS] states [B,D]; arguments as in `StatementModel.forward`."""
    if image.ndim == 5:
        tokens = vit(image.flatten(0, 1)).unflatten(0, image.shape[:2])
        tokens = [tokens[:, 0], tokens[:, 1]]
    else:
        tokens = vit(image)
    stage = bert.text_stage(text_ids, text_mask)
    return bert.fuse(stage, text_mask, tokens, keep=first_token(stage))[:, 0]
