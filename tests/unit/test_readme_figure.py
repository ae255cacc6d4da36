"""The README's figures and the script that renders them."""

import re
import runpy
from pathlib import Path

import pytest
from PIL import Image

from base.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def test_the_readme_shows_two_small_figures():
    names = re.findall(r"!\[.+?\]\((.+?)\)", (ROOT / "README.md").read_text())
    assert names == ["docs/images/quickstart.png", "docs/images/photos.png"]
    for name in names:
        assert (ROOT / name).stat().st_size < 300_000
        with Image.open(ROOT / name) as image:
            assert image.format == "PNG" and image.width > 800


def test_a_missing_browser_is_named(tmp_path):
    script = runpy.run_path(str(ROOT / "scripts/dev/readme_figure.py"))
    (tmp_path / "report.html").write_text("<html><head></head><body>page</body></html>")
    config = script["Config"](report=tmp_path / "report.html", browser="no-such-browser")
    with pytest.raises(UserError, match="no no-such-browser on this machine"):
        script["main"](config)


def test_a_missing_run_of_the_photographs_is_named(tmp_path):
    script = runpy.run_path(str(ROOT / "scripts/dev/photos_figure.py"))
    with pytest.raises(UserError, match=r"main: no such run; run photos\.sh first"):
        script["main"](script["Config"](run=tmp_path))
