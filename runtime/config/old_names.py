"""Names that old configurations and other code bases have for options.

A class of options names its tables. IGNORED: name -> why it has no effect here; a run that is given
one says so in one line. NEW_NAMES: name -> what to write instead; whoever types it reads that.
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

# ---- NEW_NAMES

FLAGS_OF_MAIN = {  # open_clip's and COYO-ALIGN's
    "train_data": "--shards TARS with --dataset wds, or --metadata TABLE with --dataset pairs",
    "dataset_type": "--dataset wds (shards) or --dataset pairs (a table)",
    "csv_img_key": "--metadata 'TABLE?image=COLUMN&caption=COLUMN'",
    "csv_caption_key": "--metadata 'TABLE?image=COLUMN&caption=COLUMN'",
    "csv_separator": "--metadata TABLE: the separator is found",
    "train_num_samples": "--samples N",
    "val_data": "eval_zeroshot.py with data set retrieval:SHARDS or retrieval:TABLE, after training",
    "val_num_samples": "eval_zeroshot.py, which counts",
    "siglip": "--model CLIP_VITB16_SIGLIP",
    "pretrained": "--model open_clip/NAME:TAG, or --checkpoint FILE",
    "force_quick_gelu": "--model ViT-B/32, with a slash: those names have QuickGELU",
    "lock_image": "--lock image",
    "lock_text": "--lock text",
    "accum_freq": "--accumulate K --cache-features",
    "grad_checkpointing": "--activation_checkpointing",
    "grad_clip_norm": "--clip-grad-norm X",
    "beta1": "--betas B1 B2",
    "beta2": "--betas B1 B2",
    "torchcompile": "--compile",
    "fsdp": "--parallel fsdp",
    "imagenet_val": "--val-folder DIR",
    "zeroshot_frequency": "--eval_every N",
    "val_frequency": "--eval_every N",
    "save_frequency": "--save_every N",
    "delete_previous_checkpoint": "--keep 1",
    "logs": "--output-dir DIR",
    "log_every_n_steps": "--log_every N",
    "report_to": "--wandb; TensorBoard's events are always written",
    "remote_sync": "--output-dir s3://BUCKET/FOLDER",
    "train_steps": "--epochs 'N steps'",
    "warmup_steps": "--warmup 'N steps'",
    "seq_length": "--context_length N",
    "img_encoder_name": "--model ALIGN_B3_MINI",
    "txt_encoder_name": "--model ALIGN_B3_MINI",
}

FLAGS_OF_NXTP = {
    "ckpt_path": "--checkpoint FILE",
    "img_path": "--image FILE",
    "save_attention_map": "--image FILE, which writes the maps",
}
