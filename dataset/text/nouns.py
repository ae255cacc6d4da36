"""The nouns of a caption, as NXTP takes its labels from captions (Yue et al., 2024): clean, tag,
keep nouns, lemmatise.

Nothing is downloaded. Base forms come from WordNet's files (dataset.text.wordnet), tags from one
of two taggers:

- "nltk": NLTK's averaged perceptron, the original's. Its weights are not in the pip package:
`nltk_data` names a folder
  with `taggers/averaged_perceptron_tagger_eng`, as `python -m nltk.downloader` makes it, once, on
  any machine.
- "lexicon": the lexicon and rules of the pip package textblob, for machines without that folder. It
knows each word's
  most frequent tag and little context, so that it takes more verbs and adjectives for nouns, and
  the other way round.
"""

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

from base.errors import UserError, first_line
from base.text import lenient_text
from dataset.text.wordnet import DEBIAN, WordNet

# in the original's order, which matters: they are cut out one after the other
NOISE = (
    "person persons stock illustration foreground background photography image images front day ounce top"
).split()
PERCEPTRON = "taggers/averaged_perceptron_tagger_eng"
PUNKT = "tokenizers/punkt_tab/english"
NOUN_TAGS = ("NN", "NNS")  # common nouns; names (NNP, NNPS) are left out
Tagger = Callable[[list[str]], list[str]]


def clean(caption: str, whole_words: bool = False) -> str:
    """Lower case without noise words and without all signs but ' . and -.

    Noise words are cut out of longer words, too ("laptop" -> "lap"), as the original does;
    `whole_words` fixes that.
    """
    text = caption.lower().replace("\n", " ")
    for word in NOISE:
        text = re.sub(rf"\b{word}\b", " ", text) if whole_words else text.replace(word, " ")
    text = re.sub(r"[^a-z0-9 '.,&-]", "", text)
    return " ".join(re.sub(r"[,&]", " ", text).split())


class Nouns:
    """Callable: caption -> its nouns' base forms in order of appearance; [] where it has none.

    tag: words -> Penn Treebank tags. words: cleaned text -> words; by default `treebank_words()`.
    fixed: noise words as whole words only, and no base form twice; by default as the original:
    published numbers rest on its labels.
    """

    def __init__(
        self,
        tag: Tagger,
        wordnet: WordNet | None = None,
        words: Callable[[str], list[str]] | None = None,
        numbers: bool = False,
        fixed: bool = False,
    ):
        self.tag = tag
        self.words = words or treebank_words()
        self.wordnet = wordnet or _wordnet()
        self.numbers = numbers
        self.fixed = fixed

    def __call__(self, caption: str) -> list[str]:
        words = self.words(clean(caption, whole_words=self.fixed))
        tagged = zip(words, self.tag(words), strict=True)
        nouns = dict.fromkeys(word for word, tag in tagged if tag in NOUN_TAGS)  # each once
        bases = []
        for noun in nouns:
            if not self.numbers and any(map(str.isdigit, noun)):
                continue
            base = self.base(noun)
            if len(base) > 2:
                bases.append(base)
        return list(dict.fromkeys(bases)) if self.fixed else bases

    def base(self, word: str) -> str:
        """WordNet's shortest base form of a noun, or the word itself where it is not listed."""
        return noun_base(self.wordnet, word)


@lru_cache(maxsize=1 << 16)
def noun_base(wordnet: WordNet, word: str) -> str:
    return min(wordnet.bases(word, "noun"), key=len, default=word)


def _wordnet() -> WordNet:
    try:
        return WordNet()
    except UserError:
        raise UserError(
            "base forms of nouns need WordNet's noun index, and it is not on this machine. Either `apt-get install "
            f"wordnet-base` (puts it into {DEBIAN}), or `python -m nltk.downloader wordnet` (puts it on NLTK's path)"
        ) from None


def treebank_words(nltk_data: str | Path | None = None) -> Callable[[str], list[str]]:
    """NLTK's word tokenizer. Sentences are split by the trained Punkt model where `nltk_data` has
    it, else by an untrained one: they then differ at full stops inside a caption, such as "mr.
    smith"."""
    from nltk.tokenize.destructive import NLTKWordTokenizer
    from nltk.tokenize.punkt import PunktSentenceTokenizer, PunktTokenizer

    folder = Path(nltk_data or "") / PUNKT
    if nltk_data and folder.is_dir():
        _nltk_path(nltk_data)
        sentences = PunktTokenizer("english")
    else:
        sentences = PunktSentenceTokenizer()
    tokenizer = NLTKWordTokenizer()
    return lambda text: [
        word for part in sentences.tokenize(text) for word in tokenizer.tokenize(part)
    ]


def perceptron_tagger(nltk_data: str | Path) -> Tagger:
    """NLTK's averaged perceptron with the weights (JSON) under `nltk_data`. UserError where they
    are not there."""
    folder = Path(nltk_data) / PERCEPTRON
    if not folder.is_dir():
        raise UserError(
            f"nltk_data {nltk_data}: no {PERCEPTRON} in it. Fetch it once where there is internet: `python -m "
            "nltk.downloader -d FOLDER averaged_perceptron_tagger_eng punkt_tab`, and name FOLDER; or use the tagger "
            "`lexicon`, which needs no data"
        )
    from nltk.tag.perceptron import PerceptronTagger

    _nltk_path(nltk_data)
    try:
        tagger = PerceptronTagger(lang="eng")
    except (LookupError, OSError, ValueError, TypeError, RecursionError) as error:
        what = first_line(error)
        raise UserError(f"{folder}: damaged ({what}); fetch it again") from None
    return lambda words: [tag for _, tag in tagger.tag(words)]


def lexicon_tagger() -> Tagger:
    """Tags by textblob's lexicon, suffix rules and context rules."""
    try:
        from textblob.en import tag
    except ImportError:
        raise UserError(
            "the tagger `lexicon` is the pip package textblob: pip install textblob"
        ) from None

    def tags(words: list[str]) -> list[str]:
        found = [kind for _, kind in tag(" ".join(words), tokenize=False)] if words else []
        return [kind.partition("-")[0] for kind in found]  # NNP-LOC and the like

    return tags


def make_tagger(kind: str, nltk_data: str | Path | None) -> Tagger:
    """`auto` is nltk where its data folder is named, else the lexicon."""
    if kind == "nltk" and not nltk_data:
        raise UserError(
            "tagger nltk: name the folder of its weights with --nltk-data; or use --tagger lexicon"
        )
    return perceptron_tagger(nltk_data) if nltk_data and kind != "lexicon" else lexicon_tagger()


def _nltk_path(folder: str | Path) -> None:
    import nltk

    if str(folder) not in nltk.data.path:
        nltk.data.path.insert(0, str(folder))


def parse_nouns(text: str | bytes) -> list[str]:
    """Names out of a comma-joined list, lower case, without blanks around them and without empty
    ones."""
    text = lenient_text(text) if isinstance(text, bytes) else text
    return [name for part in text.lower().split(",") if (name := " ".join(part.split()))]


def join_nouns(nouns: Sequence[str]) -> str:
    return ",".join(nouns)
