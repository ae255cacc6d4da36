"""The tabs of the page: fields on the left, what comes out of them on the right."""

import time
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import gradio as gr
from gradio.utils import get_upload_folder
from markupsafe import escape
from torch import Tensor

from base.errors import BadSample, UserError
from evaluation.demo import tasks, view
from evaluation.demo.abilities import Abilities
from evaluation.demo.index import Index, state_of

HITS = 24  # images that a search shows
RERANKED = 16  # of them, by image-text matching
SIDE = 640  # pixels of an image in the gallery
MAPS = 24  # words with a heat map
ATTENDED = 7  # labels with attention, as Recognition.py draws


class Demo(NamedTuple):
    """What the page shows. read: file, name for messages -> uint8 [3,H,W], else BadSample."""

    abilities: Abilities
    index: Index | None
    read: Callable[..., Tensor]


def image_field(label: str = "Image") -> gr.Image:
    """A field for one image, which arrives as its file: our reader decodes it, within its limits."""
    field = gr.Image(label=label, sources=["upload", "clipboard"], buttons=[], height=300)
    field.preprocess = sent_file  # a class of our own would have Gradio write a .pyi beside it
    return field


def sent_file(payload) -> str | None:
    """Where Gradio has put what the browser sent. A request may name any file of this machine, which
    Gradio looks at only where the request says that it is one: others count as none."""
    own = Path(get_upload_folder()).resolve()
    is_own = payload and payload.path and Path(payload.path).resolve().is_relative_to(own)
    return payload.path if is_own else None


def uploaded(demo: Demo, file: str | None) -> Tensor:
    """The image that a user gave. UserError, BadSample."""
    if file is None:
        raise UserError("give an image first")
    return demo.read(Path(file), Path(file).name)


def from_folder(demo: Demo, name: str) -> Tensor:
    """An image of the folder. BadSample where it has changed and cannot be read any more."""
    return demo.read(demo.index.root / name, name)


def run(button, function: Callable, inputs: list, outputs: list, *more) -> None:
    """Call `function` when the button is pressed, or one of the further fields is submitted. A
    mistake of the user is one sentence on the page, and what stood there before, of another image,
    goes. One call at a time uses the network."""

    def call(*values):
        try:
            return function(*values)
        except (UserError, BadSample) as error:
            gr.Warning(str(escape(str(error))), title="Not done", duration=15)
            return None if len(outputs) == 1 else [None] * len(outputs)

    gr.on(
        [button.click, *(field.submit for field in more)],
        call,
        inputs,
        outputs,
        concurrency_limit=1,
        concurrency_id="network",
        api_visibility="private",
    )


def text_field(label: str, hint: str = "", lines: int = 1, value: str = "") -> gr.Textbox:
    """A field for text of bounded length."""
    most = tasks.MOST_LETTERS if lines == 1 else tasks.MOST_LETTERS * 50
    return gr.Textbox(value, label=label, placeholder=hint, lines=lines, max_length=most)


# ------------------------------------------------------------------------------------------ search


def search_tab(demo: Demo) -> None:
    """Images of the folder by words or by image, and captions of the folder by image."""
    by_words = demo.abilities.texts
    names = gr.State([])
    chosen = gr.State(None)
    with gr.Row(visible=by_words):
        words = gr.Textbox(
            show_label=False,
            placeholder="What to look for",
            max_length=tasks.MOST_LETTERS,
            scale=8,
            container=False,
            elem_id="words",
        )
        search = gr.Button("Search", variant="primary", scale=1, min_width=120)
    can_match = by_words and demo.abilities.match is not None
    rerank = gr.Checkbox(
        label=f"re-rank the first {RERANKED} by image-text matching",
        visible=can_match,
        container=False,
    )
    with gr.Accordion("Search by an image", open=not by_words), gr.Row():
        image = image_field("Image to compare")
        with gr.Column():
            similar = gr.Button("Similar images")
            captions = gr.Button("Captions that fit", visible=bool(demo.index.captions))
    gr.HTML(view.folder_note(demo.index), elem_id="folder")
    note = gr.HTML(elem_id="note")
    table = gr.HTML(elem_id="captions")
    gallery = gr.Gallery(
        show_label=False,
        columns=4,
        object_fit="contain",
        height="auto",
        format="jpeg",
        buttons=["fullscreen"],
        elem_id="found",
    )
    more = gr.Button("More like the chosen image")
    found = [note, table, gallery, names, chosen]
    run(search, partial(find_by_words, demo), [words, rerank], found, words)
    run(similar, partial(find_similar, demo), [image], found)
    run(captions, partial(find_captions, demo), [image], [table])
    run(more, partial(find_more, demo), [names, chosen], found)
    gallery.select(position, None, chosen, queue=False, api_visibility="private")


def position(event: gr.SelectData) -> int:
    """Which image of the gallery was chosen."""
    return event.index


def find_by_words(demo: Demo, words: str, rerank: bool):
    words = tasks.typed(words, "what to look for")
    started = time.perf_counter()
    hits = tasks.search_words(demo.abilities.embedder, demo.index, words, HITS)
    spent = time.perf_counter() - started
    matches = {}
    if rerank:
        read = partial(from_folder, demo)
        hits, matches = tasks.rematch(demo.abilities, read, hits, words, RERANKED)
    return shown(demo, hits, spent, matches)


def find_similar(demo: Demo, file: str | None):
    return similar_to(demo, uploaded(demo, file))


def find_more(demo: Demo, names: list[str], chosen: int | None):
    if chosen is None or not 0 <= chosen < len(names):
        raise UserError("choose an image of the gallery first")
    return similar_to(demo, from_folder(demo, names[chosen]))


def similar_to(demo: Demo, image: Tensor):
    started = time.perf_counter()
    hits = tasks.search_image(demo.abilities.embedder, demo.index, image, HITS)
    return shown(demo, hits, time.perf_counter() - started, {})


def find_captions(demo: Demo, file: str | None):
    hits = tasks.search_captions(demo.abilities.embedder, demo.index, uploaded(demo, file), 10)
    return view.caption_rows(hits, len(demo.index.captions))


def shown(demo: Demo, hits: list[tasks.Hit], seconds: float, matches: dict[str, float]):
    """What the search tab shows of its hits; an image that has vanished is left out."""
    total = len(demo.index)
    images = []
    names = []
    for hit in hits:
        file = demo.index.root / hit.name
        try:
            thumbnail = in_gallery(demo.read, file, state_of(file))
        except BadSample:
            continue
        images.append((thumbnail, view.hit_text(hit, total, matches.get(hit.name))))
        names.append(hit.name)
    note = view.found_note(hits, total, 1000 * seconds, len(matches))
    gallery = gr.Gallery(images, selected_index=None)  # closes the one that was enlarged
    return note, "", gallery, names, None


@lru_cache(maxsize=512)
def in_gallery(read: Callable, file: Path, state: tuple):
    """An image of the folder for the gallery; state: changes with the file."""
    return tasks.small(read(file), SIDE)


# -------------------------------------------------------------------------------- one image, one text


def classify_tab(demo: Demo) -> None:
    """Zero-shot classification with typed class names."""
    with gr.Row():
        with gr.Column(scale=2):
            image = image_field()
            names = text_field("Class names, one a line", "cat\ndog\nbicycle", lines=5)
            template = text_field("Template", value=demo.abilities.embedder.template)
            button = gr.Button("Classify", variant="primary")
        with gr.Column(scale=3):
            result = gr.HTML(elem_id="classes")
    run(button, partial(classified, demo), [image, names, template], [result])


def classified(demo: Demo, file: str | None, names: str, template: str):
    image = uploaded(demo, file)
    classes = tasks.typed_lines(names, "class names")
    scored = tasks.classify(demo.abilities.embedder, image, classes, template)
    return view.score_rows(scored, "class", "Probability: softmax over the names that you typed.")


def sentence_tab(function: Callable, hint: str, label: str, shown: str) -> None:
    """An image and a sentence, a button with its label, and what `function` says of both."""
    with gr.Row():
        with gr.Column(scale=2):
            image = image_field()
            sentence = text_field("Sentence", hint)
            button = gr.Button(label, variant="primary")
        with gr.Column(scale=3):
            result = gr.HTML(elem_id=shown)
    run(button, function, [image, sentence], [result], sentence)


def ground_tab(demo: Demo) -> None:
    """Heat maps of each word of a sentence."""
    sentence_tab(partial(grounded, demo), "a dog beside a red car", "Find the words", "maps")


def grounded(demo: Demo, file: str | None, sentence: str):
    image = uploaded(demo, file)
    sentence = tasks.typed(sentence, "a sentence")
    maps = demo.abilities.word_maps(image, sentence)
    match = demo.abilities.match(image, [sentence])[0]
    note = (
        f"The sentence matches the image with {view.percent(match)}. Heat: cross-attention of the "
        "word times its gradient for that score, each map scaled to its own maximum."
    )
    if len(maps) > MAPS:
        note += f" {len(maps) - MAPS} further words are not shown."
    return view.with_note(view.tiles(image, maps[:MAPS]), note)


def answer_tab(demo: Demo) -> None:
    """Questions about an image."""
    known = len(demo.abilities.answers)
    hint = f"empty: the checkpoint's list of {known:,} answers" if known else "yes\nno"
    with gr.Row():
        with gr.Column(scale=2):
            image = image_field()
            question = text_field("Question", "what color is the car")
            own = text_field("Answers to choose from, one a line", hint, lines=3)
            button = gr.Button("Answer", variant="primary")
        with gr.Column(scale=3):
            result = gr.HTML(elem_id="answers")
    run(button, partial(answered, demo), [image, question, own], [result], question)


def answered(demo: Demo, file: str | None, question: str, own: str):
    image = uploaded(demo, file)
    question = tasks.typed(question, "a question")
    answers = tasks.typed_lines(own, "answers")
    scored = tasks.answer(demo.abilities, image, question, answers)
    total = len(answers) or len(demo.abilities.answers)
    note = f"Probability: among the best candidates; chance: one of all {total:,} answers."
    return view.score_rows(scored, "answer", note)


def entail_tab(demo: Demo) -> None:
    """Does the image entail a sentence?"""
    sentence_tab(partial(entailed, demo), "two children are outside", "Judge", "entailment")


def entailed(demo: Demo, file: str | None, sentence: str):
    image = uploaded(demo, file)
    scored = tasks.entail(demo.abilities, image, tasks.typed(sentence, "a sentence"))
    return view.score_rows(scored, "the sentence is")


def recognise_tab(demo: Demo) -> None:
    """Labels of an image as the network says them."""
    with gr.Row():
        with gr.Column(scale=2):
            image = image_field()
            button = gr.Button("Recognise", variant="primary")
        with gr.Column(scale=3):
            labels = gr.HTML(elem_id="labels")
            maps = gr.HTML(elem_id="attention")
    run(button, partial(recognised, demo), [image], [labels, maps])


def recognised(demo: Demo, file: str | None):
    image = uploaded(demo, file)
    labels = demo.abilities.recognise(image)
    texts = [text for text, _ in labels[:ATTENDED]]
    seen, heats = demo.abilities.attention(image, texts)
    note = "The network writes labels freely: there is no closed list that chance could pick from."
    pairs = list(zip(texts, heats, strict=True))
    return view.label_rows(labels, note), view.tiles(seen, pairs)
