"""What the tests of engines share: where an engine is, exports for it, and what ours computes.

An engine lives in an environment of its own, whose Python an environment variable names, or beside
this project, where it can be imported. Without either its tests are skipped.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longrope2.export.gguf_file import write_gguf
from longrope2.export.hugging_face import write_hugging_face_folder
from longrope2.export.variants import ExportVariant, variant_factors
from longrope2.model.loading import load_windowed_model, rope_geometry
from longrope2.rope.factors import RescaleFactors, Window
from longrope2.rope.methods import RopeMethod, closed_form_factors

TINY = Path(__file__).parents[2] / "models" / "tiny"
TARGET_LEN, EOS = 2048, 2
ROUNDING = 2e-4
"""Nats, float32: other orders of the same sums."""
OTHER_ROPE = 0.05
"""Nats: the least by which the other window's RoPE must show."""


def engine_python(variable: str, package: str) -> str | None:
    """The Python that has an engine; None where there is none."""
    named = os.environ.get(variable)
    return named or (sys.executable if importlib.util.find_spec(package) else None)


def why_skipped(variable: str, package: str, install: str) -> str:
    """The reason of a skip, with the way out."""
    return f"{package} is not installed, and {variable} names no Python that has it ({install})"


def run_worker(python: str, worker: str, request: Any, folder: Path) -> Any:
    """Run a module of this folder with an engine's Python; JSON in, JSON out."""
    asked, answered = folder / "request.json", folder / "answer.json"
    asked.write_text(json.dumps(request), encoding="utf-8")
    script = Path(__file__).with_name(worker)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [python, str(script), str(asked), str(answered)]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert ended.returncode == 0, (ended.stdout + ended.stderr)[-4000:]
    return json.loads(answered.read_text(encoding="utf-8"))


def factors_for(original_len: int) -> RescaleFactors:
    """Some for the miniature, taken as a model of this window."""
    return closed_form_factors(RopeMethod.ntk, rope_geometry(TINY, original_len), TARGET_LEN)


def export(folder: Path, original_len: int, variant: ExportVariant, *, gguf: bool = False) -> Path:
    """The miniature as an export, float32."""
    factors = factors_for(original_len)
    write_hugging_face_folder(TINY, factors, folder, torch.float32, variant)
    if gguf:
        write_gguf(folder, variant_factors(factors, variant), folder / "model.gguf", name="tiny")
    return folder


def token_ids(length: int) -> list[int]:
    """The same for every reader; no control tokens."""
    generator = torch.Generator().manual_seed(7)
    return torch.randint(300, 2000, (TARGET_LEN,), generator=generator)[:length].tolist()


@lru_cache(maxsize=4)
def _ours(original_len: int) -> Any:
    return load_windowed_model(TINY, factors_for(original_len)).eval()


@torch.inference_mode()
def our_distribution(original_len: int, ids: Sequence[int], window: Window) -> Tensor:
    """Log-probabilities [V] of what follows ``ids`` under a window's RoPE."""
    tokens_BT = torch.tensor([list(ids)])
    logits = _ours(original_len).logits(tokens_BT, window, keep=slice(-1, None))
    return logits[0, -1].log_softmax(-1)


def window_of(found: Tensor, original_len: int, ids: Sequence[int]) -> tuple[Window, float]:
    """Under whose RoPE these log-probabilities [V] are ours, and the largest difference, nats."""
    differences = {
        window: float((found - our_distribution(original_len, ids, window)).abs().max())
        for window in Window
    }
    nearest = min(differences, key=differences.__getitem__)
    assert max(differences.values()) > OTHER_ROPE, differences
    return nearest, differences[nearest]


def our_continuation(
    original_len: int, ids: Sequence[int], num_tokens: int, window: Window
) -> list[int]:
    """Ids generated greedily, all but EOS, the whole text read anew for each."""
    text = list(ids)
    for _ in range(num_tokens):
        values = our_distribution(original_len, text, window).clone()
        values[EOS] = -torch.inf
        text.append(int(values.argmax()))
    return text[len(ids) :]
