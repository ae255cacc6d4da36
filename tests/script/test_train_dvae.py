"""scripts/train_dvae.py from the command line: images in, a loadable tokenizer out; stopped and
resumed alike."""

import json

import pytest
import torch

from base.distributed import ALONE
from base.errors import UserError
from models.fusion.dvae import ImageTokenizer
from runtime.checkpoint import export_safetensors, read_weights
from scripts.train_dvae import Config, build_model, find_images, training_data
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
    said = train(*data, "--output_dir", tmp_path / "a")
    assert "codes used, perplexity" in said and "demo.py" not in said, "it opens no tokenizer"
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
    with pytest.raises(UserError, match=r"^0 images are too few .*: give 40 or more"):
        find_images(Config())
    with pytest.raises(UserError, match="--size 18 is no multiple of 4"):
        build_model(Config(size=18))


def test_a_training_starts_from_the_weights_of_another(images, tmp_path):
    size = {"size": 16, "vocab_size": 8, "width": 4, "decoder_width": 8}
    torch.manual_seed(1)
    first = build_model(Config(**size))
    export_safetensors(first.state_dict(), tmp_path / "first.safetensors")
    torch.manual_seed(2)
    second = build_model(Config(**size, checkpoint=tmp_path / "first.safetensors"))
    weights = zip(first.parameters(), second.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)
    with pytest.raises(UserError, match=r"does not fit the ImageTokenizer"):
        build_model(Config(**size | {"width": 8}, checkpoint=tmp_path / "first.safetensors"))


@pytest.mark.parametrize("exif", [False, True])
def test_images_are_turned_where_exif_asks_for_it(tmp_path, exif):
    from PIL import Image

    image = Image.new("RGB", (16, 16))
    image.paste((255, 255, 255), (0, 0, 16, 8))  # the upper half is white
    upside_down = Image.Exif()
    upside_down[0x0112] = 3
    image.save(tmp_path / "a.png", exif=upside_down)
    config = Config(size=16, exif=exif, flip=False, crop_scale=(1.0, 1.0), batch_size=2, workers=0)
    loader = training_data(config, [{"image": str(tmp_path / "a.png")}] * 4, ALONE, None)
    upper, lower = next(iter(loader))["image"].split(8, dim=2)
    assert (upper.mean() < lower.mean()) == exif
