"""SIMLA, ALBEF and the image tokenizer (dVAE) for others.

safetensors   the published names
onnx          the retrieval pair: image.onnx, text.onnx and match.onnx; of a dVAE encoder.onnx
              and, where there is one, decoder.onnx
"""

from pathlib import Path

import torch
from torch import Tensor

import Retrieval
from base.errors import UserError
from base.pixels import Pixels
from base.writing import write_json
from dataset.text.wordpiece import Tokenizer
from models.fusion.dvae import ImageTokenizer
from models.fusion.retrieval import Retrieval as RetrievalModel
from models.weights.albef import checkpoint_kind, start_from
from runtime.config.networks import fill_geometry
from scripts.weights.beside import square_processor, write_bert_tokenizer
from scripts.weights.graphs import ANY, largest_error, write_graph
from scripts.weights.own import write_own
from scripts.weights.source import Options, Source, Written

TASK = "zero-shot-image-classification"
PAIRS = ("pretrain", "retrieval")  # kinds of checkpoints with both contrastive towers


def to_safetensors(source: Source, options: Options, folder: Path) -> Written:
    return write_own(
        source, options, folder, "Retrieval.py --evaluate --checkpoint model.safetensors", TASK
    )


def to_onnx(source: Source, options: Options, folder: Path) -> Written:
    """Three graphs for any number of images and texts: normalised pixels float32 [B,3,S,S] -> image
    tokens [B,N+1,D] and unit features [B,E]; ids int64 and mask bool [B,L] -> text states [B,L,D]
    and unit features [B,E]; states, mask and tokens of R pairs -> ITM logit of "match", float32 [R].
    """
    model, tokenizer, config = open_retrieval(source, options)
    side = config.image_res
    ids, mask = tokenizer(["a dog on grass", "two cats"], config.max_tokens)
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))

    def match(text_states: Tensor, text_mask: Tensor, image_tokens: Tensor) -> Tensor:
        rows = torch.arange(text_states.shape[0])
        return model.match_scores(text_states, text_mask, image_tokens, rows)

    with torch.no_grad():
        tokens = model.encode_image(pixels)[0]
        states = model.encode_text(ids, mask)[0]
    outputs = ["image_tokens", "image_feature"]
    write_graph(
        model, model.encode_image, [pixels], [{0: ANY}], folder / "image.onnx", (["image"], outputs)
    )
    row, inputs = {0: ANY, 1: ANY}, ["text_ids", "text_mask"]
    names = inputs, ["text_states", "text_feature"]
    write_graph(model, model.encode_text, [ids, mask], [row, row], folder / "text.onnx", names)
    names = ["text_states", "text_mask", "image_tokens"], ["match"]
    pairs = [states, mask, tokens]
    write_graph(model, match, pairs, [row, row, {0: ANY}], folder / "match.onnx", names)
    largest_error(model.encode_image, folder / "image.onnx", [pixels[:1]])
    largest_error(
        model.encode_text, folder / "text.onnx", [*tokenizer(["snow"], config.max_tokens)]
    )
    rows = torch.tensor([0, 1, 0])
    others = torch.tensor([1, 1, 0])
    pairs = [states[rows], mask[rows], tokens[others]]
    largest_error(match, folder / "match.onnx", pairs)
    processor = square_processor(Pixels(side, "bicubic", *model.config.vit.pixels))
    write_json(folder / "preprocessor_config.json", processor, indent=2)
    write_bert_tokenizer(tokenizer, config.max_tokens, folder, separator=False)
    return Written("onnx", TASK, PAIR_EXAMPLE)


def open_retrieval(
    source: Source, options: Options
) -> tuple[RetrievalModel, Tokenizer, Retrieval.Config]:
    """The pair as Retrieval.py opens it. UserError for a checkpoint of another task."""
    kind = checkpoint_kind(source.weights)
    if kind not in PAIRS:
        raise UserError(
            f"{source.file}: a {kind} checkpoint has no pair of contrastive towers; use --to "
            "safetensors, or a checkpoint of Pretrain.py or Retrieval.py"
        )
    config = Retrieval.Config(checkpoint=source.file)
    config.text_encoder = options.tokenizer
    fill_geometry(config, source.weights)
    tokenizer = Tokenizer(config.text_encoder)
    model = Retrieval.build_model(config, tokenizer)
    start_from(model, source.weights, "retrieval")
    return model.eval(), tokenizer, config


# ---- dVAE
def tokenizer_to_safetensors(source: Source, options: Options, folder: Path) -> Written:
    return write_own(
        source, options, folder, "Pretrain.py --image-tokenizer .", "feature-extraction"
    )


def tokenizer_to_onnx(source: Source, options: Options, folder: Path) -> Written:
    """encoder.onnx: images float32 [B,3,H,W] in [0,1] -> codes int64 [B,H/r,W/r]; decoder.onnx: the
    way back."""
    model = ImageTokenizer.load(source.file, lambda path: dict(source.weights))
    side = 4 * model.reduction
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    sizes = [{0: ANY, 2: ANY, 3: ANY}]
    names = ["image"], ["codes"]

    def codes_of(image: Tensor) -> Tensor:
        return model.logits(image).argmax(dim=1)

    write_graph(model, codes_of, [images], sizes, folder / "encoder.onnx", names)
    largest_error(codes_of, folder / "encoder.onnx", [images.repeat(2, 1, 1, 2)])
    if model.decoder is not None:
        codes = model.codes(images)
        names = ["codes"], ["image"]
        sizes = [{0: ANY, 1: ANY, 2: ANY}]
        write_graph(model, model.decode, [codes], sizes, folder / "decoder.onnx", names)
        largest_error(model.decode, folder / "decoder.onnx", [codes.repeat(2, 1, 2)])
    return Written("onnx", "feature-extraction", TOKENIZER_EXAMPLE.replace("SIDE", str(side)))


PAIR_EXAMPLE = """
import onnxruntime
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer

names = ("image", "text", "match")
image, text, match = (onnxruntime.InferenceSession(f"{name}.onnx") for name in names)
processor = AutoImageProcessor.from_pretrained(".")
tokenizer = AutoTokenizer.from_pretrained(".")  # captions in lower case, without punctuation
pixels = processor(Image.new("RGB", (64, 48), "red"), return_tensors="np")["pixel_values"]
texts = tokenizer(["a red square"], return_tensors="np")
ids, mask = texts["input_ids"].astype("int64"), texts["attention_mask"].astype(bool)
tokens, feature = image.run(None, {"image": pixels})
states, caption = text.run(None, {"text_ids": ids, "text_mask": mask})
print("similarity", feature @ caption.T)
pair = {"text_states": states, "text_mask": mask, "image_tokens": tokens}
print("match", match.run(None, pair))
"""

TOKENIZER_EXAMPLE = """
import numpy
import onnxruntime

encoder = onnxruntime.InferenceSession("encoder.onnx")
image = numpy.zeros((1, 3, SIDE, SIDE), dtype="float32")  # values 0..1
print(encoder.run(["codes"], {"image": image})[0].shape)
"""
