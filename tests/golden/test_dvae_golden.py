"""The image tokenizer against OpenAI's DALL-E encoder and decoder, small widths."""

import torch

from models.fusion.dvae import ImageTokenizer, TokenizerConfig, image_of, squeeze_range
from tests.golden.report import compare, same
from tests.helpers.golden import decode_image, golden


def test_encoder_decoder_and_codes():
    meta, tensors = golden("simla", "dvae")
    state = {
        key.removeprefix("state."): value
        for key, value in tensors.items()
        if key.startswith("state.")
    }
    config, encoder, decoder = (
        TokenizerConfig.from_state(state),
        meta["config"]["encoder"],
        meta["config"]["decoder"],
    )
    found = [
        config.groups,
        config.vocab_size,
        config.width,
        config.blocks_per_group,
        config.decoder_width,
    ]
    wanted = [
        meta["config"]["groups"],
        *(encoder[name] for name in ("vocab_size", "n_hid", "blocks_per_group")),
    ]
    same("dvae", "sizes", found, [*wanted, decoder["n_init"]])
    same("dvae", "outputs", config.outputs, 2 * decoder["output_channels"])
    tokenizer = ImageTokenizer.load("any", lambda _: state)
    image = next(v for k, v in tensors.items() if k.startswith("in."))
    image = decode_image(image) if image.dtype == torch.uint8 else image
    compare("dvae", "mapped pixels", squeeze_range(image), tensors["out.mapped"], 1e-6)
    compare("dvae", "logits", tokenizer.logits(image), tensors["out.logits"], 1e-5)
    codes = tokenizer.codes(image)
    same("dvae", "image tokens", codes, tensors["out.tokens"])
    one_hot = torch.nn.functional.one_hot(codes, config.vocab_size).permute(0, 3, 1, 2)
    raw = tokenizer.decoder(one_hot)
    compare("dvae", "decoder", raw, tensors["out.decoder_raw"], 1e-5)
    compare("dvae", "reconstruction", image_of(raw), tensors["out.reconstruction"], 1e-5)
    compare("dvae", "reconstruction", tokenizer.decode(codes), tensors["out.reconstruction"], 1e-5)


def test_full_size_matches_the_published_counts():
    with torch.device("meta"):
        tokenizer = ImageTokenizer(TokenizerConfig())
    for part, parameters, tensors in (
        (tokenizer.encoder, 53_786_240, 74),
        (tokenizer.decoder, 43_829_766, 76),
    ):
        assert (
            sum(p.numel() for p in part.parameters()) == parameters
            and len(part.state_dict()) == tensors
        )
