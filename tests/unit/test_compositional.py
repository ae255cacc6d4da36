"""Captions in several languages, and choices among captions: SugarCrepe and Winoground, in the files
they come in."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import Retrieval
from base.errors import MissingData, UserError
from dataset.tasks.catalog import CATALOG, CatalogOptions, Entry, Prompts, wanted_entries
from dataset.tasks.zeroshot import open_set
from evaluation.compositional import choices, choices_chance, example_scores
from evaluation.zeroshot import choose_captions
from runtime.safe_pickle import load_plain


def opened(entry: Entry, tmp_path, prompts: Prompts | None = None):
    return open_set(entry, prompts or Prompts(), tmp_path / "cache", load_plain)


def save(path, level: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (2, 2), (level, 0, 0)).save(path)


def write(path, text: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text if isinstance(text, str) else json.dumps(text))


# ------------------------------------------------------------------------------------------- choices


def test_scores_by_hand():
    """Winoground's three scores: both right; the captions right, the images not; draws; neither."""
    scores = torch.tensor(
        [
            [[0.9, 0.1], [0.2, 0.8]],
            [[0.5, 0.4], [0.6, 0.7]],  # image 1 is nearer to caption 0 than image 0 is
            [[0.5, 0.5], [0.1, 0.9]],  # image 0: a draw
            [[0.5, 0.1], [0.5, 0.9]],  # caption 0: a draw
            [[0.1, 0.9], [0.9, 0.1]],
        ]
    )
    assert choices(scores) == pytest.approx({"text_acc": 60, "image_acc": 40, "acc": 20})
    one_image = torch.tensor([[[0.6, 0.5]], [[0.5, 0.6]], [[0.5, 0.5]]])
    found = choices(one_image)
    assert found == pytest.approx({"text_acc": 100 / 3, "image_acc": 100, "acc": 100 / 3})


def test_chance_of_random_scores():
    scores = torch.rand(200_000, 2, 2, generator=torch.Generator().manual_seed(0))
    assert choices(scores) == pytest.approx(choices_chance(2, 2), abs=0.5)
    assert choices_chance(1, 2) == {"text_acc": 50.0, "image_acc": 100.0, "acc": 50.0}


def test_every_score_of_a_model():
    """z is right where h is wrong: the ensemble leans to the stronger one."""
    unit = torch.eye(2)
    image = {"z": unit, "h": unit}
    text = {"z": unit, "h": unit.flip(0)}
    examples = torch.tensor([[0, 1]])
    found = choose_captions(image, text, examples, examples)
    assert (
        found["acc_z"] == found["acc_zh_0.9"] == 100 and found["acc_h"] == found["acc_zh_0.1"] == 0
    )
    assert found["acc_zh_0.5"] == 0  # a draw
    scores = example_scores(unit, unit, examples, examples)
    assert torch.equal(scores, unit[None])


def test_sugar_crepe(tmp_path):
    """Numbers with gaps, an image of several examples."""
    rows = {
        "0": {"filename": "a.jpg", "caption": "a cat", "negative_caption": "a dog"},
        "7": {"filename": "b.jpg", "caption": "two", "negative_caption": "one"},
        "9": {"filename": "a.jpg", "caption": "it sits", "negative_caption": "it flies"},
    }
    write(tmp_path / "sugar_crepe/add_obj.json", rows)
    entry = CATALOG["sugar_crepe/add_obj"].below(tmp_path)
    with pytest.raises(MissingData, match="none of its images"):
        raise opened(entry, tmp_path)
    save(tmp_path / "coco/val2017/a.jpg")
    with pytest.raises(UserError, match=r"1 of 2 images are missing, e.g. .*b.jpg; add them"):
        opened(entry, tmp_path)
    save(tmp_path / "coco/val2017/b.jpg")
    data = opened(entry, tmp_path)
    assert data.entry.metric == "text_acc" and not data.classes and len(data.images) == 2
    assert data.images.example_images.tolist() == [[0], [1], [0]]
    assert data.images.example_captions.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert data.images.captions == ["a cat", "a dog", "two", "one", "it sits", "it flies"]

    del rows["7"]["negative_caption"]
    write(tmp_path / "sugar_crepe/add_obj.json", rows)
    with pytest.raises(
        UserError, match="example 7 needs the texts filename, caption, negative_cap"
    ):
        opened(entry, tmp_path)


def test_winoground(tmp_path):
    row = {"id": 0, "image_0": "ex_0_img_0", "image_1": "ex_0_img_1"}
    row |= {"caption_0": "grass in a mug", "caption_1": "a mug in grass"}
    write(tmp_path / "winoground/data/examples.jsonl", json.dumps(row) + "\n")
    for number, ending in enumerate(("png", "PNG")):
        save(tmp_path / f"winoground/data/images/ex_0_img_{number}.{ending}", 100 * number)
    data = opened(CATALOG["winoground"].below(tmp_path), tmp_path)
    assert data.images.example_images.tolist() == [[0, 1]]
    assert [int(data.images[i]["image"][0, 0, 0]) for i in (0, 1)] == [0, 100]
    away = opened(CATALOG["winoground"].below(tmp_path / "no"), tmp_path)
    assert isinstance(away, MissingData) and "images.zip" in str(away)


# ---------------------------------------------------------------------------------------- languages


@pytest.fixture
def captions(tmp_path):
    """XTD's and Crossmodal-3600's files, two images in English and German."""
    write(tmp_path / "xtd10/XTD10/test_image_names.txt", "a.jpg\nb.jpg\n")
    write(tmp_path / "xtd10/XTD10/test_1kcaptions_en.txt", "a cat\na dog\n")
    write(tmp_path / "disk/test_1kcaptions_de.txt", "eine Katze\nein Hund\n")
    (tmp_path / "xtd10/MIC").symlink_to(tmp_path / "disk")
    for language, lines in (("en", "a cat\na dog\n"), ("de", "eine Katze\nein Hund\n")):
        write(tmp_path / f"flickr30k-200/{language}.txt", lines)
    write(tmp_path / "flickr30k-200/filenames.txt", "a.jpg\nb.jpg\n")
    rows = []
    for key, en, de in (("a", "a cat", "eine Katze"), ("b", "a dog", "ein Hund")):
        rows.append({"image/key": key, "en": {"caption": [en, "more"]}, "de": {"caption": [de]}})
    write(tmp_path / "xm3600/captions.jsonl", "\n".join(map(json.dumps, rows)))
    for folder in ("xtd10", "flickr30k-200", "xm3600"):
        save(tmp_path / folder / "images/a.jpg")
        save(tmp_path / folder / "images/b.jpg")
    return tmp_path


def entries(root, *names, **options) -> list[Entry]:
    return wanted_entries(CatalogOptions(datasets=list(names), root=root, **options))


@pytest.mark.parametrize("name", ["xtd10", "flickr30k-200", "crossmodal3600"])
def test_captions_in_several_languages(name, captions):
    both = entries(captions, name, language=["en", "de"])
    assert [entry.name for entry in both] == [f"{name}/en", f"{name}/de"]
    assert {entry.published for entry in both} == {name}
    found = [opened(entry, captions).images.captions for entry in both]
    assert found == [["a cat", "a dog"], ["eine Katze", "ein Hund"]]
    with pytest.raises(UserError, match=r"has no captions in 'fr'.*; it has de, en"):
        opened(entries(captions, name, language=["fr"])[0], captions)


def test_captions_have_their_images(captions):
    (captions / "xm3600/images/b.jpg").unlink()
    with pytest.raises(UserError, match=r"crossmodal3600: 1 of 2 images are missing"):
        opened(entries(captions, "crossmodal3600")[0], captions)
    write(captions / "xtd10/XTD10/test_1kcaptions_en.txt", "a cat\n")
    with pytest.raises(UserError, match="1 captions for 2 images"):
        opened(entries(captions, "xtd10")[0], captions)


def test_a_retrieval_file_a_language(tmp_path):
    """CLIP_benchmark's own files of annotations, the language in the name."""
    save(tmp_path / "a.jpg")
    paths = [str(tmp_path / "a.jpg")]
    write(tmp_path / "caps-de.json", {"image_paths": paths, "annotations": ["eine Katze"]})
    name = f"retrieval:{tmp_path}/caps-{{language}}.json"
    (entry,) = entries(tmp_path, name, language=["de"])
    assert opened(entry, tmp_path).images.captions == ["eine Katze"]
    for texts in ([5], ["a", "b"], [["a", None]]):
        write(tmp_path / "caps-de.json", {"image_paths": paths, "annotations": texts})
        with pytest.raises(UserError, match="is missing or malformed; retrieval takes"):
            opened(entry, tmp_path)
    (english,) = entries(tmp_path, "flickr30k", language=["de"])
    assert "its captions are English" in str(opened(english, tmp_path))


def test_class_names_in_a_language(tmp_path):
    for name in ("cat", "dog"):
        save(tmp_path / f"pets2/test/{name}/0.png")
    write(tmp_path / "labels.json", {"it": {"pets2": ["gatto", "cane"]}, "de": {"other": ["x"]}})
    write(tmp_path / "it_templates.json", {"pets2": ["una foto di un {c}."]})
    entry = Entry("pets2", "imagefolder", str(tmp_path / "pets2"), language="it")
    prompts = Prompts(tmp_path / "labels.json", tmp_path / "{language}_templates.json", ["it"])
    data = opened(entry, tmp_path, prompts)
    assert (data.classes, data.templates) == (["gatto", "cane"], ["una foto di un {}."])
    with pytest.raises(UserError, match=r"no language 'itt'; did you mean it\?; it has it, de"):
        Prompts(tmp_path / "labels.json", None, ["itt"])
    with pytest.raises(UserError, match=r"fr_templates\.json: no such file"):
        Prompts(None, tmp_path / "{language}_templates.json", ["fr"])
    with pytest.raises(UserError, match="one list of names, but --language asks for several"):
        Prompts(tmp_path / "it_templates.json", None, ["it", "de"])
    without = Prompts(tmp_path / "labels.json", None, ["it"])
    assert "no templates for 'pets2' in 'it'" in str(opened(entry, tmp_path, without))


def test_a_language_twice(tmp_path):
    with pytest.raises(UserError, match="names a language twice"):
        entries(tmp_path, "xtd10", language=["en", "en"])


def test_choices_of_one_name_are_refused():
    """Their scores are kept by it: those of the first would be lost."""
    files = [Path("a/swap.json"), Path("b/swap.json")]
    with pytest.raises(UserError, match=r"--choices: what is made of a/swap\.json and of b/swap"):
        Retrieval.main(Retrieval.Config(evaluate=True, choices=files))
    with pytest.raises(UserError, match=r"--choices a/test\.json: other results are called test"):
        Retrieval.main(Retrieval.Config(evaluate=True, choices=[Path("a/test.json")]))
