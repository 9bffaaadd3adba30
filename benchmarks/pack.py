"""The pack stage against its tokenizer alone and common tokenizing jobs: ``-m benchmarks.pack``.

All read the same JSON lines with the same tokenizer and the same number of processes, one after the
other, several rounds in turn; the best time of each counts. Processes are started inside the
measured time by all of them. Printed are tokens a second and ratios to ours, by the clock and by
the processor time of all processes, which other work on the machine disturbs less: ``bare`` shows
what everything but tokenizing costs (ours should reach 0.9 of it), the others are how text is
usually tokenized (ours should be 1.5 times as fast, though it also chooses and verifies).

    ours       python -m data_prep.pack: scan, tokenize, choose, pack, check, write hashed shards
    bare       the prepared tokenizer on batches of texts; nothing is written
    megatron   after Megatron-LM's preprocess_data: a pool encodes line by line, the main process
               writes ids and an index
    datatrove  its DocumentTokenizer on its local executor, its merger, and its shuffler of windows,
               which packs; where datatrove is installed
"""

import argparse
import contextlib
import ctypes
import importlib.util
import json
import multiprocessing
import os
import resource
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
PR_SET_CHILD_SUBREAPER = 36  # of Linux


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


def _by_itself(name: str, *arguments: Path | int) -> int:
    """One of the functions above in a process of its own, whose pool ends with it."""
    given = ", ".join(repr(a) if isinstance(a, int) else f"Path({str(a)!r})" for a in arguments)
    script = f"from pathlib import Path; from benchmarks import pack; print(pack.{name}({given}))"
    told = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    return int(told.stdout)


def datatrove(texts: Path, model: Path, work: Path, workers: int) -> int:
    """Its own reader, tokenizer step, merger, shuffler and executor; returns tokens."""
    script = (
        "import sys\n"
        "from datatrove.executor import LocalPipelineExecutor\n"
        "from datatrove.pipeline.readers import JsonlReader\n"
        "from datatrove.pipeline.tokens import DocumentTokenizer, DocumentTokenizerMerger\n"
        "from datatrove.pipeline.tokens import DocumentTokenizerContextShuffler as Shuffler\n"
        "if __name__ == '__main__':\n"
        "    texts, out, name, eos, workers, tasks = sys.argv[1:]\n"
        "    step = DocumentTokenizer(out, tokenizer_name_or_path=name, eos_token=eos,\n"
        "        shuffle_documents=False)\n"
        "    LocalPipelineExecutor([JsonlReader(texts), step], tasks=int(tasks),\n"
        "        workers=int(workers), logging_dir=out + '/logs').run()\n"
        "    merged, packed = out + '/merged', out + '/packed'\n"
        "    LocalPipelineExecutor([DocumentTokenizerMerger(out, merged, 'all')],\n"
        "        logging_dir=out + '/logs-merge').run()\n"
        "    LocalPipelineExecutor([Shuffler(merged, packed, window_size=16384)],\n"
        "        logging_dir=out + '/logs-pack').run()\n"
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
    add("--ways", nargs="+", default=["ours", "bare", "megatron", "datatrove"])
    add("--out", type=Path, help="file for the figures, JSON")
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
            "bare": lambda work: _by_itself("bare", texts, tokenizer, given.workers),
            "megatron": lambda work: _by_itself(
                "megatron", texts, given.model, work, given.workers
            ),
        }
        if importlib.util.find_spec("datatrove") is not None:
            ways["datatrove"] = lambda work: datatrove(texts, given.model, work, given.workers)
        found = _timed({name: ways[name] for name in ways if name in given.ways}, given.rounds)
    text = f"{given.megabytes:g} M characters in {given.files} files"
    print(f"{text}, {given.workers} workers, best of {given.rounds}")
    for name, best in found.items():
        ratio = {key: best[key] / found["ours"][key] for key in ("seconds", "cpu_seconds")}
        speed = f"{best['tokens']:>12,.0f} tokens {best['seconds']:8.1f} s"
        cpu = f"{best['cpu_seconds']:8.1f} s of processors"
        print(
            f"{name:10s} {speed} {cpu}   ours is {ratio['seconds']:5.2f} x this by the clock, "
            f"{ratio['cpu_seconds']:5.2f} x by processors"
        )
    if given.out is not None:
        setting = {"characters": given.megabytes * 1e6, "workers": given.workers}
        setting |= {"files": given.files, "rounds": given.rounds, "model": str(given.model)}
        given.out.write_text(json.dumps({**setting, "best": found}, indent=1) + "\n")


def _timed(ways: dict[str, Callable[[Path], int]], rounds: int) -> dict[str, dict[str, float]]:
    """Way -> tokens, and the best of seconds and processor seconds."""
    # Orphans (a fork server ends after its parent) come to this process, and are counted.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    found: dict[str, dict[str, float]] = {}
    for _ in range(rounds):
        for name, way in ways.items():
            with tempfile.TemporaryDirectory() as work:
                cpu, began = _cpu_seconds(), time.perf_counter()
                tokens = way(Path(work))
                seconds = time.perf_counter() - began
                spent = {"seconds": seconds, "cpu_seconds": _cpu_seconds() - cpu}
                best = found.setdefault(name, {"tokens": tokens, **spent})
                best |= {key: min(best[key], number) for key, number in spent.items()}
                print(
                    f"  {name}: {seconds:.1f} s, {spent['cpu_seconds']:.1f} s of processors",
                    file=sys.stderr,
                )
    return found


def _cpu_seconds() -> float:
    """Of this process and all that it had; orphans get some seconds to end."""
    patience = time.monotonic() + 3.0  # not more: multiprocessing's tracker stays
    with contextlib.suppress(ChildProcessError):
        while time.monotonic() < patience:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.05)
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


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
