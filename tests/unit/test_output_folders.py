"""Every recipe writes to a folder of its own: two runs never meet by accident."""

import importlib
from collections import defaultdict
from pathlib import Path

from tests.helpers.configs import load

ROOT = Path(__file__).resolve().parents[2]


def test_no_two_recipes_share_an_output_folder():
    recipes = defaultdict(list)
    for file in sorted(ROOT.glob("configs/*/*.yaml")):
        if file.parent.name == "data":  # parts of recipes
            continue
        script = importlib.import_module(file.parent.name)
        flags = ["--checkpoint", "RUN"] if file.parent.name == "eval_knn" else []  # it needs one
        recipes[load(script.Config, file, *flags).output_dir].append(file.name)
    assert sum(map(len, recipes.values())) > 50
    assert {folder: files for folder, files in recipes.items() if len(files) > 1} == {}
