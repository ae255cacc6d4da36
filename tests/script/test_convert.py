"""scripts/weights/convert.py: every family in every layout gives the features that the scripts
here give, through the other library."""

import json

import pytest
import torch

from models.dual_encoder.openai import OpenAICLIP
from models.layers.clip_towers import TextShape
from models.layers.openai_towers import OpenAIConfig
from models.weights import clip
from runtime.checkpoint import export_safetensors
from scripts.weights import convert
from scripts.weights.export_dual import open_dual_encoder
from scripts.weights.graphs import Graph
from scripts.weights.own import public
from scripts.weights.source import Options, open_source
from tests.helpers.exported import (
    CAPTIONS,
    SMALL,
    dual_run,
    embedded,
    photo,
    run_example,
    small_photo,
)

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
# Pillow's resize rounds one value of 300 otherwise than torchvision's, and random networks make of it
# up to 0.007 (torch 2.6); a crop one pixel aside makes 0.08
RESIZED = {"atol": 1e-2, "rtol": 0}
SIDE = 32
TEXT = TextShape(context_length=16, vocab_size=49408, width=64, heads=1, layers=2)
VIT = {"vision_width": 64, "vision_layers": 2, "patch_size": 8}
RESNET = {"vision_width": 8, "vision_layers": (1, 1, 1, 1), "patch_size": 0}


def run(source, to: str, folder, *more) -> None:
    words = [str(source), "--to", to, "--output", str(folder), *map(str, more)]
    assert convert.main(words) == 0


def openai_files(folder, shape: dict, vocabulary: int = 49408):
    """Weights of OpenAI's layout beside the configuration that open_clip keeps."""
    torch.manual_seed(0)
    text = TextShape(context_length=16, vocab_size=vocabulary, width=64, heads=1, layers=2)
    model = OpenAICLIP(OpenAIConfig(embed_dim=16, image_size=SIDE, text=text, **shape))
    folder.mkdir()
    export_safetensors(model.state_dict(), folder / "model.safetensors")
    look = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "interpolation": "bicubic"}
    about = {"model_cfg": clip.open_clip_config(model), "preprocess_cfg": look}
    (folder / "open_clip_config.json").write_text(json.dumps(about))
    return folder


def ours(source, image, **options):
    return embedded(open_dual_encoder(open_source(source), Options(**options)), image)


def compare(found, expected, **tolerance) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


# ------------------------------------------------------------------------------------ dual encoders
def by_open_clip(folder, image):
    import open_clip

    name = f"local-dir:{folder}"
    model, transform = open_clip.create_model_from_pretrained(name)
    tokenizer = open_clip.get_tokenizer(name)
    with torch.no_grad():
        text = model.eval().encode_text(tokenizer(CAPTIONS))
        return model.encode_image(transform(image)[None]), text


def by_transformers(folder, image):
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(folder).eval()
    images = AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = tokenizer(CAPTIONS, padding=True, return_tensors="pt")
    with torch.no_grad():
        found = model.get_image_features(**images), model.get_text_features(**texts)
    return tuple(getattr(one, "pooler_output", one) for one in found)  # a tensor before version 5


def by_onnx(folder, image):
    from transformers import AutoImageProcessor, AutoTokenizer

    processor = AutoImageProcessor.from_pretrained(folder)
    texts = AutoTokenizer.from_pretrained(folder)(CAPTIONS, padding=True, return_tensors="pt")
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    ids = texts["input_ids"]
    return Graph(folder / "image.onnx")(pixels)[0], Graph(folder / "text.onnx")(ids)[0]


LIBRARIES = {"open_clip": by_open_clip, "hf": by_transformers, "onnx": by_onnx}


@pytest.mark.parametrize(
    ("kind", "to"),
    [
        ("vit", "open_clip"),
        pytest.param("vit", "hf", marks=pytest.mark.slow),
        pytest.param("vit", "onnx", marks=pytest.mark.slow),
        pytest.param("resnet", "open_clip", marks=pytest.mark.slow),
        pytest.param("resnet", "onnx", marks=pytest.mark.slow),
        pytest.param("rocket", "open_clip", marks=pytest.mark.slow),
        pytest.param("rocket", "onnx", marks=pytest.mark.slow),
        pytest.param("siglip", "open_clip", marks=pytest.mark.slow),
        pytest.param("vits32", "open_clip", marks=pytest.mark.slow),
        pytest.param("slip", "open_clip", marks=pytest.mark.slow),
        pytest.param("slip", "onnx", marks=pytest.mark.slow),
    ],
)
def test_dual_encoders(kind, to, tmp_path, monkeypatch):
    models = {"rocket": "CL2L_RT_CL2L", "siglip": "CLIP_RT_SIGLIP", "vits32": "CLIP_VITS32_CLIP"}
    models["slip"] = "CLIP_VITT8" if to == "onnx" else "CLIP_VITB16"  # timm's names, in open_clip
    side = 224 if to == "open_clip" and kind in ("vits32", "slip") else SIDE
    if kind in models:
        source = dual_run(tmp_path / "run", models[kind], image_size=side)
    else:
        source = openai_files(tmp_path / "files", VIT if kind == "vit" else RESNET)
    written = convert.convert(source, to, tmp_path / "out", Options())[1]
    image = small_photo(side)
    compare(LIBRARIES[to](tmp_path / "out", image), ours(source, image), **CLOSE)
    compare(LIBRARIES[to](tmp_path / "out", photo()), ours(source, photo()), **RESIZED)
    assert run_example(tmp_path / "out", written.example, monkeypatch)


@pytest.mark.slow
def test_local_embeddings_are_a_second_output(tmp_path):
    source = dual_run(tmp_path / "run", "CL2L_RT_CL2L", separate_proj=True, cl2l_hidden_dim=16)
    run(source, "onnx", tmp_path / "out")
    graph = Graph(tmp_path / "out/image.onnx")
    assert [entry.name for entry in graph.session.get_outputs()] == ["z", "h"]


@pytest.mark.parametrize("to", ["open_clip", pytest.param("hf", marks=pytest.mark.slow)])
def test_a_vocabulary_of_ones_own(to, digitscenes, tmp_path):
    """The tokenizer lies in the folder, and open_clip takes it."""
    from dataset.text.bpe import ClipTokenizer

    merges = digitscenes / "bpe/bpe_merges.txt.gz"
    size = ClipTokenizer(merges).vocab_size
    source = openai_files(tmp_path / "files", VIT, size)
    run(source, to, tmp_path / "out", "--bpe-path", merges)
    image = small_photo(SIDE)
    found = LIBRARIES[to](tmp_path / "out", image)
    compare(found, ours(source, image, bpe_path=merges), **CLOSE)


@pytest.mark.slow
def test_as_many_merges_as_clips_are_not_clips(tmp_path):
    """open_clip's own tokenizer would make other ids of the same texts."""
    from dataset.text.bpe import ClipTokenizer

    merges = ClipTokenizer().merges
    last = next(pair for pair in merges if "".join(pair) == "beneath</w>")
    lines = [" ".join(pair) for pair in merges if pair != last]
    lines = ["#version: 0.2", *lines, " ".join(last)]
    (tmp_path / "mine.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    source = openai_files(tmp_path / "files", VIT)
    run(source, "open_clip", tmp_path / "out", "--bpe-path", tmp_path / "mine.txt")
    image = small_photo(SIDE)
    expected = ours(source, image, bpe_path=tmp_path / "mine.txt")
    assert not expected[1].equal(ours(source, image)[1])
    compare(by_open_clip(tmp_path / "out", image), expected, **CLOSE)


def test_a_pushed_model_of_open_clip_names_its_own_tokenizer(tmp_path):
    """By `hf-hub:` open_clip looks where the name says, not beside the weights."""
    from types import SimpleNamespace

    from models.weights.libraries import open_library
    from scripts.weights.export_library import library_to_open_clip
    from tests.helpers.tiny_open_clip import open_clip_siglip

    name = f"open_clip/local-dir:{open_clip_siglip(tmp_path / 'siglip')}"
    opened = open_library(name, random_weights=True)
    ours_around = SimpleNamespace(func=SimpleNamespace(backend=opened.tokenize))
    library_to_open_clip(opened._replace(tokenize=ours_around), tmp_path, "me/siglip")
    about = json.loads((tmp_path / "open_clip_config.json").read_text())
    assert about["model_cfg"]["text_cfg"]["hf_tokenizer_name"] == "me/siglip"


@pytest.mark.slow
def test_what_is_written_can_be_evaluated_here(tmp_path):
    """safetensors, open_clip and transformers folders are checkpoints of eval_zeroshot.py."""
    source, image = openai_files(tmp_path / "files", VIT), small_photo(SIDE)
    expected = ours(source, image)
    for to, name in (("safetensors", "model"), ("open_clip", "open_clip_model"), ("hf", "model")):
        run(source, to, tmp_path / to)
        compare(ours(tmp_path / to / f"{name}.safetensors", image), expected, **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("to", ["onnx", "hf"])
def test_align(to, digitscenes, tmp_path, monkeypatch):
    tokenizer = str(digitscenes / "tokenizer")
    from dataset.text.align import AlignTokenizer

    size = AlignTokenizer(tokenizer).vocab_size
    model, width = ("ALIGN_B7_TINY", 640) if to == "hf" else ("ALIGN_NANO_TINY", 16)
    source = dual_run(tmp_path / "run", model, tokenizer, vocab_size=size, embed_dim=width)
    written = convert.convert(source, to, tmp_path / "out", Options())[1]
    assert run_example(tmp_path / "out", written.example, monkeypatch)
    image = small_photo(8)  # enlarged: nothing to antialias
    found, expected = LIBRARIES[to](tmp_path / "out", image), ours(source, image)
    torch.testing.assert_close(found[1], expected[1], **CLOSE)
    torch.testing.assert_close(
        found[0] / found[0].norm(), expected[0] / expected[0].norm(), atol=2e-3, rtol=0
    )


@pytest.mark.parametrize(
    ("model", "tower"),
    [
        ("CLIP_RT_SIGLIP", "timm/test_resnet"),
        pytest.param("CLIP_RT_CLIP", "timm/test_vit", marks=pytest.mark.slow),
        pytest.param("CLIP_VITB16_CLIP", "timm/test_vit2", marks=pytest.mark.slow),
    ],
)
def test_image_towers_of_timm_are_open_clips_own(model, tower, tmp_path):
    """They were exported as the network's own tower, under names that open_clip does not have."""
    source = dual_run(tmp_path / "run", model, image_tower=tower, image_size=160)
    run(source, "open_clip", tmp_path / "out")
    image = small_photo(160)
    compare(by_open_clip(tmp_path / "out", image), ours(source, image), **CLOSE)


def test_a_graph_says_nothing_of_the_machine(tmp_path):
    """torch notes for each node the lines of code, with their paths, that it comes from."""
    from scripts.weights.graphs import ANY, write_graph

    layer = torch.nn.Linear(3, 2)
    file, names = tmp_path / "a.onnx", (["x"], ["y"])
    write_graph(layer, layer.forward, [torch.zeros(2, 3)], [{0: ANY}], file, names)
    assert b".py" not in file.read_bytes()
    x = torch.randn(5, 3)
    compare(Graph(file)(x), [layer(x).detach()], **CLOSE)


def rocket_file(folder, model: str):
    """What clip-rocket saves."""
    from models.dual_encoder.config import DualConfig
    from models.dual_encoder.factory import build_dual

    sizes = SMALL | {"text_width": 512, "text_heads": 8}
    torch.manual_seed(0)
    network = build_dual(DualConfig(model=model, **sizes))
    folder.mkdir()
    content = {"state_dict": network.state_dict(), "args": {"model": model, **sizes}}
    torch.save(content, folder / "checkpoint.pt")
    return folder / "checkpoint.pt"


@pytest.mark.parametrize(
    "kind",
    ["hf", *(pytest.param(f"CLIP_VITT8{head}", marks=pytest.mark.slow) for head in ("", "_CLIP"))],
)
def test_weights_of_others_can_be_opened_after_their_export(kind, tmp_path):
    """What described their network lies beside them again: config.json, or the section of a run."""
    if kind == "hf":
        source = tmp_path / "hf/model.safetensors"
        run(openai_files(tmp_path / "files", VIT), "hf", tmp_path / "hf")
    else:
        source = rocket_file(tmp_path / "files", kind)
    run(source, "safetensors", tmp_path / "out")
    image = small_photo(SIDE)
    compare(ours(tmp_path / "out", image), ours(source, image), rtol=0, atol=0)


def test_a_run_is_exported_with_its_tokenizer_and_without_the_paths_of_the_machine(
    digitscenes, tmp_path, monkeypatch
):
    import shutil

    from dataset.text.bpe import ClipTokenizer
    from runtime.config.yaml import read_yaml

    merges = shutil.copy(digitscenes / "bpe/bpe_merges.txt.gz", tmp_path / "mine.txt.gz")
    size = ClipTokenizer(merges).vocab_size
    source = dual_run(tmp_path / "run", "CLIP_VITT8_CLIP", vocab_size=size)
    more = f"bpe_path: {merges}\nmetadata: {tmp_path}/list.json\noutput_dir: {tmp_path}/run\n"
    with (source / "config.yaml").open("a") as file:
        file.write("\n" + more)
    image = small_photo(SIDE)
    expected = ours(source, image)
    run(source, "safetensors", tmp_path / "out")
    (tmp_path / "mine.txt.gz").unlink()
    moved = shutil.move(tmp_path / "out", tmp_path / "elsewhere")
    (tmp_path / "bpe_path.txt.gz").write_text("another's")
    monkeypatch.chdir(tmp_path)
    compare(ours(moved, image), expected, rtol=0, atol=0)
    assert read_yaml(moved / "config.yaml")[0]["metadata"] == "list.json"
    texts = [file for file in moved.iterdir() if file.suffix in (".yaml", ".md", ".json")]
    assert not any(str(tmp_path) in file.read_text() for file in texts)
    before = read_yaml(source / "config.yaml")[0]
    run(source, "safetensors", source)
    assert read_yaml(source / "config.yaml")[0] == before  # the run's own keeps its paths
    run(moved, "safetensors", moved)
    assert read_yaml(moved / "config.yaml")[0]["bpe_path"].endswith("bpe_path.txt.gz")
    compare(ours(moved, image), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("/home/me/a b/list.json", "list.json"),
        ("~/list.json", "list.json"),
        ("imagefolder:/home/me/my photos", "imagefolder:my photos"),
        ("hf//home/me/bert", "hf//home/me/bert"),
        ("pipe:cat /home/me/{00..10}.tar", "pipe:cat {00..10}.tar"),
        ("file:///home/me/a b.tar", "a b.tar"),
        ("/home/me/a.tar::/home/me/b.tar", "b.tar"),
        ("shards?labels=/home/me/l.json", "shards?labels=l.json"),
        ("https://me:hf_x@hub.co/a.tar", "https://hub.co/a.tar"),
        ("s3://bucket/a.tar?X-Amz-Signature=9f", "s3://bucket/a.tar"),
        ("configs/data/coco.json", "configs/data/coco.json"),
        ("ViT-B/32", "ViT-B/32"),
        ({"/home/me/a.json": ["../b/c.csv", 3]}, {"a.json": ["c.csv", 3]}),
    ],
)
def test_what_is_shown_of_paths_and_addresses(value, shown):
    assert public(value) == shown


# ----------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("model", "to", "message"),
    [
        ("CLIP_VITT8_CLIP", "open_clip", "timm has no VITT8"),
        ("CLIP_VITS32_CLIP", "open_clip", "for 224 pixels, and this model is for 32"),
        ("CLIP_RT_CLIP", "hf", "CLIPModel is OpenAI's ViT alone"),
        ("CLIP_RT_CLIP", "timm", "use --to safetensors or open_clip or hf or onnx"),
        ("ALIGN_NANO_TINY", "hf", "of ALIGN's models only B7"),
        ("ALIGN_NANO_TINY", "open_clip", "is ALIGN, for which open_clip has no layout"),
    ],
)
def test_layouts_that_do_not_fit(model, to, message, digitscenes, tmp_path, capsys):
    from dataset.text.align import AlignTokenizer

    tokenizer, changes = None, {}
    if model.startswith("ALIGN"):
        tokenizer = str(digitscenes / "tokenizer")
        changes["vocab_size"] = AlignTokenizer(tokenizer).vocab_size
    source = dual_run(tmp_path / "run", model, tokenizer, **changes)
    assert convert.main([str(source), "--to", to, "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


def test_statistics_that_are_no_numbers_are_refused(tmp_path, capsys):
    words = [str(tmp_path / "a.pt"), "--to", "hf", "--output", str(tmp_path / "out")]
    for name, value in (("--std", "0"), ("--mean", "nan")):
        assert convert.main([*words, name, "0.5", "0.5", value]) == 2
        assert f"{name}: give finite numbers" in capsys.readouterr().err
