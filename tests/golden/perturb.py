"""Does a test notice when one recorded number is wrong? Changes them one by one and lists those that nobody misses.

    python -m tests.golden.perturb [--root FOLDER] [--files simla/vit ...] [--most 4]

Each value is changed alone in a copy of the golden folder: the largest element of a tensor or list by one part in a
thousand, integers by one (grey levels of uint8 images by 40), text by a letter. Then the tests that read its file run.
Inputs and settings are left alone. Of values under like names `--most` are tried, spread over all.
"""

import argparse
import json
import os
import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.golden import report
from tests.helpers import golden

HERE = Path(__file__).parent
PROSE = re.compile(
    r"note|description|call|pinned|tolerance|origin|versions?$|weights$|row_order|^case$|source$"
)
SETTINGS = re.compile(
    r"^(config|arguments|flags|hyper|optimizer|schedule|specs|pipeline|soft_label_.*)$"
)
INPUTS = re.compile(
    r"(^|[./])(in|state|weight|init|new|step\d)\.|cotangent|^train\d\.x_|images?(_u8)?(_nhwc)?$"
)
WEIGHTS = re.compile(
    r"\.state\.safetensors|llama_cons|clip_openai|checkpoint_trainable|inputs|batches"
)
PART = 1e-3
Place = tuple  # of keys and indices that lead to a value


class Readers:
    """pytest plugin: which tests read which golden file, by the file's name without its ending."""

    def __init__(self):
        self.tests: dict[str, set[str]] = defaultdict(set)
        self.by_fixture: dict[str, set[str]] = defaultdict(
            set
        )  # of fixtures that several tests share
        self.test = self.fixture = ""
        self.found = golden.golden_file
        golden.golden_file = self.golden_file

    def golden_file(self, *parts: str) -> Path:
        path, name = self.found(*parts), stem(Path(*parts))
        if self.test:
            self.tests[name].add(self.test)
        if self.fixture:
            self.by_fixture[self.fixture].add(name)
        return path

    def pytest_runtest_protocol(self, item):
        self.test = item.nodeid

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef):
        self.fixture = fixturedef.argname
        try:
            return (yield)
        finally:
            self.fixture = ""

    def pytest_runtest_teardown(self, item):
        for fixture in item.fixturenames:
            for name in self.by_fixture[fixture]:
                self.tests[name].add(item.nodeid)


def stem(path: Path) -> str:
    return re.sub(r"\.(json|safetensors)$", "", str(path))


def values(content, place: Place = ()) -> Iterator[Place]:
    """Places of all numbers, texts and flat lists of them below a JSON value."""
    pairs = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in pairs:
        if isinstance(key, str) and (PROSE.search(key) or SETTINGS.search(key)):
            continue
        flat = isinstance(value, list) and not any(isinstance(v, (list, dict)) for v in value)
        if isinstance(value, (dict, list)) and not flat:
            yield from values(value, (*place, key))
        elif value is not None and value != []:
            yield (*place, key)


def changed_scalar(value):
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return f"{value}x"
    if isinstance(value, int):
        return value + 1
    return value * (1 + PART) if value else PART


def changed_tensor(value: torch.Tensor) -> torch.Tensor:
    """A copy whose largest element is another."""
    value = value.clone()
    if not value.numel():
        return value
    flat = value.view(-1)
    place = int(flat.double().abs().argmax())
    if value.dtype == torch.bool:
        flat[place] = ~flat[place]
    elif value.is_floating_point():
        flat[place] = flat[place] * (1 + PART) if flat[place] else PART
    elif value.dtype == torch.uint8 and value.max() > 1:
        flat[place] -= 40
    else:
        flat[place] -= 1
    return value


def change_json(content, place: Place):
    """The content with one value changed."""
    *way, last = place
    below = content
    for key in way:
        below = below[key]
    value = below[last]
    if isinstance(value, list):
        numbers = [v for v in value if isinstance(v, (int, float))]
        index = (
            max(range(len(value)), key=lambda i: abs(value[i])) if len(numbers) == len(value) else 0
        )
        value[index] = changed_scalar(value[index])
    else:
        below[last] = changed_scalar(value)
    return content


def kind_of(place: Place) -> str:
    """Places of one kind have one name: numbers and the names of parameters do not count."""
    names = [re.sub(r"\d+", "#", str(key)) for key in place]
    return ".".join("*" if name.count(".") > 2 or "/" in name else name for name in names)


def chosen(places: list[Place], most: int) -> list[Place]:
    """At most that many of each kind, spread evenly."""
    kinds = defaultdict(list)
    for place in places:
        kinds[kind_of(place)].append(place)
    result = []
    for alike in kinds.values():
        step = max(1, len(alike) // most)
        result += alike[::step][:most]
    return result


def variants(file: Path, most: int) -> Iterator[tuple[str, Path]]:
    """(name of what is changed, temporary file) of each changed copy of a file."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / file.name
        if file.suffix == ".json":
            text = file.read_text(encoding="utf-8")
            for place in chosen(list(values(json.loads(text))), most):
                copy.write_text(json.dumps(change_json(json.loads(text), place)), encoding="utf-8")
                yield ".".join(map(str, place)), copy
        elif file.suffix == ".safetensors" and not WEIGHTS.search(file.name):
            tensors = load_file(file)
            names = [(name,) for name in tensors if not INPUTS.search(name)]
            for (name,) in chosen(names, most):
                save_file({**tensors, name: changed_tensor(tensors[name])}, copy)
                yield name, copy


def passes(root: Path, tests: list[str]) -> bool:
    """Whether these tests pass with the numbers of a folder, in a process of their own."""
    child = os.fork()
    if child == 0:
        os.environ["QUINTET_GOLDEN"] = str(root)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        os._exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests]))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def flip(root: Path, folder: Path) -> None:
    """Links to all files of the golden folder."""
    for file in root.rglob("*"):
        if file.is_file():
            link = folder / file.relative_to(root)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--root", type=Path, help="folder of golden numbers; default: the one the tests use"
    )
    parser.add_argument(
        "--files", nargs="*", default=[""], help="beginnings of file names, such as simla/vit"
    )
    parser.add_argument("--most", type=int, default=4, help="values tried of each kind")
    args = parser.parse_args()
    root = (args.root or golden.golden_root()).resolve()
    os.environ["QUINTET_GOLDEN"] = str(root)
    torch.set_num_threads(1)
    readers = Readers()
    if pytest.main([str(HERE), "-q", "-p", "no:cacheprovider", "--no-header"], plugins=[readers]):
        return 1
    report.RECORDS.clear()
    tried = missed = 0
    with tempfile.TemporaryDirectory() as folder:
        flip(root, Path(folder))
        for file in sorted(path for path in root.rglob("*") if path.is_file()):
            name = str(file.relative_to(root))
            if not name.startswith(tuple(args.files)):
                continue
            tests = sorted(readers.tests.get(stem(Path(name)), ()))
            if not tests and file.suffix in (".json", ".safetensors"):
                print(f"{name}: no test reads it", flush=True)
                continue
            link = Path(folder) / name
            if tests and not passes(Path(folder), tests):
                print(f"{name}: the tests that read it fail unchanged", flush=True)
                continue
            for what, copy in variants(file, args.most):
                link.unlink()
                link.symlink_to(copy)
                tried += 1
                if passes(Path(folder), tests):
                    missed += 1
                    print(f"{name}: {what}: nobody notices", flush=True)
            link.unlink()
            link.symlink_to(file)
    print(f"{tried} values changed, {missed} unnoticed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
