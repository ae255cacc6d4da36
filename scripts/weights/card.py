"""A model card: README.md with the front matter that the Hugging Face hub reads."""

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from base.errors import UserError, first_line
from base.reading import read_json
from runtime.config.yaml import to_yaml
from runtime.scores import rounded
from scripts.weights.own import public, yaml_lines
from scripts.weights.source import FAMILIES, Source, Written

ROOT = Path(__file__).resolve().parents[2]
UNKNOWN = "unknown"
# options that name data, in any script's configuration
TRAINED = ("dataset", "metadata", "shards", "train_data", "train_file", "train_list")
SCORED = ("val_data", "val_file", "val_folder", "val", "test_file", "test")


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What only the user knows. license: of the weights, as the hub spells it (apache-2.0);
    data_license: of what they were trained on."""

    name: str
    license: str = UNKNOWN
    data_license: str = UNKNOWN


def model_card(source: Source, written: Written, facts: CardFacts) -> str:
    """README.md of an export."""
    config = source.about.get("config", {})
    front = {
        "license": facts.license,
        "library_name": written.library,
        "pipeline_tag": written.task,
        "tags": ["quintet", source.family],
    }
    parts = [
        "---",
        *(f"{key}: {to_yaml(value)}" for key, value in front.items()),
        "---",
        f"# {facts.name}",
        "",
        f"{described(source)} It was exported by Quintet, commit {commit()}.",
        "",
        "## Use",
        "",
        "```python",
        written.example.strip(),
        "```",
        "",
        "## Data and licences",
        "",
        f"- Trained on: {data_names(config, TRAINED) or UNKNOWN}.",
        f"- Validated or tested on: {data_names(config, SCORED) or UNKNOWN}.",
        f"- Licence of the data: {facts.data_license}.",
        f"- Licence of the weights: {facts.license}.",
        "",
        "## Results",
        "",
        *results(source.file),
        "",
        "## Training configuration",
        "",
        *configuration(config),
    ]
    return "\n".join(parts) + "\n"


def described(source: Source) -> str:
    """One sentence: family, model, parameters."""
    numbers = sum(value.numel() for value in source.weights.values())
    model = source.about.get("network", {}).get("model")
    name = f", {model}" if model else ""
    return f"Weights of {FAMILIES[source.family]}{name}: {numbers:,} numbers."


def data_names(config: Mapping[str, Any], keys: Sequence[str]) -> str:
    """Names of the data in a run's configuration, without the folders that they lay in."""
    found = []
    shards_alone = config.get("dataset") == "wds"  # main.py leaves its `metadata` unread then
    for key in keys:
        value = None if shards_alone and key == "metadata" else config.get(key)
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, str) and each:
                found.append(f"{public(each)} ({key})")
    return ", ".join(found)


def results(weights: Path) -> list[str]:
    """The figures of result/metrics.json beside the weights, as a table; first of which checkpoint
    they are, where that is called otherwise."""
    file = weights.parent / "result/metrics.json"
    if not file.is_file():
        return ["None are recorded beside the weights."]
    found = read_json(file, dict)
    lines = ["| figure | value |", "|---|---|"]
    lines += [f"| {name} | {rounded(value, 4)} |" for name, value in leaves(found)]
    scored = Path(str(found.get("checkpoint") or weights)).name
    if scored in (weights.name, weights.parent.name, "None"):
        return lines
    return [f"Of the checkpoint {scored}:", "", *lines]


def leaves(values: Mapping[str, Any], before: str = ""):
    """(name, number) of every number in nested dictionaries."""
    for key, value in values.items():
        name = f"{before} {public(key)}".strip()
        if isinstance(value, Mapping):
            yield from leaves(value, name)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield name, value


def configuration(config: Mapping[str, Any]) -> list[str]:
    """The run's configuration as YAML, a line an option; folders of the machine are left out."""
    if not config:
        return ["None is recorded beside the weights."]
    return ["```yaml", *yaml_lines(public(config)), "```"]


def commit() -> str:
    """Commit of this repository; unknown where git or the history is not there."""
    try:
        found = subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return UNKNOWN
    return found.stdout.strip()


def check_repository(name: str) -> str:
    """USER/NAME as the hub allows it. UserError for anything else."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    reason = ""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        reason = f" ({first_line(error)})"
    if reason or "/" not in name:
        raise UserError(f"--push {name}: write USER/NAME, such as --push me/clip-digits{reason}")
    return name
