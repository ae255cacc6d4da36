"""Names that old configurations and the originals' command lines hold, without effect here.

Name -> why. A run that is given one says so in one line. A class of options names its table as
IGNORED.
"""

SCHEDULE = {
    "decay_rate": "no schedule of the originals' configurations uses it",
    "cooldown_epochs": "no schedule of the originals' configurations uses it",
}

FINE_TUNING = {
    "vit_mask_token": "no patches are masked in fine-tuning",
    "mlm_probability": "no tokens are masked in fine-tuning",
    "eval_ema": "the originals read it nowhere",
    "save_sims": "the originals write nothing there; rankings are in result/",
    "coco_file": "boxes and sizes are in refcoco_data and det_file",
    "text_decoder": "the decoder of answers starts from the text layers of --checkpoint",
}

QUESTION_ANSWERING = {**FINE_TUNING, "eos": "an answer ends with [SEP]"}

PRETRAINING = {
    "vit_mask_token": "`method` decides: SIMLA masks patches, ALBEF does not",
    "disable_wandb": "see --wandb",
}

CLIP_ROCKET = {  # and open_clip
    "attn_layer": "both compute the same; the fastest is taken",
    "start_epoch": "runs resume from their checkpoint",
    "gpu": "the launcher chooses; see --device",
    "name": "a run is known by its --output-dir",
    "no_share_token": "clip-rocket reads it nowhere",
    "semi_paired": "unfinished in clip-rocket: its losses cannot take more images than texts",
    "unpaired_ratio": "belongs to --semi-paired",
    "metadata_unpaired": "belongs to --semi-paired",
    "workers_unpaired": "belongs to --semi-paired",
    "local_loss": "always so",
    "gather_with_grad": "always so",
    "use_bn_sync": "always so",
}
