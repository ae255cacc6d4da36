"""CL2L and its self-supervised variants SiamLIP, BYOLIP, BarLIP and SwALIP (clip-rocket; Fini et
al., 2023)."""

import math

import torch
from torch import Tensor, nn

from base.errors import UserError
from models.dual_encoder import objectives as dual_losses
from models.dual_encoder.base import DualConfig
from models.dual_encoder.clip import CLIP, choose
from models.dual_encoder.losses import normalize
from models.dual_encoder.objectives import Features
from models.layers.clip_towers import (
    Prototypes,
    barlip_projector,
    has_batch_norm,
    linear_projector,
    mlp_projector,
    siamlip_predictor,
    siamlip_projector,
    swalip_projector,
)


class CL2L(CLIP):
    """CLIP-rocket: a weak global view and A strong local views of both image and caption."""

    loss = staticmethod(dual_losses.cl2l)

    def __init__(self, config: DualConfig, visual: nn.Module):
        super().__init__(
            config, visual, {"l2l_logit_scale": math.log(1 / 0.1)} if config.separate_proj else None
        )
        if config.separate_proj:
            self.l2l_image_projector = self._local_projector(
                visual.num_features, "cl2l_img_proj_type"
            )
            self.l2l_text_projector = self._local_projector(config.text_width, "cl2l_txt_proj_type")
        else:
            self.l2l_image_projector, self.l2l_text_projector = (
                self.image_projector,
                self.text_projector,
            )
        self.join_views = not has_batch_norm(visual)

    def _local_projector(self, width: int, knob: str) -> nn.Module:
        if choose(getattr(self.config, knob), ("linear", "mlp"), knob) == "linear":
            return linear_projector(width, self.config.embed_dim)
        return mlp_projector(width, self.config.cl2l_hidden_dim, self.config.embed_dim)

    @property
    def local_scale(self) -> Tensor:
        return (self.l2l_logit_scale if self.config.separate_proj else self.logit_scale).exp()

    def features(
        self, image: Tensor, text_ids: Tensor, image_local: Tensor | None = None
    ) -> Features:
        """`z_*_global` [B,E] of the global views, `h_*_local` [B,A,E] of the local ones, `feats_*`
        behind both."""
        if text_ids.ndim == 2:
            text_ids = text_ids[:, None]
        views = 0 if image_local is None else image_local.shape[1]
        if text_ids.shape[1] != 1 + views:
            raise UserError(
                f"text_ids holds {text_ids.shape[1]} rows a sample, but {1 + views} belong to 1 global and {views} "
                "local images: give the tokenizer and the image transform the same num_augs"
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

    def _image_views(
        self, image: Tensor, image_local: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """[B,C] and [B,A,C]; one pass for all views where no batch statistics are involved and the
        sizes agree."""
        if image_local is None:
            return self.visual(image), None
        if not self.join_views:
            return self.visual(image), torch.stack(
                [self.visual(view) for view in image_local.unbind(1)], 1
            )
        if image.shape[1:] != image_local.shape[2:]:
            return self.visual(image), self.visual(image_local.flatten(0, 1)).unflatten(
                0, image_local.shape[:2]
            )
        every = self.visual(torch.cat([image, image_local.flatten(0, 1)]))
        return every[: len(image)], every[len(image) :].unflatten(0, image_local.shape[:2])

    def _text_views(self, text_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """[B,T] and [B,A,T] of int64 [B,1+A,L]; local texts see the noise, the global one does
        not."""
        views, noise = text_ids.shape[1] - 1, self.config.text_noise
        if not (self.training and noise.active) or not views:
            every = self.text_features(text_ids.flatten(0, 1)).unflatten(0, text_ids.shape[:2])
            return every[:, 0], every[:, 1:] if views else None
        feats, local = self.text_features(text_ids[:, 0]), text_ids[:, 1:]
        if noise.over_positions:  # each view draws its own mask for the whole batch
            return feats, torch.stack(
                [self.text_features(view, noise) for view in local.unbind(1)], 1
            )
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
    """CL2L with an expander per modality and view kind, whose outputs (v) Barlow Twins
    decorrelates."""

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

    def features(
        self, image: Tensor, text_ids: Tensor, image_local: Tensor | None = None
    ) -> Features:
        """CL2L's, and `v_*` [B,D], `v_*_local` [B,A,D]."""
        out = super().features(image, text_ids, image_local)
        return out | child_outputs(self, out, "barlip_{}_projector", "v", "feats")


def child_outputs(model: nn.Module, out: Features, head: str, name: str, source: str) -> Features:
    """`{name}_{image,text}[_local]` = the model's `head` (modality filled in, `_global` / `_local`)
    of `source`."""
    result = {}
    for view, kind in (("", "global"), ("_local", "local")):
        for modality in ("image", "text"):
            if f"{source}_{modality}{view}" in out:
                module = model.get_submodule(f"{head.format(modality)}_{kind}")
                result[f"{name}_{modality}{view}"] = per_view(
                    module, out[f"{source}_{modality}{view}"]
                )
    return result


class SiamLIP(CL2L):
    """CL2L with projectors (v) and predictors (p) of SimSiam; with a momentum model's targets it is
    BYOLIP."""

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
                self.add_module(
                    f"siamlip_{modality}_projector_{kind}", self._with_last_norm(inner[modality])
                )
        predictors = {
            f"{pair}_predictor": siamlip_predictor(out, hidden, out)
            for pair in ("image_text", "text_image")
        }
        for kind in ("global", "local"):
            for name in predictors:
                if kind == "local" and config.separate_proj_child:
                    predictors[name] = siamlip_predictor(out, hidden, out)
                self.add_module(f"{name}_{kind}", predictors[name])

    def _with_last_norm(self, inner: nn.Module) -> nn.Module:
        """The projector and its own affine-free batch norm: global and local may share the former,
        never the latter."""
        if self.config.siamlip_no_last_bn:
            return inner
        return nn.Sequential(inner, nn.BatchNorm1d(self.config.siamlip_proj_dim, affine=False))

    def features(
        self, image: Tensor, text_ids: Tensor, image_local: Tensor | None = None
    ) -> Features:
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
    """CLIP with projectors onto learned prototypes (SwAV) shared by both modalities, or one set
    each."""

    loss = staticmethod(dual_losses.swalipv1)

    def __init__(self, config: DualConfig, visual: nn.Module):
        super().__init__(
            config, visual, {"swalip_logit_scale": math.log(1 / config.swalip_temperature)}
        )
        self.swalip_logit_scale.requires_grad_(config.swalip_learn_temperature)
        hidden, out = config.swalip_hidden_dim, config.swalip_proj_dim
        self.swalip_image_projector = swalip_projector(visual.num_features, hidden, out)
        self.swalip_text_projector = swalip_projector(config.text_width, hidden, out)
        self.image_prototypes = self.text_prototypes = Prototypes(out, config.swalip_num_proto)
        if config.swalip_no_shared_proto:
            self.text_prototypes = Prototypes(out, config.swalip_num_proto)

    def features(
        self, image: Tensor, text_ids: Tensor, image_local: Tensor | None = None
    ) -> Features:
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
        """Drop the prototypes' gradients: called between backward and update in the first
        iterations."""
        for prototypes in (self.image_prototypes, self.text_prototypes):
            prototypes.weight_v.grad = None
