"""Under bf16 autocast the losses are those of float32 features, and so are the scores that
evaluations rank by: no logit is rounded to bfloat16."""

import pytest
import torch

from base.distributed import World
from evaluation.retrieval import nearest
from evaluation.zeroshot import class_scores
from main import total_loss
from models.classification.classifier import ClassifierConfig, VisionClassifier
from models.dual_encoder.config import DualConfig
from models.dual_encoder.factory import build_dual
from models.fusion.retrieval import Retrieval, RetrievalConfig
from models.fusion.ve_nlvr import StatementConfig, StatementModel
from models.fusion.vqa import Vqa, VqaConfig
from models.recognition.decoding import Choice, one_shot, write_labels
from tests.helpers.tiny_nxtp import network
from tests.helpers.tiny_simla import tiny_batch, tiny_config

METHODS = {
    "clip": "CLIP_VITT8_CLIP",
    "siglip": "CLIP_VITT8_SIGLIP",
    "align": "ALIGN_NANO_TINY",
    "cl2l": "CL2L_VITT8_CL2L",
    "barlip": "CL2L_VITT8_BARLIP",
    "siamlip": "CL2L_VITT8_SIAMLIP",
    "swalip": "CL2L_VITT8_SWALIP",
    "slip": "SLIP_VITT8",
}


def features() -> dict[str, torch.Tensor]:
    """Features of every method for 32 pairs, partners alike, at CLIP's temperature of 0.01."""
    torch.manual_seed(0)
    base = torch.nn.functional.normalize(torch.randn(32, 64), dim=-1)

    def near(*views: int) -> torch.Tensor:
        shape = base[:, None].expand(-1, *views, -1) if views else base
        return (shape + 0.1 * torch.randn(shape.shape)).requires_grad_()

    out = {
        name: near()
        for name in ("z_image", "z_text", "z_image_global", "z_text_global", "v_image", "v_text")
    }
    out |= {
        name: near()
        for name in ("image_embed", "text_embed", "aug1_embed", "aug2_embed", "p_image", "p_text")
    }
    out |= {f"{kind}_{side}_local": near(2) for kind in "hvp" for side in ("image", "text")}
    scale = torch.tensor(100.0)
    return out | {
        "logit_scale": scale,
        "h_logit_scale": scale,
        "logit_bias": -scale / 10,
        "temperature": 1 / scale,
    }


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tile", [None, 16])
def test_losses_in_float32(method, tile):
    config = DualConfig(model=METHODS[method], tile=tile, label_smoothing=0.0)
    with torch.device("meta"):
        model = build_dual(config)
    results = []
    for autocast in (False, True):
        out = features()
        model.features = lambda out=out: out
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = total_loss(model(), config)
        loss.backward()
        grads = {name: x.grad for name, x in out.items() if x.grad is not None}
        results.append((loss, grads))
    (plain, gradients), (cast, cast_gradients) = results
    assert cast.dtype == torch.float32
    assert torch.equal(plain, cast)
    assert gradients.keys() == cast_gradients.keys() and gradients
    for name, gradient in gradients.items():
        assert torch.equal(gradient, cast_gradients[name]), name


@pytest.mark.parametrize("method", METHODS)
def test_features_of_bfloat16_give_losses_in_float32(method):
    """What towers return under autocast is widened before anything is computed of it."""
    config = DualConfig(model=METHODS[method], label_smoothing=0.0)
    with torch.device("meta"):
        model = build_dual(config)
    rounded = {name: x.detach().bfloat16() for name, x in features().items()}
    model.features = lambda: rounded
    with torch.autocast("cpu", torch.bfloat16):
        loss = total_loss(model(), config)
    exact = model.losses({name: x.float() for name, x in rounded.items()})
    assert torch.equal(loss, total_loss(exact, config))


def test_similarities_in_float32():
    """Rounded, those of 500 keys to a query take a dozen values."""
    rows = torch.nn.functional.normalize(torch.randn(500, 32) + 1, dim=-1)
    alone = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    found = []
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            classes = class_scores({"z": rows, "h": rows}, {"z": rows, "h": rows.flip(1)})
            ranking = nearest(rows, rows, 10, alone)
        found.append([*classes.values(), ranking.candidates, ranking.scores])
    assert all(map(torch.equal, *found))


def test_matching_scores_in_float32():
    """The head's logits have the states' own differences, however near these are."""
    config = tiny_config()
    model = Retrieval(RetrievalConfig(config.vit, config.bert, embed_dim=8, queue_size=4)).eval()
    batch = tiny_batch()
    ids = batch["text_ids"][:1].expand(9, -1)
    mask = batch["text_mask"][:1].expand(9, -1)
    near = batch["image"][:1] + 1e-3 * torch.randn(9, *batch["image"].shape[1:])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        tokens, _ = model.encode_image(near)
        scores = model.match_scores(ids, mask, tokens, None)
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, scores.bfloat16().float())


def question_answering() -> tuple[torch.nn.Module, list, list]:
    config = tiny_config()
    model = Vqa(VqaConfig(config.vit, config.bert, decoder_layers=1, distill=False))
    given = [tiny_batch()[name] for name in ("image", "text_ids", "text_mask")]
    answers = torch.tensor([[2, 5, 6, 3], [2, 7, 8, 3], [2, 9, 3, 0]])
    taught = [answers, answers > 0, torch.ones(3), torch.tensor([0, 1, 2]), 0.0]
    ranked = model.rank_answers, *given, answers, torch.tensor([4, 4, 3]), 3
    head = model.text_decoder.cls["predictions"].decoder
    return head, [ranked], [model, *given, *taught]


def entailment() -> tuple[torch.nn.Module, list, list]:
    config = tiny_config()
    model = StatementModel(StatementConfig(config.vit, config.bert, distill=False))
    given = [tiny_batch()[name] for name in ("image", "text_ids", "text_mask")]
    label = torch.tensor([0, 1, 2, 0])
    return model.cls_head[2], [[model.logits, *given]], [model, *given, label, 0.0]


def classification() -> tuple[torch.nn.Module, list, list]:
    config = ClassifierConfig(model="vit-mu/8", image_size=32, num_classes=10)
    model = VisionClassifier(config)
    torch.nn.init.normal_(model.head.weight)
    image = torch.randn(4, 3, 32, 32)
    labels = torch.zeros(4, 1, dtype=torch.int64)
    return model.head, [[model.logits, image]], [model, image, labels, torch.ones(4, 1)]


def recognition() -> tuple[torch.nn.Module, list, list]:
    model = network()
    image = torch.randn(2, 3, 32, 32)
    ids = torch.randint(40, (2, 6))
    segments = torch.zeros_like(ids)
    prompt = torch.tensor([30, 1, 5])
    decoded = [
        [one_shot, model, model.encode_image(image), prompt, 9, 4, 5],
        [write_labels, model, model.encode_image(image), prompt, 9, 5, Choice("greedy")],
    ]
    taught = [image, ids, segments, torch.tensor([1, 2, 8]), torch.tensor([3, 4, 5])]
    return model.language_decoder.output, decoded, [model, *taught]


@pytest.mark.parametrize("task", [question_answering, entailment, classification, recognition])
def test_heads_that_evaluations_compare_are_in_float32(task):
    """Under bf16 autocast; in training they are in bfloat16."""
    torch.manual_seed(0)
    head, compared, taught = task()
    seen = []
    head.register_forward_hook(lambda module, given, found: seen.append((*given, found)))
    for function, *given in compared:
        seen.clear()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            function(*given)
        assert seen
        for states, logits in seen:
            assert logits.dtype == torch.float32
            expected = torch.nn.functional.linear(states.float(), head.weight, head.bias)
            assert torch.equal(logits, expected)
    seen.clear()
    model, *batch = taught
    with torch.autocast("cpu", torch.bfloat16):
        model.train()(*batch)
    assert {logits.dtype for _, logits in seen} == {torch.bfloat16}
