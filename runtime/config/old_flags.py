"""Flags of other code bases that are no options here: name -> what to write instead.

A class of options names its table as NEW_NAMES; whoever types such a flag reads it.
"""

MAIN = {  # open_clip's and COYO-ALIGN's
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
    "imagenet_val": "--val-folder DIR --labels labels.json --templates templates.json",
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

NXTP = {
    "ckpt_path": "--checkpoint FILE",
    "img_path": "--image FILE",
    "save_attention_map": "--image FILE, which writes the maps",
}
