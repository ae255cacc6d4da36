"""Label captions ahead of training: WebDataset shards with captions -> shards with their nouns, for
Recognition.py.

    python scripts/data/extract_nouns.py --source datasets/cc3m --target datasets/cc3m_nouns --nltk-data ~/nltk_data
    python scripts/data/extract_nouns.py --source 'datasets/sbu/{00000..00082}.tar' --target datasets/sbu_nouns

Each shard is copied with a member KEY.nouns (names joined by commas) beside KEY.txt. Samples
without nouns keep an empty one and are counted: evaluation scores their images against the empty
text, as NXTP does, and training passes over them. NAME_stats.json beside each shard gives how many
have nouns, by which training finds its length. Shards that are finished and made of the same source
with the same settings are skipped: the same command resumes after an interruption.

The nouns are NXTP's (dataset/text/nouns.py): common nouns by tag, WordNet base forms. Nothing is
downloaded.
The tagger of
the published labels, NLTK's averaged perceptron, needs its weights in --nltk-data; without it the
lexicon of the pip package textblob stands in.
"""

import io
import json
import os
import sys
import tarfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from base.errors import UserError
from base.files import atomic_write, digest, file_state, read_json, write_json
from dataset.sources.remote import plain_stream
from dataset.sources.shard_list import list_shards, statistics_names
from dataset.sources.tar import TarWalk, read_samples
from dataset.text.nouns import Nouns, join_nouns, make_tagger, treebank_words
from runtime.config import cli as configuration
from runtime.config.cli import knob

FORMAT = 2  # raised when shards are written otherwise


@dataclass
class Config:
    """What to label, and how."""

    source: str = knob("", "shards: a folder, or paths and URLs with {00000..00099} and wildcards")
    target: Path | None = knob(None, "folder to write to")
    tagger: str = knob(
        "auto",
        "auto: nltk where --nltk-data is given, else lexicon",
        choices=("auto", "nltk", "lexicon"),
    )
    nltk_data: Path | None = knob(
        None, "NLTK's data folder with averaged_perceptron_tagger_eng and punkt_tab"
    )
    numbers: bool = knob(False, "keep nouns with digits in them")
    fixed: bool = knob(
        False,
        "cut noise words as whole words only, and list no name twice; not as published",
        aliases=("mended",),
    )
    workers: int = knob(os.cpu_count() or 1, "processes", low=1)


@cache
def extractor(tagger: str, nltk_data: Path | None, numbers: bool, fixed: bool) -> Nouns:
    """One extractor a process."""
    return Nouns(
        make_tagger(tagger, nltk_data),
        words=treebank_words(nltk_data),
        numbers=numbers,
        fixed=fixed,
    )


def label_shard(shard: str, target: Path, settings: tuple) -> dict[str, int]:
    """Write the shard with nouns and its statistics; the counts of its statistics. Damaged samples
    are left out, named and counted."""
    stats = Path(statistics_names(str(target))[0])
    made_of = digest(FORMAT, settings, shard if "://" in shard else file_state(shard))
    if target.exists() and stats.exists():
        counts = read_json(stats, dict)
        if counts.pop("made_of", None) == made_of:
            return counts
    nouns = extractor(*settings)
    counts = Counter(successes=0, without_caption=0, without_nouns=0)
    with (
        plain_stream(shard) as (file, size),
        atomic_write(target) as temporary,
        tarfile.open(temporary, "w") as archive,
    ):
        for sample in read_samples(TarWalk(file, size)):
            if sample.fault:
                counts["damaged"] += 1
                print(f"{shard}/{sample.key}: {sample.fault}", file=sys.stderr)
                continue
            caption = sample.members.get("txt", b"").decode("utf-8", "replace")
            found = nouns(caption)
            if found:
                counts["successes"] += 1
            else:  # kept: evaluation counts the image, training passes over it
                counts["without_nouns" if caption.strip() else "without_caption"] += 1
            sample.members.pop("nouns", None)
            sample.members["nouns"] = join_nouns(found).encode()
            for ending, data in sample.members.items():
                header = tarfile.TarInfo(f"{sample.key}.{ending}")
                header.size = len(data)
                archive.addfile(header, io.BytesIO(data))
    write_json(stats, {**counts, "made_of": made_of})
    return dict(counts)


def main(config: Config) -> None:
    if not config.source or config.target is None:
        raise UserError("name the shards with --source and the folder to write to with --target")
    config.target.mkdir(parents=True, exist_ok=True)
    shards = list_shards(config.source, {})
    targets = [config.target / Path(shard).name for shard in shards]
    twice = [name for name, count in Counter(targets).items() if count > 1]
    if twice:
        raise UserError(
            f"{config.source}: several shards are called {twice[0].name}; label their folders one by one"
        )
    if any(
        Path(shard).absolute() == target.absolute()
        for shard, target in zip(shards, targets, strict=True)
    ):
        raise UserError(f"{config.target}: holds the shards themselves; write to another folder")
    settings = (config.tagger, config.nltk_data, config.numbers, config.fixed)
    extractor(*settings)  # says at once what is missing
    total = Counter()
    work = partial(label_shard, settings=settings)
    with (
        ProcessPoolExecutor(min(config.workers, len(shards)))
        if config.workers > 1
        else nullcontext() as pool
    ):
        from tqdm import tqdm

        done = (pool.map if pool else map)(work, shards, targets)
        for counts in tqdm(done, total=len(shards), unit=" shards", disable=None):
            total.update(counts)
    print(json.dumps({"shards": len(shards), **total}))


if __name__ == "__main__":
    configuration.run_script(main, Config, __doc__)
