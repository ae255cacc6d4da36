"""Nearest neighbours, votes, the linear probe and the features on disk."""

import errno
import os
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

import eval_knn
from base.arrays import map_array, reserve_array
from base.distributed import World
from base.errors import UserError
from evaluation import knn
from evaluation.features import Bank, damages_of, feature_bank
from evaluation.knn import Neighbours, first_of, knn_accuracy, nearest_neighbours, votes
from evaluation.probe import (
    SWEEP,
    Probe,
    Selection,
    fit,
    linear_probe,
    mean_of_classes,
    moments,
    split,
    sweep,
)

ALONE = World(0, 1, 0, torch.device("cpu"))


class Loaded:
    """Batches as EvalLoader's."""

    def __init__(self, batches, damages):
        self.batches = batches
        self.found = damages

    def __iter__(self):
        return iter(self.batches)

    def damages(self):
        return self.found


def stored(encode, batches, *rest, damages=None):
    return feature_bank(encode, lambda: Loaded(batches(), damages or {}), *rest)


def bank(count, width=6, seed=0, classes=4):
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=count)
    features = rng.standard_normal((count, width)).astype(np.float32) + labels[
        :, None
    ] * np.linspace(0, 1, width)
    return Bank(features.astype(np.float32), torch.from_numpy(labels))


@pytest.mark.parametrize("unit, tile", [(1024, 16384), (7, 11), (1, 200), (64, 3)])
def test_neighbours_are_exact_whatever_the_tiles(unit, tile, monkeypatch):
    monkeypatch.setattr(knn, "UNIT", unit)
    monkeypatch.setattr(knn, "TILE", tile)
    train, queries = bank(100), bank(30, seed=1)
    found = nearest_neighbours(train, queries, 5, ALONE)
    cosines = (
        queries.unit(0, 30, ALONE.device).double() @ train.unit(0, 100, ALONE.device).double().T
    )
    expected = cosines.topk(5, 1)
    assert torch.equal(found.index, expected.indices)
    torch.testing.assert_close(found.similarity.double(), expected.values, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tile", [4, 9, 100])
def test_of_equal_images_the_earlier_comes_first(tile, monkeypatch):
    monkeypatch.setattr(knn, "TILE", tile)
    rng = np.random.default_rng(0)
    few = rng.integers(-1, 2, (6, 4)).astype(np.float32) + 0.5
    order = rng.integers(6, size=40)
    train, queries = (
        Bank(few[order], torch.zeros(40, dtype=torch.int64)),
        Bank(few, torch.zeros(6, dtype=torch.int64)),
    )
    for k in (1, 3, 10, 40, 50):
        found = nearest_neighbours(train, queries, k, ALONE)
        for row in range(6):
            pairs = list(
                zip((-found.similarity[row]).tolist(), found.index[row].tolist(), strict=True)
            )
            assert pairs == sorted(pairs)
        wanted = min(k, int((order == order[found.index[0, 0]]).sum()))
        same = (order == order[found.index[0, 0]]).nonzero()[0][:wanted]
        assert found.index[0, :wanted].tolist() == same.tolist()


def test_ties_across_the_last_place():
    similarity = torch.tensor([[0.5, 0.9, 0.5, 0.5, 0.1]])
    assert first_of(similarity, 2).index.tolist() == [[1, 0]]
    assert first_of(similarity, 3).index.tolist() == [[1, 0, 2]]
    assert first_of(similarity, 5).index.tolist() == [[1, 0, 2, 3, 4]]


@pytest.mark.parametrize("k", [1, 5, 12])
def test_votes_are_scikit_learns(k):
    train, queries = bank(100), bank(50, seed=1)
    found = nearest_neighbours(train, queries, 12, ALONE)
    for temperature, weights in (
        (None, "uniform"),
        (0.07, lambda d: np.exp((1 - d**2 / 2) / 0.07)),
    ):
        theirs = KNeighborsClassifier(k, weights=weights, algorithm="brute")
        theirs.fit(
            train.unit(0, 100, ALONE.device).numpy().astype(np.float64), train.labels.numpy()
        )
        expected = theirs.predict(queries.unit(0, 50, ALONE.device).numpy().astype(np.float64))
        assert votes(found, train.labels, 4, k, temperature)[:, 0].tolist() == expected.tolist()


@pytest.mark.parametrize("temperature", [0.1, 0.01, 0.001])
def test_weights_of_votes_do_not_overflow(temperature):
    """exp(0.99 / 0.01) is more than float32 holds, exp(0.99 / 0.001) more than float64."""
    near = Neighbours(torch.tensor([[0.99, 0.98, 0.5]]), torch.tensor([[0, 1, 2]]))
    assert votes(near, torch.tensor([2, 1, 0]), 3, 3, temperature).tolist() == [[2, 1, 0]]


def test_accuracies():
    neighbours = Neighbours(torch.tensor([[0.9, 0.5, 0.4]]), torch.tensor([[0, 1, 2]]))
    labels = torch.tensor([2, 1, 1])
    found = knn_accuracy(neighbours, labels, torch.tensor([1]), 3, [1, 3], 0.07)
    assert found == {"knn1": 0, "knn3": 100, "knn3_weighted": 0, "knn3_weighted_top5": 100}
    assert "knn3" in knn_accuracy(
        neighbours, labels, torch.tensor([1]), 3, [20], 1.0
    )  # no more than there are
    six = Neighbours(torch.arange(6, 0, -1)[None] / 6, torch.arange(6)[None])
    assert votes(six, torch.arange(6), 6, 6, 0.07).tolist() == [[0, 1, 2, 3, 4]]


def test_linear_probe_is_logistic_regression():
    train, queries = bank(300), bank(100, seed=1)
    l2 = 0.01
    found = linear_probe(train, queries, 4, ALONE, l2, 200)
    mean, std = train.features.mean(0), train.features.std(0)
    theirs = LogisticRegression(C=1 / (l2 * 300), max_iter=1000, tol=1e-8)
    theirs.fit((train.features - mean) / std, train.labels.numpy())
    ours = fit([Selection(train)], 4, ALONE.device, l2, 200)
    assert ours.std.numpy() == pytest.approx(std, rel=1e-5)
    assert ours.weight.numpy() == pytest.approx(theirs.coef_, abs=3e-3)
    assert ours.bias.numpy() == pytest.approx(theirs.intercept_, abs=3e-3)
    expected = theirs.score((queries.features - mean) / std, queries.labels.numpy())
    assert found["probe"] == pytest.approx(
        100 * expected, abs=1.1
    )  # at most one image on the border
    assert found["probe"] > 40 and found["probe_top5"] == 100


def test_the_sweep_finds_the_peak_of_the_grid():
    """Fifteen fits at most; of equal scores the smaller decay; the ends are said."""
    for peak in (0, 5, 16, 41, 60, 96):
        asked = []

        def score(value, peak=peak, asked=asked):
            asked.append(value)
            return -abs(SWEEP.index(value) - peak)

        with (
            pytest.warns(UserWarning, match="end of the sweep") if peak % 96 == 0 else nullcontext()
        ):
            assert sweep(score) == (SWEEP[peak], 0)
        assert len(asked) == len(set(asked)) <= 15
    with pytest.warns(UserWarning, match="the best weight decay is 1e-06"):
        assert sweep(lambda _: 50.0) == (SWEEP[0], 50.0)
    assert len(SWEEP) == 97 and SWEEP[48] == pytest.approx(0.01)


@pytest.mark.filterwarnings("ignore:.*the best weight decay")
def test_weight_decay_is_chosen_on_validation_images():
    """The value sklearn's logistic regression prefers on the grid's first seven, refined; then
    fitted to all images."""
    train, val, queries = bank(60, seed=3), bank(200, seed=4), bank(100, seed=5)
    found = linear_probe(train, queries, 4, ALONE, iterations=200, val=val)
    alone = {}
    for l2 in SWEEP[::16]:
        alone[l2] = linear_probe(train, val, 4, ALONE, l2, 200)["probe"]
    assert found["probe_val"] >= max(alone.values()) and found["probe_l2"] in SWEEP
    features = np.concatenate([train.features, val.features])
    both = Bank(features, torch.cat([train.labels, val.labels]))
    again = linear_probe(both, queries, 4, ALONE, found["probe_l2"], 200)
    for name in ("probe", "probe_top5", "probe_train", "probe_mean_per_class"):
        assert found[name] == pytest.approx(again[name], abs=1.1)


@pytest.mark.filterwarnings("ignore:.*the best weight decay")
def test_a_fraction_of_the_training_images_is_held_out():
    train, queries = bank(300), bank(100, seed=1)
    part, held_out = split(train, 0.1)
    assert (len(part), len(held_out)) == (270, 30) and not (part.kept & held_out.kept).any()
    assert len(split(bank(9), 0.3)[1]) == 3
    (x, labels), *rest = held_out.tiles(torch.device("cpu"))
    assert not rest and torch.equal(labels, train.labels[held_out.kept])
    assert torch.equal(x, torch.from_numpy(train.features)[held_out.kept])
    found = linear_probe(train, queries, 4, ALONE, iterations=50, val_fraction=0.1)
    fixed = linear_probe(train, queries, 4, ALONE, found["probe_l2"], 50)
    assert found["probe"] == fixed["probe"]  # fitted to all training images again
    with pytest.raises(UserError, match=r"0.001 of 300 images leaves none to choose by"):
        split(train, 0.001)


def test_a_constant_feature_is_not_blown_up_by_rounding():
    for count in range(990, 1010):  # of some of these counts the rounding leaves no zero
        part = Selection(Bank(np.full((count, 1), 123.4567, np.float32), torch.zeros(count).long()))
        assert moments([part], torch.device("cpu"))[1] == 1


def test_mean_per_class_of_the_probe():
    """By hand: class 0 two of three right, class 1 none of one, class 2 does not occur."""
    x = np.array([[1, 0], [1, 0], [0, 1], [1, 0]], np.float32)
    part = Selection(Bank(x, torch.tensor([0, 0, 0, 1])))
    probe = Probe(torch.eye(3, 2), torch.zeros(3), torch.zeros(2), torch.ones(2))
    assert mean_of_classes(probe, [part], torch.device("cpu")) == pytest.approx(100 / 3)


def test_features_are_computed_once(tmp_path):
    calls = []

    def encode(image):
        calls.append(len(image))
        return image * 2

    def batches():
        images = torch.arange(10.0).view(5, 2)
        yield {"image": images[:3], "labels": torch.tensor([[1], [2], [0]])}
        yield {"image": images[3:], "labels": torch.tensor([[2], [2]])}

    for _ in range(2):
        found = stored(encode, batches, range(5), 5, 2, tmp_path / "key", ALONE)
        assert calls == [3, 2] and found.labels.tolist() == [1, 2, 0, 2, 2]
        assert torch.equal(found.rows(1, 4, ALONE.device), 2 * torch.arange(10.0).view(5, 2)[1:4])
        found.check_labels(3, "val.jsonl")  # and fewer are another command's
        with pytest.raises(UserError, match="label 2 is outside the list of 2 classes"):
            found.check_labels(2, "val.jsonl")
    assert not list(tmp_path.glob(".*"))


def test_damaged_images_are_told_by_a_kept_bank_too(tmp_path):
    batch = {"image": torch.ones(2, 3), "labels": torch.zeros(2, 1, dtype=torch.int64)}
    counts = {"unreadable_images": 1}

    def bank(damages):
        rest = (range(2), 2, 3, tmp_path / "key", ALONE)
        return stored(lambda image: image, lambda: [batch], *rest, damages=damages)

    assert bank(counts).damages == counts == bank({"truncated_images": 2}).damages
    (tmp_path / "key.json").write_text('{"images": 2, "width": 3}')  # of an earlier version
    assert bank(counts).damages == {}
    (tmp_path / "key.json").write_text("{")
    banks = {"train": bank(counts), "test": bank(None), "val": bank(None)}
    found = {"train_unreadable_images": 1, "unreadable_images": 1, "val_unreadable_images": 1}
    assert damages_of(banks) == found


def test_two_runs_that_make_the_same_bank_do_not_meet(tmp_path, monkeypatch):
    """The second one begins and ends while the first is at its second batch."""
    made = []

    def batches():
        for start in (0, 2):
            rows = torch.arange(8.0).view(4, 2)[start : start + 2]
            yield {"image": rows, "labels": torch.tensor([[start], [start + 1]])}
            if not made:
                made.append("second")
                with monkeypatch.context() as other:
                    other.setattr("os.getpid", lambda: 1)
                    made.append(bank())

    def bank():
        return stored(lambda image: image, batches, range(4), 4, 2, tmp_path / "key", ALONE)

    for found in (bank(), made[1]):
        assert np.array_equal(found.features, np.arange(8.0).reshape(4, 2))
        assert found.labels.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EROFS])
def test_a_full_disk_is_one_sentence_before_anything_is_encoded(fault, tmp_path, monkeypatch):
    """The bytes are taken at once: what is mapped and not there would end the process by SIGBUS."""

    def refuse(descriptor, start, length):
        assert start == 0 and length == os.fstat(descriptor).st_size
        raise OSError(fault, os.strerror(fault))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(UserError, match=r"key\.npy: not written, .*; name another --cache"):
        stored(None, None, range(5), 5, 2, tmp_path / "made/key", ALONE)
    assert not list((tmp_path / "made").iterdir())


def test_where_nothing_reserves_bytes_zeros_are_written(tmp_path, monkeypatch):
    """As on macOS: a file of holes would end the process where the disk is full."""
    monkeypatch.delattr(os, "posix_fallocate")
    monkeypatch.setattr("base.arrays.BLOCK", 1000)
    reserve_array(tmp_path / "a.npy", "<f4", (1001, 7))
    made = map_array(tmp_path / "a.npy", "")
    assert made.shape == (1001, 7) and not made.any()
    assert os.stat(tmp_path / "a.npy").st_blocks * 512 >= made.nbytes


def test_an_interrupted_cache_is_made_anew(tmp_path):
    def broken():
        raise KeyboardInterrupt
        yield

    good = [{"image": torch.ones(2, 3), "labels": torch.zeros(2, 1, dtype=torch.int64)}]
    with pytest.raises(KeyboardInterrupt):
        stored(lambda image: image, broken, range(2), 2, 3, tmp_path / "key", ALONE)
    assert (
        stored(
            lambda image: image, lambda: good, range(2), 2, 3, tmp_path / "key", ALONE
        ).features.sum()
        == 6
    )


@pytest.mark.parametrize(
    "batch, words",
    [
        (
            {"image": torch.ones(2, 3), "labels": torch.zeros(2, 4, dtype=torch.int64)},
            "one label an image",
        ),
        (
            {
                "image": torch.full((2, 3), torch.nan),
                "labels": torch.zeros(2, 1, dtype=torch.int64),
            },
            "not finite",
        ),
    ],
)
def test_features_that_cannot_be_compared(batch, words, tmp_path):
    with pytest.raises(UserError, match=words):
        stored(lambda image: image, lambda: [batch], range(2), 2, 3, tmp_path / "key", ALONE)


@pytest.mark.parametrize("which", ["key.npy", "key.labels.npy"])
@pytest.mark.parametrize("damage", ["cut", "noise", "missing", "another size"])
def test_a_damaged_bank_is_made_again(tmp_path, which, damage):
    calls = []

    def batches():
        calls.append(1)
        return [{"image": torch.arange(6.0).view(3, 2), "labels": torch.tensor([[2], [0], [1]])}]

    def bank():
        return stored(lambda image: image, batches, range(3), 3, 2, tmp_path / "key", ALONE)

    bank()
    file = tmp_path / which
    whole = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "another size":
        np.save(file, np.zeros((2, 2), dtype=np.float32))
    else:
        file.write_bytes(whole[:-5] if damage == "cut" else b"no array" * 20)
    again = bank()
    assert len(calls) == 2 and file.read_bytes() == whole
    assert np.array_equal(again.features, np.arange(6.0).reshape(3, 2))
    assert again.labels.tolist() == [2, 0, 1]
    bank()
    assert len(calls) == 2


def test_the_script_compares_what_its_options_name(tmp_path, monkeypatch):
    """What stands beside the accuracies, what the page and the probe are given."""
    generator = torch.Generator().manual_seed(0)
    counts = {"train": [5, 3, 1], "test": [2, 4, 4], "val": [2, 2, 2]}  # of the classes
    banks = {}
    for name, many in counts.items():
        labels = torch.arange(3).repeat_interleave(torch.tensor(many))
        features = torch.randn(len(labels), 4, generator=generator).numpy()
        banks[name] = Bank(features, labels, {"unreadable_images": len(labels)})
    encoder = SimpleNamespace(title="net", width=4, chosen=[])
    encoder.choose, encoder.to = encoder.chosen.append, lambda device: encoder
    found: dict = {}

    def noted(name, result=None):
        def call(*given, **options):
            found[name] = (given, options)
            return result

        return call

    def images_of(data, split, view, names, config):
        return SimpleNamespace(split=split, image=f"{split}'s images")

    probe = {"probe": 50.0, "probe_top5": 100.0, "probe_mean_per_class": 25.0}
    stand_ins = {
        "load_encoder": lambda config: encoder,
        "class_names": noted("class_names", ["a", "b", "c"]),
        "view_of": lambda encoder, about: ("view", "in words"),
        "images_of": images_of,
        "bank_of": lambda images, *_: banks[images.split],
        "linear_probe": noted("probe", probe),
        "neighbour_report": noted("report", []),
        "write_results": noted("results"),
        "write_probe": noted("row"),
    }
    for name, call in stand_ins.items():
        monkeypatch.setattr(eval_knn, name, call)
    words = {"model": "timm/net", "train_data": "T", "val_data": "V", "probe_val_data": "W"}
    words |= {"k": [1, 3], "temperature": 0.5, "features": "z", "linear_probe": True}
    words |= {"probe_l2": 0.25, "probe_iterations": 7, "data_name": "mine"}
    config = eval_knn.Config(**words)
    eval_knn.main(config)
    assert encoder.chosen == ["z"] and found["class_names"][0][0] == ["T", "V"]

    train, test = banks["train"], banks["test"]
    nearest = nearest_neighbours(train, test, 3, ALONE)
    expected = {"images": 10, "train_images": 9, "width": 4, "chance": 40.0}
    expected |= {"unreadable_images": 10, "train_unreadable_images": 9, "val_unreadable_images": 6}
    expected |= knn_accuracy(nearest, train.labels, test.labels, 3, [1, 3], 0.5)
    assert found["results"][0][2] == {"model": "net", **expected, **probe}
    given, options = found["probe"]
    assert given[:3] == (train, test, 3)
    assert options == {"l2": 0.25, "iterations": 7, "val": banks["val"], "val_fraction": 0.0}
    title, names, _, neighbours, labels, images, temperature = found["report"][0]
    assert (title, names, temperature) == ("net, z, on V", ["a", "b", "c"], 0.5)
    assert torch.equal(neighbours.index, nearest.index) and neighbours.index.shape == (10, 3)
    assert torch.equal(labels[0], train.labels) and torch.equal(labels[1], test.labels)
    assert images == ("train's images", "test's images")
    assert found["row"][0][1:] == ("net", "mine", {**expected, **probe}, 3)

    for name in ("train", "test"):
        whole = banks[name]
        banks[name] = Bank(whole.features, whole.labels + 1)
        with pytest.raises(UserError, match="3"):
            eval_knn.main(config)
        banks[name] = whole
    fraction = replace(config, probe_val_data=None, probe_val_fraction=0.5, data_name=None)
    eval_knn.main(fraction)
    given, options = found["probe"]
    assert (options["val"], options["val_fraction"]) == (None, 0.5)
