"""RULER as upstream makes it: the same draws as its code, prompts of a checkout that are known.

Its prompts are not ours to ship, so these tests bring prompts of their own with the same fields.
FROZEN holds hashes of what the generators of NVIDIA/RULER (as of 2026-07: binary search, answer
prefix counted, input less answer for fwe) gave for them with the miniature's tokenizer, word lists
and texts of ours, and a sentence splitter in place of NLTK's.
"""

import hashlib
import json
import re
from functools import partial

import pytest
import ruler_fixtures as fixtures
from transformers import AutoTokenizer

from longrope2.errors import ArtifactError, DataError
from longrope2.evaluation.prompts import PromptEncoder
from longrope2.evaluation.ruler import upstream, upstream_draws
from longrope2.evaluation.ruler.config import RULER_TASKS, RulerMode
from longrope2.evaluation.ruler.haystacks import ADJECTIVES, NOUNS
from longrope2.evaluation.ruler.tasks import ruler_tasks
from longrope2.evaluation.ruler.upstream import UpstreamRuler
from longrope2.evaluation.ruler.upstream_draws import PROMPT_SHA256, Streams, read_prompts

PROMPTS = {
    "niah": ("Some magic {type_needle_v} are hidden; what are all of them?\n"
             "{context}\nWhat are all for {query}?", " The {type_needle_v} for {query} are"),
    "variable_tracking": ("Keep track of the assignments.\n\n{context}\nWho holds {query}?",
                          " Reply: {num_v} hold {query}: "),
    "common_words_extraction": ("Numbered words.\n{context}\nWhich ten lead?", " Reply:"),
    "freq_words_extraction": ("Coded words. {context}\nWhich three lead?", " Reply:"),
    "qa": ("Documents.\n\n{context}\n\nQuestion: {query}", " Reply:"),
}  # fmt: skip
FROZEN = {
    2048: {
        "niah_single_1": "f04f00703f1c2bf6", "niah_single_2": "e65c3399c7db6432",
        "niah_single_3": "5c3647062e86043e",
        "niah_multikey_1": "b2de09acc123cae4", "niah_multikey_2": "fb4278c6f976df61",
        "niah_multikey_3": "39fb063a8e80917b",
        "niah_multivalue": "1e0d10e7e7d07b7b", "niah_multiquery": "1165ac9ed8689511",
        "vt": "42f01ea8c8dcd17a",
        "cwe": "da2dd63f332c7c09", "fwe": "f2b2820cf229695e",
    },
    6000: {
        "niah_single_1": "8015e1f769a483b3", "niah_single_2": "f499b0cd4af69571",
        "niah_single_3": "e32cc6b3a267c6bb",
        "niah_multikey_1": "78fc177d33e1014c", "niah_multikey_2": "8ff3d6a740c8f7c7",
        "niah_multikey_3": "b59a75b9ed3724dd",
        "niah_multivalue": "443292e2c326561c", "niah_multiquery": "5effbe603472cefd",
        "vt": "96bad7b7f8077a00",
        "cwe": "fc66e54887a8d949", "fwe": "7621ef141ea161e6", "qa_1": "e6939afee2f9d769",
        "qa_2": "211059cab39fa5ed",
    },
}  # fmt: skip


def sentences(text):
    return re.split(r"(?<=\.) ", text)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder laid out like RULER's, with our prompts."""
    folder = tmp_path_factory.mktemp("RULER")
    data = folder / "scripts" / "data" / "synthetic"
    (data / "json").mkdir(parents=True)
    tasks = {
        name: {"tokens_to_generate": 1, "template": t, "answer_prefix": p}
        for name, (t, p) in PROMPTS.items()
    }
    (data / "constants.py").write_text(
        f"TASKS = {tasks!r}\nraise SystemExit('it must not be run')\n"
    )
    (data / "json" / "PaulGrahamEssays.json").write_text(
        json.dumps({"text": "\n".join(fixtures.essays())})
    )
    (data / "json" / "english_words.json").write_text(
        json.dumps({str(n): f"further{n}" for n in range(6000)})
    )
    lists = {
        "nounlist.txt": NOUNS,
        "adjectivelist.txt": ADJECTIVES,
        "verblist.txt": fixtures.FILLER,
    }
    for name, words in lists.items():
        (folder / name).write_text("\n".join(words) + "\n")
    return folder


@pytest.fixture
def own_prompts(monkeypatch):
    """Our prompts count as the known ones."""
    hashes = {
        name: tuple(hashlib.sha256(part.encode()).hexdigest()[:16] for part in parts)
        for name, parts in PROMPTS.items()
    }
    monkeypatch.setattr(upstream_draws, "PROMPT_SHA256", hashes)
    monkeypatch.setattr(upstream, "_sentences", sentences)


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    return fixtures.question_files(tmp_path_factory.mktemp("questions"))


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained("models/tiny")


def config(checkout, questions, **fields):
    where = {
        "mode": RulerMode.upstream,
        "upstream_checkout": str(checkout),
        "wordlists": str(checkout),
    }
    return fixtures.config(questions, **where, **fields)


@pytest.mark.usefixtures("own_prompts")
@pytest.mark.parametrize("length", [2048, pytest.param(6000, marks=pytest.mark.slow)])
def test_the_draws_are_upstreams(checkout, questions, tokenizer, length):
    ruler = UpstreamRuler(config(checkout, questions), PromptEncoder(tokenizer))
    assert set(FROZEN[6000]) == set(RULER_TASKS)
    assert {task: sha256_of(ruler.texts(task, length)) for task in FROZEN[length]} == FROZEN[length]


def sha256_of(texts):
    return hashlib.sha256(json.dumps([list(row) for row in texts]).encode()).hexdigest()[:16]


@pytest.mark.usefixtures("own_prompts")
def test_samples_hold_bos_and_the_prompt(tmp_path, checkout, questions, tokenizer):
    names = ["niah_single_1", "cwe", "qa_2"]
    settings = config(checkout, questions, tasks=names)
    tasks = ruler_tasks(settings, tokenizer, [], [3000], cache_folder=tmp_path, workers=2)
    ruler = UpstreamRuler(settings, PromptEncoder(tokenizer))
    for task in tasks:
        for sample, (text, answers, used) in zip(
            task.samples, ruler.texts(task.name, 3000), strict=True
        ):
            assert sample.prompt_T.tolist() == [
                tokenizer.bos_token_id,
                *tokenizer.encode(text, add_special_tokens=False),
            ]
            assert list(sample.answers) == answers
            total = len(sample.prompt_T) + sample.max_new_tokens
            assert total <= 3000 and total == min(used + 1, 3000)
    assert tasks[2].score(tasks[2].samples[0], "it is HUE0, I know") == 1.0


@pytest.mark.usefixtures("own_prompts")
def test_bos_over_the_length_is_taken_off_the_answer(checkout, questions, tokenizer):
    ruler = UpstreamRuler(config(checkout, questions, num_samples=1), PromptEncoder(tokenizer))
    (_, _, used), *_ = ruler.texts("niah_single_1", 2048)
    # At exactly its length RULER has no room for BOS.
    (sample,) = ruler._make("niah_single_1", used, 0, 1)
    assert sample.facts["bos_over"] == 1 and sample.max_new_tokens == 127
    assert len(sample.prompt_T) + sample.max_new_tokens == used


@pytest.mark.usefixtures("own_prompts")
@pytest.mark.parametrize("task", ["niah_multikey_2", "vt", "cwe", "qa_1"])
def test_lengths_at_which_upstream_never_ends_are_refused(
    tmp_path, checkout, questions, tokenizer, task
):
    with pytest.raises(DataError, match=rf"{task} at 256 tokens: the length is too short"):
        ruler_tasks(
            config(checkout, questions, tasks=[task]), tokenizer, [], [256], cache_folder=tmp_path
        )


@pytest.mark.usefixtures("own_prompts")
def test_lists_are_drawn_until_one_fits_as_upstream_does(checkout, questions, tokenizer):
    """Words differ in length: at the border the smallest list fits in one draw of hundreds."""
    settings = config(checkout, questions, num_samples=1)
    ruler = UpstreamRuler(settings, PromptEncoder(tokenizer))
    draw = ruler._size_search("cwe", 2048, Streams(42)).generate
    sizes = [ruler._count(draw(0, 10)[0]) for _ in range(400)]
    first = next(n for n, size in enumerate(sizes) if n > 150 and size < min(sizes[:n]))
    length = sizes[first] + 120
    again = ruler._size_search("cwe", 2048, Streams(42)).generate
    _, answers, used = ruler._sample(partial(again, 0), 10, 10, length=length, new_tokens=120)
    assert used == length and len(answers) == 10


@pytest.mark.usefixtures("own_prompts")
def test_questions_whose_documents_do_not_fit_are_explained(checkout, questions, tokenizer):
    """RULER tries 2,048 tokens of qa_2 for ever where a question's own documents take more."""
    ruler = UpstreamRuler(config(checkout, questions, num_samples=1), PromptEncoder(tokenizer))
    draw = ruler._size_search("qa_2", 2048, Streams(42)).generate
    needed = ruler._count(draw(0, 10)[0]) + 32
    with pytest.raises(DataError) as raised:
        ruler.texts("qa_2", 1000)
    assert str(raised.value) == (
        "the length is too short: with its answer RULER's smallest prompt (10 documents, which "
        f"must hold those of its question) took {needed} tokens at least in 100 tries, and 1000 "
        "are allowed; "
        "RULER itself would go on drawing for ever; use a longer one, or suite.ruler.mode=fixed, "
        "whose prompts get smaller"
    )


@pytest.mark.usefixtures("own_prompts")
def test_a_prompt_that_cannot_be_drawn_is_no_prompt_that_is_too_long(
    checkout, questions, tokenizer
):
    def fails(size):
        raise ValueError

    ruler = UpstreamRuler(config(checkout, questions), PromptEncoder(tokenizer))
    with pytest.raises(
        DataError, match=r"smallest prompt \(size 7\) cannot be drawn \(100 tries f"
    ):
        ruler._sample(fails, 27, 10, length=2048, new_tokens=0)


def test_prompts_that_are_not_rulers_are_refused(checkout):
    template = PROMPTS["niah"][0]
    found = hashlib.sha256(template.encode()).hexdigest()[:16]
    with pytest.raises(
        ArtifactError,
        match=rf"template of niah is not RULER's \(SHA-256 {found}..., expected b373c00e2",
    ):
        read_prompts(checkout)
    assert (
        set(PROMPT_SHA256) == set(PROMPTS)
        and len({part for pair in PROMPT_SHA256.values() for part in pair}) == 10
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "holds no scripts/data/synthetic/constants.py; give a checkout"),
        ("X = 1", "defines no TASKS"),
        ("TASKS = f()", "cannot be read"),
        (
            "TASKS = {'niah': {'template': 'x'}}",
            "TASKS has no template and answer_prefix of niah; use RULER of 2025-06",
        ),
    ],
)
def test_a_checkout_without_prompts_is_named(tmp_path, text, words):
    if text is not None:
        (tmp_path / "scripts/data/synthetic").mkdir(parents=True)
        (tmp_path / "scripts/data/synthetic/constants.py").write_text(text)
    with pytest.raises(DataError, match=words):
        read_prompts(tmp_path)


@pytest.mark.usefixtures("own_prompts")
def test_missing_lists_and_essays_are_named(tmp_path, checkout, questions, tokenizer, monkeypatch):
    def texts(task, **fields):
        return UpstreamRuler(config(checkout, questions, **fields), PromptEncoder(tokenizer)).texts(
            task, 2048
        )

    settings = config(checkout, questions)
    settings.wordlists = str(tmp_path)
    with pytest.raises(DataError, match="ruler.wordlists=.* holds no nounlist.txt"):
        UpstreamRuler(settings, PromptEncoder(tokenizer)).texts("cwe", 2048)
    with pytest.raises(
        DataError, match="mode=upstream needs RULER's essays: .*none.json is not there"
    ):
        texts("niah_single_2", essays=str(tmp_path / "none.json"))
    with pytest.raises(DataError, match="there are 600 questions; use fewer samples"):
        texts("qa_1", num_samples=601)
    monkeypatch.undo()
    monkeypatch.setitem(__import__("sys").modules, "nltk.tokenize", None)
    with pytest.raises(DataError, match="cuts essays with NLTK: `pip install nltk`"):
        upstream._sentences("One. Two.")
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    with pytest.raises(
        DataError, match="needs the word lists of wonderwords: `pip install wonderwords==3.0.1`"
    ):
        upstream_draws.read_upstream_words(checkout, None)
