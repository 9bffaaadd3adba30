"""From a corpus to shards: tokenize in rounds, plan, pack; every step resumes where it was interrupted.

Intermediate files stand beside the shards, in a folder named by the fingerprint of configuration and inputs, so a run finds
its own and never another's; they are removed when the segments are complete, unless ``keep_work`` is set.

What bounds memory: a worker of the tokenize stage holds one batch of text (``tokenizing.py``), a worker of the pack stage
one shuffle unit's list of documents (``pack_units.py``), both whatever the corpus; planning, in this process alone, holds
about 60 bytes for every document tokenized, which the tokens wanted bound, not the corpus. Measured with everything in one
process and one shuffle unit, the peak grew by 0.62 kB a document (LAB_NOTES.md, section 5).
"""

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.choosing import choose
from data_prep.corpora import Corpus
from data_prep.demand import length_buckets
from data_prep.document_table import load_documents
from data_prep.engine import run_units, worker_count
from data_prep.pack_account import Planned, histogram, segment_counts
from data_prep.pack_plan import PackPlan, write_pack_plan
from data_prep.pack_units import PackedUnit, PackJob
from data_prep.progress import StageProgress
from data_prep.token_files import TokenizedUnit
from data_prep.tokenize_rounds import SMALL_BYTES, TokenizeRounds
from longrope2.errors import ArtifactError, DataError
from longrope2.segments import SegmentRules

if TYPE_CHECKING:
    from data_prep.pack import PackConfig

__all__ = ["BuiltSegments", "build_segments", "clean_work", "locked"]


@dataclass
class BuiltSegments:
    """Everything the manifest needs."""

    files: dict[str, str]
    counts: dict[str, Any]
    details: dict[str, Any]
    plan: PackPlan


def build_segments(
    config: "PackConfig", model_folder: Path, corpus: Corpus, folder: Path, fingerprint: str
) -> BuiltSegments:
    """Do all stages that are not done; shards stand in ``folder`` afterwards, the manifest is the caller's.

    Raises:
        DataError: the corpus gives nothing to pack, text that cannot be tokenized safely, or units failed.
    """
    work = folder / "work" / fingerprint
    plan = PackPlan(work / "plan")
    if not plan.is_complete:
        _write_plan(config, TokenizeRounds(config, model_folder, corpus, work), plan)
    packed = _pack(config, plan, work, folder)
    summary = plan.summary()
    if not any(unit.files for unit in packed):
        raise DataError(
            f"corpus.name={config.corpus.name} gave {summary['chosen_tokens']} tokens, not enough for one "
            f"segment of target_len={config.target_len}; raise the quotas or use a larger corpus"
        )
    files = {name: sha256 for unit in packed for name, sha256 in unit.files.items()}
    lengths = length_buckets(config)
    details = {
        **summary["rules"], "model_name": config.model.name,
        "length_buckets": dict(zip(lengths.names, lengths.limits, strict=True)),
        "length_histogram": summary["length_histogram"],
        "file_bytes": {name: (folder / name).stat().st_size for name in files},
    }  # fmt: skip
    return BuiltSegments(files, segment_counts(summary["counts"], packed), details, plan)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a second run out of ``folder``.

    Raises:
        ArtifactError: another process is packing there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ArtifactError(
                f"{folder}: another process is packing here; wait for it, or use another run.name"
            ) from None
        yield
        path.unlink(missing_ok=True)


def clean_work(folder: Path) -> None:
    """Remove all intermediate files."""
    shutil.rmtree(folder / "work", ignore_errors=True)


def _write_plan(config: "PackConfig", rounds: TokenizeRounds, plan: PackPlan) -> None:
    """Rounds of tokenizing until the demand is met or the corpus ends; then the plan."""
    reading = rounds.start()
    done: list[TokenizedUnit] = []
    while True:
        done += rounds.run(reading)
        chosen = choose(config, load_documents(done), reading)
        if not any([reading.extend(source, buckets) for source, buckets in chosen.missing.items()]):
            break
    encoder = rounds.encoder
    rules = SegmentRules(
        config.target_len, config.model.original_len, config.align, encoder.vocab_size, encoder.bos_id, encoder.eos_id,
        encoder.control_ids,
    )  # fmt: skip
    summary = _summary(chosen, rules)
    write_pack_plan(
        plan.folder, chosen.table, chosen.selection, tokens_per_unit=config.tokens_per_unit, summary=summary
    )


def _summary(chosen: Planned, rules: SegmentRules) -> dict[str, Any]:
    """What the plan keeps for packing and for the manifest."""
    return {
        "rules": vars(rules),
        "counts": chosen.counts(),
        "length_histogram": histogram(chosen),
        "chosen_tokens": int(chosen.selection.parts.tokens_P.sum()),
    }


def _pack(config: "PackConfig", plan: PackPlan, work: Path, folder: Path) -> list[PackedUnit]:
    """Pack all shuffle units; returns what they tell, in their order."""
    summary = plan.summary()
    rules = SegmentRules(**{**summary["rules"], "control_ids": tuple(summary["rules"]["control_ids"])})
    names = length_buckets(config).names
    job = PackJob(plan, work, folder, rules, names, config.tokens_per_shard, config.seed)
    numbers = range(summary["num_units"])
    small = summary["chosen_tokens"] * rules.dtype().itemsize < SMALL_BYTES
    workers = worker_count(config.workers, len(numbers), small=small)
    packed: dict[int, PackedUnit] = {}
    with StageProgress("packing", len(numbers)) as progress:
        for number, unit in run_units(job, numbers, config.cluster, workers=workers, logs=work / "slurm"):
            packed[number] = unit
            progress.advance(number, sum(sum(cells.values()) for cells in unit.tokens.values()))
    return [packed[number] for number in numbers]
