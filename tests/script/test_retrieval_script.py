"""Retrieval.py through its real main: fine-tuning, resume, evaluation, what users get wrong, and
the report page."""

import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch

import Retrieval
from base.errors import UserError
from dataset.digitscenes.build import Request, build
from evaluation import retrieval
from evaluation.report.retrieval import save_rankings
from evaluation.retrieval import Ranking
from runtime.checkpoint import read_weights
from runtime.config.cli import parse
from scripts import report
from tests.helpers.runs import log_lines, words_of

ROOT = Path(__file__).resolve().parents[2]
RECALLS = {f"{way}_r{at}" for way in ("txt", "img") for at in (1, 5, 10)} | {
    "txt_r_mean",
    "img_r_mean",
    "r_mean",
    "chance",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("digitscenes")
    build(folder, Request(train=24, val=20, test=20, size=32, seed=0))
    return folder


def flags(data: Path, out: Path, *more) -> list[str]:
    values = {
        "config": "configs/Retrieval/debug.yaml",
        "output_dir": out,
        "device": "cpu",
        "image_root": data,
        "text_encoder": data / "tokenizer",
    }
    for name in ("train", "val", "test"):
        values[f"{name}_file"] = data / f"retrieval_{name}.json"
    return [*words_of(values), *map(str, more)]


def start(data: Path, out: Path, *more) -> dict:
    """Run the script; returns its metrics."""
    Retrieval.main(parse(Retrieval.Config, flags(data, out, *more)))
    return json.loads((out / "result/metrics.json").read_text())


@pytest.fixture(scope="module")
def finetuned(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("finetuned") / "run"
    start(data, out)
    return out


def test_finetuning_validates_and_keeps_the_best(data, finetuned):
    lines = log_lines(finetuned)
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6, 8]
    validations = {line["step"]: line["val_r_mean"] for line in lines if "val_r_mean" in line}
    assert list(validations) == [4, 8]
    best = torch.load(finetuned / "checkpoint_best.pt", weights_only=True)
    score = validations[best["step"]]
    assert score == max(validations.values())
    metrics = json.loads((finetuned / "result/metrics.json").read_text())
    assert set(metrics["test"]) == RECALLS and metrics["val"]["r_mean"] == pytest.approx(score)
    assert metrics["checkpoint"] == str(finetuned / "checkpoint_best.pt")
    # of 20 images with five captions each
    by_image = [1 - math.comb(95, k) / math.comb(100, k) for k in (1, 5, 10)]
    by_caption = [k / 20 for k in (1, 5, 10)]
    assert metrics["test"]["chance"] == pytest.approx(100 * sum(by_image + by_caption) / 6)
    page = (finetuned / "result/report.html").read_text()
    assert page.index("test: 20 images, 100 captions") < page.index("val: 20 images, 100 captions")


def test_evaluation_of_a_checkpoint_inherits_the_network(data, finetuned, tmp_path, monkeypatch):
    """Its temperature, too: `score: sum` adds similarities as logits."""
    with_matching, weights = retrieval.with_matching, []

    def noted(similar, matching, weight):
        weights.append(weight)
        return with_matching(similar, matching, weight)

    monkeypatch.setattr(retrieval, "with_matching", noted)
    config = tmp_path / "bare.yaml"
    config.write_text("k_test: 4\nscore: sum\nworkers: 0\n")
    given = f"--config {config} --evaluate --checkpoint {finetuned} --output_dir {tmp_path}/out"
    given += f" --test_file {data}/retrieval_test.json --image_root {data} --device cpu"
    Retrieval.main(parse(Retrieval.Config, given.split()))
    metrics = json.loads((tmp_path / "out/result/metrics.json").read_text())
    assert metrics["test"] == json.loads((finetuned / "result/metrics.json").read_text())["test"]
    assert not (tmp_path / "out/log.jsonl").exists()
    assert weights == pytest.approx([1 / read_weights(finetuned)["temp"].item()] * 2)
    rank, lengths = Retrieval.rank, []

    def captions_noted(model, images, count, captions, *given, **options):
        lengths.append(captions.ids.shape[1])
        return rank(model, images, count, captions, *given, **options)

    monkeypatch.setattr(Retrieval, "rank", captions_noted)
    more = ["--score", "matching", "--max_tokens", "6"]
    Retrieval.main(parse(Retrieval.Config, [*given.split(), *more]))
    assert weights[2:] == [0, 0] and lengths == [6]


def test_recalls_at_10_without_re_ranking_need_no_k_of_10(data, finetuned, tmp_path):
    found = []
    for k in (1, 20):
        words = {"evaluate": "true", "checkpoint": finetuned, "output_dir": tmp_path / str(k)}
        words |= {"test_file": data / "retrieval_test.json", "image_root": data, "workers": 0}
        words |= {"device": "cpu", "rerank": "false", "k_test": k}
        Retrieval.main(parse(Retrieval.Config, words_of(words)))
        found.append(json.loads((tmp_path / str(k) / "result/metrics.json").read_text())["test"])
    assert found[0] == found[1]


@pytest.mark.parametrize("two_stage", [True, False])
def test_pretraining_checkpoint_in_the_originals_form(data, tmp_path, two_stage):
    """A .pth with `model`, `config` ... as the originals saved it, at another resolution; kind found
    by its keys."""
    from dataset.text.wordpiece import Tokenizer
    from models.fusion.simla import Simla, SimlaConfig
    from models.layers.vit import ViTConfig
    from models.layers.xbert import BertConfig

    geometry = json.loads((ROOT / "configs/bert_debug.json").read_text()) | {"encoder_width": 32}
    if two_stage:
        geometry = {
            key: value for key, value in geometry.items() if key != "add_cross_attention"
        } | {"fusion_layer": 1}
    (tmp_path / "bert.json").write_text(json.dumps(geometry))
    bert = BertConfig.from_json(geometry | {"vocab_size": Tokenizer(data / "tokenizer").vocab_size})
    vit = ViTConfig(48, 16, 32, 2, 2, mask_token=not two_stage)
    losses = {"mim": not two_stage, "keywords": 0 if two_stage else 5}
    model = Simla(SimlaConfig(vit, bert, embed_dim=16, queue_size=50, **losses))
    config = {"image_res": 48, "bert_config": "configs/of_another_machine.json"}
    saved = {"model": model.state_dict(), "epoch": 29, "config": config}
    torch.save(saved, tmp_path / "original.pth")
    given = f"--evaluate --checkpoint {tmp_path}/original.pth --bert_config {tmp_path}/bert.json"
    assert set(start(data, tmp_path / "out", *given.split())["test"]) == RECALLS


def test_interrupted_run_ends_with_the_same_weights(data, finetuned, tmp_path):
    with pytest.raises(SystemExit) as left:
        start(data, tmp_path, "--max_steps", 5)
    assert left.value.code == 0
    start(data, tmp_path)
    straight, resumed = (
        torch.load(d / "checkpoint_00000008.pt", weights_only=True) for d in (finetuned, tmp_path)
    )
    for key, value in straight["model"].items():
        assert torch.equal(value, resumed["model"][key]), key
    timeless = [
        {k: v for k, v in line.items() if k.startswith(("step", "loss", "val_")) and k != "step_s"}
        for line in log_lines(finetuned)
    ]
    again = [
        {k: v for k, v in line.items() if k.startswith(("step", "loss", "val_")) and k != "step_s"}
        for line in log_lines(tmp_path)
    ]
    assert timeless == again


def test_without_reranking_the_order_is_that_of_the_contrast(data, finetuned, tmp_path):
    metrics = start(data, tmp_path, "--evaluate", "--checkpoint", finetuned, "--no-rerank")
    assert metrics["k_test"] == 0 and set(metrics["test"]) == RECALLS


def test_choices_among_captions(data, finetuned, tmp_path):
    """SugarCrepe's and Winoground's forms: scores of single pairs, computed one by one."""
    records = json.loads((data / "retrieval_test.json").read_text())[:5]  # odd: half is no score
    rows, pairs = {}, []
    for number, record in enumerate(records):
        caption, other = record["caption"][0], records[number - 1]["caption"][0]
        rows[str(2 * number)] = {
            "filename": record["image"],
            "caption": caption,
            "negative_caption": other,
        }
    for first, second in (records[:2], records[2:4]):
        pair = {"image_0": first["image"], "image_1": second["image"]}
        pairs.append(pair | {"caption_0": first["caption"][0], "caption_1": second["caption"][0]})
    (tmp_path / "swap_obj.json").write_text(json.dumps(rows))
    (tmp_path / "examples.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    more = ["--evaluate", "--checkpoint", finetuned, "--val_file", "none", "--test_file", "none"]
    more += ["--choices", tmp_path / "swap_obj.json", tmp_path / "examples.jsonl"]
    found = start(data, tmp_path / "out", *more)
    assert found["swap_obj"]["chance"] == {"text_acc": 50, "image_acc": 100, "acc": 50}
    assert found["examples"]["chance"]["acc"] == pytest.approx(100 / 6)
    page = (tmp_path / "out/result/report.html").read_text()
    assert "ITM" in page and "both" in page

    alone = one_by_one(
        data,
        finetuned,
        tmp_path,
        [(row["filename"], row["caption"], row["negative_caption"]) for row in rows.values()],
    )
    for number, prefix in enumerate(("itc_", "")):
        right = sum(scores[0][number] > scores[1][number] for scores in alone)
        assert found["swap_obj"][f"{prefix}text_acc"] == pytest.approx(100 * right / 5)


def one_by_one(data, checkpoint, tmp_path, examples) -> list[list[tuple[float, float]]]:
    """(ITC, ITM) of each caption of (image, caption, other caption), a forward pass each."""
    from dataset.images.decode import decode_image
    from dataset.tasks.loaders import test_view
    from dataset.text.wordpiece import Tokenizer, pre_caption
    from models.weights.albef import start_from

    of_checkpoint = ["--evaluate", "--checkpoint", checkpoint]
    config = parse(Retrieval.Config, flags(data, tmp_path / "alone", *of_checkpoint))
    weights = Retrieval.prepare(config).weights  # and the network's sizes, in config
    tokenizer = Tokenizer(config.text_encoder)
    model = Retrieval.build_model(config, tokenizer)
    start_from(model, weights, "retrieval")
    model.eval()
    found = []
    with torch.no_grad():
        for file, *captions in examples:
            image = test_view(config)(decode_image(data / file))[None]
            tokens, of_image = model.encode_image(image)
            scores = []
            for caption in captions:
                ids, mask = tokenizer([pre_caption(caption, 30)], 30, lengths=None)
                _, of_text = model.encode_text(ids, mask)
                rows = torch.zeros(1, dtype=torch.int64)
                matching = model.match_scores(ids, mask, tokens, rows).item()
                scores.append(((of_image @ of_text.T).item(), matching))
            found.append(scores)
    return found


def test_report_is_one_file_that_needs_nothing_else(data, finetuned, tmp_path, monkeypatch, capsys):
    given = f"--retrieval_dir {finetuned} --finetuned_dir {finetuned} --pretrain_dir {finetuned}"
    report.main(parse(report.Config, [*given.split(), "--output", str(tmp_path / "page.html")]))
    page = (tmp_path / "page.html").read_text()
    for fragment in ("chance", "<svg", "data:image/jpeg;base64,", "Retrieved", "loss: ita"):
        assert fragment in page
    assert (
        not re.search(r"(src|href)=.?(?!data:)(http|//|/|\w+\.(js|css|png))", page)
        and "<script" not in page
    )
    alone = re.sub(r"data:image/jpeg;base64,[A-Za-z0-9+/=]*", "", page)
    assert "http" not in alone


def test_report_of_what_is_no_retrieval_is_one_sentence(tmp_path):
    result = tmp_path / "result"
    result.mkdir()
    (tmp_path / "list.json").write_text(json.dumps([{"image": "a.png", "caption": ["x", "y"]}]))
    saved = {"test_file": str(tmp_path / "list.json"), "image_root": ".", "image_res": 32}
    saved |= {"max_words": 9, "text_encoder": str(tmp_path / "vocab.txt")}
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "x", "y"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    (result / "config.yaml").write_text(json.dumps(saved))

    def said(metrics: dict, *more: str) -> str:
        (result / "metrics.json").write_text(json.dumps(metrics))
        with pytest.raises(UserError) as caught:
            report.main(parse(report.Config, ["--retrieval_dir", str(tmp_path), *more]))
        return str(caught.value)

    assert "no scores of a test_file by Retrieval.py" in said({"test": {"accuracy": 3}})
    scores = {"test": {"r_mean": 1.0}}
    file = result / "ranking_test.safetensors"
    assert "ranking_test.safetensors" in said(scores)  # no such file
    file.write_bytes(b"x")
    assert "ranking_test.safetensors" in said(scores)
    both = [Ranking(torch.zeros(3, 1, dtype=torch.int64), torch.zeros(3, 1), 3) for _ in range(2)]
    save_rankings(file, *both)
    assert "of another list than" in said(scores)
    (tmp_path / "list.json").rename(tmp_path / "retrieval_test.json")
    there = f"of another list than {tmp_path}/retrieval_test.json"
    assert there in said(scores, "--data", str(tmp_path))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--evaluate"], "--evaluate needs --checkpoint"),
        (
            ["--evaluate", "--checkpoint", "x.pt", "--val_file", "none", "--test_file", "none"],
            "val_file or test_file",
        ),
        (["--train_file", "[]"], "train_file"),
        (["--val_file", "nowhere.json"], "nowhere.json"),
        (["--image_root", "/nowhere"], "image_root /nowhere"),
        (["--bert_config", "nowhere.json"], "nowhere.json: no such file; name the JSON"),
        (["--text_encoder", "./nowhere"], "tokenizer ./nowhere"),
        (["--checkpoint", "nowhere.pth"], "nowhere.pth"),
        (["--batch_size_train", "4096"], "lower batch_size"),
        (["--k_tst", "3"], "k_tst"),
    ],
)
def test_mistakes_are_one_clear_line(data, tmp_path, capsys, monkeypatch, change, words):
    from runtime.config.cli import run_script

    monkeypatch.setattr(sys, "argv", ["Retrieval.py"])
    with pytest.raises(SystemExit) as left:
        run_script(
            Retrieval.main,
            Retrieval.Config,
            Retrieval.__doc__,
            flags(data, tmp_path / "out", *change),
        )
    said = capsys.readouterr().err
    assert left.value.code == 2 and words in said and "Traceback" not in said


def test_checkpoint_of_another_architecture_lists_the_keys(data, finetuned, tmp_path):
    with pytest.raises(ValueError, match="of another shape"):
        start(data, tmp_path, "--evaluate", "--checkpoint", finetuned, "--vision_width", 64)


def test_unreadable_image_of_the_test_set_is_named(data, finetuned, tmp_path):
    entries = json.loads((data / "retrieval_test.json").read_text())
    (tmp_path / "images").mkdir()
    for entry in entries:
        entry["image"] = str(data / entry["image"])
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 no image")
    entries[3]["image"] = str(tmp_path / "broken.jpg")
    (tmp_path / "test.json").write_text(json.dumps(entries))
    more = ["--evaluate", "--checkpoint", finetuned, "--test_file", tmp_path / "test.json"]
    with pytest.raises(ValueError, match=r"broken.jpg"):
        start(data, tmp_path, *more)
    within = start(data, tmp_path, *more, "--error_budget", "0.05")
    assert within["test"].keys() == RECALLS | {"unreadable_images"}
    assert within["test"]["unreadable_images"] == 1
    pairs = [
        {"filename": entry["image"], "caption": "a", "negative_caption": "b"}
        for entry in entries[2:4]
    ]
    (tmp_path / "swap_obj.json").write_text(
        json.dumps({str(n): row for n, row in enumerate(pairs)})
    )
    more[more.index("--test_file") + 1] = "none"
    more += ["--val_file", "none", "--choices", tmp_path / "swap_obj.json"]
    found = start(data, tmp_path, *more, "--error_budget", "0.5")
    assert found["swap_obj"]["unreadable_images"] == 1
