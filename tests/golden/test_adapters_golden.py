"""Full-size models of SIMLA and ALBEF, and the originals' loading code: where each key comes from,
what is ignored."""

import re
from dataclasses import replace

import pytest
import torch

from models.fusion.retrieval import Retrieval, RetrievalConfig
from models.fusion.simla import Simla, SimlaConfig
from models.fusion.text_assignment import TextAssignment, TextAssignmentConfig, for_two_images
from models.fusion.ve_nlvr import StatementConfig, StatementModel
from models.fusion.vqa import Vqa, VqaConfig
from models.weights.albef import MOMENTUM, QUEUES, STARTS, adapt, checkpoint_kind
from models.weights.loading import POSITION_IDS, matches
from runtime.optim.build import Optimizer, parameter_groups
from tests.golden.report import same
from tests.helpers.golden import golden_json, recorded

TASKS = {
    "retrieval": "retrieval",
    "grounding": "retrieval",
    "vqa": "vqa",
    "ve": "ve",
    "nlvr_text_assignment": "text_assignment",
    "nlvr": "nlvr",
    "zero_shot_retrieval": "retrieval",
}
SYSTEMS = ("simla", "albef")
CASES = [
    (system, name)
    for system in SYSTEMS
    for name in recorded("simla", f"checkpoint_conversion_{system}.json", within="conversions")
]


def expand(entries: list[dict]) -> list[tuple[str, list | None]]:
    result = []
    for entry in entries:
        first, last = (int(i) for i in entry["i"].split("-")) if "i" in entry else (0, 0)
        result += [
            (entry["key"].replace("{i}", str(i)), entry.get("shape"))
            for i in range(first, last + 1)
        ]
    return result


def models_of(system: str) -> dict:
    return golden_json("simla", f"checkpoint_keys_{system}.json")["models"]


def state_of(system: str, kind: str, resolution: int | None = None) -> dict[str, torch.Tensor]:
    """Every key of a full-size model with its shape, without memory; resolution: another than the
    recorded one."""
    model = models_of(system)[kind]
    online = expand(model["online"])
    copies = [
        (key.replace(module, f"{module}_m", 1), shape)
        for module in (copy.removesuffix("_m") for copy in model["momentum_copies"])
        for key, shape in online
        if key.startswith(f"{module}.")
    ]
    state = {key: torch.empty(shape, device="meta") for key, shape in online + copies}
    copied = {copy.removesuffix("_m") for copy in model["momentum_copies"]}
    alone = {key for key, _ in online if key.split(".")[0] not in copied}
    if copied:
        same(
            "checkpoint keys",
            "parameters without a copy",
            alone,
            set(model["online_without_momentum_copy"]),
        )
    same("checkpoint keys", "number of keys", len(state), model["total_keys"])
    if resolution:
        patch = state["visual_encoder.patch_embed.proj.weight"].shape[-1]
        for key in [key for key in state if key.endswith("pos_embed")]:
            state[key] = torch.empty(
                1, (resolution // patch) ** 2 + 1, state[key].shape[-1], device="meta"
            )
    return state


def build(system: str, kind: str) -> torch.nn.Module:
    """Our model of the published size, without memory."""
    pretraining = SimlaConfig.albef() if system == "albef" else SimlaConfig()
    large, bert = replace(pretraining.vit, image_size=384, mask_token=False), pretraining.bert
    paired, first = for_two_images(bert)
    with torch.device("meta"):
        if kind == "pretrain":
            return Simla(pretraining)
        if kind == "retrieval":
            return Retrieval(RetrievalConfig(large, bert))
        if kind == "vqa":
            return Vqa(VqaConfig(large, bert))
        if kind == "ve":
            return StatementModel(StatementConfig(large, bert, classes=3))
        if kind == "nlvr":
            return StatementModel(StatementConfig(large, paired, classes=2, paired_from=first))
        small = replace(large, image_size=256)
        return TextAssignment(TextAssignmentConfig(small, paired, first))


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("kind", ["pretrain", "retrieval", "vqa", "ve", "pretrain_nlvr", "nlvr"])
def test_full_size_keys_shapes_and_optimizer_groups(system, kind):
    """The published models: same keys, shapes, parameter counts and groups by weight decay."""
    model, expected = build(system, kind), models_of(system)[kind]
    case = f"{system} {kind}"
    ours = {key: value.shape for key, value in model.state_dict().items()}
    same(
        case,
        "keys and shapes",
        ours,
        {key: value.shape for key, value in state_of(system, kind).items()},
    )
    if kind == "pretrain_nlvr":
        model.requires_grad_(True)  # the original trains projections that no loss reaches
    trained = {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    same(
        case,
        "trained parameters",
        sum(p.numel() for p in trained.values()),
        expected["parameters_online"],
    )
    same(
        case,
        "all parameters",
        sum(p.numel() for p in model.parameters()),
        expected["parameters_all"],
    )
    names = {id(parameter): name for name, parameter in trained.items()}
    config = Optimizer(
        weight_decay=expected["optimizer_groups"][1]["weight_decay"], decay_everything=True
    )
    for group, theirs in zip(
        parameter_groups(model, config), expected["optimizer_groups"], strict=True
    ):
        same(case, "weight decay", group["weight_decay"], theirs["weight_decay"])
        same(case, "tensors of a group", len(group["params"]), theirs["n_tensors"])
        same(case, "values of a group", sum(p.numel() for p in group["params"]), theirs["n_values"])
        outside = [
            names[id(p)]
            for p in group["params"]
            if not re.search(r"\.(layer|blocks)\.\d", names[id(p)])
        ]
        same(
            case, "parameters outside the layers", sorted(outside), sorted(theirs["not_in_layers"])
        )


def expected_sources(conversion: dict, source: dict, target: dict) -> dict[str, str]:
    """{target key: source key} of the golden table; renamed keys first, all others keep their
    name."""
    ignored_prefixes = [entry["key"] for entry in conversion["ignored_source_keys"]]
    table = {}
    for rename in conversion["renamed"]:
        if "index_pairs_target_source" not in rename:
            table[rename["target"]] = rename["source"].removeprefix("interpolate:")
            continue
        for i, j in rename["index_pairs_target_source"]:
            head, tail = (
                rename["target"].replace("{i}", str(i)).rstrip("*"),
                rename["source"].replace("{j}", str(j)),
            )
            for key in (k for k in target if k.startswith(head)):
                table[key] = tail.rstrip("*") + key[len(head) :]
    same(
        "checkpoint keys",
        "renamed keys",
        len(table),
        sum(rename["n_keys"] for rename in conversion["renamed"]),
    )
    apart = {
        *table,
        *ignored_prefixes,
        *(entry["key"] for entry in conversion["left_at_initial_value"]),
    }
    identical = {key: key for key in target if key in source and key not in apart}
    same(
        "checkpoint keys",
        "keys that keep their name",
        len(identical),
        conversion["identical_names"],
    )
    return identical | table


@pytest.mark.parametrize(("system", "name"), CASES)
def test_every_key_comes_from_where_the_original_took_it(system, name):
    conversions = golden_json("simla", f"checkpoint_conversion_{system}.json")["conversions"]
    conversion, task = conversions[name], TASKS[name]
    source = state_of(system, conversion["source"], 256)
    target = state_of(system, conversion["target"], 384)
    expected = expected_sources(conversion, source, target)
    initial = {key for key, _ in expand(conversion["left_at_initial_value"])}

    adapted = adapt(source, target, task)
    assert {key for key in target if key not in adapted} - initial == set()
    for key, origin in expected.items():
        if key.endswith("pos_embed"):
            assert adapted[key].shape == target[key].shape
        elif key not in initial:
            assert adapted[key] is source[origin], f"{key} should come from {origin}"
    converted = checkpoint_kind(source) != task
    for key in initial:  # what the original leaves initial, this loader may leave initial
        start = STARTS[task].initial if converted else QUEUES
        assert key in adapted or matches(key, (*start, *MOMENTUM, *QUEUES))
    for key in set(adapted) - set(target):  # and nothing is left over but what is named as useless
        assert matches(key, (*STARTS[task].ignored, *MOMENTUM, *QUEUES, POSITION_IDS)), key
    unused = set(source) - {*expected.values(), *initial}
    ignored = {key for key, _ in expand(conversion["ignored_source_keys"])}
    if (
        task == "text_assignment"
    ):  # which has no momentum copies: the file lists the source's under converted names
        unused, ignored = (
            {key for key in keys if not matches(key, MOMENTUM)} for keys in (unused, ignored)
        )
    same(f"{system} {name}", "source keys ignored", unused, ignored)
    unset = set(target) - set(expected)
    same(f"{system} {name}", "keys left at their initial value", unset, initial)
