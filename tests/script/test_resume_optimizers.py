"""main.py with Muon, an optimizer of timm, layer decay and a learning rate of the image tower: a
stopped run resumes exactly."""

import pytest

import main as script
from runtime.config.cli import parse
from tests.helpers.main_runs import arguments
from tests.helpers.runs import lines


@pytest.mark.slow
@pytest.mark.parametrize("opt", ["muon", "timm/lion"])
def test_a_stopped_run_goes_on_exactly(opt, digitscenes, tmp_path):
    options = ["--optimizer.opt", opt, "--optimizer.layer_decay", "0.8"]
    options += ["--optimizer.lr_scales", "image=0.5"]

    def run(folder, **changes):
        values = {"model": "CLIP_VITT8_CLIP", "epochs": "6 steps", "save_every": "2 steps"}
        flags = arguments(digitscenes, tmp_path / folder, *options, **(values | changes))
        script.main(parse(script.Config, flags))

    run("straight", val_folder="none")
    with pytest.raises(SystemExit):
        run("stopped", val_folder="none", max_steps=4)
    run("stopped", val_folder="none")
    assert lines(tmp_path / "stopped") == lines(tmp_path / "straight")
