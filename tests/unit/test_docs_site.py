"""The documentation builds as one site, with every page in it and no dead link."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def build(folder, target):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    done = subprocess.run(
        [*command, "--config-file", folder / "mkdocs.yml", "--site-dir", target],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


def test_the_site_builds_with_strict_links_and_every_page(tmp_path):
    status, output = build(ROOT, tmp_path)
    assert status == 0, output
    home = (tmp_path / "index.html").read_text()
    for page in ROOT.glob("docs/*.md"):
        where = "." if page.stem == "index" else f"{page.stem}/"
        assert f'href="{where}"' in home, page.name
    api = (tmp_path / "API/index.html").read_text()
    assert "open_dual" in api and "atomic_write" in api
    assert "https://fonts" not in home


def test_a_dead_link_is_an_error(tmp_path):
    (tmp_path / "docs").mkdir()
    settings = (ROOT / "mkdocs.yml").read_text().split("nav:")[0]
    (tmp_path / "mkdocs.yml").write_text(settings)
    (tmp_path / "docs/index.md").write_text("[gone](GONE.md)")
    status, output = build(tmp_path, tmp_path / "site")
    assert status != 0 and "GONE.md" in output
