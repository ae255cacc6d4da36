"""What is made once for many: by one at a time, whose lock is gone afterwards."""

import json
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import eval_knn
from base import pixels
from base.caches import cached_path, one_builder
from base.distributed import ALONE
from base.pixels import HALF, Pixels
from dataset.health import survey
from dataset.tasks import pretrain
from evaluation.demo import index
from scripts import embed


def test_a_cached_file_is_that_of_one_state_of_its_source(tmp_path):
    source = tmp_path / "a.json"
    source.write_text("ab")
    first = cached_path(source, ".index", "caption")
    assert (
        cached_path(source, ".index", "caption") == first != cached_path(source, ".index", "text")
    )
    os.utime(source, ns=(0, 0))  # of the same length, at another time
    other = cached_path(source, ".index", "caption")
    source.write_text("abc")
    os.utime(source, ns=(0, 0))
    assert len({first, other, cached_path(source, ".index", "caption")}) == 3


def test_one_builds_at_a_time_and_no_lock_is_left(tmp_path):
    inside = []
    most = []

    def build():
        for _ in range(20):
            with one_builder(tmp_path / "made.index"):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.0005)  # for the others to come
                inside.pop()

    threads = [threading.Thread(target=build) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 120 and max(most) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_builder_that_fails_leaves_no_lock(tmp_path):
    try:
        with one_builder(tmp_path / "folder/made.index"):
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert list((tmp_path / "folder").iterdir()) == []


def key_of_codes(_folder, _monkeypatch):
    transform = SimpleNamespace(resolution=32, token_resolution=16)
    build = SimpleNamespace(image_root=Path(), transform=transform)
    return pretrain.codes_key([{"image": "a.png"}], build, torch.nn.Identity())


def key_of_embeddings(_folder, _monkeypatch):
    config = SimpleNamespace(
        root=Path(), score="z", half=False, precision="fp32", batch_size=2, exif=False
    )
    return embed.key_of(embed.Part("x", [], 0, 0), SimpleNamespace(signature="s"), config)


def key_of_features(folder, monkeypatch):
    monkeypatch.setattr(eval_knn, "feature_bank", lambda *given: given[5].name)  # its path
    monkeypatch.setattr(eval_knn, "fingerprint", lambda encoder: "f")
    monkeypatch.setattr(eval_knn, "identity", lambda *_: "i")
    encoder = torch.nn.Identity()
    encoder.pixels, encoder.width, encoder.view = Pixels(16, "bicubic", *HALF), 4, None
    config = eval_knn.Config(cache=folder)
    images = type("Images", (list,), {"records": [], "classes": []})()
    return eval_knn.bank_of(images, "x", encoder, "squeezed", config, ALONE)


def key_of_index(folder, monkeypatch):
    monkeypatch.setattr(index.Store, "index", lambda self, *_, **__: self.file.name)
    embedder = SimpleNamespace(signature="s", texts=None)
    return index.build_index(folder, [], embedder, None, folder)


def key_of_facts(folder, _monkeypatch):
    (folder / "list.json").write_text(json.dumps([{"image": "a.png", "caption": "x"}]))
    work = survey.Work(0, "train", str(folder / "list.json"), 0, 1)
    return survey.Looking(None)._state(work)


MADE_OF_PIXELS = [key_of_codes, key_of_embeddings, key_of_features, key_of_index, key_of_facts]


@pytest.mark.parametrize("key", MADE_OF_PIXELS)
def test_what_is_made_of_images_is_made_again_where_they_are_read_otherwise(
    key, tmp_path, monkeypatch
):
    """Features of truncated PNGs were those of grey images."""
    before = key(tmp_path, monkeypatch)
    assert key(tmp_path, monkeypatch) == before
    monkeypatch.setattr(pixels, "DECODING", pixels.DECODING + 1)
    assert key(tmp_path, monkeypatch) != before


def test_features_and_embeddings_are_told_by_every_setting_that_they_depend_on(
    tmp_path, monkeypatch
):
    key_of_features(tmp_path, monkeypatch)  # which leaves its stand-ins
    encoder = torch.nn.Identity()
    encoder.pixels, encoder.width, encoder.view = Pixels(16, "bicubic", *HALF), 4, None
    images = type("Images", (list,), {"records": [], "classes": []})()

    def features(in_words="squeezed", **changes) -> str:
        config = eval_knn.Config(cache=tmp_path, **changes)
        return eval_knn.bank_of(images, "x", encoder, in_words, config, ALONE)

    def embeddings(signature="s", stop=0, **changes) -> str:
        config = {"root": Path(), "score": "z", "half": False, "precision": "fp32"}
        config = SimpleNamespace(**config | {"batch_size": 2, "exif": False} | changes)
        part = embed.Part("x", [{"caption": "a"}] * 2, 0, stop)
        return embed.key_of(part, SimpleNamespace(signature=signature), config)

    changes = [{"precision": "bf16"}, {"batch_size": 3}, {"exif": True}]
    found = [features(), features("centre"), *(features(**each) for each in changes)]
    changes += [{"signature": "t"}, {"stop": 1}, {"score": "h"}, {"half": True}]
    found += [embeddings(), *(embeddings(**each) for each in changes)]
    assert found[0] == features() and len(set(found)) == len(found) == 13


def test_a_tokenizer_is_told_by_all_that_its_ids_depend_on():
    """Two of one vocabulary would else share the text classifiers that are kept."""
    from tokenizers import Tokenizer, models, normalizers
    from transformers import PreTrainedTokenizerFast

    from dataset.tasks.dual_inputs import tokenizer_identity
    from models.weights.libraries import HfTokenizer

    def theirs(lower=True, merges=(("a", "b"), ("b", "a"))):
        vocabulary = {token: number for number, token in enumerate(["<p>", "a", "b", "ab", "ba"])}
        backend = Tokenizer(models.BPE(vocabulary, list(merges)))
        backend.normalizer = normalizers.Lowercase() if lower else normalizers.NFC()
        return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<p>")

    makers = [theirs, lambda: theirs(lower=False), lambda: theirs(merges=(("b", "a"), ("a", "b")))]
    folders = [lambda make=make: SimpleNamespace(backend=make()) for make in makers]
    longer = [lambda: HfTokenizer(theirs(), 4, True), lambda: HfTokenizer(theirs(), 8, True)]
    makers = [*folders, *longer, lambda: HfTokenizer(theirs(), 8, False)]
    found = [tokenizer_identity(make()) for make in makers]
    assert found == [tokenizer_identity(make()) for make in makers] and len(set(found)) == 6
    used = makers[-1]()
    used(["ab", "aba"])
    assert tokenizer_identity(used) == found[-1]


def test_a_network_is_told_by_all_that_it_computes_from_its_weights():
    """Two networks of the same weights would else be scored by the cached features of one."""
    import transformers

    from evaluation.zeroshot import fingerprint
    from models.classification.classifier import ClassifierConfig, VisionClassifier
    from models.layers.vit import ViT, ViTConfig

    def ours(**changes):
        return VisionClassifier(ClassifierConfig(model="vit-mu/8", image_size=16, **changes))

    def vit(heads):
        return ViT(ViTConfig(16, 8, 32, 1, heads))

    def theirs(**changes):
        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
        config = transformers.CLIPTextConfig(**sizes, vocab_size=9, **changes)
        return transformers.CLIPTextModel(config)

    makers = [ours, lambda: ours(gelu="none"), lambda: ours(layer_norm_eps=1e-3)]
    makers += [lambda: vit(2), lambda: vit(4), theirs]
    makers += [lambda: theirs(hidden_act="gelu"), lambda: theirs(eos_token_id=2)]

    def print_of(make) -> str:
        network = make()
        for parameter in network.parameters():
            torch.nn.init.ones_(parameter)
        wrapper = torch.nn.Sequential(network)
        wrapper.config = "as it is called"
        return fingerprint(wrapper)

    found = [print_of(make) for make in makers]
    assert found == [print_of(make) for make in makers], "the same again"
    assert len(set(found)) == len(makers)
