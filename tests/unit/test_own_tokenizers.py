"""`trained` in place of a tokenizer: learnt from the run's own data, once, and used again."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from PIL import Image

from base.errors import UserError
from dataset.sources.tar_writer import write_shard
from dataset.text import vocabulary
from dataset.text.bpe import ClipTokenizer
from dataset.text.sentencepiece import PieceTokenizer
from dataset.text.wordpiece import Tokenizer
from runtime import own_tokenizers
from runtime.config.cli import parse
from runtime.own_tokenizers import TRAINED, train_tokenizers_if_asked
from scripts import train_dvae
from scripts.data import train_vocabulary
from tests.helpers.processes import ROOT, alive, run_command

CAPTIONS = ["a red square", "ein grünes Quadrat", "一只猫 on a mat", "a blue square on the left"]


@dataclass
class Options:
    """What Pretrain.py's configuration has of it."""

    output_dir: Path
    train_file: list = field(default_factory=list)
    shards: list = field(default_factory=list)
    image_root: Path = Path("")
    text_encoder: str = TRAINED
    image_tokenizer_path: Path | None = None
    method: str = "simla"
    grid: int = 4
    flip: bool = False
    workers: int = 0
    device: str = "cpu"


@dataclass
class LabelOptions:
    """What Recognition.py's has."""

    output_dir: Path
    train_list: list
    tokenizer: Path = Path(TRAINED)
    shards: list = field(default_factory=list)


@pytest.fixture
def forked(monkeypatch):
    """The trainings start at once; test_vocabulary_of_captions_is_made_once starts its own."""
    monkeypatch.setattr(own_tokenizers, "subprocess", SimpleNamespace(run=run_command))


@pytest.fixture
def pairs(tmp_path) -> Path:
    """A folder of 40 images with a caption beside each."""
    folder = tmp_path / "my images"
    folder.mkdir()
    for number in range(40):
        colour = (number * 6, 255 - number * 6, number * 3 % 255)
        Image.new("RGB", (20, 20), colour).save(folder / f"{number:02d}.jpg")
        (folder / f"{number:02d}.txt").write_text(CAPTIONS[number % 4], encoding="utf-8")
    return folder


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """tool(**options): the texts, sorted, and the size that scripts/data/train_vocabulary.py hands to
    the writer of its kind."""
    written = {}
    for kind in ("wordpiece", "merges", "pieces"):

        def write(path, texts, size, kind=kind):
            written[kind] = (sorted(texts), size)
            path.mkdir(parents=True)  # fails where anything is left of an interrupted training

        monkeypatch.setattr(vocabulary, f"write_{kind}", write)

    def run(**options):
        written.clear()
        train_vocabulary.main(train_vocabulary.Config(target=tmp_path / "made/it", **options))
        (tmp_path / "made/it").rmdir()
        return written

    return run


def test_the_tool_learns_from_the_texts_that_were_named(tool, tmp_path):
    rows = [{"image": "a.jpg", "question": "what?", "answer": ["red", "two"]}]
    (tmp_path / "q.json").write_text(json.dumps(rows))
    (tmp_path / "c.json").write_text(json.dumps([{"image": "a.jpg", "caption": "A Dog!"}]))
    (tmp_path / "names.list").write_text("a.jpg : dog,living room\n")
    samples = [("0", {"jpg": b"x", "txt": b"one"}), ("1", {"jpg": b"x"}), ("2", {"txt": b"lost"})]
    samples.append(("3", {"jpg": b"x", "txt": b"two"}))
    write_shard(tmp_path / "0.tar", samples)
    data, questions, shards = ([str(tmp_path / name)] for name in ("c.json", "q.json", "0.tar"))
    (tmp_path / "made/.unfinished_it").mkdir(parents=True)
    assert tool(data=data, size=300) == {"wordpiece": (["a dog"], 300)}
    asked = {"text": ["question", "answer"], "kind": "bpe", "size": 400}
    assert tool(data=questions, **asked) == {"merges": (["red", "two", "what?"], 400)}
    assert tool(data=questions, texts=2, **asked) == {"merges": (["red", "what?"], 400)}
    pieces = {"kind": "sentencepiece", "size": 500}
    found = tool(data=[str(tmp_path / "names.list")], **pieces)
    assert found == {"pieces": (["dog, living room"], 500)}
    found = tool(data=data, shards=shards)
    assert found == {"wordpiece": (["a dog", "one", "two"], 8000)}
    with pytest.raises(UserError, match=r"0\.tar: no text .*extract_nouns\.py makes the labels"):
        tool(shards=shards, kind="sentencepiece")
    with pytest.raises(UserError, match=r"--data \(or --shards\) is needed"):
        tool()
    (tmp_path / "made/it").mkdir()
    with pytest.raises(UserError, match="is there already; remove it, or name another --target"):
        tool(data=data)


def test_vocabulary_of_captions_is_made_once(pairs, tmp_path):
    config = Options(tmp_path / "run", [str(pairs)])
    train_tokenizers_if_asked(config)
    assert config.text_encoder == str(tmp_path / "run/text_tokenizer")
    tokenizer = Tokenizer(config.text_encoder)
    unknown = tokenizer.unk_id
    for caption in CAPTIONS:  # every script of the captions can be spelled
        assert unknown not in tokenizer.encode(caption.lower())
    assert unknown in tokenizer.encode("и")
    before = Path(config.text_encoder, "vocab.txt").stat().st_mtime_ns
    again = Options(tmp_path / "run", [str(pairs)])
    train_tokenizers_if_asked(again)
    assert again.text_encoder == config.text_encoder
    assert Path(again.text_encoder, "vocab.txt").stat().st_mtime_ns == before


def test_image_tokenizer_of_the_images(pairs, tmp_path, monkeypatch, forked):
    monkeypatch.setattr(own_tokenizers, "SMALL_DVAE", ["--width", "4", "--epochs", "2 steps"])
    monkeypatch.setenv("RANK", "0")  # the run's own: not of the training of its tokenizer
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = Options(tmp_path / "run", [str(pairs)], image_tokenizer_path=Path(TRAINED), grid=6)
    config.text_encoder = "bert-base-uncased"
    train_tokenizers_if_asked(config)
    assert (config.image_tokenizer_path / "image_tokenizer.safetensors").is_file()
    used = yaml.safe_load((config.image_tokenizer_path / "config.yaml").read_text())
    assert used["size"] == 6 * 4 and used["flip"] is False  # as the run has them
    assert config.text_encoder == "bert-base-uncased"
    albef = replace(config, method="albef", image_tokenizer_path=Path(TRAINED))
    albef.output_dir = tmp_path / "albef"
    train_tokenizers_if_asked(albef)
    assert albef.image_tokenizer_path is None and not albef.output_dir.exists()


def test_image_tokenizer_of_shards(pairs, tmp_path, monkeypatch):
    texts = [{"jpg": file.read_bytes(), "txt": b"a"} for file in sorted(pairs.glob("*.jpg"))]
    for shard in range(3):
        part = [(f"{n}", texts[n]) for n in range(shard, 40, 3)]
        write_shard(tmp_path / f"shards/{shard}.tar", part)
    shards = str(tmp_path / "shards/{0..2}.tar")
    ran = []
    monkeypatch.setattr(own_tokenizers, "_run", lambda script, options, what: ran.append(options))
    config = Options(tmp_path / "run", [], [shards], image_tokenizer_path=Path(TRAINED))
    config.text_encoder = "bert-base-uncased"
    train_tokenizers_if_asked(config)
    assert ran[0][:2] == ["--data", shards]
    images = train_dvae.find_images(train_dvae.Config(data=[shards], size=8))
    seen = [train_dvae.Crop(8, None, flip=False)(image)["image"] for image in images]
    assert len(seen) == 40 and seen[0].shape == (3, 8, 8)
    reds = sorted(round(255 * float(image[0].mean()) / 6) for image in seen)
    assert reds == sorted(min(number, 42) for number in range(40))
    monkeypatch.setattr(train_dvae, "SHARD_IMAGES", 20)
    monkeypatch.setattr(train_dvae, "HELD_OUT", 5)
    assert len(train_dvae.find_images(train_dvae.Config(data=[shards]))) == 14 + 13


def test_pieces_of_labels_and_merges_of_captions(pairs, tmp_path, forked):
    labels = tmp_path / "train.list"
    labels.write_text("00.jpg : dog,living room\n01.jpg : cat\n" * 5)
    config = LabelOptions(tmp_path / "nxtp", [labels])
    train_tokenizers_if_asked(config)
    tokenizer = PieceTokenizer(config.tokenizer)
    assert len(tokenizer.encode("living room")) <= 4

    options = [
        "--dataset",
        "pairs",
        "--metadata",
        str(pairs),
        "--output-dir",
        str(tmp_path / "clip"),
    ]
    config = parse(import_module("main").Config, [*options, "--bpe-path", TRAINED])
    train_tokenizers_if_asked(config)
    whole = ClipTokenizer(config.bpe_path).encode("square")
    assert len(whole) == 1
    assert config.tokenizer == "bert-base-uncased"


@pytest.mark.parametrize("nouns", [["dog", "living room"], ["dog"]])
def test_labels_of_shards_are_learnt_with_the_comma_that_ends_them(nouns, tmp_path, forked):
    samples = [(f"{n}", {"jpg": b"x", "nouns": ",".join(nouns).encode()}) for n in range(40)]
    write_shard(tmp_path / "0.tar", samples)
    config = LabelOptions(tmp_path / "run", [], shards=[str(tmp_path / "0.tar")])
    train_tokenizers_if_asked(config)
    tokenizer = PieceTokenizer(config.tokenizer)  # which refuses one without
    assert tokenizer.encode("dog,")[-1] == tokenizer.delimiter
    learnt = train_vocabulary.labels(train_vocabulary.Config(shards=config.shards, target=tmp_path))
    assert list(learnt) == 40 * [", ".join(nouns)]


def test_nothing_to_learn_from_is_one_sentence(tmp_path, monkeypatch):
    said = []

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")

    def run(command, env):
        assert not any(name.startswith("TORCHELASTIC_") for name in env)  # no task of torchrun's
        done = run_command(command, env)
        said.append(done.stdout + done.stderr)
        return done

    monkeypatch.setattr(own_tokenizers, "subprocess", SimpleNamespace(run=run))
    with pytest.raises(UserError, match="name a list or table in train_file"):
        train_tokenizers_if_asked(Options(tmp_path / "run"))
    missing = Options(tmp_path / "run", [str(tmp_path / "none.json")])
    with pytest.raises(UserError, match=r"text_tokenizer: could not be trained: .*none\.json"):
        train_tokenizers_if_asked(missing)  # the cause itself, which torchrun repeats
    assert len(said) == 1 and "none.json" not in said[0]  # the run says it, once
    assert not (tmp_path / "run/text_tokenizer").exists()
    write_shard(tmp_path / "0.tar", [("a", {"jpg": b"x", "txt": b"a cat"})])
    unlabelled = LabelOptions(tmp_path / "run", [], shards=[str(tmp_path / "0.tar")])
    with pytest.raises(UserError, match=r"no text to learn from; scripts/data/extract_nouns\.py"):
        train_tokenizers_if_asked(unlabelled)


def test_folder_of_another_run_gets_no_tokenizer(pairs, tmp_path, monkeypatch):
    """The run would be refused, but only after minutes of training in the folder of the other."""
    monkeypatch.setattr(own_tokenizers, "_run", lambda *given: trained.append(given))
    trained: list = []
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoint_00000003.pt").touch()
    for changes in ({}, {"text_encoder": "other", "image_tokenizer_path": TRAINED}):
        config = Options(tmp_path / "run", [str(pairs)])
        vars(config).update(changes)
        with pytest.raises(UserError, match="choose another --output_dir"):
            train_tokenizers_if_asked(config)
    assert not trained
    for resume in ("no", "No", "false"):
        config.text_encoder, config.resume = TRAINED, resume
        train_tokenizers_if_asked(config)
    assert len(trained) == 4  # of the image too, the first time
    (tmp_path / "run/checkpoint_00000003.pt").rename(tmp_path / "run/checkpoint_3.pt.superseded")
    config.text_encoder, config.resume = TRAINED, "auto"
    train_tokenizers_if_asked(config)
    assert len(trained) == 5


def test_a_tokenizer_of_other_data_is_not_used_from_scratch(pairs, tmp_path, forked, monkeypatch):
    """Silently, the captions of a run would be spelled in the words of another's."""
    monkeypatch.setattr(own_tokenizers, "SMALL_DVAE", ["--width", "4", "--epochs", "1 steps"])
    run = tmp_path / "run"

    def start(data, **changes):
        config = Options(run, [str(data)], image_tokenizer_path=Path(TRAINED))
        vars(config).update(changes)
        train_tokenizers_if_asked(config)

    start(pairs)
    monkeypatch.chdir(tmp_path)
    start(Path(pairs.name), resume="no")  # the same folder
    for changes in ({}, {"resume": "no"}, {"text_encoder": "other"}):
        with pytest.raises(UserError, match=r"was learnt from other data .*my images.*; remove it"):
            start(tmp_path / "other.json", **changes)
    start(tmp_path / "other.json", evaluate=True)
    (run / "checkpoint_00000003.pt").touch()  # what it continues with is asked elsewhere
    start(tmp_path / "other.json", resume="yes")
    with pytest.raises(UserError, match="was learnt from other data"):
        start(tmp_path / "other.json", resume="no")
    (run / "learnt_from.json").unlink()  # of an earlier version
    start(tmp_path / "other.json", resume="no")


TASKS = {
    "VQA": {"image": "a", "question": "который?", "question_id": 1, "answer": ["это", "это"]},
    "VE": {"image": "a", "sentence": "который это", "label": "neutral"},
}


@pytest.mark.parametrize("task", TASKS)
def test_vocabulary_of_a_downstream_task(task, tmp_path, forked):
    """Of the field that the task's texts stand in, whether its train_file is one file or several."""
    data = tmp_path / "train.json"
    data.write_text(json.dumps([TASKS[task] | {"dataset": "vqa"}] * 4), encoding="utf-8")
    config = import_module(task).Config()
    config.text_encoder, config.output_dir = TRAINED, tmp_path / "run"
    config.train_file = data if task == "VE" else [data]
    train_tokenizers_if_asked(config)
    tokenizer = Tokenizer(config.text_encoder)
    assert tokenizer.unk_id not in tokenizer.encode("который это")


def test_texts_of_the_other_downstream_tasks():
    nlvr, grounding = (import_module(name).Config() for name in ("NLVR", "Grounding"))
    assert list(nlvr.text_fields) == ["sentence"] and list(grounding.text_fields) == ["text"]
    nlvr.stage = "text_assignment"
    assert nlvr.text_fields == ["caption"]


def test_vqa_takes_the_image_root_of_the_other_scripts():
    vqa = import_module("VQA").Config
    assert parse(vqa, ["--image_root", "images"]).vqa_root == Path("images")


CHILD = """
import os, time
from dataclasses import dataclass
from runtime.config.cli import run_script

@dataclass
class Config:
    pass

def main(config):
    print(os.getpid(), flush=True)
    time.sleep(600)

run_script(main, Config)
"""


def test_what_trains_a_tokenizer_ends_with_the_run_that_asked(tmp_path):
    """Left alone it would hold the folder that the same command, started again, trains in."""
    (tmp_path / "child.py").write_text(CHILD)
    start = f"from runtime import own_tokenizers as own; own._run({str(tmp_path / 'child.py')!r}, [], '')"
    run = subprocess.Popen(
        [sys.executable, "-c", start],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    child = int(run.stdout.readline())
    run.kill()
    run.wait()
    deadline = time.monotonic() + 60
    while alive(child):
        assert time.monotonic() < deadline, "it lives on"
        time.sleep(0.05)


def test_letters_that_are_not_ascii_come_by_how_often_they_are_met(monkeypatch):
    monkeypatch.setattr(vocabulary, "OTHER_LETTERS", 3)
    found = vocabulary.letters_of(["ñ ßöäö", "üüü ä"])
    assert found == [*vocabulary.LETTERS, "ü", "ä", "ö"]
