"""The full-size recipes' peak memory and launches, stored; after a change that is meant to move them:

python -m tests.traces.full_size
"""

import json
from pathlib import Path

from tests.helpers.traces import trace_of

STORED = Path(__file__).with_name("full_size.json")
RECIPES = {
    "SIMLA": "Pretrain --config configs/Pretrain/simla.yaml",
    "ALBEF": "Pretrain --config configs/Pretrain/albef.yaml",
    "Retrieval": "Retrieval --config configs/Retrieval/coco.yaml",
    "VQA": "VQA --config configs/VQA/vqa.yaml",
    "NXTP": "Recognition --config configs/Recognition/g3m.yaml",
    "CL2L R50": "main --config configs/main/cc12m_r50_cl2l.yaml",
    "BarLIP R50": "main --config configs/main/cc12m_r50_barlip.yaml",
    "ALIGN B7": "main --config configs/main/align_coyo700m.yaml",
    "ViT-L/16 512": "Classification --config configs/Classification/vit_l16_i1k_downstream_ema.yaml",
}


def measure(name: str) -> dict[str, int]:
    trace = trace_of(RECIPES[name] + " --precision bf16")
    return {"peak_bytes": trace.peak, "launches": trace.launches}


def stored() -> dict[str, dict[str, int]]:
    return json.loads(STORED.read_text())


if __name__ == "__main__":
    found = {}
    for name in RECIPES:
        found[name] = measure(name)
        print(name, found[name], flush=True)
    STORED.write_text(json.dumps(found, indent=2) + "\n")
