"""The image tokenizer against OpenAI's DALL-E encoder and decoder, small widths."""

import torch

from models.dvae import ImageTokenizer, TokenizerConfig, picture_of, squeeze_range
from tests.helpers.golden import decode_image, golden


def test_encoder_decoder_and_codes():
    meta, tensors = golden("simla", "dvae")
    state = {key.removeprefix("state."): value for key, value in tensors.items() if key.startswith("state.")}
    config = TokenizerConfig.from_state(state)
    assert (config.vocab_size, config.width, config.groups, config.blocks_per_group) == (64, 8, 4, 2)
    assert config.decoder_width == 16 and config.outputs == 6
    tokenizer = ImageTokenizer.load("any", lambda _: state)
    image = next(v for k, v in tensors.items() if k.startswith("in."))
    image = decode_image(image) if image.dtype == torch.uint8 else image
    close = {"atol": meta["tolerance"]["atol"], "rtol": meta["tolerance"]["rtol"]}
    torch.testing.assert_close(squeeze_range(image), tensors["out.mapped"], **close)
    torch.testing.assert_close(tokenizer.logits(image), tensors["out.logits"], **close)
    codes = tokenizer.codes(image)
    assert torch.equal(codes, tensors["out.tokens"].long())
    one_hot = torch.nn.functional.one_hot(codes, 64).permute(0, 3, 1, 2)
    raw = tokenizer.decoder(one_hot)
    torch.testing.assert_close(raw, tensors["out.decoder_raw"], **close)
    torch.testing.assert_close(picture_of(raw), tensors["out.reconstruction"], **close)
    torch.testing.assert_close(tokenizer.decode(codes), tensors["out.reconstruction"], **close)


def test_full_size_matches_the_published_counts():
    with torch.device("meta"):
        tokenizer = ImageTokenizer(TokenizerConfig())
    for part, parameters, tensors in ((tokenizer.encoder, 53_786_240, 74), (tokenizer.decoder, 43_829_766, 76)):
        assert sum(p.numel() for p in part.parameters()) == parameters and len(part.state_dict()) == tensors
