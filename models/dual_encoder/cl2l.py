"""CL2L and its self-supervised variants SiamLIP, BYOLIP, BarLIP and SwALIP (clip-rocket; Fini et
al., 2023).
"""

import math

import torch
from torch import Tensor, nn

from base.distributed import rank
from base.errors import UserError
from models.dual_encoder.base import Features
from models.dual_encoder.clip import CLIP
from models.dual_encoder.config import DualConfig
from models.dual_encoder.losses import (
    Views,
    barlow_twins,
    clip_loss,
    negative_cosine,
    normalize,
    scale_gradient,
    sinkhorn,
    soft_cross_entropy,
    swapped_assignments,
)
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

    def __init__(self, config: DualConfig, visual: nn.Module):
        scales = {"l2l_logit_scale": math.log(1 / 0.1)} if config.separate_proj else None
        super().__init__(config, visual, scales)
        if config.separate_proj:
            self.l2l_image_projector = self._local_projector(
                visual.num_features, config.cl2l_img_proj_type
            )
            self.l2l_text_projector = self._local_projector(
                config.text_width, config.cl2l_txt_proj_type
            )
        else:
            self.l2l_image_projector = self.image_projector
            self.l2l_text_projector = self.text_projector
        self.join_views = not has_batch_norm(visual)

    def _local_projector(self, width: int, kind: str) -> nn.Module:
        if kind == "linear":
            return linear_projector(width, self.config.embed_dim)
        return mlp_projector(width, self.config.cl2l_hidden_dim, self.config.embed_dim)

    @property
    def local_scale(self) -> Tensor:
        return (self.l2l_logit_scale if self.config.separate_proj else self.logit_scale).exp()

    def features(
        self, image: Tensor, text_ids: Tensor, image_local: Tensor | None = None
    ) -> Features:
        """`z_*_global` [B,E] of the global views, `h_*_local` [B,A,E] of the local ones, `feats_*`
        behind both.
        """
        if text_ids.ndim == 2:
            text_ids = text_ids[:, None]
        views = 0 if image_local is None else image_local.shape[1]
        if text_ids.shape[1] != 1 + views:
            raise UserError(
                f"text_ids holds {text_ids.shape[1]} rows a sample, but {1 + views} belong to 1 "
                f"global and {views} local images: give the tokenizer and the image transform the "
                "same num_augs"
            )
        # The backward pass begins with what comes last here. Images have most of the activations:
        # they are freed before the text tower's gradients arise.
        texts = self._text_embeddings(text_ids)
        return {
            **self._image_embeddings(image, image_local),
            **texts,
            "logit_scale": self.logit_scale.exp(),
            "h_logit_scale": self.local_scale,
        }

    def _image_embeddings(self, image: Tensor, image_local: Tensor | None) -> Features:
        feats, local = self._image_views(image, image_local)
        features = {"feats_image": feats, "z_image_global": self.image_projector(feats)}
        if local is not None:
            features["feats_image_local"] = local
            features["h_image_local"] = per_view(self.l2l_image_projector, local)
        return features

    def _text_embeddings(self, text_ids: Tensor) -> Features:
        feats, local = self._text_views(text_ids)
        features = {"feats_text": feats, "z_text_global": self.project_text(feats)}
        if local is not None:
            features["feats_text_local"] = local
            features["h_text_local"] = per_view(self.l2l_text_projector, local)
        return features

    def losses(
        self,
        features: Features,
        targets: Features | None = None,
        views: tuple[Views, Views] | None = None,
    ) -> Features:
        """Global images against global captions, local against local ones; no cross terms (Fini
        2023, equation 4).

        With A local views the local term weighs A against the global term's 1. `clip_loss` is the
        mean of both directions. views: `gather_views(features)`, where a subclass has it already.
        """
        whole, local = views or self.gather_views(features)
        found = clip_loss(whole, features["logit_scale"], tile=self.options.tile)
        losses = {
            "clip_loss_image_global": found.loss_image,
            "clip_loss_text_global": found.loss_text,
            "clip_acc_image_global": found.acc_image,
            "clip_acc_text_global": found.acc_text,
        }
        loss_image = found.loss_image
        loss_text = found.loss_text
        a = local.image.shape[1]
        if a:
            near = clip_loss(
                local,
                features["h_logit_scale"],
                label_smoothing=self.options.label_smoothing,
                tile=self.options.tile,
            )
            losses["clip_loss_image_local"] = near.loss_image
            losses["clip_loss_text_local"] = near.loss_text
            losses["clip_acc_image_local"] = near.acc_image
            losses["clip_acc_text_local"] = near.acc_text
            loss_image = (loss_image + a * near.loss_image) / (1 + a)
            loss_text = (loss_text + a * near.loss_text) / (1 + a)
        losses["clip_loss"] = (loss_image + loss_text) / 2
        losses["clip_loss_image"] = loss_image
        losses["clip_loss_text"] = loss_text
        losses["clip_acc"] = found.acc_image
        losses["h_logit_scale"] = features["h_logit_scale"].detach()
        return losses

    def gather_views(self, features: Features) -> tuple[Views, Views]:
        """The global (V = 1) and the local views (V = A, or 0), gathered in one collective."""
        both = torch.stack([features["z_image_global"], features["z_text_global"]], 1)
        if "h_image_local" in features:
            both = torch.cat([both, features["h_image_local"], features["h_text_local"]], 1)
        own = normalize(both)  # [b,2+2A,E]
        everyone = self.gather(own)
        a = own.shape[1] // 2 - 1
        sizes = [1, 1, a, a]  # global image and text, local images and texts
        own_views = own.split(sizes, dim=1)
        all_views = own_views if everyone is own else everyone.split(sizes, dim=1)
        image, text, local_image, local_text = own_views
        all_image, all_text, all_local_image, all_local_text = all_views
        first = rank() * len(own)
        whole = Views(image, text, all_image, all_text, first)
        local = Views(local_image, local_text, all_local_image, all_local_text, first)
        return whole, local

    def _image_views(
        self, image: Tensor, image_local: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """[B,C] and [B,A,C]; one pass for all views where no batch statistics are involved and the
        sizes agree.
        """
        if image_local is None:
            return self.visual(image), None
        if not self.join_views:  # each view has its own batch statistics
            local = [self.visual(view) for view in image_local.unbind(1)]
            return self.visual(image), torch.stack(local, 1)
        batch_and_views = image_local.shape[:2]
        local = image_local.flatten(0, 1)
        if image.shape[1:] != local.shape[1:]:
            return self.visual(image), self.visual(local).unflatten(0, batch_and_views)
        every = self.visual(torch.cat([image, local]))
        count = len(image)
        return every[:count], every[count:].unflatten(0, batch_and_views)

    def _text_views(self, text_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """[B,T] and [B,A,T] of int64 [B,1+A,L]; local texts see the noise, the global one does
        not.
        """
        noise = self.config.text_noise
        views = text_ids.shape[1] - 1
        if not views or not (self.training and noise.active):
            every = self.text_features(text_ids.flatten(0, 1))
            every = every.unflatten(0, text_ids.shape[:2])
            return every[:, 0], every[:, 1:] if views else None
        feats = self.text_features(text_ids[:, 0])
        local_ids = text_ids[:, 1:]
        if noise.over_positions:  # each view draws its own mask for the whole batch
            local = [self.text_features(view, noise) for view in local_ids.unbind(1)]
            return feats, torch.stack(local, 1)
        local = self.text_features(local_ids.flatten(0, 1), noise)
        return feats, local.unflatten(0, local_ids.shape[:2])

    def embed_image(self, image: Tensor) -> Features:
        """CLIP's of images [B,3,H,W], and `h` [B,E] of the local projector."""
        found = super().embed_image(image)
        found["h"] = self.l2l_image_projector(found["feats"])
        return found

    def embed_text(self, text_ids: Tensor) -> Features:
        """CLIP's of texts int64 [B,L], and `h` [B,E] of the local projector."""
        found = super().embed_text(text_ids)
        found["h"] = self.l2l_text_projector(found["feats"])
        return found


def per_view(head: nn.Module, feats: Tensor) -> Tensor:
    """head of [B,A,D] along the last axis; each view has its own batch statistics.

    Layers without statistics see all views at once: one product reads the weights, and one makes
    their gradient.
    """
    if not has_batch_norm(head):
        return head(feats)
    if isinstance(head, nn.Sequential):
        for layer in head:
            feats = per_view(layer, feats)
        return feats
    return torch.stack([head(view) for view in feats.unbind(1)], 1)


class BarLIP(CL2L):
    """CL2L with an expander per modality and kind of view, whose outputs (v) Barlow Twins
    decorrelates.
    """

    def __init__(self, config: DualConfig, visual: nn.Module):
        super().__init__(config, visual)
        image = visual.num_features
        text = config.text_width
        hidden = config.barlip_hidden_dim
        out = config.barlip_proj_dim
        self.barlip_image_projector_global = barlip_projector(image, hidden, out)
        self.barlip_text_projector_global = barlip_projector(text, hidden, out)
        if config.separate_proj_child:
            self.barlip_image_projector_local = barlip_projector(image, hidden, out)
            self.barlip_text_projector_local = barlip_projector(text, hidden, out)
        else:
            self.barlip_image_projector_local = self.barlip_image_projector_global
            self.barlip_text_projector_local = self.barlip_text_projector_global

    def features(
        self, image: Tensor, text_ids: Tensor, image_local: Tensor | None = None
    ) -> Features:
        """CL2L's, and `v_*` [B,D], `v_*_local` [B,A,D]."""
        features = super().features(image, text_ids, image_local)
        features["v_image"] = self.barlip_image_projector_global(features["feats_image"])
        features["v_text"] = self.barlip_text_projector_global(features["feats_text"])
        if "feats_image_local" in features:
            features["v_image_local"] = per_view(
                self.barlip_image_projector_local, features["feats_image_local"]
            )
            features["v_text_local"] = per_view(
                self.barlip_text_projector_local, features["feats_text_local"]
            )
        return features

    def losses(self, features: Features, targets: Features | None = None) -> Features:
        """CL2L's, and `barlip_loss`: the mean over the global pair and the A^2 local pairs of
        views.
        """
        losses = super().losses(features)
        pairs = [(features["v_image"][:, None], features["v_text"][:, None])]
        if "v_image_local" in features:
            pairs.append((features["v_image_local"], features["v_text_local"]))
        total = 0
        count = 0
        for image, text in pairs:
            image = scale_gradient(image, self.options.barlip_gradient_scale)
            text = scale_gradient(text, self.options.barlip_gradient_scale)
            total = total + barlow_twins(
                image,
                text,
                lamb=self.options.barlip_lamb,
                scale_loss=self.options.barlip_scale_loss,
            )
            count += image.shape[1] * text.shape[1]
        losses["barlip_loss"] = total / count
        return losses


class SiamLIP(CL2L):
    """CL2L with projectors (v) and predictors (p) of SimSiam; with a momentum teacher's targets it
    is BYOLIP.
    """

    def __init__(self, config: DualConfig, visual: nn.Module):
        super().__init__(config, visual)
        hidden = config.siamlip_hidden_dim
        out = config.siamlip_proj_dim
        own = config.separate_proj_child  # local views have heads of their own
        image = siamlip_projector(visual.num_features, hidden, out)
        text = siamlip_projector(config.text_width, hidden, out)
        self.siamlip_image_projector_global = self._with_last_norm(image)
        self.siamlip_text_projector_global = self._with_last_norm(text)
        local_image = siamlip_projector(visual.num_features, hidden, out) if own else image
        self.siamlip_image_projector_local = self._with_last_norm(local_image)
        local_text = siamlip_projector(config.text_width, hidden, out) if own else text
        self.siamlip_text_projector_local = self._with_last_norm(local_text)
        image_text = siamlip_predictor(out, hidden, out)
        text_image = siamlip_predictor(out, hidden, out)
        self.image_text_predictor_global = image_text
        self.text_image_predictor_global = text_image
        self.image_text_predictor_local = siamlip_predictor(out, hidden, out) if own else image_text
        self.text_image_predictor_local = siamlip_predictor(out, hidden, out) if own else text_image

    def _with_last_norm(self, inner: nn.Module) -> nn.Module:
        """The projector and its own affine-free batch norm: global and local may share the former,
        never the latter.
        """
        if self.config.siamlip_no_last_bn:
            return inner
        return nn.Sequential(inner, nn.BatchNorm1d(self.config.siamlip_proj_dim, affine=False))

    def features(
        self, image: Tensor, text_ids: Tensor, image_local: Tensor | None = None
    ) -> Features:
        """CL2L's, and `v_*`, `p_*` [B,D], `v_*_local`, `p_*_local` [B,A,D]."""
        features = super().features(image, text_ids, image_local)
        features["v_image"] = self.siamlip_image_projector_global(features["feats_image"])
        features["v_text"] = self.siamlip_text_projector_global(features["feats_text"])
        features["p_image"] = self.image_text_predictor_global(features["v_image"])
        features["p_text"] = self.text_image_predictor_global(features["v_text"])
        if "feats_image_local" in features:
            features["v_image_local"] = per_view(
                self.siamlip_image_projector_local, features["feats_image_local"]
            )
            features["v_text_local"] = per_view(
                self.siamlip_text_projector_local, features["feats_text_local"]
            )
            features["p_image_local"] = per_view(
                self.image_text_predictor_local, features["v_image_local"]
            )
            features["p_text_local"] = per_view(
                self.text_image_predictor_local, features["v_text_local"]
            )
        return features

    def losses(self, features: Features, targets: Features | None = None) -> Features:
        """CL2L's, and `siamlip_loss`: each modality predicts the other's projection, or that of the
        teacher.

        The mean over both directions, the global pair and the A^2 local pairs of views.
        """
        losses = super().losses(features)
        target = targets or features
        total = negative_cosine(features["p_image"][:, None], target["v_text"][:, None])
        total = total + negative_cosine(features["p_text"][:, None], target["v_image"][:, None])
        pairs = 2
        if "p_image_local" in features:
            total = total + negative_cosine(features["p_image_local"], target["v_text_local"])
            total = total + negative_cosine(features["p_text_local"], target["v_image_local"])
            pairs += 2 * features["p_image_local"].shape[1] ** 2
        losses["siamlip_loss"] = total / pairs
        return losses


class SwALIP(CL2L):
    """CL2L's network, with swapped assignments over the local views and no learned prototypes."""

    def __init__(self, config: DualConfig, visual: nn.Module):
        super().__init__(config, visual)
        if config.label_smoothing:
            raise UserError(
                f"label_smoothing {config.label_smoothing}: SwALIP takes none; set it to 0"
            )

    def losses(self, features: Features, targets: Features | None = None) -> Features:
        """CL2L's, and `swalip_loss`: the mean of both directions."""
        whole, local = self.gather_views(features)
        losses = super().losses(features, views=(whole, local))
        a = local.image.shape[1]
        used = self.options.swalip_views(a)
        if a == 0 or a < used:
            raise UserError(
                f"num_augs {a}: SwALIP swaps assignments between local views; set num_augs to 2"
            )
        scale = features["h_logit_scale"]
        epsilon = self.options.target_epsilon
        iterations = self.options.sk_iters
        from_image = swapped_assignments(
            local.image[:, :used], local.all_text[:, :used], scale, epsilon, iterations
        )
        from_text = swapped_assignments(
            local.text[:, :used], local.all_image[:, :used], scale, epsilon, iterations
        )
        losses["swalip_loss"] = (used / a) ** 2 * (from_image + from_text) / 2
        return losses


class SwALIPV1(CLIP):
    """CLIP with projectors onto learned prototypes (SwAV) shared by both modalities, or one set
    each.
    """

    def __init__(self, config: DualConfig, visual: nn.Module):
        scales = {"swalip_logit_scale": math.log(1 / config.swalip_temperature)}
        super().__init__(config, visual, scales)
        self.swalip_logit_scale.requires_grad_(config.swalip_learn_temperature)
        hidden = config.swalip_hidden_dim
        out = config.swalip_proj_dim
        self.swalip_image_projector = swalip_projector(visual.num_features, hidden, out)
        self.swalip_text_projector = swalip_projector(config.text_width, hidden, out)
        self.image_prototypes = Prototypes(out, config.swalip_num_proto)
        self.text_prototypes = self.image_prototypes
        if config.swalip_no_shared_proto:
            self.text_prototypes = Prototypes(out, config.swalip_num_proto)

    def features(
        self, image: Tensor, text_ids: Tensor, image_local: Tensor | None = None
    ) -> Features:
        """CLIP's, and projections `h_*` [B,D], prototype scores `p_*` [B,K]."""
        features = super().features(image, text_ids)
        features["h_image"] = self.swalip_image_projector(features["feats_image"])
        features["h_text"] = self.swalip_text_projector(features["feats_text"])
        features["p_image"] = self.image_prototypes(normalize(features["h_image"]))
        features["p_text"] = self.text_prototypes(normalize(features["h_text"]))
        features["swalip_logit_scale"] = self.swalip_logit_scale.exp()
        return features

    def losses(self, features: Features, targets: Features | None = None) -> Features:
        """CLIP's, and `swalip_loss`: each modality predicts the other's assignment to the
        prototypes (SwAV, eq. 2).

        The assignments come from the teacher's scores where there is a teacher.
        """
        losses = super().losses(features)
        target = targets or features
        epsilon = self.options.target_epsilon
        iterations = self.options.sk_iters
        assigned_image = sinkhorn(target["p_image"], epsilon, iterations)
        assigned_text = sinkhorn(target["p_text"], epsilon, iterations)
        scale = features["swalip_logit_scale"]
        from_image = soft_cross_entropy(scale * features["p_image"], assigned_text)
        from_text = soft_cross_entropy(scale * features["p_text"], assigned_image)
        losses["swalip_loss"] = (from_image + from_text) / 2
        losses["swalip_logit_scale"] = scale.detach()
        return losses

    def freeze_prototypes(self) -> None:
        """Drop the prototypes' gradients: called between backward and update in the first
        iterations.
        """
        for prototypes in (self.image_prototypes, self.text_prototypes):
            prototypes.weight_v.grad = None
