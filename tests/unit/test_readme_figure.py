"""The README's figure and the script that renders it."""

import re
import runpy
from pathlib import Path

import pytest
from PIL import Image

from base.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def test_the_readme_shows_one_small_figure():
    (name,) = re.findall(r"!\[.+?\]\((.+?)\)", (ROOT / "README.md").read_text())
    assert (ROOT / name).stat().st_size < 300_000
    with Image.open(ROOT / name) as image:
        assert image.format == "PNG" and image.width > 800


def test_a_missing_browser_is_named(tmp_path):
    script = runpy.run_path(str(ROOT / "scripts/dev/readme_figure.py"))
    (tmp_path / "report.html").write_text("<html><head></head><body>page</body></html>")
    config = script["Config"](report=tmp_path / "report.html", browser="no-such-browser")
    with pytest.raises(UserError, match="no no-such-browser on this machine"):
        script["main"](config)
