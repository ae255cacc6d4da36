"""The comparisons of the golden tests fail where they should, and the chosen numbers win alone."""

import json

import pytest
import torch

from tests.golden import perturb
from tests.golden.report import RECORDS, compare, compare_gradients, compare_levels, same
from tests.helpers.golden import golden_file, golden_json, golden_root, recorded
from tests.helpers.gradients import assert_same_gradients


@pytest.fixture(autouse=True)
def records_of_its_own():
    before = len(RECORDS)
    yield
    del RECORDS[before:]


def test_a_wrong_folder_is_an_error_that_names_the_variable(monkeypatch, tmp_path):
    monkeypatch.setenv("QUINTET_GOLDEN", str(tmp_path / "typo"))
    with pytest.raises(pytest.UsageError, match=r"QUINTET_GOLDEN=.*typo is not a folder"):
        golden_root()


def test_the_chosen_folder_wins_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("QUINTET_GOLDEN", str(tmp_path))
    assert golden_root() == tmp_path
    with pytest.raises(pytest.skip.Exception, match=r"simla/vit.json is not in"):
        golden_file("simla", "vit.json")
    assert recorded("simla", "vit.json", within="cases")[0].marks[0].name == "skip"
    (tmp_path / "simla").mkdir()
    (tmp_path / "simla/vit.json").write_text(json.dumps({"cases": {"a": 1, "b": 2}}))
    assert golden_json("simla", "vit.json")["cases"]["b"] == 2
    assert recorded("simla", "vit.json", within="cases") == ["a", "b"]


def test_a_part_in_a_thousand_is_noticed():
    theirs = torch.tensor([1.0, -3.0, 0.5])
    compare("case", "tensor", theirs.clone(), theirs, 1e-5)
    compare("case", "number", 0.25, 0.25, 1e-5)
    with pytest.raises(AssertionError, match="case: tensor differs"):
        compare("case", "tensor", theirs, perturb.changed_tensor(theirs), 1e-4)
    with pytest.raises(AssertionError, match="shape"):
        compare("case", "tensor", theirs[:2], theirs, 1e-4)
    with pytest.raises(AssertionError, match="case: number differs"):
        compare("case", "number", 0.25 * 1.001, 0.25, 1e-4)
    with pytest.raises(AssertionError):
        compare("case", "number", float("nan"), 0.25, 1e-4)


def test_exact_values():
    same("case", "ids", torch.tensor([1, 2]), torch.tensor([1, 2]))
    with pytest.raises(AssertionError, match="case: ids is"):
        same("case", "ids", torch.tensor([1, 2]), torch.tensor([1, 3]))
    with pytest.raises(AssertionError, match="case: names is"):
        same("case", "names", ["a"], ["a", "b"])


def test_grey_levels():
    ours = torch.tensor([[10.0, 20.0, 30.0]])
    compare_levels("case", "image", ours, ours + torch.tensor([0.0, 1.0, -1.0]), 1.0)
    with pytest.raises(AssertionError, match="parts of a grey level"):
        compare_levels("case", "image", ours, ours + 0.1, 1.0)
    with pytest.raises(AssertionError, match="2 grey levels"):
        compare_levels("case", "image", ours, ours + 2, 1.0)


def test_gradients():
    model = torch.nn.Linear(2, 1)
    model(torch.ones(1, 2)).sum().backward()
    norms = {"weight": 2**0.5, "bias": 1.0}
    compare_gradients("case", model, norms, {}, 1e-4)
    with pytest.raises(AssertionError, match="gradient norms"):
        compare_gradients("case", model, {**norms, "bias": 1.001}, {}, 1e-4)
    with pytest.raises(AssertionError, match="should have no gradient"):
        compare_gradients("case", model, {**norms, "bias": None}, {}, 1e-4)
    small = {"a": torch.full((4,), 1e-7), "b": torch.full((4,), 1e-6)}
    assert_same_gradients(small, small, 1e-5)
    with pytest.raises(AssertionError, match="gradient of a"):
        assert_same_gradients({**small, "a": torch.zeros(4)}, small, 1e-5)
    with pytest.raises(AssertionError, match="all gradients are zero"):
        assert_same_gradients({"a": torch.zeros(2)}, {"a": torch.zeros(2)}, 1e-5)


def test_places_of_recorded_values():
    content = {"note": "prose", "config": {"x": 1}, "cases": [{"lr": [0.1, -0.2], "name": "a"}]}
    places = list(perturb.values(content))
    assert places == [("cases", 0, "lr"), ("cases", 0, "name")]
    changed = perturb.change_json(json.loads(json.dumps(content)), places[0])
    assert changed["cases"][0]["lr"] == [0.1, -0.2 * 1.001]
    assert perturb.changed_scalar(True) is False and perturb.changed_scalar(3) == 4
