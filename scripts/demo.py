"""A page in the browser for whatever a checkpoint can do; the network runs here, on CPU or GPU.

    python scripts/demo.py --checkpoint output/quickstart/pretrain --images photos
    python scripts/demo.py --checkpoint output/quickstart/pretrain output/VQA/digitscenes --images photos
    python scripts/demo.py --model open_clip/ViT-B-16-SigLIP:webli --images photos
    python scripts/demo.py --checkpoint output/Recognition/digitscenes

Tabs appear where the checkpoint can do it: search of your own folder by words and by image, zero-shot
classification with typed class names, heat maps of each word, question answering, entailment,
recognition. What lacks is listed with the script that makes it. Several checkpoints share the page.
Embeddings of the folder are computed once and kept below --cache. Needs Gradio:
pip install "gradio>=6,<7". The page loads nothing from elsewhere and listens on this machine alone,
unless --host says otherwise; there is no login.
"""

import signal
import sys
import threading
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from base import distributed
from base.caches import cache_folder
from base.distributed import World, say
from base.errors import UnfitWeights, UserError
from dataset.images.decode import decode_image
from dataset.images.formats import files_below, is_image
from evaluation.demo.abilities import Abilities, together
from evaluation.demo.index import Index, build_index
from evaluation.predict import progress
from runtime.config.cli import knob, run_script


@dataclass
class Config:
    """What to show, and where."""

    checkpoint: list[Path] = knob([], "files or run directories; each adds what it can do")
    model: str | None = knob(None, "open_clip/NAME:TAG, hf/NAME, timm/NAME; or a checkpoint's name")
    images: Path | None = knob(None, "folder of images to search; captions are .txt beside them")
    tokenizer: str | None = knob(
        None, "where the checkpoint's own is not found: file, folder, name"
    )
    answer_list: Path | None = knob(None, "answers to choose from (JSON); none = the run's")
    clip: Path | None = knob(None, "CLIP's weights, for NXTP's published files")
    random_weights: bool = knob(False, "random weights of the model that --model names")
    host: str = knob("127.0.0.1", "address to listen on; 0.0.0.0 = all networks, without a login")
    port: int = knob(7860, "port to listen on", low=1, high=65535)
    cache: Path | None = knob(None, "folder for the index of images [$QUINTET_CACHE]")
    batch_size: int = knob(32, "images or texts per forward pass of the indexing", low=1)
    device: str = knob("auto", "'auto' (CUDA where present), 'cuda' or 'cpu'")
    precision: str = knob("fp32", "type of dual encoders' forward pass", choices=("fp32", "bf16"))


def check(config: Config) -> None:
    """Fail early: before any network is loaded."""
    if find_spec("gradio") is None:
        raise UserError('the page needs Gradio: pip install "gradio>=6,<7"')
    if not config.checkpoint and not config.model:
        raise UserError("give --checkpoint, files or run directories, or --model open_clip/NAME")
    if config.model and len(config.checkpoint) > 1:
        raise UserError("--model is for one checkpoint at most; leave out the others")
    if config.images and not config.images.is_dir():
        raise UserError(f"--images {config.images}: no such folder")


def open_all(config: Config, world: World) -> Abilities:
    """All that the checkpoints can do. UserError names the one that does not open."""
    from scripts.demo_checkpoints.any_checkpoint import open_abilities

    found = []
    for source in config.checkpoint or [None]:
        try:
            found.append(open_abilities(source, config, world))
        except UnfitWeights as error:
            text = str(error)
            if source is not None and str(source) not in text:
                text = f"{source}: {text}"
            raise UserError(text) from None
    return together(found)


def index_folder(abilities: Abilities, config: Config, world: World) -> Index | None:
    """The index of --images, where a checkpoint embeds images."""
    if config.images is None or abilities.embedder is None:
        return None
    root = config.images.absolute()
    files = [file for file in files_below(root) if is_image(file)]
    index = build_index(
        root=root,
        files=files,
        embedder=abilities.embedder,
        read=partial(decode_image, exif=True),
        cache=cache_folder(config.cache) / "demo",
        batch_size=config.batch_size,
        progress=partial(progress, world=world),
    )
    say(f"{config.images}: {len(index):,} images to search, {index.kept:,} of them known before")
    for name, reason in index.unreadable.items():
        say(f"UNREADABLE {name}: {reason}")
    return index


def main(config: Config) -> None:
    check(config)
    world = distributed.init(config.device)
    abilities = open_all(config, world)
    index = index_folder(abilities, config, world)
    from evaluation.demo.page import serve  # Gradio takes seconds to import

    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    with serve(abilities, index, partial(decode_image, exif=True), config.host, config.port) as url:
        say(f"{url}  (Ctrl-C stops)")
        stopped.wait()


if __name__ == "__main__":
    run_script(main, Config, __doc__)
