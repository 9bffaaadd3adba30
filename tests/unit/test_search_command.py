"""``launch.search`` on a random miniature, from its overrides to its product, reused or refused."""

import itertools
import json
import math
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from launch import search as command
from longrope2.corpora import needle_wording
from longrope2.corpora.build import heldout_documents
from longrope2.corpora.config import CorpusConfig, CorpusKind
from longrope2.corpora.haystacks import halve_documents
from longrope2.corpora.needles import build_needle_set
from longrope2.errors import ArtifactError, ConfigError, DataError
from longrope2.files.artifacts import read_manifest
from longrope2.files.lease import only_writer
from longrope2.model.factors_source import RopeConfig, resolve_factors
from longrope2.model.loading import load_to_run, load_tokenizer, rope_geometry
from longrope2.model.shape import ModelShape
from longrope2.rope.factors import RescaleFactors
from longrope2.rope.frequencies import RopeGeometry
from longrope2.rope.hf_config import to_hf_config
from longrope2.rope.methods import RopeMethod, closed_form_factors
from longrope2.search.config import SearchConfig
from longrope2.search.confirm import Confirmation, Contestant, Kind, Standing
from longrope2.search.objective import SampleLosses
from longrope2.search.prepare import _other_seed, rows_that_fit
from longrope2.search.run import Found, chosen_factors
from longrope2.segments.needle_set import NeedleSet

TOKENIZER_FOLDER = Path(__file__).parents[2] / "models" / "tiny"
GEOMETRY = RopeGeometry(16, 1e4, 128)
SearchRun = Callable[..., Path]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with the miniature's tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        initializer_range=0.3,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for file in TOKENIZER_FOLDER.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough files for some to be held out."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(240):
        words = " ".join(f"word{number}x{place}" for place in range(60))
        (folder / f"text{number}.txt").write_text(words)
    return folder


@pytest.fixture
def search(
    tmp_path: Path, model_folder: Path, corpus_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> SearchRun:
    """Run the command with overrides; returns the product folder."""

    def run(*overrides: str) -> Path:
        settings = [
            "model=tiny",
            f"model.path={model_folder}",
            "model.name=tiny",
            "target_len=256",
            "corpus=folder",
            f"corpus.folder={corpus_folder}",
            f"run.root={tmp_path}",
            "run.name=test",
            "tracking.wandb=disabled",
            "search.population=5",
            "search.iterations=2",
            "search.parents=2",
            "search.num_samples=2",
            "search.max_needle_ppl_at_original=1e30",
            "search.min_needle_loss_gain=-1e9",
            "search.min_needle_loss_gain_at_target=null",
            "search.fresh_samples=8",
        ]
        monkeypatch.setattr("sys.argv", ["launch.search", *settings, *overrides])
        command.main()
        return tmp_path / "test" / "2_factors"

    return run


# Of a round: where an evaluation stops may depend on other workers.
COSTS = ("num_losses", "num_terminated")


def contents(folder: Path) -> dict[str, Any]:
    """All that must not depend on how often a search was interrupted, nor on the workers."""
    history = json.loads((folder / "history.json").read_text())
    del history["budget"]
    history["rounds"] = [
        {k: v for k, v in entry.items() if k not in COSTS} for entry in history["rounds"]
    ]
    return {"factors": (folder / "factors.json").read_bytes(), "history": history}


def test_product(search: SearchRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = search()
    factors = resolve_factors(RopeConfig(), GEOMETRY, 256, tmp_path / "test")
    history = json.loads((folder / "history.json").read_text())
    manifest = read_manifest(folder, "factors")
    kept = [tuple(each["factors"]) for each in history["kept"]]
    fresh = history["fresh"]["contestants"]
    found = next(c for c in fresh if c["name"] == history["fresh"]["found"])
    assert factors.factors == tuple(found["factors"]) and factors.factors in kept
    assert factors.critical_index == history["kept"][kept.index(factors.factors)]["critical_index"]
    assert {"none", "pi", "ntk", "ntk_aware", "dynamic_ntk", "yarn", "llama3"} <= {
        contestant["name"] for contestant in fresh if contestant["kind"] == "closed form"
    }
    assert sum(history["critical_index_shares"].values()) == pytest.approx(1)
    assert set(map(int, history["critical_index_shares"])) <= {1, 2, 3}
    assert (
        history["best_value"] == history["kept"][0]["value"] == history["rounds"][-1]["best_value"]
    )
    assert [entry["iteration"] for entry in history["rounds"]] == [0, 1, 2]
    assert manifest.counts["num_candidates"] == history["rounds"][-1]["num_candidates"] == 9
    assert set(manifest.files) == {
        *("factors.json", "history.json", "needles.arrow", "needles.json"),
        *("fresh_needles.arrow", "fresh_needles.json"),
    }
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["search/best_needle_ppl"] for record in metrics] == [
        r["best_value"] for r in history["rounds"]
    ]
    assert {"search/critical_index", "search/evaluations"} <= metrics[-1].keys()
    text = capsys.readouterr().out
    assert "budget     at most 9 candidates, 4,608 forward tokens" in text
    assert "end        the best 8 against every closed form on 16 fresh samples of 256 tok" in text
    assert re.search(r"found 1( \*)? +│ +1.00 │ +[0-9.e+]+ │", text)
    assert f"critical index {history['critical_index']} (theoretical 3)\nbest critical ind" in text
    assert text.rstrip().endswith(factors.provenance["verdict"])
    assert f"{history['fresh']['found']} *" in text
    for name in ("factors", "search", "fresh"):
        assert (folder / f"{name}.svg").read_text().count("<svg") == 1


def test_without_fresh_samples_the_factors_say_so(search: SearchRun) -> None:
    folder = search("search.fresh_samples=0")
    factors = RescaleFactors.from_json((folder / "factors.json").read_text())
    history = json.loads((folder / "history.json").read_text())
    assert factors.provenance["verdict"] == "not compared on fresh samples"
    assert factors.factors == tuple(history["kept"][0]["factors"])
    assert history["fresh"] is None and not (folder / "fresh.svg").exists()
    assert not (folder / "fresh.jsonl").exists()


def test_fresh_samples_share_no_text_and_no_key(
    search: SearchRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With so few keys (30, of which 24 are used) that two sets share some unless they must not."""
    monkeypatch.setattr(needle_wording, "ADJECTIVES", ["red", "big", "old", "wet", "odd"])
    monkeypatch.setattr(needle_wording, "NOUNS", ["cat", "cup", "hat", "pen", "sea", "sun"])
    folder = search("search.num_samples=4", "search.fresh_samples=8", "search.lengths=[0.5,1]")
    names = ("needles.json", "needles_128.json", "fresh_needles.json")
    texts = [(folder / name).read_text() for name in names]
    keys = [set(re.findall(r'"key": "([a-z-]+)"', text)) for text in texts]
    assert [len(found) for found in keys] == [4, 4, 16]
    assert not keys[2] & (keys[0] | keys[1])
    # A cut document's parts have the same file, and another hash of their text.
    books = [set(re.findall(r'"text_sha256": "(\w+)"', text)) for text in texts]
    assert books[2] and not books[2] & (books[0] | books[1])


def test_what_did_best_on_fresh_samples_is_written() -> None:
    """The second of the found ones; what is known of the first stays with it."""
    plain = closed_form_factors(RopeMethod.none, GEOMETRY, 256)
    found = [
        Found(replace(plain, factors=(*plain.factors[:-1], last)), value)
        for last, value in ((20.0, 1.1), (21.0, 1.2))
    ]
    contestant = Contestant("found 2", Kind.found, found[1].factors)
    confirmation = Confirmation(
        standings=(Standing(contestant, (0.7,), (0.5,)),),
        winner=contestant,
        found=contestant,
        closed_form=Contestant("yarn", Kind.closed_form, plain),
        difference=-0.5,
        interval=(-0.7, -0.3),
        num_losses=2,
    )
    config = SimpleNamespace(search=SearchConfig(), model=SimpleNamespace(name="tiny"))
    losses = SimpleNamespace(samples=[])
    prepared: Any = SimpleNamespace(config=config, losses=losses, long_factors=None)
    chosen = chosen_factors(prepared, found, confirmation, None)
    assert chosen.factors == found[1].factors.factors
    assert chosen.provenance["needle_ppl"] == "1.2"
    assert float(chosen.provenance["fresh_needle_ppl"]) == pytest.approx(math.exp(0.5))
    assert chosen.provenance["verdict"].startswith("confirmed: ")
    assert chosen_factors(prepared, found, None, None).factors == found[0].factors.factors


def test_search_by_halving(search: SearchRun, capsys: pytest.CaptureFixture[str]) -> None:
    small = ("search.population=12", "search.iterations=1", "search.parents=2")
    given = ("search=halving", *small, "search.mutations=4", "search.lengths=[0.5,1]")
    folder = search(*given)
    factors = RescaleFactors.from_json((folder / "factors.json").read_text())
    history = json.loads((folder / "history.json").read_text())
    assert (factors.method, factors.critical_index) == ("halving", None)
    assert history["critical_index"] is history["critical_index_shares"] is None
    # L = 256: samples of 64 tokens are too short for a needle, so the settings give 0.5 and 1.
    assert [entry["rung"] for entry in history["rounds"]] == [0, 1, 2] * 2
    lines = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()[1:]]
    tokens = {number: length for number, length in enumerate([128, 128, 256, 256])}
    assert history["budget"]["forward_tokens"] == sum(tokens[line["batch"]] for line in lines)
    assert history["budget"]["num_candidates"] <= 16
    assert "an attention scale of 1 .. 1.14" in capsys.readouterr().out


def test_budget_report(
    search: SearchRun, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = search("search.num_samples=3", "search.projected_gpus=4", "search.projected_tflops=10")
    budget = json.loads((folder / "history.json").read_text())["budget"]
    lines = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()[1:]]
    assert budget["num_forwards"] == sum(len(line["losses"]) for line in lines)
    assert budget["num_forwards"] + budget["num_forwards_saved"] == 3 * (budget["num_candidates"])
    assert budget["forward_tokens"] == 256 * budget["num_forwards"]
    fresh = [json.loads(line) for line in (folder / "fresh.jsonl").read_text().splitlines()[1:]]
    assert budget["confirm_tokens"] == 256 * len(fresh) > 0
    # Two layers of q, k, v, o (32 x 32 each) and a gated MLP (3 x 32 x 32), and two causal products
    # of width 32.
    flops = 2 * (2 * (7 * 32 * 32) * 256 + 2 * 32 * 256**2)
    num = budget["num_forwards"] + len(fresh)
    assert budget["projected_hours"] == pytest.approx(flops * num / 40e12 / 3600)
    assert (
        f"{budget['num_forwards']} forward passes ({budget['forward_tokens']:,} tokens)"
        in capsys.readouterr().out
    )
    assert read_manifest(folder, "factors").counts == budget


@pytest.mark.parametrize(
    ("name", "with_needle"), [("needle_ppl_at_original", True), ("control_ppl_at_original", False)]
)
def test_self_test_runs_inside_the_original_window(
    search: SearchRun, model_folder: Path, corpus_folder: Path, name: str, with_needle: bool
) -> None:
    history = json.loads((search("search.fresh_samples=0") / "history.json").read_text())
    folder = CorpusConfig(name="folder", kind=CorpusKind.folder, folder=str(corpus_folder))
    texts = halve_documents(heldout_documents(folder), 0)[0]
    needles = build_needle_set(
        load_tokenizer(model_folder),
        texts,
        length=128,
        depths=[0.0],
        num_samples=2,
        seed=_other_seed(0, 128, unseen=False),
        with_needle=with_needle,
    )
    plain = AutoModelForCausalLM.from_pretrained(model_folder)
    assert history[name] == pytest.approx(plain_needle_ppl(plain, needles), rel=1e-3)


def plain_needle_ppl(plain: PreTrainedModel, needles: NeedleSet) -> float:
    """Needle perplexity by transformers' own loss; all values have the same number of tokens."""
    losses = []
    for sample in needles.samples:
        labels_BT = torch.from_numpy(sample.through_value)[None].clone()
        labels_BT[:, : sample.value_start] = -100
        with torch.no_grad():
            losses.append(
                plain(torch.from_numpy(sample.through_value)[None], labels=labels_BT).loss.item()
            )
    return math.exp(sum(losses) / len(losses))


def test_best_value_is_that_of_the_factors_in_plain_transformers(
    search: SearchRun, model_folder: Path
) -> None:
    folder = search("search.fresh_samples=0")
    factors = RescaleFactors.from_json((folder / "factors.json").read_text())
    config = LlamaConfig(
        **{**LlamaConfig.from_pretrained(model_folder).to_dict(), **to_hf_config(factors)}
    )
    plain = LlamaForCausalLM.from_pretrained(model_folder, config=config)
    ppl = plain_needle_ppl(plain, NeedleSet.load(folder / "needles.arrow"))
    assert json.loads((folder / "history.json").read_text())["best_value"] == pytest.approx(
        ppl, rel=1e-3
    )


def test_finished_search_is_not_repeated(
    search: SearchRun, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(search())
    monkeypatch.setattr("longrope2.search.run.run_search", None)
    capsys.readouterr()
    assert contents(search("tracking.project=other")) == before
    text = capsys.readouterr().out
    assert "already complete: " in text
    assert "found 1" in text


@pytest.mark.parametrize(
    ("at", "num_logged"), [(20, 1), pytest.param(30, 3, marks=pytest.mark.slow)]
)
def test_killed_search_is_resumed(
    search: SearchRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, num_logged: int
) -> None:
    """In the second round, and among the fresh samples."""
    whole = contents(search("run.name=whole").parents[1] / "whole" / "2_factors")
    original, calls = SampleLosses.rows, []

    def killed(self: SampleLosses, pairs: Sequence[tuple[RescaleFactors, int]]) -> list[float]:
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return original(self, pairs)

    monkeypatch.setattr(SampleLosses, "rows", killed)
    with pytest.raises(KeyboardInterrupt):
        search()
    folder = tmp_path / "test" / "2_factors"
    assert not (folder / "factors.json").exists()
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == num_logged
    search()
    assert contents(folder) == whole
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["iteration"] for record in metrics] == [0, 1, 2]


def test_frozen_needles_are_used_again(search: SearchRun) -> None:
    folder = search()
    needles = NeedleSet.load(folder / "needles.arrow")
    frozen = (folder / "needles.arrow").read_bytes()
    assert (needles.length, len(needles.samples)) == (256, 2)
    (folder / "manifest.json").unlink()
    samples = needles.samples[::-1]  # a set that could not be drawn again
    NeedleSet(samples, 256).save(folder / "needles.arrow")
    with pytest.raises(
        ArtifactError, match="journal.jsonl belongs to another search: samples_sha256 was"
    ):
        search()
    (folder / "journal.jsonl").unlink()
    search()
    assert (folder / "needles.arrow").read_bytes() != frozen


def test_first_generation_search_of_both_windows(
    search: SearchRun, tmp_path: Path, capsys: Any
) -> None:
    small = (
        "search.population=5",
        "search.iterations=2",
        "search.parents=2",
        "search.num_samples=2",
        "search.mutations=2",
        "search.crossovers=2",
    )
    folder = search("search=longrope", *small)
    long = RescaleFactors.from_json((folder / "factors.json").read_text())
    assert (long.method, long.critical_index, long.provenance["critical"]) == (
        "longrope",
        None,
        "none",
    )
    assert all(1 <= a <= b <= 2.5 for a, b in itertools.pairwise(long.factors))
    assert "space      no critical index; every factor 1 .. 2.5" in capsys.readouterr().out
    (tmp_path / "long.json").write_text(long.to_json())
    search(
        "search=longrope",
        *small,
        "run.name=both",
        f"search.short_window_of={tmp_path / 'long.json'}",
    )
    both = RescaleFactors.from_json((tmp_path / "both" / "2_factors" / "factors.json").read_text())
    history = json.loads((tmp_path / "both" / "2_factors" / "history.json").read_text())
    assert both.factors == long.factors
    assert both.short_factors == tuple(history["kept"][0]["factors"])
    assert history["sample_len"] == 128
    assert "short_ppl" in both.provenance


def test_short_window_of_a_missing_file(search: SearchRun, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="search.short_window_of: rope.method=from_file needs a factors file"
    ):
        search("search=longrope", f"search.short_window_of={tmp_path / 'none.json'}")


def test_plain_perplexity_objective(search: SearchRun) -> None:
    folder = search("search.objective=perplexity", "search.dims=all")
    history = json.loads((folder / "history.json").read_text())
    assert (history["value_name"], history["needle_ppl_at_original"]) == ("ppl", None)
    assert not (folder / "needles.arrow").exists()
    assert "search/best_ppl" in (folder / "metrics.jsonl").read_text()


def test_dry_run_writes_nothing(search: SearchRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert not search("dry_run=true").exists()
    assert (
        "space      critical index 1, 2, 3; factors 2 .. 4 from it up; dims=tail"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("given", "gpus", "said"),
    [
        ((), 0, "how long that takes is unknown without a GPU here (search.projected_gpus=N"),
        ((), 8, " h on 1 GPU at 125 TFLOP/s each"),
        (("parallel.processes=4",), 2, " h on 2 GPUs at 125 TFLOP/s each"),
        (("search.projected_gpus=16",), 0, " h on 16 GPUs at 125 TFLOP/s each"),
    ],
)
def test_time_is_told_of_gpus_that_there_are_or_that_were_named(
    search: SearchRun,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    given: tuple[str, ...],
    gpus: int,
    said: str,
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    search("dry_run=true", *given)
    assert said in capsys.readouterr().out


def test_a_search_that_is_at_work(search: SearchRun, tmp_path: Path) -> None:
    with (
        only_writer(tmp_path / "test", "2_factors"),
        pytest.raises(ArtifactError, match="2_factors is being written by .*; wait until it has"),
    ):
        search()
    assert not (tmp_path / "test" / "2_factors").exists()


def test_other_configuration_is_refused(search: SearchRun) -> None:
    before = contents(folder := search())
    with pytest.raises(
        ConfigError, match=r"(?s)search.population was 5, now it is 6: .*use another run.name"
    ):
        search("search.population=6")
    assert contents(folder) == before


def test_other_weights_are_refused(search: SearchRun, model_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(model_folder, copy)
    folder = search(f"model.path={copy}")
    weights = load_file(copy / "model.safetensors")
    save_file(
        {name: value + 1 for name, value in weights.items()},
        copy / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(ArtifactError, match="was searched with another model: weights_sha256 was"):
        search(f"model.path={copy}")
    (folder / "manifest.json").unlink()
    with pytest.raises(
        ArtifactError, match="journal.jsonl belongs to another search: weights_sha256 was"
    ):
        search(f"model.path={copy}")


def test_model_that_cannot_retrieve_is_refused(search: SearchRun, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match="needle perplexity at 128 tokens.*use search.objective=perplexity"
    ):
        search("search.max_needle_ppl_at_original=3")
    assert not (tmp_path / "test").exists()


def test_a_target_where_nothing_can_be_ranked_is_refused(search: SearchRun, tmp_path: Path) -> None:
    """A random model knows as little with the needle as without."""
    with pytest.raises(DataError) as error:
        search("search.min_needle_loss_gain_at_target=0.5", "search.num_samples=6")
    text = str(error.value)
    assert text.startswith("the objective cannot rank candidates at 256 tokens: under the best one")
    assert "_loss_gain_at_target=0.5; guessing the digits gives 7.4 with" in text
    assert "Use a shorter target_len first, noise instead of books" in text
    assert not list(tmp_path.rglob("factors.json")), "no factors that look like a result"


@pytest.mark.parametrize(
    ("gibibytes", "length", "rows"),
    # Half of the memory less 145,568 parameters over 4 (8 x 32 + 3 x 32) bytes a token, and at
    # most 131,072 tokens.
    [(80, 128, 1024), (80, 131072, 1), (80, 262144, 1), (0.003, 128, 5)],
)
def test_rows_of_a_forward_fit_the_device(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, gibibytes: float, length: int, rows: int
) -> None:
    geometry = rope_geometry(model_folder, 128)
    model = load_to_run(model_folder, closed_form_factors(RopeMethod.none, geometry, 256))
    shape = ModelShape.from_folder(model_folder)
    assert rows_that_fit(model, shape, length) == 1, "on a CPU"
    device = SimpleNamespace(total_memory=gibibytes * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    assert rows_that_fit(model, shape, length) == rows


def test_model_and_target_have_no_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["launch.search"])
    with pytest.raises(ConfigError, match=r"(?s)model=NAME, one of .*tiny.*target_len=VALUE"):
        command.main()


def test_all_faults_at_once(search: SearchRun, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        search(
            "target_len=200", "search.grid=0.7", "corpus.folder=nowhere", f"model.path={tmp_path}"
        )
    faults = "\n".join(error.value.faults)
    assert len(error.value.faults) == 4
    assert (
        "target_len=200 must be a multiple of model.original_len=128, and at least twice" in faults
    )
    assert "search.grid=0.7" in faults
    assert "corpus.folder=nowhere" in faults
    assert f"model.path={tmp_path} holds no config.json" in faults
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("override", "text"),
    [
        (
            "target_len=128",
            "target_len=128 must be a multiple of model.original_len=128, and at least twice that; "
            "use for example 256",
        ),
        ("model.original_len=0", "model.original_len=0 is not a window"),
        ("parallel.processes=0", "parallel.processes=0 must be above 0"),
        (
            "parallel.context=0",
            "parallel.sequence=1 and parallel.context=0 must both be at least 1",
        ),
        (
            "parallel.context=2",
            "parallel.sequence=1 x parallel.context=2 = 2 does not divide 1 processes; their "
            r"product may be \[1\]",
        ),
        ("parallel.sequence=3", "parallel.sequence=3 cannot share 2 query and 2 key/value heads"),
        ("search.critical=8", "search.critical=8: must be null or a cosine index, 0 .. 7"),
        ("search.objectve=needle", "search.objectve"),
        ("search.objective=needles", "needles.*needle, perplexity"),
    ],
)
def test_single_faults(search: SearchRun, override: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        search(override)
