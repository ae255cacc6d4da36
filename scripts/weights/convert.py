"""Convert weights for other libraries, and published TensorFlow checkpoints into files that the
scripts load.

    python scripts/weights/convert.py output/main --to open_clip --output exported/
    python scripts/weights/convert.py output/main --to open_clip --output exported/ --push USER/NAME
    python scripts/weights/convert.py align-from-tf model-weights align-b7-base.safetensors

CHECKPOINT is a file, the folder of a run, or a folder of Hugging Face, of

    CLIP, SLIP, CLIP-rocket, OpenAI's   --to safetensors, open_clip, hf (OpenAI's ViTs), onnx
    CLIP, SigLIP of a library           --to safetensors, open_clip or hf (its own), onnx
    ALIGN                               --to safetensors, hf (B7), onnx
    COYO-ViT and plain ViTs             --to safetensors, timm, hf, onnx
    SIMLA, ALBEF                        --to safetensors, onnx (the retrieval pair)
    NXTP                                --to safetensors, hf (decoder and image tower apart), onnx
    the image tokenizer (dVAE)          --to safetensors, onnx

Tokenizer, image processor and a model card (README.md) are written beside the weights. ONNX is
opset 18, checked with onnxruntime after the export. --push uploads the folder; log in before (`hf
auth login`) or set HF_TOKEN.

KIND              SOURCE -> DEST
align-from-tf     prefix of COYO-ALIGN's TensorFlow checkpoint -> .safetensors for main.py
align-to-hf       checkpoint or folder of a run -> folder that transformers' AlignModel loads
coyo-vit-from-tf  prefix of COYO-ViT's TensorFlow checkpoint -> .safetensors for Classification.py
coyo-vit-to-hf    run of Classification.py -> folder that transformers' ViT loads
merge             checkpoint or folder of a run, sharded or not -> its weights as one .safetensors

transformers' own files (kakaobrain/align-base) need no conversion: --checkpoint
FOLDER/model.safetensors. TensorFlow itself is not needed.
"""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from base.caches import file_state
from base.errors import UserError
from base.writing import make_folder, write_text
from runtime.advice import ends_with_advice
from scripts.weights import export_dual, export_fusion, export_nxtp, export_vit
from scripts.weights.card import UNKNOWN, CardFacts, check_repository, model_card
from scripts.weights.kinds import KINDS
from scripts.weights.push import check_hub, push
from scripts.weights.source import FAMILIES, Options, Source, Written, open_source

Writer = Callable[[Source, Options, Path], Written]
FORMATS = ("safetensors", "open_clip", "hf", "timm", "onnx")
WRITERS: dict[str, dict[str, Writer]] = {
    "clip": {
        "safetensors": export_dual.to_safetensors,
        "open_clip": export_dual.to_open_clip,
        "hf": export_dual.to_hugging_face,
        "onnx": export_dual.to_onnx,
    },
    "align": {
        "safetensors": export_dual.to_safetensors,
        "hf": export_dual.to_hugging_face,
        "onnx": export_dual.to_onnx,
    },
    "vit": {
        "safetensors": export_vit.to_safetensors,
        "timm": export_vit.to_timm_folder,
        "hf": export_vit.to_hugging_face,
        "onnx": export_vit.to_onnx,
    },
    "fusion": {
        "safetensors": export_fusion.to_safetensors,
        "onnx": export_fusion.to_onnx,
    },
    "nxtp": {
        "safetensors": export_nxtp.to_safetensors,
        "hf": export_nxtp.to_hugging_face,
        "onnx": export_nxtp.to_onnx,
    },
    "dvae": {
        "safetensors": export_fusion.tokenizer_to_safetensors,
        "onnx": export_fusion.tokenizer_to_onnx,
    },
}


def convert(checkpoint: Path, to: str, folder: Path, options: Options) -> tuple[Source, Written]:
    """Write `checkpoint` into `folder` in the format `to`. UserError names what is possible."""
    source = open_source(checkpoint)
    writers = WRITERS[source.family]
    if to not in writers:
        raise UserError(
            f"{source.file} is {FAMILIES[source.family]}, for which {to} has no layout; use --to "
            f"{' or '.join(writers)}"
        )
    make_folder(folder, "--output")
    return source, writers[to](source, options, folder)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    found.add_argument("--to", choices=FORMATS, required=True, help="layout to write")
    found.add_argument("--output", type=Path, required=True, help="folder to write to")
    found.add_argument("--model", help="as in eval_zeroshot.py, where the file does not tell")
    for name in ("--mean", "--std"):
        found.add_argument(name, type=float, nargs=3, help="of the pixels, likewise")
    found.add_argument("--bpe-path", type=Path, help="BPE merges; none = the run's, else CLIP's")
    found.add_argument("--tokenizer", help="of ALIGN, SIMLA, ALBEF, NXTP; none = the run's")
    found.add_argument("--clip", type=Path, help="CLIP of a published NXTP checkpoint")
    found.add_argument("--push", metavar="USER/NAME", help="upload the folder to the hub")
    found.add_argument("--private", action="store_true", help="create it as a private repository")
    found.add_argument("--name", help="title of the model card; none = that of the repository")
    found.add_argument("--license", default=UNKNOWN, help="of the weights, such as apache-2.0")
    found.add_argument("--data-license", default=UNKNOWN, help="of the training data")
    return found


@ends_with_advice
def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    if words and words[0] in KINDS:
        return convert_kind(words)
    given = parser().parse_args(words)
    for name, low in (("mean", -math.inf), ("std", 0)):
        if not all(low < value < math.inf for value in getattr(given, name) or ()):
            raise UserError(f"--{name}: give finite numbers{' above 0' * (name == 'std')}")
    options = Options(
        model=given.model,
        mean=given.mean and tuple(given.mean),
        std=given.std and tuple(given.std),
        bpe_path=given.bpe_path,
        tokenizer=given.tokenizer,
        clip=given.clip,
        repository=given.push and check_repository(given.push),
    )
    if given.push:
        check_hub(given.push)
    before = states_of(given.output)
    source, written = convert(given.checkpoint, given.to, given.output, options)
    title = given.name or (given.push or given.output.resolve().name).rpartition("/")[2]
    facts = CardFacts(name=title, license=given.license, data_license=given.data_license)
    write_text(given.output / "README.md", model_card(source, written, facts))
    print(f"{given.output}: {', '.join(files_of(given.output))}")
    if given.push:
        check_of_this_export(given.output, before)
        print(push(given.output, given.push, given.private))
    return 0


def states_of(folder: Path) -> set[tuple]:
    """The files below a folder as they are now."""
    return {file_state(folder / name) for name in files_of(folder)}


def check_of_this_export(folder: Path, before: set[tuple]) -> None:
    """UserError where files lie below the folder that were there before: notes of the user, or what
    another layout says of its weights."""
    others = sorted(states_of(folder) & before)
    if others:
        name = Path(others[0][0]).relative_to(folder.absolute())
        raise UserError(
            f"{folder}: holds {name}, which is not of this export, and --push uploads the folder as "
            f"it is: remove it ({len(others)} in all), or name another --output"
        )


def files_of(folder: Path) -> list[str]:
    """Names of the files below a folder, which need not be there."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def convert_kind(words: list[str]) -> int:
    """`KIND SOURCE DEST`."""
    found = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("kind", choices=KINDS, metavar="KIND")
    found.add_argument("source", type=Path, metavar="SOURCE")
    found.add_argument("dest", type=Path, metavar="DEST")
    given = found.parse_args(words)
    print(KINDS[given.kind](given.source, given.dest))
    return 0


if __name__ == "__main__":
    sys.exit(main())
