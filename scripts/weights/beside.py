"""Files that other libraries keep beside weights: tokenizers and image processors.

Each tokenizer is written three times over, as transformers 4 and 5 and open_clip want it: the
vocabulary, `tokenizer.json` and `tokenizer_config.json`.
"""

from pathlib import Path
from typing import Any

from base.pixels import RESAMPLING, Pixels
from base.writing import atomic_write, write_json
from dataset.text.bpe import END, PIECES, START, WORD_END, ClipTokenizer
from dataset.text.wordpiece import Tokenizer

PILLOW = {name: number for number, name in RESAMPLING.items()}


def write_clip_tokenizer(tokenizer: ClipTokenizer, folder: Path) -> None:
    """CLIPTokenizer of transformers with these merges.

    Its ids are ours, but that it does not repair texts (ftfy, HTML entities) beforehand.
    """
    from tokenizers import Regex, models, normalizers, pre_tokenizers, processors
    from tokenizers import Tokenizer as Backend

    vocabulary = dict(sorted(tokenizer.backend.get_vocab().items(), key=lambda entry: entry[1]))
    model = models.BPE(
        vocabulary,
        tokenizer.merges,
        end_of_word_suffix=WORD_END,
        continuing_subword_prefix="",
        unk_token=END,
    )
    backend = Backend(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = pre_tokenizers.Split(Regex(PIECES), behavior="removed", invert=True)
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
    ends = [(START, tokenizer.start_id), (END, tokenizer.end_id)]
    backend.post_processor = processors.TemplateProcessing(
        single=[START, "$A", END], special_tokens=ends
    )
    backend.add_special_tokens([START, END])
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    _write_tokenizer(folder, backend, "CLIPTokenizer", tokenizer.context_length, special)
    write_json(folder / "vocab.json", vocabulary)
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in tokenizer.merges)]
    write_lines(folder / "merges.txt", lines)


def write_bert_tokenizer(
    pieces: Tokenizer, longest: int, folder: Path, separator: bool = True
) -> None:
    """BertTokenizer of transformers with this vocabulary, texts of at most `longest` tokens.

    separator: texts end in [SEP]. Its ids are ours for ASCII; ALIGN's tokenizer folds other scripts
    by Unicode's rules, this one by BERT's.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, normalizers, pre_tokenizers, processors

    vocabulary = pieces.backend.get_vocab()
    backend = Backend(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [("[CLS]", pieces.cls_id), ("[SEP]", pieces.sep_id)]
    form = "[CLS] $A [SEP]" if separator else "[CLS] $A"
    backend.post_processor = processors.TemplateProcessing(single=form, special_tokens=ends)
    special = {
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "unk_token": "[UNK]",
        "pad_token": "[PAD]",
        "mask_token": "[MASK]",
    }
    backend.add_special_tokens(list(special.values()))
    # transformers rebuilds the template of its BertTokenizer with [SEP]
    kind = "BertTokenizer" if separator else "PreTrainedTokenizerFast"
    _write_tokenizer(folder, backend, kind, longest, special)
    write_lines(folder / "vocab.txt", sorted(vocabulary, key=vocabulary.get))


def _write_tokenizer(folder: Path, backend, kind: str, longest: int, special: dict) -> None:
    about = {"tokenizer_class": kind, "model_max_length": longest, "do_lower_case": True}
    write_json(folder / "tokenizer_config.json", about | special, indent=2)
    write_json(folder / "special_tokens_map.json", special, indent=2)
    write_lines(folder / "tokenizer.json", [backend.to_str()])


def write_lines(path: Path, lines: list[str]) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def clip_processor(pixels: Pixels, small: int | None = None) -> dict[str, Any]:
    """`preprocessor_config.json`: shorter side to `small` (by default the side), then the centre,
    which transformers cuts a pixel elsewhere where the margin is odd."""
    side = pixels.size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": small or side},
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        **_numbers(pixels),
    }


def square_processor(pixels: Pixels) -> dict[str, Any]:
    """`preprocessor_config.json`: the whole image squeezed to a square."""
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": pixels.size, "width": pixels.size},
        **_numbers(pixels),
    }


def align_processor(side: int, large: int) -> dict[str, Any]:
    """`preprocessor_config.json`: squeezed to a square of `large`, its centre, values -1..1.

    transformers antialiases where it shrinks an image, ALIGN's training does not.
    """
    return {
        "image_processor_type": "EfficientNetImageProcessor",
        "processor_class": "AlignProcessor",
        "do_resize": True,
        "size": {"height": large, "width": large},
        "resample": PILLOW["bilinear"],
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 127.5,
        "rescale_offset": True,
        "do_normalize": False,
        "include_top": False,
    }


def _numbers(pixels: Pixels) -> dict[str, Any]:
    return {
        "resample": PILLOW[pixels.interpolation],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(pixels.mean),
        "image_std": list(pixels.std),
    }
