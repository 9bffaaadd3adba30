"""Question answering among distracting documents, in our own wording.

The document that answers the question stands at the depth that the sample is given (a second one, HotpotQA, anywhere);
all documents are there once and shuffled anew in every sample. The length is filled with whole documents: drawn at
random until one does not fit, then those that fit best.
"""

import bisect
import random

import numpy as np

from longrope2.errors import DataError
from longrope2.evaluation.ruler.prompts import Block, Draft, Piece, PromptEncoder
from longrope2.evaluation.ruler.qa_data import Question, QuestionSet

__all__ = ["QaDocuments", "qa_prompt"]

INSTRUCTION = "Answer the question from the documents with a few words and nothing else."
HEAD = f"{INSTRUCTION}\nDocuments:\n"


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
    encoder: PromptEncoder, documents: QaDocuments, question: Question, rng: random.Random, depth: float, budget: int
) -> Draft:
    """A prompt of at most ``budget`` tokens, BOS not counted, the first answering document at ``depth``.

    Raises:
        DataError: the budget cannot hold the answering documents, or there are too few documents to fill it.
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
    facts = {"depth": depths[0], "depths": depths, "requested_depth": depth, "question": question.text,
             "num_documents": len(others)}  # fmt: skip
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
    drawn = rng.sample(range(len(documents.sizes)), min(int(room / mean * 1.5) + 8, len(documents.sizes)))
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
