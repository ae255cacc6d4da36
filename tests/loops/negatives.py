"""Hard negatives of image-text matching: which pairs the loss of a network was made of."""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.loops import load, state_of

SEEN = ("vision_proj", "text_proj", "vision_proj_m", "text_proj_m", "itm_head")
CERTAIN = 15.0  # a logit this far above the others is sampled all but one time in a million


def check_hard_negatives(network: nn.Module, inputs: dict[str, Tensor]) -> None:
    """loss_itm is that of the own pairs, of each text with the image likeliest by its text-to-image
    similarity, and of each image with the text likeliest by its image-to-text similarity.

    The temperature is at its smallest, where sampling always takes the likeliest.
    """
    own = torch.eye(len(inputs["image"]), dtype=torch.bool)
    if "image_id" in inputs:
        own = inputs["image_id"][:, None] == inputs["image_id"][None, :]
    start = state_of(network)
    for seed in range(200):
        load(network, start)
        spread(network, seed)
        state = state_of(network)
        loss, i2t, t2i = forward(network, inputs)
        text_of, image_of = likeliest(i2t, own), likeliest(t2i, own)
        if text_of is not None and image_of is not None and not torch.equal(text_of, image_of):
            break
    else:
        raise AssertionError(
            "no weights were found that leave no doubt about the likeliest negatives"
        )
    pairs = all_pairs(network, inputs, state)
    expected, exchanged = itm_loss(pairs, text_of, image_of), itm_loss(pairs, image_of, text_of)
    assert abs(expected - exchanged) > 1e-3, "this case cannot tell the directions apart"
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def spread(network: nn.Module, seed: int) -> None:
    """Weights so far apart that similarities differ, and those of teacher and student, so that
    directions disagree."""
    torch.manual_seed(seed)
    for parameter in network.parameters():
        if parameter.ndim > 1:
            parameter.add_(0.3 * torch.randn_like(parameter))
    network.temp.fill_(0.001)


def forward(network: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """loss_itm, and the similarity logits inside the batch [B,B]: image to text, text to image."""
    with outputs_of(network) as seen:
        loss = network(**inputs)["loss_itm"].detach()
    features = {name: F.normalize(seen[name], dim=-1) for name in SEEN[:-1]}
    i2t = features["vision_proj"] @ features["text_proj_m"].T / 0.001
    t2i = features["text_proj"] @ features["vision_proj_m"].T / 0.001
    return loss, i2t, t2i


def likeliest(similarity: Tensor, own: Tensor) -> Tensor | None:
    """The best column of each row that is no own pair, int64 [B]; None where another is about as
    good."""
    best = similarity.masked_fill(own, -torch.inf).topk(2, dim=1)
    return None if (best.values[:, 0] - best.values[:, 1]).min() < CERTAIN else best.indices[:, 0]


def all_pairs(network: nn.Module, inputs: dict[str, Tensor], state: dict[str, Tensor]) -> Tensor:
    """Matching logits [B,B,2] of every image with every text: as own pairs, with the images shifted
    against the texts.

    The matching head sees the own pairs first.
    """
    size = len(inputs["image"])
    pairs = torch.empty(size, size, 2)
    for shift in range(size):
        image = torch.arange(size).roll(-shift)
        load(network, state)
        with outputs_of(network) as seen:
            network(**{**inputs, "image": inputs["image"][image]})
            pairs[image, torch.arange(size)] = seen["itm_head"][:size]
    return pairs


def itm_loss(pairs: Tensor, text_of: Tensor, image_of: Tensor) -> Tensor:
    """Mean cross entropy of B own pairs, B pairs (drawn image, text) and B pairs (image, drawn
    text)."""
    each = torch.arange(len(pairs))
    logits = torch.cat([pairs[each, each], pairs[image_of, each], pairs[each, text_of]])
    return F.cross_entropy(
        logits, torch.cat([torch.ones_like(each), torch.zeros_like(each), torch.zeros_like(each)])
    )


@contextlib.contextmanager
def outputs_of(network: nn.Module) -> Iterator[dict[str, Tensor]]:
    """What the modules of SEEN last returned."""
    seen = {}

    def keep(name: str):
        def hook(_module, _inputs, output):
            seen[name] = output.detach()

        return hook

    handles = [getattr(network, name).register_forward_hook(keep(name)) for name in SEEN]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
