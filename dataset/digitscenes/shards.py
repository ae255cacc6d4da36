"""Containers: WebDataset tars, TFRecords, and the web-scale caption sets (CC3M, CC12M, YFCC15M,
RedCaps).

The same scenes always give the same bytes: archives carry no times.
"""

import io
import json
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import numpy as np

from base.writing import write_json
from dataset.digitscenes.annotations import LABELS, visible_labels
from dataset.digitscenes.scenes import Scene
from dataset.digitscenes.words import SHORT_TEMPLATES, alt_texts, captions
from dataset.sources.tfrecord import encode_example, write_records

PER_SHARD = 500


def chosen_caption(scene: Scene) -> str:
    """The caption of formats that hold only one: the five wordings take turns."""
    return captions(scene)[scene.image_id % 5]


def sample_metadata(scene: Scene, key: str, image: bytes) -> dict:
    """The JSON that img2dataset puts beside an image, with the scene's contents added."""
    return {
        "url": scene.path,
        "caption": chosen_caption(scene),
        "key": key,
        "status": "success",
        "error_message": None,
        "width": scene.width,
        "height": scene.height,
        "original_width": scene.width,
        "original_height": scene.height,
        "exif": "{}",
        "sha256": sha256(image).hexdigest(),
        "captions": captions(scene),
        "labels": [LABELS[k] for k in visible_labels(scene)],
        "samples": [d.sample for d in scene.digits],
    }


def write_tars(root: Path, split: str, scenes: list[Scene]) -> None:
    """`wds/<split>/00000.tar` ... with jpg, txt and json of every scene, and `00000_stats.json` of
    every tar."""
    folder = root / "wds" / split
    folder.mkdir(parents=True)
    for shard, start in enumerate(range(0, len(scenes), PER_SHARD)):
        part = scenes[start : start + PER_SHARD]
        with tarfile.open(folder / f"{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for i, scene in enumerate(part):
                key, image = f"{shard:05d}{i:04d}", (root / scene.path).read_bytes()
                metadata = json.dumps(sample_metadata(scene, key, image)).encode()
                for ending, content in (
                    ("jpg", image),
                    ("txt", chosen_caption(scene).encode()),
                    ("json", metadata),
                ):
                    member = tarfile.TarInfo(f"{key}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        counts = {
            "count": len(part),
            "successes": len(part),
            "failed_to_download": 0,
            "failed_to_resize": 0,
        }
        times = {"duration": 0.0, "start_time": 0.0, "end_time": 0.0}
        write_json(
            folder / f"{shard:05d}_stats.json",
            counts | times | {"status_dict": {"success": len(part)}},
        )


def write_web_captions(root: Path, scenes: list[Scene]) -> None:
    """Training scenes as CC3M and CC12M (`.npy` of dicts), YFCC15M (zips and pickle) and RedCaps
    (every tenth)."""
    conceptual = [{"image_id": s.path, "captions": captions(s)} for s in scenes]
    twelve = [
        {"image_name": s.path, "image_id": str(s.image_id), "captions": [chosen_caption(s)]}
        for s in scenes
    ]
    for name, rows in (("cc3m", conceptual), ("cc12m", twelve)):
        np.save(root / f"{name}.npy", np.array(rows, dtype=object), allow_pickle=True)
    rows = []
    for s in scenes[::10]:
        image = root / "redcaps" / s.ground / f"{s.image_id}.jpg"
        image.parent.mkdir(parents=True, exist_ok=True)
        image.write_bytes((root / s.path).read_bytes())
        rows.append(
            {"image_id": str(s.image_id), "subreddit": s.ground, "caption": chosen_caption(s)}
        )
    write_json(root / "redcaps/redcaps.json", rows)
    write_yfcc(root, scenes)


def write_alt_texts(root: Path, scenes: list[Scene]) -> None:
    """Images of one digit with short texts: `alt_texts.npy` in CC3M's layout and
    `tfrecord/alt_texts`.

    The records have one text each and none with a colour: ALIGN does not jitter colours, and would
    learn them first.
    """
    rows = [{"image_id": s.path, "captions": alt_texts(s)} for s in scenes]
    np.save(root / "alt_texts.npy", np.array(rows, dtype=object), allow_pickle=True)
    # the digits take turns: within ten images the wording is the same, so that it does not tell the
    # digit
    write_tfrecords(
        root, "alt_texts", scenes, lambda s: alt_texts(s)[s.image_id // 10 % len(SHORT_TEMPLATES)]
    )


def write_yfcc(root: Path, scenes: list[Scene]) -> None:
    """`yfcc15m/images/AB/CDE.zip` with member `FGH.jpg` for index ABCDEFGH; a pickle of (index,
    title, description).

    As on Flickr, some images lack a title and some a description; none lacks both.
    """
    entries = []
    for start in range(0, len(scenes), 1000):
        index = f"{start:08d}"
        archive = root / "yfcc15m/images" / index[:2] / f"{index[2:5]}.zip"
        archive.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as bundle:
            for i, scene in enumerate(scenes[start : start + 1000], start):
                bundle.writestr(
                    zipfile.ZipInfo(f"{i % 1000:03d}.jpg"), (root / scene.path).read_bytes()
                )
                texts = captions(scene)
                entries.append(
                    (i, "" if i % 10 == 0 else texts[0], "" if i % 10 == 1 else texts[1 + i % 4])
                )
    (root / "yfcc15m/yfcc15m.pkl").write_bytes(pickle.dumps(entries, protocol=2))


# ---- TFRecord
def write_tfrecords(
    root: Path, split: str, scenes: list[Scene], text: Callable[[Scene], str] = chosen_caption
) -> None:
    """`tfrecord/<split>/00000.tfrecord` ... with the features jpg and txt that ALIGN reads."""
    folder = root / "tfrecord" / split
    folder.mkdir(parents=True)
    for shard, start in enumerate(range(0, len(scenes), PER_SHARD)):
        part = scenes[start : start + PER_SHARD]
        examples = ({"jpg": (root / s.path).read_bytes(), "txt": text(s)} for s in part)
        write_records(folder / f"{shard:05d}.tfrecord", map(encode_example, examples))
