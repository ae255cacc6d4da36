"""Dual encoders for training: CLIP, CL2L (CLIP-rocket), BarLIP, SiamLIP / BYOLIP, SwALIP, SLIP, SimCLR, SigLIP, and
ALIGN (models.align).

    model = build_dual(DualConfig(model="CL2L_R50_CL2L", separate_proj=True))
    losses = model(image=..., image_local=..., text_ids=...)      # named 0-d tensors; minimise losses["loss"]

Batch (B pairs, A local views, L tokens): `image` float32 [B,3,H,W]; `text_ids` int64 [B,L], or [B,1+A,L] whose first
row is the global caption; `image_local` float32 [B,A,3,h,w] (CL2L family; absent for A = 0); SLIP takes its two
augmentations as `image_local` [B,2,3,H,W].

`features(**batch)` returns what the original models return, sample axis first, views second; `losses(features)` reads
nothing but those features, so cached features serve as well (`models.grad_cache`). For evaluation, `embed_image` and
`embed_text` return `feats`, `z` and, where the model has them, `h` embeddings, not normalised.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models import dual_losses
from models.clip import (
    BACKBONES,
    Prototypes,
    TextNoise,
    TextShape,
    TwoTowers,
    barlip_projector,
    has_batch_norm,
    linear_projector,
    mlp_projector,
    nearest,
    siamlip_predictor,
    siamlip_projector,
    swalip_projector,
)
from models.contrastive import normalize
from models.dual_losses import Features, LossOptions
from models.errors import ModelError


@dataclass(frozen=True, kw_only=True)
class DualConfig(LossOptions):
    """Everything that shapes a dual encoder and its loss; names and defaults are clip-rocket's command line's."""

    model: str = "CL2L_VITB16_CL2L"  # <CLIP|CL2L>_<backbone>_<head>, <CLIP|SLIP|SIMCLR>_<backbone>, ALIGN_<B*>_<BERT>
    image_size: int = 224  # side of the square global pictures, pixels; convolutional backbones take any size
    embed_dim: int = 256  # width of the common space of pictures and texts
    clip_proj_type: str = "linear"  # projectors of global views into the common space: linear or mlp
    clip_hidden_dim: int = 4096  # hidden width of mlp projectors of global views
    cl2l_img_proj_type: str = "mlp"  # with separate_proj, the projector of local pictures: linear or mlp
    cl2l_txt_proj_type: str = "mlp"  # with separate_proj, the projector of local texts: linear or mlp
    cl2l_hidden_dim: int = 4096  # hidden width of mlp projectors of local views
    separate_proj: bool = False  # local views get projectors and a temperature of their own
    separate_proj_child: bool = False  # BarLIP's and SiamLIP's heads of local views are their own, not the global ones
    detach_proj: bool = False  # no gradient from the global text projector into the text transformer
    text_dropout_prob: float = 0.0  # dropout at the entry of every text block, for local texts
    text_drop_path_prob: float = 0.0  # probability of skipping a branch of a text block, for local texts
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
    swalip_no_shared_proto: bool = False  # SWALIPV1: one set of prototypes per modality, not one for both
    ssl_mlp_dim: int = 4096  # hidden width of SLIP's and SimCLR's projector of pictures
    ssl_emb_dim: int = 256  # width in which SLIP and SimCLR compare two augmentations
    context_length: int = 77  # longest text in tokens, start and end included
    vocab_size: int = 49408  # tokens known; main.py takes it from the merges (bpe_path)
    text_width: int = 512  # width of the text transformer
    text_heads: int = 8  # attention heads of the text transformer
    transformer_layers: int = 12  # blocks of the text transformer
    text_activation: str = "quick_gelu"  # of the text transformer: quick_gelu or gelu
    temperature: float = 1.0  # ALIGN's at the start; learned
    virtual_batch_size: int = 16  # samples over which ALIGN's batch norm takes statistics; 0 = the process's batch
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
        return TextNoise(self.text_dropout_prob, self.text_drop_path_prob, over_positions=self.original)


class DualEncoder(nn.Module):
    """The way through every model here: batch -> features -> losses."""

    config: DualConfig
    loss = None  # function of models.dual_losses

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
        feature_grads: return `loss` = Σ ⟨feature, its given gradient⟩, whose gradient continues a cached backward pass.
        """
        out = self.features(**batch)
        if features_only:
            return out
        if feature_grads is not None:
            return {"loss": sum((out[name].float() * grad.float()).sum() for name, grad in feature_grads.items())}
        return self.losses(out, momentum)

    def losses(self, out: Features, momentum: Features | None = None) -> Features:
        """Losses of features of `features`, and of a momentum model's under the same names."""
        if momentum is not None:
            out = out | {f"{name}_momentum": value for name, value in momentum.items()}
        return type(self).loss(out, self.config)

    def example_batch(self, pairs: int, pictures: int, captions: int, tokens: int = 32) -> dict[str, Tensor]:
        """A batch with so many local pictures and captions, without data (meta device), to count FLOPs with."""
        image = torch.zeros(pairs, 3, self.config.image_size, self.config.image_size, device="meta")
        length = min(tokens, self.config.context_length)
        ids = torch.zeros(pairs, 1 + captions, length, dtype=torch.int64, device="meta")
        local = {"image_local": image[:, None].expand(-1, pictures, -1, -1, -1)} if pictures else {}
        return {"image": image, "text_ids": ids if captions else ids[:, 0], **local}

    def after_update(self) -> None:
        """What follows every optimizer step, on all processes."""
        self.clamp_scales()


class CLIP(DualEncoder, TwoTowers):
    """Image tower and text transformer, each with a projector into the common space (z)."""

    loss = staticmethod(dual_losses.clip)

    def __init__(self, config: DualConfig, visual: nn.Module, scales: dict[str, float] | None = None):
        super().__init__(visual, config.text, {"logit_scale": math.log(1 / 0.07), **(scales or {})})
        self.config = config
        self.image_projector = self._projector(visual.num_features)
        self.text_projector = self._projector(config.text_width)

    def _projector(self, width: int) -> nn.Module:
        kind, out = self.config.clip_proj_type, self.config.embed_dim
        if choose(kind, ("linear", "mlp"), "clip_proj_type") == "linear":
            return linear_projector(width, out, std=width**-0.5)
        return mlp_projector(width, self.config.clip_hidden_dim, out)

    def project_text(self, feats: Tensor) -> Tensor:
        return self.text_projector(feats.detach() if self.config.detach_proj else feats)

    def features(self, image: Tensor, text_ids: Tensor, image_local: Tensor | None = None) -> Features:
        """`feats_*` [B,C], [B,T], `z_*` [B,E], and the scale of the logits. Local views are ignored."""
        image_feats = self.visual(image)
        text_feats = self.text_features(text_ids[:, 0] if text_ids.ndim == 3 else text_ids)
        return {
            "feats_image": image_feats,
            "z_image": self.image_projector(image_feats),
            "feats_text": text_feats,
            "z_text": self.project_text(text_feats),
            "logit_scale": self.logit_scale.exp(),
        }

    def embed_image(self, image: Tensor) -> Features:
        """Pictures [B,3,H,W] -> `feats` [B,C], `z` [B,E] and, for the CL2L family, `h` [B,E]."""
        feats = self.visual(image)
        return {"feats": feats, "z": self.image_projector(feats)}

    def embed_text(self, text_ids: Tensor) -> Features:
        """Texts int64 [B,L] -> `feats` [B,T], `z` [B,E] and, for the CL2L family, `h` [B,E]."""
        feats = self.text_features(text_ids)
        return {"feats": feats, "z": self.project_text(feats)}


class SigLIP(CLIP):
    """CLIP's towers under SigLIP's pairwise loss: a learned bias beside the scale, from which training starts at 10."""

    loss = staticmethod(dual_losses.siglip)

    def __init__(self, config: DualConfig, visual: nn.Module):
        super().__init__(config, visual, {"logit_bias": -10.0})
        nn.init.constant_(self.logit_scale, math.log(10))

    def features(self, image: Tensor, text_ids: Tensor, image_local: Tensor | None = None) -> Features:
        return super().features(image, text_ids) | {"logit_bias": self.logit_bias * 1.0}


class CL2L(CLIP):
    """CLIP-rocket: a weak global view and A strong local views of both picture and caption."""

    loss = staticmethod(dual_losses.cl2l)

    def __init__(self, config: DualConfig, visual: nn.Module):
        super().__init__(config, visual, {"l2l_logit_scale": math.log(1 / 0.1)} if config.separate_proj else None)
        if config.separate_proj:
            self.l2l_image_projector = self._local_projector(visual.num_features, "cl2l_img_proj_type")
            self.l2l_text_projector = self._local_projector(config.text_width, "cl2l_txt_proj_type")
        else:
            self.l2l_image_projector, self.l2l_text_projector = self.image_projector, self.text_projector
        self.join_views = not has_batch_norm(visual)

    def _local_projector(self, width: int, knob: str) -> nn.Module:
        if choose(getattr(self.config, knob), ("linear", "mlp"), knob) == "linear":
            return linear_projector(width, self.config.embed_dim)
        return mlp_projector(width, self.config.cl2l_hidden_dim, self.config.embed_dim)

    @property
    def local_scale(self) -> Tensor:
        return (self.l2l_logit_scale if self.config.separate_proj else self.logit_scale).exp()

    def features(self, image: Tensor, text_ids: Tensor, image_local: Tensor | None = None) -> Features:
        """`z_*_global` [B,E] of the global views, `h_*_local` [B,A,E] of the local ones, `feats_*` behind both."""
        if text_ids.ndim == 2:
            text_ids = text_ids[:, None]
        views = 0 if image_local is None else image_local.shape[1]
        if text_ids.shape[1] != 1 + views:
            raise ModelError(
                f"text_ids holds {text_ids.shape[1]} rows a sample, but {1 + views} belong to 1 global and {views} "
                "local pictures: give the tokenizer and the image transform the same num_augs"
            )
        image_feats, image_local_feats = self._image_views(image, image_local)
        text_feats, text_local_feats = self._text_views(text_ids)
        out = {
            "feats_image": image_feats,
            "feats_text": text_feats,
            "logit_scale": self.logit_scale.exp(),
            "z_image_global": self.image_projector(image_feats),
            "z_text_global": self.project_text(text_feats),
            "h_logit_scale": self.local_scale,
        }
        if views:
            out |= {
                "feats_image_local": image_local_feats,
                "feats_text_local": text_local_feats,
                "h_image_local": per_view(self.l2l_image_projector, image_local_feats),
                "h_text_local": per_view(self.l2l_text_projector, text_local_feats),
            }
        return out

    def _image_views(self, image: Tensor, image_local: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """[B,C] and [B,A,C]; one pass for all views where no batch statistics are involved and the sizes agree."""
        if image_local is None:
            return self.visual(image), None
        if not self.join_views:
            return self.visual(image), torch.stack([self.visual(view) for view in image_local.unbind(1)], 1)
        if image.shape[1:] != image_local.shape[2:]:
            return self.visual(image), self.visual(image_local.flatten(0, 1)).unflatten(0, image_local.shape[:2])
        every = self.visual(torch.cat([image, image_local.flatten(0, 1)]))
        return every[: len(image)], every[len(image) :].unflatten(0, image_local.shape[:2])

    def _text_views(self, text_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """[B,T] and [B,A,T] of int64 [B,1+A,L]; local texts see the noise, the global one does not."""
        views, noise = text_ids.shape[1] - 1, self.config.text_noise
        if not (self.training and noise.active) or not views:
            every = self.text_features(text_ids.flatten(0, 1)).unflatten(0, text_ids.shape[:2])
            return every[:, 0], every[:, 1:] if views else None
        feats, local = self.text_features(text_ids[:, 0]), text_ids[:, 1:]
        if noise.over_positions:  # each view draws its own mask for the whole batch
            return feats, torch.stack([self.text_features(view, noise) for view in local.unbind(1)], 1)
        return feats, self.text_features(local.flatten(0, 1), noise).unflatten(0, local.shape[:2])

    def embed_image(self, image: Tensor) -> Features:
        out = super().embed_image(image)
        return out | {"h": self.l2l_image_projector(out["feats"])}

    def embed_text(self, text_ids: Tensor) -> Features:
        out = super().embed_text(text_ids)
        return out | {"h": self.l2l_text_projector(out["feats"])}


def per_view(head: nn.Module, feats: Tensor) -> Tensor:
    """head of [B,A,D] along the last axis; each view has its own batch statistics."""
    if feats.ndim == 2:
        return head(feats)
    if not has_batch_norm(head):
        return head(feats)
    return torch.stack([head(view) for view in feats.unbind(1)], 1)


class BarLIP(CL2L):
    """CL2L with an expander per modality and view kind, whose outputs (v) Barlow Twins decorrelates."""

    loss = staticmethod(dual_losses.barlip)

    def __init__(self, config: DualConfig, visual: nn.Module):
        super().__init__(config, visual)
        widths = {"image": visual.num_features, "text": config.text_width}
        for modality, width in widths.items():
            head = barlip_projector(width, config.barlip_hidden_dim, config.barlip_proj_dim)
            self.add_module(f"barlip_{modality}_projector_global", head)
        for modality, width in widths.items():
            head = self.get_submodule(f"barlip_{modality}_projector_global")
            if config.separate_proj_child:
                head = barlip_projector(width, config.barlip_hidden_dim, config.barlip_proj_dim)
            self.add_module(f"barlip_{modality}_projector_local", head)

    def features(self, image: Tensor, text_ids: Tensor, image_local: Tensor | None = None) -> Features:
        """CL2L's, and `v_*` [B,D], `v_*_local` [B,A,D]."""
        out = super().features(image, text_ids, image_local)
        return out | child_outputs(self, out, "barlip_{}_projector", "v", "feats")


def child_outputs(model: nn.Module, out: Features, head: str, name: str, source: str) -> Features:
    """`{name}_{image,text}[_local]` = the model's `head` (modality filled in, `_global` / `_local`) of `source`."""
    result = {}
    for view, kind in (("", "global"), ("_local", "local")):
        for modality in ("image", "text"):
            if f"{source}_{modality}{view}" in out:
                module = model.get_submodule(f"{head.format(modality)}_{kind}")
                result[f"{name}_{modality}{view}"] = per_view(module, out[f"{source}_{modality}{view}"])
    return result


class SiamLIP(CL2L):
    """CL2L with projectors (v) and predictors (p) of SimSiam; with a momentum model's targets it is BYOLIP."""

    loss = staticmethod(dual_losses.siamlip)

    def __init__(self, config: DualConfig, visual: nn.Module):
        super().__init__(config, visual)
        hidden, out = config.siamlip_hidden_dim, config.siamlip_proj_dim
        widths = {"image": visual.num_features, "text": config.text_width}
        inner = {m: siamlip_projector(width, hidden, out) for m, width in widths.items()}
        for kind in ("global", "local"):
            for modality, width in widths.items():
                if kind == "local" and config.separate_proj_child:
                    inner[modality] = siamlip_projector(width, hidden, out)
                self.add_module(f"siamlip_{modality}_projector_{kind}", self._with_last_norm(inner[modality]))
        predictors = {f"{pair}_predictor": siamlip_predictor(out, hidden, out) for pair in ("image_text", "text_image")}
        for kind in ("global", "local"):
            for name in predictors:
                if kind == "local" and config.separate_proj_child:
                    predictors[name] = siamlip_predictor(out, hidden, out)
                self.add_module(f"{name}_{kind}", predictors[name])

    def _with_last_norm(self, inner: nn.Module) -> nn.Module:
        """The projector and its own affine-free batch norm: global and local may share the former, never the latter."""
        if self.config.siamlip_no_last_bn:
            return inner
        return nn.Sequential(inner, nn.BatchNorm1d(self.config.siamlip_proj_dim, affine=False))

    def features(self, image: Tensor, text_ids: Tensor, image_local: Tensor | None = None) -> Features:
        """CL2L's, and `v_*`, `p_*` [B,D], `v_*_local`, `p_*_local` [B,A,D]."""
        out = super().features(image, text_ids, image_local)
        out |= child_outputs(self, out, "siamlip_{}_projector", "v", "feats")
        for view, kind in (("", "global"), ("_local", "local")):
            for modality, pair in (("image", "image_text"), ("text", "text_image")):
                if f"v_{modality}{view}" in out:
                    predictor = self.get_submodule(f"{pair}_predictor_{kind}")
                    out[f"p_{modality}{view}"] = per_view(predictor, out[f"v_{modality}{view}"])
        return out


class SwALIP(CL2L):
    """CL2L's network under the swapped-assignment loss without prototypes."""

    loss = staticmethod(dual_losses.swalip)


class SwALIPV1(CLIP):
    """CLIP with projectors onto learned prototypes (SwAV) shared by both modalities, or one set each."""

    loss = staticmethod(dual_losses.swalipv1)

    def __init__(self, config: DualConfig, visual: nn.Module):
        super().__init__(config, visual, {"swalip_logit_scale": math.log(1 / config.swalip_temperature)})
        self.swalip_logit_scale.requires_grad_(config.swalip_learn_temperature)
        hidden, out = config.swalip_hidden_dim, config.swalip_proj_dim
        self.swalip_image_projector = swalip_projector(visual.num_features, hidden, out)
        self.swalip_text_projector = swalip_projector(config.text_width, hidden, out)
        self.image_prototypes = self.text_prototypes = Prototypes(out, config.swalip_num_proto)
        if config.swalip_no_shared_proto:
            self.text_prototypes = Prototypes(out, config.swalip_num_proto)

    def features(self, image: Tensor, text_ids: Tensor, image_local: Tensor | None = None) -> Features:
        """CLIP's, and projections `h_*` [B,D], prototype scores `p_*` [B,K]."""
        out = super().features(image, text_ids)
        h_image = self.swalip_image_projector(out["feats_image"])
        h_text = self.swalip_text_projector(out["feats_text"])
        return out | {
            "h_image": h_image,
            "h_text": h_text,
            "p_image": self.image_prototypes(normalize(h_image)),
            "p_text": self.text_prototypes(normalize(h_text)),
            "swalip_logit_scale": self.swalip_logit_scale.exp(),
        }

    def freeze_prototypes(self) -> None:
        """Drop the prototypes' gradients: called between backward and update in the first iterations."""
        for prototypes in (self.image_prototypes, self.text_prototypes):
            prototypes.weight_v.grad = None


class SlipCLIP(DualEncoder, TwoTowers):
    """SLIP's CLIP: projections are plain matrices at the root."""

    loss = staticmethod(dual_losses.slip_clip)

    def __init__(self, config: DualConfig, visual: nn.Module):
        widths = {"image_projection": visual.num_features, "text_projection": config.text_width}
        matrices = {name: (width, config.embed_dim) for name, width in widths.items()}
        super().__init__(visual, config.text, {"logit_scale": math.log(1 / 0.07)}, matrices)
        self.config = config

    def features(self, image: Tensor, text_ids: Tensor, image_local: Tensor | None = None) -> Features:
        """`image_embed`, `text_embed` [B,E] and the scale."""
        return self._language(self.visual(image), text_ids)

    def _language(self, image_feats: Tensor, text_ids: Tensor) -> Features:
        text_feats = self.text_features(text_ids[:, 0] if text_ids.ndim == 3 else text_ids)
        return {
            "image_embed": image_feats @ self.image_projection,
            "text_embed": text_feats @ self.text_projection,
            "logit_scale": self.logit_scale.exp(),
        }

    def embed_image(self, image: Tensor) -> Features:
        feats = self.visual(image)
        return {"feats": feats, "z": feats @ self.image_projection}

    def embed_text(self, text_ids: Tensor) -> Features:
        feats = self.text_features(text_ids)
        return {"feats": feats, "z": feats @ self.text_projection}


class Slip(SlipCLIP):
    """SLIP: CLIP on the picture, SimCLR on two augmentations of it, one tower for all three."""

    loss = staticmethod(dual_losses.slip)

    def __init__(self, config: DualConfig, visual: nn.Module):
        super().__init__(config, visual)
        self.image_mlp = mlp_projector(visual.num_features, config.ssl_mlp_dim, config.ssl_emb_dim)

    def features(self, image: Tensor, text_ids: Tensor, image_local: Tensor) -> Features:
        """CLIP's, and `aug1_embed`, `aug2_embed` [B,D]; `image_local` [B,2,3,H,W] are the augmentations."""
        if has_batch_norm(self.visual):
            feats = [self.visual(view) for view in (image, *image_local.unbind(1))]
        else:
            feats = self.visual(torch.cat([image, *image_local.unbind(1)])).chunk(3)
        augmented = {f"aug{i}_embed": self.image_mlp(view) for i, view in enumerate(feats[1:], 1)}
        return augmented | self._language(feats[0], text_ids)


class SimCLR(DualEncoder):
    """SLIP's self-supervised baseline: the image tower and its projector."""

    loss = staticmethod(dual_losses.slip_simclr)

    def __init__(self, config: DualConfig, visual: nn.Module):
        super().__init__()
        self.config, self.visual = config, visual
        self.image_mlp = mlp_projector(visual.num_features, config.ssl_mlp_dim, config.ssl_emb_dim)

    def features(self, image_local: Tensor, image: Tensor | None = None, text_ids: Tensor | None = None) -> Features:
        """`aug1_embed`, `aug2_embed` [B,D] of `image_local` [B,2,3,H,W]; the other inputs are ignored."""
        if has_batch_norm(self.visual):
            feats = [self.visual(view) for view in image_local.unbind(1)]
        else:
            feats = self.visual(torch.cat(image_local.unbind(1))).chunk(2)
        return {f"aug{i}_embed": self.image_mlp(view) for i, view in enumerate(feats, 1)}

    def embed_image(self, image: Tensor) -> Features:
        return {"feats": self.visual(image)}

    def clamp_scales(self) -> None:
        """Nothing to clamp; here so that scripts need not ask."""


HEADS = {
    "CLIP": CLIP,
    "SIGLIP": SigLIP,
    "CL2L": CL2L,
    "BARLIP": BarLIP,
    "SIAMLIP": SiamLIP,
    "SWALIP": SwALIP,
    "SWALIPV1": SwALIPV1,
}
SLIP_MODELS = {"CLIP": SlipCLIP, "SLIP": Slip, "SIMCLR": SimCLR}
SLIP_BACKBONES = {"VITS16": "VITS16MOCO", "VITB16": "VITB16", "VITL16": "VITL16"}
# in checkpoints, but not of the network: the teacher, and what only transformers' AlignModel holds
NOT_LOADED = ("momentum_model.*", "text_model.pooler.*")
USES_LOCAL_VIEWS = ("CL2L", "BARLIP", "SIAMLIP", "SWALIP")


def model_names() -> list[str]:
    """Every valid `model` string."""
    rocket = [f"{base}_{backbone}_{head}" for base in ("CLIP", "CL2L") for backbone in BACKBONES for head in HEADS]
    slip = [f"{base}_{backbone}" for base in SLIP_MODELS for backbone in SLIP_BACKBONES]
    return rocket + slip + _align().align_names()


def _align():
    """models.align, which builds on this module."""
    from models import align

    return align


def parts_of(name: str) -> tuple[type[DualEncoder], str, int]:
    """Class, backbone and number of local views it needs (-1: any) of a model string. ModelError names the nearest."""
    parts = name.split("_")
    if name not in model_names():
        raise ModelError(
            f"model {name!r} is unknown{nearest(name, model_names())} The form is <CLIP|CL2L>_<backbone>_<head> with "
            f"backbones {', '.join(BACKBONES)} and heads {', '.join(HEADS)}, or SLIP's <{'|'.join(SLIP_MODELS)}>_"
            f"<{'|'.join(SLIP_BACKBONES)}>, or ALIGN_<{'|'.join(_align().SHAPES)}>_<{'|'.join(_align().TEXTS)}>"
        )
    if parts[0] == "ALIGN":
        return _align().Align, parts[1], 0
    if len(parts) == 2:
        return SLIP_MODELS[parts[0]], SLIP_BACKBONES[parts[1]], 0 if parts[0] == "CLIP" else 2
    return HEADS[parts[2]], parts[1], -1 if parts[2] in USES_LOCAL_VIEWS else 0


def build_dual(config: DualConfig, visual: nn.Module | None = None) -> DualEncoder:
    """The network of `config.model`, freshly initialised; `visual` replaces its backbone (needs `num_features`)."""
    model, backbone, _ = parts_of(config.model)
    if backbone not in BACKBONES:
        return model(config)  # ALIGN's towers belong together
    return model(config, visual or BACKBONES[backbone](config.image_size))


def choose(value: str, known: tuple[str, ...], knob: str) -> str:
    """`value` itself, or ModelError that lists what `knob` may be."""
    if value not in known:
        raise ModelError(f"{knob} {value!r} is unknown; use {' or '.join(known)}")
    return value


def names_by_decay(model: nn.Module, original: bool = False) -> tuple[list[str], list[str]]:
    """Trainable parameters with and without weight decay, each in module order.

    Without: vectors and scalars, token and position embeddings, the class token. `original` follows clip-rocket:
    without are vectors, scalars and whatever has `bias`, `ln` or `bn` in its name; embeddings decay. ALIGN: without are
    the parameters of batch norms alone.
    """
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if hasattr(model, "free_of_decay"):
        free = model.free_of_decay()
        return [name for name in trained if name not in free], [name for name in trained if name in free]
    substrings = (
        ("bias", "ln", "bn") if original else ("positional_embedding", "token_embedding", "cls_token", "pos_embed")
    )
    decay, no_decay = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            free = parameter.ndim < 2 or any(part in name for part in substrings)
            (no_decay if free else decay).append(name)
    return decay, no_decay


@torch.no_grad()
def follow(teacher: nn.Module, model: nn.Module, tau: float) -> None:
    """Momentum model: teacher <- tau · teacher + (1 - tau) · model for every parameter; buffers stay its own.

    Called after each optimizer step and before `clamp_scales`.
    """
    torch._foreach_lerp_(list(teacher.parameters()), list(model.parameters()), 1 - tau)


def zeroshot_similarities(image: Features, text: Features) -> Features:
    """Cosine similarities [B,C] of `embed_image` and `embed_text` outputs: `z_sim` and, where present, `h_sim`."""
    unit = [{k: v / v.norm(dim=-1, keepdim=True) for k, v in side.items() if k != "feats"} for side in (image, text)]
    return {f"{name}_sim": unit[0][name] @ unit[1][name].T for name in unit[0]}
