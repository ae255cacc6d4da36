"""CLIP-like dual encoders and ALIGN for other libraries.

safetensors   our own names, with config.yaml where a run made the weights
open_clip     open_clip_config.json beside the weights: open_clip loads `local-dir:FOLDER`
hf            transformers' CLIPModel (OpenAI's ViTs) or AlignModel (B7)
onnx          image.onnx and text.onnx, from normalised pixels and token ids to z (and h)
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import eval_zeroshot
from base.errors import UserError
from base.pixels import ALIGN_MARGIN
from base.writing import write_json
from dataset.text.align import AlignTokenizer
from dataset.text.bpe import ClipTokenizer
from models.dual_encoder.align import Align
from models.dual_encoder.library import LibraryCLIP
from models.weights import align, clip
from models.weights.any_dual_encoder import Opened
from runtime.checkpoint import export_safetensors
from runtime.config.yaml import to_dict
from scripts.weights.beside import (
    align_processor,
    clip_processor,
    write_bert_tokenizer,
    write_clip_tokenizer,
)
from scripts.weights.export_library import (
    library_to_hugging_face,
    library_to_open_clip,
    write_library_inputs,
)
from scripts.weights.graphs import ANY, largest_error, write_graph
from scripts.weights.own import write_own
from scripts.weights.source import Options, Source, State, Written

TASK = "zero-shot-image-classification"
OF_OPEN_CLIP = "open_clip_config.json"
TIMM_SIDE = 224  # of the images of open_clip's timm towers, whatever image_size says


def to_safetensors(source: Source, options: Options, folder: Path) -> Written:
    """Of a run its config.yaml tells the network; of other weights what is read beside them."""
    described = source.family == "align" or "config" in source.about
    opened = None if described else open_dual_encoder(source, options)
    network = None
    if opened and any(name.startswith("image_project") for name in source.weights):
        network = to_dict(replace(opened.model.config, model=opened.title))
    use = "eval_zeroshot.py --checkpoint model.safetensors"
    written = write_own(source, options, folder, use, TASK, network)
    if opened and network is None:
        describe(source, opened, options, folder)
    return written


def describe(source: Source, opened: Opened, options: Options, folder: Path) -> None:
    """Write the JSON files that tell the network of weights alone, in the layout of their names."""
    if clip.is_hugging_face(source.weights):
        about = clip.hugging_face_config(opened.model.config)
        write_json(folder / "config.json", about, indent=2)
        write_json(folder / "preprocessor_config.json", clip_processor(opened.pixels), indent=2)
    else:
        write_json(folder / OF_OPEN_CLIP, about_open_clip(opened, options), indent=2)


def to_open_clip(source: Source, options: Options, folder: Path) -> Written:
    opened = open_dual_encoder(source, options)
    if isinstance(opened.model, LibraryCLIP):
        library_to_open_clip(opened, folder, options.repository)
        return Written("open_clip", TASK, OPEN_CLIP_EXAMPLE)
    about = about_open_clip(opened, options)
    export_safetensors(clip.to_open_clip(opened.model), folder / "open_clip_model.safetensors")
    write_json(folder / OF_OPEN_CLIP, about, indent=2)
    write_clip_tokenizer(opened.tokenize.func, folder)
    return Written("open_clip", TASK, OPEN_CLIP_EXAMPLE)


def about_open_clip(opened: Opened, options: Options) -> dict[str, Any]:
    """`open_clip_config.json`. UserError for what open_clip cannot hold."""
    if isinstance(opened.model, Align):
        raise UserError(
            "open_clip has no EfficientNet and BERT pair as ALIGN's; use --to hf (B7), onnx or "
            "safetensors"
        )
    tokenizer = opened.tokenize.func
    if not isinstance(tokenizer, ClipTokenizer):
        raise UserError(
            "open_clip cannot keep the text tower of transformers beside the weights; use --to "
            "onnx or safetensors"
        )
    network = clip.open_clip_config(opened.model)
    timm = network["vision_cfg"].get("timm_model_name", "")
    side = opened.pixels.size
    own_tower = network["vision_cfg"].get("timm_pool") == ""  # which is of one size here, too
    if timm.startswith("vit_") and not own_tower and side != TIMM_SIDE:
        raise UserError(
            f"open_clip builds timm's {timm} for {TIMM_SIDE} pixels, and this model is for {side}; "
            "use --to onnx or safetensors"
        )
    if not is_clips(tokenizer):  # open_clip's own would make other ids: ours lies in the folder
        network["text_cfg"]["hf_tokenizer_name"] = options.repository or "local"
        network["text_cfg"]["tokenizer_kwargs"] = {"clean": "lower"}
    pixels = opened.pixels
    look = {
        "mean": list(pixels.mean),
        "std": list(pixels.std),
        "interpolation": pixels.interpolation,
        "resize_mode": "shortest",
    }
    return {"model_cfg": network, "preprocess_cfg": look}


def is_clips(tokenizer: ClipTokenizer) -> bool:
    """Whether these are the merges of open_clip's own tokenizer; others may be as many."""
    try:
        return tokenizer.merges == ClipTokenizer().merges
    except UserError:  # open_clip is not on this machine
        return False


def to_hugging_face(source: Source, options: Options, folder: Path) -> Written:
    opened = open_dual_encoder(source, options)
    if isinstance(opened.model, Align):
        return align_to_hugging_face(source, opened, folder)
    if isinstance(opened.model, LibraryCLIP):
        library_to_hugging_face(opened, folder)
        return Written("transformers", TASK, WHOLE_CONTEXT_EXAMPLE)
    weights = clip.to_hugging_face(opened.model)
    export_safetensors(weights, folder / "model.safetensors")
    write_json(folder / "config.json", clip.hugging_face_config(opened.model.config), indent=2)
    processor = clip_processor(opened.pixels) | {"processor_class": "CLIPProcessor"}
    write_json(folder / "preprocessor_config.json", processor, indent=2)
    write_clip_tokenizer(opened.tokenize.func, folder)
    return Written("transformers", TASK, HUGGING_FACE_EXAMPLE)


def align_to_hugging_face(source: Source, opened: Opened, folder: Path) -> Written:
    """AlignModel. UserError for models with an image projection."""
    write_align(source.weights, opened.model, folder)
    side = opened.pixels.size
    processor = align_processor(side, round(side * ALIGN_MARGIN))
    write_json(folder / "preprocessor_config.json", processor, indent=2)
    write_align_tokenizer(opened.tokenize.func, folder)
    return Written("transformers", TASK, HUGGING_FACE_EXAMPLE)


def write_align(weights: State, model: Align, folder: Path) -> None:
    """config.json and model.safetensors of transformers' AlignModel."""
    export_safetensors(align.to_hugging_face(weights), folder / "model.safetensors")
    write_json(folder / "config.json", align.hugging_face_config(model), indent=2)


def to_onnx(source: Source, options: Options, folder: Path) -> Written:
    """Two graphs for any number of images, texts and tokens, and what makes their inputs:
    normalised pixels float32 [B,3,S,S], and token ids int64 [B,L] padded as the tokenizer pads, -> z
    [B,E] and, where the model has it, h [B,E]."""
    opened = open_dual_encoder(source, options)
    side = opened.pixels.size
    model = opened.model
    names = ["z", "h"] if hasattr(model, "l2l_image_projector") else ["z"]

    def image(pixels: Tensor) -> tuple[Tensor, ...]:
        found = model.embed_image(pixels)
        return tuple(found[name] for name in names)

    def text(text_ids: Tensor) -> tuple[Tensor, ...]:
        found = model.embed_text(text_ids)
        return tuple(found[name] for name in names)

    tokens = opened.tokenize(["a dog", "a photo of a cat"])
    pixels = torch.zeros(2, 3, side, side)
    write_graph(model, image, [pixels], [{0: ANY}], folder / "image.onnx", (["image"], names))
    whole = isinstance(model, LibraryCLIP)  # texts of the whole context
    texts = [{0: ANY} if whole else {0: ANY, 1: ANY}]
    write_graph(model, text, [tokens], texts, folder / "text.onnx", (["text_ids"], names))
    generator = torch.Generator().manual_seed(0)
    largest_error(
        image, folder / "image.onnx", [torch.randn(3, 3, side, side, generator=generator)]
    )
    largest_error(text, folder / "text.onnx", [opened.tokenize(["one", "a red car", "snow"])])
    write_inputs(opened, folder)
    example = ONNX_EXAMPLE
    if whole:
        example = example.replace("padding=True", 'padding="max_length"')
    return Written("onnx", TASK, example)


def write_inputs(opened: Opened, folder: Path) -> None:
    """Image processor and tokenizer, as transformers reads them."""
    if isinstance(opened.model, LibraryCLIP):
        return write_library_inputs(opened, folder)
    pixels, tokenizer = opened.pixels, opened.tokenize.func
    processor = clip_processor(pixels)
    if isinstance(opened.model, Align):
        processor = align_processor(pixels.size, round(pixels.size * ALIGN_MARGIN))
    write_json(folder / "preprocessor_config.json", processor, indent=2)
    if isinstance(tokenizer, AlignTokenizer):
        write_align_tokenizer(tokenizer, folder)
    elif isinstance(tokenizer, ClipTokenizer):
        write_clip_tokenizer(tokenizer, folder)
    else:
        tokenizer.backend.save_pretrained(folder)
    return None


def write_align_tokenizer(tokenizer: AlignTokenizer, folder: Path) -> None:
    write_bert_tokenizer(tokenizer.pieces, tokenizer.context_length, folder)


def open_dual_encoder(source: Source, options: Options) -> Opened:
    """The network with its tokenizer, exactly as eval_zeroshot.py opens it."""
    config = eval_zeroshot.Config(
        checkpoint=source.file,
        model=options.model,
        mean=options.mean,
        std=options.std,
        bpe_path=options.bpe_path,
        tokenizer=options.tokenizer,
    )
    return eval_zeroshot.open_checkpoint(config)[0]


OPEN_CLIP_EXAMPLE = """
import open_clip
import torch
from PIL import Image

name = "local-dir:."  # from the hub: "hf-hub:USER/NAME"
model, transform = open_clip.create_model_from_pretrained(name)
tokenizer = open_clip.get_tokenizer(name)
model.eval()
image = transform(Image.new("RGB", (64, 48), "red"))[None]
texts = tokenizer(["a red square", "a dog"])
with torch.no_grad():
    images = model.encode_image(image, normalize=True)
    print(images @ model.encode_text(texts, normalize=True).T)
"""

HUGGING_FACE_EXAMPLE = """
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

name = "."  # from the hub: "USER/NAME"
model = AutoModel.from_pretrained(name).eval()
processor = AutoImageProcessor.from_pretrained(name)
tokenizer = AutoTokenizer.from_pretrained(name)
image = processor(Image.new("RGB", (64, 48), "red"), return_tensors="pt")
texts = tokenizer(["a red square", "a dog"], padding=True, return_tensors="pt")
with torch.no_grad():
    print(model(**image, **texts).logits_per_image)
"""

WHOLE_CONTEXT_EXAMPLE = HUGGING_FACE_EXAMPLE.replace("padding=True", 'padding="max_length"')
ONNX_EXAMPLE = """
import onnxruntime
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer

image, text = (onnxruntime.InferenceSession(f"{name}.onnx") for name in ("image", "text"))
processor = AutoImageProcessor.from_pretrained(".")
tokenizer = AutoTokenizer.from_pretrained(".")
pixels = processor(Image.new("RGB", (64, 48), "red"), return_tensors="pt")["pixel_values"]
ids = tokenizer(["a red square", "a dog"], padding=True, return_tensors="pt")["input_ids"]
images = image.run(["z"], {"image": pixels.numpy()})[0]
texts = text.run(["z"], {"text_ids": ids.numpy()})[0]
print(images @ texts.T)
"""
