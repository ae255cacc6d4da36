"""Initial weights: published sizes start as their originals do, narrow ones in proportion."""

import pytest
import torch
from torch import nn

from models.classification.classifier import SIZES
from models.dual_encoder.config import DualConfig
from models.dual_encoder.factory import VITS, build_dual
from models.layers.clip_towers import ClipViT
from models.layers.openai_towers import ModifiedResNet, OpenAIConfig
from models.layers.vit import ViT, ViTConfig
from models.layers.xbert import BertConfig, XBert
from tests.helpers.clip_toys import toy

PUBLISHED_WIDTHS = (384, 768, 1024)  # ViT-S, ViT-B, ViT-L


def stds(module: nn.Module) -> dict[str, float]:
    """Std of every linear layer's weight."""
    layers = module.named_modules()
    return {name: m.weight.std().item() for name, m in layers if isinstance(m, nn.Linear)}


def vit_of(width: int, tower: type[ViT] = ViT) -> ViT:
    torch.manual_seed(0)
    return tower(ViTConfig(image_size=16, patch_size=8, width=width, depth=1, heads=2))


@pytest.mark.parametrize("tower", [ViT, ClipViT])
@pytest.mark.parametrize("width", PUBLISHED_WIDTHS)
def test_published_vits_start_with_std_0_02(tower, width):
    for name, std in stds(vit_of(width, tower)).items():
        assert std == pytest.approx(0.02, rel=0.01), name


def test_the_published_widths_are_those_of_the_model_tables():
    tables = {width for width, *_ in [*VITS.values(), *SIZES.values()]}
    assert {width for width in tables if width >= 384} == set(PUBLISHED_WIDTHS)


@pytest.mark.parametrize("tower", [ViT, ClipViT])
@pytest.mark.parametrize("width", [32, 96, 128, 192])
def test_narrow_vits_start_with_the_gain_of_vit_b(tower, width):
    """Gain: the std of a layer's outputs over that of its inputs, std · sqrt(width); ViT-B's is
    0.554."""
    model = vit_of(width, tower)
    for name, std in stds(model).items():
        assert std * width**0.5 == pytest.approx(0.02 * 768**0.5, rel=0.05), name
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("width", [64, 128, 384, 768])
def test_bert_starts_by_its_width_unless_its_json_says_otherwise(width):
    geometry = {"vocab_size": 60, "hidden_size": width, "num_hidden_layers": 1}
    geometry |= {"num_attention_heads": 2, "intermediate_size": 2 * width, "encoder_width": width}
    geometry |= {"add_cross_attention": True}
    expected = 0.02 if width >= 384 else 0.02 * (768 / width) ** 0.5
    torch.manual_seed(0)
    for name, std in stds(XBert(BertConfig.from_json(geometry))).items():
        assert std == pytest.approx(expected, rel=0.05), name
    said = BertConfig.from_json(geometry | {"initializer_range": 0.02})
    for name, std in stds(XBert(said)).items():
        assert std == pytest.approx(0.02, rel=0.05), name


def test_the_text_transformer_keeps_its_gain_at_every_width():
    """CLIP's law: 1/sqrt(width) for attention, which no width can make too small; what is added to
    the residual stream by 1/sqrt(2 · layers) less, as OpenAI's code."""
    for width in (64, 512):
        config = DualConfig(
            model="CLIP_VITT8_CLIP",
            image_size=16,
            vocab_size=600,
            text_width=width,
            text_heads=2,
            transformer_layers=2,
        )
        model = build_dual(config)
        for block in model.transformer.resblocks:
            weights = [block.attn.in_proj_weight, block.attn.out_proj.weight]
            weights += [block.mlp.c_fc.weight, block.mlp.c_proj.weight]
            gains = [weight.std().item() * width**0.5 for weight in weights]
            assert gains == pytest.approx([1, 0.5, 0.5**0.5, 0.5], rel=0.05)
        assert model.token_embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert model.positional_embedding.std().item() == pytest.approx(0.01, rel=0.05)


def test_openais_resnet_starts_as_published():
    """The attention pool by its width, residual branches at 0 (`initialize_parameters`)."""
    sizes = {"embed_dim": 256, "image_size": 32, "vision_width": 8}
    tower = ModifiedResNet(OpenAIConfig(**sizes, vision_layers=(1, 2, 1, 1)))
    pool = stds(tower.attnpool)
    assert len(pool) == 4
    for name, std in pool.items():
        assert std == pytest.approx(256**-0.5, rel=0.05), name
    for block in (tower.layer1[0], tower.layer2[1]):
        assert not block.bn3.weight.any() and block.bn1.weight.eq(1).all()


def test_temperatures_start_as_published():
    """0.07 for images and texts (Radford et al. 2021), 0.1 between views (CLIP-rocket)."""
    for name in ("CLIP_VITB16_CLIP", "SLIP_VITB16"):
        assert toy(name).logit_scale.exp().item() == pytest.approx(1 / 0.07)
    model = toy("CL2L_VITB16_CL2L", separate_proj=True)
    assert model.logit_scale.exp().item() == pytest.approx(1 / 0.07)
    assert model.l2l_logit_scale.exp().item() == pytest.approx(10)


def test_a_narrow_vit_learns_a_relation_between_patches_at_once():
    """The class is the sum modulo 4 of two motifs that lie anywhere: attention must learn to compare
    tokens. With std 0.02 the loss still is that of guessing, 1.39, after 110 steps."""
    generator = torch.Generator().manual_seed(0)
    motifs = torch.randn(4, 3, 8, 8, generator=generator)
    torch.manual_seed(0)
    model = ClipViT(ViTConfig(image_size=32, patch_size=8, width=64, depth=2, heads=2))
    head = nn.Linear(64, 4)
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    losses = []
    for _ in range(80):
        first, second = torch.randint(4, (2, 64), generator=generator)
        grid = 0.5 * torch.randn(64, 16, 3, 8, 8, generator=generator)  # noise in 4 x 4 patches
        positions = torch.rand(64, 16, generator=generator).argsort(1)
        rows = torch.arange(64)
        grid[rows, positions[:, 0]] += motifs[first]
        grid[rows, positions[:, 1]] += motifs[second]
        image = grid.unflatten(1, (4, 4)).permute(0, 3, 1, 4, 2, 5).reshape(64, 3, 32, 32)
        loss = nn.functional.cross_entropy(head(model(image)), (first + second) % 4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) / 10 < 0.3
