"""One small step of every training script and method: command lines of debug recipes, in bf16."""

BF16 = "--precision bf16"
SMALL_PRETRAIN = f"--bert_config configs/bert_debug.json {BF16}"
DUAL = f"main --config configs/main/debug.yaml {BF16} --model"
STEPS = {
    "simla": f"Pretrain --config configs/Pretrain/debug.yaml {SMALL_PRETRAIN}",
    "albef": f"Pretrain --config configs/Pretrain/debug.yaml --method albef {SMALL_PRETRAIN} "
    "--bert_config configs/bert_small.json",
    "ve": f"VE --config configs/VE/debug.yaml {BF16}",
    "retrieval": f"Retrieval --config configs/Retrieval/debug.yaml {BF16}",
    "grounding": f"Grounding --config configs/Grounding/debug.yaml {BF16}",
    "vqa": f"VQA --config configs/VQA/debug.yaml {BF16}",
    "nlvr": f"NLVR --config configs/NLVR/debug.yaml {BF16}",
    "text assignment": f"NLVR --config configs/NLVR/debug_assignment.yaml {BF16}",
    "nxtp": f"Recognition --config configs/Recognition/debug.yaml {BF16}",
    "clip": f"{DUAL} CLIP_RT_CLIP",
    "cl2l": f"{DUAL} CL2L_RT_CL2L",
    "siamlip": f"{DUAL} CL2L_RT_SIAMLIP",
    "byolip": f"{DUAL} CL2L_RT_SIAMLIP --momentum true",
    "barlip": f"{DUAL} CL2L_RT_BARLIP",
    "swalip": f"{DUAL} CL2L_RT_SWALIP --num_augs 2 --label_smoothing 0",
    "swalipv1": f"{DUAL} CL2L_RT_SWALIPV1",
    "siglip": f"{DUAL} CLIP_VITT8_SIGLIP",
    "slip": f"{DUAL} SLIP_VITT8",
    "simclr": f"{DUAL} SIMCLR_VITT8 --val_folder none",
    "cached": f"{DUAL} CLIP_RT_CLIP --cache_features true --accumulate 2",
    "align": f"main --config configs/main/debug_align.yaml {BF16}",
    "vit": f"Classification --config configs/Classification/debug.yaml {BF16}",
}
