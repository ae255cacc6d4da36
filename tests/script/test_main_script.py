"""main.py through its real main: every method trains, continues exactly, and every mistake is one
clear message."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import main as script
from base.errors import UserError
from models.dual_encoder.config import DualConfig
from runtime.checkpoint import CheckpointFolder
from runtime.config.cli import parse
from runtime.sharded import is_sharded
from tests.contract.test_parallel import needs_fsdp2
from tests.helpers.main_runs import ROOT, arguments, finish
from tests.helpers.runs import lines

METHODS = {
    "CLIP": (["--model", "CLIP_VITT8_CLIP"], {"clip_loss"}),
    "CL2L": (["--model", "CL2L_VITT8_CL2L"], {"clip_loss"}),
    "CL2L without local views": (
        ["--model", "CL2L_VITT8_CL2L", "--num-augs", "0", "--separate-proj", "false"],
        {"clip_loss"},
    ),
    "CL2L with shared projectors": (
        ["--model", "CL2L_VITT8_CL2L", "--separate-proj", "false"],
        {"clip_loss"},
    ),
    "SiamLIP": (["--model", "CL2L_VITT8_SIAMLIP"], {"clip_loss", "siamlip_loss"}),
    "BYOLIP": (["--model", "CL2L_VITT8_SIAMLIP", "--momentum"], {"clip_loss", "siamlip_loss"}),
    "BarLIP": (
        ["--model", "CL2L_VITT8_BARLIP", "--separate-proj-child"],
        {"clip_loss", "barlip_loss"},
    ),
    "SwALIP": (
        ["--model", "CL2L_VITT8_SWALIP", "--label-smoothing", "0"],
        {"clip_loss", "swalip_loss"},
    ),
    "SwALIPV1": (
        ["--model", "CLIP_VITT8_SWALIPV1", "--swalip-freeze-proto-iters", "1"],
        {"clip_loss", "swalip_loss"},
    ),
    "SLIP": (["--model", "SLIP_VITT8"], {"clip_loss", "ssl_loss"}),
    "SimCLR": (
        ["--model", "SIMCLR_VITT8", "--separate-proj", "false", "--val-folder", "none"],
        {"ssl_loss"},
    ),
    "SigLIP": (["--model", "CLIP_VITT8_SIGLIP"], {"siglip_loss"}),
}


def run_main(flags):
    script.main(parse(script.Config, flags))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_validates(method, digitscenes, tmp_path):
    flags, terms = METHODS[method]
    run_main([*arguments(digitscenes, tmp_path / "run", epochs="3 steps"), *flags])
    written = lines(tmp_path / "run")
    steps = [line for line in written if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert terms <= steps[0].keys()
    assert ("val_acc1_z" in written[-1]) == (method != "SimCLR")
    assert ("val_acc1_zh_0.5" in written[-1]) == (flags[1].startswith("CL2L"))
    assert (tmp_path / "run/model.safetensors").exists()


@pytest.mark.parametrize("method", ["CL2L with shared projectors", "BYOLIP"])
def test_a_stopped_run_goes_on_exactly(method, digitscenes, tmp_path):
    flags = [*METHODS[method][0], "--text-dropout-prob", "0.3", "--workers", "0"]
    run_main(arguments(digitscenes, tmp_path / "straight", *flags))
    with pytest.raises(SystemExit) as left:
        run_main(arguments(digitscenes, tmp_path / "stopped", *flags, max_steps=4))
    assert left.value.code == 0
    run_main(arguments(digitscenes, tmp_path / "stopped", *flags))
    assert lines(tmp_path / "stopped") == lines(tmp_path / "straight")
    states = [
        torch.load(tmp_path / name / "checkpoint_00000006.pt", weights_only=True)
        for name in ("straight", "stopped")
    ]
    assert states[0]["model"].keys() == states[1]["model"].keys()
    assert all(
        torch.equal(value, states[1]["model"][name]) for name, value in states[0]["model"].items()
    )
    teacher = [name for name in states[0]["model"] if name.startswith("momentum_model.")]
    assert bool(teacher) == (method == "BYOLIP")
    if teacher:  # it follows, but is not the student
        moved = [
            not torch.equal(states[0]["model"][n], states[0]["model"][n.split(".", 1)[1]])
            for n in teacher
        ]
        assert any(moved)


def test_weights_of_the_losses():
    """Of CL2L's directions the mean or the sum; SLIP's weight, but none for SimCLR alone."""
    one, two, four = torch.tensor(1.0), torch.tensor(2.0), torch.tensor(4.0)
    losses = {"clip_loss": one, "clip_loss_image": four, "swalip_loss": two, "clip_acc": four}
    for mode, expected in (("avg", 1 + 0.7 * 2), ("sum", 2 + 0.7 * 2)):
        config = DualConfig(loss_avg_or_sum=mode, swalip_weight=0.7)
        assert script.total_loss(losses, config).item() == pytest.approx(expected)
    config = DualConfig(model="SLIP_VITS16", ssl_scale=0.5, loss_avg_or_sum="sum")
    assert script.total_loss({"clip_loss": one, "ssl_loss": two}, config) == 2
    assert script.total_loss({"ssl_loss": two}, config) == 2


def test_cached_features_make_one_large_batch(digitscenes, tmp_path):
    flags = ["--model", "CLIP_VITT8_CLIP", "--epochs", "2 steps", "--workers", "0"]
    run_main(arguments(digitscenes, tmp_path / "large", *flags, batch_size=16))
    more = {"batch_size": 8, "accumulate": 2}
    run_main(arguments(digitscenes, tmp_path / "cached", *flags, "--cache-features", **more))
    run_main(arguments(digitscenes, tmp_path / "plain", *flags, **more))
    large, cached, plain = (
        lines(tmp_path / name)[0]["clip_loss"] for name in ("large", "cached", "plain")
    )
    assert cached == pytest.approx(large, rel=1e-5) and plain < 0.9 * large


@pytest.mark.parametrize(
    "format", ["yfcc15m", "cc12m", "coco", "redcaps", "merged_opendata", "pairs", "wds"]
)
def test_every_collection(format, digitscenes, tmp_path):
    files = {
        "yfcc15m": ("yfcc15m/yfcc15m.pkl", "yfcc15m"),
        "cc12m": ("cc12m.npy", ""),
        "coco": ("coco/captions_train2017.json", "images"),
        "redcaps": ("redcaps/redcaps.json", "redcaps"),
        "merged_opendata": ("cc3m.npy---cc12m.npy---yfcc15m/yfcc15m.pkl", "------yfcc15m"),
        "pairs": ("pretrain_train.json", ""),
        "wds": ("", ""),
    }[format]
    metadata, root = (
        "---".join(str(digitscenes / part) for part in name.split("---")) for name in files
    )
    flags = ["--dataset", format, "--epochs", "2 steps", "--val-folder", "none", "--text-augment"]
    flags += [
        "--synonym-replacement-prob",
        "0",
        "--byol-augment",
        "--workers",
        "0",
        "--batch-size",
        "4",
    ]
    if format == "wds":
        flags += ["--shards", digitscenes / "wds/train"]
    run_main(
        list(arguments(digitscenes, tmp_path / "run", metadata=metadata, root=root))
        + list(map(str, flags))
    )
    assert lines(tmp_path / "run")[-1]["step"] == 2


def figures(folder) -> list[dict]:
    """Losses and gradient norms by step; accuracies of a network that knows nothing hang on its
    last digits."""
    return [{k: v for k, v in line.items() if "acc" not in k} for line in lines(folder)]


@needs_fsdp2
def test_two_processes_train_as_one_does(digitscenes, tmp_path):
    """With FSDP2; with DDP every method does in tests/loops/test_main_loop.py."""
    flags = [*METHODS["BarLIP"][0], "--workers", "1", "--epochs", "3 steps"]
    two = arguments(digitscenes, tmp_path / "two", *flags, batch_size=4, parallel="fsdp")
    said = finish(2, two)
    assert "Warning" not in said, said  # ours, torch's or another library's
    finish(1, arguments(digitscenes, tmp_path / "one", *flags, batch_size=8))
    for two, one in zip(figures(tmp_path / "two"), figures(tmp_path / "one"), strict=True):
        assert two == pytest.approx(one, rel=2e-3, abs=1e-5)
    two, one = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "one"))
    scales = [name for name in one if name.endswith("logit_scale")]
    assert (
        len(scales) == 2
    )  # scalars, which FSDP2 does not take: their gradients are averaged by us
    for name in scales:
        assert two[name].item() == pytest.approx(one[name].item(), abs=1e-5), name


@pytest.mark.slow
def test_compiled_equals_eager(digitscenes, tmp_path):
    for name, how in (("eager", "false"), ("compiled", "true")):
        run_main(
            arguments(
                digitscenes, tmp_path / name, *METHODS["CLIP"][0], epochs="2 steps", compile=how
            )
        )
    for compiled, eager in zip(
        figures(tmp_path / "compiled"), figures(tmp_path / "eager"), strict=True
    ):
        assert compiled == pytest.approx(eager, rel=1e-4)


def test_evaluate_scores_a_run(digitscenes, tmp_path, capsys):
    run_main(arguments(digitscenes, tmp_path / "run", checkpoint_format="sharded"))
    trained = lines(tmp_path / "run")[-1]
    expected = {k.removeprefix("val_"): v for k, v in trained.items() if k.startswith("val_")}
    newest = CheckpointFolder(tmp_path / "run").numbered()[0]
    assert is_sharded(newest) and expected["chance"] == 10
    for checkpoint, size in ((tmp_path / "run/model.safetensors", 16), (newest, 1)):
        capsys.readouterr()
        flags = ["--evaluate", "--checkpoint", checkpoint, "--batch-size", size]
        run_main(arguments(digitscenes, tmp_path / "other", *flags))
        assert json.loads(capsys.readouterr().out) == expected


def test_starting_from_weights_and_from_a_text_encoder(digitscenes, tmp_path):
    run_main(arguments(digitscenes, tmp_path / "first", epochs="1 steps"))
    weights = tmp_path / "first/model.safetensors"
    still = {"lr": 0, "lr_start": 0, "lr_end": 0, "epochs": "1 steps"}
    lock = {"lock": "image"}  # whose weights are the file's
    run_main(
        arguments(digitscenes, tmp_path / "second", resume=weights, **lock, **still)
    )  # as the original's --resume FILE
    run_main(arguments(digitscenes, tmp_path / "third", init_text_encoder=weights, **still))
    first, second, third = (
        load_file(tmp_path / name / "model.safetensors") for name in ("first", "second", "third")
    )
    assert all(
        torch.equal(first[name], second[name])
        for name in first
        if "running" not in name and "num_" not in name
    )
    blocks = [name for name in first if name.startswith("transformer.")]
    assert blocks and all(torch.equal(first[name], third[name]) for name in blocks)


MISTAKES = {
    "unknown model": ({"model": "CL2L_VITT9_CL2L"}, "CL2L_VITT8_CL2L"),
    "unknown data set": ({"dataset": "cc4m"}, "cc3m"),
    "metadata missing": ({"metadata": "nowhere.npy"}, "nowhere.npy"),
    "root missing": ({"root": "no/such/folder"}, "no/such/folder"),
    "root of other images": ({"root": ROOT / "configs"}, "none of the first"),
    "metadata of another collection": ({"dataset": "cc12m"}, "no entry of cc12m"),
    "merged without three files": ({"dataset": "merged_opendata"}, "joined by ---"),
    "shards missing": ({"dataset": "wds"}, "--shards"),
    "merges missing": ({"bpe_path": "no/merges.gz"}, "open_clip_torch"),
    "byol with three views": ({"byol_augment": "true", "num_augs": 3}, "num_augs"),
    "weak and strong": ({"weak_augment": "true", "strong_augment": "true"}, "exclude"),
    "momentum for CL2L": ({"momentum": "true"}, "SIAMLIP"),
    "local projectors without local views": ({"num_augs": 0}, "--num-augs"),
    "smoothing for SwALIP": ({"model": "CL2L_VITT8_SWALIP"}, "label_smoothing"),
    "SIMCLR validated": ({"model": "SIMCLR_VITS16"}, "SIMCLR"),
    "class folders missing": ({"val_folder": "no/folder"}, "no/folder"),
    "labels of another data set": ({"val_dataset": "mnist"}, "mnist"),
    "batch larger than the data": ({"batch_size": 500}, "500"),
    "a pair alone": ({"batch_size": 1}, "train with 2 or more"),
    "fp16 on the CPU": ({"precision": "fp16"}, "bf16"),
    "wrong weights": (
        {"text_augment": "true", "random_swap_prob": -1},
        "--random-swap-prob: expected a finite number >= 0",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_clear_message(mistake, digitscenes, tmp_path):
    changes, named = MISTAKES[mistake]
    with pytest.raises(Exception) as caught:
        run_main(arguments(digitscenes, tmp_path / "run", **changes))
    assert isinstance(caught.value, UserError), repr(caught.value)
    assert named in str(caught.value)


def test_a_class_without_folder_and_a_template_without_place_are_named(digitscenes, tmp_path):
    shutil.copytree(digitscenes / "imagefolder/val", tmp_path / "val")
    shutil.rmtree(tmp_path / "val/seven")
    with pytest.raises(Exception, match="no folder for seven"):
        run_main(arguments(digitscenes, tmp_path / "run", val_folder=tmp_path / "val"))
    (tmp_path / "templates.json").write_text(json.dumps({"digitscenes": ["a digit."]}))
    with pytest.raises(Exception, match=r"'a digit\.'.*no \{\}"):
        run_main(arguments(digitscenes, tmp_path / "run", templates=tmp_path / "templates.json"))


def test_missing_zips_are_counted_and_past_the_budget_listed(digitscenes, tmp_path):
    rows = [
        {"image": f"images/00/000.zip/{i:03d}.jpg", "caption": ["a two"]}
        for i in (*range(50), 200, 201)
    ]
    rows.append({"image": "images/77/000.zip/000.jpg", "caption": ["a two"]})
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--dataset", "yfcc15m", "--val-folder", "none", "--workers", "0", "--batch-size", "4"]
    changes = {"metadata": tmp_path / "few.jsonl", "root": digitscenes / "yfcc15m"}
    base = arguments(digitscenes, tmp_path / "run", **changes)
    run_main([*base, *flags, "--epochs", "14 steps", "--error-budget", "0.5"])
    assert lines(tmp_path / "run")[-1]["errors"] == 3
    base = arguments(digitscenes, tmp_path / "strict", **changes)
    with pytest.raises(Exception, match=r"77/000\.zip|no member 20") as caught:
        run_main([*base, *flags, "--epochs", "30 steps"])
    assert isinstance(caught.value, UserError)


def test_the_message_reaches_the_terminal_without_a_traceback(digitscenes, tmp_path):
    output = finish(1, arguments(digitscenes, tmp_path / "run", metadata="nowhere.npy"), expect=2)
    assert "error:" in output and "nowhere.npy" in output and "Traceback" not in output


def test_flags_of_the_original_are_understood():
    words = "--model CL2L_R50_CL2L --dataset cc3m --metadata m.npy --root r --separate-proj --text-augment "
    words += "--clean-before-augment --label-smoothing 0.1 --loss-avg-or-sum sum --update-freq 2 --wd 0.5 --lr 2e-3 "
    words += "--betas 0.9 0.98 --eps 1e-8 --lr-start 1e-6 --lr-end 1e-5 --epochs 32 --warmup-epochs 1 -j 5 --print-freq 7 "
    words += "--checkpoint-grad --transformer-layers 6 --text-dropout-prob 0.2 --attn-layer flash --disable-amp "
    words += "--multicrop-resize 192 --caption-sampling multi --seed 50 --eval-freq 2 --dist-url env:// --wandb --offline "
    words += "--remove-stopwords-prob 0.9 --local_rank 0 --name X --semi-paired --unpaired-ratio 4 --momentum-tau 0.99"
    config = parse(script.Config, words.split())
    assert (config.accumulate, config.optimizer.weight_decay, config.workers, config.log_every) == (
        2,
        0.5,
        5,
        7,
    )
    assert config.activation_checkpointing and config.network.transformer_layers == 6
    assert config.views.multicrop_resize == 192 and config.texts.remove_stopwords_prob == 0.9
    config.resolve_auto(torch.device("cpu"))
    assert (config.precision, config.wandb) == ("fp32", "offline")


@pytest.mark.parametrize(
    "recipe", sorted((ROOT / "configs/main").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_recipe_is_read(recipe):
    config = parse(script.Config, ["--config", str(recipe)])
    assert config.local_views[0] >= 0
