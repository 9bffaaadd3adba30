"""Filters: which documents of a corpus are read at all, by what is recorded of them.

``corpus.filters`` is a list; a document has to pass all of it. What a filter drops is counted by
its rule and reason among the records that are left out, in the result, the manifest and the
report. Filters stand in front of everything else: of held-out text, of needle documents' haystacks
and of estimates too, so a run trains and is measured on the same kind of text.

``minimum_length`` counts characters. ``language`` and the rules by quality signals compare what the
corpus has published of a document; nothing is computed anew. The quality signals are those of
RedPajama-Data-V2 [arXiv 2411.12372, and the card of its hub repository]: a file beside every shard
of documents, one line a document, a list of (start, end, score) per signal; one that tells of lines
stands here for the mean of its scores.

``gopher``: quality filtering of Rae et al. [arXiv 2112.11446, appendix A.1.1]. Its rule of at least
two stop words cannot be told from the signals and is left out. It drops documents of more than
100,000 words, the longest there are: ``signal`` states single bounds instead.
``gopher_repetition``: n-gram thresholds of its table A1; those on repeated lines and paragraphs
have no signal. ``c4``: the rules of Raffel et al. [arXiv 1910.10683, section 2.2] on whole pages;
those on single lines change a text and are left out.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from longrope2.corpora.config import CorpusConfig, CorpusKind, FilterConfig, FilterRule
from longrope2.corpora.corpus import Corpus, Document, Split, Unit
from longrope2.corpora.losses import Losses

LANGUAGE, LANGUAGE_SCORE = "language", "language_score"
# Which sources have published what.
WITH_LANGUAGE = (CorpusKind.redpajama_v2.value, CorpusKind.fineweb_edu.value)
WITH_SIGNALS = (CorpusKind.redpajama_v2.value,)


@dataclass(frozen=True)
class Bound:
    """From ``least`` to ``most`` of one signal, both included."""

    signal: str
    least: float = float("-inf")
    most: float = float("inf")


PUBLISHED = {
    FilterRule.gopher: (
        Bound("rps_doc_word_count", 50, 100_000),
        Bound("rps_doc_mean_word_length", 3, 10),
        Bound("rps_doc_symbol_to_word_ratio", most=0.1),
        Bound("rps_lines_start_with_bulletpoint", most=0.9),
        Bound("rps_doc_frac_lines_end_with_ellipsis", most=0.3),
        Bound("rps_doc_frac_no_alph_words", most=0.2),
    ),
    FilterRule.gopher_repetition: (
        Bound("rps_doc_frac_chars_top_2gram", most=0.20),
        Bound("rps_doc_frac_chars_top_3gram", most=0.18),
        Bound("rps_doc_frac_chars_top_4gram", most=0.16),
        Bound("rps_doc_frac_chars_dupe_5grams", most=0.15),
        Bound("rps_doc_frac_chars_dupe_6grams", most=0.14),
        Bound("rps_doc_frac_chars_dupe_7grams", most=0.13),
        Bound("rps_doc_frac_chars_dupe_8grams", most=0.12),
        Bound("rps_doc_frac_chars_dupe_9grams", most=0.11),
        Bound("rps_doc_frac_chars_dupe_10grams", most=0.10),
    ),
    FilterRule.c4: (
        Bound("rps_doc_lorem_ipsum", most=0),
        Bound("rps_doc_curly_bracket", most=0),
        Bound("rps_doc_ldnoobw_words", most=0),
        Bound("rps_doc_num_sentences", least=3),
    ),
}


def bounds_of(rule: FilterConfig) -> tuple[Bound, ...]:
    """What a rule asks of quality signals."""
    if rule.rule is FilterRule.signal:
        least = float("-inf") if rule.least is None else rule.least
        most = float("inf") if rule.most is None else rule.most
        return (Bound(rule.signal or "", least, most),)
    return PUBLISHED.get(rule.rule, ())


def filter_faults(config: CorpusConfig) -> Iterator[str]:
    """What is wrong with the list of a corpus, each fault naming its key and what is allowed."""
    kinds = config.members if config.kind is CorpusKind.mix else [config.kind]
    for number, rule in enumerate(config.filters):
        key = f"corpus.filters[{number}]"
        yield from (f"{key}.{fault}" for fault in _value_faults(rule))
        needs, published = _needs(rule)
        read = rule.sources or [kind.value for kind in kinds]
        if needs and (without := [source for source in read if source not in published]):
            yield (
                f"{key}: {rule.rule.value} goes by {needs}, which {', '.join(without)} has not; "
                f"name some of {', '.join(published)} in its sources"
            )
    has_tail = "tail" in config.redpajama_v2.partitions and CorpusKind.redpajama_v2 in kinds
    if has_tail and any(map(bounds_of, config.filters)):
        partitions = "corpus.redpajama_v2.partitions"
        yield f"{partitions}: of tail no quality signals are published; leave it out, or the filter"


def _needs(rule: FilterConfig) -> tuple[str, tuple[str, ...]]:
    """What a rule goes by that not every source has, and which have it."""
    if rule.rule is FilterRule.language:
        return "a recorded language", WITH_LANGUAGE
    return ("quality signals", WITH_SIGNALS) if bounds_of(rule) else ("", ())


def _value_faults(rule: FilterConfig) -> Iterator[str]:
    match rule.rule:
        case FilterRule.minimum_length if rule.characters < 1:
            yield f"characters={rule.characters}: minimum_length needs characters=N, at least 1"
        case FilterRule.language if not rule.languages:
            yield "languages is empty: name codes as the corpus has them, for example [en]"
        case FilterRule.signal:
            if not rule.signal:
                yield "signal is not set: name one, for example rps_doc_word_count"
            if rule.least is None and rule.most is None:
                yield "least and most are both null: give at least one of them"
    if not 0.0 <= rule.score <= 1.0:
        yield f"score={rule.score} is outside [0, 1]"


def recorded_names(filters: Sequence[FilterConfig], source: str) -> tuple[str, ...]:
    """What the adapter of a source has to tell of its documents, for the filters."""
    names: set[str] = set()
    for rule in filters:
        if not rule.sources or source in rule.sources:
            names |= {bound.signal for bound in bounds_of(rule)}
            if rule.rule is FilterRule.language:
                names |= {LANGUAGE, LANGUAGE_SCORE}
    return tuple(sorted(names))


def score_of(signals: Mapping[str, Any], name: str) -> float | None:
    """A signal as one number: its score, or the mean over lines; None where it is not told."""
    triples = signals.get(name)
    if not isinstance(triples, list) or not triples:
        return None
    scores = [triple[2] for triple in triples if isinstance(triple, list) and len(triple) == 3]
    numbers = [score for score in scores if isinstance(score, int | float)]
    return sum(numbers) / len(numbers) if numbers else None


def reason_against(rule: FilterConfig, document: Document) -> str | None:
    """Why a document is dropped, with the rule's name in front; None where it passes."""
    if rule.sources and document.source not in rule.sources:
        return None
    told, name = document.recorded or {}, f"filter {rule.rule.value}"
    if rule.rule is FilterRule.minimum_length:
        short = len(document.text) < rule.characters
        return f"{name}: fewer than {rule.characters:,} characters" if short else None
    if rule.rule is FilterRule.language:
        if told.get(LANGUAGE) is None:
            return f"{name}: no language recorded"
        if told[LANGUAGE] not in rule.languages:
            return f"{name}: not {', '.join(rule.languages)}"
        unsure = rule.score and (told.get(LANGUAGE_SCORE) or 0.0) < rule.score
        return f"{name}: score below {rule.score:g}" if unsure else None
    for bound in bounds_of(rule):
        score = told.get(bound.signal)
        if score is None:
            return f"{name}: no {bound.signal} recorded"
        if score < bound.least:
            return f"{name}: {bound.signal} below {bound.least:g}"
        if score > bound.most:
            return f"{name}: {bound.signal} above {bound.most:g}"
    return None


class FilteredCorpus:
    """A corpus without the documents that its filters drop."""

    def __init__(self, corpus: Corpus, filters: Sequence[FilterConfig]) -> None:
        self._corpus, self._filters = corpus, tuple(filters)
        self.heldout_fraction = corpus.heldout_fraction

    @property
    def sources(self) -> tuple[str, ...]:
        """Those of the corpus."""
        return self._corpus.sources

    def reserved(self) -> Iterator[Document]:
        """Held out by the corpus itself, whatever the filters say: never packed in any case."""
        return self._corpus.reserved()

    def units(self) -> Sequence[Unit]:
        """Those of the corpus."""
        return self._corpus.units()

    def read(self, unit: Unit, skipped: Losses) -> Iterator[Document]:
        """Documents of one unit that pass; the others are counted by rule and reason."""
        return self._passing(self._corpus.read(unit, skipped), skipped)

    def documents(self, split: Split, skipped: Losses | None = None) -> Iterator[Document]:
        """Documents of one split that pass."""
        skipped = Losses() if skipped is None else skipped
        return self._passing(self._corpus.documents(split, skipped), skipped)

    def describe(self) -> dict[str, Any]:
        """What the corpus is; the filters stand in its configuration."""
        return self._corpus.describe()

    def _passing(self, documents: Iterator[Document], skipped: Losses) -> Iterator[Document]:
        for document in documents:
            reasons = (reason_against(rule, document) for rule in self._filters)
            reason = next(filter(None, reasons), None)
            if reason is None:
                yield document
            else:
                skipped[reason] += 1
