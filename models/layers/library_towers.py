"""Towers of dual encoders that timm and transformers define, with their published weights:
locked-image tuning (Zhai et al. 2022, LiT) begins with them.

`timm/NAME` has the weights that timm fetches, `timm/NAME:FILE` those of a file, `hf/FOLDER` (or a
name of the hub) those in the folder. A tower is built without weights, which `start_towers` loads
once, at the beginning of a training: checkpoints hold them afterwards.

An image tower with its classifier gives class probabilities beside its features. The projections
then start as the convex combination of the class names' embeddings (Norouzi et al. 2014, ConSE): an
image-text model before the first pair.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from base.errors import UserError
from base.hub import from_hub
from base.libraries import hugging_face_config, hugging_face_tokenizer, timm_network
from base.names import did_you_mean
from base.reading import read_json, read_lines

HEADS = ("classifier.", "head.", "fc.")  # of classification, in files of weights
OPEN_CLIP_TRUNK = "visual.trunk."  # where open_clip's files hold a tower of timm
OF_OPENAI = "input_resolution"  # an entry of OpenAI's own files
LOCKED = {  # tower -> its modules, in any dual encoder
    "image": ("visual", "vision_model"),
    "text": ("text_tower", "text_model", "text", "transformer", "ln_final"),
}
PROMPT = "a photo of a {}."  # for the names of an image tower's classes


class TimmTower(nn.Module):
    """A network of timm without its classifier: images [B,3,H,W] -> pooled features [B,C].

    classes: with its classifier of K classes: unit features and class probabilities, [B,C+K].
    """

    option = "image_tower"  # that names it, for messages

    def __init__(self, tower: str, classes: bool = False):
        super().__init__()
        self.name, self.file = parse_tower(tower, self.option, "timm")
        self.options = {} if classes else {"num_classes": 0}
        self.trunk = timm_network(self.name, f"{self.option} ", **self.options)
        self.num_classes = self.trunk.num_classes
        self.num_features = self.trunk.num_features + self.num_classes

    def forward(self, image: Tensor) -> Tensor:
        image = image.contiguous(memory_format=torch.channels_last)  # faster, on CPUs as well
        if not self.num_classes:
            return self.trunk(image)
        features = self.trunk.forward_head(self.trunk.forward_features(image), pre_logits=True)
        probabilities = self.trunk.get_classifier()(features).float().softmax(-1)
        return torch.cat([F.normalize(features, dim=-1), probabilities.to(features.dtype)], -1)

    def load(self, read_weights: Callable[[Path], dict[str, Tensor]]) -> None:
        """Load the published weights, or those of the file. UserError."""
        if self.file:
            weights = with_timm_names(self.trunk, read_weights(Path(self.file)), self.file)
            if not self.num_classes:
                weights = {k: v for k, v in weights.items() if not k.startswith(HEADS)}
            if faults := differences(self.trunk.state_dict(), weights):
                raise UserError(
                    f"{self.file}: not the weights of timm's {self.name}; it differs in "
                    f"{', '.join(faults[:5])}"
                )
            self.trunk.load_state_dict(weights)
            return
        remedy = f", its file as timm/{self.name}:FILE"
        trunk = timm_network(
            self.name, f"{self.option} ", pretrained=True, remedy=remedy, **self.options
        )
        self.trunk.load_state_dict(trunk.state_dict())


def with_timm_names(
    network: nn.Module, weights: Mapping[str, Tensor], file: str
) -> dict[str, Tensor]:
    """Weights of a file as timm's network names them: its own, or those of the image tower within a
    CLIP of OpenAI's or open_clip's layout. UserError where CLIP computed another activation."""
    from timm.layers import QuickGELU
    from timm.models import vision_transformer

    is_vit = isinstance(network, vision_transformer.VisionTransformer)
    quick = any(isinstance(module, QuickGELU) for module in network.modules())
    if OF_OPENAI in weights and is_vit and not quick:
        raise UserError(
            f"{file}: weights of OpenAI's CLIP, which computes QuickGELU; name the tower that does, "
            "such as timm/vit_base_patch16_clip_quickgelu_224"
        )
    trunk = {
        name.removeprefix(OPEN_CLIP_TRUNK): value
        for name, value in weights.items()
        if name.startswith(OPEN_CLIP_TRUNK)
    }
    weights = trunk or weights
    if is_vit:
        return vision_transformer.checkpoint_filter_fn(dict(weights), network)
    return dict(weights)


def differences(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> list[str]:
    """Names that only one of them has, or whose shapes differ."""
    return [
        name
        for name in {**own, **weights}
        if name not in own or name not in weights or own[name].shape != weights[name].shape
    ]


class TimmGrid(TimmTower):
    """The same network's last feature map: images [B,3,H,W] -> patches [B,N,C], row by row, without
    class and register tokens."""

    def forward(self, image: Tensor) -> Tensor:
        image = image.contiguous(memory_format=torch.channels_last)
        features = self.trunk.forward_features(image)
        if features.ndim == 4:
            if features.shape[-1] == self.trunk.num_features != features.shape[1]:
                features = features.permute(0, 3, 1, 2)  # Swin's, channels last
            return features.flatten(2).transpose(1, 2)
        return features[:, self.trunk.num_prefix_tokens :]


class LockedMaps(TimmTower):
    """The same network's last feature map: images [B,3,S,S] -> [B,C,S/reduction,S/reduction]. It is
    not trained, and its batch norms keep their statistics."""

    option = "vision_tower"

    def __init__(self, tower: str):
        super().__init__(tower)
        if not hasattr(self.trunk, "feature_info"):
            raise UserError(f"{tower}: has no feature maps; take a convolutional network")
        self.reduction = self.trunk.feature_info[-1]["reduction"]
        self.requires_grad_(False)

    def train(self, mode: bool = True) -> "LockedMaps":
        return super().train(False)

    def forward(self, image: Tensor) -> Tensor:
        features = self.trunk.forward_features(image.contiguous(memory_format=torch.channels_last))
        if features.ndim != 4 or features.shape[1] != self.num_features:
            raise UserError(
                f"timm/{self.name}: has no feature maps [B,C,H,W]; take a convolutional one"
            )
        return features


class HuggingFaceText(nn.Module):
    """A text encoder of transformers: token ids int64 [B,L] -> the mean over tokens, [B,C], as
    sentence encoders pool."""

    def __init__(self, tower: str):
        super().__init__()
        import transformers

        self.source, _ = parse_tower(tower, "text_tower", "hf")
        remedy = " (config.json, tokenizer, weights)"
        config = hugging_face_config(self.source, remedy, "text_tower ")
        if config.is_encoder_decoder or not hasattr(config, "vocab_size"):
            raise UserError(
                f"text_tower {tower}: a {config.model_type} is no text encoder; name one, such as "
                "hf/sentence-transformers/all-MiniLM-L6-v2"
            )
        with from_hub(f"text_tower {tower}"):
            self.trunk = transformers.AutoModel.from_config(config)
        if getattr(self.trunk, "pooler", None) is not None:
            self.trunk.pooler = None  # its output is not used, and would get no gradient
        self.num_features = config.hidden_size
        self.pad_id = config.pad_token_id or 0
        with suppress(UserError):  # a plan goes without a tokenizer, whose padding may be another
            self.pad_id = hugging_face_tokenizer(self.source).pad_token_id

    def forward(self, text_ids: Tensor) -> Tensor:
        mask = text_ids != self.pad_id
        states = self.trunk(input_ids=text_ids, attention_mask=mask.long()).last_hidden_state
        weight = mask[..., None].to(states.dtype)
        return (states * weight).sum(1) / weight.sum(1).clamp(min=1)

    @torch.no_grad()
    def embed(self, texts: Sequence[str], batch_size: int = 100) -> Tensor:
        """Unit features [T,C] of texts."""
        tokenizer = hugging_face_tokenizer(self.source)
        rows = []
        for start in range(0, len(texts), batch_size):
            batch = list(texts[start : start + batch_size])
            found = tokenizer(batch, padding=True, truncation=True, return_tensors="pt")
            rows.append(F.normalize(self(found["input_ids"]), dim=-1))
        return torch.cat(rows)

    def load(self, read_weights: Callable[[Path], dict[str, Tensor]]) -> None:
        """Load the weights beside the configuration. UserError."""
        import transformers

        with from_hub(f"the weights of hf/{self.source}", self.source):
            trunk = transformers.AutoModel.from_pretrained(self.source)
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
    if lock and not hasattr(model, "locked"):
        raise UserError("--lock is for two towers, as CLIP's and SLIP's; ALIGN trains both")
    if load:
        load_towers(model, read_weights, lock)
    if lock:
        lock_towers(model, lock)


def load_towers(model: nn.Module, read_weights: Callable, lock: Sequence[str]) -> None:
    """Load what libraries publish of the model. UserError where a tower to lock is not theirs."""
    if model.of_library:
        model.load()
        return
    towers = {"image": getattr(model, "visual", None), "text": getattr(model, "text_tower", None)}
    for name, tower in towers.items():
        if isinstance(tower, TimmTower | HuggingFaceText):
            tower.load(read_weights)
        elif name in lock:
            raise UserError(
                f"--lock {name}: give the {name} tower weights to keep: --{name}-tower, or --checkpoint"
            )
    if getattr(model.config, "tower_classes", None):
        start_from_names(model, class_names(model.config.tower_classes))


def lock_towers(model: nn.Module, lock: Sequence[str]) -> None:
    """Take the towers' parameters out of the training and keep their modules in evaluation mode.
    UserError where nothing would be left to train."""
    starts = tuple(start for tower in lock for start in model.towers[tower])
    for name, parameter in model.named_parameters():
        if name.startswith(starts):
            parameter.requires_grad_(False)
    if all(each.numel() == 1 for each in model.parameters() if each.requires_grad):
        raise UserError(
            f"--lock {' '.join(lock)}: nothing is left to train but the scale of the logits; leave a "
            "tower unlocked, or evaluate instead"
        )
    holder = model.network if model.of_library else model
    modules = [getattr(holder, part, None) for tower in lock for part in LOCKED[tower]]
    model.locked = tuple(module for module in modules if module is not None)


def class_names(file: str) -> list[str]:
    """The names of an image tower's classes: a text file with one a line, or `FILE.json:SET` of
    class names by data set. UserError."""
    path, _, data_set = file.rpartition(":")
    if not path.endswith(".json"):
        return read_lines(file)
    lists = read_json(path, dict)
    if data_set not in lists:
        hint = did_you_mean(data_set, lists)
        raise UserError(f"tower_classes: {path} has no names of {data_set!r}{hint}")
    return [name if isinstance(name, str) else name[0] for name in lists[data_set]]


@torch.no_grad()
def start_from_names(model: nn.Module, names: Sequence[str]) -> None:
    """Set both projections so that an image is the mean of its classes' names, weighted by their
    probabilities, in the space of the texts.

    What all names have in common, their mean direction u, is projected out: of texts by I - u u^T,
    of images with the names [K,C], which make the columns of the matrix. Features do not count yet.
    """
    visual, texts = model.visual, model.text_tower
    if visual.num_classes != len(names):
        raise UserError(
            f"tower_classes: {len(names)} names, but the image tower tells {visual.num_classes} "
            "classes apart; give the names of all of its classes in their order"
        )
    training = texts.training
    embedded = texts.eval().embed([PROMPT.format(name) for name in names])
    texts.train(training)
    common = F.normalize(embedded.mean(0), dim=0)
    remaining = torch.eye(len(common)) - torch.outer(common, common)
    model.text_projector.weight.copy_(remaining)
    model.image_projector.weight.zero_()
    model.image_projector.weight[:, -len(names) :] = (embedded @ remaining).T
