"""main.py with CLIP and SigLIP of transformers and open_clip: the library's own loss and gradients,
and from training to evaluation and back into the library."""

import json

import pytest
import torch

import eval_zeroshot
import main as script
from base.errors import UserError
from dataset.tasks.dual_inputs import eval_view, image_side
from models.dual_encoder.base import names_by_decay
from models.dual_encoder.config import DualConfig
from models.dual_encoder.factory import build_dual, with_library_sizes
from models.layers.library_towers import start_towers
from models.weights.libraries import open_library
from models.weights.start_dual import load_any_layout
from runtime.checkpoint import export_safetensors, read_weights
from runtime.config.cli import parse
from scripts.weights import convert
from tests.helpers.main_runs import arguments
from tests.helpers.runs import log_lines
from tests.helpers.tiny_hugging_face import align, clip, metaclip2, saved, siglip
from tests.helpers.tiny_open_clip import open_clip_siglip

open_clip = pytest.importorskip("open_clip")
transformers = pytest.importorskip("transformers")
HUGGING_FACE = {"clip": clip, "metaclip2": metaclip2, "siglip": siglip, "align": align}
CLIPS = ("clip", "metaclip2")


def opened(kind: str, folder):
    """(our network with its published weights, the library's, loss(library's, image, ids))."""
    if kind == "open_clip":
        name = f"open_clip/local-dir:{open_clip_siglip(folder / 'model')}"
        library = open_clip.create_model(name.removeprefix("open_clip/"))
    else:
        name = f"hf/{saved(HUGGING_FACE[kind], folder)}"
        library = transformers.AutoModel.from_pretrained(folder)
    ours = build_dual(with_library_sizes(DualConfig(model=name)))
    start_towers(ours, read_weights, [])
    return ours, library


def library_loss(library, image, ids):
    if hasattr(library, "encode_image"):
        found = open_clip.loss.SigLipLoss()
        features = library.encode_image(image, True), library.encode_text(ids, True)
        return found(*features, library.logit_scale.exp(), library.logit_bias)
    texts = {"input_ids": ids}
    if hasattr(library, "temperature"):  # ALIGN's attention sees no padding
        texts["attention_mask"] = (ids != 0).long()
    return library(pixel_values=image, **texts, return_loss=True).loss


@pytest.mark.parametrize("kind", ["siglip", *CLIPS, "align", "open_clip"])
def test_loss_and_gradients_are_the_librarys(tmp_path, kind):
    ours, library = opened(kind, tmp_path)
    torch.manual_seed(1)
    image, ids = torch.randn(4, 3, 32, 32), torch.randint(4, 32, (4, 16))
    ids[:, -1] = 3  # the end of a text
    if kind == "align":
        ids[:2, -3:] = 0  # padding
        image = image.double()  # batch norms of four images enlarge the rounding of float32
        ours.double()
        library.double()
    losses = ours.train()(image=image, text_ids=ids)
    loss = losses["clip_loss" if kind in (*CLIPS, "align") else "siglip_loss"]
    expected = library_loss(library.train(), image, ids)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    for name, parameter in library.named_parameters():
        found = ours.network.get_parameter(name).grad
        if parameter.grad is None:
            assert found is None, name  # the pooler of ALIGN's text encoder
            continue
        torch.testing.assert_close(found, parameter.grad, atol=1e-6, rtol=1e-4, msg=name)
    if kind == "align":
        ours.network.temperature.data.fill_(-1)
        ours.after_update()
        assert ours.network.temperature.item() == pytest.approx(1e-3)
        pooler = ours.network.text_model.pooler
        assert not any(parameter.requires_grad for parameter in pooler.parameters())
        large = torch.randint(256, (3, 38, 38), dtype=torch.uint8)  # the size it cuts 32 out of
        assert eval_view(ours.config.model, 32)(large).equal(large[:, 3:35, 3:35])
        norm = ours.network.vision_model.embeddings.batchnorm
        assert norm.momentum == pytest.approx(0.01)  # TensorFlow's 0.99
        return
    scale = ours.network.logit_scale
    scale.data.fill_(4.9)
    ours.after_update()
    limited = scale.exp().item() < 100.01
    assert limited == (kind in CLIPS)  # SigLIP's published scales are larger


def test_what_decays_and_what_is_locked(tmp_path):
    ours, _ = opened("siglip", tmp_path)
    start_towers(ours, read_weights, ["image"])
    assert not ours.train().network.vision_model.training and ours.network.text_model.training
    trained = {name for name, parameter in ours.named_parameters() if parameter.requires_grad}
    assert not any(name.startswith("network.vision_model.") for name in trained)
    with pytest.raises(
        UserError, match="--lock text image: nothing is left to train but the scale"
    ):
        start_towers(opened("siglip", tmp_path)[0], read_weights, ["text", "image"])
    decayed, free = names_by_decay(ours)
    assert {*decayed, *free} == trained
    assert "network.text_model.embeddings.token_embedding.weight" in free
    assert "network.text_model.head.weight" in decayed and "network.logit_bias" in free


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["siglip", "align", "open_clip"])
def test_a_run_evaluates_as_it_validated_and_returns_to_its_library(digitscenes, tmp_path, kind):
    if kind == "open_clip":
        model = f"open_clip/local-dir:{open_clip_siglip(tmp_path / 'model')}"
    else:
        model = f"hf/{saved(HUGGING_FACE[kind], tmp_path / 'model')}"
    sizes = {"model": model, "image_size": 32, "context_length": 16, "epochs": "2 steps"}
    flags = arguments(digitscenes, tmp_path / "run", **sizes, save_every="1 steps")
    script.main(parse(script.Config, flags))
    trained = read_weights(tmp_path / "run/model.safetensors")
    (tmp_path / "run/checkpoint_00000002.pt").unlink()
    script.main(parse(script.Config, [*flags, "--resume", "auto"]))
    resumed = read_weights(tmp_path / "run/model.safetensors")
    assert all(torch.equal(resumed[name], value) for name, value in trained.items())
    logged = log_lines(tmp_path / "run")
    accuracy = next(value for line in logged for name, value in line.items() if "acc1_z" in name)
    flags = ["--checkpoint", tmp_path / "run", "--output-dir", tmp_path / "out", "--device", "cpu"]
    flags += ["--workers", "0", "--datasets", "digitscenes", "--split", "val"]
    for name in ("labels", "templates"):
        flags += [f"--{name}", digitscenes / f"{name}.json"]
    flags += ["--catalog", digitscenes / "dataset_catalog.json"]
    config = parse(eval_zeroshot.Config, [*map(str, flags)])
    eval_zeroshot.main(config)
    metrics = json.loads((tmp_path / "out/result/metrics.json").read_text())
    if kind != "align":  # whose random batch norms hardly tell images apart
        assert metrics["results"]["digitscenes"]["acc1_z"] == pytest.approx(accuracy)

    photo = torch.randint(0, 256, (3, 40, 56), dtype=torch.uint8)
    layout = "open_clip" if kind == "open_clip" else "hf"
    words = [str(tmp_path / "run"), "--to", layout, "--output", str(tmp_path / "back")]
    assert convert.main(words) == 0
    if kind == "open_clip":
        back = open_clip.create_model(f"local-dir:{tmp_path / 'back'}")
        tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'back'}")
        ids = tokenizer(["a red dog"])
    else:
        back = transformers.AutoModel.from_pretrained(tmp_path / "back")
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
        padded = {"padding": "max_length", "max_length": 16, "return_tensors": "pt"}
        ids = tokenizer(["a red dog"], **padded)["input_ids"]
    assert ids.tolist() == [[2, 4, 5, 7, 3, *[0] * 11]]
    state = back.state_dict()
    assert {f"network.{name}" for name in state} == trained.keys()
    assert all(torch.equal(trained[f"network.{name}"], value) for name, value in state.items())
    file = "model.safetensors" if layout == "hf" else "open_clip_pytorch_model.bin"
    start = read_weights(tmp_path / "model" / file)
    changed = [
        n for n, v in state.items() if v.is_floating_point() and not torch.equal(v, start[n])
    ]
    assert ("temperature" if kind == "align" else "logit_bias") in changed and len(changed) > len(
        state
    ) / 2
    place = tmp_path / "back" if layout == "hf" else f"local-dir:{tmp_path / 'back'}"
    embedded = []
    for each in (eval_zeroshot.open_checkpoint(config)[0], open_library(f"{layout}/{place}")):
        view, embed = image_side(each, torch.device("cpu"))
        with torch.no_grad():
            image = embed(view(photo)[None])["z"]
            text = each.model.embed_text(each.tokenize(["a red dog"]))["z"]
        embedded.append((image, text))
    for ours, library in zip(*embedded, strict=True):
        assert torch.cosine_similarity(ours, library) > 0.999  # the view rounds to grey levels


def test_weights_and_sizes_that_do_not_fit(tmp_path):
    ours, library = opened("siglip", tmp_path)
    changed = {name: value + 1 for name, value in library.state_dict().items()}
    load_any_layout(ours, changed, {})
    assert torch.equal(ours.network.logit_bias, changed["logit_bias"])
    changed.pop("logit_bias")
    with pytest.raises(UserError, match=r"1 missing: network\.logit_bias"):
        load_any_layout(ours, changed, {})
    name = ours.config.model
    with pytest.raises(UserError, match=r"image_size 64: hf/.* is of 32; give that"):
        with_library_sizes(DualConfig(model=name, image_size=64))
    with pytest.raises(UserError, match="makes 33 tokens, but its text encoder knows 32"):
        build_dual(DualConfig(model=name, vocab_size=33))
    with pytest.raises(UserError, match="timm's networks have no text encoder; use --image-tower"):
        with_library_sizes(DualConfig(model="timm/resnet50"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["siglip", "align", "open_clip"])
def test_to_onnx(tmp_path, kind):
    """The script itself compares the graphs with the network."""
    pytest.importorskip("onnxruntime")
    ours, _ = opened(kind, tmp_path)
    run = tmp_path / "run"
    export_safetensors(ours.state_dict(), run / "model.safetensors")
    network = {"model": ours.config.model, "image_size": 32, "context_length": 16}
    about = {"network": {**network, "vocab_size": 10}}
    (run / "config.yaml").write_text(json.dumps(about))  # which is YAML, too
    words = [str(run), "--to", "onnx", "--output", str(tmp_path / "onnx")]
    assert convert.main(words) == 0
    written = {path.name for path in (tmp_path / "onnx").iterdir()}
    assert {"image.onnx", "text.onnx", "preprocessor_config.json", "tokenizer.json"} <= written
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "onnx")
    photo = torch.randint(0, 256, (3, 40, 56), dtype=torch.uint8)
    pixels = processor(photo, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 32, 32)
