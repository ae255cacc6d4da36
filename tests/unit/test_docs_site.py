"""The documentation builds as one site, with every page in it and no dead link."""

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"\]\((?!https?:)([^)\s]+)\)")  # within the repository


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


def test_docstrings_of_the_api_name_elements_of_html_as_code():
    """Written bare, they would be elements of the page, which nobody reads."""
    names = re.findall(r"^::: (\S+)", (ROOT / "docs/API.md").read_text(), flags=re.MULTILINE)
    assert len(names) > 20
    bare = []
    for name in names:
        tree = ast.parse((ROOT / f"{name.replace('.', '/')}.py").read_text())
        for node in ast.walk(tree):
            documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            text = (ast.get_docstring(node) if documented else "") or ""
            text = re.sub(r"^ {4}.*|`[^`]*`", "", text, flags=re.MULTILINE)  # code
            bare += [(name, tag) for tag in re.findall(r"</?[a-z][a-z0-9]*>", text)]
    assert not bare


def test_a_dead_link_is_an_error(tmp_path):
    (tmp_path / "docs").mkdir()
    settings = (ROOT / "mkdocs.yml").read_text().split("nav:")[0]
    (tmp_path / "mkdocs.yml").write_text(settings)
    for link in ("GONE.md", "#gone"):
        (tmp_path / "docs/index.md").write_text(f"[gone]({link})")
        status, output = build(tmp_path, tmp_path / "site")
        assert status != 0 and link in output


def test_links_of_the_pages_beside_the_site_lead_somewhere():
    """Those of README.md and its like; the site's own build looks at those of docs/."""
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "dataset/prompts/README.md"]
    links = [(page, link) for page in pages for link in LINK.findall(page.read_text())]
    assert len(links) > 60
    dead = []
    for page, link in links:
        target, _, anchor = link.partition("#")
        file = page.parent / target if target else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            dead.append(f"{page.name}: {link}")
    assert not dead


def anchors(page):
    """Of a page's headings, as GitHub and mkdocs make them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in plain}
