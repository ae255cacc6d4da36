"""The catalogue of zero-shot evaluation, its lists, and the user's own files."""

import json

import pytest

from base.errors import UserError
from dataset.tasks.catalog import (
    CATALOG,
    KNOWN_METRICS,
    LANGUAGES,
    PAIRS,
    Prompts,
    choose,
    class_prompts,
    folder_names,
    in_order_of,
    read_catalog,
)

# classes and templates as in OpenAI's lists (Radford et al. 2021, appendix)
COUNTS = {
    "imagenet": (1000, 80),
    "food101": (101, 1),
    "cifar10": (10, 18),
    "cifar100": (100, 18),
    "birdsnap": (500, 1),
    "rendered_sst2": (2, 1),
    "hateful_memes": (2, 1),
    "clevr_counts": (8, 1),
    "kinetics700_frames": (700, 28),
    "ucf101_frames": (101, 48),
    "patch_camelyon": (2, 1),
    "voc2007": (20, 1),
    "cars": (196, 8),
    "country211": (211, 5),
    "kitti_distance": (4, 1),
    "gtsrb": (43, 3),
    "resisc45": (45, 18),
    "eurosat": (10, 3),
    "stl10": (10, 2),
    "fer2013": (7, 6),
    "mnist": (10, 1),
    "flowers": (102, 1),
    "caltech101": (102, 34),
    "pets": (37, 1),
    "dtd": (47, 8),
    "aircraft": (100, 2),
    "sun397": (397, 2),
}


def test_every_data_set_has_its_prompts():
    prompts = Prompts()
    for name, entry in CATALOG.items():
        assert entry.metric in KNOWN_METRICS
        if entry.kind in ("retrieval", "babel", *LANGUAGES, *PAIRS):  # their files hold them
            continue
        known = entry.prompts
        classes = prompts.find("labels", known) if name != "cub200" else ["Black footed Albatross"]
        templates = prompts.find("templates", known)
        if name in COUNTS:
            assert (len(classes), len(templates)) == COUNTS[name], name
        assert all(len(each) >= len(templates) for each in class_prompts(classes, templates, name))
    assert COUNTS.keys() <= CATALOG.keys()


def test_metrics_are_the_published_ones():
    found = {name: entry.metric for name, entry in CATALOG.items() if entry.metric != "acc1"}
    assert found.pop("voc2007") == "map11" and found.pop("hateful_memes") == "roc_auc"
    assert found.pop("kinetics700_frames") == "acc1_acc5"
    assert found == dict.fromkeys(("aircraft", "pets", "caltech101", "flowers"), "mean_per_class")


def test_order_is_that_of_the_class_folders():
    labels = Prompts()
    assert labels.find("labels", "eurosat")[:2] == [
        "annual crop land",
        "forest",
    ]  # AnnualCrop, Forest
    assert labels.find("labels", "kitti_distance")[3] == "a photo i took with no car."
    assert [each[0] for each in labels.find("labels", "fer2013")][4:] == [
        "neutral",
        "sad",
        "surprised",
    ]
    assert labels.find("labels", "clevr_counts")[:2] == ["10", "3"]  # count_10, count_3


@pytest.mark.parametrize(
    ("own", "classes", "found"),
    [
        (
            ["apple_pie", "Baby-back ribs"],
            ["baby back ribs", "Apple pie"],
            ["Apple pie", "baby back ribs"],
        ),
        (["n01", "n02"], ["tench", "goldfish"], ["tench", "goldfish"]),
        (["happy", "sad"], [["sad", "depressed"], ["happy"]], [["happy"], ["sad", "depressed"]]),
        (["Faces", "accordion"], ["centered face", "accordion"], ["centered face", "accordion"]),
    ],
)
def test_class_names_go_to_their_folders(own, classes, found):
    assert in_order_of(own, classes, "set") == found


def test_lists_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match=r"food.*3 classes.*names 2"):
        in_order_of(["a", "b", "c"], ["a", "b"], "food")
    with pytest.raises(
        UserError, match="class 0 of the data is 'ant', but of the list of labels 'bee'"
    ):
        in_order_of(["ant", "bee", "moth"], ["bee", "ant", "another moth"], "insects")


NFD = "e\u0301clair"  # as macOS stores the name of a folder; NFC below


@pytest.mark.parametrize(
    "own, classes, found",
    [
        (["犬", "猫"], ["猫", "犬"], ["犬", "猫"]),
        (["Кошка", "собака"], ["Собака", "кошка"], ["кошка", "Собака"]),
        (["C", "C#", "C++"], ["C++", "C", "C#"], ["C", "C#", "C++"]),
        (["c", "c#", "c++"], ["C++ ", "C", "C #"], ["C", "C #", "C++ "]),
        ([NFD, "zebra"], ["zebra", "\u00e9clair"], ["\u00e9clair", "zebra"]),
        (["कि", "की"], ["की", "कि"], ["कि", "की"]),  # they differ in a vowel sign alone
        (["ﬁg", "tea"], ["tea", "Fig"], ["Fig", "tea"]),
        (["a-b", "a b"], ["a b", "a-b"], ["a-b", "a b"]),  # exactly the same names
        (["n01440764", "n01443537"], ["tench", "goldfish"], ["tench", "goldfish"]),
        (["crane_bird", "crane_machine"], ["Crane", "crane"], ["Crane", "crane"]),
        (
            ["hound", "kitty"],
            [["cat", "Kitty"], ["dog", "hound"]],
            [["dog", "hound"], ["cat", "Kitty"]],
        ),
        (["a", "b"], [["c", "a"], ["d", "a"]], [["c", "a"], ["d", "a"]]),
    ],
)
def test_class_names_of_any_script_go_to_their_own_folder(own, classes, found):
    assert in_order_of(own, classes, "set") == found


@pytest.mark.parametrize(
    "own, classes",
    [
        (["a-b", "a_b"], ["A b", "A B"]),  # which is which cannot be known
        (["crane", "dog"], ["crane", "Crane"]),
        (["crane", "Crane"], ["crane", "dog"]),
        (["犬", "猫", "鳥"], ["猫", "犬", "another"]),
        (["ant", "hound", "kitty"], [["bee"], ["cat", "kitty"], ["dog", "hound"]]),
    ],
)
def test_names_whose_order_cannot_be_told_are_refused(own, classes):
    with pytest.raises(UserError, match=r"set: .*give the labels with --labels in the order"):
        in_order_of(own, classes, "set")


def test_folder_names_become_class_names():
    assert folder_names(["001.Black_footed_Albatross", "apple_pie"]) == [
        "Black footed Albatross",
        "apple pie",
    ]


def written(path, content):
    path.write_text(json.dumps(content))
    return path


def test_a_catalogue_of_the_original_is_read(tmp_path):
    (tmp_path / "here").mkdir()
    content = {
        "pets": {"path": "here", "type": "imagefolder", "train": "trainval", "test": "test"},
        "cifar10": {"path": "elsewhere", "type": "special"},
        "clevr_counts": {
            "path": "/data/clevr",
            "type": "filelist",
            "train": "train",
            "test": "val",
        },
    }
    found = read_catalog(written(tmp_path / "dataset_catalog.json", content))
    assert found["pets"].path == str(tmp_path / "here") and found["pets"].metric == "mean_per_class"
    assert (found["cifar10"].kind, found["cifar10"].path) == ("torchvision", "elsewhere")
    assert found["clevr_counts"].split == "val"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"type": "imagefolder", "test": "test"}, "lacks path"),
        ({"path": "x", "type": "imagefolder"}, "lacks test"),
        ({"path": "x", "type": "imagefoldr", "test": "t"}, "did you mean imagefolder"),
        ({"path": "x", "type": "imagefolder", "test": "t", "metric": "f1"}, "metric 'f1'"),
        ("x", "lacks path and type"),
    ],
)
def test_a_faulty_entry_is_named(entry, message, tmp_path):
    with pytest.raises(UserError, match=rf"catalog\.json.*pets.*{message}"):
        read_catalog(written(tmp_path / "catalog.json", {"pets": entry}))


def test_files_that_are_no_tables(tmp_path):
    (tmp_path / "broken.json").write_text("{")
    for name, message in (("broken.json", "not valid JSON"), ("absent.json", "no such file")):
        with pytest.raises(UserError, match=f"{name}.*{message}"):
            read_catalog(tmp_path / name)
    with pytest.raises(UserError, match="expected an object"):
        read_catalog(written(tmp_path / "list.json", []))


def test_choosing():
    names = [
        entry.name
        for entry in choose(["pets", "webdataset:https://host/wds_vtab-svhn/tree/main"], CATALOG)
    ]
    assert names == ["pets", "svhn"]
    (entry,) = choose(["retrieval:f/flickr.tfrecord?image=image/encoded&caption=a/text"], CATALOG)
    assert entry.name == "flickr"
    (entry,) = choose(["wds:/data/wds_voc2007"], CATALOG)
    assert (entry.name, entry.kind, entry.metric) == ("voc2007", "webdataset", "map11")
    with pytest.raises(
        UserError, match=r"'cifar1O' is unknown; did you mean cifar10\? Known: imagenet"
    ):
        choose(["cifar1O"], CATALOG)
    with pytest.raises(UserError, match="more than once"):
        choose(["pets", "imagefolder:my/pets"], CATALOG)


def test_own_lists_stand_before_the_built_in_ones(tmp_path):
    labels = written(
        tmp_path / "labels.json", {"pets": ["cat", "dog"], "mine": [["one", "two"], "three"]}
    )
    prompts = Prompts(labels)
    assert (
        prompts.find("labels", "pets") == ["cat", "dog"]
        and len(prompts.find("labels", "dtd")) == 47
    )
    assert prompts.find("labels", "mine")[0] == ["one", "two"]
    with pytest.raises(
        UserError, match=r"labels\.json has no labels for 'minee'; did you mean mine\?"
    ):
        prompts.find("labels", "minee")
    with pytest.raises(UserError, match="no templates for 'mine'"):
        prompts.find("templates", "mine")


@pytest.mark.parametrize("values", ["a photo", [], [["nested {}"]], [1]])
def test_templates_of_another_kind(values, tmp_path):
    with pytest.raises(UserError, match=r"t\.json: 'pets' must be a list of texts"):
        Prompts(None, written(tmp_path / "t.json", {"pets": values}))
