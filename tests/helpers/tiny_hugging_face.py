"""Small models of transformers in folders, with image processor and tokenizer."""

import torch

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "blue", "dog", "cat", "digit"]
TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
VISION = {**TINY, "image_size": 32, "patch_size": 8}
TEXT = {
    **TINY,
    "vocab_size": 32,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}


def save_tokenizer(folder, names: list[str]) -> None:
    """A tokenizer of ten words. names: of its outputs."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {word: number for number, word in enumerate(WORDS)}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=16,
        model_input_names=names,
    )
    tokenizer.save_pretrained(folder)


def clip():
    import transformers

    config = transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=12)
    look = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    return transformers.CLIPModel(config), look, ["input_ids", "attention_mask"]


def metaclip2():
    """MetaCLIP 2 as its library configures it, but two blocks of TINY's width."""
    import transformers

    config = transformers.MetaClip2Config(text_config=TEXT, vision_config=VISION, projection_dim=12)
    look = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    return transformers.MetaClip2Model(config), look, ["input_ids", "attention_mask"]


def siglip():
    import transformers

    config = transformers.SiglipConfig(text_config=TEXT, vision_config=VISION)
    look = transformers.SiglipImageProcessor(size={"height": 32, "width": 32})
    return transformers.SiglipModel(config), look, ["input_ids"]


def siglip2():
    import transformers

    vision = VISION | {"num_patches": 16}
    config = transformers.Siglip2Config(text_config=TEXT, vision_config=vision)
    look = transformers.Siglip2ImageProcessor(patch_size=8, max_num_patches=16)
    return transformers.Siglip2Model(config), look, ["input_ids"]


def align():
    import transformers

    vision = {"image_size": 32, "width_coefficient": 0.1, "depth_coefficient": 0.1}
    vision |= {"depth_divisor": 4, "hidden_dim": 32}
    text = TEXT | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    vision |= {"drop_connect_rate": 0.0, "dropout_rate": 0.0}
    config = transformers.AlignConfig(text_config=text, vision_config=vision, projection_dim=32)
    look = transformers.EfficientNetImageProcessor(
        do_center_crop=True,
        size={"height": 38, "width": 38},
        crop_size={"height": 32, "width": 32},
        resample=2,
        rescale_factor=1 / 127.5,
        rescale_offset=True,
        do_normalize=False,
    )
    network = transformers.AlignModel(config)
    for weight in network.vision_model.parameters():
        if weight.ndim == 4:  # with transformers' std of 0.02 so small a network has features of 0
            torch.nn.init.kaiming_normal_(weight)
    return network, look, ["input_ids", "attention_mask"]


def blip():
    import transformers

    text = TEXT | {"encoder_hidden_size": 32}
    config = transformers.BlipConfig(text_config=text, vision_config=VISION, projection_dim=12)
    config.image_text_hidden_size = 12
    look = transformers.BlipImageProcessor(size={"height": 32, "width": 32})
    network = transformers.BlipForImageTextRetrieval(config)
    return network, look, ["input_ids", "attention_mask"]


def saved(make, folder):
    """The folder of one of these with random weights."""
    torch.manual_seed(0)
    network, look, names = make()
    network.save_pretrained(folder)
    look.save_pretrained(folder)
    save_tokenizer(folder, names)
    return folder
