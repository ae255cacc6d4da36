"""Models of open_clip, timm and transformers for evaluation: the same features and inputs as from
the library called directly, and one sentence for whatever cannot be opened."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torchvision.transforms.v2.functional import to_pil_image

from base.errors import UserError
from base.libraries import dual_inputs, hugging_face_tokenizer, of_library, open_clip_network
from models.layers.library_towers import with_timm_names
from models.weights.any_dual_encoder import open_dual
from models.weights.libraries import (
    library_encoder,
    open_library,
    opened_open_clip,
    timm_encoder,
)
from models.weights.vit_facts import VitFacts
from tests.helpers.tiny_hugging_face import (
    TEXT,
    VISION,
    align,
    blip,
    clip,
    metaclip2,
    save_tokenizer,
    siglip,
    siglip2,
)
from tests.helpers.tiny_open_clip import tiny_open_clip

open_clip = pytest.importorskip("open_clip")
transformers = pytest.importorskip("transformers")
TEXTS = ["a red dog", "blue cat a digit"]


def photo() -> torch.Tensor:
    torch.manual_seed(3)
    return torch.randint(0, 256, (3, 40, 56), dtype=torch.uint8)


def features(network, images: dict, texts: dict):
    """Of the library alone."""
    if isinstance(network, transformers.BlipForImageTextRetrieval):
        image = network.vision_proj(network.vision_model(**images).last_hidden_state[:, 0])
        text = network.text_proj(network.text_encoder(**texts).last_hidden_state[:, 0])
        return image, text
    image, text = network.get_image_features(**images), network.get_text_features(**texts)
    return getattr(image, "pooler_output", image), getattr(text, "pooler_output", text)


@pytest.mark.parametrize("make", [clip, metaclip2, siglip, siglip2, align, blip])
def test_dual_encoders_of_hugging_face(tmp_path, make):
    torch.manual_seed(0)
    network, look, names = make()
    network.eval().save_pretrained(tmp_path)
    look.save_pretrained(tmp_path)
    save_tokenizer(tmp_path, names)
    opened = open_library(f"hf/{tmp_path}")
    assert not opened.model.training
    images = look(to_pil_image(photo()), return_tensors="pt")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    padding = "max_length" if names == ["input_ids"] else True
    texts = tokenizer(TEXTS, padding=padding, truncation=True, max_length=16, return_tensors="pt")
    with torch.no_grad():
        expected = features(network, images, texts)
        view = opened.view(photo())
        image = opened.model.embed_image(view[None])["z"]
        text = opened.model.embed_text(opened.tokenize(TEXTS))["z"]
    if make is not siglip2:
        torch.testing.assert_close(view, images["pixel_values"][0], atol=1e-5, rtol=0)
    torch.testing.assert_close(image, expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(text, expected[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["ViT", "DeiT", "Dinov2", "ViTMAE", "ConvNext"])
def test_image_encoders_of_hugging_face(tmp_path, kind):
    torch.manual_seed(0)
    options = dict(VISION)
    if kind == "ConvNext":
        options = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
    if kind == "ViTMAE":
        options["mask_ratio"] = 0.0
    config = getattr(transformers, f"{kind}Config")(**options)
    network = getattr(transformers, f"{kind}Model")(config).eval()
    network.save_pretrained(tmp_path)
    look = transformers.ViTImageProcessor(size={"height": 32, "width": 32}, image_std=[0.2] * 3)
    look.save_pretrained(tmp_path)
    encoder = library_encoder(f"hf/{tmp_path}").eval()
    assert encoder.choose("feats") == (16 if kind == "ConvNext" else 32)
    pixels = look(to_pil_image(photo()), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        torch.testing.assert_close(encoder.view(photo())[None], pixels, atol=1e-5, rtol=0)
        found = network(pixels)
        expected = found.pooler_output if kind == "ConvNext" else found.last_hidden_state[:, 0]
        torch.testing.assert_close(encoder(pixels), expected.flatten(1), atol=1e-5, rtol=1e-5)


def test_weights_that_a_folder_lacks_are_named(tmp_path):
    network, look, names = clip()
    state = network.state_dict()
    state.pop("visual_projection.weight")
    network.save_pretrained(tmp_path, state_dict=state)
    look.save_pretrained(tmp_path)
    save_tokenizer(tmp_path, names)
    with pytest.raises(UserError, match=r"lack 1 weights of the model: visual_projection\.weight"):
        open_library(f"hf/{tmp_path}")
    assert open_library(f"hf/{tmp_path}", random_weights=True).vocab_size == 32


def test_a_tokenizer_that_does_not_fit(tmp_path):
    config = transformers.CLIPConfig(
        text_config=TEXT | {"vocab_size": 7}, vision_config=VISION, projection_dim=12
    )
    transformers.CLIPModel(config).save_pretrained(tmp_path)
    clip()[1].save_pretrained(tmp_path)
    save_tokenizer(tmp_path, ["input_ids", "attention_mask"])
    with pytest.raises(UserError, match="makes 10 tokens, but the text encoder knows 7"):
        open_library(f"hf/{tmp_path}")


@pytest.mark.parametrize("kind", ["clip", "custom", "timm", "coca"])
def test_open_clip_called_directly(tmp_path, kind):
    changes = {
        "clip": {},
        "custom": {"custom_text": True},
        "timm": {
            "custom_text": True,
            "vision_cfg": {"image_size": 32, "timm_model_name": "resnet10t", "timm_pool": ""},
        },
        "coca": {
            "custom_text": True,
            "multimodal_cfg": {"width": 32, "heads": 2, "layers": 1, "context_length": 12},
        },
    }[kind]
    if kind == "timm":
        changes["vision_cfg"] |= {"timm_pool": "avg", "timm_proj": "linear"}
    if kind == "coca":
        changes["text_cfg"] = {
            "context_length": 12,
            "vocab_size": 49408,
            "width": 32,
            "heads": 2,
            "layers": 2,
            "embed_cls": True,
            "output_tokens": True,
        }
        changes["vision_cfg"] = {
            "image_size": 32,
            "layers": 2,
            "width": 32,
            "head_width": 16,
            "patch_size": 8,
            "attentional_pool": True,
            "attn_pooler_heads": 2,
            "output_tokens": True,
        }
    name = f"local-dir:{tiny_open_clip(tmp_path / 'model', **changes)}"
    opened = open_library(f"open_clip/{name}")
    model, _, transform = open_clip.create_model_and_transforms(name)
    tokenizer = open_clip.get_tokenizer(name)
    model.eval()
    assert opened.pixels.mean == (0.1, 0.2, 0.3) and opened.pixels.interpolation == "bilinear"
    with torch.no_grad():
        view = opened.view(photo())
        torch.testing.assert_close(view, transform(to_pil_image(photo())), atol=1e-5, rtol=0)
        assert opened.tokenize(TEXTS).equal(tokenizer(TEXTS))
        for found, expected in (
            (opened.model.embed_image(view[None]), model.encode_image(view[None])),
            (opened.model.embed_text(tokenizer(TEXTS)), model.encode_text(tokenizer(TEXTS))),
        ):
            torch.testing.assert_close(found["z"], expected, atol=1e-5, rtol=1e-5)


def test_the_image_tower_of_a_clip_as_timms(tmp_path):
    from timm.models.vision_transformer import VisionTransformer

    folder = tiny_open_clip(tmp_path / "model")
    clip = open_clip.create_model(f"local-dir:{folder}").eval()
    tower = VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=32,
        depth=2,
        num_heads=2,
        num_classes=0,
        pre_norm=True,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-5),
    )
    state = with_timm_names(tower, clip.state_dict(), "clip.pt")
    tower.load_state_dict({k: v for k, v in state.items() if not k.startswith("head.")})
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        found = tower.eval()(image) @ clip.visual.proj
        torch.testing.assert_close(found, clip.encode_image(image), atol=1e-5, rtol=1e-5)
    openai = {**clip.state_dict(), "input_resolution": torch.tensor(32)}
    with pytest.raises(
        UserError, match=r"clip\.pt: weights of OpenAI's CLIP, which computes Quick"
    ):
        with_timm_names(tower, openai, "clip.pt")


def test_a_timm_tower_that_pools_as_it_does_itself(tmp_path):
    """open_clip's `timm_pool: ""`, read as one of our own networks."""
    vision = {"image_size": 32, "timm_model_name": "test_resnet", "timm_proj": "linear"}
    vision["timm_pool"] = ""
    folder = tiny_open_clip(tmp_path / "model", custom_text=True, vision_cfg=vision)
    settings = {"custom_text": True, "embed_dim": 16, "vision_cfg": vision}
    text = {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    settings["text_cfg"] = text
    network = open_clip.CustomTextCLIP(16, vision, text).eval()
    network.load_state_dict(torch.load(folder / "open_clip_pytorch_model.bin", weights_only=True))
    look = {"mean": [0.1] * 3, "std": [0.4] * 3}
    about = {"open_clip_config.json": {"model_cfg": settings, "preprocess_cfg": look}}
    opened = open_dual(network.state_dict(), about)
    assert opened.model.config.model == "CLIP_RT_CLIP"
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        found = opened.model.embed_image(image)["z"]
        torch.testing.assert_close(found, network.encode_image(image), atol=1e-5, rtol=1e-5)
    vision["timm_model_name"] = "vit_base_patch16_224"
    vision.pop("timm_pool")  # the mean, which this ViT of ours does not take
    with pytest.raises(UserError, match="timm_pool is 'avg', and this network computes 'token'"):
        open_dual(network.state_dict(), about)


def test_a_file_of_weights_for_an_architecture_of_open_clip(tmp_path, monkeypatch):
    folder = tiny_open_clip(tmp_path / "model")
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", config)
    opened = open_library("open_clip/tiny", folder / "open_clip_pytorch_model.bin")
    model = open_clip.create_model("tiny", str(folder / "open_clip_pytorch_model.bin")).eval()
    with torch.no_grad():
        view = opened.view(photo())[None]
        torch.testing.assert_close(
            opened.model.embed_image(view)["z"], model.encode_image(view), atol=1e-5, rtol=1e-5
        )
    torch.save({"nothing": torch.ones(1)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"other\.pt in open_clip/tiny: "):
        open_library("open_clip/tiny", tmp_path / "other.pt")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("open_clip/ViT-B-33", "did you mean open_clip/ViT-B-32"),
        ("open_clip/ViT-B-32:openaii", "did you mean openai"),
        ("open_clip/ViT-B-32", r"name its weights such as open_clip/ViT-B-32:openai"),
        ("open_clip/ViT-B-32-quickgelu:laion2b_e16", "no weights 'laion2b_e16'"),
        ("timm/resnet10t", "no text encoder"),
        ("hf/a/b/c", "no such folder, and no name of the hub"),
        ("hf/./nowhere", "no such folder"),
    ],
)
def test_names_that_cannot_be_opened(name, message):
    assert of_library(name)
    with pytest.raises(UserError, match=message):
        open_library(name)


def test_a_name_of_timm_means_its_weights(monkeypatch):
    """Without a network it is refused; random weights have to be asked for."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"timm/test_vit\.r160_in1k: .*--random-weights"):
        library_encoder("timm/test_vit.r160_in1k")
    encoder = library_encoder("timm/test_vit.r160_in1k", random_weights=True)
    assert encoder.title == "timm/test_vit.r160_in1k"


@pytest.mark.parametrize(
    ("changes", "resize"),
    [
        ({"crop_pct": 0.9}, 248),  # not 249: timm cuts the fraction
        ({"crop_pct": 0.875}, 256),
        ({"crop_pct": 1.0, "crop_mode": "squash"}, None),
        ({"crop_pct": 0.9, "crop_mode": "squash"}, "crop_mode squash"),
        ({"crop_mode": "border"}, "crop_mode border"),
        ({"interpolation": "lanczos"}, "lanczos"),
    ],
)
def test_images_are_resized_as_timm_does_or_not_at_all(changes, resize):
    import timm

    cfg = {"input_size": [3, 224, 224]} | changes
    described = {"pretrained_cfg": cfg, "model_args": {}}
    if isinstance(resize, str):
        with pytest.raises(UserError, match=f"{resize}.*state the shorter side"):
            timm_encoder("test_resnet", described=described)
        encoder = timm_encoder("test_resnet", described=described, stated=VitFacts(resize=250))
        assert encoder.resize == 250
        return
    assert timm_encoder("test_resnet", described=described).resize == resize
    model = timm.create_model("test_resnet", pretrained_cfg_overlay=cfg)
    view = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    assert view.transforms[0].size in (resize, (224, 224))


def test_names_of_timm():
    with pytest.raises(UserError, match="did you mean timm/resnet50"):
        library_encoder("timm/resnet5O")
    assert not of_library("ViT-B/32") and not of_library(None) and not of_library("timm")


def test_pixels_are_not_guessed_where_published_weights_differ():
    with pytest.raises(UserError, match=r"differ in mean and std .* open_clip/ViT-L-14:TAG"):
        open_library("open_clip/ViT-L-14", random_weights=True)


def test_the_activation_is_the_one_of_the_weights():
    """open_clip itself warns and computes another function."""
    from base.libraries import quick_gelu

    assert quick_gelu("ViT-B-32", "openai") and quick_gelu("ViT-B-32-quickgelu", "openai")
    assert not quick_gelu("ViT-B-32", "laion2b_e16") and not quick_gelu("ViT-B-32", None)
    opened = open_library("open_clip/RN50:openai", random_weights=True)
    layer = opened.model.network.transformer.resblocks[0].mlp.gelu
    assert type(layer).__name__ == "QuickGELU"


def test_no_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def offline(*_, **__):
        raise OSError("We couldn't connect to the hub")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", offline)
    monkeypatch.setattr(open_clip.factory, "download_pretrained", offline)
    for name in ("hf/google/siglip2-base-patch16-224", "open_clip/ViT-B-32:laion2b_e16"):
        with pytest.raises(UserError, match="not in the local cache, and the hub cannot be reach"):
            open_library(name)


def text_configuration(name: str):
    """What AutoConfig fetches for the text towers of open_clip's list."""
    kinds = {"roberta": "RobertaConfig", "xlm": "XLMRobertaConfig", "nllb": "M2M100Config"}
    kinds |= {"mt5": "MT5Config", "bert": "BertConfig", "clip-vit": "CLIPTextConfig"}
    key = "xlm" if "xlm" in name else next(key for key in kinds if key in name.lower())
    return getattr(transformers, kinds[key])()


class AnyTokenizer:
    """Stands for the tokenizers that the hub keeps."""

    context_length = 77


@pytest.mark.slow
def test_every_pair_of_open_clips_list_resolves(monkeypatch):
    """Every (model, tag): architecture on the meta device, transform, tokenizer and widths."""

    def fetched(name, *_, **__):
        return text_configuration(name)

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", fetched)
    monkeypatch.setattr(open_clip.factory, "HFTokenizer", lambda *_, **__: AnyTokenizer())
    monkeypatch.setattr(open_clip.factory, "SigLipTokenizer", lambda *_, **__: AnyTokenizer())
    failed, built = [], {}
    for name, tag in open_clip.list_pretrained():
        try:
            look = json.dumps(open_clip.get_pretrained_cfg(name, tag), sort_keys=True, default=str)
            if name not in built:
                with torch.device("meta"):
                    built[name] = open_clip_network(f"{name}:{tag}", weights=False)
            tokenizer = open_clip.get_tokenizer(name)
            opened = opened_open_clip(built[name], tokenizer, f"{name}:{tag}")
            width = open_clip.get_model_config(name)["embed_dim"]
            assert opened.view(photo()).shape[-1] == opened.pixels.size, look
            assert opened.vocab_size > 0 and opened.context_length > 0
            assert width > 0
        except Exception as error:
            failed.append(f"{name}:{tag}: {type(error).__name__}: {str(error)[:200]}")
    assert not failed, "\n".join(failed)
    assert len(open_clip.list_pretrained()) >= 150


def test_a_folder_without_tokenizer_is_refused(tmp_path):
    transformers.BertConfig(vocab_size=30).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"the tokenizer of hf/|its tokenizer has no words"):
        hugging_face_tokenizer(str(tmp_path))


@pytest.mark.parametrize("kind, side", [("align", 289), ("clip", None)])
def test_convolutions_take_the_side_that_the_processor_cuts(kind, side, monkeypatch):
    """transformers' ALIGN names 600 pixels, the side of EfficientNet-B7, and cuts 289."""
    images = {"do_center_crop": True, "crop_size": 289, "size": {"height": 346, "width": 346}}
    images |= {"resample": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    text = SimpleNamespace(max_position_embeddings=512, vocab_size=99)
    vision = SimpleNamespace(image_size=600)
    config = SimpleNamespace(model_type=kind, vision_config=vision, text_config=text)
    monkeypatch.setattr("base.libraries.hugging_face_config", lambda source: config)
    processor = SimpleNamespace(to_dict=lambda: images)
    monkeypatch.setattr("base.libraries.hugging_face_processor", lambda source: processor)
    if side is None:
        with pytest.raises(UserError, match=r"cuts 289, which main\.py does not for images of 600"):
            dual_inputs.__wrapped__(f"hf/{kind}")
        return
    found = dual_inputs.__wrapped__(f"hf/{kind}")
    assert (found.pixels.size, found.resized, found.squeeze) == (side, 346, True)
    assert found.context_length == 64 and found.pixels.interpolation == "bilinear"
