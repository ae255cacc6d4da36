"""Classification.py and eval_knn.py through their real main: every way in, exact resuming, and
every mistake."""

import json
import shutil

import pytest
import torch

from base.errors import UserError
from evaluation.probe import SWEEP
from models.dual_encoder.config import DualConfig
from models.dual_encoder.factory import build_dual
from tests.helpers.classification_runs import ROOT, fine_tuning, flags, neighbours, train
from tests.helpers.processes import run_script
from tests.helpers.runs import lines
from tests.helpers.tiny_open_clip import tiny_open_clip


@pytest.fixture(scope="module")
def pretrained(digitscenes, tmp_path_factory):
    out = tmp_path_factory.mktemp("vit") / "pretrain"
    train(flags(digitscenes, out))
    return out


def test_pre_training_writes_everything(pretrained):
    written = lines(pretrained)
    steps = [line for line in written if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6] and steps[0]["lr"] == 0
    assert [line["step"] for line in written if "val_mAP" in line] == [3, 6]
    metrics = json.loads((pretrained / "result/metrics.json").read_text())
    assert {"mAP", "F1_micro", "precision@5", "best_mAP", "chance"} <= metrics.keys() and metrics[
        "images"
    ] == 24
    from safetensors.torch import load_file

    exported = load_file(pretrained / "model.safetensors")
    saved = torch.load(pretrained / "checkpoint_00000006.pt", weights_only=True)["model"]
    assert not any(key.startswith("ema.") for key in exported)
    assert all(torch.equal(value, saved[f"ema.{key}"]) for key, value in exported.items())
    assert not torch.equal(exported["head.weight"], saved["head.weight"])


def test_a_finished_run_started_again_keeps_its_scores(pretrained, digitscenes, capsys):
    before = json.loads((pretrained / "result/metrics.json").read_text())
    weights = (pretrained / "model.safetensors").read_bytes()
    train(flags(digitscenes, pretrained))
    assert "nothing left to train" in capsys.readouterr().out
    assert json.loads((pretrained / "result/metrics.json").read_text()) == before
    assert (pretrained / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize("opt", ["sgd", "adamw"])
def test_fine_tuning_from_it(opt, digitscenes, pretrained, tmp_path, capsys):
    changes = {
        "image_size": 48,
        "optimizer.opt": opt,
        "optimizer.keras": "true",
        "compat": "original",
    }
    metrics = train(fine_tuning(digitscenes, tmp_path / "run", checkpoint=pretrained, **changes))
    assert {"top1", "top5", "best_top1", "loss"} <= metrics.keys()
    assert "pre_logits.fc.weight" in capsys.readouterr().out  # what was left out is said
    real = digitscenes / "imagefolder/real.json"
    more = {
        "evaluate": "true",
        "image_size": 48,
        "real": real,
        "checkpoint": tmp_path / "run/checkpoint_00000006.pt",
    }
    again = train(fine_tuning(digitscenes, tmp_path / "eval", **more))
    assert again["top1"] == metrics["top1"] and again["real_images"] == len(
        json.loads(real.read_text())
    )
    assert metrics["checkpoint"] == str(tmp_path / "run/model.safetensors")  # what was scored
    val = str(digitscenes / "imagefolder/val")
    alone = ["--evaluate", "--checkpoint", metrics["checkpoint"], "--val-data", val]
    exported = train([*alone, "--output-dir", str(tmp_path / "eval"), "--workers", "0"])
    assert exported["loss"] == pytest.approx(metrics["loss"], rel=1e-5)
    assert "image_size 48, num_classes 10, " in capsys.readouterr().err


def test_a_single_label_may_be_learned_with_the_sigmoid(digitscenes, tmp_path):
    changes = {
        "loss": "sigmoid",
        "multi_label": "false",
        "representation_size": 16,
        "policy": "randaugment",
    }
    assert "top1" in train(fine_tuning(digitscenes, tmp_path / "run", cutmix_alpha=1, **changes))


def test_a_stopped_run_goes_on_exactly(digitscenes, tmp_path):
    """With dropout, both ways of mixing, moving average and Keras' AdamW, whose epsilon depends on the
    update."""
    changes = {"mixup_alpha": 0.2, "cutmix_alpha": 1.0, "optimizer.keras": "true"}
    changes |= {"activation_checkpointing": "true", "accumulate": 2}
    train(flags(digitscenes, tmp_path / "straight", **changes))
    with pytest.raises(SystemExit) as left:
        train(flags(digitscenes, tmp_path / "stopped", max_steps=4, **changes))
    assert left.value.code == 0
    train(flags(digitscenes, tmp_path / "stopped", **changes))
    assert lines(tmp_path / "stopped") == lines(tmp_path / "straight")
    straight, stopped = (
        torch.load(tmp_path / name / "checkpoint_00000006.pt", weights_only=True)["model"]
        for name in ("straight", "stopped")
    )
    assert straight.keys() == stopped.keys()
    assert all(torch.equal(value, stopped[name]) for name, value in straight.items())


def test_two_processes_from_the_command_line(digitscenes, tmp_path):
    """DDP of Classification.py, then kNN on the features of both numbers of processes."""
    run_script("Classification.py", flags(digitscenes, tmp_path / "run", batch_size=4), 2)
    one = neighbours(digitscenes, tmp_path / "one", checkpoint=tmp_path / "run", batch_size=10)
    folders = digitscenes / "imagefolder"
    words = (
        f"--config {ROOT}/configs/eval_knn/debug.yaml --train-data {folders}/train --device cpu "
    )
    words += f"--val-data {folders}/val --checkpoint {tmp_path}/run --output-dir {tmp_path}/two "
    words += f"--cache {tmp_path}/two/cache --batch-size 10"
    run_script("eval_knn.py", words.split(), 2)
    assert json.loads((tmp_path / "two/result/metrics.json").read_text()) == one
    files = [
        sorted(path for path in (tmp_path / name / "cache").rglob("*.npy"))
        for name in ("one", "two")
    ]
    assert len(files[0]) == 4
    for a, b in zip(*files, strict=True):
        assert a.name == b.name and a.read_bytes() == b.read_bytes()


MISTAKES = {
    "nothing to evaluate": ({"evaluate": "true"}, UserError, "or --evaluate with --checkpoint"),
    "unknown model": ({"model": "vit-m/8"}, UserError, "did you mean vit-mu/8"),
    "odd size": ({"image_size": 30}, UserError, "nearest size is 32"),
    "real of a multi-label set": ({"real": "real.json"}, UserError, "no --multi-label"),
    "class list too short": (
        {"classes": "{tmp}/few.txt"},
        UserError,
        "outside the list of 3 classes",
    ),
    "no class list": ({"classes": "{tmp}/none.txt"}, UserError, "no such file"),
    "unknown data set": (
        {"train_data": "torchvision/MNISt", "classes": "none"},
        UserError,
        "did you mean MNIST",
    ),
    "missing data": (
        {"train_data": "{tmp}/nowhere", "classes": "none"},
        UserError,
        "check the path",
    ),
    "average and FSDP": ({"parallel": "fsdp"}, UserError, "use --parallel ddp"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told_before_any_work(mistake, digitscenes, tmp_path):
    changes, kind, words = MISTAKES[mistake]
    (tmp_path / "few.txt").write_text("a\nb\nc\n")
    changes = {k: v.format(tmp=tmp_path) if isinstance(v, str) else v for k, v in changes.items()}
    with pytest.raises(kind, match=words):
        train(flags(digitscenes, tmp_path / "run", **changes))


def test_mistakes_of_evaluation(digitscenes, pretrained, tmp_path):
    folders = {"checkpoint": pretrained, "evaluate": "true"}
    with pytest.raises(UserError, match="no head for 10 classes"):
        train(fine_tuning(digitscenes, tmp_path / "run", **folders))
    with pytest.raises(UserError, match=r"real.json: no such file"):
        train(fine_tuning(digitscenes, tmp_path / "run", real=tmp_path / "real.json"))
    shutil.copytree(digitscenes / "imagefolder/val", tmp_path / "val")
    (tmp_path / "val/one").rename(tmp_path / "val/on")
    with pytest.raises(UserError, match="did you mean one"):
        train(fine_tuning(digitscenes, tmp_path / "run", val_data=tmp_path / "val"))


@pytest.mark.filterwarnings("ignore:.*the best weight decay")
def test_knn_of_a_classifier(digitscenes, pretrained, tmp_path):
    first = neighbours(digitscenes, tmp_path / "knn", checkpoint=pretrained)
    assert first["images"] == 24 and first["width"] == 32 and first["train_images"] == 64 // 2
    assert {"knn1", "knn5", "knn20_weighted", "probe", "chance"} <= first.keys()
    row = json.loads((tmp_path / "knn/result/results.jsonl").read_text())
    assert row["task"] == "linear_probe" and row["metrics"]["lp_acc1"] == first["probe"] / 100
    (tmp_path / "knn/result/metrics.json").unlink()
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "knn/cache").rglob("*.npy")}
    assert neighbours(digitscenes, tmp_path / "knn", checkpoint=pretrained) == first
    assert made == {
        path: path.stat().st_mtime_ns for path in (tmp_path / "knn/cache").rglob("*.npy")
    }
    wide = neighbours(digitscenes, tmp_path / "knn", checkpoint=pretrained, features="pre_logits")
    assert wide["width"] == 16 and len(list((tmp_path / "knn/cache").rglob("*.npy"))) == 8
    test = digitscenes / "imagefolder/test"
    chosen = neighbours(digitscenes, tmp_path / "knn", checkpoint=pretrained, probe_val_data=test)
    assert chosen["knn1"] == first["knn1"] and chosen["probe_l2"] in SWEEP
    assert chosen["probe_train"] <= 100 and 0 <= chosen["probe_val"] <= 100
    for given in ({"linear_probe": "false"}, {"probe_val_fraction": 0.1}):
        with pytest.raises(UserError, match="--probe-val-data and --probe-val-fraction"):
            neighbours(
                digitscenes, tmp_path / "knn", checkpoint=pretrained, probe_val_data=test, **given
            )
    other = shutil.copytree(test, tmp_path / "other")
    next(other.iterdir()).rename(other / "unheard of")
    for knob in ("val_data", "probe_val_data"):  # before any image is encoded
        with pytest.raises(UserError, match="unheard of: not among the"):
            neighbours(digitscenes, tmp_path / knob, checkpoint=pretrained, **{knob: other})
        assert not list((tmp_path / knob).rglob("*.npy"))


def test_knn_counts_unreadable_images(digitscenes, pretrained, tmp_path):
    """Also when their features were kept."""
    for split, count in (("train", 2), ("val", 1)):
        shutil.copytree(digitscenes / "imagefolder" / split, tmp_path / split)
        for file in sorted((tmp_path / split).rglob("*.*"))[:count]:
            file.write_bytes(b"no image")
    data = {"train_data": tmp_path / "train", "val_data": tmp_path / "val", "error_budget": 0.1}
    for _ in range(2):
        found = neighbours(digitscenes, tmp_path / "knn", checkpoint=pretrained, **data)
        assert found["unreadable_images"] == 1 and found["train_unreadable_images"] == 2
        page = (tmp_path / "knn/result/report.html").read_text()
        assert "unreadable images: 1" in page


def test_knn_of_dual_encoders(digitscenes, tmp_path):
    for name in ("CLIP_VITT8_CLIP", "CL2L_VITT8_CL2L"):
        sizes = {
            "image_size": 16,
            "embed_dim": 8,
            "text_width": 32,
            "text_heads": 2,
            "transformer_layers": 1,
        }
        config = DualConfig(model=name, vocab_size=50, **sizes)
        saved = {
            "model": build_dual(config).state_dict(),
            "config": {"network": dict(vars(config))},
        }
        torch.save(saved, tmp_path / "dual.pt")
        found = neighbours(
            digitscenes, tmp_path / name, checkpoint=tmp_path / "dual.pt", features="z"
        )
        assert found["width"] == 8
    with pytest.raises(UserError, match=r"features 'h9': .* has feats, z"):
        neighbours(digitscenes, tmp_path / "knn", checkpoint=tmp_path / "dual.pt", features="h9")


def test_knn_of_simla_and_timm(digitscenes, tmp_path):
    from models.layers.vit import ViT, ViTConfig

    vit = ViT(ViTConfig(32, 16, 32, 2, 4)).state_dict()
    weights = {f"visual_encoder.{key}": value for key, value in vit.items()}
    projection = {"vision_proj.weight": torch.randn(8, 32), "vision_proj.bias": torch.zeros(8)}
    torch.save(
        {"model": weights | projection, "config": {"vision_heads": 4}}, tmp_path / "simla.pth"
    )
    found = neighbours(
        digitscenes, tmp_path / "knn", checkpoint=tmp_path / "simla.pth", features="z"
    )
    assert found["width"] == 8
    name = "timm/test_vit.r160_in1k"
    random = {"checkpoint": "none", "random_weights": True}
    found = neighbours(digitscenes, tmp_path / "timm", model=name, **random)
    assert found["width"] == 64 and found["model"] == name
    with pytest.raises(UserError, match="did you mean timm/test_vit"):
        neighbours(digitscenes, tmp_path / "timm", checkpoint="none", model="timm/test_vi")
    with pytest.raises(UserError, match="give --checkpoint"):
        neighbours(digitscenes, tmp_path / "timm", checkpoint="none")
    with pytest.raises(UserError, match="one label an image"):
        neighbours(
            digitscenes,
            tmp_path / "many",
            checkpoint=tmp_path / "simla.pth",
            train_data=digitscenes / "coyo_labeled/train.jsonl",
            classes=digitscenes / "coyo_labeled/classes.txt",
            data_root=digitscenes,
        )


def test_knn_of_open_clip_and_of_imagenets_flat_folder(digitscenes, tmp_path):
    name = f"open_clip/local-dir:{tiny_open_clip(tmp_path / 'model')}"
    found = neighbours(digitscenes, tmp_path / "knn", model=name, checkpoint="none")
    assert found["model"] == found["checkpoint"] == name and found["width"] == 16
    flat = tmp_path / "flat"
    flat.mkdir()
    rows = []
    for label, folder in enumerate(sorted((digitscenes / "imagefolder/val").iterdir())):
        for file in sorted(folder.iterdir()):
            (flat / f"{folder.name}_{file.name}").symlink_to(file.absolute())
            rows.append(f"{folder.name}_{file.name} {label}")
    (tmp_path / "flat.txt").write_text("\n".join(rows))
    words = {"model": name, "checkpoint": "none", "val_data": flat}
    again = neighbours(digitscenes, tmp_path / "knn", **words)
    for key in ("knn1", "knn5", "images", "chance"):
        assert again[key] == found[key]


def test_knn_asks_for_what_weights_do_not_tell(digitscenes, tmp_path):
    import timm

    weights = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32).state_dict()
    torch.save({"model": weights}, tmp_path / "deit.pth")
    with pytest.raises(UserError, match="state them, such as --mean"):
        neighbours(digitscenes, tmp_path / "knn", checkpoint=tmp_path / "deit.pth")
    stated = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "resize": 36}
    stated |= {"activation": "gelu", "eps": "1e-6", "checkpoint": tmp_path / "deit.pth"}
    assert neighbours(digitscenes, tmp_path / "knn", **stated)["width"] == 192


def test_recipes():
    """Every recipe parses and describes a network; those of the original are the published ones."""
    import Classification
    import eval_knn
    from runtime.config.cli import parse

    found = {}
    for file in sorted((ROOT / "configs/Classification").glob("*.yaml")):
        found[file.stem] = parse(Classification.Config, ["--config", str(file)])
    for file in (ROOT / "configs/eval_knn").glob("*.yaml"):
        parse(eval_knn.Config, ["--config", str(file), "--checkpoint", "run"])
    large = found["vit_l16_coyo300m"]
    assert (
        large.network.num_classes == 21841
        and large.scheduler.sched == "vit_linear"
        and large.optimizer.keras
    )
    tuned, averaged = found["vit_l16_i1k_downstream"], found["vit_l16_i1k_downstream_ema"]
    assert (tuned.network.image_size, averaged.network.image_size) == (384, 512)
    assert (tuned.ema_decay, averaged.ema_decay) == (
        0,
        0.9999,
    ) and averaged.optimizer == tuned.optimizer
    assert found["vit_b16_i1k"].metric == "top1" and large.metric == "mAP"
