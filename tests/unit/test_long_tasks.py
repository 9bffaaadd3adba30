"""Long tasks from local files in upstream's layout, with prompts of our own; their messages."""

import hashlib
import json
import zipfile
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError

from longrope2.errors import DataError
from longrope2.evaluation.long_tasks import tasks
from longrope2.evaluation.long_tasks.config import (
    InfiniteBenchConfig,
    LoftConfig,
    LongBenchConfig,
    LongTasksConfig,
    long_task_faults,
)
from longrope2.evaluation.long_tasks.sources import python_strings
from longrope2.evaluation.long_tasks.tasks import long_tasks
from longrope2.evaluation.prompts import PromptEncoder
from longrope2.model.loading import load_tokenizer

MINIATURE = Path(__file__).parent.parent.parent / "models" / "tiny"
LENGTH = 512


@pytest.fixture(scope="module")
def encoder():
    return PromptEncoder(load_tokenizer(MINIATURE))


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def short_hash(text):
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# LongBench


@pytest.fixture
def longbench_files(tmp_path, monkeypatch):
    prompts = {
        "trec": "Kinds:\n{context}\n{input}",
        "triviaqa": "T\n{context}\n\n{input}",
        "lcc": "C\n{context}N:\n",
        "repobench-p": "R\n{context}{input}N:\n",
    }
    monkeypatch.setattr(
        tasks, "LONGBENCH_PROMPT_HASHES", {name: short_hash(text) for name, text in prompts.items()}
    )
    (tmp_path / "checkout/LongBench/config").mkdir(parents=True)
    (tmp_path / "checkout/LongBench/config/dataset2prompt.json").write_text(json.dumps(prompts))
    row = {
        "input": "Type:",
        "context": "What is x? {City}\n" * 3,
        "answers": ["City", "Town"],
        "all_classes": None,
    }
    for task in prompts:
        classes = ["City", "Town"] if task == "trec" else None
        write_lines(
            tmp_path / f"data/{task}.jsonl",
            [row | {"all_classes": classes}, row | {"context": "word " * 900}],
        )
    return tmp_path


def longbench_config(folder, **changes):
    options = {
        "tasks": ["trec"],
        "data": str(folder / "data"),
        "prompts": str(folder / "checkout"),
    } | changes
    return LongTasksConfig(longbench=LongBenchConfig(**options))


def test_longbench_prompts_are_whole_or_cut_in_the_middle(longbench_files, encoder):
    tasks = long_tasks(
        longbench_config(longbench_files, tasks=["trec", "triviaqa", "lcc", "repobench-p"]),
        encoder,
        LENGTH,
    )
    assert [(t.suite, t.name, t.length, len(t.samples)) for t in tasks] == [
        ("longbench", name, LENGTH, 2) for name in ("trec", "triviaqa", "lcc", "repobench-p")
    ]
    whole, cut = tasks[0].samples
    assert (
        encoder.decode(whole.prompt_T[1:]).strip()
        == "Kinds:\n" + "What is x? {City}\n" * 3 + "\nType:"
    )
    assert whole.facts["tokens_cut"] == 0 and whole.prompt_T[0] == encoder.bos_ids[0]
    ids = encoder.bos_ids + encoder.encode_text("Kinds:\n" + "word " * 900 + "\nType:")
    half = (LENGTH - 64) // 2
    assert cut.prompt_T.tolist() == ids[:half] + ids[-half:]
    assert (
        cut.facts["tokens_cut"] == len(ids) - 2 * half
        and len(cut.prompt_T) + cut.max_new_tokens <= LENGTH
    )
    trec, trivia, lcc, _ = tasks
    assert (
        trec.score(whole, "\nCity and Town\nCity") == 0.5 and trec.score(whole, "Town\nCity") == 1.0
    )
    assert trivia.score(whole, "the town\nx") == 1.0 and lcc.score(whole, "# c\nTown") == 1.0


def test_a_length_that_the_answer_alone_takes_is_refused(longbench_files, encoder):
    with pytest.raises(
        DataError,
        match="suite.long_tasks.length=60 leaves no room for a prompt: an answer may take 64",
    ):
        long_tasks(longbench_config(longbench_files), encoder, 60)


def test_longbench_is_read_from_a_zip_too_and_limited(longbench_files, encoder):
    with zipfile.ZipFile(longbench_files / "data.zip", "w") as archive:
        archive.write(longbench_files / "data/trec.jsonl", "data/trec.jsonl")
    from_folder = long_tasks(longbench_config(longbench_files), encoder, LENGTH)[0]
    config = longbench_config(longbench_files, data=str(longbench_files / "data.zip"))
    assert [s.sha256 for s in long_tasks(config, encoder, LENGTH)[0].samples] == [
        s.sha256 for s in from_folder.samples
    ]
    config.num_samples = 1
    assert len(long_tasks(config, encoder, LENGTH)[0].samples) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"prompts": None},
            r"longbench.prompts is not set: the prompts are read from a checkout of "
            r"github.com/THUDM",
        ),
        (
            {"prompts": "/nowhere"},
            r"longbench.prompts=/nowhere is no checkout of github.com/THUDM/LongBench",
        ),
        (
            {"data": "/nowhere"},
            r"longbench.data=/nowhere does not exist; give a folder or zip that holds trec.jsonl",
        ),
        (
            {"tasks": ["trec"], "data": "{folder}/checkout"},
            r"checkout holds none of trec.jsonl, data/trec.jsonl; give",
        ),
        ({"data": "{folder}/empty"}, r"trec.jsonl is empty; fetch the file again"),
        ({"data": "{folder}/torn"}, r"trec.jsonl, line 1 is no JSON .* fetch the file again"),
        ({"data": "{folder}/other"}, r"trec: a row has no field 'input'; this is not LongBench v1"),
        (
            {"prompts": "{folder}/changed.json"},
            r"not the published ones: trec has SHA-256 \w{16}..., expected \w{16}",
        ),
        ({"prompts": "{folder}/none.json"}, r"not the published ones: trec is missing"),
        ({"prompts": "{folder}/torn/trec.jsonl"}, r"trec.jsonl is no JSON file"),
        ({"prompts": "{folder}/list.json"}, r"list.json holds no JSON object of prompts"),
    ],
)
def test_what_is_missing_or_wrong_is_one_message(longbench_files, encoder, changes, message):
    folder = longbench_files
    for name, content in (("empty", ""), ("torn", '{"a'), ("other", '{"context": "x"}\n')):
        (folder / name).mkdir()
        (folder / name / "trec.jsonl").write_text(content)
    (folder / "changed.json").write_text('{"trec": "Kind:\\n{context}"}')
    (folder / "none.json").write_text("{}")
    (folder / "list.json").write_text("[]")
    given = {k: v.format(folder=folder) if isinstance(v, str) else v for k, v in changes.items()}
    with pytest.raises(DataError, match=message):
        long_tasks(longbench_config(folder, **given), encoder, LENGTH)


def test_hub_faults_are_one_message(longbench_files, encoder, monkeypatch):
    config = longbench_config(longbench_files, data="org/set")

    def fail(error):
        def download(*arguments, **options):
            raise error

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)

    gated = GatedRepoError.__new__(GatedRepoError)
    fail(gated)
    with pytest.raises(
        DataError, match=r"longbench.data=org/set is gated: accept its terms on .*hf auth login"
    ):
        long_tasks(config, encoder, LENGTH)
    fail(LocalEntryNotFoundError("no network\nmore"))
    with pytest.raises(
        DataError,
        match=r"org/set: data.zip cannot be fetched from the hub \(no network\); fetch it",
    ):
        long_tasks(config, encoder, LENGTH)


def test_a_hub_archive_is_read_as_a_local_one(longbench_files, encoder, monkeypatch):
    with zipfile.ZipFile(longbench_files / "fetched.zip", "w") as archive:
        archive.write(longbench_files / "data/trec.jsonl", "data/trec.jsonl")
    asked = []

    def download(repo, file, repo_type, revision):
        asked.append((repo, file, repo_type, revision))
        return str(longbench_files / "fetched.zip")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    config = longbench_config(longbench_files, data="org/set", revision="abc")
    assert len(long_tasks(config, encoder, LENGTH)[0].samples) == 2
    assert asked == [("org/set", "data.zip", "dataset", "abc")]


# InfiniteBench


@pytest.fixture
def infinite_files(tmp_path, monkeypatch):
    kv, choice = (
        "Find.\n\n{context}\n\n{input}",
        "Read.\n{context}\nQ: {question}\n{OPTION_A}{OPTION_B}{OPTION_C}{OPTION_D}\nIt is",
    )
    hashes = {"kv_retrieval": short_hash(kv), "longbook_choice_eng": short_hash(choice)}
    monkeypatch.setattr(tasks, "INFINITEBENCH_PROMPT_HASHES", hashes)
    (tmp_path / "src").mkdir()
    (tmp_path / "src/prompt.py").write_text(
        f"import os\nother = os.sep\nyarn_mistral_templates = "
        f"{{\n    'kv_retrieval': {kv!r},  # noqa\n"
        f"    'longbook_choice_eng': {choice!r},\n    'kept out': 'a' * 3,\n}}\nraise SystemExit\n"
    )
    pairs = {f"key-{n}": f"v{n:05d}" for n in range(60)}
    rows = [
        {"context": json.dumps(pairs), "input": f"Key: key-{n}", "answer": [pairs[f"key-{n}"]]}
        for n in (0, 30, 59)
    ]
    write_lines(tmp_path / "data/kv_retrieval.jsonl", rows)
    book = {
        "context": "A book.",
        "input": "Who?",
        "answer": ["Ann"],
        "options": ["Bob", "Ann", "Cid", "Dan"],
    }
    write_lines(tmp_path / "data/longbook_choice_eng.jsonl", [book])
    return tmp_path


def infinite_config(folder, task, **changes):
    options = {"tasks": [task], "data": str(folder / "data"), "prompts": str(folder)} | changes
    return LongTasksConfig(infinitebench=InfiniteBenchConfig(**options))


def test_a_cut_that_takes_the_pair_away_is_recorded(infinite_files, encoder):
    config = infinite_config(infinite_files, "kv_retrieval")
    whole = long_tasks(config, encoder, 4096)[0]
    assert [s.facts["needle_survived"] for s in whole.samples] == [True, True, True]
    task = long_tasks(config, encoder, 400)[0]
    assert [s.facts["needle_survived"] for s in task.samples] == [
        True,
        False,
        True,
    ]  # the middle one is gone
    assert all(s.facts["tokens_cut"] > 0 and len(s.prompt_T) + 50 <= 400 for s in task.samples)
    assert (
        task.score(task.samples[0], '"v00000"') == 1.0
        and task.score(task.samples[0], "v000001") == 0.0
    )


def test_multiple_choice_knows_the_letter_and_the_text(infinite_files, encoder):
    task = long_tasks(infinite_config(infinite_files, "longbook_choice_eng"), encoder, LENGTH)[0]
    (sample,) = task.samples
    assert sample.answers == ("Ann", "B")
    # "Ann" begins with a letter of an option, and the first character decides: upstream calls it
    # wrong.
    assert [
        task.score(sample, text) for text in (" B.", "it is: Ann", "answer is: Ann", "Ann", "")
    ] == [1, 0, 1, 0, 0]
    assert encoder.decode(sample.prompt_T).endswith("BobAnnCidDan\nIt is")


def test_rows_of_another_set_are_refused(infinite_files, encoder):
    write_lines(infinite_files / "data/kv_retrieval.jsonl", [{"context": "x", "input": "y"}])
    with pytest.raises(
        DataError, match=r"kv_retrieval: a row does not fit \('answer'\); is it InfiniteBench\?"
    ):
        long_tasks(infinite_config(infinite_files, "kv_retrieval"), encoder, LENGTH)


def test_python_prompts_are_parsed_never_run(tmp_path):
    path = tmp_path / "p.py"
    path.write_text(
        'A = """\nx\n""".strip()\nB = {"k": A + "y", "l": mod.C}\nD = [1]\nE = open("z")\n'
    )
    assert python_strings(path, {"C": "c"}) == {"A": "x", "B": {"k": "xy", "l": "c"}}
    path.write_text("def (")
    with pytest.raises(DataError, match=r"p.py is no Python file"):
        python_strings(path)


# LOFT


@pytest.fixture
def loft_files(tmp_path):
    constants = tmp_path / "prompts/constants"
    constants.mkdir(parents=True)
    (constants / "common.py").write_text(
        'CORPUS_FORMAT_ECHO = "ID: {pid} | {title} | {passage} | END {pid}"\nREVERSE = (\n'
        '    "{title} -> {pid}"\n)\n'
        'FINAL_ANSWER_FORMAT = "Answer: {final_answer}"\n'
        'FEW_SHOT_SEPARATOR = "== {example_id} ==\\n"\n'
        'TEST_QUERY_SEPARATOR = "== now ==\\n"\n'
    )
    (constants / "retrieval.py").write_text(
        "from prompts.constants import common\nPROMPT_MAPPER = {'fever': 'nq'}\n"
        "FORMATTING_INSTRUCTION = 'List.'\n"
        "CORPUS_INSTRUCTION = {'nq': 'Read.', 'hotpotqa': 'Read two.'}\n"
        "CORPUS_FORMAT_ECHO = {'nq': common.CORPUS_FORMAT_ECHO, 'hotpotqa': "
        "common.CORPUS_FORMAT_ECHO}\n"
        "FEW_SHOT_EXAMPLE_COT_FORMAT_SIMPLE_REVERSE = {'nq': common.REVERSE, 'hotpotqa': "
        "common.REVERSE}\n"
        "QUERY_FORMAT_SIMPLE = {'nq': 'Give ID and TITLE.\\n"
        "q: {query}'.strip(), 'hotpotqa': 'q: {query}'}\n"
    )
    corpus = [
        {"pid": f"d{n}", "title_text": "" if n == 2 else f"T{n} ", "passage_text": f" P{n}"}
        for n in range(3)
    ]
    for task in ("nq", "fever", "hotpotqa"):
        folder = tmp_path / f"data/{task}/32k"
        write_lines(folder / "corpus.jsonl", corpus)
        write_lines(
            folder / "few_shot_queries.jsonl",
            [{"qid": "f", "query_text": " fq ", "answers": [["d2", 1]]}],
        )
        gold = [["d1", 1], ["d0", 1]] if task == "hotpotqa" else [["d1", 1]]
        write_lines(
            folder / "test_queries.jsonl",
            [{"qid": n, "query_text": f"tq{n}", "answers": gold} for n in (1, 2)],
        )
    return tmp_path


def loft_config(folder, *tasks, **changes):
    options = {
        "tasks": list(tasks),
        "data": str(folder / "data"),
        "prompts": str(folder),
        "size": "32k",
        "max_new_tokens": 20,
    } | changes
    return LongTasksConfig(loft=LoftConfig(**options))


def test_loft_prompt_is_the_corpus_the_examples_and_the_query(loft_files, encoder):
    nq, fever, hotpot = long_tasks(
        loft_config(loft_files, "nq", "fever", "hotpotqa"), encoder, LENGTH
    )
    assert encoder.decode(nq.samples[0].prompt_T[1:]).strip() == (
        "Read.\nList.\nID: 0 | T0 | P0 | END 0\nID: 1 | T1 | P1 | END 1\n"
        "ID: 2 | None | P2 | END 2\n"
        "== 1 ==\nGive TITLE and ID.\nq: fq\nNone -> 2\nAnswer: ['2']\n== now ==\n"
        "Give TITLE and ID.\nq: tq1"
    )
    assert nq.samples[0].answers == ("1",) and hotpot.samples[0].answers == ("1", "0")
    assert fever.samples[1].prompt_T.tolist() == nq.samples[1].prompt_T.tolist()
    assert [
        nq.score(nq.samples[0], text)
        for text in ("T1 -> 1\nAnswer: ['1']", "Answer: ['0', '1']", "")
    ] == [1, 0, 0]
    assert [
        hotpot.score(hotpot.samples[0], f"Answer: {ids}") for ids in (["0", "1"], ["1"], [1, 0])
    ] == [1, 0, 1]


def test_loft_is_never_cut(loft_files, encoder):
    with pytest.raises(
        DataError,
        match=r"loft/nq: a prompt of \d+ tokens and 20 new ones exceed 64 tokens, and this",
    ):
        long_tasks(loft_config(loft_files, "nq"), encoder, 64)


def test_loft_without_texts_or_constants_is_refused(loft_files, encoder):
    write_lines(
        loft_files / "data/nq/32k/corpus.jsonl",
        [{"pid": "d0", "title_text": "", "passage_text": ""}],
    )
    with pytest.raises(
        DataError,
        match=r"passage d0 has no text; LOFT ships this set without, run its preprocess.py",
    ):
        long_tasks(loft_config(loft_files, "nq"), encoder, LENGTH)
    with pytest.raises(
        DataError, match=r"retrieval.py has no 'scifact'; is it the retrieval prompts"
    ):
        long_tasks(loft_config(loft_files, "scifact"), encoder, LENGTH)
    with pytest.raises(DataError, match=r"retrieval.py is no checkout of .*common.py is missing"):
        config = loft_config(
            loft_files, "fever", prompts=str(loft_files / "prompts/constants/retrieval.py")
        )
        long_tasks(config, encoder, LENGTH)
    rows = [{"qid": "q", "query_text": "tq", "answers": [["d9", 1]]}]
    write_lines(loft_files / "data/hotpotqa/32k/test_queries.jsonl", rows)
    with pytest.raises(
        DataError,
        match="hotpotqa: 'd9' is in no passage or row; are corpus and queries of one LOFT",
    ):
        long_tasks(loft_config(loft_files, "hotpotqa"), encoder, LENGTH)


def test_faults_of_the_settings_are_reported_together():
    config = LongTasksConfig(
        length=9000,
        num_samples=0,
        longbench=LongBenchConfig(tasks=["trek"]),
        loft=LoftConfig(tasks=["nq"], size="64k", max_new_tokens=0),
    )
    faults = "\n".join(long_task_faults(config, 8192))
    for part in (
        "longbench.tasks=['trek'] must be distinct names out of triviaqa, trec",
        "length=9000 must be from 1 to target_len=8192",
        "num_samples=0 must be at least 1",
        "longbench.prompts is not set: its prompts are read from a checkout",
        "loft.prompts is not set",
        "loft.data is not set",
        "loft.size must be 32k, 128k or 1m",
        "loft.max_new_tokens=0",
    ):
        assert part in faults
    assert long_task_faults(LongTasksConfig(), 8192) == []
