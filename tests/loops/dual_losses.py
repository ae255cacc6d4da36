"""What every method of main.py minimises, written out from the papers, for `test_main_loop`.

Each function takes the features of the whole batch of all processes (`out`: name -> [B,...], local
views second), the network whose temperatures and prototypes it reads, and the case's options. The
targets of SiamLIP's and BYOLIP's predictors come as `target_v_image` and so on.
"""

import torch
from torch import Tensor, nn

Features = dict[str, Tensor]


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True).clamp(min=1e-12)


def info_nce(query: Tensor, keys: Tensor, scale: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of finding row i of `keys` [B,E] from row i of `query` [B,E] (van den Oord
    2018)."""
    logits = scale * unit(query) @ unit(keys).T
    target = (1 - smoothing) * torch.eye(len(logits)) + smoothing / len(logits)
    return -(target * logits.log_softmax(1)).sum(1).mean()


def both_ways(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    return (info_nce(image, text, scale) + info_nce(text, image, scale)) / 2


def pairs_of_views(first: Tensor, second: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Every view of [B,A,E] with every view of [B,A,E]."""
    return [(a, b) for a in first.unbind(1) for b in second.unbind(1)]


def clip(out: Features, network: nn.Module, case) -> Tensor:
    return both_ways(out["z_image"], out["z_text"], network.logit_scale.exp())


def siglip(out: Features, network: nn.Module, case) -> Tensor:
    """Every pair is a yes/no question: sum over texts, mean over images (Zhai 2023)."""
    scores = (
        network.logit_scale.exp() * unit(out["z_image"]) @ unit(out["z_text"]).T
        + network.logit_bias
    )
    signs = 2 * torch.eye(len(scores)) - 1
    return -(torch.sigmoid(signs * scores).log()).sum(1).mean()


def cl2l(out: Features, network: nn.Module, case) -> Tensor:
    """(global + A · local) / (1 + A) in each direction; `sum` adds the two, label smoothing is of
    the local terms."""
    scale, local_scale = network.logit_scale.exp(), network.l2l_logit_scale.exp()
    image, text = out["z_image_global"], out["z_text_global"]
    views = out["h_image_local"].shape[1]
    pairs = pairs_of_views(out["h_image_local"], out["h_text_local"])
    from_image = sum(info_nce(a, b, local_scale, case.smoothing) for a, b in pairs) / len(pairs)
    from_text = sum(info_nce(b, a, local_scale, case.smoothing) for a, b in pairs) / len(pairs)
    loss_image = (info_nce(image, text, scale) + views * from_image) / (1 + views)
    loss_text = (info_nce(text, image, scale) + views * from_text) / (1 + views)
    return loss_image + loss_text if case.summed else (loss_image + loss_text) / 2


def cosine_distance(prediction: Tensor, target: Tensor) -> Tensor:
    return 2 - 2 * (unit(prediction) * unit(target.detach())).sum(1).mean()


def siamlip(out: Features, network: nn.Module, case) -> Tensor:
    """CL2L + mean distance between predictions and the other modality's targets, global and
    local."""
    total = cosine_distance(out["p_image"], out["target_v_text"]) + cosine_distance(
        out["p_text"], out["target_v_image"]
    )
    from_image = pairs_of_views(out["p_image_local"], out["target_v_text_local"])
    from_text = pairs_of_views(out["p_text_local"], out["target_v_image_local"])
    total = total + sum(cosine_distance(p, v) for p, v in [*from_image, *from_text])
    return total / (2 + len(from_image) + len(from_text)) + cl2l(out, network, case)


def barlip(out: Features, network: nn.Module, case) -> Tensor:
    """CL2L + 0.025 [Σ (K_ii - 1)² + 5e-3 Σ K_ij²], mean over the global and all local pairs of
    views."""
    pairs = [
        (out["v_image"], out["v_text"]),
        *pairs_of_views(out["v_image_local"], out["v_text_local"]),
    ]
    total = 0
    for image, text in pairs:
        correlation = image.T @ text / len(image)
        diagonal = correlation.diagonal()
        off_diagonal = correlation.square().sum() - diagonal.square().sum()
        total = total + 0.025 * ((diagonal - 1).square().sum() + 5e-3 * off_diagonal)
    return total / len(pairs) + cl2l(out, network, case)


@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    """[B,K] scores -> balanced assignments (Caron 2020) whose rows sum to 1; computed in
    float64."""
    mass = (scores.double() / epsilon).exp().T
    for _ in range(iterations):
        mass = mass / mass.sum(1, keepdim=True)
        mass = mass / mass.sum(0, keepdim=True)
    return mass.T.float()


def soft_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return -(target * logits.log_softmax(1)).sum(1).mean()


def swalip(out: Features, network: nn.Module, case) -> Tensor:
    """CL2L + 0.7 x swapped assignments: views (a, b) predict what Sinkhorn makes of views (1 - a, 1
    - b)."""
    images = unit(out["h_image_local"]).unbind(1)
    texts = unit(out["h_text_local"]).unbind(1)
    scale, total = network.l2l_logit_scale.exp(), 0
    for a in range(2):
        for b in range(2):
            from_image, other_image = images[a] @ texts[b].T, images[1 - a] @ texts[1 - b].T
            from_text, other_text = texts[a] @ images[b].T, texts[1 - a] @ images[1 - b].T
            total = total + soft_cross_entropy(scale * from_image, sinkhorn(other_image)) / 8
            total = total + soft_cross_entropy(scale * from_text, sinkhorn(other_text)) / 8
    return 0.7 * total + cl2l(out, network, case)


def swalipv1(out: Features, network: nn.Module, case) -> Tensor:
    """CLIP + 0.7 x each modality predicts the other's assignment to prototypes of length 1."""
    directions = unit(network.image_prototypes.weight_v)
    image, text = unit(out["h_image"]) @ directions.T, unit(out["h_text"]) @ directions.T
    scale = network.swalip_logit_scale.exp()
    swapped = soft_cross_entropy(scale * image, sinkhorn(text)) + soft_cross_entropy(
        scale * text, sinkhorn(image)
    )
    return 0.7 * swapped / 2 + clip(out, network, case)


def simclr(out: Features, network: nn.Module, case) -> Tensor:
    """Two augmentations attract, all 2B - 2 others repel, temperature 0.1 (Chen 2020)."""
    a, b = unit(out["aug1_embed"]), unit(out["aug2_embed"])
    rows, total = len(a), 0
    itself = 1e9 * torch.eye(rows)
    for own, other in ((a, b), (b, a)):
        logits = torch.cat([own @ other.T / 0.1, own @ own.T / 0.1 - itself], 1)
        total = total - logits.log_softmax(1)[:, :rows].diagonal().mean() / 2
    return total


def slip_clip(out: Features, network: nn.Module, case) -> Tensor:
    return both_ways(out["image_embed"], out["text_embed"], network.logit_scale.exp())


def slip(out: Features, network: nn.Module, case) -> Tensor:
    """CLIP + 0.6 x SimCLR (Mu 2021)."""
    return slip_clip(out, network, case) + 0.6 * simclr(out, network, case)


def align(out: Features, network: nn.Module, case) -> Tensor:
    """Both directions added, label smoothing 0.1 over the global batch, cosine / temperature (Jia
    2021)."""
    image, text, scale = out["z_image"], out["z_text"], 1 / network.temperature
    return info_nce(image, text, scale, 0.1) + info_nce(text, image, scale, 0.1)
