"""Label captions ahead of training: WebDataset shards with captions -> shards with their nouns, for
Recognition.py.

    python scripts/data/extract_nouns.py --source datasets/cc3m --target datasets/cc3m_nouns/cc3m_train \\
        --nltk-data ~/nltk_data
    python scripts/data/extract_nouns.py --source 'datasets/sbu/{00000..00082}.tar' --target datasets/sbu_nouns

Each shard is copied with a member KEY.nouns (names joined by commas) beside KEY.txt. Samples
without nouns keep an empty one and are counted: evaluation scores their images against the empty
text, as NXTP does, and training passes over them. NAME_stats.json beside each shard gives how many
have nouns, by which training finds its length. Shards that are finished and made of the same source
with the same settings are skipped: the same command resumes after an interruption. `--slurm 16`
runs it as 16 tasks of a Slurm job array.

The nouns are NXTP's (dataset/text/nouns.py): common nouns by tag, WordNet base forms. Nothing is
downloaded.
The tagger of
the published labels, NLTK's averaged perceptron, needs its weights in --nltk-data; without it the
lexicon of the pip package textblob stands in.
"""

import json
import sys
import tarfile
from collections import Counter
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from base.caches import digest, have_sizes, sizes_of
from base.errors import BadSample, UserError
from base.limits import WORKERS
from base.processes import in_processes, usable_cores
from base.reading import read_json
from base.text import as_list, lenient_text
from base.writing import atomic_write, check_folder_option, make_folder, write_json
from dataset.sources.remote import plain_stream
from dataset.sources.remote import state_of as file_or_url_state
from dataset.sources.shard_columns import columns_of, plain_name, split_columns, with_columns
from dataset.sources.shard_list import list_shards, shards_below, statistics_names
from dataset.sources.tar import Sample, TarWalk, read_samples
from dataset.sources.tar_writer import add_member
from dataset.sources.tfrecord import is_tfrecord
from dataset.tasks.record import captions_of
from dataset.text.nouns import Nouns, join_nouns, make_tagger, treebank_words
from runtime.config.cli import knob, run_script, section
from runtime.job_array import Sharing, need_all, own_range, submit_array

FORMAT = 2  # raised when shards are written otherwise


@dataclass
class Config:
    """What to label, and how."""

    source: str = knob(
        "", "shards: a folder, or paths and URLs with {00000..00099} and wildcards", required=True
    )
    target: Path | None = knob(None, "folder to write to", required=True)
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
    workers: int = knob(usable_cores(), "processes", low=1, high=WORKERS)
    sharing: Sharing = section(Sharing, flat=True)


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
    counts = labelled(shard, target, settings)
    if counts is not None:
        return counts
    made_of = state_of(shard, settings)
    stats = Path(statistics_names(str(target))[0])
    stats.unlink(missing_ok=True)  # those of an earlier shard of this name
    nouns = extractor(*settings)
    counts = Counter(successes=0, without_caption=0, without_nouns=0)
    with (
        plain_stream(plain_name(shard)) as (file, size),
        atomic_write(target) as temporary,
        tarfile.open(temporary, "w") as archive,
    ):
        for sample in read_samples(TarWalk(file, size)):
            if sample.fault:
                counts["damaged"] += 1
                print(f"{shard}/{sample.key}: {sample.fault}", file=sys.stderr)
                continue
            try:
                caption = caption_of(shard, sample)
            except BadSample as error:
                counts["damaged"] += 1
                print(error, file=sys.stderr)
                continue
            found = nouns(caption)
            if found:
                counts["successes"] += 1
            else:  # kept: evaluation counts the image, training passes over it
                counts["without_nouns" if caption.strip() else "without_caption"] += 1
            sample.members["nouns"] = join_nouns(found).encode()
            for ending, data in sample.members.items():
                add_member(archive, f"{sample.key}.{ending}", data)
    sizes = sizes_of(target.parent, [target])
    write_json(stats, {**counts, "made_of": made_of, "bytes": sizes})
    return dict(counts)


def caption_of(shard: str, sample: Sample) -> str:
    """The text beside an image, empty where there is none; one that the shard's address names
    becomes the sample's .txt. BadSample where that is no text."""
    if columns := columns_of(shard):
        record = with_columns({"key": f"{shard}/{sample.key}", **sample.members}, columns)
        texts = [] if isinstance(record, BadSample) else as_list(captions_of(record))
        sample.members["txt"] = "\n".join(texts).encode()
    return lenient_text(sample.members.get("txt", b""))


def labelled(shard: str, target: Path, settings: tuple) -> dict[str, int] | None:
    """The counts of a shard that is finished, of the same source and settings; else None."""
    try:
        counts = read_json(Path(statistics_names(str(target))[0]), dict)
    except UserError:  # missing or damaged: made again
        return None
    whole = target.exists() and have_sizes(target.parent, counts.pop("bytes", {}))
    same = counts.pop("made_of", None) == state_of(shard, settings)
    return counts if whole and same else None


def state_of(shard: str, settings: tuple) -> str:
    """Changes with the source and the settings."""
    name, query = split_columns(shard)
    return digest(FORMAT, settings, file_or_url_state(name), *([query] if query else []))


def targets_of(shards: list[str], config: Config) -> list[Path]:
    """Where each shard is written. UserError."""
    targets = [config.target / Path(plain_name(shard)).name for shard in shards]
    if frames := [shard for shard in shards if is_tfrecord(plain_name(shard))]:
        raise UserError(f"{frames[0]}: TFRecord; nouns are written into WebDataset shards, .tar")
    twice = [name for name, count in Counter(targets).items() if count > 1]
    if twice:
        raise UserError(
            f"{config.source}: several shards are called {twice[0].name}; label their folders one by one"
        )
    for shard, target in zip(shards, targets, strict=True):
        if Path(plain_name(shard)).resolve() == target.resolve():
            raise UserError(
                f"{config.target}: holds the shards themselves; write to another folder"
            )
    return targets


def merge(shards: list[str], targets: list[Path], config: Config) -> list[dict[str, int]]:
    """The counts of all shards. UserError names the ranges that are missing."""
    pairs = zip(shards, targets, strict=True)
    counts = [labelled(shard, target, settings_of(config)) for shard, target in pairs]
    need_all([count is not None for count in counts], str(config.target), "shards")
    return [count for count in counts if count is not None]


def label(shards: list[str], targets: list[Path], config: Config) -> list[dict[str, int]]:
    """Label the shards of this task's range; their counts."""
    from tqdm import tqdm

    own = own_range(config.sharing, len(shards))
    pairs = [(shards[number], targets[number]) for number in own]
    work = partial(label_pair, settings=settings_of(config))
    results = in_processes(work, pairs, config.workers)
    return list(tqdm(results, total=len(pairs), unit=" shards", disable=None))


def label_pair(pair: tuple[str, Path], settings: tuple) -> dict[str, int]:
    shard, target = pair
    return label_shard(shard, target, settings)


def settings_of(config: Config) -> tuple:
    """What the nouns depend on, beside the captions."""
    return config.tagger, config.nltk_data, config.numbers, config.fixed


def main(config: Config) -> None:
    check_folder_option(config.target, "--target")
    shards = list_shards(config.source)
    targets = targets_of(shards, config)
    there = shards_below(config.target) if config.target.is_dir() else []
    others = set(there) - {str(target) for target in targets}
    if others:
        print(f"{config.target}: also holds {len(others)} shards of other sources", file=sys.stderr)
    extractor(*settings_of(config))  # says at once what is missing
    if config.sharing.slurm:
        submit_array(config.sharing, len(shards), config.target)
        return
    make_folder(config.target, "--target")
    work = merge if config.sharing.merge else label
    counts = work(shards, targets, config)
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    print(json.dumps({"shards": len(counts), **total}))
    if counts and not total["successes"]:
        raise UserError(f"{config.source}: no caption has a noun; is the text in another member?")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
