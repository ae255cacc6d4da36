"""Visual question answering on top of SIMLA or ALBEF: a question encoder and a decoder that ranks
answers.

The encoder fuses question and image; the causal decoder attends to its states. Training: weighted
answers, soft targets of a momentum teacher. Answering: the closed list of answers is ranked by
likelihood. `compat: original` reproduces the published code: SIMLA never passes alpha on, so its
teacher has no effect; and in the ranking the first token of an answer counts twice.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from models.fusion.base import check_widths
from models.fusion.compat import Compat
from models.fusion.losses import IGNORE, distilled_cross_entropy
from models.fusion.momentum import MomentumModel
from models.layers.vit import ViT, ViTConfig
from models.layers.xbert import BertConfig, DecoderCache, XBert, XBertLM

HEAD_ROWS = 4096  # decoder states per pass through the vocabulary when ranking


@dataclass
class VqaConfig:
    """Question answering; the defaults are SIMLA at 384 px."""

    vit: ViTConfig = field(default_factory=lambda: ViTConfig(image_size=384))
    bert: BertConfig = field(default_factory=BertConfig)
    decoder_layers: int = 6
    distill: bool = True  # soft targets from the momentum teacher
    compat: str = "none"  # "original" = the published code's numbers


class Vqa(MomentumModel):
    """Training forward: the loss. Evaluation: `rank_answers`."""

    momentum_of = ("visual_encoder", "text_encoder", "text_decoder")

    def __init__(self, config: VqaConfig):
        super().__init__(Compat.of(config.compat, simla=config.bert.single_stream))
        check_widths(config.vit, config.bert)
        self.config = config
        self.visual_encoder = ViT(config.vit)
        self.text_encoder = XBert(config.bert)
        width = config.bert.hidden_size
        layers = config.decoder_layers
        self.text_decoder = XBertLM(
            replace(config.bert, num_hidden_layers=layers, fusion_layer=0, encoder_width=width)
        )
        if config.distill:
            self.add_momentum_copies()

    @property
    def distils(self) -> bool:
        """Whether the teacher has any effect."""
        return self.config.distill and not self.compat.teacher_unused

    def forward(
        self,
        image: Tensor,
        text_ids: Tensor,
        text_mask: Tensor,
        answer_ids: Tensor,
        answer_mask: Tensor,
        answer_weight: Tensor,
        answer_question: Tensor,
        alpha: Tensor | float,
    ) -> dict[str, Tensor]:
        """loss_vqa, 0-d float32: the weighted negative log-likelihoods of all answers, divided by
        B.

        image [B,3,S,S]; the questions text_ids int64 [B,L], text_mask bool [B,L]; the answers of
        all of them, [CLS] tokens [SEP], in answer_ids int64 [A,M], answer_mask bool [A,M];
        answer_weight float32 [A] (0 = padding); answer_question int64 [A]: to which question an
        answer belongs; alpha = weight of the teacher's soft targets.

        The momentum update is the caller's, right before this call.
        """
        states = self.encode_question(image, text_ids, text_mask)
        logits = decode(
            self.text_decoder, states, text_mask, answer_ids, answer_mask, answer_question
        )
        soft = None
        if self.distils:
            with torch.no_grad():
                states_m = fuse(
                    self.visual_encoder_m, self.text_encoder_m, image, text_ids, text_mask
                )
                soft = decode(
                    self.text_decoder_m,
                    states_m,
                    text_mask,
                    answer_ids,
                    answer_mask,
                    answer_question,
                ).flatten(0, 1)
        target = answer_ids[:, 1:].masked_fill(~answer_mask[:, 1:], IGNORE)
        loss = distilled_cross_entropy(logits.flatten(0, 1), target.flatten(), soft, alpha)
        return {"loss_vqa": (loss.view_as(target).sum(1) * answer_weight).sum() / len(image)}

    def encode_question(self, image: Tensor, text_ids: Tensor, text_mask: Tensor) -> Tensor:
        """What the decoder attends to, [B,L,D]."""
        return fuse(self.visual_encoder, self.text_encoder, image, text_ids, text_mask)

    @torch.no_grad()
    def rank_answers(
        self,
        image: Tensor,
        text_ids: Tensor,
        text_mask: Tensor,
        answer_ids: Tensor,
        answer_length: Tensor,
        k: int,
    ) -> tuple[Tensor, Tensor]:
        """`(answers int64 [B,k], their probabilities among the k float32 [B,k])`, best first.

        answer_ids int64 [A,M] are [CLS] tokens [SEP] and padding, answer_length int64 [A] counts
        them without padding, k <= A. As in the paper the k candidates are the answers whose first
        token is likeliest; their whole likelihood decides.
        """
        states = self.encode_question(image, text_ids, text_mask)
        decoder = self.text_decoder
        cache = DecoderCache()
        start = answer_ids[:1, :1].expand(len(image), 1)
        hidden = decoder.bert(start, None, states, image_mask=text_mask, causal=True, cache=cache)
        first = decoder.exact_logits(hidden[:, 0]).log_softmax(-1)  # [B,V]
        score, candidates = first.index_select(1, answer_ids[:, 1]).topk(k, dim=1)
        if self.compat.first_token_twice:
            score = 2 * score
        score = score.flatten()
        chosen = candidates.flatten()
        for rows in same_length(answer_length[chosen]):
            answers = answer_ids[chosen[rows]][:, : int(answer_length[chosen[rows[0]]])]
            question = rows // k
            hidden = decoder.bert(
                answers[:, 1:-1],
                None,
                states,
                image_mask=text_mask,
                causal=True,
                rows=question,
                cache=cache.select(question),
            )
            later = answers[:, 2:]  # the tokens after the first
            likelihood = self.log_likelihood(hidden.flatten(0, 1), later.flatten())
            score[rows] += likelihood.view_as(later).sum(1)
        probability, order = score.view(-1, k).softmax(1).sort(dim=1, descending=True, stable=True)
        return candidates.gather(1, order), probability

    def log_likelihood(self, hidden: Tensor, target: Tensor) -> Tensor:
        """float32 [R] of next tokens int64 [R] given decoder states [R,D]."""
        found = []
        for states, tokens in zip(hidden.split(HEAD_ROWS), target.split(HEAD_ROWS), strict=True):
            logits = self.text_decoder.exact_logits(states)
            found.append(-distilled_cross_entropy(logits, tokens))
        return torch.cat(found)


def fuse(vit: ViT, bert: XBert, image: Tensor, text_ids: Tensor, text_mask: Tensor) -> Tensor:
    """Fused states of the question [B,L,D]."""
    return bert.fuse(bert.text_stage(text_ids, text_mask), text_mask, vit(image))


def decode(
    decoder: XBertLM,
    states: Tensor,
    mask: Tensor,
    answer_ids: Tensor,
    answer_mask: Tensor,
    question: Tensor,
) -> Tensor:
    """Logits [A,M-1,V] of the next token at each but the last position; keys of a question are
    computed once."""
    return decoder(
        answer_ids[:, :-1],
        answer_mask[:, :-1],
        states,
        image_mask=mask,
        rows=question,
        causal=True,
    )


def same_length(length: Tensor, most: int = 1024) -> Iterator[Tensor]:
    """Indices of `length` int64 [R] in groups of at most `most` equal entries: no group needs
    padding."""
    order = length.argsort(stable=True)
    _, counts = length[order].unique_consecutive(return_counts=True)
    for group in order.split(counts.tolist()):
        yield from group.split(most)
