"""Valid files of every format that the fuzzers damage, and the readers that take them.

A reader is a function of a path; what it returns is of no interest. It may raise the project's own
errors only (see tests/fuzz/test_readers.py).
"""

import gzip
import io
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from base.caches import cache_folder

SAMPLES = 24  # of a shard
CODES = 5  # rows of visual codes


class Text(NamedTuple):
    """A format made of JSON values: its reader, a valid document, the ending of its file."""

    read: Callable[[Path], Any]
    document: Any
    suffix: str = ".json"


class Binary(NamedTuple):
    """Any other format: its reader and a function that makes a valid file."""

    read: Callable[[Path], Any]
    make: Callable[[], bytes]
    suffix: str = ""


def encoded_image(number: int = 0, kind: str = "PNG", mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, (12, 8), number).save(file, kind)
    return file.getvalue()


# ---- annotations
def consumed(records, *makers: Callable) -> list:
    """Every record through each maker; bad samples are what the stream would count."""
    from base.errors import BadSample

    made = []
    for number in range(len(records)):
        for maker in makers:
            try:
                made.append(maker(records[number]))
            except BadSample as bad:
                made.append(bad)
    return made


def as_is(image: torch.Tensor) -> torch.Tensor:
    return image


def with_image(path: Path) -> Path:
    """The folder of a file, with the image 0.png."""
    (path.parent / "0.png").write_bytes(encoded_image())
    return path.parent


def pairs(path: Path) -> Any:
    from dataset.sources.records import Records
    from dataset.tasks.record import captions_of, image_of
    from dataset.tasks.retrieval import RetrievalSet

    root = with_image(path)
    records = Records(path, ("image", "caption"))
    consumed(records, captions_of, lambda record: image_of(record, root))
    return RetrievalSet(records, root, as_is)


def questions(path: Path) -> Any:
    from dataset.sources.records import Records
    from dataset.tasks.vqa import QuestionAnswers, QuestionSet

    roots = {"vqa": with_image(path)}
    training = QuestionAnswers(as_is, roots)
    consumed(training.source(path).records, training)
    records = Records(path, ("image", "question", "question_id"))
    return QuestionSet(records, roots, as_is)


def official_answers(path: Path) -> Any:
    from dataset.tasks.vqa import read_official_answers

    return read_official_answers(path)


def answer_list(path: Path) -> Any:
    from dataset.tasks.vqa import read_answer_list

    return read_answer_list(path)


def entailment(path: Path) -> Any:
    from dataset.tasks.ve_nlvr import SNLI_VE, Statements

    statements = Statements(path, SNLI_VE, with_image(path), as_is)
    return consumed(statements.records, statements)


def nlvr(path: Path) -> Any:
    from dataset.tasks.ve_nlvr import NLVR2, Statements

    statements = Statements(path, NLVR2, with_image(path), as_is)
    return consumed(statements.records, statements)


def grounding(path: Path) -> Any:
    from base.reading import read_json
    from dataset.tasks.grounding import ReferringExpressions

    content = read_json(path, dict)
    records = [{"image": "0.png", "text": "a dog", "ref_id": 1, "index": 0}]
    parts = [content.get(name) for name in ("refs", "instances", "detections")]
    return ReferringExpressions(records, *parts, path.parent, as_is)


def karpathy(path: Path) -> Any:
    from dataset.tasks.caption_lists import retrieval_list
    from dataset.tasks.catalog import Entry

    with_image(path)
    return retrieval_list(Entry("fuzz", "retrieval", str(path)))


def catalog(path: Path) -> Any:
    from dataset.tasks.catalog import read_catalog

    return read_catalog(path)


def prompts(path: Path) -> Any:
    from dataset.tasks.catalog import Prompts

    return Prompts(labels=path)


def metadata(kind: str) -> Callable[[Path], Any]:
    def read(path: Path) -> Any:
        from dataset.tasks.captions import metadata_rows
        from runtime.safe_pickle import load_plain

        return list(metadata_rows(kind, path, load_plain))

    return read


def labelled(path: Path) -> Any:
    from dataset.sources.records import Records
    from dataset.tasks.classification import LabelOptions, Labels

    records = Records(path, ("image",))
    return consumed(records, Labels(10, LabelOptions(soft_labels=True), str(path)))


def recognition(path: Path) -> Any:
    from dataset.tasks.recognition import label_records, names_of

    return consumed(label_records(path), names_of)


def statistics(path: Path) -> Any:
    """The counter beside a shard: a wrong one is ignored and the samples are counted."""
    from dataset.sources.shard_list import count_of

    shard = path.with_name("00000.tar")
    shard.write_bytes(tar_shard())
    path.rename(path.with_name("00000_stats.json"))
    return count_of(str(shard))


def yaml_configuration(path: Path) -> Any:
    from runtime.config.yaml import read_yaml

    return read_yaml(path)


def config_beside_weights(path: Path) -> Any:
    from runtime.config.from_checkpoint import description_of

    weights = path.with_name("model.safetensors")
    weights.write_bytes(safetensors_file())
    path.rename(path.with_name("config.json"))
    return description_of(weights)


TEXTS = {
    "image and captions": Text(
        pairs, [{"image": "0.png", "caption": ["a dog", "it"]}, {"image": "0.png", "caption": "x"}]
    ),
    "image and captions, lines": Text(pairs, [{"image": "0.png", "caption": "x"}] * 2, ".jsonl"),
    "questions": Text(
        questions,
        [
            {
                "image": "0.png",
                "question": "a?",
                "question_id": 1,
                "answer": ["b", "c"],
                "dataset": "vqa",
            },
            {"image": "0.png", "question": "d?", "question_id": "2", "answer": "e"},
        ],
    ),
    "VQA's annotations": Text(
        official_answers,
        {
            "annotations": [
                {"question_id": 1, "answers": [{"answer": "a"}], "answer_type": "other"},
                {"question_id": 2, "answers": [{"answer": "b"}]},
            ]
        },
    ),
    "answer list": Text(answer_list, ["yes", "no"]),
    "entailment": Text(
        entailment,
        [{"image": "0.png", "sentence": "a dog", "label": "entailment"}] * 2,
    ),
    "NLVR": Text(nlvr, [{"images": ["0.png", "0.png"], "sentence": "two dogs", "label": "True"}]),
    "grounding": Text(
        grounding,
        {
            "refs": [{"ref_id": 1, "ann_id": 2, "image_id": 3, "split": "val"}],
            "instances": {
                "annotations": [{"id": 2, "bbox": [1, 2, 3, 4]}],
                "images": [{"id": 3, "height": 8, "width": 12}],
            },
            "detections": {"3": [[1, 2, 3, 4]]},
        },
    ),
    "Karpathy's retrieval": Text(
        karpathy,
        {"images": [{"filename": "0.png", "split": "test", "sentences": [{"raw": "a dog"}]}]},
    ),
    "ALBEF's retrieval": Text(karpathy, [{"image": "0.png", "caption": ["a dog"]}]),
    "catalogue": Text(catalog, {"pets": {"path": "pets", "type": "imagefolder", "test": "val"}}),
    "class names": Text(prompts, {"pets": ["dog", ["cat", "kitten"]]}),
    "COCO": Text(
        metadata("coco"),
        {
            "images": [{"id": 1, "file_name": "0.png"}],
            "annotations": [{"image_id": 1, "caption": "a dog"}],
        },
    ),
    "RedCaps": Text(
        metadata("redcaps"),
        {"annotations": [{"image_id": "x", "subreddit": "y", "caption": "a dog"}]},
    ),
    "labels": Text(
        labelled,
        [
            {"image": "0.png", "labels": [1, 2], "label_probs": [0.5, 0.5]},
            {"image": "0.png", "label": 3},
        ],
    ),
    "names": Text(recognition, [{"image": "0.png", "labels": ["dog", "cat"]}], ".jsonl"),
    "statistics of a shard": Text(statistics, {"successes": SAMPLES, "count": SAMPLES}),
    "configuration": Text(yaml_configuration, {"lr": 0.1, "data": {"files": ["a", "b"]}}, ".yaml"),
    "config.json": Text(
        config_beside_weights, {"model_type": "clip", "text_config": {"hidden_size": 8}}
    ),
}


# ---- binary files
def tar_shard() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for number in range(SAMPLES):
            for ending, data in (("png", encoded_image(number)), ("txt", b"a dog")):
                member = tarfile.TarInfo(f"{number:05}.{ending}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return file.getvalue()


def tfrecord_shard() -> bytes:
    import struct

    from dataset.sources.tfrecord import CRC, encode_example, masked_crc

    frames = b""
    for number in range(SAMPLES):
        record = encode_example({"jpg": encoded_image(number), "txt": "a dog", "label": number})
        length = struct.pack("<Q", len(record))
        frames += length + CRC.pack(masked_crc(length)) + record + CRC.pack(masked_crc(record))
    return frames


def shard(path: Path) -> Any:
    """The records of a shard, and what damage took."""
    from dataset.sources.shards import read_shard

    return list(read_shard(str(path), SAMPLES))


def shard_index(path: Path) -> Any:
    from dataset.sources.shard_index import ShardIndex

    index = ShardIndex([path], error_budget=1.0)
    return consumed(index), index.lost


def table_rows(path: Path) -> Any:
    """Rows of a table, and those of one that holds images."""
    from dataset.sources.encoded_table import encoded_table
    from dataset.sources.records import Records
    from dataset.tasks.record import captions_of

    held = encoded_table(str(path), ("image", "caption"))
    if held is not None:
        return [held[number] for number in range(len(held))]
    return consumed(Records(path, ("image", "caption")), captions_of)


def saved_dataset(path: Path) -> Any:
    folder = path.parent / "saved"
    folder.mkdir()
    (folder / "dataset_info.json").write_text("{}")
    path.rename(folder / "data-00000-of-00001.arrow")
    return table_rows(folder)


def visual_codes(path: Path) -> Any:
    from dataset.tasks.pretrain import CodeCache

    codes = CodeCache(path, CODES)
    return [codes[number].sum() for number in range(CODES)]


def damaged_cache(kind: str, of: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """A reader whose cache of that name, made before, is what the fuzzer damages; it must be made
    again: the same is read."""

    def read(path: Path) -> Any:
        shard = path.with_name("00000.tar")
        shard.write_bytes(tar_shard())
        expected = of(shard)
        caches = sorted(cache_folder().glob(f"{kind}/*"), key=lambda file: file.stat().st_mtime_ns)
        caches[-1].write_bytes(path.read_bytes())
        found = of(shard)
        assert found == expected or kind == "counts", (found, expected)
        return found

    return read


def index_size(path: Path) -> Any:
    from dataset.sources.shard_index import ShardIndex

    index = ShardIndex([path], error_budget=1.0)
    return len(index), index.lost


def shard_count(path: Path) -> Any:
    from dataset.sources.shard_list import count_of

    return count_of(str(path))


def feature_bank(path: Path) -> Any:
    """A bank of features, one of whose files is damaged: whole or made again."""
    from evaluation.features import _stored

    np.save(path.with_name("bank.labels.npy"), np.arange(4))
    (path.parent / "bank.json").write_text("{}")
    names = [path.with_name(f"bank{ending}") for ending in (".labels.npy", ".json")]
    return _stored(path, *names, 4, 3)


def arrow_table() -> Any:
    import pyarrow

    captions = [["a dog", "it"], ["x"]] * 4
    return pyarrow.table({"image": ["0.png"] * 8, "caption": captions, "n": range(8)})


def parquet_file(images: bool = False) -> bytes:
    import pyarrow
    from pyarrow import parquet

    table = arrow_table()
    if images:
        held = [{"bytes": encoded_image(), "path": "0.png"}] * 8
        table = pyarrow.table({"image": held, "caption": ["a dog"] * 8})
    file = io.BytesIO()
    parquet.write_table(table, file)
    return file.getvalue()


def arrow_stream() -> bytes:
    from pyarrow import ipc

    file = io.BytesIO()
    with ipc.new_stream(file, arrow_table().schema) as stream:
        stream.write_table(arrow_table())
    return file.getvalue()


def image(path: Path) -> Any:
    from dataset.images.decode import decode_image

    return decode_image(path)


def zip_member(path: Path) -> Any:
    from base.zip_member import read_member

    return read_member(path, "0.png")


def plain(path: Path) -> Any:
    from runtime.safe_pickle import load_plain

    return load_plain(path)


def weights(path: Path) -> Any:
    from runtime.checkpoint import read_weights

    return {name: value.sum() for name, value in read_weights(path).items()}


def checkpoints(path: Path) -> Any:
    from runtime.checkpoint import CheckpointFolder, load_checked

    path.rename(path.with_name("checkpoint_00000001.pt"))
    newest = CheckpointFolder(path.parent).newest_valid()
    return None if newest is None else load_checked(newest)


def jit(path: Path) -> Any:
    from models.weights.torchscript import jit_state_dict

    return jit_state_dict(path)


def merges(path: Path) -> Any:
    from dataset.text.bpe import ClipTokenizer

    return ClipTokenizer(path)(["a lion"])


def wordpiece(path: Path) -> Any:
    from dataset.text.wordpiece import Tokenizer

    return Tokenizer(path)(["a lion"])


def pieces(path: Path) -> Any:
    from dataset.text.sentencepiece import PieceTokenizer

    tokenizer = PieceTokenizer(path)
    return tokenizer.decode(tokenizer.encode("a lion"))


def class_list(path: Path) -> Any:
    from dataset.tasks.classification import read_class_names

    return read_class_names(path)


def label_list(path: Path) -> Any:
    from dataset.tasks.recognition import read_list

    return list(read_list(path))


def flat_list(path: Path) -> Any:
    from dataset.sources.flat_folder import flat_folder

    folder = path.parent / "val"
    folder.mkdir()
    for name in ("0.png", "1.png"):
        (folder / name).touch()
    path.rename(path.with_name("val.txt"))
    return flat_folder(folder)


def published_set(member: str = "", text: str = "", multilabel: bool = False) -> Callable:
    """A reader of a set in CLIP_benchmark's layout of two images, one of whose files is damaged: a
    member beside the images, or the text file of that name."""

    def read(path: Path) -> Any:
        from dataset.tasks.catalog import Entry
        from dataset.tasks.zeroshot import CaptionedImages, ShardImages

        data = path.read_bytes()
        folder = path.parent
        (folder / "test").mkdir()
        (folder / "test/nshards.txt").write_bytes(data if text == "nshards" else b"1")
        (folder / "classnames.txt").write_bytes(data if text == "classnames" else b"dog\ncat\n")
        ending = member or "cls"
        with tarfile.open(folder / "test/0.tar", "w") as archive:
            for number in range(2):
                content = data if member and number else {"cls": b"1", "txt": b"a dog"}.get(ending)
                content = saved_array(np.array([0, 1])) if content is None else content
                for name, each in (("png", encoded_image()), (ending, content)):
                    header = tarfile.TarInfo(f"{number}.{name}")
                    header.size = len(each)
                    archive.addfile(header, io.BytesIO(each))
        entry = Entry("fuzz", "webdataset", str(folder))
        if member == "txt":
            return CaptionedImages(entry, folder / "cache").captions
        return ShardImages(entry, folder / "cache", multilabel).targets

    return read


def slip_lists(path: Path) -> Any:
    from dataset.tasks.catalog import Entry
    from dataset.tasks.zeroshot import file_list
    from runtime.safe_pickle import load_plain

    np.save(path.with_name("test_labels.npy"), np.arange(3))
    path.rename(path.with_name("test_images.npy"))
    return file_list(Entry("fuzz", "filelist", str(path.parent)), load_plain)


def voc_lists(path: Path) -> Any:
    from dataset.tasks.catalog import Entry
    from dataset.tasks.zeroshot import voc

    lists = path.parent / "ImageSets/Main"
    lists.mkdir(parents=True)
    path.rename(lists / "dog_test.txt")
    (lists / "cat_test.txt").write_text("000001 1\n000002 -1\n")
    return voc(Entry("fuzz", "voc", str(path.parent)))


def saved_array(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


STATE = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2, dtype=torch.float16)}


def torch_file(content: Any, zipped: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def whole_module() -> bytes:
    """A pickled network, as OpenAI's encoder.pkl is one."""
    return torch_file(torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU()))


def checkpoint_file() -> bytes:
    import tempfile

    from runtime.checkpoint import CheckpointFolder

    with tempfile.TemporaryDirectory() as folder:
        return CheckpointFolder(folder).save({"model": STATE, "step": 1}, 1).read_bytes()


def script_file() -> bytes:
    import warnings

    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 3)), file)
    return file.getvalue()


def safetensors_file() -> bytes:
    from safetensors.torch import save

    return save(STATE)


def zip_of_images() -> bytes:
    import zipfile

    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0.png", encoded_image())
        archive.writestr("1.png", encoded_image(1))
    return file.getvalue()


REFS = [
    {"ref_id": n, "sentences": [{"sent": "left man"}], "ann_id": 2**40, "t": (1, 2.5)}
    for n in (1, 2)
]
VOCABULARY = "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "lion", "li", "##on"])
TABLE = 'image,caption\n0.png,"a dog, it"\n0.png,caf\u00e9\n0.png,"[""x"", ""y""]"\n'
COUNT = json.dumps({"shard": "00000.tar", "samples": SAMPLES})
MERGES = "#version: 0.2\nl i\no n</w>\nli on</w>\na b</w>\n"


def tokenizer_json() -> bytes:
    from tokenizers import Tokenizer, models

    vocabulary = {token: number for number, token in enumerate(VOCABULARY.split("\n"))}
    return Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]")).to_str().encode()


def decoder_json() -> bytes:
    from tokenizers import Tokenizer, models

    names = ["<s>", "</s>", "<unk>", ",", "a", "l", "i", "o", "n", "li", "on"]
    vocabulary = {name: number for number, name in enumerate(names)}
    merges = [("l", "i"), ("o", "n")]
    return Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>")).to_str().encode()


def decoder_model() -> bytes:
    from dataset.text.sentencepiece import train_pieces

    made: list[bytes] = []
    train_pieces(["a lion, a dog", "a cat"] * 10, 300, made.append)
    return made[0]


BINARIES = {
    "tar": Binary(shard, tar_shard, ".tar"),
    "tar, indexed": Binary(shard_index, tar_shard, ".tar"),
    "tar.gz": Binary(shard, lambda: gzip.compress(tar_shard()), ".tar.gz"),
    "TFRecord": Binary(shard, tfrecord_shard, ".tfrecord"),
    "TFRecord, indexed": Binary(shard_index, tfrecord_shard, ".tfrecord"),
    "CSV": Binary(table_rows, TABLE.encode, ".csv"),
    "CSV, UTF-16": Binary(table_rows, lambda: TABLE.encode("utf-16"), ".csv"),
    "TSV": Binary(table_rows, TABLE.replace(",", "\t").encode, ".tsv"),
    "Parquet": Binary(table_rows, parquet_file, ".parquet"),
    "Parquet with images": Binary(table_rows, lambda: parquet_file(True), ".parquet"),
    "saved data set": Binary(saved_dataset, arrow_stream, ".arrow"),
    "visual codes": Binary(
        visual_codes, lambda: saved_array(np.ones((CODES, 4), np.int32)), ".npy"
    ),
    "index of a shard": Binary(damaged_cache("shards", index_size), lambda: b"PK\3\4", ".npz"),
    "count of a shard": Binary(damaged_cache("counts", shard_count), COUNT.encode, ".json"),
    "features": Binary(feature_bank, lambda: saved_array(np.ones((4, 3), np.float32)), ".npy"),
    "PNG": Binary(image, encoded_image, ".png"),
    "JPEG": Binary(image, lambda: encoded_image(1, "JPEG"), ".jpg"),
    "WebP": Binary(image, lambda: encoded_image(1, "WEBP"), ".webp"),
    "GIF": Binary(image, lambda: encoded_image(1, "GIF", "P"), ".gif"),
    "TIFF": Binary(image, lambda: encoded_image(1, "TIFF"), ".tiff"),
    "BMP": Binary(image, lambda: encoded_image(1, "BMP"), ".bmp"),
    "zip of images": Binary(zip_member, zip_of_images, ".zip"),
    "refs.p": Binary(plain, lambda: pickle.dumps(REFS, 2), ".p"),
    "refs.p, protocol 0": Binary(plain, lambda: pickle.dumps(REFS, 0), ".p"),
    "refs.p, protocol 4": Binary(plain, lambda: pickle.dumps([REFS, np.arange(3)], 4), ".p"),
    "array": Binary(plain, lambda: saved_array(np.arange(6.0)), ".npy"),
    "array of objects": Binary(plain, lambda: saved_array(np.array(REFS)), ".npy"),
    "CC3M": Binary(
        metadata("cc3m"),
        lambda: saved_array(np.array([{"image_id": 1, "captions": ["a"]}])),
        ".npy",
    ),
    "YFCC": Binary(metadata("yfcc15m"), lambda: pickle.dumps([(1, "a", "b")]), ".pkl"),
    "SLIP's lists": Binary(slip_lists, lambda: saved_array(np.array(["a", "b", "c"])), ".npy"),
    "checkpoint": Binary(weights, lambda: torch_file({"model": STATE, "epoch": 3}), ".pt"),
    "legacy checkpoint": Binary(weights, lambda: torch_file({"model": STATE}, False), ".pth"),
    "network": Binary(weights, whole_module, ".pkl"),
    "checkpoint of a run": Binary(checkpoints, checkpoint_file, ".pt"),
    "TorchScript": Binary(jit, script_file, ".pt"),
    "safetensors": Binary(weights, safetensors_file, ".safetensors"),
    "merges": Binary(merges, lambda: gzip.compress(MERGES.encode()), ".txt.gz"),
    "merges, plain": Binary(merges, MERGES.encode, ".txt"),
    "vocabulary": Binary(wordpiece, VOCABULARY.encode, ".txt"),
    "tokenizer.json": Binary(wordpiece, tokenizer_json, ".json"),
    "decoder's tokenizer.json": Binary(pieces, decoder_json, ".json"),
    "decoder's tokenizer.model": Binary(pieces, decoder_model, ".model"),
    "class list": Binary(class_list, lambda: b"dog\ncat\n", ".txt"),
    "list of a flat folder": Binary(flat_list, lambda: b"0.png 1\n1.png\t0\n", ".txt"),
    "counter of a published set": Binary(published_set(text="nshards"), lambda: b"1\n", ".txt"),
    "classes of a published set": Binary(
        published_set(text="classnames"), lambda: b"dog\r\ncat\n", ".txt"
    ),
    "class of a published image": Binary(published_set("cls"), lambda: b"1\n", ".cls"),
    "classes of a published image": Binary(
        published_set("npy", multilabel=True), lambda: saved_array(np.array([0, 1])), ".npy"
    ),
    "captions of a published image": Binary(
        published_set("txt"), lambda: b"a dog\nit sits\n", ".txt"
    ),
    "TFRecord.gz": Binary(shard, lambda: gzip.compress(tfrecord_shard()), ".tfrecord.gz"),
    "label list": Binary(label_list, lambda: b"0.png : dog,cat\n1.png: cow\n", ".txt"),
    "VOC's lists": Binary(voc_lists, lambda: b"000001 1\n000002 -1\n", ".txt"),
    **{
        f"bytes of {name}": Binary(
            text.read,
            (lambda document=text.document: json.dumps(document, indent=1).encode()),
            ".json" if text.suffix == ".jsonl" else text.suffix,
        )
        for name, text in TEXTS.items()
    },
}
