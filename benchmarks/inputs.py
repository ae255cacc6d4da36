"""Random inputs, equal for ours and the originals, and what one side leaves for the other. Imports
torch alone: it also runs in the interpreter of an original."""

from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

PEER_FILE = "peer.pt"  # in the folder `exchange`


def leave(options: SimpleNamespace, found: dict | list) -> None:
    """Save tensors for the other side."""
    torch.save(found, Path(options.exchange) / PEER_FILE)


def left(options: SimpleNamespace) -> dict | list | None:
    """What the other side has left, if it has; on the CPU, read as it is needed."""
    file = Path(options.exchange) / PEER_FILE
    if not file.exists():
        return None
    return torch.load(file, weights_only=True, mmap=True, map_location="cpu")


# ---- the small ALBEF of benchmarks.learning
SMALL_IMAGE = 48  # pixels; also of its CLIP
SMALL_VIT = {"patch_size": 8, "embed_dim": 96, "depth": 2, "num_heads": 4}  # the original's names
CROP_SCALE = (0.8, 1.0)  # area of the image


def seed_and_run(options: SimpleNamespace) -> dict:
    """The seed of this turn, and the folder that it trains into."""
    seed = options.seeds[options.turn]
    return {"seed": seed, "run": f"{options.folder}/{options.side}_{seed}"}


# ---- SIMLA and ALBEF, sizes as SIMLA was published
TEXT_LENGTH = 25  # tokens
IMAGE_SIZE, TOKEN_IMAGE_SIZE = 256, 128  # pixels: of the ViT, of the image tokenizer
PATCHES, MASKED_PATCHES = 256, 75
VOCABULARY, CLS, MASK = 30522, 101, 103  # bert-base-uncased
QUEUE_SIZE = 65536  # fixed in the originals
ALPHA = 0.4  # weight of the teacher's soft targets after the ramp


def synthetic_batch(size: int) -> dict[str, Tensor]:
    """Random image float32 [B,3,256,256]; text_ids int64 and text_mask bool [B,25], 8 to 25 tokens,
    of the first all; mlm_ids, mlm_labels int64 [B,25], -100 where none is predicted; token_image
    float32 [B,3,128,128] in [0,1]; patch_mask bool [B,256], 75 True a row."""
    rng = torch.Generator().manual_seed(0)
    text_ids = torch.randint(1000, VOCABULARY, (size, TEXT_LENGTH), generator=rng)
    text_ids[:, 0] = CLS
    lengths = torch.randint(8, TEXT_LENGTH + 1, (size,), generator=rng)
    lengths[0] = TEXT_LENGTH
    text_mask = torch.arange(TEXT_LENGTH) < lengths[:, None]
    text_ids *= text_mask
    masked = torch.rand(size, TEXT_LENGTH, generator=rng) < 0.15
    masked[:, 1] = True
    masked &= text_mask & (text_ids != CLS)
    order = torch.rand(size, PATCHES, generator=rng).argsort(1)
    return {
        "image": torch.randn(size, 3, IMAGE_SIZE, IMAGE_SIZE, generator=rng),
        "text_ids": text_ids,
        "text_mask": text_mask,
        "mlm_ids": text_ids.masked_fill(masked, MASK),
        "mlm_labels": text_ids.masked_fill(~masked, -100),
        "token_image": torch.rand(size, 3, TOKEN_IMAGE_SIZE, TOKEN_IMAGE_SIZE, generator=rng),
        "patch_mask": order < MASKED_PATCHES,
    }


def synthetic_split(images: int, captions: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images float32 [I,3,384,384], ids int64 [T,30] and mask bool [T,30] of a retrieval test on
    the CPU: 9 to 16 tokens, as most captions of COCO have, padded to the originals' 30."""
    rng = torch.Generator().manual_seed(0)
    mask = torch.arange(30) < torch.randint(9, 17, (captions, 1), generator=rng)
    ids = torch.randint(1000, VOCABULARY, (captions, 30), generator=rng)
    ids[:, 0] = CLS
    return torch.randn(images, 3, 384, 384, generator=rng), ids * mask, mask


def pin_choices() -> None:
    """In this process: a sampled hard negative is the likeliest, ties of top-k go to the first."""

    def topk(values: Tensor, k: int, dim: int = -1) -> SimpleNamespace:
        order = values.argsort(dim=dim, descending=True, stable=True)
        return SimpleNamespace(indices=order.narrow(dim, 0, k).contiguous())

    torch.multinomial = lambda weights, num_samples: weights.argmax(-1, keepdim=True)
    torch.Tensor.topk = topk


@torch.no_grad()
def shake(model: nn.Module) -> None:
    """Move every parameter off its start, copies apart from their originals: each term counts."""
    rng = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim:
            parameter += 0.02 * torch.randn(parameter.shape, generator=rng).to(parameter.device)


# ---- dual encoders
CONTEXT = 77  # tokens of CLIP's texts
END = 49407  # id of CLIP's last token


def clip_captions(size: int, views: int, longest: int) -> Tensor:
    """Random ids int64 [size,views,77] of captions of 8 to `longest` tokens; the first has all."""
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(1, END - 1, (size, views, CONTEXT), generator=rng)
    lengths = torch.randint(8, longest + 1, (size, views, 1), generator=rng)
    lengths[0, 0] = longest
    positions = torch.arange(CONTEXT)
    ids[positions.expand_as(ids) == lengths - 1] = END
    ids[positions.expand_as(ids) >= lengths] = 0
    return ids


def random_batch(options: SimpleNamespace) -> dict[str, Tensor]:
    """image [B,3,S,S] and text_ids [B,77]; beside clip-rocket, with two local views V, text_ids
    [B,1+V,77] and image_local [B,V,3,S,S]."""
    size, side = options.batch, 32 if options.tiny and not options.peer else 224
    ids = clip_captions(size, 3 if options.peer else 1, options.tokens)
    image = torch.randn(size, 3, side, side)
    if not options.peer:
        return {"image": image, "text_ids": ids[:, 0]}
    return {"image": image, "text_ids": ids, "image_local": torch.randn(size, 2, 3, side, side)}
