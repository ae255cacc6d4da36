"""A small model of open_clip in a folder, as open_clip pushes them to the hub."""

import json

import torch

from tests.helpers.tiny_hugging_face import save_tokenizer


def tiny_open_clip(folder, **changes):
    """`folder` with configuration and weights; changes: of the model's configuration."""
    import open_clip

    text = {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
    model_cfg = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text} | changes
    look = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear"}
    about = {"model_cfg": model_cfg, "preprocess_cfg": look | {"resize_mode": "squash"}}
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps(about))
    torch.manual_seed(0)
    kind = open_clip.CustomTextCLIP if model_cfg.pop("custom_text", False) else open_clip.CLIP
    kind = open_clip.CoCa if "multimodal_cfg" in changes else kind
    torch.save(kind(**model_cfg).state_dict(), folder / "open_clip_pytorch_model.bin")
    return folder


def open_clip_siglip(folder):
    """A SigLIP of open_clip: texts read to their last position, a bias of the logits."""
    text = {"context_length": 16, "vocab_size": 32, "width": 32, "heads": 2, "layers": 2}
    text |= {"no_causal_mask": True, "pool_type": "last", "hf_tokenizer_name": "local"}
    tiny_open_clip(folder, custom_text=True, text_cfg=text, init_logit_bias=-10)
    about = json.loads((folder / "open_clip_config.json").read_text())
    about["model_cfg"]["custom_text"] = True
    (folder / "open_clip_config.json").write_text(json.dumps(about))
    save_tokenizer(folder, ["input_ids"])
    return folder
