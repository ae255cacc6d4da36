"""Dual encoders for training: CLIP, CL2L (CLIP-rocket), BarLIP, SiamLIP / BYOLIP, SwALIP, SLIP,
SimCLR, SigLIP, and ALIGN (models.dual_encoder.align).

    model = build_dual(DualConfig(model="CL2L_R50_CL2L", separate_proj=True))
    losses = model(image=..., image_local=..., text_ids=...)      # named 0-d tensors; minimise losses["loss"]

Batch (B pairs, A local views, L tokens): `image` float32 [B,3,H,W]; `text_ids` int64 [B,L], or
[B,1+A,L] whose first row is the global caption; `image_local` float32 [B,A,3,h,w] (CL2L family;
absent for A = 0); SLIP takes its two augmentations as `image_local` [B,2,3,H,W].

`features(**batch)` returns what the original models return, sample axis first, views second;
`losses(features)` reads nothing but those features, so cached features serve as well
(`models.dual_encoder.grad_cache`). For evaluation, `embed_image` and
`embed_text` return `feats`, `z` and, where the model has them, `h` embeddings, not normalised.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.dual_encoder.objectives import Features, LossOptions
from models.layers.clip_towers import (
    TextNoise,
    TextShape,
)


@dataclass(frozen=True, kw_only=True)
class DualConfig(LossOptions):
    """Everything that shapes a dual encoder and its loss; names and defaults are clip-rocket's
    command line's."""

    model: str = "CL2L_VITB16_CL2L"  # <CLIP|CL2L>_<backbone>_<head>, <CLIP|SLIP|SIMCLR>_<backbone>, ALIGN_<B*>_<BERT>
    image_size: int = (
        224  # side of the square global images, pixels; convolutional backbones take any size
    )
    embed_dim: int = 256  # width of the common space of images and texts
    clip_proj_type: str = (
        "linear"  # projectors of global views into the common space: linear or mlp
    )
    clip_hidden_dim: int = 4096  # hidden width of mlp projectors of global views
    cl2l_img_proj_type: str = (
        "mlp"  # with separate_proj, the projector of local images: linear or mlp
    )
    cl2l_txt_proj_type: str = (
        "mlp"  # with separate_proj, the projector of local texts: linear or mlp
    )
    cl2l_hidden_dim: int = 4096  # hidden width of mlp projectors of local views
    separate_proj: bool = False  # local views get projectors and a temperature of their own
    separate_proj_child: bool = (
        False  # BarLIP's and SiamLIP's heads of local views are their own, not the global ones
    )
    detach_proj: bool = (
        False  # no gradient from the global text projector into the text transformer
    )
    text_dropout_prob: float = 0.0  # dropout at the entry of every text block, for local texts
    text_drop_path_prob: float = (
        0.0  # probability of skipping a branch of a text block, for local texts
    )
    barlip_proj_dim: int = 8192  # width in which BarLIP's cross-correlations are taken
    barlip_hidden_dim: int = 3000  # hidden width of BarLIP's expanders
    siamlip_proj_dim: int = 128  # width of SiamLIP's projections and predictions
    siamlip_hidden_dim: int = 2048  # hidden width of SiamLIP's projectors and predictors
    siamlip_no_last_bn: bool = False  # leave out the batch norm behind SiamLIP's projectors
    swalip_proj_dim: int = 128  # SWALIPV1: width of projections and prototypes
    swalip_hidden_dim: int = 2048  # SWALIPV1: hidden width of the projectors
    swalip_num_proto: int = 3000  # SWALIPV1: number of prototypes
    swalip_temperature: float = 0.1  # SWALIPV1: temperature of the scores of prototypes
    swalip_learn_temperature: bool = False  # SWALIPV1: train that temperature, too
    swalip_no_shared_proto: bool = (
        False  # SWALIPV1: one set of prototypes per modality, not one for both
    )
    ssl_mlp_dim: int = 4096  # hidden width of SLIP's and SimCLR's projector of images
    ssl_emb_dim: int = 256  # width in which SLIP and SimCLR compare two augmentations
    context_length: int = 77  # longest text in tokens, start and end included
    vocab_size: int = 49408  # tokens known; main.py takes it from the merges (bpe_path)
    text_width: int = 512  # width of the text transformer
    text_heads: int = 8  # attention heads of the text transformer
    transformer_layers: int = 12  # blocks of the text transformer
    text_activation: str = "quick_gelu"  # of the text transformer: quick_gelu or gelu
    temperature: float = 1.0  # ALIGN's at the start; learned
    virtual_batch_size: int = (
        16  # samples over which ALIGN's batch norm takes statistics; 0 = the process's batch
    )
    drop_connect: float = 0.2  # stochastic depth of ALIGN's image tower
    bert_dropout: float = 0.1  # of ALIGN's text tower

    @property
    def text(self) -> TextShape:
        return TextShape(
            self.context_length,
            self.vocab_size,
            self.text_width,
            self.text_heads,
            self.transformer_layers,
            self.text_activation,
        )

    @property
    def text_noise(self) -> TextNoise:
        return TextNoise(
            self.text_dropout_prob, self.text_drop_path_prob, over_positions=self.original
        )


class DualEncoder(nn.Module):
    """The way through every model here: batch -> features -> losses."""

    config: DualConfig
    loss = None  # function of models.dual_encoder.objectives

    def forward(
        self,
        momentum: Features | None = None,
        features_only: bool = False,
        feature_grads: Features | None = None,
        **batch: Tensor,
    ) -> Features:
        """Named 0-d losses of a batch.

        momentum: features of the momentum model for the same batch (BYOLIP's targets).
        features_only: return the features instead.
        feature_grads: return `loss` = Σ ⟨feature, its given gradient⟩, whose gradient continues a
        cached backward pass.
        """
        out = self.features(**batch)
        if features_only:
            return out
        if feature_grads is not None:
            return {
                "loss": sum(
                    (out[name].float() * grad.float()).sum() for name, grad in feature_grads.items()
                )
            }
        return self.losses(out, momentum)

    def losses(self, out: Features, momentum: Features | None = None) -> Features:
        """Losses of features of `features`, and of a momentum model's under the same names."""
        if momentum is not None:
            out = out | {f"{name}_momentum": value for name, value in momentum.items()}
        # in float32 under autocast, too: rounding logits to bfloat16 changes gradients by 8 % at temperature 0.01
        device = next(iter(out.values())).device.type
        exact = {
            name: value.to(torch.promote_types(value.dtype, torch.float32))
            for name, value in out.items()
        }
        with torch.autocast(device, enabled=False):
            return type(self).loss(exact, self.options)

    @property
    def options(self) -> LossOptions:
        """Options of the loss; a dual encoder's configuration holds them."""
        return self.config

    def example_batch(
        self, pairs: int, images: int, captions: int, tokens: int = 32
    ) -> dict[str, Tensor]:
        """A batch with so many local images and captions, without data (meta device), to count
        FLOPs with."""
        image = torch.zeros(pairs, 3, self.config.image_size, self.config.image_size, device="meta")
        length = min(tokens, self.config.context_length)
        ids = torch.zeros(pairs, 1 + captions, length, dtype=torch.int64, device="meta")
        local = {"image_local": image[:, None].expand(-1, images, -1, -1, -1)} if images else {}
        return {"image": image, "text_ids": ids if captions else ids[:, 0], **local}

    def after_update(self) -> None:
        """What follows every optimizer step, on all processes."""
        self.clamp_scales()


# in checkpoints, but not of the network: the teacher, and what only transformers' AlignModel holds
NOT_LOADED = ("momentum_model.*", "text_model.pooler.*")


def names_by_decay(model: nn.Module, original: bool = False) -> tuple[list[str], list[str]]:
    """Trainable parameters with and without weight decay, each in module order.

    Without: vectors and scalars, token and position embeddings, the class token. `original` follows
    clip-rocket:
    without are vectors, scalars and whatever has `bias`, `ln` or `bn` in its name; embeddings
    decay. ALIGN: without are the parameters of batch norms alone.
    """
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if hasattr(model, "free_of_decay"):
        free = model.free_of_decay()
        return [name for name in trained if name not in free], [
            name for name in trained if name in free
        ]
    substrings = (
        ("bias", "ln", "bn")
        if original
        else ("positional_embedding", "token_embedding", "cls_token", "pos_embed")
    )
    decay, no_decay = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            free = parameter.ndim < 2 or any(part in name for part in substrings)
            (no_decay if free else decay).append(name)
    return decay, no_decay


@torch.no_grad()
def follow(teacher: nn.Module, model: nn.Module, tau: float) -> None:
    """Momentum model: teacher <- tau · teacher + (1 - tau) · model for every parameter; buffers
    stay its own.

    Called after each optimizer step and before `clamp_scales`.
    """
    torch._foreach_lerp_(list(teacher.parameters()), list(model.parameters()), 1 - tau)


def zeroshot_similarities(image: Features, text: Features) -> Features:
    """Cosine similarities [B,C] of `embed_image` and `embed_text` outputs: `z_sim` and, where
    present, `h_sim`."""
    unit = [
        {k: v / v.norm(dim=-1, keepdim=True) for k, v in side.items() if k != "feats"}
        for side in (image, text)
    ]
    return {f"{name}_sim": unit[0][name] @ unit[1][name].T for name in unit[0]}
