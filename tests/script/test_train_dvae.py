"""scripts/train_dvae.py from the command line: images in, a loadable tokenizer out; stopped and
resumed alike."""

import json

import pytest
import torch

from base.errors import UserError
from models.fusion.dvae import ImageTokenizer
from runtime.checkpoint import read_weights
from scripts.train_dvae import Config, build_model, find_images
from tests.helpers.processes import run_script

SMALL = "--size 16 --vocab_size 8 --width 4 --decoder_width 8 --batch_size 8 --workers 0 --device cpu".split()


def train(*arguments: object, expect: int = 0) -> str:
    return run_script("scripts/train_dvae.py", [*SMALL, *arguments], expect=expect)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    from PIL import Image

    folder = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for i in range(60):
        pixels = torch.randint(256, (24, 20, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    (folder / "list.json").write_text(
        json.dumps([{"image": f"{i}.png", "caption": "noise"} for i in range(60)])
    )
    return folder


def test_resumed_run_is_the_straight_run(images, tmp_path):
    data = ["--data", images / "list.json", "--image_root", images, "--scheduler.epochs", "8 steps"]
    assert "codes used, perplexity" in train(*data, "--output_dir", tmp_path / "a")
    train(*data, "--output_dir", tmp_path / "b", "--max_steps", 3)
    assert not (tmp_path / "b" / "image_tokenizer.safetensors").exists()
    train(*data, "--output_dir", tmp_path / "b")
    a, b = (read_weights(tmp_path / name / "image_tokenizer.safetensors") for name in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)

    assert (tmp_path / "a" / "preview.png").stat().st_size > 1000
    report = json.loads((tmp_path / "a" / "image_tokenizer.json").read_text())
    assert report["images"] == 3 and 0 < report["codes_used"] <= 1
    tokenizer = ImageTokenizer.load(tmp_path / "a" / "image_tokenizer.safetensors", read_weights)
    assert tokenizer.codes(torch.rand(2, 3, 16, 16)).shape == (2, 4, 4)


def test_mistakes_are_found_before_training(images, tmp_path):
    said = train("--data", tmp_path, "--output_dir", tmp_path / "out", expect=2)
    assert "no images" in said and "Traceback" not in said
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="image_root"):
        find_images(Config(data=[str(images / "list.json")]))
    with pytest.raises(UserError, match="0 images; name JSON lists or folders"):
        find_images(Config())
    with pytest.raises(UserError, match="--size 18 is no multiple of 4"):
        build_model(Config(size=18))
