"""The pack stage against its tokenizer alone and common tokenizing jobs: ``-m benchmarks.pack``.

All read the same JSON lines with the same tokenizer and the same number of processes, one after the
other, several rounds in turn; the best time of each counts. Processes are started inside the
measured time by all of them. Printed are tokens a second and ratios to ours: ``bare`` shows what
everything but tokenizing costs (ours should reach 0.85 of it), the others are how text is usually
tokenized (ours should be 1.3 times as fast, though it also chooses, packs and verifies).

    ours       python -m data_prep.pack: scan, tokenize, choose, pack, check, write hashed shards
    bare       the prepared tokenizer on batches of texts; nothing is written
    megatron   after Megatron-LM's preprocess_data: a pool encodes line by line, the main process
               writes ids and an index
    datatrove  its DocumentTokenizer on its local executor, where datatrove is installed
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from longrope2.corpora.corpus import Split
from longrope2.corpora.sample import SampleCorpus
from longrope2.corpora.tokenizer import (
    batches_by_characters,
    load_document_tokenizer,
    prepared_tokenizer,
    save_prepared_tokenizer,
)

EOS_NAME = "</s>"


def write_texts(folder: Path, megabytes: float, num_files: int) -> None:
    """Standard-library text as JSON lines, repeated as often as needed."""
    texts = [document.text for document in SampleCorpus().documents(Split.train)]
    size, number, wanted = 0, 0, megabytes * 1e6
    handles = [(folder / f"{n:03d}.jsonl").open("w", encoding="utf-8") for n in range(num_files)]
    while size < wanted:
        text = f"{number}\n{texts[number % len(texts)]}"
        handles[number % num_files].write(json.dumps({"text": text, "id": str(number)}) + "\n")
        size, number = size + len(text), number + 1
    for handle in handles:
        handle.close()


def ours(texts: Path, model: Path, work: Path, workers: int) -> int:
    """The whole stage; returns tokens tokenized."""
    command = f"{sys.executable} -m data_prep.pack --target 16384 --corpus folder run.name=ours"
    overrides = [
        f"corpus.folder={texts}",
        f"model.path={model}",
        f"run.root={work}",
        f"workers={workers}",
        "corpus.heldout_fraction=0.0",
        "tokens_per_unit=16777216",
    ]
    subprocess.run([*command.split(), *overrides], check=True, capture_output=True)
    counts = json.loads((work / "ours" / "1_segments" / "manifest.json").read_text())["counts"]
    return counts["tokenized_tokens"]["folder"] - 2 * counts["num_documents_tokenized"]["folder"]


def bare(texts: Path, tokenizer: Path, workers: int) -> int:
    """Only the tokenizer; returns tokens."""
    files = [(path, tokenizer) for path in sorted(texts.glob("*.jsonl"))]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        return sum(pool.starmap(_encode_file, files, chunksize=1))


def megatron(texts: Path, model: Path, work: Path, workers: int) -> int:
    """A pool encodes lines, this process writes them; returns tokens."""
    tokens, ends = 0, []
    lines = (line for path in sorted(texts.glob("*.jsonl")) for line in path.open(encoding="utf-8"))
    with multiprocessing.get_context("spawn").Pool(workers, _start_line_worker, (model,)) as pool:
        with (work / "megatron.bin").open("wb") as sink:
            for ids in pool.imap(_encode_line, lines, chunksize=32):
                sink.write(np.asarray(ids, dtype=np.uint16).tobytes())
                tokens += len(ids) - 1
                ends.append(tokens)
    np.asarray(ends, dtype=np.int64).tofile(work / "megatron.idx")
    return tokens


def datatrove(texts: Path, model: Path, work: Path, workers: int) -> int:
    """Its own reader, tokenizer step and executor; returns tokens."""
    script = (
        "import sys\n"
        "from datatrove.executor import LocalPipelineExecutor\n"
        "from datatrove.pipeline.readers import JsonlReader\n"
        "from datatrove.pipeline.tokens import DocumentTokenizer\n"
        "if __name__ == '__main__':\n"
        "    texts, out, name, eos, workers, tasks = sys.argv[1:]\n"
        "    step = DocumentTokenizer(out, tokenizer_name_or_path=name, eos_token=eos,\n"
        "        shuffle_documents=False)\n"
        "    LocalPipelineExecutor([JsonlReader(texts), step], tasks=int(tasks),\n"
        "        workers=int(workers), logging_dir=out + '/logs').run()\n"
    )
    path = work / "run_datatrove.py"
    path.write_text(script)
    out, tasks = work / "datatrove", len(list(texts.glob("*.jsonl")))
    arguments = [texts, out, model / "tokenizer.json", EOS_NAME, workers, tasks]
    subprocess.run([sys.executable, path, *map(str, arguments)], check=True, capture_output=True)
    ends = [np.fromfile(index, np.uint64) for index in out.glob("*.ds.index")]
    return int(sum(int(end[-1]) - len(end) for end in ends if len(end)))


def main() -> None:
    """Time all of them and print tokens a second and ratios."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pack",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, model = parser.add_argument, Path("models/tiny")
    add("--megabytes", type=float, default=200.0, help="text, in millions of characters")
    add("--workers", type=int, default=len(os.sched_getaffinity(0)))
    add("--files", type=int, default=32)
    add("--rounds", type=int, default=3)
    add("--model", type=Path, default=model, help="model folder with tokenizer.json")
    given = parser.parse_args()
    # Processes instead of threads, for all alike.
    os.environ.update(TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")
    with tempfile.TemporaryDirectory() as scratch:
        texts, tokenizer = Path(scratch) / "texts", Path(scratch) / "tokenizer.json"
        texts.mkdir()
        write_texts(texts, given.megabytes, given.files)
        encoder = load_document_tokenizer(given.model)
        save_prepared_tokenizer(encoder, tokenizer)
        ways: dict[str, Callable[[Path], int]] = {
            "ours": lambda work: ours(texts, given.model, work, given.workers),
            "bare": lambda work: bare(texts, tokenizer, given.workers),
            "megatron": lambda work: megatron(texts, given.model, work, given.workers),
        }
        if importlib.util.find_spec("datatrove") is not None:
            ways["datatrove"] = lambda work: datatrove(texts, given.model, work, given.workers)
        best, tokens = _timed(ways, given.rounds)
    text = f"{given.megabytes:g} M characters in {given.files} files"
    print(f"{text}, {given.workers} workers, best of {given.rounds}")
    for name, seconds in best.items():
        rate = tokens[name] / seconds
        ratio = tokens["ours"] / best["ours"] / rate
        speed = f"{tokens[name]:>12,} tokens {seconds:8.1f} s {rate:12,.0f} tokens/s"
        print(f"{name:10s} {speed}   ours is {ratio:5.2f} x this")


def _timed(
    ways: dict[str, Callable[[Path], int]], rounds: int
) -> tuple[dict[str, float], dict[str, int]]:
    """Best seconds and tokens of each way."""
    best, tokens = dict.fromkeys(ways, float("inf")), {}
    for _ in range(rounds):
        for name, way in ways.items():
            with tempfile.TemporaryDirectory() as work:
                began = time.perf_counter()
                tokens[name] = way(Path(work))
                best[name] = min(best[name], time.perf_counter() - began)
    return best, tokens


def _encode_file(path: Path, tokenizer: Path) -> int:
    """Tokens of one file, encoded in batches by characters."""
    encoder = prepared_tokenizer(tokenizer)
    with path.open(encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    batches = (encoder.encode_contents(batch) for batch in batches_by_characters(texts, len))
    return sum(sum(map(len, batch)) for batch in batches)


_line_encoder: Any = None


def _start_line_worker(model: Path) -> None:
    """The model's tokenizer as transformers gives it."""
    from transformers import AutoTokenizer

    global _line_encoder
    _line_encoder = AutoTokenizer.from_pretrained(model)


def _encode_line(line: str) -> list[int]:
    """Ids of one line's text with EOS behind them."""
    assert _line_encoder is not None
    ids = _line_encoder(json.loads(line)["text"], add_special_tokens=False)["input_ids"]
    return [*ids, _line_encoder.eos_token_id]


if __name__ == "__main__":
    main()
