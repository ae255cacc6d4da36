"""What each dual-encoder method minimises: pure functions from features to named losses and
accuracies.

Every function takes the features of `models.dual_encoder.base` (sample axis first, views second)
and `LossOptions`, and returns 0-d
tensors under clip-rocket's and SLIP's names; `loss` is the sum to minimise. The value on each
process is that of its own rows (batch statistics, as in Barlow Twins, are global), so that the mean
over processes is the loss of the global batch; so are the gradients after data parallelism's mean.

`compat="original"` reproduces the originals where they differ on several processes or views: the
contrastive gather passes no gradient, not even to the own slice; Barlow Twins' gradient is divided
by the number of processes; SwALIP looks at the first two views only.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from base.distributed import gather, gather_with_gradient, rank, world_size
from base.errors import UserError
from models.dual_encoder.losses import (
    barlow_twins,
    matched_views,
    negative_cosine,
    normalize,
    scale_gradient,
    sigmoid_pairs,
    simclr,
    sinkhorn,
    soft_cross_entropy,
    swapped_assignments,
)

Features = dict[str, Tensor]
Pair = tuple[Tensor, Tensor]  # of images and of their texts


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """Knobs of all losses; the defaults are the originals' command line's."""

    loss_avg_or_sum: str = "avg"  # CL2L family: mean of the two directions, or their sum
    label_smoothing: float = (
        0.0  # of the local terms only; ALIGN: of its loss, over the global batch
    )
    barlip_lamb: float = 5e-3  # BarLIP: weight of the correlations off the diagonal
    barlip_scale_loss: float = 0.025  # BarLIP: factor of its whole term
    swalip_weight: float = (
        0.2  # SwALIP, SWALIPV1: weight of swapped assignments beside the contrastive loss
    )
    sk_iters: int = (
        3  # SwALIP, SWALIPV1: iterations of Sinkhorn's algorithm that makes the assignments
    )
    target_epsilon: float = (
        0.05  # SwALIP, SWALIPV1: temperature of the assignments; smaller = harder
    )
    ssl_scale: float = 1.0  # SLIP: weight of SimCLR beside CLIP
    ssl_temp: float = 0.1  # SLIP, SimCLR: temperature of the similarities of two augmentations
    tile: int | None = (
        # side of the blocks in which contrastive logits are computed, to save memory; none = whole
        None
    )
    compat: str = "none"  # none, or original: the published code's numbers (docs/DIFFERENCES.md)

    def __post_init__(self):
        for name, known in (("loss_avg_or_sum", ("avg", "sum")), ("compat", ("none", "original"))):
            if getattr(self, name) not in known:
                raise UserError(
                    f"{name} {getattr(self, name)!r} is unknown; use {' or '.join(known)}"
                )
        if not 0 <= self.label_smoothing < 1:
            raise UserError(
                f"label_smoothing {self.label_smoothing}: give a share from 0 to below 1, such as 0.1"
            )
        if self.sk_iters < 1:
            raise UserError(f"sk_iters {self.sk_iters}: Sinkhorn needs at least one iteration")

    @property
    def original(self) -> bool:
        return self.compat == "original"

    def gather(self, x: Tensor) -> Tensor:
        """[b,...] -> [N,...] of all processes; with gradient unless compat says otherwise."""
        return gather(x) if self.original and world_size() > 1 else gather_with_gradient(x)


def clip(out: Features, options: LossOptions) -> Features:
    """CLIP (Radford 2021): symmetric InfoNCE of z_image and z_text [b,E]. `loss`, `clip_loss`,
    `clip_acc`."""
    return clip_of(out["z_image"], out["z_text"], out["logit_scale"], options)


def clip_of(image: Tensor, text: Tensor, scale: Tensor, options: LossOptions) -> Features:
    own = normalize(image)[:, None], normalize(text)[:, None]
    everyone = own if world_size() == 1 else options.gather(torch.cat(own, 1)).chunk(2, 1)
    terms = _both_ways(own, everyone, scale, options)
    loss = (terms["loss_image"] + terms["loss_text"]) / 2
    return {"loss": loss, "clip_loss": loss, "clip_acc": terms["acc_image"]}


def _both_ways(
    own: Pair, everyone: Pair, scale: Tensor, options: LossOptions, smoothing: float = 0.0
) -> Features:
    """InfoNCE of images and texts, both ways: own ([b,A,E], [b,A,E]), everyone ([N,A,E],
    [N,A,E])."""
    first = rank() * len(own[0])
    return matched_views(
        *own, *everyone, scale, first, label_smoothing=smoothing, tile=options.tile
    )


def siglip(out: Features, options: LossOptions) -> Features:
    """SigLIP (Zhai 2023) of z_image, z_text [b,E]. `loss`, `siglip_loss`."""
    image, text = normalize(out["z_image"]), normalize(out["z_text"])
    scale, bias, first = out["logit_scale"], out["logit_bias"], rank() * len(image)
    loss = sigmoid_pairs(image, options.gather(text), scale, bias, first, options.tile)
    return {"loss": loss, "siglip_loss": loss}


def align(out: Features, options: LossOptions) -> Features:
    """ALIGN (Jia 2021): InfoNCE both ways with label smoothing over the global batch; cosine /
    temperature.

    z_image, z_text [b,E], 0-d temperature. `clip_loss` is the mean of the two directions, `loss`
    that or (what COYO-ALIGN minimises) their sum.
    """
    own = normalize(out["z_image"])[:, None], normalize(out["z_text"])[:, None]
    everyone = own if world_size() == 1 else options.gather(torch.cat(own, 1)).chunk(2, 1)
    terms = _both_ways(own, everyone, 1 / out["temperature"], options, options.label_smoothing)
    mean = (terms["loss_image"] + terms["loss_text"]) / 2
    return {
        "loss": 2 * mean if options.loss_avg_or_sum == "sum" else mean,
        "clip_loss": mean,
        "clip_loss_image": terms["loss_image"],
        "clip_loss_text": terms["loss_text"],
        "clip_acc": terms["acc_image"],
        "temperature": out["temperature"].detach(),
    }


def cl2l(out: Features, options: LossOptions) -> Features:
    """CLIP-rocket: global image to global text, and every local image to every local text; no cross
    terms.

    z_{image,text}_global [b,E] and h_{image,text}_local [b,A,E] (absent for A = 0). With A local
    views the local term weighs A against the global term's 1.
    """
    return _cl2l(out, options)[0]


def _cl2l(out: Features, options: LossOptions) -> tuple[Features, Tensor | None, Tensor | None]:
    """The losses, and the unit local features of this process [b,2A,E] and of all [N,2A,E], for
    losses on top."""
    views = [torch.stack([out["z_image_global"], out["z_text_global"]], 1)]
    if "h_image_local" in out:
        views += [out["h_image_local"], out["h_text_local"]]
    own = normalize(torch.cat(views, 1))
    everyone = options.gather(own)  # one collective for all features
    terms = _both_ways(
        own[:, :2].chunk(2, 1), everyone[:, :2].chunk(2, 1), out["logit_scale"], options
    )
    result = {f"clip_{name}_global": value for name, value in terms.items()}
    image, text = terms["loss_image"], terms["loss_text"]
    own, everyone = own[:, 2:], everyone[:, 2:]
    a = own.shape[1] // 2
    if a:
        views = own.chunk(2, 1), everyone.chunk(2, 1)
        local = _both_ways(*views, out["h_logit_scale"], options, options.label_smoothing)
        result |= {f"clip_{name}_local": value for name, value in local.items()}
        image = (image + a * local["loss_image"]) / (1 + a)
        text = (text + a * local["loss_text"]) / (1 + a)
    mean = (image + text) / 2
    result |= {
        "loss": 2 * mean if options.loss_avg_or_sum == "sum" else mean,
        "clip_loss": mean,
        "clip_loss_image": image,
        "clip_loss_text": text,
        "clip_acc": terms["acc_image"],
        "h_logit_scale": out["h_logit_scale"].detach(),
    }
    return result, own, everyone


def barlip(out: Features, options: LossOptions) -> Features:
    """CL2L plus Barlow Twins between modalities, averaged over the global pair and the A² local
    pairs of views.

    v_image, v_text [b,D], v_{image,text}_local [b,A,D].
    """
    result = cl2l(out, options)
    pairs = [(out["v_image"][:, None], out["v_text"][:, None])]
    if "v_image_local" in out:
        pairs.append((out["v_image_local"], out["v_text_local"]))
    weaken = 1 / world_size() if options.original else 1
    total, count = 0, 0
    for pair in pairs:
        image, text = (scale_gradient(v, weaken) for v in pair)
        everyone = gather_with_gradient(image), gather_with_gradient(text)
        total = total + barlow_twins(
            image, text, *everyone, options.barlip_lamb, options.barlip_scale_loss
        )
        count += image.shape[1] * text.shape[1]
    loss = total / count
    return result | {"loss": result["loss"] + loss, "barlip_loss": loss}


def siamlip(out: Features, options: LossOptions) -> Features:
    """CL2L plus SimSiam between modalities; BYOLIP where the targets come from a momentum model
    (`v_*_momentum`).

    Predictions p_* and targets v_* as [b,D] (global) and [b,A,D] (local); no gradient reaches the
    targets.
    """
    result = cl2l(out, options)
    total, count = 0, 0
    for view in ("", "_local"):
        for predictor, target in (("image", "text"), ("text", "image")):
            if f"p_{predictor}{view}" not in out:
                continue
            p, v = out[f"p_{predictor}{view}"], _target(out, f"v_{target}{view}")
            p, v = (p[:, None], v[:, None]) if p.ndim == 2 else (p, v)
            total = total + negative_cosine(p, v)
            count += p.shape[1] * v.shape[1]
    loss = total / count
    return result | {"loss": result["loss"] + loss, "siamlip_loss": loss}


def _target(out: Features, name: str) -> Tensor:
    return out.get(f"{name}_momentum", out[name]).detach()


def swalip(out: Features, options: LossOptions) -> Features:
    """CL2L plus swapped assignments over the local views, the other modality's batch being the
    prototypes."""
    if options.label_smoothing:
        raise UserError(
            f"label_smoothing {options.label_smoothing}: SwALIP takes none; set it to 0"
        )
    result, own, everyone = _cl2l(out, options)
    a = own.shape[1] // 2
    if a == 0 or (options.original and a == 1):
        raise UserError(
            f"num_augs {a}: SwALIP swaps assignments between local views; set num_augs to 2"
        )
    (image, text), (all_image, all_text) = own.chunk(2, 1), everyone.chunk(2, 1)
    share = 1.0
    if options.original and a > 2:
        image, text, all_image, all_text = (x[:, :2] for x in (image, text, all_image, all_text))
        share = 4 / a**2
    targets = options.target_epsilon, options.sk_iters
    loss = share * swapped_assignments(
        image, text, all_image, all_text, out["h_logit_scale"], *targets
    )
    return result | {"loss": options.swalip_weight * loss + result["loss"], "swalip_loss": loss}


def swalipv1(out: Features, options: LossOptions) -> Features:
    """CLIP plus swapped assignments to learned prototypes: scores p_image, p_text [b,K]."""
    result = clip(out, options)
    targets = {
        k: sinkhorn(_target(out, f"p_{k}"), options.target_epsilon, options.sk_iters)
        for k in ("image", "text")
    }
    scale = out["swalip_logit_scale"]
    image = soft_cross_entropy(scale * out["p_image"], targets["text"])
    text = soft_cross_entropy(scale * out["p_text"], targets["image"])
    loss = (image + text) / 2
    total = options.swalip_weight * loss + result["loss"]
    return result | {"loss": total, "swalip_loss": loss, "swalip_logit_scale": scale.detach()}


def slip_clip(out: Features, options: LossOptions) -> Features:
    """SLIP's CLIP term: as `clip`, of image_embed and text_embed [b,E]."""
    return clip_of(out["image_embed"], out["text_embed"], out["logit_scale"], options)


def slip_simclr(out: Features, options: LossOptions) -> Features:
    """SimCLR of aug1_embed and aug2_embed [b,D]. `loss`, `ssl_loss`, `ssl_acc`."""
    own = torch.stack([normalize(out["aug1_embed"]), normalize(out["aug2_embed"])], 1)
    everyone = gather_with_gradient(own)
    loss, acc = simclr(*own.unbind(1), *everyone.unbind(1), options.ssl_temp, rank() * len(own))
    return {"loss": loss, "ssl_loss": loss, "ssl_acc": acc}


def slip(out: Features, options: LossOptions) -> Features:
    """SLIP (Mu 2021): CLIP plus SimCLR on two augmentations of the same images."""
    language, vision = slip_clip(out, options), slip_simclr(out, options)
    return (
        language | vision | {"loss": language["clip_loss"] + options.ssl_scale * vision["ssl_loss"]}
    )
