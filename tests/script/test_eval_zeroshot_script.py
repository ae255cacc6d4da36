"""eval_zeroshot.py through its real main, on a run of main.py and on third-party checkpoints."""

import argparse
import io
import json
import re
import shutil
import tarfile
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import eval_zeroshot as script
import main as training
from base.errors import UserError
from dataset.images.decode import decode_image
from dataset.tasks.catalog import Entry
from dataset.text.align import AlignTokenizer
from evaluation import zeroshot
from evaluation.compositional import choices, example_scores
from evaluation.retrieval import chance
from models.dual_encoder.config import DualConfig
from models.dual_encoder.factory import build_dual
from models.dual_encoder.openai import OpenAICLIP
from models.layers.clip_towers import TextShape
from models.layers.openai_towers import OpenAIConfig
from models.weights import clip as clip_adapters
from runtime.checkpoint import export_safetensors, read_weights, weights_file
from runtime.config.cli import parse
from tests.helpers.main_runs import ROOT, arguments
from tests.helpers.processes import run_script
from tests.helpers.runs import words_of
from tests.helpers.tiny_open_clip import tiny_open_clip


@pytest.fixture(scope="module")
def trained(digitscenes, tmp_path_factory):
    """A run of main.py with configs/main/debug.yaml, of one update."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    words = arguments(digitscenes, folder, epochs="1 steps", val_folder="none")
    training.main(parse(training.Config, words))
    return folder


def flags(data, checkpoint, output, **changes) -> list[str]:
    values = {
        "config": ROOT / "configs/eval_zeroshot/debug.yaml",
        "checkpoint": checkpoint,
        "output-dir": output,
        "catalog": data / "dataset_catalog.json",
        "labels": data / "labels.json",
        "templates": data / "templates.json",
        "datasets": ["digitscenes"],
        "device": "cpu",
    } | {name.replace("_", "-"): value for name, value in changes.items()}
    return words_of(values)


def results(words: list[str], output) -> dict:
    script.main(parse(script.Config, words))
    return json.loads((output / "result/metrics.json").read_text())


def launch(processes: int, words: list[str], expect: int = 0) -> str:
    return run_script("eval_zeroshot.py", words, processes, expect)


def everything(data) -> list[str]:
    return ["digitscenes", "digitscenes_filelist", f"retrieval:{data / 'dataset_digitscenes.json'}"]


def test_a_run_by_its_folder_alone(trained, digitscenes, tmp_path, capsys):
    words = flags(digitscenes, "none", trained, datasets=everything(digitscenes))
    found = results(words, trained)["results"]
    table = capsys.readouterr().out
    assert found["digitscenes"]["images"] == 24 and found["digitscenes"]["classes"] == 10
    assert found["digitscenes_filelist"] == found["digitscenes"]
    assert {"acc1_z", "acc5_h", "acc1_zh_0.1", "acc1_zh_0.9"} <= found["digitscenes"].keys()
    recall = found["dataset_digitscenes"]
    assert recall["captions"] == 120 and {"txt_r1_z", "img_r10_zh_0.5"} <= recall.keys()
    assert f"{found['digitscenes']['acc1_z']:.2f}" in table and "dataset_digitscenes" in table
    (means,) = re.findall(r"^mean .*", table, re.M)
    assert means.split()[-1] == f"{found['digitscenes']['chance']:.2f}", "of both sets, beside it"
    page = (trained / "result/report.html").read_text()
    assert "Ensembles" in page and "http" not in page.replace("http://www.w3.org", "")
    assert page.count('class="guide"') == 3, "chance in each chart"
    assert (trained / "result/config.yaml").is_file()


def test_the_same_as_the_validation_of_main(trained, digitscenes, tmp_path, capsys):
    words = arguments(
        digitscenes, tmp_path / "val", "--evaluate", checkpoint=trained / "model.safetensors"
    )
    training.main(parse(training.Config, words))
    expected = json.loads(capsys.readouterr().out)
    found = results(flags(digitscenes, trained, tmp_path / "out", split="val"), tmp_path / "out")[
        "results"
    ]["digitscenes"]
    assert {name: found[name] for name in expected} == expected


def test_a_model_of_open_clip(digitscenes, tmp_path, capsys):
    """The library's model, tokenizer and transform; our data, prompts and evaluation."""
    import open_clip

    name = f"local-dir:{tiny_open_clip(tmp_path / 'model')}"
    words = flags(digitscenes, "none", tmp_path / "out", model=f"open_clip/{name}")
    found = results(words, tmp_path / "out")
    assert found["model"] == found["checkpoint"] == f"open_clip/{name}"
    row, table = found["results"]["digitscenes"], capsys.readouterr().out
    assert row["chance"] == 10 and "chance" in table and "written: " in table

    model, _, transform = open_clip.create_model_and_transforms(name)
    tokenizer = open_clip.get_tokenizer(name)
    classes = json.loads((digitscenes / "labels.json").read_text())["digitscenes"]
    templates = json.loads((digitscenes / "templates.json").read_text())["digitscenes"]
    right, model = [], model.eval()
    with torch.no_grad():
        rows = []
        for each in classes:
            text = model.encode_text(tokenizer([t.replace("{}", each) for t in templates]))
            mean = torch.nn.functional.normalize(text, dim=-1).mean(0)
            rows.append(torch.nn.functional.normalize(mean, dim=-1))
        for folder in sorted((digitscenes / "imagefolder/test").iterdir()):
            for file in sorted(folder.iterdir()):
                image = model.encode_image(transform(Image.open(file))[None])
                best = int((image @ torch.stack(rows).T).argmax())
                right.append(classes[best] == folder.name)
    assert row["acc1_z"] == pytest.approx(100 * sum(right) / len(right))


def test_libraries_in_one_sentence(digitscenes, tmp_path):
    for change, message in (
        ({"model": "open_clip/ViT-B-33"}, "did you mean open_clip/ViT-B-32"),
        ({"model": "open_clip/ViT-B-32"}, "name its weights"),
        ({"model": "timm/resnet50"}, "eval_knn.py"),
        ({"model": "hf/./gone"}, "no such folder"),
        ({"model": "ViT-B/32", "random-weights": "true"}, "--random-weights is for"),
    ):
        words = flags(digitscenes, "none", tmp_path / "out", **change)
        with pytest.raises(UserError, match=message):
            script.main(parse(script.Config, words))


def test_two_processes_and_a_missing_data_set(trained, digitscenes, tmp_path):
    alone = results(
        flags(digitscenes, trained, tmp_path / "1", datasets=everything(digitscenes)),
        tmp_path / "1",
    )
    names = [*everything(digitscenes), "cifar10", "imagenet"]
    output = launch(
        2,
        flags(
            digitscenes,
            trained,
            tmp_path / "2",
            datasets=names,
            cache=tmp_path / "other",
            workers=1,
        ),
    )
    found = json.loads((tmp_path / "2/result/metrics.json").read_text())
    assert found["results"] == alone["results"]
    assert output.count("SKIPPED cifar10") == 1 and "--download" in output
    assert "2 SKIPPED, see above: cifar10, imagenet" in output and list(found["skipped"]) == [
        "cifar10",
        "imagenet",
    ]
    assert "cifar10" in (tmp_path / "2/result/report.html").read_text()


def test_shards_score_like_the_folders_they_are_made_of(trained, digitscenes, tmp_path):
    root, names = (
        tmp_path / "wds_toys",
        json.loads((digitscenes / "labels.json").read_text())["digitscenes"],
    )
    (root / "test").mkdir(parents=True)
    files = [
        (file, label)
        for label, name in enumerate(names)
        for file in (digitscenes / "imagefolder/test" / name).iterdir()
    ]
    for shard in range(2):
        with tarfile.open(root / f"test/{shard}.tar", "w") as archive:
            for number, (file, label) in enumerate(files[shard::2]):
                archive.add(file, f"s{number}{file.suffix}")
                member = tarfile.TarInfo(f"s{number}.cls")
                member.size = 1
                archive.addfile(member, io.BytesIO(str(label).encode()))
    (root / "test/nshards.txt").write_text("2")
    (root / "classnames.txt").write_text("\n".join(names))
    templates = json.loads((digitscenes / "templates.json").read_text())["digitscenes"]
    (root / "zeroshot_classification_templates.txt").write_text(
        "\n".join(templates).replace("{}", "{c}")
    )
    words = flags(
        digitscenes, trained, tmp_path / "out", datasets=["digitscenes", f"wds:file://{root}"]
    )
    found = results(words, tmp_path / "out")["results"]
    assert found["toys"] == found["digitscenes"]


def test_everything_a_folder_holds_on_one_page(trained, digitscenes, tmp_path, capsys):
    """Class folders, a list of captions and SugarCrepe's form below one root: one page, figures by
    class, CLIP_benchmark's rows."""
    root, output = tmp_path / "root", tmp_path / "out"
    shutil.copytree(digitscenes / "imagefolder/test", root / "mnist/test")
    names = json.loads((digitscenes / "labels.json").read_text())["digitscenes"]
    (tmp_path / "labels.json").write_text(json.dumps({"mnist": names}))
    images = sorted(root.glob("mnist/test/*/*"))
    examples = {}
    for number in (0, 3):
        name = str(images[number].relative_to(root / "mnist"))
        examples[number] = {"filename": name, "caption": "four", "negative_caption": "nine"}
    (root / "sugar_crepe").mkdir()
    (root / "sugar_crepe/swap_att.json").write_text(json.dumps(examples))
    (root / "sugar_crepe/val2017").symlink_to(root / "mnist")
    captions = [{"image": str(file), "caption": file.parent.name} for file in images]
    (root / "captions.json").write_text(json.dumps(captions))
    words = ["--checkpoint", str(trained), "--root", str(root), "--output-dir", str(output)]
    words += ["--labels", str(tmp_path / "labels.json"), "--device", "cpu", "--workers", "0"]
    merges = digitscenes / "bpe/bpe_merges.txt.gz"
    words += ["--bpe-path", str(merges), "--results", str(tmp_path / "all.jsonl")]
    found = results(words, output)
    assert {"mnist", "sugar_crepe/swap_att"} == found["results"].keys()
    assert "winoground" in found["skipped"] and "vtab_plus" not in found
    choice = found["results"]["sugar_crepe/swap_att"]
    assert choice["examples"] == choice["images"] == 2
    assert choice["chance"]["text_acc"] == 50 and choice["image_acc_z"] == 100

    page = (output / "result/report.html").read_text()
    for part in ("Confusions, mnist", "The hardest first", "Wrong: ", "chance"):
        assert part in page
    classes = json.loads((output / "result/classes.json").read_text())["mnist"]
    assert [row["class"] for row in classes] == names
    weighted = sum(row["images"] * row["figure"] for row in classes) / len(images)
    assert weighted == pytest.approx(found["results"]["mnist"]["acc1_z"])

    words += ["--datasets", "vtab+", f"retrieval:{root}/captions.json"]
    summary = results(words, output)["vtab_plus"]
    assert summary["mean"] is None and len(summary["missing"]) == 34
    assert summary["mean_of_present"] == pytest.approx(found["results"]["mnist"]["acc1_z"])
    assert "VTAB+: no mean, 1 of 35 data sets" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    tasks = {row["dataset"]: row["task"] for row in rows}
    assert tasks == {
        "sugar_crepe/swap_att": "image_caption_selection",
        "mnist": "zeroshot_classification",
        "captions": "zeroshot_retrieval",
    }
    assert rows[-1]["pretrained"] == found["checkpoint"]


def test_images_are_encoded_once_for_all_languages(trained, digitscenes, tmp_path, monkeypatch):
    """Captions of the same images in two languages; as if each were evaluated alone."""
    files = sorted((digitscenes / "imagefolder/test").glob("*/*"))
    for language, word in (("en", "number"), ("de", "Zahl")):
        rows = [{"image": str(f), "caption": f"{f.parent.name} {word} {f.stem}"} for f in files]
        (tmp_path / f"{language}.json").write_text(json.dumps(rows))
    words = flags(
        digitscenes, trained, tmp_path / "out", datasets=[f"retrieval:{tmp_path}/{{language}}.json"]
    )
    for name in ("catalog", "labels", "templates"):
        words[words.index(f"--{name}") + 1] = "none"
    calls = []

    def counted(*arguments):
        calls.append(arguments)
        return embed_images(*arguments)

    embed_images = script.zeroshot.embed_images
    monkeypatch.setattr(script.zeroshot, "embed_images", counted)
    both = results([*words, "--language", "en", "de"], tmp_path / "out")["results"]
    assert len(calls) == 1 and set(both) == {"captions/en", "captions/de"}
    for language in ("en", "de"):
        alone = results([*words, "--language", language], tmp_path / "out")["results"]
        assert alone == {"captions": both[f"captions/{language}"]}
    rows = map(json.loads, (tmp_path / "out/result/results.jsonl").read_text().splitlines())
    assert [(row["dataset"], row["language"]) for row in rows] == [
        ("captions", "en"),
        ("captions", "de"),
    ]


def test_nothing_to_evaluate_is_an_error(trained, digitscenes, tmp_path):
    output = launch(
        1,
        flags(digitscenes, trained, tmp_path / "out", datasets=["cifar10"], root="no/where"),
        expect=2,
    )
    assert (
        "none of the data sets is on this machine: cifar10" in output and "Traceback" not in output
    )


def test_classifiers_are_kept(trained, digitscenes, tmp_path, monkeypatch):
    words = flags(digitscenes, trained, tmp_path / "out", cache=tmp_path / "kept")
    first = results(words, tmp_path / "out")
    (kept,) = (tmp_path / "kept/classifiers").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(zeroshot, "text_classifier", lambda *_, **__: 1 / 0)
        assert results(words, tmp_path / "out") == first
        changed = tmp_path / "templates.json"
        changed.write_text(json.dumps({"digitscenes": ["another {}."]}))
        with pytest.raises(ZeroDivisionError):  # other prompts, another classifier
            results([*words, "--templates", str(changed)], tmp_path / "out")
    kept.write_bytes(kept.read_bytes()[:50])
    assert results(words, tmp_path / "out") == first


def test_clip_rockets_own_checkpoint(trained, digitscenes, tmp_path):
    config = parse(training.Config, ["--config", str(ROOT / "configs/main/debug.yaml")]).network
    weights = read_weights(trained)
    args = argparse.Namespace(**vars(config), epochs=1)
    args.vocab_size = len(weights["token_embedding.weight"])
    state = {f"module.{name}": value for name, value in weights.items()}
    torch.save({"epoch": 1, "state_dict": state, "args": args}, tmp_path / "checkpoint_best.pt")
    merges = digitscenes / "bpe/bpe_merges.txt.gz"
    words = ["--resume", str(tmp_path), "--bpe-path", str(merges), "--model-name", "ROCKET"]
    words = flags(digitscenes, "none", tmp_path / "theirs") + words
    found = results(words, tmp_path / "theirs")
    assert found["model"] == "ROCKET"
    assert (
        found["results"]
        == results(flags(digitscenes, trained, tmp_path / "out"), tmp_path / "out")["results"]
    )


@pytest.mark.parametrize("layout", ["openai", "hugging_face"])
def test_other_layouts(layout, digitscenes, tmp_path, trained):
    torch.manual_seed(0)
    vocabulary = len(read_weights(trained)["token_embedding.weight"])
    text = TextShape(context_length=32, vocab_size=vocabulary, width=64, heads=1, layers=1)
    model = OpenAICLIP(
        OpenAIConfig(
            embed_dim=8, image_size=16, vision_width=64, vision_layers=1, patch_size=8, text=text
        )
    )
    if layout == "openai":
        torch.save(
            model.state_dict() | {"input_resolution": torch.tensor(16)}, tmp_path / "model.pt"
        )
    else:
        torch.save(clip_adapters.to_hugging_face(model), tmp_path / "model.pt")
        (tmp_path / "config.json").write_text(
            json.dumps(clip_adapters.hugging_face_config(model.config))
        )
    merges = digitscenes / "bpe/bpe_merges.txt.gz"
    if layout == "hugging_face":  # published CLIPs of this layout differ in their pixels
        words = flags(digitscenes, tmp_path / "model.pt", tmp_path / "out", bpe_path=merges)
        with pytest.raises(UserError, match=r"mean and std of their pixels: .*preprocessor_config"):
            results(words, tmp_path / "out")
        images = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(images))
    found = results(
        flags(digitscenes, tmp_path / "model.pt", tmp_path / "out", bpe_path=merges),
        tmp_path / "out",
    )
    assert {"acc1_z"} == {
        name
        for name in found["results"]["digitscenes"]
        if name.startswith("acc1_") and "acc5" not in name
    }
    with pytest.raises(ValueError, match=f"{vocabulary} tokens, but .* makes 49408.*--bpe-path"):
        results(
            flags(digitscenes, tmp_path / "model.pt", tmp_path / "out", datasets=["digitscenes"]),
            tmp_path / "out",
        )


def test_align(digitscenes, tmp_path):
    torch.manual_seed(0)
    tokenizer = AlignTokenizer(digitscenes / "tokenizer", 24)
    config = DualConfig(
        model="ALIGN_NANO_TINY",
        image_size=32,
        embed_dim=8,
        context_length=24,
        vocab_size=tokenizer.vocab_size,
    )
    export_safetensors(build_dual(config).state_dict(), tmp_path / "model.safetensors")
    network = {**vars(config)}
    (tmp_path / "config.yaml").write_text(
        json.dumps({"network": network, "tokenizer": str(digitscenes / "tokenizer")})
    )
    found = results(
        flags(digitscenes, tmp_path / "model.safetensors", tmp_path / "out"), tmp_path / "out"
    )
    assert found["model"] == "ALIGN_NANO_TINY" and "acc1_z" in found["results"]["digitscenes"]


MISTAKES = {
    "unknown data set": ({"datasets": ["digitscene"]}, "did you mean digitscenes?"),
    "unknown model": ({"model": "CL2L_VITT9_CL2L"}, "CL2L_VITT8_CL2L"),
    "another model": ({"model": "CLIP_VITT8_CLIP"}, "the checkpoint is a CL2L_VITT8_CL2L"),
    "no checkpoint": ({"checkpoint": "no/such.pt"}, "no/such.pt"),
    "neither checkpoint nor run": (
        {"checkpoint": "none", "output_dir": "no/such/run"},
        "--output-dir",
    ),
    "no such catalogue": ({"catalog": "no/catalog.json"}, "no/catalog.json"),
    "download of everything": ({"datasets": [], "download": "true"}, "--datasets"),
    "no such shards": ({"datasets": ["wds:no/shards"]}, "none of the data sets"),
    "fp16 on the CPU": ({"precision": "fp16"}, "bf16"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_clear_message(mistake, trained, digitscenes, tmp_path):
    changes, named = MISTAKES[mistake]
    with pytest.raises(Exception) as caught:
        results(
            flags(digitscenes, **{"checkpoint": trained, "output": tmp_path / "out"} | changes),
            tmp_path / "out",
        )
    assert isinstance(caught.value, UserError), repr(caught.value)
    assert named in str(caught.value)


def test_faults_of_data_are_told_before_the_checkpoint_is_read(
    trained, digitscenes, tmp_path, monkeypatch
):
    monkeypatch.setattr(script, "open_encoder", lambda *_: 1 / 0)

    def refused(message, **changes):
        with pytest.raises(ValueError, match=message):
            results(flags(digitscenes, trained, tmp_path / "out", **changes), tmp_path / "out")

    (tmp_path / "templates.json").write_text(json.dumps({"digitscenes": ["a digit."]}))
    refused(r"'a digit\.' of digitscenes has no \{\}", templates=tmp_path / "templates.json")
    (tmp_path / "labels.json").write_text(json.dumps({"digitscenes": "zero"}))
    refused(r"labels\.json: 'digitscenes' must be a list", labels=tmp_path / "labels.json")
    shutil.copytree(digitscenes / "imagefolder/test", tmp_path / "toys/test")
    shutil.rmtree(tmp_path / "toys/test/seven")
    catalog = {
        "digitscenes": {"path": "toys", "type": "imagefolder", "test": "test"},
        "new": {"path": "toys"},
    }
    (tmp_path / "catalog.json").write_text(json.dumps(catalog))
    refused(r"entry 'new' lacks type", catalog=tmp_path / "catalog.json")
    del catalog["new"]
    (tmp_path / "catalog.json").write_text(json.dumps(catalog))
    refused("no folder for seven", catalog=tmp_path / "catalog.json")


def test_configurations_are_read():
    for recipe in (ROOT / "configs/eval_zeroshot").glob("*.yaml"):
        config = parse(script.Config, ["--config", str(recipe)])
        own_catalog = config.catalog != script.Config().catalog  # of which all data sets are meant
        assert config.datasets or own_catalog


def test_one_image_and_words(trained, digitscenes, tmp_path, capsys):
    """Probabilities as by hand, beside chance; no data set is needed."""
    image = next((digitscenes / "images/test2017").iterdir())
    words = ["a red nine", "a blue five", "a green seven"]
    out = tmp_path / "out"
    bpe = digitscenes / "bpe/bpe_merges.txt.gz"
    asked = ["--checkpoint", trained, "--image", image, "--words", *words, "--output-dir", out]
    script.main(parse(script.Config, [*map(str, asked), "--bpe-path", str(bpe), "--device", "cpu"]))
    said = capsys.readouterr().out
    found = json.loads((out / "result/words.json").read_text())
    assert found["chance"] == pytest.approx(1 / 3) and "chance 33.3%" in said
    assert f"written: {out}/result/words.json" in said and all(word in said for word in words)
    config = script.Config(checkpoint=weights_file(trained), bpe_path=bpe, device="cpu")
    opened = script.open_encoder(config, script.distributed.init("cpu")).opened
    view, embed = script.image_side(opened, torch.device("cpu"))
    with torch.no_grad():
        query = F.normalize(embed(view(decode_image(image))[None])["z"], dim=-1)
        text = F.normalize(opened.model.embed_text(opened.tokenize(words))["z"], dim=-1)
        probability = (opened.model.logit_scale.exp() * text @ query[0]).softmax(0)
    expected = dict(zip(words, probability.tolist(), strict=True))
    given = {each["text"]: each["probability"] for each in found["words"]}
    assert given == pytest.approx(expected, rel=1e-4)
    assert list(given.values()) == sorted(given.values(), reverse=True)


@pytest.mark.parametrize(
    "flags", [["--image", "cat.jpg"], ["--words", "a", "b"], ["--image", "cat.jpg", "--words", "a"]]
)
def test_image_and_words_belong_together(trained, flags):
    with pytest.raises(UserError, match="needs two --words or more"):
        script.main(parse(script.Config, ["--checkpoint", str(trained), *flags]))


def test_words_for_a_model_of_a_library(digitscenes, tmp_path):
    name = f"open_clip/local-dir:{tiny_open_clip(tmp_path / 'model')}"
    image = next((digitscenes / "images/test2017").iterdir())
    asked = ["--model", name, "--image", str(image), "--words", "a cat", "a dog"]
    script.main(parse(script.Config, [*asked, "--output-dir", str(tmp_path), "--device", "cpu"]))
    found = json.loads((tmp_path / "result/words.json").read_text())
    assert sum(each["probability"] for each in found["words"]) == pytest.approx(1)


def unit_rows(rows: int, generator: torch.Generator) -> torch.Tensor:
    return F.normalize(torch.randn(rows, 4, generator=generator), dim=-1)


class ThreeImages(SimpleNamespace):
    def __len__(self):
        return 3


def test_what_stands_beside_the_recalls_and_the_choices():
    """Chance, counts, damages and the page's examples."""
    generator = torch.Generator().manual_seed(0)
    image, text = ({"z": unit_rows(count, generator)} for count in (3, 5))
    owner = torch.tensor([0, 0, 1, 2, 2])
    captions = ThreeImages(text_image=owner, captions=list("abcde"))
    data = script.OpenSet(Entry("pairs", "retrieval", "x", metric="recall"), captions)
    world, damages = script.distributed.init("cpu"), {"unreadable_images": 1}
    figures, card = script.rank_pairs(data, image, text, damages, world)[1:3]
    assert figures["images"] == 3 and figures["captions"] == 5
    assert figures["unreadable_images"] == 1 and figures["chance"] == chance(owner, 3)
    by_image, by_text = card.args[3:]
    nearest = (image["z"] @ text["z"].T).argsort(1, descending=True)
    assert torch.equal(by_image.candidates, nearest) and by_text.candidates.shape == (5, 3)

    for images, expected in ((1, 50.0), (2, 25.0)):
        examples = torch.arange(2 * images).view(2, images) % 3
        captions.example_images = examples
        captions.example_captions = torch.tensor([[0, 1], [2, 3]])
        found = script.choose_texts(data, image, text, damages).figures
        assert found["chance"]["text_acc"] == expected and found["examples"] == 2
        assert found["unreadable_images"] == 1
        right = choices(example_scores(image["z"], text["z"], examples, captions.example_captions))
        assert {f"{name}_z": value for name, value in right.items()}.items() <= found.items()


def test_precision_is_that_of_every_forward_pass(monkeypatch):
    asked = []

    def noted(*given):
        asked.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
        return given[0]

    monkeypatch.setattr(script, "classify_images", noted)
    monkeypatch.setattr(script, "embed_pairs", lambda *given: (noted(*given), {}, {}))
    monkeypatch.setattr(script, "rank_pairs", lambda *_: asked.append("ranked"))
    monkeypatch.setattr(script, "choose_texts", lambda *_: asked.append("chosen"))
    opened = SimpleNamespace(model=torch.nn.Identity())
    precision = script.Precision("bf16", torch.device("cpu"))
    encoder = SimpleNamespace(opened=opened, precision=precision)
    for classes, metric in ((["a"], "acc1"), ([], "recall"), ([], "text_acc")):
        entry = SimpleNamespace(metric=metric)
        script.evaluate(SimpleNamespace(classes=classes, entry=entry), encoder, None, None)
    assert asked == [torch.bfloat16, torch.bfloat16, "ranked", torch.bfloat16, "chosen"]


def test_a_classifier_is_told_by_all_that_its_text_embeddings_depend_on(monkeypatch):
    """The network's title, tokenizer and context, the precision and the device."""
    facts = {"title": "net", "context_length": 7, "identity": "tokenizer", "precision": "fp32"}
    monkeypatch.setattr(script.zeroshot, "fingerprint", lambda model, makes: tuple(makes))
    monkeypatch.setattr(script, "image_side", lambda opened, device: (None, None))
    world = script.distributed.init("cpu")

    def signature(**changes) -> tuple:
        given = facts | changes
        opened = SimpleNamespace(model=torch.nn.Identity(), **given)
        monkeypatch.setattr(script, "open_checkpoint", lambda config: (opened, given["identity"]))
        config = SimpleNamespace(model=None, precision=given["precision"])
        return script.open_encoder(config, world).signature

    changes = [{"title": "x"}, {"context_length": 8}, {"identity": "y"}, {"precision": "bf16"}]
    found = [signature(), *(signature(**change) for change in changes)]
    assert found[0] == signature() and len(set(found)) == 5


def test_options_that_exclude_each_other(tmp_path):
    for words, message in (
        (["--model", "hf/x", "--checkpoint", "x", "--random-weights"], "exclude each other"),
        (["--output-dir", str(tmp_path / "gone")], "add --checkpoint FILE"),
        (["--checkpoint", "x", "--download"], "--download fetches named data sets"),
    ):
        with pytest.raises(UserError, match=message):
            parse(script.Config, words)
