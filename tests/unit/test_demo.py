"""What the demo's tabs compute: the index of a folder, search, classification, what a checkpoint
lacks."""

import os
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from base.distributed import ALONE
from base.errors import BadSample, UserError
from dataset.images.decode import decode_image
from dataset.text.wordpiece import Tokenizer, pre_caption
from evaluation.demo import tasks, view
from evaluation.demo.abilities import Abilities, Embedder, lacking, together
from evaluation.demo.index import Index, build_index, nearest_rows

COLOURS = {"red": (250, 0, 0), "green": (0, 250, 0), "blue": (0, 0, 250)}


def colour_embedder(signature: str = "one") -> Embedder:
    """An image's mean colour; a text's colour is the one that it names."""

    def images(batch):
        return torch.nn.functional.normalize(batch.flatten(2).mean(-1) + 1e-3, dim=-1)

    def texts(sentences):
        found = [
            next((c for name, c in COLOURS.items() if name in s), (1, 1, 1)) for s in sentences
        ]
        return torch.nn.functional.normalize(torch.tensor(found).float(), dim=-1)

    def seen(image):
        return image[:, :4, :4].float()

    return Embedder(seen, images, texts, 10.0, signature)


@pytest.fixture
def folder(tmp_path):
    """Three colours, a text that is called an image, and captions beside two of them."""
    root = tmp_path / "photos"
    (root / "more").mkdir(parents=True)
    for name, colour in COLOURS.items():
        Image.new("RGB", (8, 6), colour).save(
            root / ("more" if name == "blue" else "") / f"{name}.png"
        )
    (root / "red.txt").write_text("a red field\nsomething green\n")
    (root / "more/blue.caption").write_text("a blue field\na red field\n")
    (root / "broken.jpg").write_text("no image at all")
    return root


class Reads:
    """Decodes as scripts/demo.py does, and counts."""

    def __init__(self):
        self.names = []

    def __call__(self, path: Path) -> torch.Tensor:
        self.names.append(path.name)
        return decode_image(path, exif=True)


def indexed(root: Path, embedder: Embedder, reads: Reads, **more) -> Index:
    files = sorted(path for path in root.rglob("*") if path.suffix in (".png", ".jpg"))
    return build_index(root, files, embedder, reads, root.parent / "cache", batch_size=2, **more)


def test_index_has_every_image_and_names_what_it_cannot_read(folder):
    index = indexed(folder, colour_embedder(), Reads())
    assert sorted(index.files) == ["green.png", "more/blue.png", "red.png"]
    assert index.unreadable == {"broken.jpg": "cannot identify an image format in it"}
    assert sorted(index.captions) == ["a blue field", "a red field", "something green"]
    assert torch.allclose(index.images.norm(dim=1), torch.ones(3))
    red = index.images[index.files.index("red.png")]
    assert torch.allclose(red, torch.tensor([1.0, 0, 0]), atol=1e-3)
    assert "1 unreadable" in view.folder_note(index) and "broken.jpg" in view.folder_note(index)


def test_index_is_kept_and_only_what_changed_is_read_again(folder):
    first = indexed(folder, colour_embedder(), Reads())
    reads = Reads()
    again = indexed(folder, colour_embedder(), reads)
    assert reads.names == [] and again.kept == 3  # the unreadable one is not searched
    assert again.files == first.files and torch.equal(again.images, first.images)
    assert again.unreadable == first.unreadable and again.captions == first.captions
    assert torch.equal(again.texts, first.texts)
    Image.new("RGB", (8, 6), COLOURS["blue"]).save(folder / "red.png")  # another colour
    os.utime(folder / "red.png", ns=(1, 1))
    (folder / "green.png").unlink()
    (folder / "broken.jpg").write_bytes((folder / "more/blue.png").read_bytes())
    changed = indexed(folder, colour_embedder(), reads)
    assert sorted(reads.names) == ["broken.jpg", "red.png"]
    assert sorted(changed.files) == ["broken.jpg", "more/blue.png", "red.png"]
    assert changed.images[changed.files.index("red.png")].argmax() == 2
    reads.names.clear()
    indexed(folder, colour_embedder("another network"), reads)
    assert len(reads.names) == 3, "another network has an index of its own"


def test_an_image_is_read_again_where_another_took_its_size_and_time(folder):
    """As `cp -p` and archives put it there."""
    for colour, name in (("red", "a"), ("blue", "b")):
        Image.new("RGB", (8, 6), COLOURS[colour]).save(folder / f"{name}.bmp")
        os.utime(folder / f"{name}.bmp", ns=(1, 1))
    files = [folder / "a.bmp"]
    make = partial(build_index, folder, files, colour_embedder(), cache=folder.parent / "cache")
    assert make(Reads()).images[0].argmax() == 0
    os.replace(folder / "b.bmp", folder / "a.bmp")
    assert make(Reads()).images[0].argmax() == 2


def test_damaged_index_is_made_again(folder):
    indexed(folder, colour_embedder(), Reads())
    (kept,) = (folder.parent / "cache").glob("*.safetensors")
    for content in (b"", kept.read_bytes()[:-7], b"\xff" * 100):
        kept.write_bytes(content)
        reads = Reads()
        assert len(indexed(folder, colour_embedder(), reads)) == 3 and len(reads.names) == 4


def test_indexing_that_stops_has_kept_what_it_did(folder, monkeypatch):
    monkeypatch.setattr("evaluation.demo.index.KEPT_EVERY", 2)

    def stop_at_the_second(batches, name):
        for number, batch in enumerate(batches):
            if number == 1:
                raise KeyboardInterrupt
            yield batch

    reads = Reads()
    with pytest.raises(KeyboardInterrupt):
        indexed(folder, colour_embedder(), reads, progress=stop_at_the_second)
    before = list(reads.names)
    assert len(before) == 2
    indexed(folder, colour_embedder(), reads)
    assert len(reads.names) == 4 and len(set(reads.names)) == 4


def test_folder_without_a_readable_image(tmp_path):
    (tmp_path / "a.jpg").write_text("text")
    with pytest.raises(UserError, match=r"none of 1 can be read, a\.jpg: cannot identify"):
        indexed(tmp_path, colour_embedder(), Reads())


def test_images_are_turned_by_their_exif_orientation(tmp_path):
    """A camera held upright: stored 8 x 4 with red on the left, seen 4 x 8 with red on top."""
    stored = np.zeros((4, 8, 3), np.uint8)
    stored[:, :4] = COLOURS["red"]
    stored[:, 4:] = COLOURS["blue"]
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise
    (tmp_path / "photos").mkdir()
    Image.fromarray(stored).save(tmp_path / "photos/turned.png", exif=exif)
    index = indexed(tmp_path / "photos", colour_embedder(), Reads())
    assert index.images[0].argmax() == 0, "its first rows are red"
    assert index.images[0, 2] < 0.01, "and have no blue"


def test_words_find_the_image_that_they_describe(folder):
    embedder = colour_embedder()
    index = indexed(folder, embedder, Reads())
    hits = tasks.search_words(embedder, index, "something blue", 2)
    assert hits[0].name == "more/blue.png" and len(hits) == 2
    cosines = index.images @ embedder.texts(["something blue"])[0]
    assert hits[0].cosine == pytest.approx(cosines.max().item())
    assert hits[0].probability == pytest.approx((10 * cosines).softmax(0).max().item())
    assert hits[0].against == pytest.approx(cosines.mean().item())
    assert "3.0 × chance" in view.hit_text(hits[0], 3)


def test_an_image_finds_its_like_and_its_captions(folder):
    embedder = colour_embedder()
    index = indexed(folder, embedder, Reads())
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    image[1] = 200
    hits = tasks.search_image(embedder, index, image, 3)
    assert hits[0].name == "green.png" and hits[0].probability is None
    assert tasks.search_captions(embedder, index, image, 1)[0].name == "something green"


def test_ten_thousand_images_are_searched_exactly_in_no_time():
    generator = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(10_000, 512, generator=generator), dim=1)
    query = torch.nn.functional.normalize(torch.randn(512, generator=generator), dim=0)
    nearest_rows(query, rows, 24)
    before = time.process_time()
    best, cosines = nearest_rows(query, rows, 24)
    spent = time.process_time() - before
    assert spent < 0.1, f"{spent:.3f} s of CPU time"
    expected = (rows.double() @ query.double()).argsort(descending=True)[:24].tolist()
    assert best == expected and cosines.shape == (10_000,)


def test_reranking_puts_what_matches_first():
    hits = [
        tasks.Hit(name, cosine, 0.1, 0.2) for name, cosine in (("a", 0.9), ("b", 0.8), ("c", 0.7))
    ]
    truth = {"a": 0.1, "b": 0.9, "c": 0.99}

    def read(name):
        if name == "a":
            raise BadSample("it has gone")
        return torch.full((1,), truth[name])

    abilities = Abilities("x", match=lambda image, texts: [image.item()])
    ordered, matches = tasks.rematch(abilities, read, hits, "words", 2)
    assert [hit.name for hit in ordered] == ["b", "a", "c"], "only the first two are compared"
    assert matches == {"b": pytest.approx(0.9)}
    words = "The first 1: the probability that the words match the image."
    assert words in view.found_note(ordered, 3, 1.0, len(matches))
    assert words not in view.found_note(ordered, 3, 1.0)


def test_classification_beside_chance():
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    image[2] = 99
    embedder = colour_embedder()
    scored = tasks.classify(embedder, image, ["red", "blue"], "a {} thing")
    assert [each.name for each in scored] == ["blue", "red"] and scored[0].chance == 0.5
    assert sum(each.probability for each in scored) == pytest.approx(1)
    logits = (
        10
        * embedder.texts(["a red thing", "a blue thing"])
        @ embedder.images(image[None].float())[0]
    )
    assert scored[0].probability == pytest.approx(logits.softmax(0)[1].item())
    table = view.score_rows(scored, "class")
    assert "50.0 %" in table and "left:calc(50.0% - 1px)" in table


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: tasks.typed(" ", "a question"), "type a question first"),
        (lambda: tasks.typed("x" * 2001, "a question"), "2,001 letters are more than 2,000"),
        (
            lambda: tasks.typed_lines("\n".join(map(str, range(2001))), "names"),
            "2,001 names are more",
        ),
        (lambda: tasks.classify(None, None, ["a", "b"], "a photo"), "has no {}"),
        (lambda: tasks.classify(None, None, ["a"], "{}"), "two class names or more"),
        (lambda: tasks.classify(None, None, ["a", "b"], None), "type a template first"),
        (
            lambda: tasks.classify(None, None, ["a", "b" * 1000], "{}{}{}"),
            "class name in its template: 3,000 letters are more than 2,000",
        ),
        (lambda: tasks.answer(Abilities("x"), None, "q", []), "type the answers to choose from"),
    ],
)
def test_mistakes_are_one_sentence(call, sentence):
    with pytest.raises(UserError, match=sentence):
        call()


def test_words_without_a_map_are_counted(tmp_path):
    pytest.importorskip("gradio")
    from evaluation.demo import tabs

    def maps(image, sentence):
        return [(word, torch.rand(2, 2)) for word in sentence.split()]

    abilities = Abilities("x", match=lambda *_: [0.5], word_maps=maps)
    demo = tabs.Demo(abilities, None, lambda *_: torch.zeros(3, 8, 8, dtype=torch.uint8))
    shown = tabs.grounded(demo, "a.png", "word " * (tabs.MAPS + 2))
    assert shown.count("<figure>") == 1 + tabs.MAPS and "2 further words are not shown" in shown
    assert "further" not in tabs.grounded(demo, "a.png", "word " * tabs.MAPS)


def test_texts_of_users_are_escaped():
    scored = [tasks.Scored("<script>alert(1)</script>", 0.5, 0.5)]
    shown = view.score_rows(scored, "<b>") + view.label_rows([("<i>", 0.5)], "<u>")
    assert (
        "<script>" not in shown
        and "<b>" not in shown.replace("<b style", "")
        and "<i>" not in shown
    )
    index = Index(Path("/<img>"), ["a"], torch.ones(1, 1), {"<svg>.jpg": "<p>"})
    assert "<svg>" not in view.folder_note(index) and "<img>" not in view.folder_note(index)


def test_what_lacks_is_named_with_its_script():
    everything = Abilities(
        "x", colour_embedder(), match=max, word_maps=max, answer=max, entail=max, recognise=max
    )
    assert lacking(everything, folder=True) == []
    assert lacking(everything, folder=False) == ["search (add --images FOLDER)"]
    lines = " ".join(lacking(Abilities("x"), folder=True))
    for script in ("main.py", "Pretrain.py", "Grounding.py", "VQA.py", "VE.py", "Recognition.py"):
        assert script in lines


def test_several_checkpoints_share_the_page():
    images_alone = Abilities("a", Embedder(max, max, None, 1.0, "a"))
    words = Abilities("b", colour_embedder(), match=max)
    answers = Abilities("c", answer=max, answers=["yes"])
    both = together([images_alone, words, answers])
    assert both.title == "a + b + c" and both.embedder is words.embedder and both.match is max
    assert both.answer is max and both.answers == ["yes"] and both.entail is None


def test_heat_maps_come_with_the_score_that_they_are_of():
    clip = Abilities("a", colour_embedder())
    albef = Abilities("b", colour_embedder(), match=max, word_maps=min)
    both = together([clip, albef, Abilities("c", colour_embedder(), match=len, word_maps=len)])
    assert both.embedder is clip.embedder and (both.match, both.word_maps) == (max, min)


def test_captions_without_a_word_are_left_out(folder):
    """ALBEF's cleaning leaves nothing of a line of stars, as its users set under headings."""
    (folder / "red.txt").write_text("a red field\n***\nsomething green\n")
    embedder = colour_embedder()
    embed = embedder.texts

    def texts(sentences):
        if "***" in sentences:
            raise UserError("no word is left")
        return embed(sentences)

    embedder.texts = texts
    for _ in range(2):  # the second time from the disk
        index = indexed(folder, embedder, Reads())
        assert sorted(index.captions) == ["a blue field", "a red field", "something green"]
        assert torch.equal(index.texts, embed(index.captions))


def test_an_image_encoder_searches_no_captions(folder):
    embedder = colour_embedder()
    embedder.texts = None
    index = indexed(folder, embedder, Reads())
    assert index.captions == [] and index.texts is None


def test_a_request_gets_no_file_but_what_it_sent(folder, tmp_path, monkeypatch):
    pytest.importorskip("gradio")
    from evaluation.demo.tabs import sent_file

    own = tmp_path / "uploads"
    own.mkdir()
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(own))
    (own / "sent.png").write_bytes((folder / "red.png").read_bytes())
    (own / "link.png").symlink_to(folder / "red.png")
    assert sent_file(SimpleNamespace(path=str(own / "sent.png"))) == str(own / "sent.png")
    others = [folder / "red.png", own / "../photos/red.png", own / "link.png", "red.png", None]
    for path in others:
        assert sent_file(SimpleNamespace(path=path and str(path))) is None
    assert sent_file(None) is None


def test_no_proxy_stands_before_the_page(monkeypatch):
    from urllib.request import getproxies, proxy_bypass

    from evaluation.demo.page import reach_without_proxy

    monkeypatch.setenv("http_proxy", "http://proxy.example:3128")
    monkeypatch.setenv("no_proxy", "intern.example")
    monkeypatch.setenv("NO_PROXY", "intern.example")
    assert "http" in getproxies() and not proxy_bypass("127.0.0.1")
    reach_without_proxy("localhost")
    assert (
        proxy_bypass("127.0.0.1") and proxy_bypass("localhost") and proxy_bypass("intern.example")
    )
    assert not proxy_bypass("elsewhere.example")


@pytest.mark.parametrize("tower, black", [(None, -1.7923), ("timm/vit_base_patch16_224", -1.0)])
def test_labels_are_of_images_as_their_tower_was_trained(tower, black, monkeypatch):
    """The pixels of timm's towers are not CLIP's; the run's configuration names the tower."""
    from scripts.demo_checkpoints import recognition as opened

    def check(task, world):
        task.network.image_tower, task.network.image_size = tower, 16

    seen = []
    reader = SimpleNamespace(drafts=seen.append, labels=lambda drafts, number: [])
    reader.attention = lambda image, labels: seen.append(image) or []
    given = {"check": check, "build_model": lambda *_: torch.nn.Identity()}
    for name, function in {**given, "labeller": lambda *_: reader}.items():
        monkeypatch.setattr(opened.Recognition, name, function)
    monkeypatch.setattr(opened, "PieceTokenizer", lambda path: None)
    config = SimpleNamespace(clip=None, device="cpu", tokenizer=None)
    abilities = opened.recognition(Path("run"), config, ALONE)
    image = torch.zeros(3, 20, 20, dtype=torch.uint8)
    abilities.recognise(image)
    abilities.attention(image, ["x"])
    assert [pixels[0, 0, 0, 0].item() for pixels in seen] == pytest.approx([black] * 2, abs=1e-3)


@pytest.mark.parametrize(("host", "elsewhere"), [("127.0.0.1", 400), ("0.0.0.0", 200)])
def test_on_this_machine_alone_the_page_answers_to_its_own_names(host, elsewhere):
    """A page elsewhere could have its own name point here (DNS rebinding)."""
    page = pytest.importorskip("evaluation.demo.page")
    from starlette.applications import Starlette
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route
    from starlette.testclient import TestClient

    routes = [Route("/", lambda _: PlainTextResponse("images"))]
    client = TestClient(Starlette(routes=routes, middleware=page.middleware(host)))
    for name, status in (("127.0.0.1:7860", 200), ("localhost:80", 200), ("x.org", elsewhere)):
        assert client.get("/", headers={"host": name}).status_code == status, name


@pytest.mark.parametrize(
    ("text", "refused"), [("a seven", False), ("!?", True), ("\U0001f600", True)]
)
def test_a_query_without_a_known_word_is_refused(text, refused, digitscenes):
    """Of emoji BERT knows none: all of them would be ranked alike."""
    from scripts.demo_checkpoints.fusion import check_words

    tokenizer = Tokenizer(digitscenes / "tokenizer")
    with pytest.raises(UserError, match="no word is left") if refused else nullcontext():
        check_words(tokenizer, [pre_caption(text)], [text])
