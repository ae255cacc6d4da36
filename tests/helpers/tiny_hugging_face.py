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


def siglip():
    import transformers

    config = transformers.SiglipConfig(text_config=TEXT, vision_config=VISION)
    look = transformers.SiglipImageProcessor(size={"height": 32, "width": 32})
    return transformers.SiglipModel(config), look, ["input_ids"]


def saved(make, folder):
    """The folder of `clip` or `siglip` with random weights."""
    torch.manual_seed(0)
    network, look, names = make()
    network.save_pretrained(folder)
    look.save_pretrained(folder)
    save_tokenizer(folder, names)
    return folder
