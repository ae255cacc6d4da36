"""The originals' loading code on full-size key lists: where each key comes from, what stays, what is ignored."""

import json

import pytest
import torch

from models.adapters import MOMENTUM, POSITION_IDS, QUEUES, STARTS, _matches, adapt, checkpoint_kind
from tests.helpers.golden import golden_file

TASKS = {"retrieval": "retrieval", "grounding": "retrieval", "vqa": "vqa", "ve": "ve",
         "nlvr_text_assignment": "text_assignment", "nlvr": "nlvr", "zero_shot_retrieval": "retrieval"}  # fmt: skip
CASES = [("albef", name) for name in TASKS if name != "zero_shot_retrieval"] + [("simla", name) for name in TASKS]


def expand(entries: list[dict]) -> list[tuple[str, list | None]]:
    result = []
    for entry in entries:
        first, last = (int(i) for i in entry["i"].split("-")) if "i" in entry else (0, 0)
        result += [(entry["key"].replace("{i}", str(i)), entry.get("shape")) for i in range(first, last + 1)]
    return result


def state_of(system: str, kind: str, resolution: int) -> dict[str, torch.Tensor]:
    """Every key of a full-size model with its shape, without memory."""
    model = json.loads(golden_file("simla", f"checkpoint_keys_{system}.json").read_text())["models"][kind]
    online = expand(model["online"])
    copies = [
        (key.replace(module, f"{module}_m", 1), shape)
        for module in (copy.removesuffix("_m") for copy in model["momentum_copies"])
        for key, shape in online
        if key.startswith(f"{module}.")
    ]
    state = {key: torch.empty(shape, device="meta") for key, shape in online + copies}
    assert len(state) == model["total_keys"]
    tokens = (resolution // 16) ** 2 + 1
    return {k: torch.empty(1, tokens, 768, device="meta") if k.endswith("pos_embed") else v for k, v in state.items()}


def expected_sources(conversion: dict, source: dict, target: dict) -> dict[str, str]:
    """{target key: source key} of the golden table; renamed keys first, all others keep their name."""
    ignored_prefixes = [entry["key"] for entry in conversion["ignored_source_keys"]]
    table = {}
    for rename in conversion["renamed"]:
        if "index_pairs_target_source" not in rename:
            table[rename["target"]] = rename["source"].removeprefix("interpolate:")
            continue
        for i, j in rename["index_pairs_target_source"]:
            head, tail = rename["target"].replace("{i}", str(i)).rstrip("*"), rename["source"].replace("{j}", str(j))
            for key in (k for k in target if k.startswith(head)):
                table[key] = tail.rstrip("*") + key[len(head) :]
    identical = {key: key for key in target if key in source and key not in table and key not in ignored_prefixes}
    return identical | table


@pytest.mark.parametrize(("system", "name"), CASES)
def test_every_key_comes_from_where_the_original_took_it(system, name):
    conversions = json.loads(golden_file("simla", f"checkpoint_conversion_{system}.json").read_text())["conversions"]
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
        assert key in adapted or _matches(key, (*start, *MOMENTUM, *QUEUES))
    for key in set(adapted) - set(target):  # and nothing is left over but what is named as useless
        assert _matches(key, (*STARTS[task].ignored, *MOMENTUM, *QUEUES, POSITION_IDS)), key
