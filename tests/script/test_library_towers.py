"""main.py with towers of timm and transformers: LiT, from training to evaluation."""

import json
import shutil

import pytest
import torch

import eval_zeroshot
import main as script
from base.errors import UserError
from models.dual_encoder.config import DualConfig
from models.dual_encoder.factory import build_dual
from models.layers.library_towers import HuggingFaceText, class_names, start_towers
from runtime.checkpoint import read_weights
from runtime.config.cli import parse
from tests.helpers.main_runs import arguments
from tests.helpers.runs import log_lines

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
WORDS += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A small BERT's folder with tokenizer and weights."""
    import transformers

    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    torch.manual_seed(1)
    shape = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=len(WORDS), intermediate_size=32, **shape)
    transformers.BertModel(config).save_pretrained(folder)
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of timm's test_resnet with a classifier."""
    import timm

    torch.manual_seed(2)
    file = tmp_path_factory.mktemp("timm") / "weights.pth"
    torch.save(timm.create_model("test_resnet").state_dict(), file)
    return file


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    # a name of the hub is asked for five times where there is no network
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def lit(digitscenes, output, bert, weights, *more, **changes):
    values = {
        "model": "CLIP_VITT8_CLIP",
        "image_tower": f"timm/test_resnet:{weights}",
        "text_tower": f"hf/{bert}",
        "lock": ["image", "text"],
        "epochs": "2 steps",
    }
    return arguments(digitscenes, output, *more, **(values | changes))


def test_locked_towers_stay_and_what_is_trained_evaluates(digitscenes, tmp_path, bert, weights):
    script.main(parse(script.Config, lit(digitscenes, tmp_path / "run", bert, weights)))
    trained = read_weights(tmp_path / "run/model.safetensors")
    published = torch.load(weights, weights_only=True)
    for name, value in published.items():
        if not name.startswith("fc."):
            assert torch.equal(trained[f"visual.trunk.{name}"], value), name  # statistics, too
    import transformers

    texts = transformers.BertModel.from_pretrained(bert).state_dict()
    locked = [name for name in texts if not name.startswith("pooler")]
    assert all(torch.equal(trained[f"text_tower.trunk.{name}"], texts[name]) for name in locked)
    assert "transformer.resblocks.0.attn.in_proj_weight" not in trained
    logged = log_lines(tmp_path / "run")
    accuracy = next(value for line in logged for name, value in line.items() if "acc1_z" in name)
    flags = ["--checkpoint", tmp_path / "run", "--output-dir", tmp_path / "out", "--device", "cpu"]
    flags += [
        "--workers",
        "0",
        "--datasets",
        "digitscenes",
        "--catalog",
        digitscenes / "dataset_catalog.json",
    ]
    flags += ["--labels", digitscenes / "labels.json", "--split", "val"]
    flags += ["--templates", digitscenes / "templates.json"]
    eval_zeroshot.main(parse(eval_zeroshot.Config, [*map(str, flags)]))
    metrics = json.loads((tmp_path / "out/result/metrics.json").read_text())
    assert metrics["results"]["digitscenes"]["acc1_z"] == pytest.approx(accuracy)


def test_unlocked_towers_are_trained(digitscenes, tmp_path, bert, weights):
    flags = lit(digitscenes, tmp_path / "run", bert, weights, lock=["text"], val_folder="none")
    script.main(parse(script.Config, flags))
    trained = read_weights(tmp_path / "run/model.safetensors")
    published = torch.load(weights, weights_only=True)
    first = next(iter(published))
    assert not torch.equal(trained[f"visual.trunk.{first}"], published[first])


def test_towers_are_the_libraries_own(bert, weights):
    import timm
    import transformers

    shape = {
        "embed_dim": 8,
        "image_tower": f"timm/test_resnet:{weights}",
        "text_tower": f"hf/{bert}",
    }
    model = build_dual(DualConfig(model="CLIP_VITT8_SIGLIP", **shape))
    start_towers(model, read_weights, ["image"])
    model.train()
    assert not model.visual.training and model.text_tower.training
    model.eval()
    published = timm.create_model("test_resnet").eval()
    published.load_state_dict(torch.load(weights, weights_only=True))
    published.reset_classifier(0)
    image = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model.embed_image(image)["feats"], published(image))
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert)
    encoded = tokenizer(["abc", "a b c d e"], padding=True, return_tensors="pt")
    states = transformers.BertModel.from_pretrained(bert)(**encoded).last_hidden_state
    mask = encoded["attention_mask"][..., None]
    mean = (states * mask).sum(1) / mask.sum(1)
    torch.testing.assert_close(model.embed_text(encoded["input_ids"])["feats"], mean)


def test_texts_are_masked_by_the_padding_of_their_tokenizer(bert, tmp_path):
    """Not by that of config.json, of which GPT-2's and others have none."""
    folder = shutil.copytree(bert, tmp_path / "bert")
    about = json.loads((folder / "config.json").read_text())
    tower = HuggingFaceText(f"hf/{folder}").eval()
    (folder / "config.json").write_text(json.dumps(about | {"pad_token_id": None}))
    words = [WORDS[5], *WORDS[1:5], "[PAD]", *WORDS[6:]]
    (folder / "vocab.txt").write_text("\n".join(words))
    (folder / "tokenizer.json").unlink(missing_ok=True)
    other = HuggingFaceText(f"hf/{folder}").eval()
    other.load_state_dict(tower.state_dict())
    assert (tower.pad_id, other.pad_id) == (0, 5)
    text = torch.tensor([[2, 9, 8, 3]])
    padded = torch.nn.functional.pad(text, (0, 3), value=5)
    torch.testing.assert_close(other(padded), tower(text))


@pytest.mark.parametrize("kind", ["T5Config", "ViTConfig", "CLIPConfig"])
def test_what_is_no_text_encoder(kind, tmp_path):
    import transformers

    getattr(transformers, kind)().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is no text encoder"):
        HuggingFaceText(f"hf/{tmp_path}")


def test_an_image_starts_as_the_mean_of_its_classes_names(bert, weights, tmp_path):
    import timm
    import transformers

    names = [f"{chr(97 + n % 26)} {chr(97 + n // 26 % 26)}" for n in range(1000)]
    (tmp_path / "names.txt").write_text("\n".join(names))
    shape = {"image_tower": f"timm/test_resnet:{weights}", "text_tower": f"hf/{bert}"}
    shape |= {"embed_dim": 24, "tower_classes": str(tmp_path / "names.txt")}
    model = build_dual(DualConfig(model="CLIP_VITT8_CLIP", **shape))
    start_towers(model, read_weights, ["image", "text"])
    model.eval()
    published = timm.create_model("test_resnet").eval()
    published.load_state_dict(torch.load(weights, weights_only=True))
    image = torch.randn(2, 3, 64, 64)
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert)
    texts = [f"a photo of a {name}." for name in names]
    ids = tokenizer(texts, padding=True, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        found, embedded = model.embed_image(image), model.embed_text(ids)
        probabilities = published(image).softmax(-1)
        pooled = published.forward_head(published.forward_features(image), pre_logits=True)
    unit = torch.nn.functional.normalize
    torch.testing.assert_close(found["feats"], torch.cat([unit(pooled), probabilities], -1))
    features = unit(embedded["feats"])
    common = unit(features.mean(0), dim=0)
    remaining = features - (features @ common)[:, None] * common
    torch.testing.assert_close(found["z"], probabilities @ remaining, atol=1e-5, rtol=1e-4)
    length = embedded["feats"].norm(dim=-1, keepdim=True)
    torch.testing.assert_close(embedded["z"], remaining * length, atol=1e-5, rtol=1e-4)
    (tmp_path / "names.txt").write_text("\n".join(names[:-1]))
    with pytest.raises(UserError, match="999 names, but the image tower tells 1000 classes"):
        start_towers(model, read_weights, [])


def test_class_names_of_the_prompts():
    names = class_names("dataset/prompts/labels.json:imagenet")
    assert len(names) == 1000 and names[0] == "tench"
    with pytest.raises(UserError, match="no names of 'imagenett'; did you mean imagenet"):
        class_names("dataset/prompts/labels.json:imagenett")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tower_classes": "x"}, "give image_tower and text_tower"),
        (
            {"image_tower": "timm/test_resnt"},
            "no model 'test_resnt'; did you mean timm/test_resnet",
        ),
        ({"image_tower": "hf/x"}, "image_tower hf/x: write timm/NAME"),
        ({"text_tower": "hf/no/such"}, "text_tower hf/no/such: not in the local cache"),
        ({"model": "CL2L_VITT8_CL2L", "text_tower": "hf/x"}, r"use \*_CLIP or \*_SIGLIP"),
    ],
)
def test_towers_that_cannot_be_are_refused(changes, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=message):
        build_dual(DualConfig(**({"model": "CLIP_VITT8_CLIP"} | changes)))


def test_what_cannot_be_locked_or_loaded(weights, tmp_path):
    plain = build_dual(DualConfig(model="CLIP_VITT8_CLIP", transformer_layers=1))
    with pytest.raises(UserError, match="--lock image: give the image tower weights to keep"):
        start_towers(plain, read_weights, ["image"])
    other = tmp_path / "other.pth"
    torch.save({"cls_token": torch.zeros(1)}, other)  # of another shape, the rest missing
    tower = build_dual(DualConfig(model="CLIP_VITT8_CLIP", image_tower=f"timm/test_vit:{other}"))
    with pytest.raises(
        UserError, match=r"other.pth: not the weights of timm's test_vit; it differs in cls_token"
    ):
        start_towers(tower, read_weights, [])


@pytest.mark.slow
def test_openais_weights_are_trained_further(digitscenes, tmp_path, monkeypatch):
    """`--model NAME --checkpoint FILE`, the image tower locked; the run evaluates as it validated."""
    from models.layers import openai_towers
    from models.layers.clip_towers import TextShape
    from runtime.checkpoint import export_safetensors

    shape = openai_towers.OpenAIConfig(
        embed_dim=16,
        vision_width=64,
        vision_layers=1,
        patch_size=8,
        text=TextShape(width=64, heads=1, layers=1),
    )
    monkeypatch.setitem(openai_towers.OPENAI_MODELS, "ViT-S-8", shape)
    size = script.text_tokenizer("CLIP", 77, digitscenes / "bpe/bpe_merges.txt.gz", "").vocab_size
    torch.manual_seed(0)
    start = build_dual(DualConfig(model="ViT-S/8", image_size=32, vocab_size=size))
    export_safetensors(start.state_dict(), tmp_path / "start.safetensors")
    flags = arguments(
        digitscenes,
        tmp_path / "run",
        model="ViT-S/8",
        image_size=32,
        checkpoint=tmp_path / "start.safetensors",
        lock="image",
        epochs="2 steps",
    )
    script.main(parse(script.Config, flags))
    trained = read_weights(tmp_path / "run/model.safetensors")
    for name, value in start.state_dict().items():
        kept = torch.equal(trained[name], value)
        assert kept == (name.startswith("visual.") or not value.is_floating_point()), name
    logged = log_lines(tmp_path / "run")
    accuracy = next(value for line in logged for name, value in line.items() if "acc1_z" in name)
    flags = ["--checkpoint", tmp_path / "run", "--output-dir", tmp_path / "out", "--device", "cpu"]
    flags += ["--workers", "0", "--datasets", "digitscenes", "--split", "val"]
    flags += ["--catalog", digitscenes / "dataset_catalog.json"]
    flags += ["--labels", digitscenes / "labels.json"]
    flags += ["--templates", digitscenes / "templates.json"]
    eval_zeroshot.main(parse(eval_zeroshot.Config, [*map(str, flags)]))
    metrics = json.loads((tmp_path / "out/result/metrics.json").read_text())
    assert metrics["results"]["digitscenes"]["acc1_z"] == pytest.approx(accuracy)
