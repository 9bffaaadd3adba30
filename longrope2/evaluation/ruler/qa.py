"""Question answering among distracting documents, in our own wording.

The document that answers the question stands at the depth that the sample is given (a second one,
HotpotQA, anywhere); all documents are there once and shuffled anew in every sample. The length is
filled with whole documents: drawn at random until one does not fit, then those that fit best.

Questions with documents from SQuAD and HotpotQA: their official JSON files, or the hub.
"""

import bisect
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from longrope2.errors import DataError
from longrope2.evaluation.prompts import Block, Draft, Piece, PromptEncoder

HUB = "hub"
SQUAD_HUB = "rajpurkar/squad_v2"
HOTPOTQA_HUB = "hotpotqa/hotpot_qa"
INSTRUCTION = "Answer the question from the documents with a few words and nothing else."
HEAD = f"{INSTRUCTION}\nDocuments:\n"


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        text: The question.
        answers: Accepted answers.
        gold: Documents that answer it, indices into the set's documents.
        given: All documents that the data set shows with it, gold ones included (HotpotQA adds
            eight distractors).
        related: Further documents of the same article (SQuAD), which RULER takes as distractors
            first.
    """

    text: str
    answers: tuple[str, ...]
    gold: tuple[int, ...]
    given: tuple[int, ...]
    related: tuple[int, ...] = ()


@dataclass(frozen=True)
class QuestionSet:
    """All answerable questions and all documents of a data set; documents are distinct and sorted."""

    questions: list[Question]
    documents: list[str]


def read_squad(source: str) -> QuestionSet:
    """SQuAD v2 ``dev-v2.0.json`` (or ``hub``), without the questions that have no answer.

    Raises:
        DataError: the file is missing or laid out differently, or the hub cannot be reached; names
            ``ruler.squad``.
    """
    articles = _squad_from_hub() if source == HUB else _read(source, "squad", "dev-v2.0.json")
    try:
        articles = articles["data"]
        documents = sorted(
            {paragraph["context"] for article in articles for paragraph in article["paragraphs"]}
        )
        number_of = {document: number for number, document in enumerate(documents)}
        questions = []
        for article in articles:
            numbers = [number_of[paragraph["context"]] for paragraph in article["paragraphs"]]
            for paragraph, number in zip(article["paragraphs"], numbers, strict=True):
                related = tuple(other for other in numbers if other != number)
                questions += [
                    Question(
                        qa["question"],
                        tuple(a["text"] for a in qa["answers"]),
                        (number,),
                        (number,),
                        related,
                    )
                    for qa in paragraph["qas"]
                    if not qa["is_impossible"]
                ]
    except (KeyError, TypeError) as error:
        raise DataError(
            f"ruler.squad={source} is not laid out like SQuAD's dev-v2.0.json: {error!r}"
        ) from None
    return _checked(QuestionSet(questions, documents), "squad", source)


def read_hotpotqa(source: str) -> QuestionSet:
    """HotpotQA ``hotpot_dev_distractor_v1.json`` (or ``hub``).

    Raises:
        DataError: the file is missing or laid out differently, or the hub cannot be reached; names
            ``ruler.hotpotqa``.
    """
    entries = (
        _hotpotqa_from_hub()
        if source == HUB
        else _read(source, "hotpotqa", "hotpot_dev_distractor_v1.json")
    )
    try:
        documents = sorted(
            {_hotpot_document(*context) for entry in entries for context in entry["context"]}
        )
        number_of = {document: number for number, document in enumerate(documents)}
        questions = []
        for entry in entries:
            titles = {title for title, _ in entry["supporting_facts"]}
            given = tuple(number_of[_hotpot_document(*context)] for context in entry["context"])
            titled = zip(given, (title for title, _ in entry["context"]), strict=True)
            gold = tuple(number for number, title in titled if title in titles)
            questions.append(Question(entry["question"], (entry["answer"],), gold, given))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"ruler.hotpotqa={source} is not laid out like hotpot_dev_distractor_v1.json: {error!r}"
        ) from None
    return _checked(QuestionSet(questions, documents), "hotpotqa", source)


def _hotpot_document(title: str, sentences: Iterable[str]) -> str:
    """A document as RULER shows it: its title on a line of its own."""
    return f"{title}\n{''.join(sentences)}"


def _checked(questions: QuestionSet, key: str, source: str) -> QuestionSet:
    """The set, if it holds questions, each with answers and documents."""
    if not questions.questions or any(not q.answers or not q.gold for q in questions.questions):
        raise DataError(
            f"ruler.{key}={source} holds no questions, or some without answers or documents"
        )
    return questions


def _read(source: str, key: str, name: str) -> Any:
    """A JSON file."""
    path = Path(source)
    if not path.is_file():
        raise DataError(
            f"ruler.{key}={source}: no such file; give the official {name}, or `hub` to load it from the hub"
        )
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"ruler.{key}={source} is not readable JSON: {error}") from None


def _from_hub(name: str, key: str, official: str, *config: str) -> Iterable[dict[str, Any]]:
    """Rows of a data set's validation split."""
    import datasets

    try:
        return datasets.load_dataset(name, *config, split="validation")  # type: ignore[return-value]
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"ruler.{key}=hub: {name} cannot be loaded from the hub ({reason}); give the official {official} as a file"
        ) from None


def _squad_from_hub() -> dict[str, Any]:
    """The hub's rows in the layout of the official file."""
    articles: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in _from_hub(SQUAD_HUB, "squad", "dev-v2.0.json"):
        answers = [{"text": text} for text in row["answers"]["text"]]
        entry = {"question": row["question"], "answers": answers, "is_impossible": not answers}
        articles.setdefault(row["title"], {}).setdefault(row["context"], []).append(entry)
    return {
        "data": [
            {
                "paragraphs": [
                    {"context": context, "qas": entries} for context, entries in paragraphs.items()
                ]
            }
            for paragraphs in articles.values()
        ]
    }


def _hotpotqa_from_hub() -> list[dict[str, Any]]:
    """The hub's rows in the layout of the official file."""
    return [
        {
            "question": row["question"],
            "answer": row["answer"],
            "context": list(zip(row["context"]["title"], row["context"]["sentences"], strict=True)),
            "supporting_facts": list(
                zip(
                    row["supporting_facts"]["title"],
                    row["supporting_facts"]["sent_id"],
                    strict=True,
                )
            ),
        }
        for row in _from_hub(
            HOTPOTQA_HUB, "hotpotqa", "hotpot_dev_distractor_v1.json", "distractor"
        )
    ]


class QaDocuments:
    """Questions with all documents tokenized once.

    Args:
        questions: Questions and documents.
        encoder: Tokenizer of the prompts.
    """

    def __init__(self, questions: QuestionSet, encoder: PromptEncoder) -> None:
        self.questions = questions.questions
        texts = [" ".join(document.split()) + "\n" for document in questions.documents]
        self.blocks = [
            Block(np.asarray(ids, dtype=np.int32), lambda text=text: text, len(text))
            for text, ids in zip(texts, encoder.encode_pieces(texts), strict=True)
        ]
        self.sizes = np.array([len(block.ids_T) for block in self.blocks])
        self.by_size = np.argsort(self.sizes, kind="stable")
        self.sorted_sizes = self.sizes[self.by_size].tolist()
        self._orders: dict[tuple[int, int], list[int]] = {}

    def question(self, index: int, seed: int) -> Question:
        """Question of a sample: all are used once, in an order drawn from the seed, before one comes again."""
        turn, place = divmod(index, len(self.questions))
        order = self._orders.get((seed, turn))
        if order is None:
            order = self._orders[seed, turn] = list(range(len(self.questions)))
            random.Random(f"questions/{seed}/{turn}").shuffle(order)
        return self.questions[order[place]]


def qa_prompt(
    encoder: PromptEncoder,
    documents: QaDocuments,
    question: Question,
    rng: random.Random,
    depth: float,
    budget: int,
) -> Draft:
    """A prompt of at most ``budget`` tokens, BOS not counted, the first answering document at
    ``depth``.

    Raises:
        DataError: the budget cannot hold the answering documents, or there are too few documents to
            fill it.
    """
    tail = [f"{INSTRUCTION}\n", f"Question: {' '.join(question.text.split())}\n", "Answer:"]
    room = budget - encoder.fixed_total([HEAD, *tail])
    given = [*question.gold, *(number for number in question.given if number not in question.gold)]
    chosen, used = _choose(encoder, documents, question.gold, given, rng, room)
    if len(chosen) == len(documents.blocks):
        raise DataError(
            f"its {len(chosen)} documents hold {used} tokens, too few to fill {room} with each used once; use a larger "
            "set of documents or shorter lengths"
        )
    rng.shuffle(chosen)
    first = question.gold[0]
    others = [number for number in chosen if number != first]
    others.insert(round(depth * len(others)), first)
    headers = [f"Document {place}:\n" for place in range(1, len(others) + 1)]
    sizes = documents.sizes[others] + encoder.count(headers)
    starts = dict(zip(others, (np.cumsum(sizes) - sizes).tolist(), strict=True))
    pieces: list[Piece] = [HEAD]
    for header, number in zip(headers, others, strict=True):
        pieces += [header, documents.blocks[number]]
    depths = [starts[number] / int(sizes.sum()) for number in question.gold]
    facts = {
        "depth": depths[0],
        "depths": depths,
        "requested_depth": depth,
        "question": question.text,
        "num_documents": len(others),
    }
    return Draft([*pieces, *tail], tuple(dict.fromkeys(question.answers)), facts)


def _choose(
    encoder: PromptEncoder,
    documents: QaDocuments,
    gold: tuple[int, ...],
    given: list[int],
    rng: random.Random,
    room: int,
) -> tuple[list[int], int]:
    """Documents that fit ``room`` with their headers, gold ones first, and the tokens that they take."""
    chosen: list[int] = []
    used = 0
    taken: set[int] = set()

    def fits(number: int) -> bool:
        nonlocal used
        size = int(documents.sizes[number]) + encoder.total([f"Document {len(chosen) + 1}:\n"])
        if number in taken or used + size > room:
            return False
        chosen.append(number)
        taken.add(number)
        used += size
        return True

    for number in gold:
        if not fits(number):
            raise DataError(
                f"the length is too short for qa: {room} tokens are left for its documents; use a longer one"
            )
    mean = float(documents.sizes.mean())
    drawn = rng.sample(
        range(len(documents.sizes)), min(int(room / mean * 1.5) + 8, len(documents.sizes))
    )
    for number in [*given[len(gold) :], *drawn]:
        if number not in taken and not fits(number):
            break
    largest = bisect.bisect_right(documents.sorted_sizes, room - used)
    while largest > 0:
        largest -= 1
        candidate = int(documents.by_size[largest])
        if candidate not in taken:
            fits(candidate)
            largest = min(largest, bisect.bisect_right(documents.sorted_sizes, room - used))
    return chosen, used
