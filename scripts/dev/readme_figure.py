"""The README's figure: retrieval gallery and word maps of a page that scripts/report.py wrote.

    python scripts/dev/readme_figure.py --report output/quickstart/report.html

Chromium (Debian's `chromium`, or --browser) renders the page without its tables and curves.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from PIL import Image, ImageChops

from base.errors import UserError
from base.reading import read_text
from base.writing import atomic_write
from runtime.config.cli import knob, run_script

SELECTION = """<style>
:root { color-scheme: only light; --page: #fff; }
h1, main > p, section > p:first-of-type { display: none; }
section:has(table), section:has(svg), .case:nth-child(n+3) { display: none; }
.words ~ .words ~ .words ~ * { display: none; }
.words { flex-wrap: nowrap; }
.cases + .cases { margin-top: 14px; }
section { border: 0; padding: 0; margin: 0 0 12px; }
main { margin: 0; padding: 12px; max-width: none; }
</style></head>"""
WIDTH, HEIGHT = 1040, 2000  # pixels of the window; what stays empty is cut off
COLOURS = 128  # of the palette, which keeps the file small


@dataclass
class Config:
    report: Path = knob(Path("output/quickstart/report.html"), "page of scripts/report.py")
    output: Path = knob(Path("docs/images/quickstart.png"), "PNG to write")
    browser: str = knob("chromium", "Chromium or Chrome: a command")


def rendered(config: Config, folder: Path) -> Image.Image:
    """The selected parts of the page as an RGB image with a white rim."""
    page = re.sub("</head>", lambda _: SELECTION, read_text(config.report), count=1)
    (folder / "page.html").write_text(page)
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    options += [f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={folder / 'page.png'}"]
    command = [config.browser, *options, (folder / "page.html").as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return Image.open(folder / "page.png").convert("RGB")


def main(config: Config) -> None:
    if shutil.which(config.browser) is None:
        raise UserError(f"no {config.browser} on this machine: apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder:
        image = rendered(config, Path(folder))
    background = Image.new("RGB", image.size, image.getpixel((0, 0)))
    *_, right, bottom = ImageChops.difference(image, background).getbbox()
    image = image.crop((0, 0, min(image.width, right + 12), min(image.height, bottom + 12)))
    config.output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(config.output) as temporary:
        image.quantize(COLOURS).save(temporary, "PNG", optimize=True)
    print(
        f"{config.output}: {image.width} x {image.height}, {config.output.stat().st_size:,} bytes"
    )


if __name__ == "__main__":
    run_script(main, Config, __doc__)
