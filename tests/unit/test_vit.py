"""Vision transformer: what holds whatever the weights."""

import pytest
import torch

from base.errors import UserError
from base.pixels import OPENAI
from models.layers.positions import resize_positions
from models.layers.vit import ViT, ViTConfig, patches_of


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    model = ViT(ViTConfig(image_size=32, patch_size=8, width=24, depth=3, heads=4, mask_token=True))
    torch.nn.init.normal_(model.mask_token)
    return model


def test_map_leaves_the_tokens_alone(vit):
    image = torch.randn(2, 3, 32, 32)
    tokens, probabilities = vit(image, map_block=1)
    torch.testing.assert_close(tokens, vit(image))
    assert probabilities.shape == (2, 4, 17, 17)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 4, 17))
    assert torch.autograd.grad(tokens[:, 0].sum(), probabilities)[0].abs().sum() > 0


def test_uint8_images_are_normalised_by_the_network():
    torch.manual_seed(0)
    vit = ViT(ViTConfig(32, 8, 24, 1, 4, pixels=OPENAI))
    image = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in OPENAI)
    torch.testing.assert_close(vit(image), vit((image / 255 - mean) / std))
    assert not [name for name in vit.state_dict() if "normalize" in name]
    with pytest.raises(RuntimeError):  # no statistics: never taken for normalised
        ViT(ViTConfig(32, 8, 24, 1, 4))(image)


def test_masked_patches_are_not_seen(vit):
    image = torch.randn(1, 3, 32, 32)
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, 5] = True
    changed = image.clone()
    changed[:, :, 8:16, 8:16] = 9.0  # patch 5 = row 1, column 1
    assert torch.equal(vit(image, mask), vit(changed, mask))
    assert not torch.allclose(vit(image), vit(changed))


def test_wrong_image_size_says_the_remedy(vit):
    with pytest.raises(UserError, match="image_res"):
        vit(torch.randn(1, 3, 40, 40))


def test_pos_embed_resize():
    pos = torch.randn(1, 17, 8)
    assert resize_positions(pos, 4) is pos
    resized = resize_positions(pos, 7)
    assert resized.shape == (1, 50, 8) and torch.equal(resized[:, 0], pos[:, 0])
    constant = torch.ones(1, 17, 8)
    torch.testing.assert_close(resize_positions(constant, 7), torch.ones(1, 50, 8))
    assert resize_positions(pos.half(), 7).dtype == torch.float16
    with pytest.raises(UserError, match="square"):
        resize_positions(torch.randn(1, 16, 8), 4)


def test_mask_token_and_initialisation():
    model = ViT(ViTConfig(image_size=32, patch_size=8, width=24, depth=1, heads=4, mask_token=True))
    assert model.mask_token.abs().sum() == 0 and model.blocks[0].attn.qkv.bias.abs().sum() == 0
    assert 0 < model.pos_embed.abs().max() < 2.1
    assert not hasattr(ViT(ViTConfig(32, 8, 24, 1, 4)), "mask_token")


def test_a_stem_gives_the_same_patches_and_says_its_shape():
    torch.manual_seed(0)
    plain, hybrid = ViT(ViTConfig(32, 8, 16, 1, 2)), ViT(ViTConfig(32, 8, 16, 1, 2, stem=(4, 6)))
    assert (
        plain(torch.randn(2, 3, 32, 32)).shape
        == hybrid(torch.randn(2, 3, 32, 32)).shape
        == (2, 17, 16)
    )
    assert patches_of(plain.state_dict()) == (8, ()) and patches_of(hybrid.state_dict()) == (
        8,
        (4, 6),
    )
    changed = torch.randn(1, 3, 32, 32).repeat(2, 1, 1, 1)
    changed[1, :, :8, :8] += 1
    maps = hybrid.patch_embed(changed)
    assert not torch.equal(maps[0, 0], maps[1, 0]) and torch.equal(maps[0, -1], maps[1, -1])
    with pytest.raises(UserError, match=r"stem of 3 stages.*no multiple of 8"):
        ViT(ViTConfig(32, 4, 16, 1, 2, stem=(4, 4, 4)))


@pytest.mark.parametrize("learns", [False, True])
def test_statistics_of_the_stem_stay_unless_they_are_to_be_learnt(learns):
    torch.manual_seed(0)
    vit = ViT(ViTConfig(32, 8, 16, 1, 2, stem=(4, 6), stem_statistics=learns)).train()
    images, before = torch.randn(4, 3, 32, 32), {name: x.clone() for name, x in vit.named_buffers()}
    together = vit(images)
    kept = [torch.equal(x, before[name]) for name, x in vit.named_buffers()]
    assert len(kept) == 12 and (not any(kept) if learns else all(kept))
    alone = torch.cat([vit(image) for image in images.split(1)])
    assert torch.allclose(alone, together, atol=1e-5) is not learns
