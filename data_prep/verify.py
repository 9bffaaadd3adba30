"""Audit packed segments: ``python -m data_prep.verify runs/x/1_segments [--sample 50]``.

Checks the hash of every shard, every rule of every segment (tags, spans, BOS and EOS, no control
ids inside documents, short documents at most L0), the quotas, and that every token that was read is
packed or accounted for; that no listed text is held out by its content; then reads a sample of
documents from the corpus again and compares text and ids, and the corpus' held-out documents, none
of which may stand in a segment. Ends with exit code 2 and the reason if anything differs.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_prep.config import PackConfig
from longrope2.command import run_command
from longrope2.config import load
from longrope2.corpora.build import build_corpus
from longrope2.corpora.corpus import Corpus, Document, Split
from longrope2.errors import ArtifactError
from longrope2.model.folder import given_folder, model_identity
from longrope2.segments.format import SegmentStore

# Of held-out text that is compared, where ``corpus.heldout_characters`` does not say.
HELD_OUT_CHARACTERS = 50_000_000


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    prog, as_written = "python -m data_prep.verify", argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog, description=__doc__, formatter_class=as_written)
    add, compared = parser.add_argument, "documents compared with their source"
    add("folder", type=Path, help="a 1_segments folder")
    add("--sample", type=int, default=50, metavar="N", help=compared)
    add("--seed", type=int, default=0, help="which documents")
    add("--no-source", action="store_true", help="do not read the corpus (it may be elsewhere)")
    given = parser.parse_args(arguments)
    run_command(lambda: _verify(given.folder, 0 if given.no_source else given.sample, given.seed))


def _verify(folder: Path, sample: int, seed: int) -> None:
    from data_prep.verification import audit_folder, compare_held_out, compare_with_source
    from longrope2.corpora.tokenizer import load_document_tokenizer, require_packed_alike

    audit = audit_folder(folder, sample=sample, seed=seed)
    print(
        f"{folder}: {audit.num_shards} shards and {audit.num_segments:,} segments hold, "
        f"{audit.num_tokens:,} tokens of {audit.num_documents:,} documents, "
        "every token accounted for"
    )
    if not audit.pieces:
        print("no document was compared with its source")
        return
    config = load(PackConfig, folder / "config.yaml")
    model_folder = given_folder(config.model, config.target_len)
    packed_with = SegmentStore(folder).manifest.inputs["model"]["tokenizer_sha256"]
    if model_identity(model_folder)["tokenizer_sha256"] != packed_with:
        now = f"model.path={config.model.path} has now"
        raise ArtifactError(f"{folder} was packed with another tokenizer than {now}")
    corpus = build_corpus(config.corpus)
    encoder = load_document_tokenizer(model_folder, config.model.document_start)
    rules = SegmentStore(folder).rules
    require_packed_alike(folder, rules, encoder, config.model.document_start)
    compare_with_source(folder, audit, corpus, encoder)
    print(
        f"{audit.num_compared} documents have the text and the ids of their source; "
        f"the ids of {audit.num_decoded} of them decode to passages of it"
    )
    compare_held_out(folder, audit, _held_out(corpus, config.corpus.heldout_characters), encoder)
    print(f"none of {audit.num_held_out:,} held-out documents is in a segment")


def _held_out(corpus: Corpus, most_characters: int | None) -> Iterator[Document]:
    """Held-out documents as search and evaluation read them, up to some megabytes."""
    room = HELD_OUT_CHARACTERS if most_characters is None else most_characters
    for document in corpus.documents(Split.heldout):
        yield document
        room -= len(document.text)
        if room <= 0:
            return


if __name__ == "__main__":
    main()
