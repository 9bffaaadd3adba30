"""Clusters of emulated nodes, and a folder to submit from with a site file for CPU ranks."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from emulated import ROOT, SITE, EmulatedSlurm, why_not


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like a checkout: slurm/ is a copy, which keeps logs apart; the rest is linked."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("launch", "longrope2", "data_prep", "conf", "models"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "slurm" / "logs").mkdir(parents=True)
    (folder / "slurm" / "models").mkdir()
    for script in [*(ROOT / "slurm").glob("*.sh"), *(ROOT / "slurm" / "models").glob("*.sh")]:
        copy = folder / script.relative_to(ROOT)
        copy.write_text(script.read_text())
        copy.chmod(0o755)
    (folder / "slurm" / "site.env").write_text(SITE.format(python=sys.executable))
    return folder


def _cluster(nodes: int, gpus: int) -> Iterator[EmulatedSlurm]:
    if reason := why_not():
        pytest.skip(reason)
    with EmulatedSlurm(nodes, gpus) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def large_cluster() -> Iterator[EmulatedSlurm]:
    """8 nodes of 8 GPUs."""
    yield from _cluster(8, 8)


@pytest.fixture(scope="module")
def small_cluster() -> Iterator[EmulatedSlurm]:
    """3 nodes of 2 GPUs."""
    yield from _cluster(3, 2)
