"""Pack a corpus into tagged segments: ``python -m data_prep.pack --target 131072 [--corpus NAME] [key=value ...]``.

Reads as much of the corpus as its quotas or its plan need, tokenizes it in one pass, chooses documents by source and
length, packs them into short and long segments of exactly L tokens, and writes ``<run>/1_segments`` with an account of
every token (``manifest.json``, ``report.html``). The same command gives the same bytes, for any number of workers and
whatever interrupted it; a run that was killed goes on where it was, a finished one finds its work done.
``python -m data_prep.verify FOLDER`` checks the result against the source texts.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.corpora import Corpus, CorpusConfig, build_corpus
from data_prep.documents_config import DocumentsConfig
from data_prep.engine import ClusterConfig
from data_prep.pack_checks import faults_of
from data_prep.pack_printing import print_plan, print_result
from data_prep.retrieval_corpus import RetrievalConfig
from longrope2.artifacts import (
    Manifest,
    model_identity,
    product_folder,
    read_manifest,
    resolve_model_folder,
    sha256_of_bytes,
    sha256_of_file,
    write_manifest,
)
from longrope2.command import run_command
from longrope2.config import StageConfig, compose, dump, to_plain
from longrope2.errors import ArtifactError, ConfigError, UserError

__all__ = ["PackConfig", "check", "main", "pack"]

# Keys that say where, how fast or whether to write, not what: runs that differ in them only give the same segments.
LOCATION_KEYS = ("run", "dry_run", "workers", "cluster", "keep_work")
FLAGS = {"target": "target_len", "model": "model", "corpus": "corpus", "align": "align"}


@dataclass
class PackConfig(StageConfig):
    """Configuration of the pack stage."""

    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    documents: DocumentsConfig = field(default_factory=DocumentsConfig)
    align: int = 1
    """k: no document of a short segment crosses a multiple of L/k, so k sequence-parallel ranks need no
    exchange there."""
    tokens_per_shard: int = 2**26
    """Tokens of a shard file, at least ``target_len``."""
    tokens_per_unit: int = 2**28
    """Tokens that are shuffled and packed together, at least ``target_len``. Each such unit leaves less than one segment of
    long documents over, so small ones waste tokens."""
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    workers: int = 0
    """Processes; 0: one per core, or none but this one for small corpora. Changes no byte of the result."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    keep_work: bool = False
    """Keep the intermediate files (token ids and indices) in ``1_segments/work``."""


def check(config: PackConfig) -> tuple[Path, Corpus]:
    """Check everything that can be known before reading; returns the model folder and the corpus.

    Raises:
        ConfigError: all faults together, each naming its key and what is allowed.
    """
    faults: list[str] = []
    model_folder, corpus = None, None
    try:
        model_folder = resolve_model_folder(config.model.path)
    except UserError as error:
        faults.append(str(error))
    try:
        corpus = build_corpus(config.corpus)
    except ConfigError as error:
        faults += error.faults
    faults = [*faults_of(config, None if corpus is None else corpus.sources), *faults]
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
    folder = product_folder(config.run.folder, "segments")
    print_plan(config, folder)
    # The heavy imports (tokenizers, transformers) wait until the configuration is known to be right.
    if config.dry_run:
        from data_prep.dry_run import print_estimate

        print_estimate(config, model_folder, corpus)
        print("dry run: nothing was written")
        return folder
    inputs = {
        "model": {"path": config.model.path, **model_identity(model_folder)},
        "corpus": {"name": config.corpus.name, **corpus.describe()},
        "exclude": {name: _identity_of(Path(name)) for name in config.documents.exclude},
    }
    if (folder / "manifest.json").exists():
        _require_same(read_manifest(folder, "segments"), config, inputs, folder)
        print(f"already complete: {folder}")
        return folder
    from data_prep.build import locked

    with locked(folder):
        _build(config, model_folder, corpus, folder, inputs)
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
    parser.add_argument("--corpus", metavar="NAME", help="a corpus of conf/corpus, for example paper, sample, folder")
    parser.add_argument("--align", metavar="K", help="alignment of short segments (align)")
    parser.add_argument("--dry-run", action="store_true", help="scan, print the plan and stop (dry_run=true)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any other key of conf/pack.yaml")
    flags = vars(parser.parse_intermixed_args(list(arguments)))
    overrides = [f"{key}={flags[flag]}" for flag, key in FLAGS.items() if flags[flag] is not None]
    overrides += ["dry_run=true"] if flags["dry_run"] else []
    pack(compose(PackConfig, "pack", [*flags["overrides"], *overrides]))


def _build(config: PackConfig, model_folder: Path, corpus: Corpus, folder: Path, inputs: dict[str, Any]) -> None:
    """Do all stages, then declare the product complete: the manifest comes last."""
    from data_prep.build import build_segments, clean_work
    from data_prep.document_list import write_document_list
    from data_prep.pack_report import write_report
    from data_prep.writing import remove_strays

    started = time.monotonic()
    content = {key: value for key, value in to_plain(config).items() if key not in LOCATION_KEYS}
    fingerprint = sha256_of_bytes(json.dumps([content, inputs], sort_keys=True).encode())[:12]
    dump(config, folder / "config.yaml")
    built = build_segments(config, model_folder, corpus, folder, fingerprint)
    remove_strays(folder, built.files)
    details = {**built.details, "documents": write_document_list(folder, built.plan)}
    manifest = Manifest(
        kind="segments", inputs=inputs, config=to_plain(config), seeds={"pack": config.seed}, counts=built.counts,
        files=built.files, details=details,
    )  # fmt: skip
    write_report(folder / "report.html", manifest)
    write_manifest(folder, manifest)
    if not config.keep_work:
        clean_work(folder)
    print_result(built.counts, folder, time.monotonic() - started)


def _identity_of(path: Path) -> str:
    """Hash of a file, or of the names and hashes of the texts of a folder."""
    if path.is_dir():
        return sha256_of_bytes("".join(f"{p.name} {sha256_of_file(p)}\n" for p in sorted(path.glob("*.txt"))).encode())
    return sha256_of_file(path)


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


if __name__ == "__main__":
    main()
