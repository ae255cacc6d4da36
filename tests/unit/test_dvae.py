"""The image tokenizer: grids of codes, losses with known values, learning without collapse, and
every file form."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from base.errors import UserError
from models.fusion.dvae import (
    SMALL,
    ImageTokenizer,
    TokenizerConfig,
    code_usage,
    existing_tokenizer,
    image_of,
    reconstruction_loss,
    squeeze_range,
)
from models.fusion.losses import masked_patches
from runtime.checkpoint import export_safetensors, read_weights

TINY = {"vocab_size": 16, "width": 4, "blocks_per_group": 1, "decoder_width": 8}


@pytest.mark.parametrize(("groups", "outputs", "blocks"), [(1, 3, 1), (3, 3, 2), (4, 6, 1)])
def test_shapes_and_geometry_from_weights(groups, outputs, blocks):
    config = TokenizerConfig(
        **TINY | {"groups": groups, "outputs": outputs, "blocks_per_group": blocks}
    )
    tokenizer = ImageTokenizer(config)
    side = tokenizer.reduction
    assert (
        side == 2 ** (groups - 1) and TokenizerConfig.from_state(tokenizer.state_dict()) == config
    )
    image = torch.rand(2, 3, 3 * side, 2 * side)
    codes = tokenizer.codes(image)
    assert (
        codes.shape == (2, 3, 2)
        and codes.dtype == torch.int64
        and codes.min() >= 0
        and codes.max() < 16
    )
    assert torch.equal(codes, tokenizer.logits(image).argmax(1))
    decoded = tokenizer.decode(codes)
    assert decoded.shape == image.shape and decoded.min() >= 0 and decoded.max() <= 1


def test_codes_of_masked_patches_are_those_of_the_grid():
    """Also where an image has fewer masked patches than there is room for; and no other code is computed."""
    torch.manual_seed(0)
    tokenizer = ImageTokenizer(TokenizerConfig(**TINY | {"groups": 3}))
    image = torch.rand(2, 3, 12, 16)
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[0, [1, 5, 11]] = mask[1, 7] = True
    computed = []
    tokenizer.encoder.blocks.output.register_forward_hook(lambda *a: computed.append(a[2].shape))
    found = tokenizer.codes_at(image, masked_patches(mask, 3))
    assert computed == [(2, 16, 3, 1)]
    assert torch.equal(found[mask], tokenizer.codes(image).flatten(1)[mask])
    assert tokenizer.codes(image).flatten(1)[mask].any()


def test_uint8_images_are_those_in_0_to_1():
    torch.manual_seed(0)
    tokenizer = ImageTokenizer(TokenizerConfig(**TINY | {"groups": 2}))
    image = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    torch.testing.assert_close(tokenizer.logits(image), tokenizer.logits(image / 255))


def test_a_code_sees_its_place():
    """Codes are arranged as the image: a change in one corner leaves far codes as they are."""
    torch.manual_seed(0)
    tokenizer = ImageTokenizer(TokenizerConfig(**TINY | {"groups": 2, "vocab_size": 64}))
    image = torch.rand(1, 3, 64, 64)
    changed = image.clone()
    changed[..., :4, -4:] = 1 - changed[..., :4, -4:]
    moved = (tokenizer.logits(image) != tokenizer.logits(changed)).any(1)[0]
    assert moved[:2, -2:].all() and not moved[20:].any() and not moved[:, :12].any()


def test_reconstruction_losses_have_their_textbook_values():
    image = torch.rand(2, 3, 4, 4)
    x = squeeze_range(image)
    assert x.min() >= 0.1 and x.max() <= 0.9
    perfect = torch.logit(x)
    assert reconstruction_loss(perfect, image) < 1e-12
    assert torch.allclose(image_of(perfect), image, atol=1e-6)
    # Laplace on the logit, by change of variables from torch's own density
    location, log_scale = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    density = torch.distributions.Laplace(location, log_scale.exp()).log_prob(
        torch.logit(x)
    ) - torch.log(x * (1 - x))
    torch.testing.assert_close(
        reconstruction_loss(torch.cat([location, log_scale], 1), image), -density.mean()
    )


def test_code_losses_at_their_extremes():
    tokenizer = ImageTokenizer(TokenizerConfig(**TINY, groups=1, outputs=3))
    image = torch.rand(2, 3, 4, 4)
    with torch.no_grad():
        output = tokenizer.encoder.blocks.output.conv
        output.w.zero_()  # every place undecided
        losses = tokenizer(image)
        assert losses["loss_kl"].abs() < 1e-5 and losses["loss_usage"].abs() < 1e-5
        output.b[3] = 1e4  # every place decided for the same code
        losses = tokenizer(image)
        assert (
            abs(losses["loss_kl"] - math.log(16)) < 1e-4
            and abs(losses["loss_usage"] - math.log(16)) < 1e-4
        )


@pytest.mark.parametrize("straight_through", [False, True])
def test_every_parameter_gets_a_gradient(straight_through):
    tokenizer = ImageTokenizer(TokenizerConfig(**TINY, groups=3))
    losses = tokenizer(torch.rand(2, 3, 16, 16), torch.tensor(0.5), straight_through)
    assert set(losses) == {"loss_reconstruction", "loss_kl", "loss_usage"}
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in tokenizer.parameters())


def patches(number: int) -> torch.Tensor:
    """Images of 4 x 4 flat squares in four colours."""
    palette = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.9, 0.1], [0.1, 0.1, 0.9], [0.9, 0.9, 0.1]])
    squares = palette[torch.randint(4, (number, 4, 4))].permute(0, 3, 1, 2)
    return F.interpolate(squares, scale_factor=2, mode="nearest")


def test_it_learns_codes_that_tell_squares_apart():
    torch.manual_seed(0)
    tokenizer = ImageTokenizer(
        TokenizerConfig(
            vocab_size=8, width=8, groups=2, blocks_per_group=1, decoder_width=8, outputs=3
        )
    )
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=1e-2)
    for step in range(120):
        losses = tokenizer(patches(16), temperature=0.1 ** (step / 120))
        (losses["loss_reconstruction"] + 0.01 * losses["loss_usage"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    image = patches(32)
    codes = tokenizer.codes(image)
    error = F.mse_loss(tokenizer.decode(codes), image)
    used, perplexity = code_usage(torch.bincount(codes.flatten(), minlength=8))
    assert error < 0.25 * image.var() and perplexity > 3 and used >= 4 / 8


def test_code_usage():
    assert code_usage(torch.tensor([5, 5, 0, 0])) == pytest.approx((0.5, 2.0))
    assert code_usage(torch.zeros(4)) == pytest.approx((0.0, 1.0))


def test_low_precision_agrees_on_almost_every_code():
    torch.manual_seed(0)
    image = torch.rand(4, 3, 32, 32)
    state = ImageTokenizer(TokenizerConfig(**TINY, groups=3)).state_dict()
    exact = ImageTokenizer.load("x", lambda _: state)
    assert not any(p.requires_grad for p in exact.parameters()) and not exact.training
    low = ImageTokenizer.load("x", lambda _: state, precision="bf16")
    assert low.encoder.blocks.input.w.dtype == torch.bfloat16
    assert (
        low.encoder.blocks.output.conv.w.dtype == low.decoder.blocks.input.w.dtype == torch.float32
    )
    assert low.logits(image).dtype == torch.float32
    assert (low.codes(image) == exact.codes(image)).float().mean() > 0.95
    assert (low.decode(exact.codes(image)) - exact.decode(exact.codes(image))).abs().max() < 0.05
    with pytest.raises(UserError, match="one of fp32, bf16, fp16"):
        exact.freeze("int8")


def test_every_file_form_is_the_same_tokenizer(tmp_path):
    tokenizer = ImageTokenizer(TokenizerConfig(**TINY, groups=2))
    image = torch.rand(1, 3, 8, 8)
    export_safetensors(tokenizer.state_dict(), tmp_path / "own" / "image_tokenizer.safetensors")
    (tmp_path / "openai").mkdir()
    torch.save(tokenizer.encoder.state_dict(), tmp_path / "openai" / "encoder.pkl")
    torch.save(tokenizer.decoder.state_dict(), tmp_path / "openai" / "decoder.pkl")
    torch.save({"model": tokenizer.state_dict()}, tmp_path / "one.pt")
    paths = ["own", "own/image_tokenizer.safetensors", "openai", "openai/encoder.pkl", "one.pt"]
    for path in paths:
        loaded = ImageTokenizer.load(tmp_path / path, read_weights)
        assert torch.equal(loaded.codes(image), tokenizer.codes(image))
        torch.testing.assert_close(
            loaded.decode(loaded.codes(image)), tokenizer.decode(tokenizer.codes(image))
        )
    (tmp_path / "openai" / "decoder.pkl").unlink()
    alone = ImageTokenizer.load(tmp_path / "openai", read_weights)
    assert torch.equal(alone.codes(image), tokenizer.codes(image))
    with pytest.raises(UserError, match="no decoder"):
        alone.decode(alone.codes(image))


def test_mistakes_are_named():
    with pytest.raises(UserError, match="no multiple of 8"):
        ImageTokenizer(TokenizerConfig(**TINY)).codes(torch.rand(1, 3, 20, 16))
    with pytest.raises(UserError, match="not the weights of an image tokenizer"):
        ImageTokenizer.load("x", lambda _: {"weight": torch.ones(1)})
    with pytest.raises(UserError, match="not the weights of one image tokenizer"):
        state = ImageTokenizer(TokenizerConfig(**TINY)).state_dict()
        del state["encoder.blocks.group_1.block_1.res_path.conv_2.b"]
        ImageTokenizer.load("x", lambda _: state)
    with pytest.raises(UserError, match="at least 1"):
        ImageTokenizer(TokenizerConfig(**TINY | {"width": 0}))


def test_the_word_random_stands_for_a_small_untrained_tokenizer():
    tokenizer = ImageTokenizer.load(existing_tokenizer(Path("random")), read=None)
    codes = tokenizer.codes(torch.rand(2, 3, 16, 16))
    assert codes.shape == (2, 4, 4) and codes.min() >= 0 and codes.max() < 32
    with pytest.raises(UserError, match="nowhere does not exist"):
        existing_tokenizer(Path("nowhere"))


@pytest.mark.parametrize(
    "kernels", ["eager_kernels", pytest.param("generated", marks=pytest.mark.slow)]
)
def test_compiled_codes_are_the_same(kernels, request):
    if kernels == "eager_kernels":
        request.getfixturevalue(kernels)
    tokenizer = ImageTokenizer(SMALL, with_decoder=False).freeze("fp32")
    image = torch.rand(2, 3, 16, 16)
    expected = tokenizer.logits(image)
    torch.testing.assert_close(tokenizer.compiled().logits(image), expected, rtol=1e-4, atol=1e-5)
