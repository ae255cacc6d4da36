"""An index of the user's own folder of images: unit embeddings, kept on disk, searched exactly."""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from base.caches import file_state
from base.errors import BadSample, UserError
from base.image_names import text_beside
from base.pixels import pixels_digest
from base.reading import parse_json
from base.text import lenient_text, lines_in
from base.writing import write_safetensors
from evaluation.demo.abilities import Embedder

VERSION = 2  # raised when something else is kept
KEPT_EVERY = 2000  # images after which what is done so far is kept
CAPTION_BYTES = 64 << 10
State = tuple[int, ...]  # bytes and times of change (ns) of a file


@dataclass
class Index:
    """files: paths below `root`, one of each row of `images` float32 [N,E]. unreadable: file ->
    what is wrong with it. captions: distinct texts beside the images, one of each row of `texts`
    float32 [T,E]. kept: how many of the images came from the disk."""

    root: Path
    files: list[str]
    images: Tensor
    unreadable: dict[str, str] = field(default_factory=dict)
    captions: list[str] = field(default_factory=list)
    texts: Tensor | None = None
    kept: int = 0

    def __len__(self) -> int:
        return len(self.files)


def nearest_rows(query: Tensor, rows: Tensor, k: int) -> tuple[list[int], Tensor]:
    """The k rows [N,E] most similar to a unit query [E], best first, and the cosines float32 [N] of
    all: one exact matrix product."""
    cosines = rows @ query
    return cosines.topk(min(k, len(rows))).indices.tolist(), cosines


def build_index(
    root: Path,
    files: Sequence[Path],
    embedder: Embedder,
    read: Callable[[Path], Tensor],
    cache: Path,
    batch_size: int = 32,
    progress: Callable[[Iterable, str], Iterable] | None = None,
) -> Index:
    """The index of `files` below `root`; only new and changed files are read.

    read: path -> uint8 [3,H,W], else BadSample, which is noted. What is kept below `cache` depends
    on the network, its transform and the folder; each row on the file's size and time of change.
    progress: wraps the batches, with a name, to show a bar. UserError: no image can be read.
    """
    key = pixels_digest(VERSION, embedder.signature, str(root.absolute()))
    store = Store(cache / f"{key}.safetensors")
    states = {str(file.relative_to(root)): state_of(file) for file in files}
    new = [name for name, state in states.items() if not store.knows(name, state)]
    show = progress or (lambda batches, name: batches)
    groups = [new[start : start + batch_size] for start in range(0, len(new), batch_size)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for number, names in enumerate(show(groups, "indexing"), 1):
            inputs = list(pool.map(reader(root, embedder.view, read), names))
            store.add(names, [states[name] for name in names], inputs, embedder.images)
            if number * batch_size % KEPT_EVERY < batch_size:
                store.keep()
    captions = read_captions(root, states) if embedder.texts else []
    groups = store.unknown_captions(captions, batch_size)
    for texts in show(groups, "captions"):
        store.add_captions(texts, embedder.texts)
    captions = [text for text in captions if text in store.texts]
    if new or groups:
        store.rows = {name: store.rows[name] for name in states}
        store.keep()
    return store.index(root, states, captions, new)


def reader(root: Path, view: Callable, read: Callable) -> Callable[[str], Tensor | str]:
    """name -> the network's input, or what is wrong with the image."""

    def load(name: str) -> Tensor | str:
        try:
            return view(read(root / name))
        except BadSample as error:
            return str(error).removeprefix(f"{root / name}: ")

    return load


def state_of(file: Path) -> State:
    """What changes with the file's content; zeros where it cannot be asked."""
    try:
        return file_state(file)[1:]
    except OSError:
        return 0, 0, 0


def read_captions(root: Path, names: Iterable[str]) -> list[str]:
    """The distinct texts in the files beside the images, one a line, in order."""
    found: dict[str, None] = {}
    for name in names:
        beside = text_beside(root / name)
        if beside and state_of(beside)[0] in range(1, CAPTION_BYTES):
            lines = lines_in(lenient_text(beside.read_bytes()))
            found.update(dict.fromkeys(line.strip() for line in lines if line.strip()))
    return list(found)


class Store:
    """What is known of a folder's images and captions: in memory, and in one file."""

    def __init__(self, file: Path):
        self.file = file
        self.rows: dict[str, tuple[State, Tensor | str]] = {}  # embedding, or what is wrong
        self.texts: dict[str, Tensor] = {}
        if file.is_file():
            self.load()

    def knows(self, name: str, state: State) -> bool:
        return name in self.rows and self.rows[name][0] == state

    def add(self, names, states, inputs: Sequence[Tensor | str], embed: Callable) -> None:
        """Embed the inputs that are images; note what is wrong with the others."""
        images = [each for each in inputs if isinstance(each, Tensor)]
        rows = iter(embed(torch.stack(images)) if images else ())
        for name, state, each in zip(names, states, inputs, strict=True):
            self.rows[name] = (state, next(rows) if isinstance(each, Tensor) else each)

    def unknown_captions(self, captions: Sequence[str], size: int) -> list[list[str]]:
        new = [text for text in captions if text not in self.texts]
        return [new[start : start + size] for start in range(0, len(new), size)]

    def add_captions(self, texts: Sequence[str], embed: Callable) -> None:
        """Embed captions; one of which the network's cleaning leaves no word is left out."""
        try:
            self.texts.update(zip(texts, embed(texts), strict=True))
        except UserError:
            for text in texts if len(texts) > 1 else ():
                self.add_captions([text], embed)

    def index(self, root: Path, states: dict[str, State], captions, new: Sequence[str]) -> Index:
        """The index of the files that are there, `new` ones among them. UserError where none can be
        read."""
        own = {name: self.rows[name][1] for name in states}
        files = [name for name, row in own.items() if isinstance(row, Tensor)]
        unreadable = {name: row for name, row in own.items() if isinstance(row, str)}
        if not files:
            first = next(iter(unreadable.items()), None)
            why = f"none of {len(own)} can be read, {first[0]}: {first[1]}" if first else "none"
            raise UserError(f"{root}: no images to search ({why}); give --images another folder")
        texts = torch.stack([self.texts[text] for text in captions]) if captions else None
        images = torch.stack([own[name] for name in files])
        kept = len({*files} - {*new})
        return Index(root, files, images, unreadable, list(captions), texts, kept)

    def keep(self) -> None:
        """Write all that is known, atomically."""
        files = [name for name, row in self.rows.items() if isinstance(row[1], Tensor)]
        wrong = [name for name, row in self.rows.items() if isinstance(row[1], str)]
        about = {
            "files": [[name, *self.rows[name][0]] for name in files],
            "unreadable": [[name, *self.rows[name]] for name in wrong],
            "captions": list(self.texts),
        }
        table = {}
        if files:
            table["images"] = torch.stack([self.rows[name][1] for name in files])
        if self.texts:
            table["texts"] = torch.stack(list(self.texts.values()))
        about = {"about": json.dumps(about)}
        write_safetensors(self.file, table, about, "name another folder as --cache")

    def load(self) -> None:
        """Read what was kept; a damaged file counts as none."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.file, "pt") as kept:
                about = parse_json((kept.metadata() or {})["about"], self.file, dict)
                tables = {name: kept.get_tensor(name) for name in kept.keys()}  # noqa: SIM118
            images = tables.get("images", ())
            for (name, *state), row in zip(about["files"], images, strict=True):
                self.rows[name] = (tuple(state), row)
            for name, state, reason in about["unreadable"]:
                self.rows[name] = (tuple(state), reason)
            self.texts = dict(zip(about["captions"], tables.get("texts", ()), strict=True))
        except (SafetensorError, UserError, KeyError, ValueError, TypeError, OSError):
            self.rows = {}
            self.texts = {}
