"""NXTP for others.

safetensors   our own names, with config.yaml and the tokenizer
hf            decoder/ (transformers' LLaMA, Qwen2 or Qwen3), vision/ (CLIPVisionModel) and
              projection.safetensors, which joins them
onnx          image.onnx, prefill.onnx, step.onnx: see scripts/weights/export_recognition.py
"""

from pathlib import Path

import torch
from torch import Tensor

import Recognition
from base import distributed
from base.errors import UserError
from base.pixels import OPENAI, Pixels, timm_statistics
from base.writing import write_json
from dataset.tasks.recognition import Sequences
from dataset.text.sentencepiece import PieceTokenizer
from models.layers.openai_towers import OpenAIConfig
from models.recognition.nxtp import Nxtp
from models.weights import clip, llama
from models.weights.loading import part_of
from runtime.checkpoint import export_safetensors
from scripts.weights import export_recognition
from scripts.weights.beside import clip_processor, square_processor
from scripts.weights.own import copy_tokenizer, write_own
from scripts.weights.source import Options, Source, Written

TASK = "image-to-text"
VISION, DECODER = "vision_encoder.", "language_decoder."
JOINT = ("ln_post.weight", "ln_post.bias", "proj.weight")


def to_safetensors(source: Source, options: Options, folder: Path) -> Written:
    return write_own(source, options, folder, "Recognition.py --checkpoint . --image PATH", TASK)


def to_hugging_face(source: Source, options: Options, folder: Path) -> Written:
    """UserError for image towers that transformers lacks."""
    model, tokenizer, config = open_nxtp(source, options)
    if model.config.image_tower:
        raise UserError(
            "transformers has no layout for an image tower of timm; use --to onnx or safetensors"
        )
    if model.config.vision.is_resnet:
        raise UserError(
            "transformers has no ResNet tower as CLIP's; use --to onnx or safetensors for it"
        )
    state = model.state_dict()
    decoder = part_of(state, DECODER)
    geometry = model.config.decoder
    export_safetensors(
        llama.to_hugging_face(decoder, geometry), folder / "decoder/model.safetensors"
    )
    about = llama.hugging_face_values(geometry)
    about |= {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos}
    about |= {"pad_token_id": tokenizer.pad}
    write_json(folder / "decoder/config.json", about, indent=2)
    copy_tokenizer(tokenizer.path, folder / "decoder")
    vision = part_of(state, VISION)
    export_safetensors(vision_weights(vision), folder / "vision/model.safetensors")
    write_json(folder / "vision/config.json", vision_config(model.config.vision), indent=2)
    write_json(folder / "vision/preprocessor_config.json", processor_of(model, config), indent=2)
    joint = {name: vision[name] for name in JOINT}
    export_safetensors(joint, folder / "projection.safetensors")
    return Written("transformers", TASK, HUGGING_FACE_EXAMPLE)


def vision_weights(vision: dict[str, Tensor]) -> dict[str, Tensor]:
    """The image tower under the names of transformers' CLIPVisionModel."""
    tower = {f"visual.{name}": value for name, value in vision.items() if name != "proj.weight"}
    return clip.hugging_face_names(tower)


def vision_config(config: OpenAIConfig) -> dict:
    """`config.json` of transformers' CLIPVisionModel."""
    about = clip.hugging_face_config(config)["vision_config"]
    return {"architectures": ["CLIPVisionModel"], **about}


def to_onnx(source: Source, options: Options, folder: Path) -> Written:
    model, tokenizer, config = open_nxtp(source, options)
    prompt = torch.tensor(Sequences(tokenizer, config.max_text).opening)
    with torch.no_grad():
        export_recognition.export(model, prompt, folder)
        exported = export_recognition.OnnxNetwork(folder)
        export_recognition.check(model, exported, prompt, tokenizer, 8)
    write_json(folder / "preprocessor_config.json", processor_of(model, config), indent=2)
    copy_tokenizer(tokenizer.path, folder)
    opening = prompt.tolist()
    return Written("onnx", TASK, ONNX_EXAMPLE.replace("OPENING", str(opening)))


def processor_of(model: Nxtp, config: Recognition.Config) -> dict:
    """How images are cut and normalised."""
    tower = model.config.image_tower
    statistics = timm_statistics(tower) if tower else OPENAI
    pixels = Pixels(model.config.vision.image_size, "bicubic", *statistics)
    return square_processor(pixels) if config.whole_image else clip_processor(pixels)


def open_nxtp(source: Source, options: Options) -> tuple[Nxtp, PieceTokenizer, Recognition.Config]:
    """The network as Recognition.py opens it."""
    config = Recognition.Config(checkpoint=source.file, clip=options.clip, evaluate=True)
    config.tokenizer = Path(options.tokenizer) if options.tokenizer else None
    world = distributed.init("cpu")
    Recognition.check(config, world)
    tokenizer = PieceTokenizer(config.tokenizer)
    return Recognition.build_model(config, tokenizer, world).eval(), tokenizer, config


HUGGING_FACE_EXAMPLE = """
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForCausalLM, CLIPVisionModel

vision = CLIPVisionModel.from_pretrained("vision").eval()
decoder = AutoModelForCausalLM.from_pretrained("decoder").eval()  # LLaMA, Qwen2 or Qwen3
joint = load_file("projection.safetensors")
processor = AutoImageProcessor.from_pretrained("vision")
image = processor(Image.new("RGB", (64, 48), "red"), return_tensors="pt")
with torch.no_grad():
    tokens = vision(**image).last_hidden_state[:, 1:]
    norm = F.layer_norm(tokens, tokens.shape[-1:], joint["ln_post.weight"], joint["ln_post.bias"])
    images = norm @ joint["proj.weight"].T  # what the decoder reads in front of the text
    print(decoder(inputs_embeds=images).logits.shape)
"""

ONNX_EXAMPLE = """
import numpy
import onnxruntime
from PIL import Image
from transformers import AutoImageProcessor

image, prefill = (onnxruntime.InferenceSession(f"{name}.onnx") for name in ("image", "prefill"))
processor = AutoImageProcessor.from_pretrained(".")
pixels = processor(Image.new("RGB", (64, 48), "red"), return_tensors="np")["pixel_values"]
tokens = image.run(None, {image.get_inputs()[0].name: pixels})[0]
prompt = numpy.array(OPENING)  # "<|image|>", BOS and the question
names = [entry.name for entry in prefill.get_inputs()]
logits, *cache = prefill.run(None, dict(zip(names, (tokens, prompt))))
print("first token of the likeliest label:", logits.argmax(-1))
"""
