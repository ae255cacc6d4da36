"""Vision transformers of Classification.py for other libraries.

    safetensors   our own (timm's) names, with config.yaml where a run made the weights
    timm          config.json beside model.safetensors: timm loads `local-dir:FOLDER`
    hf            transformers' ViTForImageClassification (ViTModel with a pre-logits layer)
    onnx          model.onnx, from normalised pixels to logits

Where these libraries shrink an image they antialias, which COYO-ViT's views do not.
"""

import math
from pathlib import Path
from typing import Any

import torch

import eval_knn
from base.errors import UserError
from base.writing import write_json
from models.classification.classifier import ClassifierConfig, VisionClassifier
from models.weights.any_image_encoder import open_encoder
from models.weights.image_encoder import ImageEncoder
from models.weights.vit import native, to_timm, to_transformers, transformers_config
from models.weights.vit_facts import VitFacts
from runtime.checkpoint import export_safetensors
from scripts.weights.beside import clip_processor, square_processor
from scripts.weights.graphs import ANY, largest_error, write_graph
from scripts.weights.own import write_own
from scripts.weights.source import Options, Source, Written

TASK = "image-classification"
ARCHITECTURE = "vit_base_patch16_224"  # any of timm's plain ones: model_args tell all sizes
TIMM_EPS = 1e-6


def to_safetensors(source: Source, options: Options, folder: Path) -> Written:
    return write_own(source, options, folder, "eval_knn.py --checkpoint model.safetensors", TASK)


def to_timm_folder(source: Source, options: Options, folder: Path) -> Written:
    encoder = open_vit(source, options)
    config = encoder.network.options
    if config.stem:
        raise UserError(
            "timm's vision transformer has no convolutional stem; use --to onnx or safetensors"
        )
    if config.layer_norm_eps != TIMM_EPS:
        raise UserError(
            f"timm's vision transformer has layer_norm_eps {TIMM_EPS}, this one "
            f"{config.layer_norm_eps}; use --to hf, onnx or safetensors"
        )
    weights = to_timm(native(source.weights))
    export_safetensors(weights, folder / "model.safetensors")
    write_json(folder / "config.json", timm_config(encoder, resize_of(source, encoder)), indent=2)
    return Written("timm", TASK, TIMM_EXAMPLE)


def timm_config(encoder: ImageEncoder, small: int | None) -> dict[str, Any]:
    """`config.json` as timm pushes it to the hub. small: shorter side before the centre crop."""
    config, pixels = encoder.network.options, encoder.pixels
    vit = config.vit
    sizes = {
        "img_size": vit.image_size,
        "patch_size": vit.patch_size,
        "embed_dim": vit.width,
        "depth": vit.depth,
        "num_heads": vit.heads,
        "act_layer": "gelu_tanh" if config.gelu == "tanh" else "gelu",
    }
    look = {
        "input_size": [3, vit.image_size, vit.image_size],
        "interpolation": pixels.interpolation,
        # a little less, so that timm's floor of the side over it is `small`
        "crop_pct": math.nextafter(vit.image_size / small, 0) if small else 1.0,
        "crop_mode": "center" if small else "squash",
        "mean": list(pixels.mean),
        "std": list(pixels.std),
        "num_classes": config.num_classes,
        "pool_size": None,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    return {
        "architecture": ARCHITECTURE,
        "num_classes": config.num_classes,
        "num_features": vit.width,
        "global_pool": "token",
        "pretrained_cfg": look,
        "model_args": sizes,
    }


def to_hugging_face(source: Source, options: Options, folder: Path) -> Written:
    encoder = open_vit(source, options)
    write_transformers(native(source.weights), encoder.network.options, folder)
    small = resize_of(source, encoder)
    processor = clip_processor(encoder.pixels, small) if small else square_processor(encoder.pixels)
    write_json(folder / "preprocessor_config.json", processor, indent=2)
    return Written("transformers", TASK, HUGGING_FACE_EXAMPLE)


def write_transformers(weights: dict, config: ClassifierConfig, folder: Path) -> str:
    """config.json and model.safetensors of transformers' ViT; the name of its class."""
    if config.stem:
        raise UserError("transformers' ViT has no convolutional stem; use --to onnx or safetensors")
    export_safetensors(to_transformers(weights), folder / "model.safetensors")
    kind = "ViTModel" if config.representation_size else "ViTForImageClassification"
    about = transformers_config(config) | {"architectures": [kind]}
    about["id2label"] = {str(i): f"class {i}" for i in range(config.num_classes)}
    write_json(folder / "config.json", about, indent=2)
    return kind


def to_onnx(source: Source, options: Options, folder: Path) -> Written:
    encoder = open_vit(source, options)
    model = encoder.network
    side = encoder.pixels.size
    path = folder / "model.onnx"
    pixels = [torch.zeros(2, 3, side, side)]
    write_graph(model, model.logits, pixels, [{0: ANY}], path, (["image"], ["logits"]))
    images = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(0))
    largest_error(model.logits, path, [images])
    small = resize_of(source, encoder)
    processor = clip_processor(encoder.pixels, small) if small else square_processor(encoder.pixels)
    write_json(folder / "preprocessor_config.json", processor, indent=2)
    return Written("onnx", TASK, ONNX_EXAMPLE)


def open_vit(source: Source, options: Options) -> ImageEncoder:
    """The network as eval_knn.py opens it. UserError for one without a head."""
    stated = VitFacts(mean=options.mean, std=options.std)
    encoder = open_encoder(source.weights, source.about, options.model, stated).eval()
    if not isinstance(encoder.network, VisionClassifier):
        raise UserError(
            f"{source.file}: {encoder.title} without a classifier; its own library loads it as it "
            "is, and --to safetensors rewrites it"
        )
    return encoder


def resize_of(source: Source, encoder: ImageEncoder) -> int | None:
    """Shorter side before the centre crop; None where the whole image is squeezed."""
    return getattr(eval_knn.view_of(encoder, source.about)[0], "resize_small", encoder.resize)


TIMM_EXAMPLE = """
import timm
import torch
from PIL import Image

name = "local-dir:."  # from the hub: "hf-hub:USER/NAME"
model = timm.create_model(name, pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
with torch.no_grad():
    print(model(transform(Image.new("RGB", (64, 48), "red"))[None]).softmax(-1).topk(1))
"""

HUGGING_FACE_EXAMPLE = """
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, ViTForImageClassification, AutoConfig

name = "."  # from the hub: "USER/NAME"
kind = AutoConfig.from_pretrained(name).architectures[0]
network = ViTForImageClassification if kind == "ViTForImageClassification" else AutoModel
model = network.from_pretrained(name).eval()
processor = AutoImageProcessor.from_pretrained(name)
with torch.no_grad():
    found = model(**processor(Image.new("RGB", (64, 48), "red"), return_tensors="pt"))
print(found[0].shape if network is AutoModel else found.logits.softmax(-1).topk(1))
"""

ONNX_EXAMPLE = """
import onnxruntime
from PIL import Image
from transformers import AutoImageProcessor

graph = onnxruntime.InferenceSession("model.onnx")
processor = AutoImageProcessor.from_pretrained(".")
image = processor(Image.new("RGB", (64, 48), "red"), return_tensors="np")["pixel_values"]
print(graph.run(["logits"], {"image": image})[0].argmax(-1))
"""
