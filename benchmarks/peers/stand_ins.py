"""Stand-ins for the libraries that SIMLA, ALBEF and NXTP import: the few names they use. Today's
Python cannot install their version of transformers; timm still has what they take from it."""

import atexit
import importlib
import importlib.util
import json
import sys
import types
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn


class Missing(types.ModuleType):
    """A library of which little is used: any name of it is there, and is `anything`."""

    __path__ = ()
    anything = None

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return self.anything


def stand_in(name: str, **names) -> types.ModuleType:
    """Register a module (and its parents) that holds `names`; returns it."""
    parent, _, leaf = name.rpartition(".")
    module = sys.modules.setdefault(name, Missing(name))
    module.__dict__.update(names)
    if parent:
        stand_in(parent)
        setattr(sys.modules[parent], leaf, module)
    return module


class Outputs(types.SimpleNamespace):
    """Named results, as of networks and tokenizers; `outputs[i]` counts those that are not None."""

    def __getitem__(self, index):
        return [value for value in vars(self).values() if value is not None][index]

    def to(self, device: str) -> "Outputs":
        return Outputs(**{name: value.to(device) for name, value in vars(self).items()})


class Config(types.SimpleNamespace):
    """BERT configuration: the JSON file's fields over the library's defaults."""

    use_cache = output_attentions = output_hidden_states = False
    is_decoder = add_cross_attention = False
    gradient_checkpointing = chunk_size_feed_forward = False
    use_return_dict = True
    position_embedding_type = "absolute"
    type_vocab_size, pad_token_id = 2, 0

    @classmethod
    def from_json_file(cls, path: str) -> "Config":
        return cls(**json.loads(Path(path).read_text()))


class Pretrained(nn.Module):
    """What the originals use of transformers' base class."""

    dtype = torch.float32

    def __init__(self, config: Config, *args, **kwargs):
        super().__init__()
        self.config = config

    def init_weights(self) -> None:
        self.apply(self._init_weights)
        head = getattr(self, "get_output_embeddings", lambda: None)()
        if head is not None:
            head.weight = self.bert.get_input_embeddings().weight

    def invert_attention_mask(self, mask: torch.Tensor) -> torch.Tensor:
        mask = mask[:, None, None, :] if mask.ndim == 2 else mask[:, None]
        return (1.0 - mask.to(self.dtype)) * torch.finfo(self.dtype).min

    def get_head_mask(self, head_mask, layers: int):
        return [None] * layers


def no_documentation(*args, **kwargs):
    """Stands for the library's documentation decorators, part of which were removed."""
    return lambda function: function


def replace_libraries() -> None:
    """Register stand-ins for transformers."""
    logging = types.SimpleNamespace(get_logger=lambda name: None, set_verbosity_error=lambda: None)
    stand_in("transformers", logging=logging)
    stand_in("transformers.utils", logging=logging)
    stand_in("transformers.activations", ACT2FN={"gelu": nn.functional.gelu})
    stand_in("transformers.file_utils", ModelOutput=Outputs, anything=no_documentation)
    stand_in("transformers.modeling_outputs", anything=Outputs)
    modeling = stand_in("transformers.modeling_utils", PreTrainedModel=Pretrained)
    modeling.apply_chunking_to_forward = lambda function, chunk, dim, *tensors: function(*tensors)
    stand_in("transformers.models.bert.configuration_bert", BertConfig=Config)


def open_checkout(folder: str | Path) -> None:
    """Let its modules be found, and before ours of the same name."""
    sys.path.insert(0, str(folder))
    theirs = {path.stem for path in Path(folder).iterdir()}
    for name in list(sys.modules):
        if name.partition(".")[0] in theirs:
            del sys.modules[name]


def prepare(options: types.SimpleNamespace) -> None:
    """Open the checkout, with stand-ins unless --peer-python has the old libraries."""
    open_checkout(options.peer)
    importlib.import_module("torch.optim.optimizer").required = object()
    if options.peer_python is None:
        replace_libraries()
    else:
        library = importlib.import_module("transformers.file_utils")
        library.add_code_sample_docstrings = no_documentation
    for name in ("einops", "requests"):  # imported, but the tokenizer's encoder uses neither
        if importlib.util.find_spec(name) is None:
            stand_in(name)


def start_process_group(device: str) -> None:
    """A group of this process alone, which the originals' gathers need."""
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    atexit.register(dist.destroy_process_group)
