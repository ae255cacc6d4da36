"""Make dataset/prompts/{labels,templates}.json, the class names and templates of eval_zeroshot.py's
catalogue.

    git clone https://github.com/openai/CLIP && python scripts/data/convert_prompts.py CLIP

The source is OpenAI's repository of CLIP (MIT licence), commit d05afc43: data/prompts.md for all
data sets but ImageNet, which is in notebooks/Prompt_Engineering_for_ImageNet.ipynb. Classes are in
alphabetical order of the class folders as they are published, which OpenAI's lists already are but
for the three in ORDER.
"""

import argparse
import ast
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from base.reading import read_json, read_text
from base.writing import write_text
from runtime.advice import ends_with_advice

TARGET = Path(__file__).resolve().parents[2] / "dataset/prompts"
NAMES = {  # OpenAI's heading -> name of the data set
    "Birdsnap": "birdsnap",
    "CIFAR10": "cifar10",
    "CIFAR100": "cifar100",
    "CLEVRCounts": "clevr_counts",
    "Caltech101": "caltech101",
    "Country211": "country211",
    "DescribableTextures": "dtd",
    "EuroSAT": "eurosat",
    "FGVCAircraft": "aircraft",
    "FacialEmotionRecognition2013": "fer2013",
    "Flowers102": "flowers",
    "Food101": "food101",
    "GTSRB": "gtsrb",
    "HatefulMemes": "hateful_memes",
    "KITTI": "kitti_distance",
    "Kinetics700": "kinetics700_frames",
    "MNIST": "mnist",
    "OxfordPets": "pets",
    "PascalVOC2007": "voc2007",
    "PatchCamelyon": "patch_camelyon",
    "RESISC45": "resisc45",
    "SST2": "rendered_sst2",
    "STL10": "stl10",
    "SUN397": "sun397",
    "StanfordCars": "cars",
    "UCF101": "ucf101_frames",
}
ORDER = {  # index in OpenAI's list of the class of every folder
    "eurosat": (7, 0, 6, 9, 8, 4, 1, 2, 3, 5),
    "kitti_distance": (2, 1, 0, 3),
    "fer2013": (0, 1, 2, 3, 6, 4, 5),
}


def lists_in(code: str) -> dict[str, list]:
    """The lists that a piece of Python assigns to names, read without running it."""
    try:
        body = ast.parse(code).body
    except SyntaxError:  # a notebook's cell for the shell
        return {}
    found = (
        node for node in body if isinstance(node, ast.Assign) and isinstance(node.value, ast.List)
    )
    return {node.targets[0].id: ast.literal_eval(node.value) for node in found}


@ends_with_advice
def main(clone: Path) -> int:
    labels = {}
    templates = {}
    notebook = clone / "notebooks/Prompt_Engineering_for_ImageNet.ipynb"
    cells = read_json(notebook, dict)["cells"]
    found = {}
    for cell in cells:
        found |= lists_in("".join(cell["source"])) if cell["cell_type"] == "code" else {}
    labels["imagenet"], templates["imagenet"] = (
        found["imagenet_classes"],
        found["imagenet_templates"],
    )
    for chapter in re.split(r"^## ", read_text(clone / "data/prompts.md"), flags=re.M)[1:]:
        heading, _, text = chapter.partition("\n")
        name = NAMES[heading.strip()]
        found = lists_in(text.split("```")[1].partition("\n")[2])
        labels[name], templates[name] = found["classes"], found["templates"]
        if name in ORDER:
            labels[name] = [labels[name][place] for place in ORDER[name]]
    templates["cub200"] = templates["birdsnap"]  # its class names are those of its folders
    for file, content in (("labels.json", labels), ("templates.json", templates)):
        rows = (f"{json.dumps(name)}: {json.dumps(values)}" for name, values in content.items())
        write_text(TARGET / file, "{\n" + ",\n".join(rows) + "\n}\n")
    print({name: (len(values), len(templates[name])) for name, values in labels.items()})
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("clone", type=Path, help="folder of OpenAI's repository of CLIP")
    sys.exit(main(parser.parse_args().clone))
