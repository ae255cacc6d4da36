"""The original's side of benchmarks.learning --peer: ALBEF's own main() out of a checkout, with
stand-ins for old libraries, our tokenizer, the sizes of a small vision transformer, which the
original writes into its code, and the views that both sides train on."""

import importlib
import json
import types
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.inputs import CROP_SCALE, SMALL_IMAGE, SMALL_VIT, seed_and_run
from benchmarks.peers.stand_ins import Outputs, prepare, stand_in, start_process_group
from dataset.text.wordpiece import Tokenizer


class WordPiece(Tokenizer):
    """Under the names that the original calls."""

    def __init__(self, folder: str):
        super().__init__(folder)
        self.pad_token_id = self.pad_id
        self.cls_token_id = self.cls_id
        self.mask_token_id = self.mask_id

    def __call__(self, texts: list[str], max_length: int, **unused) -> Outputs:
        ids, mask = super().__call__(texts, max_length, lengths=None)
        return Outputs(input_ids=ids, attention_mask=mask.long())


def with_values(function: Callable, **values) -> Callable:
    """`function`, called with `values` whatever the caller asks for."""
    return lambda *args, **given: function(*args, **{**given, **values})


def train(options: types.SimpleNamespace) -> dict:
    """Trains by the original's main()."""
    prepare(options)
    stand_in("ruamel_yaml")
    stand_in("cv2")  # for colour operations alone
    # the small networks, without downloads: the starting weights take DeiT's place
    networks = importlib.import_module("models.model_pretrain")
    tokenizer = types.SimpleNamespace(from_pretrained=WordPiece)
    stand_in("models.tokenization_bert", BertTokenizer=tokenizer)
    networks.BertForMaskedLM.from_pretrained = classmethod(lambda cls, name, config: cls(config))
    networks.VisionTransformer = with_values(networks.VisionTransformer, **SMALL_VIT)
    tokens = 1 + (SMALL_IMAGE // SMALL_VIT["patch_size"]) ** 2
    deit = {"model": {"pos_embed": torch.zeros(1, tokens, SMALL_VIT["embed_dim"])}}
    torch.hub.load_state_dict_from_url = lambda *args, **given: deit
    # digits do not survive flips and colour operations
    data = importlib.import_module("dataset")
    views = data.transforms
    views.RandomResizedCrop = with_values(views.RandomResizedCrop, scale=CROP_SCALE)
    views.RandomHorizontalFlip = data.RandomAugment = torch.nn.Identity
    # one process and one worker; the original wants CUDA for sums over its processes
    pretrain = importlib.import_module("Pretrain")
    pretrain.create_loader = with_values(pretrain.create_loader, num_workers=[1])
    pretrain.utils.MetricLogger.synchronize_between_processes = lambda logger: None
    start_process_group(options.device)
    create_optimizer = pretrain.create_optimizer

    def with_fixed_temperature(options, model: torch.nn.Module) -> torch.optim.Optimizer:
        model.temp.requires_grad_(False)  # as on our side
        return create_optimizer(options, model)

    pretrain.create_optimizer = with_fixed_temperature
    found = seed_and_run(options)
    Path(found["run"]).mkdir(exist_ok=True)
    pretrain.args = types.SimpleNamespace(
        checkpoint=f"{options.folder}/start_{found['seed']}.pth",
        resume=False,
        output_dir=found["run"],
        text_encoder=f"{options.data}/tokenizer",
        device=options.device,
        seed=found["seed"],
        distributed=False,
    )
    pretrain.main(pretrain.args, json.loads(Path(options.folder, "albef.yaml").read_text()))
    return {}
