"""``corpus=paper`` from miniature mirrors, faults included, through to verified segments."""

import pytest
from public_corpora import (
    write_fineweb_edu,
    write_redpajama_v1,
    write_redpajama_v2,
    write_starcoder,
)

from data_prep import pack, verify
from longrope2.segments.format import SegmentStore

WRITERS = {
    "redpajama_v1": write_redpajama_v1, "redpajama_v2": write_redpajama_v2,
    "starcoder": write_starcoder, "fineweb_edu": write_fineweb_edu,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_paper_corpus_from_mirrors(tmp_path, capsys):
    skipped = {}
    for source, write in WRITERS.items():
        (tmp_path / source).mkdir()
        skipped[source] = write(tmp_path / source)[1]
    roots = [f"corpus.{source}.root={tmp_path / source}" for source in WRITERS]
    pack.main(
        [
            "--target",
            "512",
            "mixture.total_tokens=1000000",
            "corpus.redpajama_v2.short_characters=0",
            "corpus.heldout_fraction=0.0",
            f"run.root={tmp_path}",
            "run.name=x",
            "tokens_per_unit=262144",
            *roots,
        ]
    )
    printed = capsys.readouterr().out
    folder = tmp_path / "x" / "1_segments"
    counts = SegmentStore(folder).manifest.counts
    # Every fault that the adapters count stands in the account, source by source.
    assert counts["num_records_skipped"] == {
        source: found for source, found in skipped.items() if found
    }
    assert all(source in counts["tokenized_tokens"] for source in WRITERS)
    # Both documents far beyond 200,000 tokens are cut, not dropped, and what is missing is told,
    # not padded.
    assert counts["num_documents_split"] == {"redpajama_v1": 2}
    assert (
        any(shortfall.startswith("source ") for shortfall in counts["shortfalls"])
        and "shortfall: " in printed
    )
    verify.main([str(folder), "--sample", "500"])
    assert "every token accounted for" in capsys.readouterr().out
