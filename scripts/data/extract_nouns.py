"""Label captions ahead of training: WebDataset shards with captions -> shards with their nouns, for
Recognition.py.

    python scripts/data/extract_nouns.py --source datasets/cc3m --target datasets/cc3m_nouns --nltk-data ~/nltk_data
    python scripts/data/extract_nouns.py --source 'datasets/sbu/{00000..00082}.tar' --target datasets/sbu_nouns

Each shard is copied with a member KEY.nouns (names joined by commas) beside KEY.txt; samples
without a caption or without nouns are left out and counted. NAME_stats.json beside each shard tells
how many are in it: so training finds its length. Finished shards are skipped: the same command goes
on after an interruption.

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
from itertools import groupby
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from base.errors import UserError  # noqa: E402
from base.files import atomic_write, read_json, write_json  # noqa: E402
from dataset.sources.shards import list_shards, read_tar  # noqa: E402
from dataset.text.nouns import Nouns, join_nouns, make_tagger, treebank_words  # noqa: E402
from runtime.config import cli as configuration  # noqa: E402
from runtime.config.cli import knob  # noqa: E402


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
    mended: bool = knob(
        False, "cut noise words as whole words only, and list no name twice; not as published"
    )
    workers: int = knob(os.cpu_count() or 1, "processes", low=1)


@cache
def extractor(tagger: str, nltk_data: Path | None, numbers: bool, mended: bool) -> Nouns:
    """One extractor a process."""
    return Nouns(
        make_tagger(tagger, nltk_data),
        words=treebank_words(nltk_data),
        numbers=numbers,
        mended=mended,
    )


def label_shard(shard: str, target: Path, settings: tuple) -> dict[str, int]:
    """Write the shard with nouns and its statistics; the counts of its statistics."""
    stats = target.with_name(f"{target.stem}_stats.json")
    if target.exists() and stats.exists():
        return read_json(stats, dict)
    nouns, counts = extractor(*settings), Counter(successes=0, without_caption=0, without_nouns=0)
    with atomic_write(target) as temporary, tarfile.open(temporary, "w") as archive:
        for stem, members in groupby(read_tar(shard, {}), lambda member: _stem(member[0])):
            members = dict(members)
            caption = members.get(f"{stem}.txt", b"").decode("utf-8", "replace")
            found = nouns(caption)
            if not found:
                counts["without_nouns" if caption.strip() else "without_caption"] += 1
                continue
            counts["successes"] += 1
            members.pop(f"{stem}.nouns", None)
            for name, data in (*members.items(), (f"{stem}.nouns", join_nouns(found).encode())):
                header = tarfile.TarInfo(name)
                header.size = len(data)
                archive.addfile(header, io.BytesIO(data))
    write_json(stats, counts)
    return dict(counts)


def _stem(name: str) -> str:
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


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
    settings = (config.tagger, config.nltk_data, config.numbers, config.mended)
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
    configuration.run(main, Config, __doc__)
