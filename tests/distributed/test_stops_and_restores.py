"""A stop in the middle of a step, and a restore that is slow, or stuck: two real ranks, ZeRO-3."""

import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from forked_ranks import ForkedRanks
from small_runs import losses, pack_segments, records, write_config

from longrope2.command import HANG_EXIT_CODE, REQUEUE_EXIT_CODE
from longrope2.files.artifacts import sha256_of_file

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

RANKS, STEPS = 2, 4
TRAINING = ("training.global_batch_tokens=2048", f"training.tokens={2048 * STEPS}",
            "training.checkpoint_steps=1000", "training.same_kind_segments=4",
            f"parallel.processes={RANKS}", f"parallel.sequence={RANKS}",
            "parallel.replicate_below=0")  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    pack_segments(folder, align=RANKS, tokens=6_000)
    return folder


@pytest.fixture(scope="module")
def ranks(runs: Path) -> Iterator[ForkedRanks]:
    with ForkedRanks(runs / "log") as server:
        yield server


def test_stopped_between_micro_steps(ranks: ForkedRanks, runs: Path) -> None:
    """A signal in micro-step 3 of 8 of step 3: saved before micro-step 4, and resumed exactly."""
    undisturbed = write_config(runs, "undisturbed", *TRAINING)
    assert ranks.run(undisturbed, RANKS) == [0] * RANKS, ranks.printed()[-4000:]
    config, before = write_config(runs, "stopped", *TRAINING), len(ranks.printed())
    stop = {"name": "stop_signal", "rank": 1, "step": 3, "phase": "micro-step 3 of 8"}
    codes = ranks.run(config, RANKS, before=stop | {"number": int(signal.SIGUSR1)})
    printed = ranks.printed()[before:]
    assert codes == [REQUEUE_EXIT_CODE] * RANKS, printed[-4000:]
    for rank in range(RANKS):
        marks = re.findall(rf"rank {rank} step 3: micro-step (\d)", printed)
        assert marks == ["1", "2", "3"], "it is obeyed before the next micro-step"
    stopped_after_2 = "stopped by a stop signal to another rank after step 2, all of it saved"
    assert stopped_after_2 in printed
    folder = config.parent
    assert [path.name for path in folder.glob("step_*")] == ["step_00000002"]
    before = len(ranks.printed())
    assert ranks.run(config, RANKS) == [0] * RANKS, ranks.printed()[-4000:]
    assert f"going on after step 2 of {STEPS}" in ranks.printed()[before:]
    assert losses(runs, "stopped") == losses(runs, "undisturbed")
    assert [record["step"] for record in records(runs, "stopped")] == list(range(1, STEPS + 1))
    weights = [c.parent / "final" / "model.safetensors" for c in (config, undisturbed)]
    assert sha256_of_file(weights[0]) == sha256_of_file(weights[1])


@pytest.fixture(scope="module")
def half_done(ranks: ForkedRanks, runs: Path) -> Path:
    """The configuration of a run with a checkpoint of half its steps and a short hang limit."""
    config = write_config(runs, "half", *TRAINING, "training.stop_after_step=2")
    assert ranks.run(config, RANKS) == [0] * RANKS, ranks.printed()[-4000:]
    return write_config(runs, "half", *TRAINING, "training.hang_timeout_s=30")


def test_a_stuck_restore_is_named(ranks: ForkedRanks, half_done: Path) -> None:
    before = len(ranks.printed())
    codes = ranks.run(half_done, RANKS, before={"name": "stuck_hash"})
    printed = ranks.printed()[before:]
    assert HANG_EXIT_CODE in codes and 0 not in codes, printed[-4000:]
    assert "no progress for training.hang_timeout_s=30 s" in printed
    assert re.search(
        r"1 of 2 ranks are behind:\n  rank 1 .*: step 0, verifying checkpoints, for", printed
    )


def test_a_slow_restore_is_not_ended(ranks: ForkedRanks, half_done: Path) -> None:
    """Both ranks hash their half for more than twice the hang limit, and read all the time."""
    checkpoint = half_done.parent / "step_00000002"
    chunks = sum(path.stat().st_size for path in checkpoint.iterdir()) / 2**19
    before = len(ranks.printed())
    codes = ranks.run(half_done, RANKS, before={"name": "slow_hash", "seconds": 140 / chunks})
    printed = ranks.printed()[before:]
    assert codes == [0] * RANKS, printed[-4000:]
    assert "hashed " in printed and "no progress" not in printed
