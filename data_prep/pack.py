"""Pack a corpus into tagged segments: ``python -m data_prep.pack --target 131072 [key=value ...]``.

Reads as much of the corpus as its quotas or its mixture need, tokenizes it in one pass, chooses
documents by source and length, packs them into short and long segments of exactly L tokens, and
writes ``<run>/1_segments`` with an account of every token (``manifest.json``, ``report.html``). The
same command gives the same bytes, for any number of workers and whatever interrupted it; a run that
was killed goes on where it was, a finished one finds its work done. ``python -m data_prep.verify
FOLDER`` checks the result against the source texts.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_prep.account import print_notices, print_result, print_wanted
from data_prep.config import QUOTA_BUCKETS, PackConfig
from data_prep.duplicates import fault_of_near_duplicates, read_exclusions
from longrope2.claim import differences, remake, with_later_keys, without
from longrope2.command import run_command
from longrope2.config import compose, dump, load, target_faults, to_plain
from longrope2.corpora.build import build_corpus
from longrope2.corpora.config import PLACES, PLACES_OF_A_DESCRIPTION, CorpusKind
from longrope2.corpora.corpus import RETRIEVAL_SOURCE, Corpus
from longrope2.errors import ArtifactError, ConfigError, UserError
from longrope2.files import artifacts
from longrope2.files.guide import write_guide
from longrope2.files.lease import only_writer
from longrope2.files.unchanged import require_unchanged
from longrope2.help import help_topic
from longrope2.model.folder import given_folder, look_before, model_identity

# Keys that say where, how fast or whether to write, not what: runs that differ in them only give
# the same segments.
LOCATION_KEYS = ("run", "dry_run", "workers", "cluster", "keep_work")
# Where text and model stand. What they hold is told by ``inputs``, so that a mirror that is mounted
# elsewhere goes on, and is accepted where all is done.
PLACES_OF_INPUTS = (
    *(f"corpus.{key}" for key in PLACES),
    *(f"inputs.corpus.{key}" for key in PLACES_OF_A_DESCRIPTION),
    *(f"inputs.corpus.{k.value}.{key}" for k in CorpusKind for key in PLACES_OF_A_DESCRIPTION),
    *("model.path", "inputs.model.path"),
)
FLAGS = {"target": "target_len", "model": "model", "corpus": "corpus", "align": "align"}


def check(config: PackConfig) -> tuple[Path, Corpus]:
    """Check everything that can be known before reading; returns the model folder and the corpus.

    Raises:
        ConfigError: all faults together, each naming its key and what is allowed.
    """
    look, given = look_before(config.model), config
    config = look.with_its_window(given)
    faults = [*look.faults, *_run_and_length_faults(config), *_document_faults(config)]
    faults += [*config.retrieval.faults(), *config.cluster.faults()]
    faults += look.missing_files(weights=False)
    corpus = None
    try:
        corpus = build_corpus(config.corpus)
        faults += _wanted_faults(config, corpus.sources)
    except ConfigError as error:
        faults += error.faults
    if faults:
        raise ConfigError(faults)
    assert corpus is not None
    look.print_notes()
    try:  # what asks the model's class, which loads for seconds
        return given_folder(given.model, given.target_len), corpus
    except UserError as error:
        raise ConfigError([str(error)]) from None


def _run_and_length_faults(config: PackConfig) -> Iterator[str]:
    original, target, align = config.model.original_len, config.target_len, config.align
    if config.run.from_run is not None:
        taken = f"run.from_run={config.run.from_run}: the run takes that one's segments"
        yield f"{taken}; pack under another run.name"
    yield from target_faults(config.model, target)
    if original < 1:
        return
    if align < 1 or target % align:
        yield f"align={align} does not divide target_len={target}"
    elif target // align < original:
        yield (
            f"align={align} leaves chunks of {target // align} tokens, shorter than "
            f"model.original_len={original}; use at most {max(1, target // original)}"
        )
    for key in ("tokens_per_shard", "tokens_per_unit"):
        if getattr(config, key) < target:
            yield f"{key}={getattr(config, key)} must be at least target_len={target}"


def _document_faults(config: PackConfig) -> Iterator[str]:
    documents, original_len = config.documents, config.model.original_len
    if documents.max_tokens <= original_len:
        limit = f"model.original_len={original_len}"
        yield f"documents.max_tokens={documents.max_tokens} must be above {limit}"
    if documents.max_units is not None and documents.max_units < 1:
        yield f"documents.max_units={documents.max_units} must be at least 1, or null"
    if config.workers < 0:
        yield f"workers={config.workers} must be 0 (one per core) or more"
    if documents.near_duplicates and (fault := fault_of_near_duplicates()):
        yield fault
    try:
        read_exclusions(documents.exclude)
    except ConfigError as error:
        yield from error.faults


def _wanted_faults(config: PackConfig, sources: Sequence[str]) -> Iterator[str]:
    quota = config.quotas.get(RETRIEVAL_SOURCE)
    for bucket in QUOTA_BUCKETS:
        if quota is not None and getattr(quota, bucket) is None:
            key = f"quotas.{RETRIEVAL_SOURCE}.{bucket}"
            yield f"{key}=null: these documents are generated, give their tokens"
    if config.mixture.is_given:
        yield from config.mixture.faults(sources, config.model.original_len)
        return
    known = (*sources, RETRIEVAL_SOURCE)
    anything = False
    for source, quota in config.quotas.items():
        if source not in known:
            yield f"quotas.{source}: the corpus has no such source; it has {', '.join(known)}"
        for bucket, wanted in vars(quota).items():
            anything = anything or wanted != 0
            if wanted is not None and wanted < 0:
                key = f"quotas.{source}.{bucket}"
                yield f"{key}={wanted} must be tokens, 0, or null for all there is"
    if not anything:
        yield "quotas asks for no tokens at all; set quotas.SOURCE.short or .long"


def pack(config: PackConfig) -> Path:
    """Run the stage; returns the folder of the finished segments.

    Raises:
        UserError: bad configuration, an unusable corpus, or a finished folder that was packed from
            something else.
    """
    model_folder, corpus = check(config)
    folder = artifacts.product_folder(config.run.folder, "segments")
    print_wanted(config, folder)
    # Heavy imports (tokenizers, transformers) wait until the configuration is known to be right.
    if config.dry_run:
        from data_prep.stages import print_estimate

        print_estimate(config, model_folder, corpus)
        print("dry run: nothing was written")
        return folder
    inputs = {
        "model": {"path": config.model.path, **model_identity(model_folder)},
        "corpus": {"name": config.corpus.name, **corpus.describe()},
        "exclude": {name: _identity_of(Path(name)) for name in config.documents.exclude},
    }
    if (folder / "manifest.json").exists():
        manifest = artifacts.read_manifest(folder, "segments")
        _require_same(manifest, config, inputs, folder)
        listed = manifest.details.get("documents", {})
        files = {**manifest.files, **({listed["file"]: listed["sha256"]} if listed else {})}
        require_unchanged(folder, files, f"bring it back, or {remake(folder)}")
        _note_places(config, folder)
        print(f"already complete: {folder}")
        print_notices(manifest.details.get("notices", ()))
        return folder
    with only_writer(config.run.folder, folder.name):
        _build(config, model_folder=model_folder, corpus=corpus, folder=folder, inputs=inputs)
    return folder


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: friendly flags for the common keys, ``key=value`` for all others."""
    run_command(lambda: _run(sys.argv[1:] if arguments is None else arguments))


def _run(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m data_prep.pack")
    add = parser.add_argument
    add("--target", metavar="TOKENS", help="L, the target window (target_len)")
    add("--model", metavar="NAME", help="a model of conf/model")
    add("--corpus", metavar="NAME", help="one of conf/corpus, for example paper, sample, folder")
    add("--align", metavar="K", help="alignment of short segments (align)")
    add("--dry-run", action="store_true", help="scan, print what is wanted and stop (dry_run=true)")
    add("overrides", nargs="*", metavar="key=value", help="any other key of conf/pack.yaml")
    if (topic := help_topic(arguments)) is not None:
        print("" if topic else f"{parser.format_help()}\n", end="")
        compose(PackConfig, "pack", arguments)
    flags = vars(parser.parse_intermixed_args(list(arguments)))
    overrides = [f"{key}={flags[flag]}" for flag, key in FLAGS.items() if flags[flag] is not None]
    overrides += ["dry_run=true"] if flags["dry_run"] else []
    pack(compose(PackConfig, "pack", [*flags["overrides"], *overrides]))


def _build(
    config: PackConfig, model_folder: Path, corpus: Corpus, folder: Path, inputs: dict[str, Any]
) -> None:
    """Do all stages, then declare the product complete: the manifest comes last."""
    from data_prep.account import write_report
    from data_prep.shards import remove_strays
    from data_prep.stages import build_segments

    started = time.monotonic()
    everything = {**to_plain(config), "inputs": inputs}
    content = without(everything, [*LOCATION_KEYS, *PLACES_OF_INPUTS])
    identity = json.dumps(content, sort_keys=True).encode()
    fingerprint = artifacts.sha256_of_bytes(identity)[:12]
    dump(config, folder / "config.yaml")
    write_guide(config.run.folder)
    files, counts, details = build_segments(
        config, model_folder, corpus, folder=folder, fingerprint=fingerprint
    )
    remove_strays(folder, files)
    manifest = artifacts.Manifest(
        kind="segments",
        inputs=inputs,
        config=to_plain(config),
        seeds={"pack": config.seed},
        counts=counts,
        files=files,
        details=details,
    )
    write_report(folder / "report.html", manifest)
    artifacts.write_manifest(folder, manifest)
    if not config.keep_work:
        shutil.rmtree(folder / "work", ignore_errors=True)
    print_result(counts, details, folder, time.monotonic() - started)


def _identity_of(path: Path) -> str:
    """Hash of a file, or of the names and hashes of the texts of a folder."""
    if not path.is_dir():
        return artifacts.sha256_of_file(path)
    texts = sorted(path.glob("*.txt"))
    listing = "".join(f"{text.name} {artifacts.sha256_of_file(text)}\n" for text in texts)
    return artifacts.sha256_of_bytes(listing.encode())


def _require_same(
    manifest: artifacts.Manifest, config: PackConfig, inputs: dict[str, Any], folder: Path
) -> None:
    """Refuse a finished folder that was packed with another configuration or from other inputs."""
    made = {**with_later_keys(manifest.config, PackConfig), "inputs": manifest.inputs}
    free = [*LOCATION_KEYS, *PLACES_OF_INPUTS]
    changes = differences(made, {**to_plain(config), "inputs": inputs}, free=free)
    if changes:
        shown = "; ".join(changes[:8])
        raise ArtifactError(f"{folder} was packed differently: {shown}; {remake(folder)}")


def _note_places(config: PackConfig, folder: Path) -> None:
    """Where text and model stand now, for those who read them by the folder's configuration."""
    noted = to_plain(load(PackConfig, folder / "config.yaml"))
    if changes := differences(noted, to_plain(config), free=LOCATION_KEYS):
        dump(config, folder / "config.yaml")
        print(f"the same text and model in another place: {'; '.join(changes)}")


if __name__ == "__main__":
    main()
