"""The benchmarks of the classifier and of the neighbours: tables, and a tiny run."""

import pytest


def run(seconds, cpu):
    return {"seconds": seconds, "cpu_seconds": cpu, "peak_bytes": 2**30, "device": "cpu"}


def test_ratios_are_of_neighbouring_runs():
    from benchmarks.vit import table

    lines = table(
        {"ours": [run(2, 1), run(4, 1)], "timm": [run(3, 1.5), run(8, 1.5)]}, batch=4
    ).splitlines()
    assert lines[2].startswith("| ours | 3.00 (2.00-4.00) | 1.00 | 1.33 | 1.00 GiB |  |")
    assert lines[3].endswith("| 1.75 x | 1.50 x |")


def test_a_missing_checkout_is_one_error(tmp_path):
    from base.errors import UserError
    from benchmarks.vit import Config, check_config

    with pytest.raises(UserError, match="it takes a checkout of coyo-vit"):
        check_config(Config(peer=str(tmp_path)))


@pytest.mark.parametrize("library", ["ours", "timm", "transformers"])
def test_every_library_takes_a_step(library, monkeypatch):
    from benchmarks import vit_ours
    from models.classification.classifier import SIZES

    monkeypatch.setitem(SIZES, "b", (32, 2, 2))
    options = {
        "library": library,
        "model": "vit-b/16",
        "image_size": 32,
        "classes": 9,
        "batch": 2,
        "threads": 1,
    }
    options |= {
        "device": "cpu",
        "precision": "fp32",
        "compile": False,
        "activation_checkpointing": False,
    }
    result = vit_ours.main(options | {"warmup": 0, "steps": 1})
    assert (
        result["cpu_seconds"] > 0 and result["parameters"] == 51625
    )  # the same network everywhere


def test_neighbours(capsys):
    from benchmarks import knn

    sizes = {"train": 300, "queries": 40, "width": 8, "k": 3, "threads": 1, "report": ""}
    knn.main(knn.Config(**sizes))
    out = capsys.readouterr().out
    assert "| ours |" in out and "100.0000%" in out
