"""Pretrain.py through its real main: it runs, it learns something, and every mistake is one clear
message."""

import fcntl
import json
import os
import resource
import signal
import subprocess
import sys

import pytest
import torch

import Pretrain
import Retrieval
from base.distributed import ALONE
from base.errors import UserError
from dataset.text.wordpiece import Tokenizer
from models.classification.classifier import ClassifierConfig, VisionClassifier
from runtime.config.cli import parse
from scripts import photos_report
from tests.helpers.pretraining import ROOT, arguments, finish
from tests.helpers.runs import lines


def run_main(flags):
    Pretrain.main(parse(Pretrain.Config, flags))


@pytest.mark.parametrize("method", ["simla", "albef"])
def test_debug_config_runs_and_writes_everything(method, digitscenes, image_tokenizer, tmp_path):
    changes = {"tensorboard": "true"}
    if method == "albef":
        bert = json.loads((ROOT / "configs/bert_debug.json").read_text())
        del bert["add_cross_attention"]
        (tmp_path / "bert.json").write_text(json.dumps(bert | {"fusion_layer": 1}))
        changes |= {
            "method": "albef",
            "bert_config": tmp_path / "bert.json",
            "image_tokenizer_path": "none",
        }
    run_main(arguments(digitscenes, image_tokenizer, tmp_path / "run", **changes))
    logged = lines(tmp_path / "run")
    assert [line["step"] for line in logged] == list(range(1, 9))
    names = {"loss_ita", "loss_itm", "loss_mlm"} | (
        {"loss_mim", "loss_pseudo"} if method == "simla" else set()
    )
    assert names == {key for key in logged[0] if key.startswith("loss_")}
    assert logged[0]["loss"] == pytest.approx(sum(logged[0][name] for name in names), rel=1e-5)
    assert (tmp_path / "run" / "config.yaml").exists() and list(
        (tmp_path / "run" / "tensorboard").iterdir()
    )
    assert (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize(("size", "warned"), [(6, True), (5, False)])
def test_a_queue_of_more_than_all_pairs_is_told(size, warned, digitscenes, tmp_path, capsys):
    pairs = json.loads((digitscenes / "pretrain_train.json").read_text())[:5]
    (tmp_path / "few.json").write_text(json.dumps(pairs))
    changes = {"train_file": tmp_path / "few.json", "method": "albef", "queue_size": size}
    changes["batch_size"] = 5
    config = parse(Pretrain.Config, arguments(digitscenes, None, tmp_path / "out", **changes))
    Pretrain.training_data(config, Tokenizer(config.text_encoder), None, ALONE, None)
    assert ("start with --queue_size 5 or less" in capsys.readouterr().out) is warned


def test_losses_fall(digitscenes, image_tokenizer, tmp_path):
    changes = {
        "scheduler.epochs": "30 steps",
        "log_every": 10,
        "optimizer.lr": 3e-3,
        "batch_size": 16,
        "alpha": 0,
    }
    run_main(arguments(digitscenes, image_tokenizer, tmp_path / "run", **changes))
    logged = lines(tmp_path / "run")
    for name in ("loss_ita", "loss_mlm", "loss_mim"):
        assert logged[-1][name] < 0.9 * logged[0][name], name


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "bf16"},
        {"activation_checkpointing": "true"},
        {"accumulate": 2},
        {"queue_size": 0},
        {"queue_size": 5},
    ],
    ids=str,
)
def test_variations_run(changes, digitscenes, image_tokenizer, tmp_path):
    changes = {"scheduler.epochs": "3 steps", "save_every": "3 steps"} | changes
    run_main(arguments(digitscenes, image_tokenizer, tmp_path / "run", **changes))
    assert lines(tmp_path / "run")[-1]["step"] == 3


def test_activation_checkpointing_changes_no_number(digitscenes, image_tokenizer, tmp_path):
    for name in ("false", "true"):
        changes = {"scheduler.epochs": "3 steps", "activation_checkpointing": name}
        run_main(arguments(digitscenes, image_tokenizer, tmp_path / name, **changes))
    for plain, recomputed in zip(lines(tmp_path / "false"), lines(tmp_path / "true"), strict=True):
        assert recomputed == pytest.approx(
            plain, rel=1e-5
        )  # gradients of shared blocks add up in another order


def test_cached_codes_equal_codes_computed_on_the_fly(digitscenes, image_tokenizer, tmp_path):
    fixed = {"fixed_geometry": "true", "scheduler.epochs": "4 steps"}
    run_main(arguments(digitscenes, image_tokenizer, tmp_path / "fly", **fixed))
    run_main(
        arguments(
            digitscenes,
            image_tokenizer,
            tmp_path / "cache",
            code_cache=tmp_path / "codes.npy",
            **fixed,
        )
    )
    assert lines(tmp_path / "fly") == lines(tmp_path / "cache")


@pytest.mark.parametrize(
    "changes",
    [
        {"fixed_geometry": "false"},  # of other crops the codes would be wrong
        {"method": "albef"},  # has no image tokenizer
        {"shards": "a.tar"},  # whose samples have no numbers
    ],
)
def test_cached_codes_that_cannot_be_used_are_not_computed(
    changes, digitscenes, image_tokenizer, tmp_path
):
    changes = {"code_cache": tmp_path / "codes.npy", "fixed_geometry": "true", **changes}
    with pytest.raises(UserError, match="code_cache needs SIMLA, --fixed_geometry"):
        run_main(arguments(digitscenes, image_tokenizer, tmp_path / "run", **changes))
    assert not (tmp_path / "codes.npy").exists()


def test_starting_from_the_weights_of_another_run(digitscenes, image_tokenizer, tmp_path):
    run_main(arguments(digitscenes, image_tokenizer, tmp_path / "first"))
    weights = tmp_path / "first" / "model.safetensors"
    changes = {"checkpoint": weights, "scheduler.epochs": "1 steps", "optimizer.lr": 0}
    changes |= {"scheduler.warmup_lr": 0, "scheduler.min_lr": 0}
    run_main(arguments(digitscenes, image_tokenizer, tmp_path / "second", **changes))
    from safetensors.torch import load_file

    first, second = load_file(weights), load_file(tmp_path / "second" / "model.safetensors")
    assert all(
        torch.equal(first[k], second[k]) for k in first if "_m." not in k and "queue" not in k
    )


def test_starting_from_a_hybrid_transformer_of_classification(
    digitscenes, image_tokenizer, tmp_path
):
    """The teacher too has its statistics, and training moves neither's."""
    torch.manual_seed(0)
    network = ClassifierConfig(
        model="vit-mu/8", stem=(4, 6), image_size=32, num_classes=5, representation_size=8
    )
    classifier = VisionClassifier(network).train()
    classifier.logits(torch.randn(8, 3, 32, 32))  # sets statistics
    torch.save({"model": classifier.state_dict()}, tmp_path / "vit.pth")
    changes = {
        "vision_weights": tmp_path / "vit.pth",
        "vision_stem": "[4, 6]",
        "scheduler.epochs": "2 steps",
    }
    changes |= {
        "image_res": 32,
        "patch_size": 8,
        "vision_width": 32,
        "vision_depth": 2,
        "vision_heads": 2,
    }
    run_main(arguments(digitscenes, image_tokenizer, tmp_path / "run", **changes))
    from safetensors.torch import load_file

    trained = load_file(tmp_path / "run" / "model.safetensors")
    for name, value in classifier.patch_embed.backbone.named_buffers():
        for tower in ("visual_encoder", "visual_encoder_m"):
            assert torch.equal(trained[f"{tower}.patch_embed.backbone.{name}"], value), name
    weight = trained["visual_encoder.patch_embed.backbone.conv1.weight"]
    assert not torch.equal(weight, classifier.patch_embed.backbone.conv1.weight)


def test_a_locked_tower_of_timm_before_the_patches(digitscenes, tmp_path):
    """The tower stays as published in student and teacher, the rest learns; retrieval opens it, and
    the page of the photographs shows its scores and heat maps."""
    import timm
    from safetensors.torch import load_file, save_file

    published = timm.create_model("test_efficientnet").state_dict()
    save_file(published, tmp_path / "tower.safetensors")
    bert = json.loads((ROOT / "configs/bert_debug.json").read_text())
    del bert["add_cross_attention"]
    (tmp_path / "bert.json").write_text(
        json.dumps(bert | {"fusion_layer": 1, "num_hidden_layers": 3})
    )
    changes = {
        "method": "albef",
        "bert_config": tmp_path / "bert.json",
        "image_tokenizer_path": "none",
        "vision_tower": f"timm/test_efficientnet:{tmp_path}/tower.safetensors",
        "image_res": 64,
        "patch_size": 32,
        "scheduler.epochs": "2 steps",
    }
    run_main(arguments(digitscenes, None, tmp_path / "run", **changes))
    trained = load_file(tmp_path / "run/model.safetensors")
    for tower in ("visual_encoder", "visual_encoder_m"):
        for name, value in published.items():
            if not name.startswith("classifier."):
                found = trained[f"{tower}.patch_embed.backbone.trunk.{name}"]
                torch.testing.assert_close(found, value, rtol=1e-6, atol=1e-9, msg=name)
    (tmp_path / "tower.safetensors").unlink()  # the run has its weights
    flags = ["--checkpoint", tmp_path / "run", "--evaluate", "--workers", 0, "--k_test", 4]
    flags += ["--image_root", digitscenes, "--test_file", digitscenes / "retrieval_test.json"]
    for kind in ("similarity", "retrieval"):
        order = ["--device", "cpu", "--output_dir", tmp_path / f"fusion_{kind}"]
        order += ["--no-rerank"] * (kind == "similarity")
        Retrieval.main(parse(Retrieval.Config, [str(flag) for flag in flags + order]))
    scores = json.loads((tmp_path / "fusion_retrieval/result/metrics.json").read_text())
    assert scores["test"]["r_mean"] > 0 and scores["k_test"] == 4
    shown = "".join(photos_report.fused(tmp_path, cases=2))
    assert ">ITC<" in shown and "best 4 of ITC re-ranked by ITM" in shown
    found = scores["test"]["img_r1"] > 0  # a caption that found its image
    assert ("Where the words look" in shown) == found


MISTAKES = {
    "annotation missing": ({"train_file": "nowhere.json"}, "nowhere.json"),
    "image root missing": ({"image_root": "no/such/folder"}, "no/such/folder"),
    "tokenizer missing": ({"text_encoder": "no/tokenizer"}, "no/tokenizer"),
    "image tokenizer missing": ({"image_tokenizer_path": "no/encoder.pkl"}, "image_tokenizer_path"),
    "checkpoint missing": ({"checkpoint": "no/weights.pth"}, "no/weights.pth"),
    "bert_config missing": ({"bert_config": "no/bert.json"}, "bert_config"),
    "no data at all": ({"train_file": "[]"}, "train_file"),
    "batch larger than the data": ({"batch_size": 500}, "500"),
    "unknown key": ({"bach_size": 8}, "batch-size"),
    "wrong type": ({"batch_size": "many"}, "batch"),
    "out of range": ({"alpha": 1.5}, "alpha"),
    "fp16 on the CPU": ({"precision": "fp16"}, "bf16"),
    "patch does not divide the image": ({"image_res": 30}, "patch"),
    "more stages than the patch has halvings": (
        {"vision_stem": "[4, 4, 4, 4, 4, 4]"},
        "fewer stages",
    ),
    "a tower that patches do not fit": (
        {"vision_tower": "timm/test_efficientnet"},
        "no multiple of 32",
    ),
    "a tower that timm does not know": (
        {"vision_tower": "timm/test_eficientnet"},
        "vision_tower timm/test_eficientnet: timm has no model",
    ),
    "a tower and a stem": (
        {"vision_tower": "timm/test_efficientnet", "vision_stem": "[4]"},
        "choose one",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_clear_message(
    mistake, digitscenes, image_tokenizer, tmp_path, monkeypatch
):
    # a name of the hub is asked for five times where there is no network
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    changes, named = MISTAKES[mistake]
    with pytest.raises(Exception) as caught:
        run_main(arguments(digitscenes, image_tokenizer, tmp_path / "run", **changes))
    assert isinstance(caught.value, UserError), repr(caught.value)
    assert named in str(caught.value)


def test_the_message_reaches_the_terminal_without_a_traceback(
    digitscenes, image_tokenizer, tmp_path
):
    flags = arguments(digitscenes, image_tokenizer, tmp_path / "run", train_file="nowhere.json")
    output = finish(1, flags, expect=2)
    assert "error:" in output and "nowhere.json" in output and "Traceback" not in output


def test_an_annotation_without_a_field_names_file_and_index(digitscenes, image_tokenizer, tmp_path):
    entries = json.loads((digitscenes / "pretrain_train.json").read_text())
    del entries[7]["caption"]
    (tmp_path / "broken.json").write_text(json.dumps(entries))
    with pytest.raises(Exception, match=r"broken\.json.*7.*caption|broken\.json.*caption.*7"):
        run_main(
            arguments(
                digitscenes, image_tokenizer, tmp_path / "run", train_file=tmp_path / "broken.json"
            )
        )


def test_a_checkpoint_of_another_architecture_lists_the_keys(
    digitscenes, image_tokenizer, tmp_path
):
    run_main(
        arguments(
            digitscenes, image_tokenizer, tmp_path / "first", **{"scheduler.epochs": "1 steps"}
        )
    )
    weights = tmp_path / "first" / "model.safetensors"
    with pytest.raises(Exception, match="visual_encoder") as caught:
        run_main(
            arguments(
                digitscenes,
                image_tokenizer,
                tmp_path / "second",
                checkpoint=weights,
                vision_depth=1,
            )
        )
    assert isinstance(caught.value, UserError)


def test_bad_images_are_counted_and_past_the_budget_listed(digitscenes, image_tokenizer, tmp_path):
    entries = json.loads((digitscenes / "pretrain_train.json").read_text())
    (tmp_path / "torn.jpg").write_bytes(b"\xff\xd8\xff torn")
    bad = [{"image": str(tmp_path / "torn.jpg"), "caption": "a red one"}]
    (tmp_path / "one.json").write_text(json.dumps(entries + bad))
    changes = {
        "train_file": tmp_path / "one.json",
        "error_budget": 0.5,
        "scheduler.epochs": "9 steps",
    }
    run_main(arguments(digitscenes, image_tokenizer, tmp_path / "run", **changes))
    assert lines(tmp_path / "run")[-1]["errors"] == 1
    (tmp_path / "many.json").write_text(json.dumps(entries + bad * 30))
    changes |= {
        "train_file": tmp_path / "many.json",
        "error_budget": 0.01,
        "scheduler.epochs": "40 steps",
    }
    with pytest.raises(Exception, match=r"torn\.jpg"):
        run_main(arguments(digitscenes, image_tokenizer, tmp_path / "run2", **changes))


def test_nan_stops_before_the_update_and_names_the_last_good_checkpoint(
    digitscenes, image_tokenizer, tmp_path, monkeypatch
):
    original, calls = Pretrain.Simla.forward, []

    def poisoned(self, **batch):
        losses = original(self, **batch)
        calls.append(1)
        return (
            losses | {"loss_ita": losses["loss_ita"] * float("nan")} if len(calls) == 6 else losses
        )

    monkeypatch.setattr(Pretrain.Simla, "forward", poisoned)
    monkeypatch.setattr(Pretrain, "training_flops", lambda *_: 0.0)
    with pytest.raises(Exception, match=r"step 6.*checkpoint_00000004") as caught:
        flags = arguments(digitscenes, image_tokenizer, tmp_path / "run", save_every="4 steps")
        run_main(flags)
    assert isinstance(caught.value, UserError)
    newest = torch.load(tmp_path / "run" / "checkpoint_00000004.pt", weights_only=True)
    assert all(
        value.isfinite().all() for value in newest["model"].values() if value.is_floating_point()
    )


def test_a_full_disk_while_saving_keeps_the_old_checkpoint(digitscenes, image_tokenizer, tmp_path):
    run_main(
        arguments(digitscenes, image_tokenizer, tmp_path / "run", **{"scheduler.epochs": "4 steps"})
    )
    old = (tmp_path / "run" / "checkpoint_00000004.pt").read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(old) // 2, limit[1]))
    try:
        with pytest.raises(UserError, match="disk"):
            run_main(arguments(digitscenes, image_tokenizer, tmp_path / "run"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert (tmp_path / "run" / "checkpoint_00000004.pt").read_bytes() == old
    assert not list((tmp_path / "run").glob("*.tmp"))


HOLDS_THE_LOCK = """
import fcntl, os, sys, time
lock = open(sys.argv[1], "w")
fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
if os.fork() == 0:  # a loader worker, which inherits the open file
    time.sleep(60)
    os._exit(0)
print("locked", flush=True)
time.sleep(60)
"""


def test_two_runs_may_not_write_one_folder(digitscenes, image_tokenizer, tmp_path):
    """A run is refused while another lives; a killed one's workers do not stand in its way."""
    (tmp_path / "run").mkdir()
    flags = arguments(
        digitscenes, image_tokenizer, tmp_path / "run", **{"scheduler.epochs": "2 steps"}
    )
    lock = tmp_path / "run" / ".lock"
    with lock.open("w") as other:  # as an earlier version of this repository locks
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another run"):
            run_main(flags)
    command = [sys.executable, "-c", HOLDS_THE_LOCK, lock]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    try:
        other.stdout.readline()
        with pytest.raises(UserError, match="another run"):
            run_main(flags)
        other.kill()
        other.wait()
        run_main(flags)
    finally:
        os.killpg(other.pid, signal.SIGKILL)


def test_wandb_offline_logs_into_the_run_folder(digitscenes, image_tokenizer, tmp_path):
    pytest.importorskip("wandb")
    flags = arguments(
        digitscenes,
        image_tokenizer,
        tmp_path / "run",
        wandb="offline",
        **{"scheduler.epochs": "2 steps"},
    )
    run_main(flags)
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))
