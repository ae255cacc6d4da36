"""Towers of dual encoders that timm and transformers define, with their published weights:
locked-image tuning (Zhai et al. 2022, LiT) begins with them.

`timm/NAME` has the weights that timm fetches, `timm/NAME:FILE` those of a file, `hf/FOLDER` (or a
name of the hub) those in the folder. A tower is built without weights, which `start_towers` loads
once, at the beginning of a training: checkpoints hold them afterwards.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor, nn

from base.errors import UserError, first_line
from base.files import did_you_mean

HEADS = ("classifier.", "head.", "fc.")  # of classification, in files of weights


class TimmTower(nn.Module):
    """A network of timm without its classifier: images [B,3,H,W] -> pooled features [B,C]."""

    def __init__(self, tower: str):
        super().__init__()
        import timm

        self.name, self.file = parse_tower(tower, "image_tower", "timm")
        if not timm.is_model(self.name.partition(".")[0]):
            hint = did_you_mean(self.name, timm.list_models())
            raise UserError(f"image_tower {tower}: timm has no model {self.name!r}{hint}")
        self.trunk = timm.create_model(self.name, num_classes=0)
        self.num_features = self.trunk.num_features

    def forward(self, image: Tensor) -> Tensor:
        return self.trunk(image)

    def load(self, read_weights: Callable[[Path], dict[str, Tensor]]) -> None:
        """Load the published weights, or those of the file. UserError."""
        if self.file:
            weights = read_weights(Path(self.file))
            weights = {k: v for k, v in weights.items() if not k.startswith(HEADS)}
            fetched = self.trunk.load_state_dict(weights, strict=False)
            faults = [*fetched.missing_keys, *fetched.unexpected_keys]
            if faults:
                raise UserError(
                    f"{self.file}: not the weights of timm's {self.name}; it differs in "
                    f"{', '.join(faults[:5])}"
                )
            return
        import timm

        try:
            trunk = timm.create_model(self.name, pretrained=True, num_classes=0)
        except Exception as error:  # of the hub, the network or the cache
            raise UserError(
                f"image_tower timm/{self.name}: its weights cannot be fetched ({first_line(error)}); "
                f"give their file: timm/{self.name}:FILE"
            ) from None
        self.trunk.load_state_dict(trunk.state_dict())


class HuggingFaceText(nn.Module):
    """A text encoder of transformers: token ids int64 [B,L] -> the mean over tokens, [B,C], as
    sentence encoders pool."""

    def __init__(self, tower: str):
        super().__init__()
        import transformers

        self.source, _ = parse_tower(tower, "text_tower", "hf")
        try:
            config = transformers.AutoConfig.from_pretrained(self.source)
            self.trunk = transformers.AutoModel.from_config(config)
        except Exception as error:  # of the hub, the network or the folder
            raise UserError(
                f"text_tower {tower}: cannot be opened ({first_line(error)}); name a folder with "
                "config.json, tokenizer and weights"
            ) from None
        if getattr(self.trunk, "pooler", None) is not None:
            self.trunk.pooler = None  # its output is not used, and would get no gradient
        self.num_features = config.hidden_size
        self.pad_id = config.pad_token_id or 0

    def forward(self, text_ids: Tensor) -> Tensor:
        mask = text_ids != self.pad_id
        states = self.trunk(input_ids=text_ids, attention_mask=mask.long()).last_hidden_state
        weight = mask[..., None].to(states.dtype)
        return (states * weight).sum(1) / weight.sum(1).clamp(min=1)

    def load(self, read_weights: Callable[[Path], dict[str, Tensor]]) -> None:
        """Load the weights beside the configuration. UserError."""
        import transformers

        try:
            trunk = transformers.AutoModel.from_pretrained(self.source)
        except Exception as error:
            raise UserError(f"hf/{self.source}: no weights ({first_line(error)})") from None
        state = trunk.state_dict()
        known = self.trunk.state_dict().keys()
        self.trunk.load_state_dict({name: state[name] for name in known})


def parse_tower(tower: str, knob: str, library: str) -> tuple[str, str]:
    """(name, file) of `LIBRARY/NAME:FILE`. UserError for another library."""
    found, slash, rest = tower.partition("/")
    if found != library or not slash or not rest:
        raise UserError(f"{knob} {tower}: write {library}/NAME")
    if library == "hf":
        return rest, ""
    name, _, file = rest.partition(":")
    return name, file


def start_towers(
    model: nn.Module, read_weights: Callable, lock: Sequence[str], load: bool = True
) -> None:
    """Load the weights of a dual encoder's library towers, and lock towers: `image`, `text`.

    A locked tower is not trained and stays in evaluation mode, its batch norms included.
    read_weights: reads a file of weights safely. load: false where a checkpoint has the weights.
    """
    towers = {"image": getattr(model, "visual", None), "text": getattr(model, "text_tower", None)}
    for tower in towers.values():
        if load and isinstance(tower, TimmTower | HuggingFaceText):
            tower.load(read_weights)
    for name in lock:
        if not isinstance(towers[name], TimmTower | HuggingFaceText):
            raise UserError(f"--lock {name}: give the {name} tower weights to keep: --{name}-tower")
        towers[name].requires_grad_(False)
    if lock:
        model.locked = tuple(towers[name] for name in lock)
