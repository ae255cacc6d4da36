"""Compositional understanding: every caption of an example to its own image, as SugarCrepe (Hsieh et
al. 2023) and Winoground (Thrush et al. 2022) score it."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from base.distributed import World
from evaluation.predict import percent
from evaluation.retrieval import Captions, RetrievalModel, score_pairs


def example_scores(
    image: Tensor, text: Tensor, example_images: Tensor, example_captions: Tensor
) -> Tensor:
    """Cosine of every image and caption of an example, float32 [N,I,C].

    image, text: unit embeddings [M,E], [T,E]; example_images int64 [N,I], example_captions int64
    [N,C]: which of them an example has.
    """
    return image[example_images] @ text[example_captions].transpose(1, 2)


def match_examples(
    model: RetrievalModel,
    load_images: Callable[[list[int]], Iterable[Tensor]],
    captions: Captions,
    example_images: Tensor,
    example_captions: Tensor,
    world: World,
    **options,
) -> dict[str, float | dict]:
    """`choices` of a fusion encoder by ITM, and by its similarity as `itc_text_acc` and others, with
    chance. Examples as in `example_scores`; other arguments as of `retrieval.score_pairs`."""
    shape = (*example_images.shape, example_captions.shape[1])
    image = example_images[:, :, None].expand(shape)
    text = example_captions[:, None].expand(shape)
    images = int(example_images.max()) + 1
    similarity, matching = score_pairs(
        model, load_images, images, captions, image, text, world, **options
    )
    found: dict[str, float | dict] = {"examples": len(example_images), **choices(matching)}
    for name, value in choices(similarity).items():
        found[f"itc_{name}"] = value
    return {**found, "chance": choices_chance(*shape[1:])}


def choices(scores: Tensor) -> dict[str, float]:
    """`text_acc`, `image_acc` and `acc` in percent, of scores [N,I,C] where image i belongs to
    caption i.

    text_acc: every image scores highest with its own caption; image_acc: every caption with its own
    image; acc: both (Thrush et al. 2022, equations 1 to 3). A draw is wrong. With one image
    image_acc is 100.
    """
    pairs = min(scores.shape[1:])
    own = scores.diagonal(dim1=1, dim2=2)
    same = torch.eye(*scores.shape[1:], dtype=torch.bool, device=scores.device)
    others = scores.masked_fill(same, -torch.inf)
    text = (own > others[:, :pairs].amax(2)).all(1)
    image = (own > others[:, :, :pairs].amax(1)).all(1)
    return {
        "text_acc": percent(text),
        "image_acc": percent(image),
        "acc": percent(text & image),
    }


def choices_chance(images: int, captions: int) -> dict[str, float]:
    """What random scores get in percent: of one image, or of two images and two captions."""
    text = 100 * (1 / captions) ** images
    if images == 1:
        return {"text_acc": text, "image_acc": 100.0, "acc": text}
    # both: the two right pairs score above the two wrong ones, one order of four in six
    return {"text_acc": text, "image_acc": text, "acc": 100 / 6}
