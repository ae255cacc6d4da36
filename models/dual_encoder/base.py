"""What all dual encoders share: the forward pass, the contrastive losses, weight decay groups.

    model = build_dual(DualConfig(model="CL2L_R50_CL2L", separate_proj=True))
    losses = model(image=..., image_local=..., text_ids=...)  # named, 0-d; main.py weighs them

Batch (B pairs, A local views, L tokens): `image` float32 [B,3,H,W]; `text_ids` int64 [B,L], or
[B,1+A,L] whose first row is the global caption; `image_local` float32 [B,A,3,h,w] (CL2L family;
absent for A = 0); SLIP takes its two augmentations as `image_local` [B,2,3,H,W].

`features(**batch)` returns what the original models return, sample axis first, views second;
`losses(features)` reads nothing but those features, so cached features serve as well
(`models.dual_encoder.grad_cache`). For evaluation, `embed_image` and `embed_text` return `feats`,
`z` and, where the model has them, `h` embeddings, not normalised.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from base.distributed import gather, gather_with_gradient, rank, world_size
from base.libraries import POSITION_TABLES, without_decay
from models.dual_encoder.config import DualConfig
from models.dual_encoder.losses import Views, clip_loss, normalize, sigmoid_loss

Features = dict[str, Tensor]


class DualEncoder(nn.Module):
    """Base of all dual encoders; a subclass has `features`, `embed_image`, `embed_text`, and `losses`
    other than CLIP's and SigLIP's.

    `momentum_model`, where main.py has set one, is the momentum teacher (BYOLIP).
    """

    config: DualConfig
    is_siglip: bool = False  # the loss is SigLIP's
    label_smoothing: float = 0.0  # of CLIP's
    of_library: ClassVar[bool] = False  # both towers are: `load` reads their published weights
    towers: ClassVar = {  # tower -> how the names of its parameters begin
        "image": ("visual.", "vision_model."),
        "text": (
            "text_tower.",
            "text_model.",
            "transformer.",
            "token_embedding.",
            "positional_embedding",
            "ln_final.",
        ),
    }

    def forward(
        self,
        features_only: bool = False,
        feature_grads: Features | None = None,
        **batch: Tensor,
    ) -> Features:
        """Named losses of a batch, 0-d each; main.py minimises their weighted sum (`total_loss`).

        The two other modes are those of gradient caching (`grad_cache.py`), which must pass through
        the wrapped module, too. features_only: return the features. feature_grads: return
        `surrogate` = sum of <feature, its given gradient>, whose backward pass continues that of
        the cached features.
        """
        if features_only:
            return self.features(**batch)
        if feature_grads is not None:
            features = self.features(**batch)
            terms = [
                (features[k].float() * grad.float()).sum() for k, grad in feature_grads.items()
            ]
            return {"surrogate": sum(terms)}
        targets = self.teacher_features(**batch)
        features = self.features(**batch)
        with torch.autocast(next(iter(features.values())).device.type, enabled=False):
            return self.losses(in_float32(features), in_float32(targets))

    def features(self, **batch: Tensor) -> Features:
        """The features the losses are made of, by name; sample axis first, views second."""
        raise NotImplementedError

    def losses(self, features: Features, targets: Features | None = None) -> Features:
        """CLIP's `clip_loss`, the mean of both directions, and `clip_acc`, the top-1 accuracy of the
        images in percent, 0-d each; SigLIP's `siglip_loss`, whose logits have a bias.

        features: `z_image`, `z_text` [b,E], `logit_scale` and, of SigLIP, `logit_bias`, 0-d.
        targets: features of the momentum teacher.
        """
        if self.is_siglip:
            image = normalize(features["z_image"])
            loss = sigmoid_loss(
                image,
                self.gather(normalize(features["z_text"])),
                features["logit_scale"],
                features["logit_bias"],
                first=rank() * len(image),
                tile=self.options.tile,
            )
            return {"siglip_loss": loss}
        found = clip_loss(
            self.single_views(features["z_image"], features["z_text"]),
            features["logit_scale"],
            label_smoothing=self.label_smoothing,
            tile=self.options.tile,
        )
        return {"clip_loss": found.loss, "clip_acc": found.acc_image}

    @torch.no_grad()
    def teacher_features(self, **batch: Tensor) -> Features | None:
        """What the momentum teacher makes of the batch; None where there is no teacher."""
        teacher = getattr(self, "momentum_model", None)
        return None if teacher is None else teacher.features(**batch)

    def fixed_features(self) -> list[str]:
        """Names of features that locked towers make and that `features` takes back."""
        return []

    @property
    def options(self) -> DualConfig:
        """Options of the loss; OpenAICLIP's `config` is its geometry alone."""
        return self.config

    def gather(self, features: Tensor) -> Tensor:
        """Features [b,...] of this rank -> [N,...] of all ranks in rank order, for the contrastive
        losses.
        """
        if world_size() == 1 or self.options.gather_passes_gradient:
            return gather_with_gradient(features)
        return gather(features)

    def single_views(self, image: Tensor, text: Tensor) -> Views:
        """This rank's embeddings [b,E] of images and texts, of any length, as one view each, and
        those of all ranks; one collective."""
        image = normalize(image)[:, None]
        text = normalize(text)[:, None]
        all_image, all_text = image, text
        if world_size() > 1:
            all_image, all_text = self.gather(torch.stack([image, text], 1)).unbind(1)
        return Views(image, text, all_image, all_text, first=rank() * len(image))

    def example_batch(
        self, pairs: int, images: int, captions: int, tokens: int = 32
    ) -> dict[str, Tensor]:
        """A batch with so many local images and captions, without data (meta device), to count
        FLOPs with.
        """
        image = torch.zeros(pairs, 3, self.config.image_size, self.config.image_size, device="meta")
        length = min(tokens, self.config.context_length)
        ids = torch.zeros(pairs, 1 + captions, length, dtype=torch.int64, device="meta")
        batch = {"image": image, "text_ids": ids if captions else ids[:, 0]}
        if images:
            batch["image_local"] = image[:, None].expand(-1, images, -1, -1, -1)
        return batch

    def after_update(self) -> None:
        """What follows every optimizer step, on all ranks."""
        self.clamp_scales()


def in_float32(features: Features | None) -> Features | None:
    """The features without the rounding of autocast (float64 stays).

    Losses are computed in float32: logits rounded to bfloat16 change their gradients by 8 % at
    temperature 0.01.
    """
    if features is None:
        return None
    exact = {}
    for name, value in features.items():
        exact[name] = value.to(torch.promote_types(value.dtype, torch.float32))
    return exact


# in checkpoints, but not of the network: the teacher, and what only transformers' AlignModel holds
NOT_LOADED = ("momentum_model.*", "text_model.pooler.*")


def names_by_decay(model: nn.Module, original: bool = False) -> tuple[list[str], list[str]]:
    """Trainable parameters with and without weight decay, each in module order.

    Without: vectors and scalars, embedding tables, position embeddings, the class token, and what
    timm lists for its towers. `original` follows clip-rocket: without are vectors, scalars and
    whatever has `bias`, `ln` or `bn` in its name; embeddings decay. ALIGN: without are the
    parameters of batch norms alone.
    """
    substrings = ("positional_embedding", "cls_token", "pos_embed", *POSITION_TABLES)
    listed = without_decay(model) | embedding_tables(model)
    if original:
        substrings = ("bias", "ln", "bn")
        listed = set()
    free_names = model.free_of_decay() if hasattr(model, "free_of_decay") else None
    decay = []
    no_decay = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if free_names is not None:
            free = name in free_names
        else:
            free = parameter.ndim < 2 or any(part in name for part in substrings) or name in listed
        (no_decay if free else decay).append(name)
    return decay, no_decay


def embedding_tables(model: nn.Module) -> set[str]:
    """Names of the tables of tokens and positions, whatever a library's text tower calls them."""
    tables = [name for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
    return {f"{name}.weight" for name in tables}
