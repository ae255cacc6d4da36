"""The learning benchmark: both sides get the same pairs, one evaluator, a table by seeds."""

import csv
import itertools
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
import torch
import yaml
from PIL import Image
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import Whitespace

from base.errors import UserError
from base.reading import read_json
from base.writing import write_json
from benchmarks import learning, learning_sides, runner
from benchmarks.table import table
from runtime.optim.schedule import Schedule, learning_rate


@pytest.fixture
def config(tmp_path) -> learning.Config:
    """Eight images of one grey level each, two captions an image, the same to train and to test."""
    rows = []
    for number in range(8):
        Image.new("RGB", (60, 50), (30 * number,) * 3).save(tmp_path / f"{number}.png")
        captions = [f"level {'abcdefgh'[number]}", f"grey {'abcdefgh'[number]}"]
        rows.append({"image": f"{number}.png", "caption": captions})
    for name in (learning.TRAIN, learning.TEST):
        write_json(tmp_path / name, rows)
    folder = tmp_path / "runs"
    folder.mkdir()
    return learning.Config(data=tmp_path, folder=folder, device="cpu", report="")


def test_both_sides_read_the_same_pairs(config):
    config.pairs = 10
    assert learning.write_pairs(config) == 10
    rows = read_json(config.folder / "train.json", list)
    ours = [(row["image"], row["caption"]) for row in rows]
    with open(config.folder / "train.csv", newline="") as file:
        head, *theirs = csv.reader(file, delimiter="\t")
    assert head == ["filepath", "title"]
    assert ours == [tuple(row) for row in theirs] and len(set(ours)) == 10
    config.pairs = 0
    assert learning.write_pairs(config) == 16


def test_an_image_may_have_one_caption(config):
    write_json(config.data / "one.json", [{"image": "0.png", "caption": "level a"}])
    assert learning.captions_by_image(config, "one.json") == [(config.data / "0.png", ["level a"])]


def test_recall_counts_what_the_embeddings_find(config):
    """Images by their grey level, captions by the letter that names it; then two levels confused."""
    tokenize = learning_sides.ClipTokenizer(None, learning_sides.CONTEXT)
    last = {int(tokenize([f"grey {'abcdefgh'[n]}"])[0, 2]): n for n in range(8)}
    levels = []

    def embed_image(image: torch.Tensor) -> dict:
        levels.extend(image.mean((1, 2, 3)).tolist())
        return {"z": torch.eye(8)[torch.tensor(levels).argsort().argsort()]}

    def embed_text(ids: torch.Tensor) -> dict:
        return {"z": torch.eye(8)[[last[int(row[2])] for row in ids]]}

    assert learning.recall(config, embed_image, embed_text, learning_sides.clip_tokens) == {
        "captions": 100,
        "images": 100,
    }
    last = {token: max(number, 1) for token, number in last.items()}
    levels.clear()
    found = learning.recall(config, embed_image, embed_text, learning_sides.clip_tokens)
    assert found["captions"] == pytest.approx(87.5) and found["images"] == pytest.approx(87.5)


def test_the_table_has_mean_standard_error_and_every_seed():
    runs = [{"captions": 50.0, "images": 40.0, "speed": 90.0}]
    runs.append({"captions": 54.0, "images": 43.0, "speed": 110.0})
    results = {"ours": [learning.row(runs)]}
    head, _, row = table(results, learning.COLUMNS).splitlines()
    assert head.startswith("|  | R@1 of captions (each seed) | R@1 of images (each seed) |")
    assert row == "| ours | 52.0 ± 2.0 (50.0, 54.0) | 41.5 ± 1.5 (40.0, 43.0) | 100 |"
    assert learning.row(runs[:1])["captions"] == "50.0 ± inf (50.0)"  # one seed tells no error


def test_both_sides_have_the_same_learning_rates(config):
    scheduler = pytest.importorskip("open_clip_train.scheduler")
    config.warmup = 10
    options = SimpleNamespace(**vars(config) | {"seeds": [0], "turn": 0, "side": "ours"})
    given = dict(itertools.pairwise(learning_sides.clip_words(options)))
    schedule = Schedule(
        sched="rocket",
        warmup=given["--warmup"],
        warmup_lr=float(given["--lr-start"]),
        min_lr=float(given["--lr-end"]),
    )
    sizes = {"total": 40, "epoch_steps": 20, "batch": config.batch}
    ours = learning_rate(schedule, float(given["--lr"]), **sizes)
    optimizer = SimpleNamespace(param_groups=[{}])
    theirs = scheduler.cosine_lr(optimizer, config.lr, config.warmup, 40)
    assert [ours(step) for step in range(40)] == pytest.approx([theirs(s) for s in range(40)])


@pytest.mark.slow
def test_both_sides_train_and_are_evaluated(config, capsys, monkeypatch):
    monkeypatch.setattr(runner, "current_load", lambda: 0.0)
    pytest.importorskip("webdataset", reason="open_clip's training script needs it")
    config.tiny, config.batch, config.warmup, config.seeds = True, 4, 1, [0, 1]
    learning.main(config)
    said = capsys.readouterr().out
    turns = [line.split(":")[0] for line in said.splitlines() if line[-1:] == "}"]
    assert turns == ["ours 1/2", "open_clip 1/2", "open_clip 2/2", "ours 2/2"]
    for side in ("ours", "open_clip"):
        (row,) = [line for line in said.splitlines() if line.startswith(f"| {side} |")]
        each = [float(number) for number in re.findall(r"\d+\.\d", row)]
        assert len(each) == 8 and all(0 <= value <= 100 for value in each)
    assert "8 samples" in said
    assert "--seeds 0 1" in said
    the_same_network_and_loss(config)


def the_same_network_and_loss(config):
    """open_clip's weights give the same loss and the same gradients in our run's network."""
    import open_clip

    ours = learning_sides.open_clip_run(config, config.folder / "ours_0")[0].__self__
    open_clip.add_model_config(config.folder / "open_clip_small.json")
    theirs = open_clip.create_model("open_clip_small")
    file = config.folder / "open_clip_0/checkpoints/epoch_1.pt"
    weights = torch.load(file, weights_only=True)["state_dict"]
    ours.load_state_dict(weights)
    theirs.load_state_dict(weights)
    images = torch.randn(3, 3, 48, 48)
    ids = learning_sides.clip_tokens(["level a", "grey b", "a grey level c"])
    loss = ours(image=images, text_ids=ids)["clip_loss"]
    their_loss = open_clip.ClipLoss()(*theirs(images, ids))
    torch.testing.assert_close(loss, their_loss)
    loss.backward()
    their_loss.backward()
    for name, parameter in theirs.named_parameters():
        grad = ours.get_parameter(name).grad
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-3, atol=1e-6, msg=name)


# ---- ALBEF beside Pretrain.py
PRETRAIN = """
import json
from pathlib import Path

import ruamel_yaml
import torch
import utils
from dataset import create_dataset, create_loader
from models.model_pretrain import ALBEF
from models.tokenization_bert import BertTokenizer
from optim import create_optimizer


def main(args, config):
    tokenizer = BertTokenizer.from_pretrained(args.text_encoder)
    pairs = create_dataset("pretrain", config)
    loader = create_loader([pairs], batch_size=[config["batch_size"]], num_workers=[4])
    model = ALBEF(config=config, text_encoder=None, tokenizer=tokenizer, init_deit=True)
    state = torch.load(args.checkpoint, weights_only=True)["model"]
    utils.MetricLogger().synchronize_between_processes()
    seen = {
        "text": tokenizer(["a grey", "level a a"], padding="longest", max_length=25).input_ids.tolist(),
        "pairs": pairs.rows,
        "view": repr(pairs.view.transforms),
        "scale": pairs.view.transforms[0].scale,
        "workers": loader,
        "vision": model.vision,
        "temperature": create_optimizer(config["optimizer"], model),
        "seed": args.seed,
        "config": config,
        "world": torch.distributed.get_world_size(),
    }
    Path(args.output_dir, "seen.json").write_text(json.dumps(seen))
    # what training changes here: all images become alike
    state["vision_proj.weight"].zero_()
    torch.save({"model": state}, Path(args.output_dir, "checkpoint_%02d.pth" % (config["schedular"]["epochs"] - 1)))
"""
MODEL = """
import torch
from models.vit import VisionTransformer


class BertForMaskedLM:
    def __init__(self, config):
        self.config = config


class ALBEF:
    def __init__(self, text_encoder, tokenizer, config, init_deit):
        BertForMaskedLM.from_pretrained(text_encoder, config=None)
        vit = VisionTransformer(
            img_size=config["image_res"], patch_size=16, embed_dim=768, depth=12, num_heads=12
        )
        self.vision = vit.given
        self.temp = torch.nn.Parameter(torch.tensor(config["temp"]))
        weights = torch.hub.load_state_dict_from_url(url="https://example.org/deit.pth")["model"]
        assert weights["pos_embed"].shape == (1, 37, 96)
"""
VIT = """
class VisionTransformer:
    def __init__(self, **given):
        self.given = given
"""
DATA = """
import json

import cv2
from torchvision import transforms


class RandomAugment:
    pass


class Pairs:
    def __init__(self, files, view):
        self.rows = [row for file in files for row in json.load(open(file))]
        self.view = view


def create_dataset(kind, config):
    steps = [
        transforms.RandomResizedCrop(config["image_res"], scale=(0.2, 1.0)),
        transforms.RandomHorizontalFlip(),
        RandomAugment(2, 7, isPIL=True),
        transforms.ToTensor(),
    ]
    return Pairs(config["train_file"], transforms.Compose(steps))


def create_loader(datasets, batch_size, num_workers):
    return num_workers
"""
OPTIM = """
def create_optimizer(options, model):
    return "trained" if model.temp.requires_grad else "fixed"
"""
UTILS = """
class MetricLogger:
    def synchronize_between_processes(self):
        raise RuntimeError("wants CUDA")
"""
CHECKOUT = {  # with the interfaces of ALBEF that the benchmark calls and adjusts
    "Pretrain.py": PRETRAIN,
    "models/__init__.py": "",
    "models/model_pretrain.py": MODEL,
    "models/vit.py": VIT,
    "dataset/__init__.py": DATA,
    "optim/__init__.py": OPTIM,
    "utils.py": UTILS,
}


@pytest.fixture
def with_peer(config, tmp_path) -> learning.Config:
    """`config` with a stand-in of ALBEF's checkout and a tokenizer of the captions' words."""
    for name, text in CHECKOUT.items():
        file = tmp_path / "peer" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "level", "grey", *"abcdefgh"]
    backend = tokenizers.Tokenizer(
        WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    backend.pre_tokenizer = Whitespace()
    (config.data / "tokenizer").mkdir()
    backend.save(str(config.data / "tokenizer/tokenizer.json"))
    config.peer = str(tmp_path / "peer")
    return config


def test_a_checkout_is_asked_for(config, tmp_path):
    config.peer = str(tmp_path)
    with pytest.raises(UserError, match="takes a checkout of ALBEF"):
        learning.main(config)


def test_our_side_reads_the_originals_configuration(with_peer):
    with_peer.warmup, with_peer.epochs = 300, 4
    learning_sides.prepare_albef(with_peer)
    method = read_json(with_peer.folder / "albef.yaml", dict)
    recipe = learning_sides.albef_recipe(with_peer)
    for name in ("image_res", "vision_width", "embed_dim", "queue_size", "temp", "momentum"):
        assert getattr(recipe, name) == method[name]
    assert recipe.optimizer.lr == method["optimizer"]["lr"] == with_peer.lr
    assert recipe.optimizer.weight_decay == 0.02 and recipe.optimizer.scalar_lr_scale == 0
    assert method["schedular"]["warmup_epochs"] == 3
    assert (recipe.scheduler.duration, recipe.scheduler.warmup) == ("4", "300 steps")
    assert recipe.scheduler.original_warmup and recipe.scheduler.min_lr == 1e-5
    # both start from the same file, not from DeiT and BERT, which the original names in its code
    assert recipe.vision_weights is None and recipe.text_weights is None


def test_the_verdict_compares_means_by_their_standard_error():
    ours = [{"captions": 50.0, "images": 40.0}, {"captions": 54.0, "images": 44.0}]
    theirs = [{"captions": 53.0, "images": 47.0}, {"captions": 57.0, "images": 47.0}]
    assert learning.verdict({"ours": ours, "original": theirs}).splitlines() == [
        "R@1 of captions: ours is below original's mean by more than the standard error "
        "(difference -3.0 ± 2.8).",
        "R@1 of images: ours is below original's mean by more than the standard error "
        "(difference -5.0 ± 2.0).",
    ]
    theirs = [{"captions": 52.0, "images": 42.0}, {"captions": 56.0, "images": 46.0}]
    lines = learning.verdict({"ours": ours, "original": theirs}).splitlines()
    assert [line.split(" below")[0] for line in lines] == [
        "R@1 of captions: ours is not",
        "R@1 of images: ours is not",
    ]
    lines = learning.verdict({"ours": ours, "original": theirs[:1]}).splitlines()
    assert all("± inf" in line and "is not" in line for line in lines)


@pytest.mark.slow
def test_the_original_trains_on_the_same_pairs_weights_and_views(with_peer, capsys, monkeypatch):
    monkeypatch.setattr(runner, "current_load", lambda: 0.0)
    with_peer.tiny, with_peer.batch, with_peer.seeds = True, 4, [3]
    learning.main(with_peer)
    said = capsys.readouterr().out
    assert "Learning of a small ALBEF" in said and "8 samples" in said
    # all images alike: the first is found, and so is one image of eight for each caption
    (row,) = [line for line in said.splitlines() if line.startswith("| original |")]
    assert row.split("|")[3].strip() == "12.5 ± inf (12.5)"
    folder = with_peer.folder
    seen = read_json(folder / "original_3/seen.json", dict)
    assert seen["pairs"] == read_json(folder / "train.json", list) and len(seen["pairs"]) == 8
    assert seen["text"] == [[2, 7, 6, 0], [2, 5, 7, 7]]
    assert seen["vision"] == {
        "img_size": 48,
        "patch_size": 8,
        "embed_dim": 96,
        "depth": 2,
        "num_heads": 4,
    }
    assert seen["scale"] == [0.8, 1.0] and seen["view"].count("Identity") == 2
    assert seen["workers"] == [1] and seen["seed"] == 3 and seen["world"] == 1
    assert seen["config"]["schedular"]["lr"] == seen["config"]["optimizer"]["lr"] == with_peer.lr
    assert seen["temperature"] == "fixed"
    # our side started from the same weights: its config names the file that the original read
    ours = yaml.safe_load((folder / "ours_3/config.yaml").read_text())
    assert Path(ours["checkpoint"]) == (folder / "start_3.pth").absolute()
    assert ours["optimizer"]["lr"] == with_peer.lr and ours["queue_size"] == 1024
    assert ours["optimizer"]["scalar_lr_scale"] == 0 and ours["scheduler"]["original_warmup"]
    start = torch.load(folder / "start_3.pth", weights_only=True)["model"]
    end = torch.load(folder / "original_3/checkpoint_00.pth", weights_only=True)["model"]
    assert [name for name in start if not torch.equal(start[name], end[name])] == [
        "vision_proj.weight"
    ]
