"""Question answering among distracting documents, in our own wording.

Questions and documents are those of SQuAD and HotpotQA: their official JSON files, or the hub. The
document that answers the question stands at the depth that the sample is given (a second one,
HotpotQA, anywhere); all documents are there once and shuffled anew in every sample. The length is
filled with whole documents: drawn at random until one does not fit, then those that fit best.
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
from longrope2.evaluation.prompts import Block, Draft, Piece, PromptEncoder, too_short
from longrope2.evaluation.ruler.config import RulerConfig
from longrope2.evaluation.ruler.haystacks import texts_sha256

HUB = "hub"
_SQUAD_FILE, SQUAD_HUB = "dev-v2.0.json", "rajpurkar/squad_v2"
_HOTPOTQA_FILE, HOTPOTQA_HUB = "hotpot_dev_distractor_v1.json", "hotpotqa/hotpot_qa"
HUB_REVISIONS = {
    SQUAD_HUB: "3ffb306f725f7d2ce8394bc1873b24868140c412",
    HOTPOTQA_HUB: "1908d6afbbead072334abe2965f91bd2709910ab",
}
"""Commits of the hub's data sets that are read, so that a later change of theirs is no other
score."""
NUM_QUESTIONS = {"qa_1": 5_928, "qa_2": 7_405}
"""Questions with an answer in the official files."""
_INSTRUCTION = "Answer the question from the documents with a few words and nothing else."
_HEADER = "Document {}:\n"
_HEAD = f"{_INSTRUCTION}\nDocuments:\n"


@dataclass(frozen=True)
class SetQuestion:
    """One question of a data set; numbers are indices into the set's documents."""

    text: str
    answers: tuple[str, ...]
    gold: tuple[int, ...]
    """Documents that answer it."""
    given: tuple[int, ...]
    """All that the data set shows with it, gold ones included (HotpotQA adds eight distractors)."""
    related: tuple[int, ...] = ()
    """Further ones of the same article (SQuAD), which RULER takes as distractors first."""


@dataclass(frozen=True)
class QuestionSet:
    """The answerable questions and all documents of a data set, the latter distinct and sorted."""

    questions: list[SetQuestion]
    documents: list[str]

    @property
    def sha256(self) -> str:
        """Hash over questions, answers and documents."""
        asked = [text for question in self.questions for text in (question.text, *question.answers)]
        return texts_sha256([*asked, *self.documents])


def read_questions(task: str, config: RulerConfig) -> QuestionSet:
    """The data set of ``qa_1`` or ``qa_2``.

    Raises:
        DataError: the file is missing or laid out differently, or the hub cannot be reached; names
            ``ruler.squad`` or ``ruler.hotpotqa``.
    """
    if task == "qa_1":
        return read_squad(str(config.squad))
    return read_hotpotqa(str(config.hotpotqa))


def read_squad(source: str) -> QuestionSet:
    """SQuAD v2 ``dev-v2.0.json`` (or ``hub``), without the questions that have no answer."""
    squad = _squad_from_hub() if source == HUB else _read_json(source, "squad", _SQUAD_FILE)
    try:
        # One article: its paragraphs.
        articles = [article["paragraphs"] for article in squad["data"]]
        contexts = {paragraph["context"] for article in articles for paragraph in article}
        documents = sorted(contexts)
        number_of = {document: number for number, document in enumerate(documents)}
        questions = []
        for article in articles:
            numbers = [number_of[paragraph["context"]] for paragraph in article]
            for paragraph, number in zip(article, numbers, strict=True):
                related = tuple(other for other in numbers if other != number)
                for qa in paragraph["qas"]:
                    if not qa["is_impossible"]:
                        answers = tuple(answer["text"] for answer in qa["answers"])
                        places = {"gold": (number,), "given": (number,), "related": related}
                        questions.append(SetQuestion(qa["question"], answers, **places))
    except (KeyError, TypeError) as error:
        fault = f"ruler.squad={source} is not laid out like SQuAD's {_SQUAD_FILE}: {error!r}"
        raise DataError(fault) from None
    return _checked(QuestionSet(questions, documents), "squad", source)


def read_hotpotqa(source: str) -> QuestionSet:
    """HotpotQA ``hotpot_dev_distractor_v1.json`` (or ``hub``)."""
    at_hub = source == HUB
    entries = _hotpotqa_from_hub() if at_hub else _read_json(source, "hotpotqa", _HOTPOTQA_FILE)
    try:
        contexts = [context for entry in entries for context in entry["context"]]
        documents = sorted({_hotpot_document(*context) for context in contexts})
        number_of = {document: number for number, document in enumerate(documents)}
        questions = []
        for entry in entries:
            supporting = {title for title, _ in entry["supporting_facts"]}
            given = tuple(number_of[_hotpot_document(*context)] for context in entry["context"])
            titled = zip(given, entry["context"], strict=True)
            gold = tuple(number for number, (title, _) in titled if title in supporting)
            questions.append(SetQuestion(entry["question"], (entry["answer"],), gold, given))
    except (KeyError, TypeError, ValueError) as error:
        fault = f"ruler.hotpotqa={source} is not laid out like {_HOTPOTQA_FILE}: {error!r}"
        raise DataError(fault) from None
    return _checked(QuestionSet(questions, documents), "hotpotqa", source)


def _hotpot_document(title: str, sentences: Iterable[str]) -> str:
    """A document as RULER shows it: its title on a line of its own."""
    return f"{title}\n{''.join(sentences)}"


def _checked(found: QuestionSet, key: str, source: str) -> QuestionSet:
    if not found.questions or any(not q.answers or not q.gold for q in found.questions):
        fault = "holds no questions, or some without answers or documents"
        raise DataError(f"ruler.{key}={source} {fault}")
    return found


def _read_json(source: str, key: str, official: str) -> Any:
    path = Path(source)
    if not path.is_file():
        way_out = f"give the official {official}, or `hub` to load it from the hub"
        raise DataError(f"ruler.{key}={source}: no such file; {way_out}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"ruler.{key}={source} is not readable JSON: {error}") from None


def _hub_rows(name: str, key: str, official: str, *config: str) -> Iterable[dict[str, Any]]:
    import datasets

    try:
        revision = HUB_REVISIONS[name]
        return datasets.load_dataset(name, *config, split="validation", revision=revision)  # type: ignore[return-value]
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        fault = f"ruler.{key}=hub: {name} cannot be loaded from the hub ({reason})"
        raise DataError(f"{fault}; give the official {official} as a file") from None


def _squad_from_hub() -> dict[str, Any]:
    """The hub's rows in the layout of the official file."""
    articles: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in _hub_rows(SQUAD_HUB, "squad", _SQUAD_FILE):
        answers = [{"text": text} for text in row["answers"]["text"]]
        entry = {"question": row["question"], "answers": answers, "is_impossible": not answers}
        articles.setdefault(row["title"], {}).setdefault(row["context"], []).append(entry)
    data = []
    for paragraphs in articles.values():
        listed = [{"context": context, "qas": entries} for context, entries in paragraphs.items()]
        data.append({"paragraphs": listed})
    return {"data": data}


def _hotpotqa_from_hub() -> list[dict[str, Any]]:
    """The hub's rows in the layout of the official file."""
    entries = []
    for row in _hub_rows(HOTPOTQA_HUB, "hotpotqa", _HOTPOTQA_FILE, "distractor"):
        context, facts = row["context"], row["supporting_facts"]
        entry = {name: row[name] for name in ("question", "answer")}
        entry["context"] = list(zip(context["title"], context["sentences"], strict=True))
        entry["supporting_facts"] = list(zip(facts["title"], facts["sent_id"], strict=True))
        entries.append(entry)
    return entries


class QaDocuments:
    """Questions with all documents tokenized once."""

    def __init__(self, found: QuestionSet, encoder: PromptEncoder) -> None:
        self.questions = found.questions
        self.sha256 = found.sha256
        texts = [" ".join(document.split()) + "\n" for document in found.documents]
        self.blocks = [
            Block(np.asarray(ids, dtype=np.int32), lambda text=text: text, len(text))
            for text, ids in zip(texts, encoder.encode_pieces(texts), strict=True)
        ]
        self.sizes = np.array([len(block.ids_T) for block in self.blocks])
        self.by_size = np.argsort(self.sizes, kind="stable")
        self.sorted_sizes = self.sizes[self.by_size].tolist()
        self._orders: dict[tuple[int, int], list[int]] = {}

    def question(self, index: int, seed: int) -> SetQuestion:
        """Question of a sample: each is used once, in a drawn order, before one comes again."""
        turn, place = divmod(index, len(self.questions))
        if (seed, turn) not in self._orders:
            order = self._orders[seed, turn] = list(range(len(self.questions)))
            random.Random(f"questions/{seed}/{turn}").shuffle(order)
        return self.questions[self._orders[seed, turn][place]]


def qa_prompt(
    encoder: PromptEncoder,
    documents: QaDocuments,
    question: SetQuestion,
    rng: random.Random,
    depth: float,
    budget: int,
) -> Draft:
    """A prompt of at most ``budget`` tokens, BOS not counted, the first gold one at ``depth``.

    Raises:
        DataError: the budget cannot hold the answering documents, or there are too few documents to
            fill it.
    """
    tail = [f"{_INSTRUCTION}\n", f"Question: {' '.join(question.text.split())}\n", "Answer:"]
    room = budget - encoder.fixed_total([_HEAD, *tail])
    chosen, used = _choose(encoder, documents, question, rng=rng, room=room)
    if len(chosen) == len(documents.blocks):
        fault = f"its {len(chosen)} documents hold {used} tokens, too few to fill {room}"
        way_out = "use a larger set of documents or shorter lengths"
        raise DataError(f"{fault} with each used once; {way_out}")
    rng.shuffle(chosen)
    first = question.gold[0]
    order = [number for number in chosen if number != first]
    order.insert(round(depth * len(order)), first)
    headers = [_HEADER.format(place) for place in range(1, len(order) + 1)]
    sizes = documents.sizes[order] + encoder.count(headers)
    starts = dict(zip(order, (np.cumsum(sizes) - sizes).tolist(), strict=True))
    pieces: list[Piece] = [_HEAD]
    for header, number in zip(headers, order, strict=True):
        pieces += [header, documents.blocks[number]]
    depths = [starts[number] / int(sizes.sum()) for number in question.gold]
    facts = {"depth": depths[0], "depths": depths, "requested_depth": depth}
    facts |= {"question": question.text, "num_documents": len(order)}
    return Draft([*pieces, *tail], tuple(dict.fromkeys(question.answers)), facts)


def _choose(
    encoder: PromptEncoder,
    documents: QaDocuments,
    question: SetQuestion,
    rng: random.Random,
    room: int,
) -> tuple[list[int], int]:
    """Documents that fit ``room`` with their headers, gold ones first, and their tokens."""
    chosen: list[int] = []
    taken: set[int] = set()
    used = 0

    def fits(number: int) -> bool:
        nonlocal used
        size = int(documents.sizes[number]) + encoder.total([_HEADER.format(len(chosen) + 1)])
        if number in taken or used + size > room:
            return False
        chosen.append(number)
        taken.add(number)
        used += size
        return True

    if not all(fits(number) for number in question.gold):
        raise too_short("qa", room, "its documents")
    given = [number for number in question.given if number not in question.gold]
    num_documents, mean = len(documents.sizes), float(documents.sizes.mean())
    drawn = rng.sample(range(num_documents), min(int(room / mean * 1.5) + 8, num_documents))
    for number in [*given, *drawn]:
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
