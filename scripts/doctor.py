"""Look a data set over before GPUs are spent on it.

    python scripts/doctor.py pairs.csv --image-root images
    python scripts/doctor.py train.json val.json test.json --image-root coco --page doctor.html
    python scripts/doctor.py 'shards/train/{00000..00099}.tar' --tokenizer bert-base-uncased --most 30
    python scripts/doctor.py train.json val.json --image-root coco --fix cleaned
    python scripts/doctor.py 'shards/{00000..69999}.tar' --facts facts --slurm 64 --sbatch partition=cpu

Takes annotation files, tables, class folders and shards, local or remote; several are taken for
splits, the training set first. Finds missing, unreadable, truncated, tiny, huge, rotated and
duplicate images (byte by byte and to the eye), empty, overlong, repeated and wrongly encoded texts,
ids that repeat, boxes outside of their image, answers that are not in the list, classes without
balance, class names that are unknown, unused or alike, and images that one split shares with
another.

With --facts, what is found in a shard (or 256 entries of a list) is kept: an interrupted look
resumes, and tasks of a Slurm job array or several machines share it.

Exit status: 0 where nothing is wrong that training would suffer from, else 1.
"""

import sys
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from base.caches import digest, file_state
from base.errors import UserError
from base.limits import WORKERS
from base.names import check_stems
from base.processes import in_processes, usable_cores
from base.writing import check_folder_option
from runtime.config.cli import knob, run_script, section
from runtime.job_array import Sharing, is_whole, need_all, own_range, submit_array

HARMFUL = ("no answer", "answer not in the list")  # beside what is dropped


@dataclass
class Config:
    """What to look at."""

    POSITIONAL: ClassVar = "data"

    data: list[str] = knob(
        [], "annotation files, tables, folders or shards; the training set first", required=True
    )
    image_root: Path = knob(Path("."), "folder that paths of images start from")
    tokenizer: str = knob("clip", "clip, or a BERT: folder, vocab.txt or hub name")
    most: int = knob(77, "tokens that the model takes of a text", low=2)
    answer_list: Path | None = knob(None, "answers that questions may have (JSON list)")
    classes: Path | None = knob(None, "file with a class name a line that labels may have")
    fix: Path | None = knob(None, "folder to write lists to without what cannot be trained on")
    page: Path | None = knob(None, "HTML page with examples")
    facts: Path | None = knob(None, "folder to keep what is found in: to resume, and to share")
    workers: int = knob(usable_cores(), "processes", low=1, high=WORKERS)
    sharing: Sharing = section(Sharing, flat=True)


def make_examiner(image_root: Path, tokenizer: str, most: int, answer_list: Path | None):
    """The examiner of a process."""
    from dataset.health.samples import Examiner
    from dataset.tasks.vqa import read_answer_list

    if tokenizer == "clip":
        from dataset.text.bpe import ClipTokenizer

        encode = ClipTokenizer().encode
        ends = 2  # start and end
        clean = str
    else:
        from dataset.text.wordpiece import Tokenizer, pre_caption

        encode = Tokenizer(tokenizer).encode
        ends = 0
        clean = partial(pre_caption, max_words=sys.maxsize)

    def tokens(text: str) -> int:
        return len(encode(text)) + ends

    answers = frozenset(read_answer_list(answer_list)) if answer_list else frozenset()
    return Examiner(image_root, tokens, most, answers, clean)


def problem_rows(part) -> list[tuple[str, str, str]]:
    """(problem, samples, example) of everything found in a data set, fatal problems first."""
    from dataset.health.samples import FATAL

    counts = part.counts()
    total = part.samples()
    example = {}
    for facts in part.facts:
        for problem, about in facts.problems.items():
            example.setdefault(problem, about)
    rows = []
    for problem in sorted(counts, key=lambda name: (name not in FATAL, -counts[name])):
        share = f"{counts[problem]:,} ({100 * counts[problem] / total:.1f} %)"
        rows.append((problem, share, example[problem][:100]))
    for finding in part.findings:
        rows.append((finding.problem, f"{finding.classes:,} classes", finding.example[:100]))
    for text, count in part.repeated_texts()[:3]:
        rows.append(("repeated text", f"{count:,}", text[:100]))
    if repeated := part.repeated_ids():
        rows.append(("repeated id", f"{len(repeated):,}", repeated[0]))
    for name, groups in (("same bytes", part.same), ("near duplicates", part.near)):
        if groups:
            names = ", ".join(image.name for image in groups[0][:3])
            rows.append((name, f"{len(groups):,} groups", names[:100]))
    return rows


def figures(part, workers: int) -> list[tuple[str, str]]:
    """(name, value) of what a data set holds."""
    images = part.images()
    lengths = sorted(n for facts in part.facts for n in facts.lengths)
    rows = [("samples", f"{part.samples():,}"), ("images", f"{len(images):,}")]
    sides = sorted(min(image.size) for image in images if min(image.size))
    if sides:
        middle = sides[len(sides) // 2]
        rows.append(("shorter side", f"{sides[0]} to {sides[-1]} pixels, median {middle}"))
    if lengths:
        often = lengths[int(0.95 * (len(lengths) - 1))]
        mean = sum(lengths) / len(lengths)
        rows.append(("tokens", f"{mean:.1f} on average, 95 % up to {often}, most {lengths[-1]}"))
    if part.classes:
        by_size = part.classes.most_common()
        most, high = by_size[0]
        least, low = by_size[-1]
        rows.append(("classes", f"{len(part.classes):,}; {most}: {high:,} … {least}: {low:,}"))
    rate = len(images) / max(part.seconds, 1e-9)
    if rate:
        epoch = part.samples() / rate / workers
        rows.append(("reading", f"{rate:,.0f} images a second and core; an epoch {epoch:,.0f} s"))
    return rows


def check_fixable(data: list[str], folder: Path) -> None:
    """Raise UserError where a data set is no list, or its list would be written over."""
    from dataset.health.survey import is_class_folder
    from dataset.sources.tables import parse_address
    from dataset.tasks.classification import is_shards

    for each in data:
        if is_shards(each):
            raise UserError(
                f"--fix: {each} are shards; clean the list they are made of, then pack it again "
                "with scripts/data/pack.py"
            )
        if is_class_folder(Path(each)):
            raise UserError(
                f"--fix: {each} is a folder a class, which stays as it is; leave out --fix, and "
                "remove the files that the report and --page name"
            )
    check_stems([parse_address(each).path for each in data], "--fix")
    for each in data:
        if fixed_list(each, folder).resolve() == parse_address(each).path.resolve():
            raise UserError(f"--fix {folder}: holds {each} itself; write to another folder")


def fixed_list(data: str, folder: Path) -> Path:
    """Where a list is written without what cannot be trained on."""
    from dataset.sources.tables import parse_address

    return folder / f"{parse_address(data).path.stem}.jsonl"


def write_fixed(part, folder: Path) -> str:
    """Write a list of what is left of a data set, its texts and boxes fixed; returns what was
    done."""
    from base.writing import write_json_lines
    from dataset.health.fixes import fixed_entries, unfit_samples
    from dataset.health.survey import open_list

    entries = open_list(part.data)
    target = fixed_list(part.data, folder)
    left_out = unfit_samples(part.facts, part.unknown_labels) | part.dropped
    kept = [facts for place, facts in enumerate(part.facts) if place not in left_out]
    fixes: Counter = Counter(f"{reason}: left out" for reason in left_out.values())
    rows = fixed_entries(((entries[facts.number], facts) for facts in kept), fixes)
    count = write_json_lines(target, rows)
    done = "".join(f"\n  {name:<40} {number:,}" for name, number in fixes.items() if number)
    return f"{target}: {count:,} of {len(part.facts):,} entries{done}"


def write_page(parts: list, config: Config) -> None:
    """The page with an example of every problem."""
    from base.writing import write_text
    from evaluation.report.health import health_page

    def shown(image) -> tuple[Path | None, str]:
        return config.image_root / image.name, image.name

    tables = []
    problems = {}
    groups = []
    for part in parts:
        tables.append((part.data, ("", ""), figures(part, config.workers)))
        tables.append(
            (f"{part.data}: problems", ("problem", "samples", "such as"), problem_rows(part))
        )
        for facts in part.facts:
            for problem, about in facts.problems.items():
                file = config.image_root / facts.images[0].name if facts.images else None
                problems.setdefault(f"{part.data}: {problem}", []).append((file, about[:200]))
        for name, found in (("same bytes", part.same), ("near duplicates", part.near)):
            if found:
                listed = [[shown(image) for image in group[:6]] for group in found]
                groups.append((f"{part.data}: {name}", listed))
    title = "A look at " + ", ".join(part.data for part in parts)
    write_text(config.page, health_page(title, tables, problems.items(), groups))


def looking_of(config: Config):
    """How the data are looked at."""
    from dataset.health.survey import Looking
    from dataset.tasks.vqa import read_answer_list

    settings = (config.image_root, config.tokenizer, config.most, config.answer_list)
    answers = None
    if config.answer_list:
        read_answer_list(config.answer_list)  # says at once that it is missing, or no list
        answers = file_state(config.answer_list)
    return Looking(
        partial(make_examiner, *settings),
        folder=config.facts,
        root=config.image_root,
        settings=digest(str(config.image_root.absolute()), config.tokenizer, config.most, answers),
    )


def look_at_range(config: Config, looking, works: list) -> None:
    """Keep what is found in this task's range."""
    own = [works[number] for number in own_range(config.sharing, len(works))]
    examined = sum(in_processes(looking.keep, own, config.workers))
    print(f"{config.facts}: {len(own)} of {len(works)} pieces, {len(own) - examined} of them kept")


def main(config: Config) -> None:
    for option, folder in (("--fix", config.fix), ("--facts", config.facts)):
        if folder:
            check_folder_option(folder, option)
    if config.page:
        check_folder_option(config.page.parent, "--page")
    from dataset.health.survey import plan, split_folders, survey

    config.data = split_folders(config.data, names_of_classes(config))
    if config.fix:
        check_fixable(config.data, config.fix)
    works = plan(config.data)
    looking = looking_of(config)
    shared = config.sharing.slurm or config.sharing.merge or not is_whole(config.sharing)
    if shared and config.facts is None:
        raise UserError("--facts: name a folder that all tasks see, to keep what they find")
    if config.sharing.slurm:
        looking.make_examiner()  # likewise of a tokenizer
        submit_array(config.sharing, len(works), config.facts)
        return
    if not is_whole(config.sharing):
        look_at_range(config, looking, works)
        return
    if config.sharing.merge:
        done = list(in_processes(looking.is_kept, works, config.workers))
        need_all(done, str(config.facts), "pieces")
    report(survey(config.data, works, looking, config.workers), config)


def names_of_classes(config: Config) -> list[str]:
    """The folders of the classes that --classes lists."""
    from dataset.sources.class_folder import folder_of
    from dataset.tasks.classification import read_class_names

    listed = read_class_names(config.classes) if config.classes else []
    return [folder_of(name) for name in listed]


def report(parts: list, config: Config) -> None:
    """Print what was found, and write the page and the cleaned lists; exit status 1 for harm."""
    from dataset.health.classes import look_at_classes

    harmful = 0
    look_at_classes(parts, names_of_classes(config))
    for part in parts:
        print(f"\n{part.data}")
        for name, value in figures(part, config.workers):
            print(f"  {name:<24} {value}")
        rows = problem_rows(part)
        print("  nothing wrong" if not rows else "")
        for problem, count, example in rows:
            print(f"  {problem:<24} {count:<18} {example}")
        harmful += sum(finding.harmful for finding in part.findings)
        harmful += len(part.dropped) + sum(bool(set(HARMFUL) & {*f.problems}) for f in part.facts)
    for part in parts if config.fix else ():
        print(write_fixed(part, config.fix))
    if config.page:
        write_page(parts, config)
        print(f"page: {config.page}")
    if harmful:
        sys.exit(1)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
