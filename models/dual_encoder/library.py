"""CLIP, SigLIP (Zhai et al., 2023) and ALIGN as open_clip and transformers define them, trained
further."""

import math

import torch
from torch import Tensor, nn

from base.errors import UserError
from base.libraries import POSITION_TABLES, dual_inputs, dual_network, without_decay
from models.dual_encoder.align import LOWEST_TEMPERATURE
from models.dual_encoder.base import DualEncoder, Features
from models.dual_encoder.config import DualConfig
from models.layers.clip_towers import LockableTowers

ALIGN_SMOOTHING = 0.1  # of the labels in transformers' loss


class LibraryCLIP(LockableTowers, DualEncoder):
    """The network of `config.model`, `open_clip/NAME:TAG` or `hf/FOLDER`, under its own names.

    One with a bias of its logits is SigLIP and learns by the sigmoid loss, any other by CLIP's. It
    is built with random weights; `load` reads the published ones.
    """

    of_library = True
    towers = {  # noqa: RUF012 as in the base
        "image": ("network.visual.", "network.vision_model.", "network.visual_projection."),
        "text": (
            "network.text.",
            "network.text_model.",
            "network.text_projection",
            "network.transformer.",
            "network.token_embedding.",
            "network.positional_embedding",
            "network.ln_final.",
        ),
    }

    def __init__(self, config: DualConfig):
        super().__init__()
        self.config = config
        known = dual_inputs(config.model).vocab_size
        if config.vocab_size > known:
            raise UserError(
                f"{config.model}: its tokenizer makes {config.vocab_size} tokens, but its text "
                f"encoder knows {known}; keep the tokenizer it was trained with in the folder"
            )
        self.network = dual_network(config.model, weights=False)
        self.pad_id = None  # where attention needs a mask: ALIGN's texts are read both ways
        if self.is_align:
            self.pad_id = self.network.config.text_config.pad_token_id
            prepare_align(self.network)

    def load(self) -> None:
        """Load the published weights, or those of the folder. UserError."""
        published = dual_network(self.config.model, weights=True)
        self.network.load_state_dict(published.state_dict())

    @property
    def is_siglip(self) -> bool:
        return getattr(self.network, "logit_bias", None) is not None

    @property
    def is_align(self) -> bool:
        return hasattr(self.network, "temperature")

    @property
    def label_smoothing(self) -> float:
        return ALIGN_SMOOTHING if self.is_align else 0.0

    def scale(self) -> Tensor:
        """What the loss multiplies cosines by, 0-d."""
        if self.is_align:
            return 1 / self.network.temperature
        return self.network.logit_scale.exp().reshape(())

    def embed_image(self, image: Tensor) -> Features:
        """Images [B,3,S,S] -> `z` [B,E], and the same as `feats`."""
        open_clip = hasattr(self.network, "encode_image")
        find = self.network.encode_image if open_clip else self.network.get_image_features
        z = pooled(find(image))
        return {"feats": z, "z": z}

    def embed_text(self, text_ids: Tensor) -> Features:
        """Texts int64 [B,L], padded to the whole context -> `z` [B,E], and the same as `feats`."""
        open_clip = hasattr(self.network, "encode_text")
        find = self.network.encode_text if open_clip else self.network.get_text_features
        if self.pad_id is None:
            z = pooled(find(text_ids))
        else:
            z = pooled(find(text_ids, attention_mask=(text_ids != self.pad_id).long()))
        return {"feats": z, "z": z}

    def features(
        self, image: Tensor, text_ids: Tensor, image_local: Tensor | None = None
    ) -> Features:
        """`z_image`, `z_text` [B,E], scale and, of SigLIP, bias of the logits, 0-d. Local views are
        ignored."""
        texts = text_ids[:, 0] if text_ids.ndim == 3 else text_ids
        found = {
            "z_image": self.embed_image(image)["z"],
            "z_text": self.embed_text(texts)["z"],
            "logit_scale": self.scale(),
        }
        if self.is_siglip:
            found["logit_bias"] = self.network.logit_bias.reshape(()) * 1.0
        return found

    def example_batch(
        self, pairs: int, images: int, captions: int, tokens: int | None = None
    ) -> dict[str, Tensor]:
        """As the base's, with texts of the whole context."""
        return super().example_batch(pairs, images, captions, tokens or self.config.context_length)

    def free_of_decay(self) -> set[str]:
        """Names of the parameters without weight decay: vectors, scalars, embeddings, tables of
        positions, the probes of attention pooling, and what timm lists for its towers."""
        parts = ("embedding", "pos_embed", "cls_token", "probe", "latent", *POSITION_TABLES)
        found = without_decay(self)
        for name, parameter in self.named_parameters():
            of_patches = "patch_embed" in name  # a convolution
            if parameter.ndim < 2 or (any(part in name for part in parts) and not of_patches):
                found.add(name)
        return found

    @torch.no_grad()
    def clamp_scales(self) -> None:
        """Keep CLIP's scale within [1, 100], and ALIGN's temperature above 0. SigLIP's published
        scales are larger."""
        if self.is_align:
            self.network.temperature.clamp_(min=LOWEST_TEMPERATURE)
        elif not self.is_siglip and self.network.logit_scale.requires_grad:
            self.network.logit_scale.clamp_(0, math.log(100))


def prepare_align(network: nn.Module) -> None:
    """Set transformers' AlignModel up for training: batch norms keep 0.99 of their statistics, as
    TensorFlow counts momentum, where transformers would replace 0.99 of them; nothing reads the
    text encoder's pooler."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1 - network.config.vision_config.batch_norm_momentum
    network.text_model.pooler.requires_grad_(False)


def pooled(found) -> Tensor:
    """The embeddings; transformers returns them within an output since its version 5."""
    return getattr(found, "pooler_output", found)
