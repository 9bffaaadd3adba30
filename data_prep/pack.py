"""Pack a corpus into tagged segments: ``python -m data_prep.pack --target 2048 --corpus sample [key=value ...]``.

Reads documents, takes tokens of each source by quota, packs them into short and long segments of exactly L tokens, and
writes ``<run>/1_segments``. The same command gives the same bytes; a second run finds the work done.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.corpora import RETRIEVAL_SOURCE, Corpus, CorpusConfig, build_corpus
from data_prep.quotas import BUCKETS
from data_prep.retrieval_corpus import RetrievalConfig
from longrope2.artifacts import (
    Manifest,
    model_identity,
    product_folder,
    read_manifest,
    resolve_model_folder,
    write_manifest,
)
from longrope2.command import run_command
from longrope2.config import StageConfig, compose, dump, to_plain
from longrope2.errors import ArtifactError, ConfigError, UserError

__all__ = ["PackConfig", "check", "main", "pack"]

# Keys that say where or whether to write, not what: two runs that differ in them only give the same segments.
LOCATION_KEYS = ("run", "dry_run")
FLAGS = {"target": "target_len", "model": "model", "corpus": "corpus", "align": "align"}


@dataclass
class PackConfig(StageConfig):
    """Configuration of the pack stage."""

    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    align: int = 1
    """k: no document of a short segment crosses a multiple of L/k, so k sequence-parallel ranks need no
    exchange there."""
    tokens_per_shard: int = 2**26
    """Tokens of a shard file, at least ``target_len``."""
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)


def check(config: PackConfig) -> tuple[Path, Corpus]:
    """Check everything that can be known before reading; returns the model folder and the corpus.

    Raises:
        ConfigError: all faults together, each naming its key and what is allowed.
    """
    faults = [*_length_faults(config), *config.retrieval.faults()]
    model_folder, corpus = None, None
    try:
        model_folder = resolve_model_folder(config.model.path)
    except UserError as error:
        faults.append(str(error))
    try:
        corpus = build_corpus(config.corpus)
        faults += _quota_faults(config, corpus)
    except ConfigError as error:
        faults += error.faults
    if faults:
        raise ConfigError(faults)
    assert model_folder is not None and corpus is not None
    return model_folder, corpus


def pack(config: PackConfig) -> Path:
    """Run the stage; returns the folder of the finished segments.

    Raises:
        UserError: bad configuration, an unusable corpus, or a finished folder that was packed from something else.
    """
    model_folder, corpus = check(config)
    _print_plan(config, corpus)
    folder = product_folder(config.run.folder, "segments")
    if config.dry_run:
        print("dry run: nothing was written")
        return folder
    inputs = {
        "model": {"path": config.model.path, **model_identity(model_folder)},
        "corpus": {"name": config.corpus.name, **corpus.describe()},
    }
    if (folder / "manifest.json").exists():
        _require_same(read_manifest(folder, "segments"), config, inputs, folder)
        print(f"already complete: {folder}")
        return folder
    # The heavy imports (tokenizers, transformers) wait until the configuration is known to be right.
    from data_prep.build import build_segments
    from data_prep.writing import remove_unfinished, write_shards

    started = time.monotonic()
    built = build_segments(config, model_folder, corpus)
    remove_unfinished(folder)
    dump(config, folder / "config.yaml")
    files = write_shards(folder, built.drafts, built.rules, tokens_per_shard=config.tokens_per_shard)
    manifest = Manifest(
        kind="segments", inputs=inputs, config=to_plain(config), seeds={"pack": config.seed}, counts=built.counts,
        files=files, details=built.details,
    )  # fmt: skip
    write_manifest(folder, manifest)
    _print_result(built.counts, folder, time.monotonic() - started)
    return folder


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: friendly flags for the common keys, ``key=value`` for all others."""
    run_command(lambda: _run(sys.argv[1:] if arguments is None else arguments))


def _run(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.pack", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", metavar="TOKENS", help="L, the target window (target_len)")
    parser.add_argument("--model", metavar="NAME", help="a model of conf/model")
    parser.add_argument("--corpus", metavar="NAME", help="a corpus of conf/corpus: sample, folder")
    parser.add_argument("--align", metavar="K", help="alignment of short segments (align)")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop (dry_run=true)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any other key of conf/pack.yaml")
    flags = vars(parser.parse_intermixed_args(list(arguments)))
    overrides = [f"{key}={flags[flag]}" for flag, key in FLAGS.items() if flags[flag] is not None]
    overrides += ["dry_run=true"] if flags["dry_run"] else []
    pack(compose(PackConfig, "pack", [*flags["overrides"], *overrides]))


def _length_faults(config: PackConfig) -> list[str]:
    """Faults of the window lengths and of the alignment."""
    original, target, faults = config.model.original_len, config.target_len, []
    if original < 8:
        return [f"model.original_len={original} is not a window; give the pre-trained window in tokens"]
    if target < original or target % original:
        faults.append(
            f"target_len={target} is not a multiple of model.original_len={original}; "
            f"use for example {max(1, round(target / original)) * original}"
        )
    if config.align < 1 or target % config.align:
        faults.append(f"align={config.align} does not divide target_len={target}")
    elif target // config.align < original:
        faults.append(
            f"align={config.align} leaves chunks of {target // config.align} tokens, shorter than "
            f"model.original_len={original}; use at most {max(1, target // original)}"
        )
    if config.tokens_per_shard < target:
        faults.append(f"tokens_per_shard={config.tokens_per_shard} must be at least target_len={target}")
    return faults


def _quota_faults(config: PackConfig, corpus: Corpus) -> list[str]:
    """Faults of the plan."""
    known = (*corpus.sources, RETRIEVAL_SOURCE)
    faults = []
    for source, quota in config.corpus.quotas.items():
        if source not in known:
            faults.append(f"corpus.quotas.{source}: the corpus has no such source; it has {', '.join(known)}")
        for bucket in BUCKETS:
            wanted = getattr(quota, bucket)
            if wanted is not None and wanted < 0:
                faults.append(f"corpus.quotas.{source}.{bucket}={wanted} must be tokens, 0, or null for all there is")
            elif wanted is None and source == RETRIEVAL_SOURCE:
                faults.append(f"corpus.quotas.{source}.{bucket}=null: these documents are generated, give their tokens")
    if not any(getattr(quota, bucket) != 0 for quota in config.corpus.quotas.values() for bucket in BUCKETS):
        faults.append("corpus.quotas asks for no tokens at all; set corpus.quotas.SOURCE.short or .long")
    return faults


def _require_same(manifest: Manifest, config: PackConfig, inputs: dict[str, Any], folder: Path) -> None:
    """Refuse a finished folder that was packed with another configuration or from other inputs."""
    old = {**_flat({"": manifest.config}), **_flat({"inputs": manifest.inputs})}
    new = {**_flat({"": to_plain(config)}), **_flat({"inputs": inputs})}
    keys = [key for key in sorted(old.keys() | new.keys()) if key.split(".")[0] not in LOCATION_KEYS]
    different = [f"{key} was {old.get(key)}, now {new.get(key)}" for key in keys if old.get(key) != new.get(key)]
    if different:
        shown = "; ".join(different[:8])
        raise ArtifactError(
            f"{folder} was packed differently: {shown}. Choose another run.name, or delete that folder to pack it again"
        )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionary -> dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}.{key}" if prefix and key else prefix or key
        flat.update(_flat(value, name) if isinstance(value, dict) and value else {name: value})
    return flat


def _print_plan(config: PackConfig, corpus: Corpus) -> None:
    """The plan as a table."""
    print(
        f"pack {config.corpus.name} for {config.model.name}: segments of {config.target_len} tokens, short window "
        f"{config.model.original_len}, alignment {config.align} -> {product_folder(config.run.folder, 'segments')}"
    )
    print(f"  {'source':<20}{'short tokens':>16}{'long tokens':>16}")
    for source, quota in sorted(config.corpus.quotas.items()):
        cells = ["all" if tokens is None else f"{tokens:,}" for tokens in (quota.short, quota.long)]
        print(f"  {source:<20}{cells[0]:>16}{cells[1]:>16}")
    known = [t for quota in config.corpus.quotas.values() for t in (quota.short, quota.long) if t is not None]
    more = " and all of the sources marked so" if len(known) < 2 * len(config.corpus.quotas) else ""
    print(f"  about {sum(known) // config.target_len:,} segments{more}; 2 bytes a token up to 65,536 ids, else 4")


def _print_result(counts: dict[str, Any], folder: Path, seconds: float) -> None:
    """What was packed, in a few lines."""
    tokens = sum(sum(buckets.values()) for buckets in counts["tokens"].values())
    print(
        f"packed {tokens:,} tokens in {seconds:.1f} s: {counts['num_short_segments']} short and "
        f"{counts['num_long_segments']} long segments, {counts['padding_tokens']:,} padding tokens, "
        f"{counts['long_rest_tokens']:,} tokens at the end that filled no segment -> {folder}"
    )
    for shortfall in counts["shortfalls"]:
        print(f"  shortfall: {shortfall}")


if __name__ == "__main__":
    main()
