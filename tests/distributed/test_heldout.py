"""The loss on held-out text while training, on ranks that share segments and parameters.

It changes no weight, equals plain transformers on the weights that were saved, and a resumed run
has every measurement once.
"""

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from forked_ranks import ForkedRanks
from small_runs import losses, pack_segments, records, weights, write_config
from transformers import AutoConfig, AutoModelForCausalLM

from data_prep.heldout import pack_heldout
from longrope2.config import find_shipped
from longrope2.corpora.tokenizer import load_document_tokenizer
from longrope2.rope.window import Window
from longrope2.segments.format import Segment, SegmentStore

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

RANKS, STEPS, NUM_SEGMENTS = 4, 6, 3  # three segments do not go round two groups of ranks
TRAINING = ("training.global_batch_tokens=1024",
            f"training.tokens={1024 * STEPS}",
            "training.same_kind_segments=2", "training.final_dtype=fp32",
            f"parallel.processes={RANKS}", "parallel.sequence=2")  # fmt: skip
MEASURED = ("training.heldout_every=2", f"training.heldout_segments={NUM_SEGMENTS}")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run that measures nothing, and one that does, stopped after three steps and resumed."""
    folder = tmp_path_factory.mktemp("runs")
    pack_segments(folder, align=2, tokens=6000)
    encoder = load_document_tokenizer(find_shipped("models/tiny"))
    heldout = folder / "measured" / "3_checkpoints" / "heldout"
    pack_heldout(heldout, folder / "packed" / "1_segments", encoder, NUM_SEGMENTS)
    parts = [
        ("plain", ()),
        ("measured", (*MEASURED, "training.stop_after_step=3")),
        ("measured", MEASURED),
    ]
    with ForkedRanks(folder / "log") as ranks:
        for name, more in parts:
            config = write_config(folder, name, *TRAINING, *more)
            assert ranks.run(config, RANKS) == [0] * RANKS, ranks.printed()[-4000:]
        yield folder


def test_the_training_is_the_same_bit_for_bit(runs: Path) -> None:
    plain, measured = weights(runs, "plain"), weights(runs, "measured")
    assert plain.keys() == measured.keys()
    for name, weight in plain.items():
        assert torch.equal(weight, measured[name]), name
    own = [record for record in records(runs, "measured") if record["step"]]
    assert [(r["step"], r["train/loss"]) for r in own] == [
        (step, loss) for step, (loss, _) in losses(runs, "plain").items()
    ]


def test_measured_before_while_and_after_once(runs: Path) -> None:
    found = records(runs, "measured")
    assert [record["step"] for record in found] == list(range(STEPS + 1))
    for window in Window:
        key = f"train/heldout_loss_{window.value}"
        assert [r["step"] for r in found if key in r] == [0, 2, 4, 6]
    resumed = {r["step"]: r.get("train/resumed_after_step") for r in found}
    assert resumed == {**dict.fromkeys(range(STEPS + 1)), 4: 3}
    assert not any("heldout" in key for r in records(runs, "plain") for key in r)


def test_it_is_the_loss_of_plain_transformers(runs: Path) -> None:
    """Each document of a short segment, and each long segment, by itself under eager attention."""
    folder = runs / "measured" / "3_checkpoints"
    store = SegmentStore(folder / "heldout")
    assert len(store.short_ids) == len(store.long_ids) == NUM_SEGMENTS
    last = records(runs, "measured")[-1]
    for window, ids in ((Window.SHORT, store.short_ids), (Window.LONG, store.long_ids)):
        model, total, targets = plain_model(folder / "final", window), 0.0, 0
        for segment in map(store.segment, ids):
            for start, end in spans(segment):
                tokens = torch.from_numpy(segment.tokens[start:end].astype("int64"))
                with torch.no_grad():
                    logits = model(tokens[None]).logits[0, :-1]
                total += F.cross_entropy(logits, tokens[1:], reduction="sum").item()
                targets += end - start - 1
        assert last[f"train/heldout_loss_{window.value}"] == pytest.approx(
            total / targets, rel=1e-5
        )


def plain_model(final: Path, window: Window) -> torch.nn.Module:
    """``final/`` as transformers loads it; for long segments under its ``longrope``."""
    config = AutoConfig.from_pretrained(final)
    if window is Window.LONG:
        factors = json.loads((final / "factors.json").read_text())
        config.rope_parameters = {
            "rope_type": "longrope",
            "rope_theta": 10_000.0,
            "factor": 2.0,
            "original_max_position_embeddings": 128,
            "short_factor": [1.0] * len(factors["factors"]),
            "long_factor": factors["factors"],
            "attention_factor": factors["long_attention_scale"],
        }
        config.max_position_embeddings = 256
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    return AutoModelForCausalLM.from_pretrained(final, config=config, **options)


def spans(segment: Segment) -> list[tuple[int, int]]:
    """What is read by itself."""
    if segment.window is Window.LONG:
        return [(0, len(segment.tokens))]
    bounds = pairwise([0, *segment.doc_ends.tolist()])
    return [s for s, pad in zip(bounds, segment.doc_is_padding, strict=True) if not pad]
