"""What a dual encoder is fed, by its model string: CLIP's byte-pair ids and views, or ALIGN's
pieces and squares."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import default_collate

from base.caches import digest
from base.errors import UserError
from base.libraries import dual_inputs, of_library
from base.pixels import HALF, OPENAI, timm_statistics
from dataset.images.align import AlignView, AlignViews
from dataset.images.clip import EvalView, ImageViews, ViewOptions, normalize, pixel_statistics
from dataset.loading.eval import EvalLoader
from dataset.text.align import AlignTokenizer
from dataset.text.bpe import ClipTokenizer
from dataset.text.hugging_face import FolderTokenizer
from dataset.text.open_clip import OpenClipTokenizer

AnyTokenizer = ClipTokenizer | AlignTokenizer | FolderTokenizer | OpenClipTokenizer


def is_align(model: str) -> bool:
    return model.startswith("ALIGN_")


def text_tokenizer(
    model: str, context_length: int, merges: str | Path | None, vocabulary: str | Path
) -> AnyTokenizer:
    """tokenizer(texts, lengths) -> int64 [B,L].

    model: its name; a library's has its own tokenizer. merges: file of CLIP's BPE; vocabulary: of
    BERT, for ALIGN, or hf/FOLDER of a text tower.
    """
    if model.startswith("open_clip/"):
        return OpenClipTokenizer(model)
    if of_library(model):
        return FolderTokenizer(model, context_length, whole=True)
    if str(vocabulary).startswith("hf/"):
        return FolderTokenizer(vocabulary, context_length)
    if is_align(model):
        return AlignTokenizer(vocabulary, context_length)
    return ClipTokenizer(merges, context_length)


def tokenizer_of(opened, trained: Mapping, knobs) -> AnyTokenizer:
    """The tokenizer of a network that is read from a file.

    opened: its `title` and `context_length`. trained: the configuration of the run that made it, {}
    where that is not known; what `bpe_path` and `tokenizer` of `knobs` name comes first. UserError
    where the network knows another number of tokens.
    """
    merges = knobs.bpe_path or trained.get("bpe_path")
    tower = trained.get("network", {}).get("text_tower")
    vocabulary = tower or knobs.tokenizer or trained.get("tokenizer", "bert-base-uncased")
    tokenizer = text_tokenizer(opened.title, opened.context_length, merges, vocabulary)
    if tokenizer.vocab_size != opened.vocab_size:
        raise UserError(
            f"{knobs.checkpoint} knows {opened.vocab_size} tokens, but {tokenizer.path} makes "
            f"{tokenizer.vocab_size}: give what it was trained with as --bpe-path (ALIGN: --tokenizer)"
        )
    return tokenizer


def tokenizer_identity(tokenizer: AnyTokenizer | Callable) -> str:
    """What the token ids depend on. Of a library's tokenizer all that it is made of: a folder's may
    change in place, and one vocabulary has many merges and ways of cleaning."""
    if isinstance(tokenizer, AlignTokenizer):
        return tokenizer.pieces.backend.to_str()
    if isinstance(tokenizer, ClipTokenizer):
        return repr(tokenizer.merges)
    owner = getattr(tokenizer, "backend", tokenizer)  # open_clip's, or ours around transformers'
    words = getattr(owner, "tokenizer", owner)
    fast = getattr(words, "backend_tokenizer", None)
    if fast is not None:
        fast.no_padding()  # both as the last call left them: each call sets its own
        fast.no_truncation()
        content = fast.to_str()
    else:
        vocabulary = words.get_vocab() if hasattr(words, "get_vocab") else {}
        content = repr(sorted(vocabulary.items()))
    options = [] if owner is words else sorted(plain_options(owner).items())
    return digest(type(owner).__name__, options, content)


def plain_options(owner: object) -> dict[str, object]:
    """Numbers, texts and functions, by name, among an object's attributes."""
    found = {name: getattr(value, "__name__", value) for name, value in vars(owner).items()}
    return {name: value for name, value in found.items() if isinstance(value, int | float | str)}


def training_views(
    network, options: ViewOptions, local: int
) -> Callable[[Tensor], tuple[Tensor, Tensor | None]]:
    """views(uint8 [3,H,W]) -> the global view [3,S,S] and the local ones [A,3,s,s] or None.

    network: has `model`, `image_size` and `compat`. ALIGN takes nothing of the options but `flip`.
    """
    if is_align(network.model):
        exact = network.compat == "original"
        return AlignViews(network.image_size, train=True, flip=0.5 * options.flip, exact=exact)
    return ImageViews(network.image_size, options, local, network.compat)


def is_of_one_part(model: str) -> bool:
    """Whether a name is one of OpenAI's (ViT-B-32, RN50): all others have parts joined by _."""
    return "_" not in model


def eval_view(
    model: str, side: int, interpolation: str | None = None
) -> Callable[[Tensor], Tensor]:
    """view(uint8 [3,H,W]) -> uint8 [3,S,S]; ALIGN's and a library's know one interpolation. None:
    bicubic for OpenAI's models, else bilinear."""
    if of_library(model):
        inputs = dual_inputs(model)
        return EvalView(side, inputs.pixels.interpolation, inputs.resized, inputs.squeeze)
    if is_align(model):
        return AlignView(side)
    return EvalView(side, interpolation or ("bicubic" if is_of_one_part(model) else "bilinear"))


def image_side(opened, device: torch.device) -> tuple[Callable, Callable]:
    """`view(uint8 [3,H,W])`, the input of one image, and `embed(inputs [B,...] on the device)`,
    embeddings by name.

    opened: a dual encoder with its `model`, `title`, `pixels` and a library's own `view`, or None.
    """
    pixels = opened.pixels
    statistics = pixel_statistics(device, pixels.mean, pixels.std)
    view = opened.view or eval_view(opened.title, pixels.size, pixels.interpolation)

    def embed(image: Tensor) -> dict[str, Tensor]:
        return opened.model.embed_image(image if opened.view else normalize(image, statistics))

    return view, embed


def input_statistics(network, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and std in grey levels, float32 [3,1,1] each, for `normalize`; network: has `model` and
    `image_tower`."""
    if network.image_tower:
        return pixel_statistics(device, *timm_statistics(network.image_tower))
    if of_library(network.model):
        pixels = dual_inputs(network.model).pixels
        return pixel_statistics(device, pixels.mean, pixels.std)
    if is_of_one_part(network.model):
        return pixel_statistics(device, *OPENAI)
    return pixel_statistics(device, *HALF) if is_align(network.model) else pixel_statistics(device)


def normalized(batch: dict[str, Tensor], statistics: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """The batch with its uint8 images (`image`, `image_local`) as normalised float32."""
    result = dict(batch)
    for name in ("image", "image_local"):
        if name in batch:
            result[name] = normalize(batch[name], statistics)
    return result


class NormalizedBatches:
    """Batches of the samples `load(i)` for every i of `indices`, in order, on `device` and
    normalised (see EvalLoader).

    config: has `network` (see `input_statistics`), `batch_size`, `workers`, `error_budget`, `exif`.
    """

    def __init__(
        self,
        load: Callable[[int], dict],
        indices: Sequence[int],
        config,
        device: torch.device,
    ):
        self.loader = EvalLoader(
            load,
            indices,
            config.batch_size,
            default_collate,
            workers=config.workers,
            error_budget=config.error_budget,
            exif=config.exif,
        )
        self.statistics = input_statistics(config.network, device)
        self.device = device

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in self.loader:
            moved = {}
            for name, value in batch.items():
                moved[name] = value.to(self.device, non_blocking=True)
            yield normalized(moved, self.statistics)

    def damages(self) -> dict[str, int]:
        """Damaged images of the last pass, for the metrics."""
        return self.loader.damages()
