"""Train a small vocabulary on one's own captions or labels, in seconds.

    python scripts/data/train_vocabulary.py --data pairs.csv --target output/mine/text_tokenizer
    python scripts/data/train_vocabulary.py --data train.jsonl --kind sentencepiece --target pieces.model

wordpiece    BERT's, for Pretrain.py's text_encoder and ALIGN's tokenizer: a Hugging Face folder
bpe          CLIP's merges, for main.py's bpe_path: a .txt.gz file
sentencepiece  LLaMA's, for Recognition.py's tokenizer: a .model file

Data is an annotation file, table or folder with captions (docs/OWN_DATA.md), or `--text question answer`
of downstream tasks, for sentencepiece also lists with labels; or WebDataset shards. The same texts make the same vocabulary.
"""

import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from base.errors import BadSample, UserError
from base.text import as_list
from base.writing import check_folder_option, file_errors, make_folder
from dataset.sources.records import Records
from dataset.sources.shard_list import list_shards
from dataset.sources.shards import read_shard
from dataset.tasks.recognition import label_records, names_of
from dataset.tasks.record import captions_of
from dataset.text import vocabulary
from dataset.text.wordpiece import pre_caption
from runtime.config.cli import knob, run_script

KINDS = ("wordpiece", "bpe", "sentencepiece")


@dataclass
class Config:
    """What to learn from."""

    data: list[str] = knob(
        [], "annotation files, tables, folders with captions, or lists of labels"
    )
    text: list[str] = knob(
        ["caption"], "fields of the texts, such as question answer; not of sentencepiece"
    )
    shards: list[str] = knob([], "WebDataset shards, beside or instead")
    kind: str = knob("wordpiece", "whose form the vocabulary has", choices=KINDS)
    size: int = knob(8000, "pieces at most; bpe: merges", low=100)
    texts: int = knob(500_000, "texts at most: those that the data begin with", low=1, rare=True)
    target: Path | None = knob(None, "what to write: a folder (wordpiece) or a file", required=True)


def captions(config: Config) -> Iterator[str]:
    """Every caption of the data, or text of other fields, one after the other."""
    required = ("image", "caption") if config.text == ["caption"] else config.text
    for address in config.data:
        for record in Records(address, required=required):
            for field in config.text:
                yield from as_list(record[field])
    yield from texts_of_shards(config, captions_of)


def labels(config: Config) -> Iterator[str]:
    """The labels of every image as one text, as they are learnt."""
    for address in config.data:
        for record in label_records(address):
            yield ", ".join(names_of(record))
    yield from texts_of_shards(config, lambda record: ", ".join(names_of(record)))


def texts_of_shards(config: Config, texts_in) -> Iterator[str]:
    """What `texts_in` finds in the samples of shards; samples without are passed over."""
    for shard in (shard for url in config.shards for shard in list_shards(url)):
        for record in read_shard(shard):
            try:
                found = [] if isinstance(record, BadSample) else texts_in(record)
            except BadSample:
                continue
            yield from as_list(found)


def main(config: Config) -> None:
    if not (config.data or config.shards):
        raise UserError("--data (or --shards) is needed: what to learn from")
    if config.target.exists():
        raise UserError(f"{config.target} is there already; remove it, or name another --target")
    check_folder_option(config.target.parent, "--target")
    found = labels(config) if config.kind == "sentencepiece" else captions(config)
    texts = list(islice(found, config.texts))
    if not any(text.strip() for text in texts):
        labels_made = config.shards and config.kind == "sentencepiece"
        remedy = "; scripts/data/extract_nouns.py makes the labels of shards" if labels_made else ""
        where = ", ".join([*config.data, *config.shards])
        raise UserError(f"{where}: no text to learn from{remedy}")
    make_folder(config.target.parent, "--target")
    with file_errors(config.target, "make room or name another --target"):
        write(config, texts)
    print(f"{config.target}: {config.kind} vocabulary of {len(texts):,} texts")


def write(config: Config, texts: list[str]) -> None:
    """Write the vocabulary under another name first: none is ever half there."""
    unfinished = config.target.with_name(f".unfinished_{config.target.name}")
    if unfinished.is_dir():
        shutil.rmtree(unfinished)
    if config.kind == "wordpiece":
        cleaned = {pre_caption(text, max_words=200) for text in texts}
        vocabulary.write_wordpiece(unfinished, cleaned, config.size)
    elif config.kind == "bpe":
        vocabulary.write_merges(unfinished, set(texts), config.size)
    else:
        vocabulary.write_pieces(unfinished, texts, config.size)
    unfinished.replace(config.target)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
