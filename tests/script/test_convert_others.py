"""scripts/weights/convert.py: vision transformers, SIMLA's retrieval pair, NXTP and the image
tokenizer through other libraries."""

import math
import shutil
from types import SimpleNamespace

import pytest
import torch

from base.pixels import HALF, Pixels
from base.reading import read_json
from base.writing import write_json
from dataset.images.clip import normalize, pixel_statistics
from dataset.text.wordpiece import Tokenizer
from models.classification.classifier import ClassifierConfig, VisionClassifier
from models.fusion.retrieval import Retrieval, RetrievalConfig
from runtime.checkpoint import export_safetensors
from scripts.weights import convert, export_fusion, export_nxtp
from scripts.weights.export_vit import timm_config
from scripts.weights.graphs import Graph
from scripts.weights.own import copy_tokenizer
from scripts.weights.source import Options, open_source
from tests.helpers import tiny_nxtp
from tests.helpers.exported import as_tensor, photo, run_example, save_run, small_photo
from tests.helpers.tiny_simla import tiny_config

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
SIDE = 32


def run(source, to: str, folder, *more) -> None:
    words = [str(source), "--to", to, "--output", str(folder), *map(str, more)]
    assert convert.main(words) == 0


# ----------------------------------------------------------------------------- vision transformers
def vit_run(folder, **changes):
    """A run of Classification.py with random weights."""
    torch.manual_seed(0)
    network = {"model": "vit-mu/8", "image_size": SIDE, "num_classes": 5} | changes
    model = VisionClassifier(ClassifierConfig(**network))
    torch.nn.init.normal_(model.head.weight)
    return save_run(
        folder, model, {"network": network, "views": {"resize_small": None}}
    ), model.eval()


def by_timm(folder, image):
    import timm

    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.no_grad():
        return model(transform(image)[None])


def by_transformers(folder, image):
    from transformers import AutoImageProcessor, ViTForImageClassification

    model = ViTForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(
            **AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt")
        ).logits


def by_onnx(folder, image):
    from transformers import AutoImageProcessor

    pixels = AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt")["pixel_values"]
    return Graph(folder / "model.onnx")(pixels)[0]


@pytest.mark.parametrize("to", ["timm", "hf", pytest.param("onnx", marks=pytest.mark.slow)])
def test_vision_transformers(to, tmp_path, monkeypatch):
    source, model = vit_run(tmp_path / "run")
    written = convert.convert(source, to, tmp_path / "out", Options())[1]
    assert run_example(tmp_path / "out", written.example, monkeypatch)
    image = small_photo(SIDE)
    half = pixel_statistics(torch.device("cpu"), [0.5] * 3, [0.5] * 3)
    with torch.no_grad():
        expected = model.logits(normalize(as_tensor(image)[None], half))
    found = {"timm": by_timm, "hf": by_transformers, "onnx": by_onnx}[to](tmp_path / "out", image)
    torch.testing.assert_close(found, expected, **CLOSE)


def test_timm_resizes_to_the_side_that_was_meant():
    """48 / (48 / 59) is less than 59, and timm cuts the fraction."""
    options = ClassifierConfig(model="vit-mu/8", image_size=48)
    pixels = Pixels(48, "bicubic", *HALF)
    encoder = SimpleNamespace(network=SimpleNamespace(options=options), pixels=pixels)
    written = timm_config(encoder, 59)["pretrained_cfg"]["crop_pct"]
    assert math.floor(48 / written) == 59 > math.floor(48 / (48 / 59))


@pytest.mark.parametrize(
    ("changes", "to", "message"),
    [
        ({"representation_size": 16}, "timm", "no pre-logits layer"),
        ({"stem": [8]}, "timm", "no convolutional stem"),
        ({"stem": [8]}, "hf", "no convolutional stem"),
        ({"layer_norm_eps": 1e-12}, "timm", "layer_norm_eps 1e-06"),
        ({}, "open_clip", "use --to safetensors or timm or hf or onnx"),
    ],
)
def test_vision_transformers_that_do_not_fit(changes, to, message, tmp_path, capsys):
    source, _ = vit_run(tmp_path / "run", **changes)
    assert convert.main([str(source), "--to", to, "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


# ----------------------------------------------------------------------------------- retrieval pair
@pytest.mark.slow
@pytest.mark.parametrize("albef", [False, True])
def test_retrieval_pair(albef, digitscenes, tmp_path, monkeypatch):
    import json
    from dataclasses import asdict

    tokenizer = Tokenizer(digitscenes / "tokenizer")
    shape = tiny_config(albef=albef)
    shape.bert.vocab_size = tokenizer.vocab_size
    torch.manual_seed(0)
    model = Retrieval(RetrievalConfig(shape.vit, shape.bert, embed_dim=16, queue_size=6)).eval()
    (tmp_path / "bert.json").write_text(json.dumps(asdict(shape.bert)))
    config = {
        "image_res": SIDE,
        "patch_size": 8,
        "vision_width": 24,
        "vision_depth": 2,
        "vision_heads": 4,
        "bert_config": str(tmp_path / "bert.json"),
        "embed_dim": 16,
        "queue_size": 6,
        "text_encoder": str(digitscenes / "tokenizer"),
    }
    source = save_run(tmp_path / "run", model, config)
    written = convert.convert(source, "onnx", tmp_path / "out", Options())[1]
    assert "match" in run_example(tmp_path / "out", written.example, monkeypatch)
    from transformers import AutoImageProcessor, AutoTokenizer

    caption = "two digits"
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")(caption, return_tensors="pt")
    ids, mask = tokenizer([caption], lengths=None)
    assert theirs["input_ids"].equal(ids) and theirs["attention_mask"].bool().equal(mask)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    pixels = processor(small_photo(SIDE), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        tokens, image = model.encode_image(pixels)
        states, text = model.encode_text(ids, mask)
        match = model.match_scores(states, mask, tokens, torch.tensor([0]))
    found = Graph(tmp_path / "out/image.onnx")(pixels)
    torch.testing.assert_close(found[1], image, **CLOSE)
    words = Graph(tmp_path / "out/text.onnx")(ids, mask)
    torch.testing.assert_close(words[1], text, **CLOSE)
    scored = Graph(tmp_path / "out/match.onnx")(words[0], mask, found[0])[0]
    torch.testing.assert_close(scored, match, **CLOSE)


def test_other_tasks_have_no_pair(tmp_path, capsys):
    weights = {"text_encoder.embeddings.word_embeddings.weight": torch.zeros(2, 2)}
    weights |= {"text_decoder.x": torch.zeros(1), "visual_encoder.cls_token": torch.zeros(1)}
    export_safetensors(weights, tmp_path / "vqa.safetensors")
    words = [str(tmp_path / "vqa.safetensors"), "--output", str(tmp_path / "out"), "--to"]
    assert convert.main([*words, "onnx"]) == 2
    assert "a vqa checkpoint has no pair" in capsys.readouterr().err
    assert convert.main([*words, "hf"]) == 2
    assert "is SIMLA or ALBEF, for which hf has no layout" in capsys.readouterr().err
    assert convert.main([*words, "safetensors"]) == 0


# ---------------------------------------------------------------------------------------------- NXTP
def nxtp_run(folder):
    tokenizer = tiny_nxtp.tokenizer(folder)
    model = tiny_nxtp.network(tokenizer.vocab_size)
    network = {"decoder_heads": 4, "norm_eps": 1e-5, "rope_theta": 10000.0}
    config = {"network": network, "tokenizer": str(folder), "whole_image": True}
    return save_run(folder / "run", model, config), model, tokenizer


def test_nxtp_in_transformers(tmp_path, monkeypatch):
    """The same logits of image and text through LlamaForCausalLM behind CLIPVisionModel."""
    import torch.nn.functional as F
    from safetensors.torch import load_file
    from transformers import AutoImageProcessor, CLIPVisionModel, LlamaForCausalLM

    from models.recognition.nxtp import text_mask

    source, model, tokenizer = nxtp_run(tmp_path)
    written = convert.convert(source, "hf", tmp_path / "out", Options())[1]
    assert "torch.Size" in run_example(tmp_path / "out", written.example, monkeypatch)
    vision = CLIPVisionModel.from_pretrained(tmp_path / "out/vision").eval()
    decoder = LlamaForCausalLM.from_pretrained(tmp_path / "out/decoder").eval()
    joint = load_file(tmp_path / "out/projection.safetensors")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out/vision")
    pixels = processor(photo(), return_tensors="pt")["pixel_values"]
    ids = torch.tensor([[tokenizer.image, tokenizer.bos, *tokenizer.encode("dog, cat")]])
    segments = torch.zeros_like(ids)
    with torch.no_grad():
        tokens = vision(pixels).last_hidden_state[:, 1:]
        tokens = F.layer_norm(
            tokens, tokens.shape[-1:], joint["ln_post.weight"], joint["ln_post.bias"]
        )
        images = tokens @ joint["proj.weight"].T
        torch.testing.assert_close(images, model.encode_image(pixels), **CLOSE)
        expected = model.logits(model.states(images, ids, segments))
        n = images.shape[1]
        sees = torch.zeros(1, 1, n + ids.shape[1], n + ids.shape[1], dtype=torch.bool)
        sees[:, :, :n, :n] = True  # image tokens see one another
        sees[:, :, n:] = text_mask(segments, n)
        bias = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)
        x = torch.cat([images, decoder.get_input_embeddings()(ids)], 1)
        found = decoder(inputs_embeds=x, attention_mask=bias).logits[:, n:]
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("task", ["vqa", pytest.param("retrieval", marks=pytest.mark.slow)])
def test_a_fusion_network_is_exported_with_vocabulary_geometry_and_answers(
    task, digitscenes, tmp_path
):
    from base.distributed import ALONE
    from scripts.demo import Config, open_all
    from tests.helpers import demo_checkpoints

    data = tmp_path / "data"
    shutil.copytree(digitscenes / "tokenizer", data / "tokenizer")
    shutil.copy(digitscenes / "answer_list.json", data)
    file = demo_checkpoints.fusion(task, data, tmp_path / "checkpoint.pt")
    image = as_tensor(small_photo(SIDE))

    def of(checkpoint):
        found = open_all(Config(checkpoint=[checkpoint], device="cpu"), ALONE)
        if task == "vqa":
            return found.answers, found.answer(image, "what digit is red", found.answers)
        return found.embedder.texts(["a red digit"]).tolist(), found.match(image, ["a red digit"])

    expected = of(file)
    run(file, "safetensors", tmp_path / "out")
    shutil.rmtree(data)
    assert of(tmp_path / "out") == expected


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_the_program_of_the_card_opens_the_decoder_that_it_is(kind, tmp_path, monkeypatch):
    """As LlamaForCausalLM, Qwen's would lose their biases, or the norms of their heads."""
    from models.layers.llama import Llama, LlamaConfig
    from models.weights import llama

    more = {"qwen2": {"qkv_bias": True}, "qwen3": {"qk_norm": True}}.get(kind, {})
    geometry = LlamaConfig(dim=32, n_layers=1, n_heads=4, vocab_size=40, multiple_of=16, **more)
    weights = llama.to_hugging_face(Llama(geometry).state_dict(), geometry)
    export_safetensors(weights, tmp_path / "decoder/model.safetensors")
    values = llama.hugging_face_values(geometry)
    write_json(tmp_path / "decoder/config.json", values)
    lines = export_nxtp.HUGGING_FACE_EXAMPLE.splitlines()
    lines = [line for line in lines if "import" in line or line.startswith("decoder =")]
    printed = run_example(
        tmp_path, "\n".join([*lines, "print(type(decoder).__name__)"]), monkeypatch
    )
    assert printed.split() == [f"{kind.capitalize()}ForCausalLM"]


def test_nxtp_is_exported_with_its_tokenizer(tmp_path):
    (tmp_path / "here").mkdir()
    source, model, tokenizer = nxtp_run(tmp_path / "here")
    run(source, "safetensors", tmp_path / "out")
    shutil.rmtree(tmp_path / "here")
    found = export_nxtp.open_nxtp(open_source(tmp_path / "out"), Options())
    assert found[1].encode("dog, cat") == tokenizer.encode("dog, cat")
    pixels = torch.randn(1, 3, SIDE, SIDE)
    with torch.no_grad():
        assert found[0].encode_image(pixels).equal(model.encode_image(pixels))


@pytest.mark.parametrize("source", ["file", "folder"])
def test_a_tokenizer_is_copied_with_what_it_reads_beside_itself(source, tmp_path):
    """Of Qwen's the end of a text stands in tokenizer_config.json alone."""
    for name in ("tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        (tmp_path / name).write_text(name)
    (tmp_path / "out").mkdir()
    copy_tokenizer(tmp_path / "tokenizer.json" if source == "file" else tmp_path, tmp_path / "out")
    names = ["tokenizer.json", "tokenizer_config.json"]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == names


def test_the_images_of_a_tower_are_exported_as_it_takes_them(digitscenes, tmp_path, monkeypatch):
    """timm's towers have other pixels than CLIP's."""
    shape = tiny_config()
    shape.vit.pixels = ((0.5, 0.4, 0.3), (0.2, 0.1, 0.6))
    tokenizer = Tokenizer(digitscenes / "tokenizer")
    shape.bert.vocab_size = tokenizer.vocab_size
    model = Retrieval(RetrievalConfig(shape.vit, shape.bert, embed_dim=16, queue_size=6)).eval()
    config = SimpleNamespace(image_res=SIDE, max_tokens=9)
    monkeypatch.setattr(export_fusion, "open_retrieval", lambda *_: (model, tokenizer, config))
    for name in ("write_graph", "largest_error"):
        monkeypatch.setattr(export_fusion, name, lambda *_: None)
    export_fusion.to_onnx(None, Options(), tmp_path)
    written = read_json(tmp_path / "preprocessor_config.json", dict)
    assert (written["image_mean"], written["image_std"]) == ([0.5, 0.4, 0.3], [0.2, 0.1, 0.6])


@pytest.mark.slow
def test_nxtp_to_onnx(tmp_path, monkeypatch):
    source, model, _ = nxtp_run(tmp_path)
    written = convert.convert(source, "onnx", tmp_path / "out", Options())[1]
    assert "first token" in run_example(tmp_path / "out", written.example, monkeypatch)
    pixels = torch.randn(1, 3, SIDE, SIDE)
    with torch.no_grad():
        expected = model.encode_image(pixels)
    found = Graph(tmp_path / "out/image.onnx")(pixels)[0]
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.slow
def test_image_tokenizers(image_tokenizer, tmp_path, monkeypatch):
    from models.fusion.dvae import ImageTokenizer
    from runtime.checkpoint import read_weights

    written = convert.convert(image_tokenizer, "onnx", tmp_path / "out", Options())[1]
    assert "(1, " in run_example(tmp_path / "out", written.example, monkeypatch)
    model = ImageTokenizer.load(image_tokenizer, read_weights)
    images = torch.rand(3, 3, 24, 16)
    found = Graph(tmp_path / "out/encoder.onnx")(images)[0]
    assert found.equal(model.codes(images))
    back = Graph(tmp_path / "out/decoder.onnx")(found)[0]
    torch.testing.assert_close(back, model.decode(found), **CLOSE)
