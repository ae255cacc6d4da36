"""Random views of a caption: stop words left out, and one of textaugment's operations on the words.

Draws from Python's `random`, which the data stream reseeds for every sample.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache

from base.errors import UserError
from base.knobs import check_choices, knob
from dataset.text.bpe import clean_text
from dataset.text.choice import choose, with_text
from dataset.text.wordnet import WordNet

# NLTK's English list as it was until 3.8 (179 words); it has grown since, and training must not
# depend on the machine
STOP_WORDS = frozenset(
    """a about above after again against ain all am an and any are aren aren't as at be because been before being below
    between both but by can couldn couldn't d did didn didn't do does doesn doesn't doing don don't down during each
    few for from further had hadn hadn't has hasn hasn't have haven haven't having he her here hers herself him
    himself his how i if in into is isn isn't it it's its itself just ll m ma me mightn mightn't more most mustn
    mustn't my myself needn needn't no nor not now o of off on once only or other our ours ourselves out over own re
    s same shan shan't she she's should should've shouldn shouldn't so some such t than that that'll the their
    theirs them themselves then there these they this those through to too under until up ve very was wasn wasn't we
    were weren weren't what when where which while who whom why will with won won't wouldn wouldn't y you you'd
    you'll you're you've your yours yourself yourselves""".split()
)


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Views of the captions; names and defaults are clip-rocket's."""

    caption_sampling: str = knob(
        "single",
        "all views of a sample show one caption, or (multi) each draws its own",
        choices=("single", "multi"),
    )
    text_augment: bool = knob(False, "remove stop words, and alter local views by four operations")
    clean_before_augment: bool = knob(
        False, "clean and lower-case captions before, not only after, the operations"
    )
    remove_stopwords_prob: float = knob(0.8, "of every view, the global one too", low=0, high=1)
    no_text_augment_prob: float = knob(
        0.0, "weight of leaving a local view as it is, among the four operations", rare=True, low=0
    )
    synonym_replacement_prob: float = knob(
        0.4, "weight of replacing a word by a WordNet synonym", rare=True, low=0
    )
    random_swap_prob: float = knob(0.4, "weight of swapping two words", rare=True, low=0)
    random_deletion_prob: float = knob(
        0.2, "weight of deleting each word with probability 0.1", rare=True, low=0
    )

    def __post_init__(self):
        check_choices(self)
        if min(self.weights) < 0 or not sum(self.weights):
            raise UserError(
                f"weights of the text operations {self.weights}: none may be negative, one must be positive"
            )

    @property
    def weights(self) -> tuple[float, ...]:
        """Of leaving the text, synonym replacement, swap, deletion."""
        return (
            self.no_text_augment_prob,
            self.synonym_replacement_prob,
            self.random_swap_prob,
            self.random_deletion_prob,
        )


class TextViews:
    """Of a sample's captions, one global view and `local` local views (strings, not yet tokenised).

    Every view has its stop words removed with `remove_stopwords_prob`; a local one is then subject
    to exactly one operation. What would become empty is left as it was. stop_words_always: also
    without `text_augment`, as the original did. synonyms: word -> synonyms, by default WordNet's.
    """

    def __init__(
        self,
        options: TextOptions,
        local: int = 0,
        stop_words_always: bool = False,
        synonyms: Callable[[str], Sequence[str]] | None = None,
    ):
        self.options = options
        self.local = local
        self.shorten = options.text_augment or stop_words_always
        if self.shorten:
            word_tokenizers()  # complain now, not in a worker
        self.words = None
        if options.text_augment and local:
            if synonyms is None and options.synonym_replacement_prob:
                synonyms = WordNet().synonyms
            self.words = word_operations(synonyms)

    def __call__(
        self, captions: Sequence[str], weights: Sequence[float] | None = None
    ) -> list[str]:
        """1 + local texts of one sample. weights: of each caption in the sampling; none = equal."""
        if self.options.clean_before_augment:
            captions = [clean_text(caption) for caption in captions]
        left, kept_weights = with_text(captions, weights)
        if left:
            captions, weights = left, kept_weights
        if self.options.caption_sampling == "single":
            captions = [choose(captions, weights)]
            weights = None
        views = []
        for _ in range(1 + self.local):
            views.append(self.without_stop_words(choose(captions, weights)))
        return views[:1] + [self.altered(view) for view in views[1:]]

    def without_stop_words(self, text: str) -> str:
        """The text or, with `remove_stopwords_prob`, what is left of it without stop words, unless
        that is nothing."""
        if not self.shorten or random.random() >= self.options.remove_stopwords_prob:
            return text
        return remove_stop_words(text) or text

    def altered(self, text: str) -> str:
        """The text after one of the four operations."""
        if self.words is None or not text.strip():
            return text
        words = self.words
        operations = (str, words.synonym_replacement, words.random_swap, words.random_deletion)
        (operation,) = random.choices(operations, self.options.weights)
        return operation(text) or text


@lru_cache(maxsize=64)  # the views of a sample mostly share one caption
def remove_stop_words(text: str) -> str:
    """The tokens that are no stop words, joined by blanks; contractions and punctuation are tokens
    of their own."""
    sentences, tokens = word_tokenizers()
    words = [word for sentence in sentences.tokenize(text) for word in tokens.tokenize(sentence)]
    return " ".join(word for word in words if word.lower() not in STOP_WORDS)


@cache
def word_tokenizers():
    """NLTK's sentence and word tokenizers. Punkt without its trained abbreviations, which would
    need a download: it decides whether a full stop sticks to the last word of a sentence, and BPE
    parts the two anyway.
    """
    try:
        from nltk.tokenize.destructive import NLTKWordTokenizer
        from nltk.tokenize.punkt import PunktSentenceTokenizer
    except ImportError:
        raise UserError("text augmentation needs the package nltk: `pip install nltk`") from None
    return PunktSentenceTokenizer(), NLTKWordTokenizer()


def word_operations(synonyms: Callable[[str], Sequence[str]] | None):
    """textaugment's EDA (Wei and Zou, 2019) with these synonyms and our stop words."""
    state = random.getstate()  # importing it and its constructor draw from and seed the generator
    try:
        from textaugment import EDA
    except ImportError:
        raise UserError(
            "--text-augment needs the package textaugment: `pip install textaugment`"
        ) from None

    class WordOperations(EDA):
        def _get_synonyms(self, word: str) -> Sequence[str]:
            return synonyms(word) if synonyms else ()

    with _without_downloads():
        made = WordOperations(stop_words=STOP_WORDS)
    random.setstate(state)
    return made


@contextmanager
def _without_downloads() -> Iterator[None]:
    """EDA's constructor fetches two corpora, which nothing here reads."""
    import nltk

    download = nltk.download
    nltk.download = _no_download
    try:
        yield
    finally:
        nltk.download = download


def _no_download(*_names: str, **_options: object) -> bool:
    return True
