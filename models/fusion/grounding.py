"""Where is what the text says? Grad-CAM maps of a retrieval model (Selvaraju et al., 2017; ALBEF,
section 6.3)."""

import torch
from torch import Tensor

from base.errors import UserError
from models.fusion.retrieval import Retrieval


def check_layer(model: Retrieval, mode: str, layer: int) -> None:
    """UserError where maps of `mode` (itm or itc) cannot come from that layer."""
    bert = model.bert
    blocks = len(model.visual_encoder.blocks)
    if mode == "itm" and not bert.config.fusion_layer <= layer < bert.depth:
        layers = f"{bert.config.fusion_layer}..{bert.depth - 1}"
        raise UserError(
            f"block_num {layer}: cross-attention is in the text layers {layers}; choose one"
        )
    if mode == "itc" and not 0 <= layer < blocks:
        raise UserError(
            f"block_num {layer}: the vision transformer has the blocks 0..{blocks - 1}; choose one"
        )


def token_maps(
    model: Retrieval, image: Tensor, text_ids: Tensor, text_mask: Tensor, layer: int
) -> Tensor:
    """Maps float32 [B,L,g,g] of every token: the cross-attention of text layer `layer`, times the
    positive part of its gradient for the matching score, averaged over heads.

    image [B,3,S,S], text_ids int64 [B,L], text_mask bool [B,L]. Raises UserError where the layer
    has no cross-attention.
    """
    bert = model.bert
    check_layer(model, "itm", layer)
    with torch.no_grad():  # nothing below the layer is needed for the gradient
        tokens = model.visual_encoder(image)
        stage = bert.run(
            bert.text_stage(text_ids, text_mask),
            text_mask,
            tokens,
            first=bert.config.fusion_layer,
            last=layer,
        )
    with torch.enable_grad():
        fused, attention = bert.run(stage, text_mask, tokens, first=layer, map_of=("cross", layer))
        weighted = weigh(attention, model.match_logits(fused[:, 0])[:, 1].sum())
    return square(weighted.mean(1)[:, :, 1:])  # without the [CLS] patch


def matching_map(
    model: Retrieval, image: Tensor, text_ids: Tensor, text_mask: Tensor, layer: int
) -> Tensor:
    """Maps float32 [B,g,g] of whole texts: the mean of their `token_maps`."""
    maps = token_maps(model, image, text_ids, text_mask, layer) * text_mask[..., None, None]
    # a mean that counts padding is fainter, of the same shape
    count = text_mask.shape[1] if model.compat.padding_in_map else text_mask.sum(1)[:, None, None]
    return maps.sum(1) / count


def contrast_map(
    model: Retrieval, image: Tensor, text_ids: Tensor, text_mask: Tensor, block: int
) -> Tensor:
    """Maps float32 [B,g,g], from what [CLS] attends to in block `block` of the ViT, for the
    similarity to the text."""
    vit = model.visual_encoder
    check_layer(model, "itc", block)
    with torch.no_grad():
        _, text = model.encode_text(text_ids, text_mask)
        tokens = vit.embed(image)
        for below in vit.blocks[:block]:
            tokens = below(tokens)
    with torch.enable_grad():
        tokens, attention = vit.blocks[block](tokens, with_map=True)
        for above in vit.blocks[block + 1 :]:
            tokens = above(tokens)
        similarity = (model.image_feature(vit.norm(tokens)) * text).sum() / model.temp.detach()
        weighted = weigh(attention, similarity)
    return square(weighted.mean(1)[:, 0, 1:])


def weigh(attention: Tensor, score: Tensor) -> Tensor:
    """Attention probabilities times the positive part of the score's gradient, float32,
    detached."""
    (gradient,) = torch.autograd.grad(score, attention)
    return (attention.detach() * gradient.clamp(min=0)).float()


def square(patches: Tensor) -> Tensor:
    """[...,N] -> [...,g,g]."""
    side = round(patches.shape[-1] ** 0.5)
    return patches.unflatten(-1, (side, side))
