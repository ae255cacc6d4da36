"""scripts/demo.py opens checkpoints of every kind, and what they can do agrees with the networks."""

import json
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from PIL import Image

import Retrieval
import VE
from base import distributed
from base.distributed import ALONE
from base.errors import UserError
from dataset.images.albef import TestTransform
from dataset.images.decode import decode_image
from dataset.text.wordpiece import Tokenizer
from evaluation.demo import tasks
from models.weights.albef import start_from
from runtime.checkpoint import read_weights
from runtime.config.cli import parse
from scripts import demo as script
from scripts.demo_checkpoints.any_checkpoint import open_abilities
from tests.helpers.demo_checkpoints import SIZES, align, dual, fusion, nxtp
from tests.helpers.tiny_open_clip import tiny_open_clip


@pytest.fixture(scope="module")
def image(digitscenes):
    return decode_image(next((digitscenes / "images/test2017").iterdir()))


def opened(*words):
    """What scripts/demo.py makes of a command line."""
    config = parse(script.Config, [*map(str, words), "--device", "cpu"])
    sources = config.checkpoint or [None]
    return open_abilities(sources[0], config, distributed.init("cpu"))


def test_simla_searches_classifies_and_grounds(digitscenes, image, tmp_path):
    file = fusion("retrieval", digitscenes, tmp_path / "simla.pt")
    found = opened("--checkpoint", file)
    assert found.texts and found.match and found.word_maps
    assert not (found.answer or found.entail or found.recognise)
    config = Retrieval.Config(**SIZES, text_encoder=str(digitscenes / "tokenizer"))
    tokenizer = Tokenizer(config.text_encoder)
    model = Retrieval.build_model(config, tokenizer).eval()
    start_from(model, read_weights(file), "retrieval")
    sentences = ["A red nine, and a blue five!", "nothing"]
    ids, mask = tokenizer(["a red nine and a blue five", "nothing"])
    with torch.no_grad():
        tokens, feature = model.encode_image(TestTransform(32)(image)[None])
        _, text = model.encode_text(ids, mask)
        rows = torch.zeros(2, dtype=torch.int64)
        matching = model.match_scores(ids, mask, tokens, rows)
        for parameter in model.itm_head.parameters():
            parameter.copy_(parameter.flip(0))
        other = model.match_scores(ids, mask, tokens, rows)
    embedder = found.embedder
    torch.testing.assert_close(embedder.images(embedder.view(image)[None]), feature)
    torch.testing.assert_close(embedder.texts(sentences), text)
    assert embedder.scale == pytest.approx(1 / 0.07, rel=1e-4)
    expected = (matching - other).sigmoid().tolist()
    assert found.match(image, sentences) == pytest.approx(expected, rel=1e-4)
    maps = found.word_maps(image, "a red nine")
    assert [word for word, _ in maps] == ["a", "red", "nine"]
    assert all(heat.shape == (2, 2) and heat.min() >= 0 and heat.max() <= 1 for _, heat in maps)
    with pytest.raises(UserError, match="no word is left"):
        embedder.texts(["!?"])


def test_vqa_answers_from_its_list_or_the_users(digitscenes, image, tmp_path):
    file = fusion("vqa", digitscenes, tmp_path / "vqa.pt")
    found = opened("--checkpoint", file)
    assert found.answer and not found.embedder
    assert found.answers == json.loads((digitscenes / "answer_list.json").read_text())
    scored = tasks.answer(found, image, "What color is the nine?", [])
    assert len(scored) == 10 and scored[0].chance == 1 / len(found.answers)
    found_order = [each.probability for each in scored]
    assert found_order == sorted(found_order, reverse=True)
    own = tasks.answer(found, image, "what color", ["red", "blue"])
    assert {each.name for each in own} == {"red", "blue"}
    assert sum(each.probability for each in own) == pytest.approx(1)


def test_ve_judges_sentences(digitscenes, image, tmp_path):
    file = fusion("ve", digitscenes, tmp_path / "ve.pt")
    scored = tasks.entail(opened("--checkpoint", file), image, "There is a nine.")
    config = VE.Config(**SIZES, text_encoder=str(digitscenes / "tokenizer"))
    tokenizer = Tokenizer(config.text_encoder)
    model = VE.build_model(config, tokenizer).eval()
    start_from(model, read_weights(file), "ve")
    with torch.no_grad():
        logits = model.logits(TestTransform(32)(image)[None], *tokenizer(["there is a nine"]))
    classes = ("contradiction", "neutral", "entailment")
    expected = dict(zip(classes, logits.softmax(-1)[0].tolist(), strict=True))
    assert {each.name: each.probability for each in scored} == pytest.approx(expected, rel=1e-4)
    assert scored[0].probability == max(expected.values()) and scored[0].chance == 1 / 3


def test_nxtp_recognises(digitscenes, image, tmp_path):
    found = opened("--checkpoint", nxtp(digitscenes, tmp_path / "nxtp.pt"))
    assert found.recognise and not found.embedder
    labels = found.recognise(image)
    assert labels and all(0 <= probability <= 1 for _, probability in labels)
    seen, heats = found.attention(image, [text for text, _ in labels[:2]])
    assert seen.shape == (3, 32, 32) and seen.dtype == torch.uint8
    assert all(heat.shape == (4, 4) and heat.min() >= 0 and heat.max() <= 1 for heat in heats)


@pytest.mark.parametrize("name", ["CLIP_VITT8_CLIP", "CL2L_VITT8_CL2L"])
def test_clip_family_searches_and_classifies(image, tmp_path, name):
    found = opened("--checkpoint", dual(tmp_path, name))
    assert found.texts and found.embedder.template == "a photo of a {}."
    assert found.embedder.scale == pytest.approx(1 / 0.07, rel=0.01)
    scored = tasks.classify(found.embedder, image, ["cat", "dog", "car"], "a photo of a {}.")
    assert sum(each.probability for each in scored) == pytest.approx(1)
    assert found.match is None and found.word_maps is None


def test_align_searches_and_classifies(digitscenes, image, tmp_path):
    found = opened("--checkpoint", align(digitscenes, tmp_path))
    temperature = read_weights(tmp_path / "model.safetensors")["temperature"].item()
    assert found.embedder.scale == pytest.approx(1 / temperature)
    scored = tasks.classify(found.embedder, image, ["nine", "five"], "a {}")
    query = found.embedder.images(found.embedder.view(image)[None])[0]
    cosines = found.embedder.texts(["a nine", "a five"]) @ query
    expected = dict(zip(["nine", "five"], (cosines / temperature).softmax(0).tolist(), strict=True))
    assert {each.name: each.probability for each in scored} == pytest.approx(expected, rel=1e-4)


def test_library_models_search_and_classify(image, tmp_path):
    name = f"open_clip/local-dir:{tiny_open_clip(tmp_path / 'model')}"
    found = opened("--model", name)
    assert found.texts and found.title == name
    assert len(tasks.classify(found.embedder, image, ["cat", "dog"], "{}")) == 2


def test_image_encoder_of_a_library_searches_by_image_alone():
    found = opened("--model", "timm/vit_tiny_patch16_224", "--random-weights")
    assert found.embedder and found.embedder.texts is None
    assert found.title == "timm/vit_tiny_patch16_224 (random weights)"
    assert found.embedder.images(torch.zeros(1, 3, 224, 224)).norm().item() == pytest.approx(1)


def test_mistakes_are_named_before_anything_is_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr(script, "find_spec", lambda name: None)
    config = script.Config(checkpoint=[tmp_path])
    with pytest.raises(UserError, match='needs Gradio: pip install "gradio>=6,<7"'):
        script.check(config)
    monkeypatch.setattr(script, "find_spec", lambda name: True)
    with pytest.raises(UserError, match="give --checkpoint"):
        script.check(script.Config())
    script.check(script.Config(model="open_clip/ViT-B-32"))
    with pytest.raises(UserError, match="no such folder"):
        script.check(script.Config(checkpoint=[tmp_path], images=tmp_path / "nowhere"))
    with pytest.raises(UserError, match="one checkpoint at most"):
        script.check(script.Config(checkpoint=[tmp_path, tmp_path], model="CLIP_R50_CLIP"))
    with pytest.raises(UserError, match="folder without checkpoint"):
        opened("--checkpoint", tmp_path)
    file = tmp_path / "other.pt"  # of several that are given, it is named
    for name in ("encoder.w", "vision_encoder.w", "head.x", "image_mlp.w"):
        torch.save({name: torch.zeros(2)}, file)
        with pytest.raises(UserError, match=f"^--checkpoint {file}: "):
            opened("--checkpoint", file)


def test_images_alone_are_indexed_turned_and_in_the_named_cache(tmp_path, monkeypatch):
    class Nothing(list):
        kept = 0
        unreadable: ClassVar = {}

    given = {}
    monkeypatch.setattr(script, "build_index", lambda **more: given.update(more) or Nothing())
    for name in ("a.jpg", "a.txt", "deep/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    config = script.Config(images=tmp_path, cache=tmp_path / "kept", batch_size=5)
    script.index_folder(SimpleNamespace(embedder="it"), config, ALONE)
    assert given["files"] == [tmp_path / "a.jpg", tmp_path / "deep/b.png"]
    assert given["read"].keywords == {"exif": True} and given["batch_size"] == 5
    assert given["cache"] == tmp_path / "kept/demo" and given["embedder"] == "it"
    assert script.index_folder(SimpleNamespace(embedder=None), config, ALONE) is None


def test_folder_is_indexed_once(digitscenes, tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.new("RGB", (40, 30), "red").save(folder / "red.jpg")
    (folder / "bad.png").write_bytes(b"\x89PNG but not quite")
    words = ["--checkpoint", str(dual(tmp_path)), "--images", str(folder), "--device", "cpu"]
    config = parse(script.Config, words)
    world = distributed.init("cpu")
    abilities = open_abilities(config.checkpoint[0], config, world)
    assert len(script.index_folder(abilities, config, world)) == 1
    said = capsys.readouterr().out
    assert "1 images to search, 0 of them known before" in said and "UNREADABLE bad.png" in said
    script.index_folder(abilities, config, world)
    assert "1 of them known before" in capsys.readouterr().out


def test_the_checkpoint_that_does_not_open_is_named(tmp_path):
    weights = {"Qformer.bert.x.weight": torch.zeros(1), "visual_encoder.cls_token": torch.zeros(1)}
    torch.save({"model": weights}, tmp_path / "blip2.pth")
    config = script.Config(checkpoint=[tmp_path / "blip2.pth"])
    with pytest.raises(UserError, match=rf"^{tmp_path}/blip2\.pth: a checkpoint of BLIP-2, "):
        script.open_all(config, distributed.init("cpu"))
