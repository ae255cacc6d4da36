"""Checkpoint conversions: renames on small hand-made states, and loading that is never silently
partial."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from base.errors import UnfitWeights, UserError
from models.layers.vit import ViT, ViTConfig
from models.layers.xbert import BertConfig, XBert, XBertLM
from models.weights import albef as adapters
from models.weights.albef import adapt, bert_weights, checkpoint_kind, load_bert, start_from
from models.weights.any_dual_encoder import logit_scale
from models.weights.loading import load_checkpoint

BERT = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16,
            "max_position_embeddings": 10, "encoder_width": 8}  # fmt: skip


def vit(size: int = 8, mask_token: bool = False) -> ViT:
    return ViT(
        ViTConfig(image_size=size, patch_size=4, width=8, depth=1, heads=2, mask_token=mask_token)
    )


class Pretrain(nn.Module):
    """Keys of a SIMLA pre-training model, small."""

    def __init__(self, queue: int = 6):
        super().__init__()
        self.temp = nn.Parameter(torch.tensor(0.07))
        self.register_buffer("image_queue", torch.randn(4, queue))
        self.register_buffer("queue_ptr", torch.ones(1, dtype=torch.int64))
        for suffix in ("", "_m"):
            setattr(self, f"visual_encoder{suffix}", vit(mask_token=True))
            setattr(self, f"text_encoder{suffix}", XBertLM(BertConfig(**BERT)))
            setattr(self, f"vision_proj{suffix}", nn.Linear(8, 4))
            setattr(self, f"mim_head{suffix}", nn.Linear(8, 5))
        self.itm_head = nn.Linear(8, 2)


class Retrieval(nn.Module):
    """Keys of a retrieval model at another resolution, with or without momentum copies."""

    def __init__(self, size: int = 16, queue: int = 6, momentum: bool = True):
        super().__init__()
        self.temp = nn.Parameter(torch.tensor(0.05))
        self.register_buffer("image_queue", torch.zeros(4, queue))
        self.register_buffer("idx_queue", torch.full((1, queue), -100))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.int64))
        for suffix in ("", "_m") if momentum else ("",):
            setattr(self, f"visual_encoder{suffix}", vit(size))
            setattr(self, f"text_encoder{suffix}", XBert(BertConfig(**BERT)))
            setattr(self, f"vision_proj{suffix}", nn.Linear(8, 4))
        self.itm_head = nn.Linear(8, 2)


class Nlvr(nn.Module):
    """Three layers of which the last two come from one."""

    def __init__(self, head: str, momentum: bool):
        super().__init__()
        for suffix in ("", "_m") if momentum else ("",):
            setattr(self, f"visual_encoder{suffix}", vit(16))
            setattr(
                self, f"text_encoder{suffix}", XBert(BertConfig(**BERT | {"num_hidden_layers": 3}))
            )
            if head == "cls_head":
                setattr(
                    self,
                    f"cls_head{suffix}",
                    nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)),
                )
        if head == "ta_head":
            self.ta_head, self.vision_proj, self.temp = (
                nn.Linear(8, 3),
                nn.Linear(8, 4),
                nn.Parameter(torch.ones(())),
            )


class Vqa(nn.Module):
    def __init__(self):
        super().__init__()
        for suffix in ("", "_m"):
            setattr(self, f"visual_encoder{suffix}", vit(16))
            setattr(self, f"text_encoder{suffix}", XBert(BertConfig(**BERT)))
            setattr(
                self,
                f"text_decoder{suffix}",
                XBertLM(BertConfig(**BERT | {"num_hidden_layers": 1})),
            )


def test_pretrained_weights_reach_the_retrieval_model():
    source, target = Pretrain(), Retrieval()
    left_out = start_from(target, source.state_dict(), "retrieval")
    for suffix in ("", "_m"):
        new, old = (
            getattr(target, f"text_encoder{suffix}"),
            getattr(source, f"text_encoder{suffix}").bert,
        )
        assert all(
            torch.equal(new.state_dict()[key], value) for key, value in old.state_dict().items()
        )
    assert target.visual_encoder.pos_embed.shape == (1, 17, 8)
    assert torch.equal(target.visual_encoder.pos_embed[:, 0], source.visual_encoder.pos_embed[:, 0])
    assert torch.equal(target.image_queue, source.image_queue) and target.queue_ptr.item() == 1
    assert left_out.missing == ["idx_queue"] and "mim_head.weight" in left_out.unexpected


def test_a_file_of_zeros_has_no_temperature():
    zeros = {name: torch.zeros_like(value) for name, value in Pretrain().state_dict().items()}
    with pytest.raises(UnfitWeights, match=r"temp, the temperature, is 0\.0"):
        start_from(Retrieval(), zeros, "retrieval")
    align = SimpleNamespace(temperature=torch.tensor(0.0))
    with pytest.raises(UnfitWeights, match=r"temperature, the temperature, is 0\.0"):
        logit_scale(align)


def test_queues_of_another_size_start_anew_together():
    source, target = Pretrain(queue=12), Retrieval(queue=6)
    start_from(target, source.state_dict(), "retrieval")
    assert target.queue_ptr.item() == 0 and not target.image_queue.any()


def test_models_and_files_without_momentum_copies():
    start_from(Retrieval(momentum=False), Pretrain().state_dict(), "retrieval")
    bare = Retrieval(momentum=False).state_dict()  # as ALBEF's published refcoco.pth
    target = Retrieval()
    start_from(target, bare, "retrieval")
    assert torch.equal(target.text_encoder_m.embeddings.word_embeddings.weight,
                       bare["text_encoder.embeddings.word_embeddings.weight"])  # fmt: skip


def test_vqa_decoder_takes_the_last_layers():
    source, target = Pretrain(), Vqa()
    start_from(target, source.state_dict(), "vqa")
    for suffix in ("", "_m"):
        decoder, encoder = (
            getattr(target, f"text_decoder{suffix}"),
            getattr(source, f"text_encoder{suffix}"),
        )
        assert torch.equal(
            decoder.bert.layers[0].output.dense.weight, encoder.bert.layers[1].output.dense.weight
        )
        assert torch.equal(decoder.cls["predictions"].bias, encoder.cls["predictions"].bias)
    fine_tuned = {key: value + 1 for key, value in target.state_dict().items()}
    again = Vqa()
    start_from(again, fine_tuned, "vqa")  # its own kind: nothing is renamed
    assert all(torch.equal(again.state_dict()[key], value) for key, value in fine_tuned.items())


def test_text_assignment_then_nlvr():
    source, assigned, final = (
        Pretrain(),
        Nlvr("ta_head", momentum=False),
        Nlvr("cls_head", momentum=True),
    )
    start_from(assigned, source.state_dict(), "text_assignment")
    layers = [layer.output.dense.weight for layer in assigned.text_encoder.layers]
    old = [layer.output.dense.weight for layer in source.text_encoder.bert.layers]
    assert all(torch.equal(new, old[index]) for new, index in zip(layers, (0, 1, 1), strict=True))

    start_from(final, assigned.state_dict(), "nlvr")
    online, teacher = final.text_encoder.state_dict(), final.text_encoder_m.state_dict()
    assert all(torch.equal(teacher[key], online[key]) for key in online)
    untouched = Nlvr("cls_head", momentum=True)
    initial = {key: value.clone() for key, value in untouched.text_encoder_m.state_dict().items()}
    start_from(untouched, assigned.state_dict(), "nlvr", fill_momentum=False)
    assert all(
        torch.equal(untouched.text_encoder_m.state_dict()[key], initial[key]) for key in initial
    )


def test_kinds_and_what_a_task_cannot_start_from():
    states = {
        "pretrain": Pretrain(),
        "retrieval": Retrieval(),
        "vqa": Vqa(),
        "nlvr": Nlvr("cls_head", True),
        "text_assignment": Nlvr("ta_head", False),
        "vit": vit(),
        "bert": XBertLM(BertConfig(**BERT)),
    }
    for kind, model in states.items():
        assert checkpoint_kind(model.state_dict()) == kind
    with pytest.raises(
        UserError,
        match="this is a nlvr checkpoint, and retrieval starts from retrieval or pretrain; give",
    ):
        adapt(states["nlvr"].state_dict(), Retrieval().state_dict(), "retrieval")
    with pytest.raises(
        UserError, match=r"run NLVR\.py --config configs/NLVR/assignment\.yaml with it"
    ):
        adapt(states["pretrain"].state_dict(), states["nlvr"].state_dict(), "nlvr")
    with pytest.raises(UserError, match="no known kind"):
        checkpoint_kind({"weight": torch.ones(1)})


def test_every_difference_is_listed_and_nothing_is_loaded():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = {
        "0.weight": torch.ones(2, 2),
        "1.weight": torch.ones(4, 2),
        "1.bias": torch.ones(3),
        "extra": torch.ones(1),
    }
    with pytest.raises(UserError) as error:
        load_checkpoint(model, state)
    text = str(error.value)
    assert (
        "missing: 0.bias" in text
        and "unexpected: extra" in text
        and "1.weight [4, 2] instead of [3, 2]" in text
    )
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    found = load_checkpoint(
        model, state, allowed_missing=("0.b*", "1.weight"), allowed_unexpected=("ext*",)
    )
    assert (
        found.missing == ["0.bias"]
        and found.unexpected == ["extra"]
        and found.mismatched[0][0] == "1.weight"
    )
    assert torch.equal(model[1].bias, torch.ones(3)) and torch.equal(
        model[1].weight, before["1.weight"]
    )
    assert found.note() == (  # of a start that is as it should be: in a line
        "1 only in the file, not used here: extra; 1 only in the network, new: 0.bias; "
        "1 of another shape, new: 1.weight [4, 2] instead of [3, 2]"
    )
    assert load_checkpoint(model, model.state_dict()).note() == "fits as it is"


def test_long_lists_are_cut():
    with pytest.raises(UserError, match=r"12 unexpected: k0, .*, k7, …"):
        load_checkpoint(nn.Identity(), {f"k{i}": torch.ones(1) for i in range(12)})


def hf_bert(old_names: bool, prefix: str) -> dict[str, torch.Tensor]:
    """A transformers BERT with pooler, token types and next-sentence head; tied decoder left
    out."""
    from transformers import BertConfig as HfConfig
    from transformers import BertForPreTraining

    sizes = {key: value for key, value in BERT.items() if key != "encoder_width"}
    state = BertForPreTraining(HfConfig(**sizes)).state_dict()
    state = {k: v for k, v in state.items() if not k.startswith("cls.predictions.decoder")}
    if old_names:
        state = {k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
                 for k, v in state.items()}  # fmt: skip
    return {
        k.replace("bert.", prefix, 1) if k.startswith("bert.") else k: v for k, v in state.items()
    }


@pytest.mark.parametrize("old_names", [False, True])
@pytest.mark.parametrize("prefix", ["bert.", ""])
def test_bert_in_every_spelling(old_names, prefix, capsys):
    state = hf_bert(old_names, prefix)
    words = state[f"{prefix}embeddings.word_embeddings.weight"]
    lm = XBertLM(BertConfig(**BERT))
    found = load_bert(lm, state)
    assert not capsys.readouterr().out  # no layer stays random
    assert torch.equal(lm.cls["predictions"].decoder.weight, words)
    assert torch.equal(lm.cls["predictions"].bias, state["cls.predictions.bias"])
    assert all("crossattention" in key or "position_ids" in key for key in found.missing)
    assert found.unexpected == ["bert.embeddings.token_type_embeddings.weight"]
    two_stage = XBert(
        BertConfig(**BERT | {"num_hidden_layers": 3, "single_stream": False, "fusion_layer": 1})
    )
    found = load_bert(two_stage, state)
    assert capsys.readouterr().out.endswith("2 layers, bert_config 3: random at first: 2\n")
    assert not found.unexpected and torch.equal(two_stage.embeddings.word_embeddings.weight, words)
    with pytest.raises(UserError, match=r"layer_norm_eps is 1e-05, .* set it in bert_config"):
        load_bert(two_stage, state, {"layer_norm_eps": 1e-5})
    with pytest.raises(UserError, match="a xlm-roberta, which counts positions from behind"):
        load_bert(two_stage, state, {"model_type": "xlm-roberta"})
    last = state[f"{prefix}encoder.layer.1.output.dense.weight"]
    assert torch.equal(two_stage.layers[1].output.dense.weight, last)
    state.pop(f"{prefix}encoder.layer.1.output.dense.weight")
    with pytest.raises(UserError, match=r"1 missing: bert.encoder.layer.1.output.dense.weight"):
        load_bert(lm, state)


def test_layers_of_other_names_are_no_berts():
    """DistilBERT's: without them every layer would stay random."""
    state = hf_bert(False, "")
    distilled = {k.replace("encoder.layer", "transformer.layer"): v for k, v in state.items()}
    with pytest.raises(UserError, match="no word embeddings and layers"):
        load_bert(XBert(BertConfig(**BERT)), distilled)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_bert_folder(tmp_path, form):
    state = {key: value.contiguous() for key, value in hf_bert(False, "bert.").items()}
    (tmp_path / "config.json").write_text(json.dumps(BERT))
    if form == "safetensors":
        from safetensors.torch import save_file

        save_file(state, tmp_path / "model.safetensors")
    else:
        torch.save(state, tmp_path / "pytorch_model.bin")
    read, config = adapters.load_bert_folder(tmp_path)
    assert read.keys() == state.keys() and config["vocab_size"] == 20


def test_bert_that_is_not_there(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"needs config.json and model.safetensors"):
        adapters.load_bert_folder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x")
    for path in (tmp_path / "model.safetensors", tmp_path / "gone", "./gone"):
        with pytest.raises(UserError, match=r"no folder; give the one of a BERT"):
            adapters.load_bert_folder(path)  # not a name of the hub
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="hf download no-such-bert-here"):
        adapters.load_bert_folder("no-such-bert-here")
    with pytest.raises(UserError, match="not the weights of a BERT"):
        bert_weights(vit().state_dict(), head=True)


def test_deit_weights():
    source = vit(8).state_dict()
    state = source | {"head.weight": torch.ones(3, 8), "head.bias": torch.ones(3)}
    target = vit(16, mask_token=True)
    found = load_checkpoint(
        target, adapters.deit_weights(state, grid=4), allowed_missing=("mask_token",)
    )
    assert found.missing == ["mask_token"] and target.pos_embed.shape == (1, 17, 8)
    with pytest.raises(UserError, match="distilled"):
        adapters.deit_weights(state | {"dist_token": torch.ones(1)}, grid=4)


@pytest.mark.parametrize("part", ["encoder", "decoder.bert"])  # captioning has no encoder
def test_blip_is_named(part):
    with pytest.raises(UserError, match=r"a checkpoint of BLIP-2, whose querying transformer"):
        checkpoint_kind({"Qformer.bert.embeddings.word_embeddings.weight": torch.zeros(30523, 1)})
    table = torch.zeros(30524, 1)
    with pytest.raises(UserError, match=r"a checkpoint of BLIP, .* eval_zeroshot\.py --model hf/"):
        checkpoint_kind({f"text_{part}.embeddings.word_embeddings.weight": table})
