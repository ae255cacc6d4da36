"""Real images to begin with: 430 captioned photographs and drawings of Debian's tuxpaint-stamps-default.

    python scripts/data/get_stamps.py data/stamps
    python scripts/data/get_stamps.py data/stamps --deb tuxpaint-stamps-default_2022.06.04-1_all.deb
    python scripts/data/get_stamps.py data/stamps --languages en de fr --fold 2

Animals, food, plants, vehicles ... on transparent ground, each with a caption in about 65 languages.
The package (161 MB, GPL-2) is fetched by apt; it is used here, never part of this repository.

Makes OUT/images (each stamp on several colours), pairs_{train,test}.json (images and captions, as
Pretrain.py, Retrieval.py and main.py read them), names_{train,test}.json (images and what they show,
the caption's noun first, as Recognition.py reads them), classes/{train,test}/CLASS (8 classes,
on white, as eval_knn.py reads them), wds/{train,test} (shards), labels.json, templates.json and
dataset_catalog.json (eval_zeroshot.py), sheet.jpg (a look at all of it) and LICENCE. Whole subjects
are held out: no image of the test set has its caption, its name or its look in the training set.
--fold takes another fifth. Several languages: an image has a caption in each, the split stays the
same, and pairs_test_LANGUAGE.json has those of one.
"""

import argparse
import hashlib
import io
import json
import lzma
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from base.errors import UserError, first_line
from base.writing import write_bytes, write_json
from runtime.advice import ends_with_advice

PACKAGE = "tuxpaint-stamps-default"
STAMPS = "usr/share/tuxpaint/stamps/"
COPYRIGHT = f"usr/share/doc/{PACKAGE}/copyright"
SIDE = 256  # pixels of the square images
MARGIN = 16  # pixels around a stamp
COLOURS = {  # grounds, the first for evaluation
    "white": (255, 255, 255),
    "sky": (168, 205, 235),
    "grass": (150, 190, 120),
    "sand": (225, 205, 165),
    "grey": (128, 128, 128),
}
# Folder of stamps -> class. Folders that mix everything, such as town, have no class.
CLASSES = {
    "animals": "an animal", "food": "food", "plants": "a plant", "vehicles": "a vehicle",
    "household": "a household object", "clothes": "clothing", "space": "space",
    "hobbies": "a hobby",
}  # fmt: skip
# Folder of stamps -> what all images in it show.
KINDS = {
    "animals": "animal", "birds": "bird", "mammals": "mammal", "fish": "fish", "insects": "insect",
    "rodents": "rodent", "cats": "cat", "dogs": "dog", "deer": "deer", "apes": "ape", "food": "food",
    "fruit": "fruit", "vegetables": "vegetable", "nuts": "nut", "plants": "plant",
    "flowers": "flower", "trees": "tree", "mushrooms": "mushroom", "vehicles": "vehicle",
    "clothes": "clothing", "hats": "hat", "tools": "tool", "planets": "planet",
    "music": "musical instrument",
}  # fmt: skip
NOUN_WORDS = 3  # a longer subject of a caption is a sentence, no name
FOLDS = 5


class Stamp(NamedTuple):
    """An image with its captions. name: path without ending, such as animals/birds/owl."""

    name: str
    image: bytes
    captions: dict[str, str]  # by language

    @property
    def file(self) -> str:
        return self.name.replace("/", "-")


# ---- the package
def fetch(folder: Path) -> Path:
    """The package's file, fetched by apt. UserError."""
    hint = f"fetch the package {PACKAGE} where there is a network and give its file as --deb"
    if shutil.which("apt-get") is None:
        raise UserError(f"no apt-get on this machine; {hint}")
    command = ["apt-get", "download", "-qq", PACKAGE]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    found = sorted(folder.glob("*.deb"))
    if done.returncode or not found:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(f"apt-get download {PACKAGE}: {last}; try apt-get update, or {hint}")
    return found[0]


def files_in(deb: Path) -> dict[str, bytes]:
    """Content by path of every file that a Debian package installs. UserError."""
    data = data_archive(deb)
    try:
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            files = [member for member in archive if member.isfile()]
            return {
                file.name.removeprefix("./"): archive.extractfile(file).read() for file in files
            }
    except (OSError, EOFError, tarfile.TarError, lzma.LZMAError) as error:
        raise UserError(f"{deb}: damaged ({first_line(error)}); fetch it again") from None


def data_archive(deb: Path) -> bytes:
    """The data.tar of a Debian package, an ar archive: a header of 60 bytes before each part. It is
    packed in a way that tarfile knows; zstd, which Python reads from 3.14 on, is undone. UserError."""
    content = deb.read_bytes() if deb.is_file() else b""
    place = 8
    while content[:8] == b"!<arch>\n" and content[place + 48 : place + 58].strip().isdigit():
        name = content[place : place + 16]
        size = int(content[place + 48 : place + 58])
        data = content[place + 60 : place + 60 + size]
        if name.startswith(b"data.tar"):
            return without_zstd(data, deb) if name.startswith(b"data.tar.zst") else data
        place += 60 + size + size % 2
    raise UserError(f"{deb}: no Debian package; give the file of {PACKAGE}")


def without_zstd(data: bytes, deb: Path) -> bytes:
    """The unpacked data. UserError."""
    if shutil.which("zstd") is None:
        raise UserError(f"{deb}: packed by zstd, a program that is not here; install it")
    done = subprocess.run(["zstd", "-dc"], input=data, capture_output=True)
    if done.returncode:
        raise UserError(f"{deb}: damaged ({done.stderr.decode().strip()}); fetch it again")
    return done.stdout


def stamps_of(files: dict[str, bytes]) -> list[Stamp]:
    """The captioned stamps, without letters, signs and cartoons."""
    found = []
    for path in sorted(files):
        name = path.removeprefix(STAMPS).removesuffix(".png")
        folders = name.split("/")[:-1]
        text = files.get(f"{STAMPS}{name}.txt")
        if not path.endswith(".png") or text is None or not folders:
            continue
        if folders[0] == "symbols" or "cartoon" in folders:
            continue
        captions = captions_of(text.decode("utf-8", "replace"))
        if captions:
            found.append(Stamp(name, files[path], captions))
    return found


def captions_of(text: str) -> dict[str, str]:
    """Caption by language of a stamp's .txt: English in its first line, then `de.utf8=...`."""
    first, *lines = text.splitlines() or [""]
    captions = {"en": first.strip()}
    for line in lines:
        language, mark, caption = line.partition(".utf8=")
        if mark and caption.strip():
            captions[language.strip()] = caption.strip()
    return {language: caption for language, caption in captions.items() if caption}


# ---- images
def cut_out(image: bytes):
    """A stamp, RGBA, as large as it is in the square image."""
    from PIL import Image

    stamp = Image.open(io.BytesIO(image)).convert("RGBA")
    scale = (SIDE - 2 * MARGIN) / max(stamp.size)
    size = [max(1, round(scale * side)) for side in stamp.size]
    return stamp.resize(size, Image.Resampling.LANCZOS)


def on_ground(stamp, colour: tuple[int, int, int]):
    """A square RGB image of a stamp that is cut out, in the middle of one colour."""
    from PIL import Image

    ground = Image.new("RGBA", (SIDE, SIDE), (*colour, 255))
    ground.alpha_composite(stamp, ((SIDE - stamp.width) // 2, (SIDE - stamp.height) // 2))
    return ground.convert("RGB")


def write_images(stamps: list[Stamp], folder: Path) -> None:
    """images/NAME-COLOUR.jpg of every stamp."""
    folder.mkdir(parents=True)
    for stamp in stamps:
        cut = cut_out(stamp.image)
        for name, colour in COLOURS.items():
            on_ground(cut, colour).save(folder / f"{stamp.file}-{name}.jpg", quality=90)


# ---- splits
def subjects(stamps: list[Stamp], folder: Path) -> list[int]:
    """A number for each stamp, the same for those that share a caption, a name but for its digits,
    or the look."""
    from dataset.health.duplicates import near_duplicates
    from dataset.health.samples import examine_file

    groups: dict[object, list[int]] = defaultdict(list)
    for number, stamp in enumerate(stamps):
        caption = stamp.captions.get("en") or min(stamp.captions.values())
        groups[caption.lower().strip(" .!")].append(number)
        groups["name", stamp.name.rstrip("0123456789_-").removesuffix("-a")].append(number)
    images = [examine_file(folder, f"{stamp.file}-white.jpg") for stamp in stamps]
    alike = near_duplicates([image.signature for image in images])
    leader = list(range(len(stamps)))
    for group in [*groups.values(), *alike]:
        first = min(leader[number] for number in group)
        merged = {leader[number] for number in group}
        leader = [first if each in merged else each for each in leader]
    return leader


def is_test(stamps: list[Stamp], leader: list[int], fold: int) -> list[bool]:
    """Whether each stamp is held out: a fifth of the subjects of every class, another in each fold."""
    by_class: dict[str, set[int]] = defaultdict(set)
    for number in set(leader):
        by_class[stamps[number].name.split("/")[0]].add(number)
    chosen = set()
    for numbers in by_class.values():
        order = sorted(numbers, key=lambda n: hashlib.sha256(stamps[n].name.encode()).digest())
        chosen |= {number for place, number in enumerate(order) if place % FOLDS == fold}
    return [number in chosen for number in leader]


# ---- what is written of them
def subject(caption: str) -> str:
    """What an English caption names: `A crow (Corvus), flying.` -> `crow`."""
    words = re.split(r"[(,;:.!—]", caption)[0].lower().split()
    while words and words[0] in ("a", "an", "the", "some"):
        words.pop(0)
    return " ".join(words)


def names_of(stamp: Stamp) -> list[str]:
    """What it shows: the caption's subject, the last word of that, and its folders' kinds."""
    noun = subject(stamp.captions.get("en", ""))
    words = noun.split()
    names = [noun, words[-1]] if 0 < len(words) <= NOUN_WORDS else []
    names += [KINDS[folder] for folder in reversed(stamp.name.split("/")[:-1]) if folder in KINDS]
    return list(dict.fromkeys(names))


def captions_in(stamp: Stamp, languages: list[str]) -> list[str]:
    """Its captions in the order of the languages, each once."""
    found = [stamp.captions[language] for language in languages if language in stamp.captions]
    return list(dict.fromkeys(found))


def write_split(out: Path, split: str, stamps: list[Stamp], languages: list[str]) -> int:
    """Lists, class folders and shards of one split; returns the number of images."""
    from dataset.sources.tar_writer import write_shard, write_statistics

    colours = list(COLOURS) if split == "train" else list(COLOURS)[:1]
    rows = []
    samples = []
    named = []
    for stamp in stamps:
        captions = captions_in(stamp, languages)
        names = names_of(stamp)
        for colour in colours:
            file = f"{stamp.file}-{colour}.jpg"
            rows.append({"image": f"images/{file}", "caption": captions, "stamp": stamp.name})
            if names:
                named.append({"image": f"images/{file}", "labels": names})
            image = (out / "images" / file).read_bytes()
            about = json.dumps({"captions": captions}).encode()
            key = file.removesuffix(".jpg").replace(".", "_")
            samples.append(
                (key, {"jpg": image, "txt": "\n".join(captions).encode(), "json": about})
            )
            if (kind := stamp.name.split("/")[0]) in CLASSES and colour == colours[0]:
                target = out / "classes" / split / kind
                target.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(out / "images" / file, target / file)
    write_json(out / f"pairs_{split}.json", rows, indent=1)
    write_json(out / f"names_{split}.json", named, indent=1)
    for language in languages if split == "test" and len(languages) > 1 else []:
        write_json(out / f"pairs_test_{language}.json", pairs_in(stamps, language), indent=1)
    shard = out / "wds" / split / "00000.tar"
    write_statistics(shard, write_shard(shard, samples))
    return len(rows)


def pairs_in(stamps: list[Stamp], language: str) -> list[dict[str, str]]:
    """Test images and their captions in one language, of the stamps that have one."""
    ground = next(iter(COLOURS))
    rows = []
    for stamp in stamps:
        if caption := stamp.captions.get(language):
            rows.append({"image": f"images/{stamp.file}-{ground}.jpg", "caption": caption})
    return rows


def write_sheet(stamps: list[Stamp], out: Path, columns: int = 20, side: int = 96) -> None:
    """sheet.jpg, a contact sheet of all stamps, each on the next colour."""
    from PIL import Image

    rows = -(-len(stamps) // columns)
    sheet = Image.new("RGB", (columns * side, rows * side), (255, 255, 255))
    for number, stamp in enumerate(stamps):
        colour = list(COLOURS)[number % len(COLOURS)]
        with Image.open(out / f"images/{stamp.file}-{colour}.jpg") as image:
            cell = image.resize((side, side))
        sheet.paste(cell, (number % columns * side, number // columns * side))
    sheet.save(out / "sheet.jpg", quality=85)


def make(out: Path, deb: Path, languages: list[str], fold: int) -> str:
    """Write everything; returns a line that says what."""
    files = files_in(deb)
    stamps = stamps_of(files)
    known = sorted({language for stamp in stamps for language in stamp.captions})
    for language in languages:
        if language not in known:
            hint = f"; it has {', '.join(known)}" if known else ""
            raise UserError(f"{deb}: no captions in {language}{hint}")
    write_images(stamps, out / "images")
    train = []
    test = []
    held_out = is_test(stamps, subjects(stamps, out / "images"), fold)
    for stamp, in_test in zip(stamps, held_out, strict=True):
        if captions_in(stamp, languages):
            (test if in_test else train).append(stamp)
    trained = write_split(out, "train", train, languages)
    tested = write_split(out, "test", test, languages)
    write_json(out / "labels.json", {"stamps": [[CLASSES[kind]] for kind in sorted(CLASSES)]})
    write_json(out / "templates.json", {"stamps": ["{}.", "a photo of {}.", "an image of {}."]})
    catalog = {"stamps": {"type": "imagefolder", "path": "classes", "test": "test"}}
    for name in ("", *(f"_{language}" for language in languages if len(languages) > 1)):
        pairs = {"type": "retrieval", "path": f"pairs_test{name}.json", "images": "."}
        catalog[f"captions{name}"] = pairs
    write_json(out / "dataset_catalog.json", catalog)
    write_sheet([*train, *test], out)
    write_bytes(out / "LICENCE", files.get(COPYRIGHT, b"GPL-2; see the package\n"))
    return (
        f"{len(train) + len(test)} stamps: {trained:,} training images of {len(train)}, "
        f"{tested} test images of {len(test)} other subjects; see {out}/sheet.jpg"
    )


@ends_with_advice
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--deb", type=Path, help="file of the package; without it apt fetches it")
    parser.add_argument("--languages", nargs="+", default=["en"], help="of captions (%(default)s)")
    parser.add_argument("--fold", type=int, default=0, choices=range(FOLDS), help="held-out fifth")
    options = parser.parse_args(argv)
    if options.out.exists() and any(options.out.iterdir()):
        raise UserError(f"{options.out}: not empty; remove it, or name another folder")
    with tempfile.TemporaryDirectory() as folder:
        deb = options.deb or fetch(Path(folder))
        print(make(options.out, deb, options.languages, options.fold))
    return 0


if __name__ == "__main__":
    sys.exit(main())
