"""NXTP's label decoding against the original's."""

import pytest
import torch

from models.recognition.decoding import (
    Choice,
    beam_search,
    one_shot,
    rank_labels,
    split_labels,
    top_k,
    top_p,
    write_labels,
)
from tests.golden import nxtp_cases as cases
from tests.golden.report import compare, record, same
from tests.helpers.golden import recorded

SHARES, SCORES = 1e-5, 2e-5  # scores are rounded to five digits


@pytest.fixture(scope="module")
def setting():
    """(network, tokenizer, image tokens, prompt) of the recorded runs."""
    model, tokenizer = cases.network(), cases.tokenizer()
    with torch.no_grad():
        images = model.encode_image(cases.tensors("encoder")["images"])
    prompt = torch.tensor(cases.sequences(cases.text_length()).start(cases.prompt()))
    return model, tokenizer, images, prompt


def same_shares(name: str, ours: list[float], theirs: list[float]) -> None:
    compare("nxtp decoding", name, ours, theirs, SHARES)


def same_labels(name: str, ranked: list[tuple[str, float]], labels: list, scores: list) -> None:
    same("nxtp decoding", f"{name}, labels", [text for text, _ in ranked], labels)
    for (_, ours), theirs in zip(ranked, scores, strict=True):
        error = abs(ours - theirs)
        record("nxtp decoding", f"{name}, scores", error)
        assert error < SCORES, f"{name}: score {ours}, the original's is {theirs}"


def compare_one_shot(name: str, found: list, case: dict, decode) -> None:
    """Drafts of some images against the raw tokens and the ranked labels of a case."""
    rows = zip(found, case["raw"], case["labels"], case["scores"], strict=True)
    for drafts, raw, labels, scores in rows:
        tokens = [token for row in drafts for token in row[0]]
        same("nxtp decoding", f"{name}, tokens", tokens, raw["tokens"])
        shares = [share for row in drafts for share in row[1]]
        same_shares(f"{name}, token probabilities", shares, raw["probs"])
        same_labels(name, rank_labels(drafts, decode), labels, scores)


@pytest.mark.parametrize("count", recorded("nxtp", "decoding.json", within="one_shot"))
@pytest.mark.parametrize("together", [True, False], ids=["batch", "one by one"])
def test_one_shot(count, together, setting):
    model, tokenizer, images, prompt = setting
    case, k = cases.meta("decoding")["one_shot"][count], int(count.removeprefix("k"))
    parts = [images] if together else list(images.split(1))
    drafts = [one_shot(model, part, prompt, tokenizer.delimiter, k) for part in parts]
    found = [one.rows(i) for one in drafts for i in range(len(one.tokens))]
    compare_one_shot("one-shot", found, case, tokenizer.decode)


@pytest.mark.parametrize(
    "number", recorded("nxtp", "decoding.json", within="one_shot_single_images")
)
def test_one_shot_of_a_single_image(number, setting):
    model, tokenizer, images, prompt = setting
    case = cases.meta("decoding")["one_shot_single_images"][number]
    tokens = case["raw"][0]["tokens"]
    # the number of branches is not recorded: as many as labels, or as delimiters where some merged
    for k in (len(case["labels"][0]), tokens.count(tokenizer.delimiter)):
        drafts = one_shot(model, images[number : number + 1], prompt, tokenizer.delimiter, k)
        if sum(len(row[0]) for row in drafts.rows(0)) == len(tokens):
            break
    compare_one_shot("one-shot, one image", [drafts.rows(0)], case, tokenizer.decode)


def ranked_as(method: str, rows: list, decode) -> list[tuple[str, float]] | None:
    """Labels by one of the original's rankings; None for those we did not take over."""
    if method in ("prob", "none"):
        return rank_labels(rows, decode, method)
    if method == "ppl":  # the original lists the least likely label first
        return rank_labels(rows, decode, "mean")[::-1]
    return None


def test_rankings_of_one_shot(setting):
    model, tokenizer, images, prompt = setting
    for case in cases.meta("decoding")["one_shot_ranking"]:
        drafts = one_shot(model, images, prompt, tokenizer.delimiter, max(map(len, case["labels"])))
        for i, (labels, scores) in enumerate(zip(case["labels"], case["scores"], strict=True)):
            ranked = ranked_as(case["ranking_method"], drafts.rows(i), tokenizer.decode)
            if ranked is not None:
                same_labels(f"one-shot by {case['ranking_method']}", ranked, labels, scores)


def test_one_shot_stopped_at_its_limit(setting):
    """Rows as the original's; its labels lose track of the probabilities there and are not
    compared."""
    model, tokenizer, images, prompt = setting
    case = cases.meta("decoding")["one_shot_update_limit"]
    count, limit = case["images"], case["max_update_iter"] - 1
    drafts = one_shot(model, images[:count], prompt, tokenizer.delimiter, case["k"], limit=limit)
    rows = [row for i in range(count) for row in drafts.rows(i)]
    wanted = zip(case["rows_generated_tokens"], case["rows_token_probabilities"], strict=True)
    for (tokens, shares), (all_tokens, all_shares) in zip(rows, wanted, strict=True):
        ended = tokenizer.delimiter in all_tokens
        length = all_tokens.index(tokenizer.delimiter) + 1 if ended else len(all_tokens)
        same("nxtp decoding", "one-shot at the limit, tokens", tokens, all_tokens[:length])
        same_shares("one-shot at the limit", shares, all_shares[:length])
    ended = [tokenizer.delimiter in tokens for tokens in case["rows_generated_tokens"]]
    same("nxtp decoding", "one-shot at the limit, ended", drafts.closed.flatten().tolist(), ended)


def test_greedy(setting):
    model, tokenizer, images, prompt = setting
    for case in cases.meta("decoding")["greedy"]:
        lagging = case["decouple"]  # the original's mask, one label late
        choice, length = Choice(penalty=case["penalty"]), case["max_gen_len"]
        network = model if case["prefix"] else cases.network(prefix=False)
        drafts = write_labels(
            network,
            images,
            prompt,
            tokenizer.delimiter,
            length,
            choice,
            decouple=False,
            lagging=lagging,
        )
        for i, raw in enumerate(case["raw"]):
            ((tokens, shares),) = drafts.rows(i)
            same("nxtp decoding", "greedy, tokens", tokens, raw["tokens"])
            same_shares("greedy, token probabilities", shares, raw["probs"])
            rows = split_labels(tokens, shares, tokenizer.delimiter)
            ranked = rank_labels(rows, tokenizer.decode)
            same_labels("greedy", ranked, case["labels"][i], case["scores"][i])


def test_beam_search(setting):
    """The recorded search whose histories move with the beams. With a penalty it still keeps the
    lists of used tokens in place, which can make it miss the likeliest text."""
    model, tokenizer, images, prompt = setting
    found = cases.meta("decoding")
    for case in found["beam"]:
        i, want = case["image"], case["with_history_reordered"]
        ((tokens, total),) = beam_search(
            model,
            images[i : i + 1],
            prompt,
            tokenizer.eos,
            case["max_gen_len"],
            penalty=case["penalty"],
        )
        if case["penalty"] and tokens != want["tokens"][0]:
            assert total > want["sum_logprobs"][0]  # a likelier text than the recorded one
            continue
        same("nxtp decoding", "beam, tokens", tokens, want["tokens"][0])
        same_shares("beam, log-probability", [total], want["sum_logprobs"])
    plain = [
        case["with_history_reordered"]["tokens"][0] for case in found["beam"] if not case["penalty"]
    ]
    together = beam_search(model, images, prompt, tokenizer.eos, found["beam"][0]["max_gen_len"])
    same("nxtp decoding", "beam, tokens of a batch", [tokens for tokens, _ in together], plain)


def test_sampling_filters():
    case = cases.meta("sampling_filters")
    logits = torch.tensor(case["logits"])
    for one in case["cases"]:
        want = one["distribution_given_to_multinomial"]
        if one["kind"] == "top_p":
            ours = top_p(logits, one["value"]).sort(descending=True).values
        else:
            ours = top_k(logits, one["value"])
        if want is None:  # k = 1 is the likeliest token with its probability among all
            share, token = Choice("greedy")(logits[:, None])
            same("nxtp decoding", "greedy choice", token[:, 0].tolist(), one["argmax_token"])
            same_shares("greedy choice", share[:, 0].tolist(), one["argmax_probability"])
        else:
            compare(
                "nxtp decoding", f"{one['kind']} {one['value']}", ours, torch.tensor(want), 1e-5
            )


def test_grouping_and_ranking():
    tokenizer, case = cases.tokenizer(), cases.meta("decoding")["post_process"]
    for i, (tokens, shares) in enumerate(zip(case["tokens"], case["probabilities"], strict=True)):
        rows = split_labels(tokens, shares, tokenizer.delimiter)
        for result in case["results"]:
            ranked = ranked_as(result["ranking_method"], rows, tokenizer.decode)
            if ranked is not None:
                same_labels("grouping", ranked, result["labels"][i], result["scores"][i])
