"""Small SIMLA and ALBEF models and batches for the tests."""

import torch

from models.fusion.losses import IGNORE
from models.fusion.simla import Simla, SimlaConfig
from models.layers.vit import ViTConfig
from models.layers.xbert import BertConfig

CLS = 2
SPECIAL = (0, 1, 2, 3, 4)  # [PAD] [UNK] [CLS] [SEP] [MASK]
VOCAB, CODES, PATCHES, LENGTH = 40, 12, 16, 8


def tiny_config(
    albef: bool = False, dropout: float = 0.0, layers: int = 3, depth: int = 2, **changes
) -> SimlaConfig:
    """Two-block image encoder, three-layer text encoder (single-stream, or two-stage with one text
    layer)."""
    bert = BertConfig(
        vocab_size=VOCAB,
        hidden_size=24,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=32,
        encoder_width=24,
        single_stream=not albef,
        fusion_layer=1 if albef else 0,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        initializer_range=0.3,
    )
    vit = ViTConfig(
        image_size=32, patch_size=8, width=24, depth=depth, heads=4, mask_token=not albef
    )
    sizes = {"embed_dim": 16, "queue_size": 6, "visual_vocab": CODES, "max_masked_patches": 7}
    losses = {
        "mim": not albef,
        "keywords": 0 if albef else 5,
        "special_ids": SPECIAL,
        "cls_id": CLS,
    }
    return SimlaConfig(**({"vit": vit, "bert": bert} | sizes | losses | changes))


def tiny_model(seed: int = 0, **options) -> Simla:
    """A model in training mode with spread-out weights."""
    torch.manual_seed(seed)
    model = Simla(tiny_config(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.train()


def tiny_batch(rows: int = 4, albef: bool = False, seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch with captions of different lengths, numbers of masked tokens and numbers of masked
    patches."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCAB, (rows, LENGTH), generator=generator)
    ids[:, 0] = CLS
    mask = torch.arange(LENGTH) < torch.tensor([LENGTH - i % 3 for i in range(rows)])[:, None]
    ids = ids.masked_fill(~mask, 0)
    chosen = torch.zeros_like(mask)
    for row in range(rows):
        chosen[row, 1 : 2 + row % 4] = True
    patch_mask = torch.zeros(rows, PATCHES, dtype=torch.bool)
    for row in range(rows):
        patch_mask[row, torch.randperm(PATCHES, generator=generator)[: 3 + row % 5]] = True
    batch = {
        "image": torch.randn(rows, 3, 32, 32, generator=generator),
        "text_ids": ids,
        "text_mask": mask,
        "mlm_ids": ids.masked_fill(chosen, 4),
        **positions_and_labels(ids, chosen),
        "alpha": torch.tensor(0.4),
    }
    if not albef:
        codes = torch.randint(0, CODES, (rows, PATCHES), generator=generator)
        batch |= {"patch_mask": patch_mask, "visual_codes": codes}
    return batch


def positions_and_labels(ids: torch.Tensor, chosen: torch.Tensor) -> dict[str, torch.Tensor]:
    """The masked positions as flat indices, padded to a multiple of 32."""
    positions = torch.nonzero(chosen.flatten()).squeeze(1)
    padding = -len(positions) % 32
    return {
        "mlm_positions": torch.cat([positions, torch.zeros(padding, dtype=torch.int64)]),
        "mlm_labels": torch.cat([ids.flatten()[positions], torch.full((padding,), IGNORE)]),
    }


def rows_of(batch: dict[str, torch.Tensor], start: int, stop: int) -> dict[str, torch.Tensor]:
    """The part of a batch with samples start..stop-1."""
    part = {
        k: v if v.ndim == 0 else v[start:stop] for k, v in batch.items() if not k.startswith("mlm_")
    }
    part["mlm_ids"] = batch["mlm_ids"][start:stop]
    chosen = part["mlm_ids"] != part["text_ids"]
    return part | positions_and_labels(part["text_ids"], chosen)
