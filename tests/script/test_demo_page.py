"""The demo's page in headless Chromium, served by scripts/demo.py: every tab with real clicks, bad
uploads, two users at once; nothing leaves this machine, and nothing but the page is served."""

import http.client
import os
import signal
import struct
import time
import zlib
from importlib.util import find_spec
from pathlib import Path
from shutil import which

import pytest
from PIL import Image

from base.limits import UPLOAD_BYTES
from tests.helpers.demo_checkpoints import fusion, nxtp
from tests.helpers.processes import TIMEOUT, Run, free_port

pytestmark = pytest.mark.slow
BROWSER = which("chromium") or which("google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
SECONDS = 180  # that a busy machine may take for one answer


@pytest.fixture(scope="module")
def folder(digitscenes, tmp_path_factory):
    """Twenty scenes with a caption, one file that is no image, and one in a folder outside."""
    root = tmp_path_factory.mktemp("images") / "photos"
    root.mkdir()
    scenes = sorted((digitscenes / "images/test2017").iterdir())[:20]
    for number, file in enumerate(scenes):
        (root / f"{number}.jpg").write_bytes(file.read_bytes())
    (root / "0.txt").write_text("a red nine\n")
    (root / "broken.png").write_text("no image")
    (root.parent / "secret.jpg").write_bytes(scenes[0].read_bytes())
    return root


@pytest.fixture(scope="module")
def server(digitscenes, folder, tmp_path_factory):
    """(address, folder of temporary files) of a page with every tab."""
    if find_spec("gradio") is None:
        pytest.skip('Gradio is missing: pip install "gradio>=6,<7"')
    made, temporary = tmp_path_factory.mktemp("checkpoints"), tmp_path_factory.mktemp("tmp")
    kinds = ("retrieval", "vqa", "ve")
    files = [fusion(kind, digitscenes, made / f"{kind}.pt") for kind in kinds]
    files.append(nxtp(digitscenes, made / "nxtp.pt"))
    port = free_port()
    flags = ["--checkpoint", *files, "--images", folder, "--port", port, "--device", "cpu"]
    os.environ["TMPDIR"] = str(temporary)
    run = Run("scripts/demo.py", [*flags, "--cache", made / "cache"])
    del os.environ["TMPDIR"]
    try:
        deadline = time.monotonic() + TIMEOUT
        while "Ctrl-C stops" not in run.stdout:
            assert run.poll() is None and time.monotonic() < deadline, run.said()[-2000:]
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}", temporary
        assert len(list(temporary.glob("quintet-demo-*"))) == 1
        run.send_signal(signal.SIGTERM)
        assert run.wait() == 0, run.said()[-2000:]
        assert not list(temporary.glob("quintet-demo-*")), "uploads are left on the disk"
    finally:
        run.send_signal(signal.SIGKILL)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    playwright = pytest.importorskip("playwright.sync_api")
    if BROWSER is None:
        pytest.skip("Chromium is missing: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield started
        started.close()


@pytest.fixture
def visit(browser, server):
    """visit(): the page as a new user sees it. No request may leave the server."""
    address, _ = server
    contexts, elsewhere, faults = [], [], []

    def open_page():
        context = browser.new_context(viewport={"width": 1280, "height": 900})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(SECONDS * 1000)
        page.on("request", lambda request: elsewhere.append(request.url))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(address)
        page.get_by_role("tab").first.wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    inside = (address, "data:", "blob:")
    assert [url for url in elsewhere if not url.startswith(inside)] == []
    assert len(elsewhere) > 10 and faults == []


def tab(page, name: str):
    """The tab's panel, open."""
    page.get_by_role("tab", name=name, exact=True).click()
    panel = page.locator(".tabitem").filter(visible=True)
    panel.locator("button.primary").wait_for()
    return panel


def give(panel, file: Path) -> None:
    """Upload an image as a user does."""
    panel.locator("input[type=file]").set_input_files(str(file))
    panel.get_by_label("Remove Image").or_(panel.get_by_label("Clear")).first.wait_for()


def texts_of(panel, selector: str) -> list[str]:
    """The texts of the first column of a table."""
    panel.locator(f"{selector} td.best").first.wait_for()
    return panel.locator(f"{selector} tr td:first-child").all_inner_texts()


def search(page, words: str) -> list[str]:
    """Names of the images that are found for the words."""
    page.get_by_placeholder("What to look for").fill(words)
    page.get_by_role("button", name="Search", exact=True).click()
    page.get_by_text("images compared in").wait_for()
    return page.locator("#found .caption-label").all_inner_texts()


def assert_fits_a_phone(page, shown) -> None:
    """A phone shows all of a table, of every image."""
    page.set_viewport_size({"width": 390, "height": 844})
    boxes = [each.bounding_box() for each in shown.all()]
    assert boxes and all(box["x"] + box["width"] <= 390 for box in boxes)
    page.set_viewport_size({"width": 1280, "height": 900})


def test_search_by_words_and_by_image(visit, folder):
    page = visit()
    assert "1 unreadable" in page.locator("#folder").inner_text()
    found = search(page, "a red nine")
    assert len(found) == 20 and all("× chance" in text for text in found)
    assert_fits_a_phone(page, page.locator("#found .caption-label"))
    page.get_by_text("re-rank the first 16").click()
    page.get_by_role("button", name="Search", exact=True).click()
    page.locator("#found .caption-label", has_text="matches").first.wait_for()
    page.get_by_text("Search by an image").click()
    panel = page.locator(".tabitem").filter(visible=True)
    give(panel, folder / "7.jpg")
    page.get_by_role("button", name="Similar images").click()
    first = page.locator("#found .caption-label", has_text="cosine").first
    first.wait_for()
    assert first.inner_text().split() == ["cosine", "1.000", "7.jpg"]
    page.get_by_role("button", name="Captions that fit").click()
    page.locator("td", has_text="a red nine").wait_for()
    page.locator("#found button").nth(2).click()
    page.get_by_role("button", name="More like the chosen image").click()
    page.locator("#found .preview").wait_for(state="detached")  # which would hide the new ones
    page.get_by_text("images compared in").wait_for()


def test_every_other_tab(visit, folder):
    page = visit()
    assert page.locator("#lacking").inner_text().strip() == ""
    panel = tab(page, "Classify")
    give(panel, folder / "1.jpg")
    names = ["<b>a dog</b>", "a blue five", "a red nine", 90 * "x"]
    panel.get_by_label("Class names, one a line").fill("\n".join(names))
    panel.locator("button.primary").click()
    assert sorted(texts_of(panel, "#classes")) == names
    assert_fits_a_phone(page, panel.locator("#classes table"))
    panel = tab(page, "Ground")
    give(panel, folder / "1.jpg")
    panel.get_by_label("Sentence").fill("a red nine")
    panel.locator("button.primary").click()
    panel.locator("#maps figcaption", has_text="nine").wait_for()
    words = panel.locator("#maps figcaption").all_inner_texts()
    assert words == ["the image", "a", "red", "nine"]
    panel = tab(page, "Answer")
    give(panel, folder / "1.jpg")
    panel.get_by_label("Question").fill("what color is the nine")
    panel.locator("button.primary").click()
    assert len(texts_of(panel, "#answers")) == 10
    panel = tab(page, "Entail")
    give(panel, folder / "1.jpg")
    panel.get_by_label("Sentence").fill("there is a nine")
    panel.locator("button.primary").click()
    assert set(texts_of(panel, "#entailment")) == {"entailment", "neutral", "contradiction"}
    assert_fits_a_phone(page, panel.locator("#entailment table"))
    panel = tab(page, "Recognise")
    give(panel, folder / "1.jpg")
    panel.locator("button.primary").click()
    assert texts_of(panel, "#labels")
    panel.locator("#attention figcaption", has_text="the image").wait_for()


def png(width: int, height: int) -> bytes:
    """A PNG whose header declares a size; of its pixels there are but a few."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 1000)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


def test_bad_uploads_are_one_sentence(visit, tmp_path):
    page = visit()
    panel = tab(page, "Classify")
    panel.get_by_label("Class names, one a line").fill("a red nine\na blue five")
    panel.locator("button.primary").click()
    page.get_by_text("give an image first").wait_for()
    (tmp_path / "text.jpg").write_text("this is no image")
    (tmp_path / "bomb.png").write_bytes(png(30_000, 30_000))
    Image.new("RGB", (1, 1), "red").save(tmp_path / "one.png")
    for name, said in (
        ("one.png", None),
        ("text.jpg", "text.jpg: cannot identify an image format"),
        ("bomb.png", "bomb.png: its pixels exceed the limit of 89,478,485"),
    ):
        give(panel, tmp_path / name)
        panel.locator("button.primary").click()
        if said:
            page.get_by_text(said).first.wait_for()
            # the classes of the image before go
            panel.locator("#classes td.best").wait_for(state="detached")
        else:
            assert len(texts_of(panel, "#classes")) == 2
        panel.get_by_label("Remove Image").or_(panel.get_by_label("Clear")).first.click()


def test_two_users_at_once(visit, folder):
    """Both ask before either is answered; each sees what belongs to the own question."""
    first, second = visit(), visit()
    panels = []
    for page, word in ((first, "red"), (second, "blue")):
        panel = tab(page, "Ground")
        give(panel, folder / "2.jpg")
        panel.get_by_label("Sentence").fill(f"{word} and {word} again")
        panels.append((panel, word))
    for panel, _ in panels:
        panel.locator("button.primary").click()
    for panel, word in panels:
        panel.locator("#maps figcaption", has_text="again").wait_for()
        words = panel.locator("#maps figcaption").all_inner_texts()
        assert words == ["the image", word, "and", word, "again"]
    tab(first, "Search")
    assert search(first, "a red nine")
    assert second.locator("#found img").count() == 0


def request(
    address: str, method: str, path: str, body: bytes = b"", **headers
) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=SECONDS)
    connection.request(
        method, path, body, {name.replace("_", "-"): v for name, v in headers.items()}
    )
    answer = connection.getresponse()
    return answer.status, answer.read()


def test_no_file_is_served_but_the_pages_own(server, folder):
    address, temporary = server
    (temporary / "other.txt").write_text("of another program")
    asked = [folder.parent / "secret.jpg", folder / "0.jpg", "/etc/passwd", temporary / "other.txt"]
    asked += [Path.cwd() / "README.md", f"{folder}/../secret.jpg"]
    for path in asked:
        status, content = request(address, "GET", f"/gradio_api/file={path}")
        assert status in (403, 404), f"{path}: {status}"
        assert b"of another program" not in content and b"root:" not in content
    status, _ = request(address, "GET", "/")
    assert status == 200


def test_uploads_are_bounded(server):
    address, temporary = server

    def send(size: int) -> int:
        head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.jpg"\r\n\r\n'
        body = head + bytes(size) + b"\r\n--x--\r\n"
        kind = "multipart/form-data; boundary=x"
        return request(address, "POST", "/gradio_api/upload", body, Content_Type=kind)[0]

    assert send(1000) == 200
    assert send(UPLOAD_BYTES + 1) == 413
    kept = [path for path in temporary.rglob("*") if path.is_file()]
    assert max(path.stat().st_size for path in kept) < UPLOAD_BYTES


def test_it_listens_on_this_machine_alone(server):
    """127.0.0.2 is this machine, too, but not the address that the page listens on."""
    address, _ = server
    with pytest.raises(ConnectionRefusedError):
        request(address.replace("127.0.0.1", "127.0.0.2"), "GET", "/")
