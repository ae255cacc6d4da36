"""The original's side of benchmarks.learning --peer: ALBEF's own main() out of a checkout.

Its training loop, data set, optimizer, schedule and networks run as they are. Around them is what
they need to start today and at a small size: stand-ins for old libraries (stand_ins.py), a
tokenizer that gives the same ids, the sizes of the vision transformer, which the original writes
into its code, and the views that both sides train on.
"""

import importlib
import types
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer

from benchmarks.peers.stand_ins import Outputs, prepare, stand_in, start_process_group


class WordPiece:
    """What the original calls of its tokenizer: [CLS] and the pieces without [SEP], padded."""

    def __init__(self, file: str):
        self.backend = Tokenizer.from_file(file)
        self.vocab_size = self.backend.get_vocab_size()
        self.pad_token_id = self.backend.token_to_id("[PAD]")
        self.cls_token_id = self.backend.token_to_id("[CLS]")
        self.mask_token_id = self.backend.token_to_id("[MASK]")

    def __call__(self, texts: list[str], max_length: int, **unused) -> Outputs:
        rows = []
        for text in texts:
            pieces = self.backend.encode(text, add_special_tokens=False).ids
            rows.append(torch.tensor([self.cls_token_id, *pieces][:max_length]))
        padding = {"batch_first": True, "padding_value": self.pad_token_id}
        ids = torch.nn.utils.rnn.pad_sequence(rows, **padding)
        return Outputs(input_ids=ids, attention_mask=(ids != self.pad_token_id).long())


def with_values(function: Callable, **values) -> Callable:
    """`function`, called with `values` whatever the caller asks for."""
    return lambda *args, **given: function(*args, **{**given, **values})


def adjust_networks(options: types.SimpleNamespace) -> None:
    """The vision transformer in the size of `options.vision`; no download."""
    model = importlib.import_module("models.model_pretrain")
    model.BertForMaskedLM.from_pretrained = classmethod(lambda cls, name, config: cls(config))
    model.VisionTransformer = with_values(model.VisionTransformer, **options.vision)
    tokens = 1 + (options.config["image_res"] // options.vision["patch_size"]) ** 2
    positions = torch.zeros(1, tokens, options.vision["embed_dim"])
    # DeiT, whose place the starting weights take
    torch.hub.load_state_dict_from_url = lambda *args, **given: {"model": {"pos_embed": positions}}


def adjust_data(options: types.SimpleNamespace) -> None:
    """The crop of both sides, without flips and colour operations: digits do not survive them."""
    data = importlib.import_module("dataset")
    views = data.transforms
    views.RandomResizedCrop = with_values(views.RandomResizedCrop, scale=tuple(options.crop_scale))
    views.RandomHorizontalFlip = data.RandomAugment = torch.nn.Identity


def open_checkout(options: types.SimpleNamespace) -> types.ModuleType:
    """The checkout's Pretrain.py, which runs on one process and on the CPU, too."""
    prepare(options)
    stand_in("ruamel_yaml")
    stand_in("cv2")  # for colour operations alone
    adjust_networks(options)
    adjust_data(options)
    tokenizer = types.SimpleNamespace(from_pretrained=WordPiece)
    stand_in("models.tokenization_bert", BertTokenizer=tokenizer)
    pretrain = importlib.import_module("Pretrain")
    create_optimizer = pretrain.create_optimizer

    def with_fixed_temperature(options, model: torch.nn.Module) -> torch.optim.Optimizer:
        model.temp.requires_grad_(False)  # as on our side
        return create_optimizer(options, model)

    pretrain.create_optimizer = with_fixed_temperature
    pretrain.create_loader = with_values(pretrain.create_loader, num_workers=[1])
    # sums over the one process, for which the original wants CUDA
    pretrain.utils.MetricLogger.synchronize_between_processes = lambda logger: None
    start_process_group(options.device)
    return pretrain


def train(options: types.SimpleNamespace) -> dict:
    """Trains by the original's main() from `options.start` on into the folder `options.run`."""
    pretrain = open_checkout(options)
    Path(options.run).mkdir(parents=True, exist_ok=True)
    pretrain.args = types.SimpleNamespace(
        checkpoint=options.start,
        resume=False,
        output_dir=options.run,
        text_encoder=options.text_encoder,
        device=options.device,
        seed=options.seed,
        distributed=False,
    )
    pretrain.main(pretrain.args, options.config)
    return {}
