"""Visual question answering: weighted answers for training, questions with the annotators' answers
for evaluation."""

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch.utils.data import default_collate

from base.errors import BadSample, UserError, brief
from base.reading import read_json
from base.text import as_list, id_text, is_blank
from dataset.images.decode import check_image_root, decode_image
from dataset.loading.stream import RecordSource
from dataset.sources.records import Records, odd_items, with_texts
from dataset.text.wordpiece import Tokenizer, pre_question

GENOME_WEIGHT = 0.5  # of a Visual Genome answer, which one person gave
Roots = Mapping[str, str | Path]  # folder of the images by the entries' `dataset`


def image_path(record: dict, roots: Roots) -> Path:
    """Where an entry's image lies; `dataset` is "vqa" unless the entry says "vg". Raises
    BadSample."""
    kind = kind_of(record)
    if kind not in roots:
        raise BadSample(
            f"dataset {brief(kind)} of {record['image']}: expected one of {', '.join(roots)}"
        )
    return Path(roots[kind]) / record["image"]


def kind_of(record: dict) -> str:
    """The data set that an entry says it is of; "vqa" where it says none."""
    return str(record.get("dataset") or "vqa")


class QuestionAnswers:
    """Makes a training sample of a record with `image`, `question`, `answer` (ten texts; one for
    Visual Genome).

    `image` uint8 [3,H,W] · `question` str · `answers`, the distinct ones in order of appearance ·
    `weights`, each one's fraction of the answers (0.5 for Visual Genome).
    """

    def __init__(self, transform: Callable, roots: Roots, max_words: int = 30):
        self.transform = transform
        self.roots = roots
        self.max_words = max_words

    def source(self, path: Path) -> RecordSource:
        """The entries of an annotation file. Raises UserError where the images are not where they
        should be."""
        records = Records(path, ("image", "question", "answer"))
        first = [records[i] for i in range(min(10, len(records)))]
        kind = next((kind_of(each) for each in first if kind_of(each) in self.roots), None)
        if kind is None:
            known = ", ".join(self.roots)
            raise UserError(f"{path}: dataset {kind_of(first[0])!r:.60} is none of {known}; fix it")
        named = [each["image"] for each in first if kind_of(each) == kind]
        check_image_root(self.roots[kind], named)
        return RecordSource(records, self, path.name)

    def __call__(self, record: dict) -> dict:
        given = record["answer"]
        if isinstance(given, str):
            counts, total = {given: GENOME_WEIGHT}, 1
        else:
            counts = Counter(given)
            total = len(given)
        counts = {answer: count for answer, count in counts.items() if not is_blank(answer)}
        if not counts:
            raise BadSample(f"no answer to {record['question']!r:.80}")
        return {
            "image": self.transform(decode_image(image_path(record, self.roots))),
            "question": pre_question(record["question"], self.max_words),
            "answers": list(counts),
            "weights": [count / total for count in counts.values()],
        }


class VqaCollate:
    """image uint8 [B,3,H,W] · text_ids int64, text_mask bool [B,L] · answer_ids int64,
    answer_mask bool [A,M] · answer_weight float32, answer_question int64 [A].

    The answers of all questions stand one below the other, [CLS] pieces [SEP]; A is rounded up to a
    `multiple` with answers of weight 0, for few shapes.
    """

    def __init__(self, tokenizer: Tokenizer, max_tokens: int = 25, multiple: int = 16):
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.multiple = multiple

    def __call__(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        questions = [sample["question"] for sample in samples]
        ids, mask = self.tokenizer(questions, self.max_tokens)
        answers = [answer for sample in samples for answer in sample["answers"]]
        question = [number for number, sample in enumerate(samples) for _ in sample["answers"]]
        weights = [weight for sample in samples for weight in sample["weights"]]
        spare = -len(answers) % self.multiple
        answers = answers + answers[:1] * spare
        question = question + [0] * spare
        weights = weights + [0.0] * spare
        answer_ids, answer_mask = encode_answers(answers, self.tokenizer, 4)
        return {
            "image": default_collate([sample["image"] for sample in samples]),
            "text_ids": ids,
            "text_mask": mask,
            "answer_ids": answer_ids,
            "answer_mask": answer_mask,
            "answer_weight": torch.tensor(weights),
            "answer_question": torch.tensor(question),
        }


def encode_answers(
    answers: Sequence[str], tokenizer: Tokenizer, multiple: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(ids int64 [A,M], mask bool [A,M])` of [CLS] pieces [SEP]; M is rounded up to a
    `multiple`."""
    rows = [[*tokenizer.encode(answer), tokenizer.sep_id] for answer in answers]
    width = -(-max(map(len, rows)) // multiple) * multiple
    ids = torch.tensor([row + [tokenizer.pad_id] * (width - len(row)) for row in rows])
    length = torch.tensor([len(row) for row in rows])
    return ids, torch.arange(width) < length[:, None]


def read_answer_list(path: str | Path) -> list[str]:
    """The closed list of answers, each once: a JSON list of texts. Raises UserError."""
    answers = read_json(path, list, "give a JSON list of answers")
    if not answers or not all(type(a) is str and not is_blank(a) for a in answers):
        raise UserError(f"{path}: expected a JSON list of answers, each a text that is not empty")
    distinct = list(dict.fromkeys(answers))
    if len(distinct) < len(answers):
        twice = next(answer for answer, count in Counter(answers).items() if count > 1)
        more = len(answers) - len(distinct)
        warnings.warn(f"{path}: {more} answers are listed again, e.g. {twice!r}", stacklevel=2)
    return distinct


class QuestionSet:
    """The questions of an evaluation split: entries with `image`, `question`, `question_id`,
    `answer` where known.

    ids, questions, images: one of each per entry; written: the questions as the file has them.
    truth: for each id `answers` and maybe `question_type`, `answer_type`, from the entries or from
    the official annotation file `answers_file`; empty where neither has any.
    Raises UserError where an id comes twice, or some but not all questions have answers.
    """

    def __init__(
        self,
        records: Sequence[dict],
        roots: Roots,
        transform: Callable,
        max_words: int = 50,
        answers_file: str | Path | None = None,
        name: str = "questions",
    ):
        self.transform = transform
        self.ids = []
        self.questions = []
        self.images = []
        self.truth = {}
        self.written: list[str] = []
        places: dict[str, int] = {}  # of each id as text: 5 and "5" are one
        for number, record in enumerate(records):
            question = record["question_id"]
            first = places.setdefault(id_text(question), number)
            if first != number:
                raise UserError(
                    f"{name}: question_id {question} in entry {number} and in entry {first} (the first is "
                    "0); every question needs an id of its own"
                )
            self.ids.append(question)
            self.questions.append(pre_question(record["question"], max_words))
            self.written.append(record["question"])
            try:
                self.images.append(image_path(record, roots))
            except BadSample as error:
                raise UserError(f"{name}, entry {number} (the first is 0): {error}") from None
            if record.get("answer"):
                odd = odd_items(record, ("answer",))
                answers = with_texts(record, ("answer",))["answer"]
                if odd or not isinstance(answers, str | list):
                    given = odd.get("answer", answers)
                    raise UserError(
                        f"{name}, entry {number} (the first is 0): answer {brief(given)} is neither "
                        "a text nor a list of texts; fix the entry"
                    )
                if answers:
                    self.truth[question] = {"answers": as_list(answers)}
        check_image_root(next(iter(roots.values())), (str(path.absolute()) for path in self.images))
        if answers_file is not None:
            official = read_official_answers(answers_file)
            # one file may write 5 where the other has "5"
            found = {question: official.get(id_text(question)) for question in self.ids}
            self.truth = {question: known for question, known in found.items() if known}
        known = self.truth or answers_file is not None
        lacking = [question for question in self.ids if question not in self.truth] if known else []
        if lacking:
            where = answers_file or name
            raise UserError(
                f"{where}: no answers to question_id {lacking[0]} (and {len(lacking) - 1} more); add "
                "them, or leave the questions out"
            )
        self.truth = {question: self.truth[question] for question in self.ids} if self.truth else {}

    def __len__(self) -> int:
        return len(self.ids)

    def load(self, index: int) -> dict:
        """`image` uint8 [3,H,W] and `text`."""
        return {
            "image": self.transform(decode_image(self.images[index])),
            "text": self.questions[index],
        }


def read_official_answers(path: str | Path) -> dict[str, dict]:
    """VQA's annotation file {annotations: [{question_id, answers: [{answer}], question_type,
    answer_type}]}, by id as text. UserError, also for a question_id with two different entries; the
    same one again is counted and said."""
    content = read_json(path, dict, "give a file in VQA's annotation format")
    try:
        truth: dict[str, dict] = {}
        again: list[str] = []
        for entry in content["annotations"]:
            given = [person["answer"] for person in entry["answers"]]
            known = {"answers": [str(answer) for answer in given if answer is not None]}
            for key in ("question_type", "answer_type"):
                if entry.get(key) is not None:
                    known[key] = _type_name(entry[key])
            question = id_text(entry["question_id"])
            if not known["answers"]:
                continue
            if truth.setdefault(question, known) is not known:
                again.append(question)
                if truth[question] != known:
                    raise UserError(
                        f"{path}: question_id {question} has two entries that differ; remove one"
                    )
    except UserError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: not VQA's annotation format, annotations: question_id, answers: answer ({error!r})"
        ) from None
    if again:
        message = f"{path}: {len(again)} entries are listed again, e.g. of question_id {again[0]}"
        warnings.warn(message, stacklevel=2)
    return truth


def _type_name(value: object) -> str:
    if not isinstance(value, str | int):
        raise TypeError(f"a type is {brief(value)}, no text")
    return str(value)
