"""What the server of fresh processes imports before it forks them (see `processes`); without one
of these it would start all the same, and each fork import what it needs."""

import gc
import importlib

SCRIPTS = ("Classification", "Grounding", "NLVR", "Pretrain", "Recognition", "Retrieval", "VE")
MODULES = (
    *SCRIPTS,
    "VQA",
    "eval_knn",
    "eval_zeroshot",
    "main",
    "scripts.planning.simulate",
    "pytest",
    "torch._dynamo",
    "torchvision.transforms.v2",
    "timm",
    "torch.utils.tensorboard",
    "torch.distributed.checkpoint.state_dict",  # this and what follows: imported when first used
    "ruamel.yaml",
    "jinja2",
    "PIL.JpegImagePlugin",
    "tokenizers",
)

gc.disable()  # as in conftest.py
for name in MODULES:
    importlib.import_module(name)
gc.freeze()  # a fork that looks through modules for garbage would copy them
gc.enable()
