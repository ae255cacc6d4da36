"""Work that processes share or wait for without a time limit: codes, shards, class folders."""

import datetime
import json
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from base import distributed
from base.distributed import World
from dataset.images.albef import PretrainTransform
from dataset.sources import class_folder, shard_list
from dataset.sources.records import Records
from dataset.sources.shards import shard_sources
from dataset.tasks import pretrain
from dataset.tasks.classification import LabelOptions, Labels, shared_split
from dataset.tasks.pretrain import CodeCache, PretrainPair, write_codes
from tests.contract.stream_cases import Build, write_shards
from tests.helpers.processes import spawn
from tests.unit.test_dataset_pairs import MeanTokenizer


def place(rank, size):
    return World(rank, size, rank, torch.device("cpu"))


def write_images(folder, count):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.new("RGB", (40, 30), (number, 7 * number, 90)).save(folder / f"{number}.png")


def compute_codes(rank, folder, size):
    folder = Path(folder)
    records = Records(folder / "list.json")
    build = PretrainPair(PretrainTransform(64, 32, fixed_geometry=True), folder / "images")
    tokenizer = MeanTokenizer()
    calls = []
    codes = tokenizer.codes
    tokenizer.codes = lambda image: calls.append(len(image)) or codes(image)
    options = {"batch_size": 2, "workers": 1, "world": place(rank, size)}
    write_codes(folder / f"{size}.npy", records, build, tokenizer, **options)
    shares = {1: [11], 2: [6, 5]}  # batches of two take turns: 0 2 4 and 1 3 5, the last of one
    assert sum(calls[1:]) == shares[size][rank]
    assert len(CodeCache(folder / f"{size}.npy", 11).codes) == 11


def test_processes_share_the_visual_codes(tmp_path):
    write_images(tmp_path / "images", 11)
    entries = [{"image": f"{n}.png", "caption": "x"} for n in range(11)]
    (tmp_path / "list.json").write_text(json.dumps(entries))
    compute_codes(0, tmp_path, 1)
    spawn(compute_codes, 2, str(tmp_path), 2)
    one, two = (np.load(tmp_path / f"{size}.npy") for size in (1, 2))
    assert (one == two).all() and len(np.unique(one)) > 5
    assert pretrain.stored_key(tmp_path / "1.npy") == pretrain.stored_key(tmp_path / "2.npy")


def slow_first_process(rank, store):
    limit = datetime.timedelta(seconds=2)
    distributed.shutdown()
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=limit
    )

    def work():
        time.sleep(3)
        return "done"

    assert distributed.on_main(work, patient=True) == "done"
    with distributed.rank_0_first():
        time.sleep(3 if rank == 0 else 0)


def test_a_slow_first_process_is_waited_for(tmp_path):
    spawn(slow_first_process, 2, str(tmp_path / "store"))


def look_up(rank, folder):
    """Only the first process may look at the shards and folders."""
    folder = Path(folder)
    if rank:
        shard_list.list_shards = class_folder.files_below = None
    sources = shard_sources([f"{folder}/wds"], Build(), 10)
    assert sources[0].found.counts == (3, 4) and len(sources[0]) == 7
    labels = Labels(2, LabelOptions(), "x")
    knobs = SimpleNamespace(data_root=folder, download=False, error_budget=0.01)
    split = shared_split(str(folder / "classes"), lambda image: image, labels, (), knobs)
    assert len(split) == 5 and split.load(4)["labels"] == [1]


def test_one_process_looks_through_shards_and_folders_for_all(tmp_path):
    write_shards(tmp_path / "wds", (3, 4))
    for path in (tmp_path / "wds").glob("*.json"):
        path.unlink()
    write_images(tmp_path / "classes/a", 3)
    write_images(tmp_path / "classes/b", 2)
    spawn(look_up, 2, str(tmp_path))
