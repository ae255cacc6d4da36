"""Legacy pickles: data and module tensors come out, payloads are refused, and nothing in the file
is ever run."""

import argparse
import collections
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from base.errors import UserError
from runtime import safe_pickle
from runtime.checkpoint import read_weights
from runtime.safe_pickle import Stub, load_plain, load_torch, module_tensors
from tests.helpers.processes import in_fork

# writes whole modules of a package `dall_e`, and a checkpoint with an OmegaConf-like config, that
# exist only over there
WRITER = """
import sys, types, typing, torch
from torch import nn
def module(name):
    made = sys.modules[name] = types.ModuleType(name)
    return made
def put(where, cls):
    cls.__module__, cls.__qualname__ = where.__name__, cls.__name__
    setattr(where, cls.__name__, cls)
    return cls
module("dall_e"); utils, encoder = module("dall_e.utils"), module("dall_e.encoder")
class Conv2d(nn.Module):
    def __init__(self, n_in, n_out, kw):
        super().__init__()
        self.device = torch.device("cpu")
        self.w, self.b = nn.Parameter(torch.randn(n_out, n_in, kw, kw)), nn.Parameter(torch.randn(n_out))
class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential()
        self.blocks.add_module("input", Conv2d(3, 4, 7))
        self.blocks.add_module("group_1", nn.Sequential(nn.ReLU(), Conv2d(4, 8, 1).half(), nn.MaxPool2d(2)))
        self.blocks.add_module("norm", nn.BatchNorm1d(8))
        self.tied = self.blocks[0]
        self.register_buffer("scratch", torch.ones(2), persistent=False)
put(utils, Conv2d); put(encoder, Encoder)
module("omegaconf"); dictconfig, nodes = module("omegaconf.dictconfig"), module("omegaconf.nodes")
class AnyNode:
    def __init__(self, value): self._val, self._metadata = value, typing.Dict[str, typing.Any]
class DictConfig:
    def __init__(self, content):
        self._metadata, self._parent = dict, None
        wrap = lambda v: DictConfig(v) if isinstance(v, dict) else AnyNode(v)
        self._content = {k: wrap(v) for k, v in content.items()}
        for node in self._content.values(): node._parent = self
put(nodes, AnyNode); put(dictconfig, DictConfig)
torch.manual_seed(0)
model = Encoder()
torch.save(model.state_dict(), folder + "/expected.pt")
table = {"model": {"w": torch.arange(6.0).view(2, 3).t()}, "epoch": 3}
table["config"] = DictConfig({"lr": 1e-4, "optimizer": {"opt": "adamW", "betas": (0.9, 0.999)}, "missing": None})
for zipped in (True, False):
    name = folder + ("/zip" if zipped else "/legacy")
    torch.save(model, name + ".pkl", _use_new_zipfile_serialization=zipped)
    torch.save(table, name + ".pth", _use_new_zipfile_serialization=zipped)
"""


@pytest.fixture(scope="module")
def foreign(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("foreign")
    said = folder / "said.txt"
    assert in_fork(lambda: exec(WRITER, {"folder": str(folder)}), said) == 0, said.read_text()
    return folder


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_module_tensors_without_the_package(foreign, form):
    assert "dall_e" not in sys.modules
    module = load_torch(foreign / f"{form}.pkl")
    assert isinstance(module, Stub) and module.kind == "dall_e.encoder.Encoder"
    expected = torch.load(foreign / "expected.pt", weights_only=True)
    for tensors in (module_tensors(module), read_weights(foreign / f"{form}.pkl")):
        assert tensors.keys() == expected.keys()
        assert all(
            torch.equal(tensors[k], v) and tensors[k].dtype == v.dtype for k, v in expected.items()
        )
    tensors = module_tensors(module)
    assert tensors["blocks.input.w"].data_ptr() == tensors["tied.w"].data_ptr()  # tied stays tied


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_config_objects_become_plain(foreign, form):
    content = load_torch(foreign / f"{form}.pth")
    assert content["config"] == {
        "lr": 1e-4,
        "optimizer": {"opt": "adamW", "betas": (0.9, 0.999)},
        "missing": None,
    }
    assert content["epoch"] == 3
    assert torch.equal(content["model"]["w"], torch.arange(6.0).view(2, 3).t())


def test_ordinary_checkpoints_take_the_official_way(tmp_path, monkeypatch):
    torch.save({"model": {"w": torch.ones(3)}}, tmp_path / "c.pt")
    monkeypatch.setattr(safe_pickle, "_Reader", None)  # not needed
    assert torch.equal(load_torch(tmp_path / "c.pt")["model"]["w"], torch.ones(3))


@pytest.mark.parametrize("module", [b"pathlib", b"pathlib._local"])
def test_paths_of_another_python(module, tmp_path):
    """3.13 calls the module of their classes otherwise than those before and since."""
    torch.save({"args": argparse.Namespace(out=Path("a/b"))}, tmp_path / "own.pt")
    with zipfile.ZipFile(tmp_path / "own.pt") as own, zipfile.ZipFile(tmp_path / "c.pt", "w") as to:
        for name in own.namelist():
            content = own.read(name).replace(b"cpathlib._local\n", b"cpathlib\n")
            to.writestr(name, content.replace(b"cpathlib\n", b"c" + module + b"\n"))
    assert module + b"\nPosixPath" in (tmp_path / "c.pt").read_bytes()
    assert load_torch(tmp_path / "c.pt")["args"] == {"out": "a/b"}


def test_namespace_and_paths(tmp_path):
    args = argparse.Namespace(lr=0.1, out=Path("a/b"), sizes=torch.Size([2]), dtype=torch.float16)
    torch.save({"args": args, "state_dict": {"w": torch.ones(2)}}, tmp_path / "c.pt")
    content = load_torch(tmp_path / "c.pt")
    assert content["args"] == {"lr": 0.1, "out": "a/b", "sizes": (2,), "dtype": torch.float16}
    assert read_weights(tmp_path / "c.pt").keys() == {"w"}


PLAIN = {
    "refs": [
        {
            "ref_id": 1,
            "sentences": [{"sent": "left man", "raw": b"\xff"}],
            "ann_id": 2**70,
            "split": "val",
        }
    ]
    * 2,
    "mixed": (1.5, None, True, {1, 2}, frozenset("ab"), bytearray(b"x"), complex(1, 2), "Grüße"),
    "ordered": collections.OrderedDict(a=1),
    "counts": collections.Counter("aab"),
    "nested": collections.defaultdict(list, {"k": [1]}),
}
ARRAYS = [
    np.arange(6, dtype=np.float32).reshape(2, 3),
    np.asfortranarray(np.arange(6).reshape(2, 3)),
    np.array(["a", "bc"]),
    np.array([True]),
    np.array(5),
    np.array(["x", None, 3], dtype=object),
    np.zeros((0, 4), np.int16),
    np.array(["2020-01-01"], dtype="datetime64[s]"),
    np.arange(3, dtype=">i4"),
]


@pytest.mark.parametrize("protocol", range(6))
def test_plain_data(tmp_path, protocol):
    path = tmp_path / "data.p"
    path.write_bytes(pickle.dumps(PLAIN, protocol))
    assert load_plain(path) == PLAIN
    path.write_bytes(
        pickle.dumps(
            {"arrays": ARRAYS, "scalar": np.float32(2.5), "again": ARRAYS[0], "plain": PLAIN},
            protocol,
        )
    )
    read = load_plain(path)
    assert (
        read["plain"] == PLAIN
        and read["scalar"] == np.float32(2.5)
        and read["again"] is read["arrays"][0]
    )
    for got, wanted in zip(read["arrays"], ARRAYS, strict=True):
        assert type(got) is np.ndarray and got.dtype == wanted.dtype and np.array_equal(got, wanted)


def test_python_2_strings(tmp_path):
    path = tmp_path / "py2.p"
    path.write_bytes(b"(dp0\nS'sent'\np1\nS'caf\\xc3\\xa9'\np2\ns.")
    assert load_plain(path) == {"sent": "café"}
    path.write_bytes(b"(dp0\nS'sent'\np1\nS'caf\\xe9'\np2\ns.")
    assert load_plain(path) == {"sent": "café"}


class Calls:
    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def payloads(marker: Path) -> dict[str, bytes]:
    """Pickles that would create `marker` if any of their code ran."""
    command = f"open({str(marker)!r}, 'w')"
    nested = Calls(getattr, Calls(__import__, "os"), "system")
    numpy_global = "cnumpy.core.multiarray\n_reconstruct\n"
    by_hand = {
        "stack_global": b"\x8c\x02os\x8c\x06system\x93"
        + f"\x8c{chr(len(str(marker)) + 6)}touch {marker}".encode()
        + b"\x85R.",
        "inst": f"(S'touch {marker}'\nios\nsystem\n.".encode(),
        "obj": f"(cos\nsystem\nS'touch {marker}'\no.".encode(),
        "dotted": f"ccollections\nOrderedDict.__init__\n(S'touch {marker}'\ntR.".encode(),
        "torch_free_load": b"ctorch.storage\n_load_from_bytes\n(S'x'\ntR.",
        "set_on_function": f"{numpy_global}(N}}S'__defaults__'\nI1\nstb.".encode(),
        "set_on_class": b"cnumpy\nndarray\n(N}S'kind'\nI1\nstb.",
        "set_on_builtin": b"ccollections\nOrderedDict\n}S'update'\nI1\nsb.",
        "void_dtype": b"cnumpy\ndtype\n(S'V8'\nI0\nI1\ntR.",
        "extension": b"\x82\x01.",
        "persistent": b"Pos\n.",
    }
    live = [
        Calls(os.system, f"touch {marker}"),
        Calls(eval, command),
        Calls(exec, command),
        nested,
        {"refs": [Calls(eval, command)]},
        Calls(subprocess.call, ["touch", str(marker)]),
    ]
    dumped = {
        f"live_{i}": pickle.dumps(obj, protocol)
        for i, obj in enumerate(live)
        for protocol in (0, 2, 4)
    }
    return by_hand | dumped


def test_payloads_are_refused_and_nothing_runs(tmp_path):
    marker, path = tmp_path / "ran", tmp_path / "payload.p"
    for name, data in payloads(marker).items():
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"payload.p"):
            load_plain(path)
            pytest.fail(f"{name} was read")
        # the same inside torch's zip format, and as a legacy torch file
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", data)
            archive.writestr("archive/version", "3\n")
        with pytest.raises(UserError, match=r"payload.p"):
            load_torch(path)
            pytest.fail(f"{name} was read")
        head = [
            pickle.dumps(x, 2) for x in (safe_pickle.LEGACY_MAGIC, 1001, {"little_endian": True})
        ]
        path.write_bytes(b"".join(head) + data + pickle.dumps([], 2))
        with pytest.raises(UserError, match=r"payload.p"):
            load_torch(path)
            pytest.fail(f"{name} was read")
    assert not marker.exists()
    assert collections.OrderedDict(a=1) == {"a": 1} and safe_pickle.Stub.kind == ""


def test_refused_global_is_named(tmp_path):
    path = tmp_path / "refs.p"
    path.write_bytes(pickle.dumps(Calls(os.system, "true"), 2))
    with pytest.raises(UserError, match=r"refs\.p.* asks for posix\.system.*nothing of it was run"):
        load_plain(path)
    path.write_bytes(pickle.dumps(Path("a")))  # harmless, but no plain data
    with pytest.raises(UserError, match="pathlib"):
        load_plain(path)


def test_tensors_stay_inside_their_storage(tmp_path):
    torch.save({"w": torch.arange(4.0), "x": argparse.Namespace()}, tmp_path / "good.pt")
    source = zipfile.ZipFile(tmp_path / "good.pt")
    for old, new in (
        (b"K\x04\x85", b"K\x7f\x85"),
        (b"K\x01\x85", b"J\xff\xff\xff\xff\x85"),
    ):  # size 127; stride -1
        data = source.read("good/data.pkl")
        assert data.count(old) == 1
        with zipfile.ZipFile(tmp_path / "bad.pt", "w") as archive:
            for name in source.namelist():
                archive.writestr(
                    name, data.replace(old, new) if name.endswith("data.pkl") else source.read(name)
                )
        with pytest.raises(UserError, match=r"bad.pt"):
            load_torch(tmp_path / "bad.pt")
    assert torch.equal(load_torch(tmp_path / "good.pt")["w"], torch.arange(4.0))


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_damaged_files_name_themselves(foreign, tmp_path, form):
    data = (foreign / f"{form}.pkl").read_bytes()
    for cut in (0, 10, len(data) // 2, len(data) - 3):
        (tmp_path / "cut.pkl").write_bytes(data[:cut])
        with pytest.raises(UserError, match=r"cut.pkl"):
            load_torch(tmp_path / "cut.pkl")


def test_other_things_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_torch(tmp_path / "none.pt")
    with pytest.raises(UserError, match="no such file"):
        load_plain(tmp_path / "none.p")
    with zipfile.ZipFile(tmp_path / "scripted.pt", "w") as archive:
        archive.writestr("archive/constants.pkl", pickle.dumps(()))
    with pytest.raises(UserError, match=r"scripted.pt: a TorchScript archive"):
        load_torch(tmp_path / "scripted.pt")
    with pytest.raises(UserError, match="not a PyTorch module"):
        module_tensors(Stub())
    (tmp_path / "deep.p").write_bytes(
        b"]" * 100_000 + b"a" * 99_999 + b"."
    )  # deeply nested: read, not crashed on
    assert isinstance(load_plain(tmp_path / "deep.p"), list)
