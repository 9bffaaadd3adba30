"""SIGKILL of a random rank at twenty random moments.

The run that is left is the undisturbed one, bit for bit.
"""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from forked_ranks import ForkedRanks
from small_runs import losses, pack_segments, records, write_config

from longrope2.files.artifacts import sha256_of_file

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
]  # minutes; an hour where cores are shared

KILLS = 20
STEPS = 40
RANKS = 2
# A checkpoint every second step, so that many kills meet one that is being written.
TRAINING = ("training.global_batch_tokens=512", f"training.tokens={512 * STEPS}",
            "training.checkpoint_steps=2",
            f"parallel.processes={RANKS}", f"parallel.sequence={RANKS}")  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    pack_segments(folder, align=RANKS, tokens=11_000)
    return folder


@pytest.fixture(scope="module")
def ranks(runs: Path) -> Iterator[ForkedRanks]:
    with ForkedRanks(runs / "log") as server:
        yield server


def outcome(runs: Path, name: str) -> tuple[dict[int, tuple[float, float]], str]:
    return losses(runs, name), sha256_of_file(
        runs / name / "3_checkpoints" / "final" / "model.safetensors"
    )


def random_kill(chance: random.Random) -> dict:
    """While ranks start, between steps, or while a checkpoint is written.

    The delay falls anywhere into what follows.
    """
    writing = chance.random() < 0.6
    steps = chance.choice([0, 1, 1, 2, 2, 3])
    delay = chance.uniform(0, 0.03 if writing else 0.3 if steps else 3.0)
    return {
        "rank": chance.randrange(RANKS),
        "after_steps": steps,
        "writing": writing,
        "delay": delay,
    }


def test_twenty_kills(ranks: ForkedRanks, runs: Path) -> None:
    assert ranks.run(write_config(runs, "undisturbed", *TRAINING), RANKS) == [0] * RANKS, (
        ranks.printed()[-4000:]
    )
    chance = random.Random(5)
    config = write_config(runs, "killed", *TRAINING)
    folder = config.parent
    unfinished = 0
    for number in range(KILLS):
        kill = random_kill(chance)
        codes = ranks.run(config, RANKS, kill)
        assert codes[kill["rank"]] == -9, f"kill {number} {kill} came too late: {codes}"
        unfinished += any(folder.glob(".step_*.writing"))
    assert unfinished > 0, "no kill met a checkpoint that was being written"
    assert ranks.run(config, RANKS) == [0] * RANKS, ranks.printed()[-4000:]
    assert outcome(runs, "killed") == outcome(runs, "undisturbed")
    # Every step once, though some were done again.
    assert [record["step"] for record in records(runs, "killed")] == list(range(1, STEPS + 1))
    assert "later metric records are removed" in ranks.printed(), "no step was lost and repeated"
    assert "skipping a damaged checkpoint" not in ranks.printed()
