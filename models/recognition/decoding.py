"""Label decoding: one-shot sampling, greedy, top-k, top-p and beam search over one shared image
prefix.

All continuations of an image are branches of one tree: image and prompt are encoded once, every new
token adds one key, and a boolean mask says which branch sees which keys. So nothing is copied for a
hundred labels of an image, and a beam that changes its parent changes a row of the mask.

model: anything with `prefill` and `step` as models.recognition.nxtp.Nxtp has them; also the exported
one of scripts/weights/export_recognition.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor

from base.errors import UserError, unknown
from base.knobs import check_choices, knob
from base.limits import WIDTH
from base.memory import FLOAT, check_bytes
from models.layers.llama import PrefixMask

TOKEN = 12  # bytes of a token, int64, and its probability, float32
LIMIT = 19  # tokens of a label at most, delimiter included, as in the original


class Branches:
    """M continuations of each of B images, and what each sees."""

    def __init__(self, model, images: Tensor, prompt: Tensor, count: int):
        """images [B,N,D]; prompt int64 [P]; `logits` [B,V] are those behind the prompt."""
        self.model = model
        self.logits, self.cache = model.prefill(images, prompt)
        self.shared = self.position = images.shape[1] + len(prompt)
        self.seen = torch.ones(
            len(images), count, self.shared, dtype=torch.bool, device=images.device
        )

    def grow(self, tokens: Tensor, rows: Tensor) -> Tensor:
        """Append tokens int64 [B,m] to the branches `rows` int64 [B,m]; logits [B,m,V] of what
        follows."""
        branches = torch.arange(self.seen.shape[1], device=rows.device)
        own = branches[:, None] == rows[:, None]  # [B,M,m]: a new token is seen by its branch
        self.seen = torch.cat([self.seen, own], 2)
        length = self.seen.shape[2]
        mask = self.seen.gather(1, rows[..., None].expand(-1, -1, length))
        positions = torch.full(rows.shape[1:], self.position, device=rows.device)
        logits, self.cache = self.model.step(tokens, positions, mask[:, None], self.cache)
        self.position += 1
        return logits

    def forget(self, ended: Tensor) -> None:
        """Branches bool [B,M] that begin a new label: what follows sees image and prompt alone."""
        self.seen[:, :, self.shared :] &= ~ended[..., None]

    def follow(self, parents: Tensor) -> None:
        """Branch m continues branch parents[b,m]."""
        self.seen = self.seen.gather(1, parents[..., None].expand_as(self.seen))


@dataclass
class Drafts:
    """Rows of tokens int64 [B,M,T] with their probabilities float32; row (b, m) is `lengths[b,m]`
    tokens long.

    `closed` bool [B,M]: whether a label was ended by its delimiter.
    """

    tokens: Tensor
    probabilities: Tensor
    lengths: Tensor
    closed: Tensor

    def padded(self, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The fields, with T filled up to `length`, so that those of different batches can be
        joined."""
        room = (0, length - self.tokens.shape[2])
        tokens = F.pad(self.tokens, room)
        probabilities = F.pad(self.probabilities, room)
        return tokens, probabilities, self.lengths, self.closed

    def rows(self, image: int) -> list[tuple[list[int], list[float]]]:
        """The rows of one image, each as long as it is."""
        tokens = self.tokens[image].tolist()
        probabilities = self.probabilities[image].tolist()
        rows = []
        for row, length in enumerate(self.lengths[image].tolist()):
            rows.append((tokens[row][:length], probabilities[row][:length]))
        return rows


@torch.no_grad()
def one_shot(
    model, images: Tensor, prompt: Tensor, delimiter: int, count: int, limit: int = LIMIT
) -> Drafts:
    """The `count` likeliest first tokens of an image, each continued greedily to its delimiter (Yue
    et al., 2024).

    Finished branches are not computed any further. A branch that reaches `limit` tokens without a
    delimiter stays open and is scored by the tokens it has.
    """
    tree = Branches(model, images, prompt, count)
    if count > tree.logits.shape[-1]:
        raise UserError(
            f"{count} labels asked for, but the vocabulary has {tree.logits.shape[-1]} first tokens"
        )
    probability, last = tree.logits.float().softmax(-1).topk(count)
    tokens = [last]
    probabilities = [probability]
    lengths = torch.ones_like(last)
    running = last != delimiter
    for _ in range(limit - 1):
        most = int(running.sum(1).max())
        if not most:
            break
        rows = running.int().argsort(dim=1, descending=True, stable=True)[:, :most]
        best, found = _likeliest(tree.grow(last.gather(1, rows), rows))
        last = torch.full_like(last, delimiter).scatter(1, rows, found)
        tokens.append(last)
        probabilities.append(torch.ones_like(probability).scatter(1, rows, best))
        lengths = lengths + running
        running = running & (last != delimiter)
    return Drafts(torch.stack(tokens, 2), torch.stack(probabilities, 2), lengths, ~running)


def _likeliest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Probability and id of the likeliest token; no softmax over the vocabulary is written."""
    logits = logits.float()
    top, found = logits.max(-1)
    return (top - logits.logsumexp(-1)).exp(), found


# ---- greedy and random continuations
def top_k(logits: Tensor, k: int) -> Tensor:
    """Probabilities [...,V] among the k likeliest tokens; k = 0: among all."""
    if k:
        logits = logits.masked_fill(logits < logits.topk(k).values[..., -1:], -torch.inf)
    return logits.softmax(-1)


def top_p(logits: Tensor, p: float) -> Tensor:
    """Probabilities [...,V] among the likeliest tokens that together make up p, the one that passes
    it included."""
    ordered, positions = logits.softmax(-1).sort(descending=True)
    ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered > p, 0)
    return torch.zeros_like(ordered).scatter(-1, positions, ordered / ordered.sum(-1, keepdim=True))


METHODS = ("greedy", "top_k", "top_p")


@dataclass(frozen=True)
class Choice:
    """How the next token is chosen: one of METHODS. temperature: of top_p alone, as in the
    original."""

    method: str = "greedy"
    k: int = 5
    p: float = 0.9
    temperature: float = 1.0
    # > 0: logits of tokens a branch has already used are divided by it (Keskar et al., 2019)
    penalty: float = 0.0

    def __post_init__(self):
        if self.method not in METHODS:
            raise unknown("decoding method", self.method, METHODS)

    def __call__(
        self, logits: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits [B,M,V] -> probability and token [B,M]."""
        if self.method == "greedy":
            return _likeliest(logits)
        if self.method == "top_k":
            probability = top_k(logits, self.k)
        else:
            probability = top_p(logits / self.temperature, self.p)
        found = torch.multinomial(probability.flatten(0, 1), 1, generator=generator)
        found = found.view(probability.shape[:2])
        return probability.gather(-1, found[..., None])[..., 0], found


@torch.no_grad()
def write_labels(
    model,
    images: Tensor,
    prompt: Tensor,
    delimiter: int,
    length: int,
    choice: Choice,
    count: int = 1,
    decouple: bool = True,
    lagging: bool = False,
    generator: torch.Generator | None = None,
) -> Drafts:
    """`count` streams of `length` tokens for each image, one label after the other.

    decouple: a label sees neither those before nor their delimiters, as in training. lagging:
    instead the original's mask, one label late; it changes what was already computed, so that each
    token costs a pass over the whole text (count 1 only). EOS is a token like others.
    """
    if lagging and count > 1:
        raise UserError("the original's lagging mask is for one stream an image")
    tree = Branches(model, images, prompt, count)
    logits = tree.logits[:, None].float().expand(-1, count, -1)
    used = torch.zeros_like(logits, dtype=torch.bool)
    rows = torch.arange(count, device=images.device).expand(len(images), -1)
    tokens = []
    probabilities = []
    for position in range(length):
        if choice.penalty > 0:
            logits = torch.where(used, logits / choice.penalty, logits)
        probability, found = choice(logits, generator)
        tokens.append(found)
        probabilities.append(probability)
        used = used.scatter(2, found[..., None], True)
        if position == length - 1:
            break
        if lagging:
            text = torch.cat(tokens, 1)
            logits = _lagging_logits(model, images, prompt, text, delimiter)[:, None].float()
        else:
            logits = tree.grow(found, rows).float()
            if decouple:
                tree.forget(found == delimiter)
    text = torch.stack(tokens, 2)
    lengths = torch.full(text.shape[:2], length, device=images.device)
    return Drafts(text, torch.stack(probabilities, 2), lengths, text[..., -1] == delimiter)


def _lagging_logits(
    model, images: Tensor, prompt: Tensor, tokens: Tensor, delimiter: int
) -> Tensor:
    """Logits [B,V] of what follows the tokens int64 [B,T], under `lagging_mask`."""
    ids = torch.cat([prompt.expand(len(tokens), -1), tokens], 1)
    prefix = images.shape[1]
    positions = torch.arange(prefix + ids.shape[1], device=ids.device)
    text = lagging_mask(ids, len(prompt) - 1, delimiter, prefix)
    mask = PrefixMask(positions, text, prefix, model.config.prefix)
    states, _ = model.language_decoder(model.sequence(images, ids), mask, keep=1)
    return model.exact_logits(states[:, 0])


def lagging_mask(ids: Tensor, answer: int, delimiter: int, images: int) -> Tensor:
    """The original's mask of a text being written: int64 [B,T] -> bool [B,1,T,images+T].

    Causal, but once the (j+1)-th delimiter stands, what follows the j-th loses all from the
    prompt's last token (position `answer`) to the j-th delimiter.
    """
    order = torch.arange(ids.shape[1], device=ids.device)
    ends = ids == delimiter
    ends_from_here = ends.flip(1).cumsum(1).flip(1)
    followed = ends & (ends_from_here > 1)
    barrier = torch.where(followed, order, -1).cummax(1).values
    barrier = F.pad(barrier[:, :-1], (1, 0), value=-1)  # of the positions before
    hidden = (order >= answer) & (order <= barrier[..., None])
    causal = order[:, None] >= order
    text = causal & ~hidden
    return F.pad(text, (images, 0), value=True)[:, None]


# ---- beam search
@torch.no_grad()
def beam_search(
    model,
    images: Tensor,
    prompt: Tensor,
    eos: int,
    length: int,
    beams: int = 3,
    patience: float = 1.0,
    length_penalty: float | None = None,
    penalty: float = 0.0,
) -> list[tuple[list[int], float]]:
    """The best text of each image and its log-probability: `beams` texts kept, at most `length`
    tokens before EOS.

    An image is done when beams * patience texts have ended, one at least. Texts are ranked by
    log-probability over their length, prompt and EOS counted, or over ((5 + length) /
    6)^length_penalty (Wu et al., 2016). Labels see one another, as in the original; unlike there,
    histories move with the beams.
    """
    tree = Branches(model, images, prompt, beams)
    enough = max(1, round(beams * patience))
    device = images.device
    ended: list[dict[tuple[int, ...], float]] = [{} for _ in images]
    sums = torch.full((len(images), beams), -torch.inf, device=device)
    sums[:, 0] = 0  # all beams are alike at first
    history = torch.zeros(len(images), beams, 0, dtype=torch.int64, device=device)
    logits = tree.logits[:, None].float().expand(-1, beams, -1)
    used = torch.zeros_like(logits, dtype=torch.bool)
    rows = torch.arange(beams, device=device).expand(len(images), -1)
    for position in range(length):
        if penalty > 0 and position:
            logits = torch.where(used, logits / penalty, logits)
        best, found = logits.log_softmax(-1).topk(beams + 1)
        totals = (sums[..., None] + best).flatten(1)
        order = totals.argsort(dim=1, descending=True, stable=True)
        found = found.flatten(1).gather(1, order)
        parents = order // (beams + 1)
        totals = totals.gather(1, order)
        going = found != eos
        for b, text in enumerate(ended):  # those that end above the last beam that continues
            above = (going[b].cumsum(0) < beams) & ~going[b] & totals[b].isfinite()
            for i in above.nonzero().flatten().tolist():
                if len(text) < enough:
                    text[(*history[b, parents[b, i]].tolist(), eos)] = float(totals[b, i])
        kept = (~going).int().argsort(dim=1, stable=True)[:, :beams]
        sums, parents, last = (part.gather(1, kept) for part in (totals, parents, found))
        history = history.gather(1, parents[..., None].expand_as(history))
        history = torch.cat([history, last[..., None]], 2)
        tree.follow(parents)
        if all(len(text) >= enough for text in ended) or position == length - 1:
            break
        used = used.gather(1, parents[..., None].expand_as(used))
        used = used.scatter(2, last[..., None], True)
        if position == 0:
            used[..., prompt] = True  # the original's penalty is on the whole text
        logits = tree.grow(last, rows).float()
    for texts, tokens, totals in zip(ended, history, sums, strict=True):
        _add_unfinished(texts, tokens, totals, eos, beams)
    return [_best_text(texts, len(prompt), length_penalty) for texts in ended]


def _add_unfinished(
    texts: dict[tuple[int, ...], float], tokens: Tensor, totals: Tensor, eos: int, beams: int
) -> None:
    """Add the best of the beams int64 [M,T], log-probabilities [M], where fewer texts have ended."""
    for i in totals.argsort(descending=True).tolist():
        if len(texts) < beams:
            texts[(*tokens[i].tolist(), eos)] = float(totals[i])


def _best_text(
    texts: dict[tuple[int, ...], float], before: int, power: float | None
) -> tuple[list[int], float]:
    """The best of the texts and its log-probability; `before` tokens of the prompt count, too."""

    def score(text: tuple[int, ...]) -> float:
        length = before + len(text)
        return texts[text] / (length if power is None else ((5 + length) / 6) ** power)

    best = max(texts, key=score)
    return list(best), texts[best]


# ---- from tokens to labels
def split_labels(
    tokens: Sequence[int], probabilities: Sequence[float], delimiter: int
) -> list[tuple[list[int], list[float]]]:
    """The labels of a stream, delimiters included; an unfinished one at its end is left out."""
    found = []
    start = 0
    for position, token in enumerate(tokens):
        if token == delimiter:
            end = position + 1
            found.append((list(tokens[start:end]), list(probabilities[start:end])))
            start = end
    return found


RANKINGS = ("prob", "mean", "none")


def rank_labels(
    rows: Sequence[tuple[list[int], list[float]]],
    decode: Callable[[list[int]], str],
    ranking: str = "prob",
) -> list[tuple[str, float]]:
    """Labels with scores, the best first; rows that read alike are one label.

    ranking: "prob": the product of a label's token probabilities, summed over rows that read alike
    (it may pass 1 in a stream that repeats itself); "mean": their geometric mean, the lowest of
    those rows; "none": order of appearance.
    """
    if ranking not in RANKINGS:
        raise unknown("ranking", ranking, RANKINGS)
    scores: dict[str, float] = {}
    for tokens, probabilities in rows:
        text = decode(tokens).replace(",", "")
        product = torch.tensor(probabilities, dtype=torch.float64).prod().item()
        if ranking == "mean":
            scores[text] = min(scores.get(text, 1.0), product ** (1 / len(probabilities)))
        else:
            scores[text] = scores.get(text, 0.0) + (product if ranking == "prob" else 0.0)
    return sorted(scores.items(), key=lambda item: -item[1])


# ---- all of it by options
STRATEGIES = ("one_shot", "greedy", "top_k", "top_p", "beam")


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How labels are found and ranked."""

    strategy: str = knob(
        "one_shot", "or one text of labels, at random with top_k, top_p", choices=STRATEGIES
    )
    num_labels: int = knob(10, "labels of an image; one_shot grows this many", low=1, high=WIDTH)
    ranking: str = knob(
        "prob",
        "prob, mean (geometric mean of a label's tokens) or none (order of appearance)",
        choices=RANKINGS,
    )
    max_label_len: int = knob(
        LIMIT,
        "one_shot: tokens of a label, delimiter included",
        methods="one_shot",
        low=1,
        high=WIDTH,
    )
    max_gen_len: int = knob(
        64,
        "the others: tokens of the whole text",
        methods="greedy top_k top_p beam",
        low=1,
        high=WIDTH,
    )
    top_k: int = knob(
        5, "of strategy top_k: tokens to choose among; 0 = all", methods="top_k", low=0
    )
    top_p: float = knob(
        0.9,
        "of strategy top_p: cumulative probability of the tokens to choose among",
        methods="top_p",
        low=0,
        high=1,
    )
    temperature: float = knob(1.0, "of strategy top_p", methods="top_p", low=1e-6)
    penalty: float = knob(
        0.0,
        "> 0: logits of tokens used before are divided by it; not of one_shot",
        methods="greedy top_k top_p beam",
        low=0,
    )
    beam_size: int = knob(3, "of strategy beam: texts kept", methods="beam", low=1, high=WIDTH)
    beam_patience: float = knob(
        1.0,
        "of strategy beam: texts to finish, as a multiple of beam_size, and one at least",
        methods="beam",
        low=0,
    )
    length_penalty: float | None = knob(
        None,
        "of strategy beam: power of the length; none = divide by the length",
        methods="beam",
    )

    def __post_init__(self):
        check_choices(self)
        sizes = [self.num_labels, self.max_label_len, self.max_gen_len, self.beam_size]
        if min(sizes) < 1 or self.temperature <= 0:
            raise UserError(
                "decoding: num_labels, lengths, beam_size and temperature must be positive"
            )

    def check(self, vocabulary: int, images: int) -> None:
        """UserError for more tokens to choose among than the vocabulary has, and for more texts of
        `images` images at a time than the memory holds."""
        wanted = {"one_shot": "num_labels", "top_k": "top_k", "beam": "beam_size"}
        name = wanted.get(self.strategy)
        most = vocabulary - 1 if name == "beam_size" else vocabulary
        if name and getattr(self, name) > most:
            raise UserError(
                f"decoding: {name} {getattr(self, name):,}, but the vocabulary has {vocabulary:,} "
                "tokens; ask for fewer"
            )
        texts = images * {"one_shot": self.num_labels, "beam": self.beam_size}.get(self.strategy, 1)
        needed = texts * (FLOAT * vocabulary + TOKEN * self.longest)
        what = f"decoding: {texts:,} texts of {images:,} images at a time"
        check_bytes(needed, what, "make batch_size_test, num_labels or the lengths smaller")

    @property
    def longest(self) -> int:
        """Tokens a row of `find` can have."""
        return self.max_label_len if self.strategy == "one_shot" else self.max_gen_len + 1

    def find(
        self, model, images: Tensor, prompt: Tensor, delimiter: int, eos: int, decouple: bool = True
    ) -> Drafts:
        """Rows of labels (one_shot), or one row an image that is a text of labels."""
        if self.strategy == "one_shot":
            return one_shot(model, images, prompt, delimiter, self.num_labels, self.max_label_len)
        if self.strategy != "beam":
            choice = Choice(
                method=self.strategy,
                k=self.top_k,
                p=self.top_p,
                temperature=self.temperature,
                penalty=self.penalty,
            )
            return write_labels(
                model, images, prompt, delimiter, self.max_gen_len, choice, decouple=decouple
            )
        found = beam_search(
            model,
            images,
            prompt,
            eos,
            self.max_gen_len,
            beams=self.beam_size,
            patience=self.beam_patience,
            length_penalty=self.length_penalty,
            penalty=self.penalty,
        )
        texts = [tokens for tokens, _ in found]
        longest = max(map(len, texts))
        padded = [[text + [eos] * (longest - len(text))] for text in texts]
        tokens = torch.tensor(padded, device=images.device)  # [B,1,T]
        lengths = torch.tensor([[len(text)] for text in texts], device=images.device)
        return Drafts(
            tokens,
            probabilities=torch.ones_like(tokens, dtype=torch.float32),
            lengths=lengths,
            closed=torch.ones_like(lengths, dtype=torch.bool),
        )

    def labels(self, drafts: Drafts, image: int, delimiter: int, decode) -> list[tuple[str, float]]:
        """The labels of one image with their scores, best first; beams have no probabilities of
        their own: 1 each."""
        rows = drafts.rows(image)
        if self.strategy != "one_shot":
            rows = list(chain.from_iterable(split_labels(*row, delimiter) for row in rows))
        ranked = rank_labels(rows, decode, "none" if self.strategy == "beam" else self.ranking)
        return [(text.strip(), score) for text, score in ranked if text.strip()][: self.num_labels]


@torch.no_grad()
def label_map(model, images: Tensor, prompt: Tensor, tokens: Sequence[int]) -> Tensor:
    """Where the decoder looks while it reads a label: float32 [g,g], highest 1.

    images [1,N,D], N = g * g. Attention of the label's tokens to the image tokens, averaged over
    blocks and heads.
    """
    ids = torch.cat([prompt, torch.tensor(list(tokens), device=prompt.device)])[None]
    x = model.sequence(images, ids)
    mask = model.prefix_mask(images.shape[1], torch.zeros_like(ids))
    seen = torch.zeros(images.shape[1], device=x.device)
    maps = model.language_decoder.attention_maps(x, mask)
    for one in maps:  # [1,H,L,L]
        seen += one[0, :, -len(tokens) :, : images.shape[1]].mean((0, 1)) / len(maps)
    side = round(len(seen) ** 0.5)
    heat = seen.unflatten(0, (side, side)).float()
    heat = heat - heat.min()
    return (heat / heat.max().clamp(min=1e-12)).cpu()
