"""Which model families are supported, measured on tiny random models; writes docs/models.md.

``python -m tests.reference.model_table > docs/models.md`` measures every column (two minutes);
``measure`` and its parts serve test_model_families.py.

Shape letters: B = rows, T = tokens, H = hidden size, V = vocabulary.
"""

import contextlib
import io
import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.utils import logging

from longrope2.attention.layout import Axis, build_layout
from longrope2.errors import UserError, first_line
from longrope2.export.hugging_face import check_exportable, write_hugging_face_folder
from longrope2.export.variants import ExportVariant, variant_factors
from longrope2.export.verification import verify_export
from longrope2.inference.generation import generate_tokens
from longrope2.model.given import look_at
from longrope2.model.loading import load_windowed_model, rope_geometry
from longrope2.model.loss import IGNORED_LABEL, token_loss_sum
from longrope2.model.parity import compare, run_plain
from longrope2.model.windowed import WindowedModel
from longrope2.parallel.dims import ParallelConfig
from longrope2.parallel.processes import Processes, join_processes, leave_processes
from longrope2.rope.factors import RescaleFactors, Window

if __package__ == "tests.reference":
    from tests.reference.tiny_families import FAMILIES, ORIGINAL_LEN, make_model
else:  # pytest puts tests/ on the path
    from reference.tiny_families import FAMILIES, ORIGINAL_LEN, make_model

ROOT = Path(__file__).parents[2]
TARGET_LEN = 4 * ORIGINAL_LEN
PARITY = ("logits", "loss", "scored", "documents", "beyond")
SLOW = ("generation", "export", "two ranks")
# Above a bound the table must not say "supported"; float32 models of two layers.
BOUND = 1e-4
COMMAND = "python -m tests.reference.model_table > docs/models.md"


@dataclass
class Row:
    """What was found about one family."""

    name: str
    refusal: str | None = None
    rope: str = ""
    head: str = ""
    differences: dict[str, float] = field(default_factory=dict)


def folder_of(name: str, parent: Path) -> Path:
    """Where a family's model stands."""
    return parent / "".join(c if c.isalnum() else "_" for c in name)


def measure(name: str, parent: Path, *, slow: bool = False) -> Row:
    """Make a family's model and measure it; what is not refused with a message raises."""
    folder, row = folder_of(name, parent), Row(name)
    make_model(name, folder)
    try:
        factors = rescaled(folder)
        model = load_windowed_model(folder, factors)
        check_exportable(folder, ORIGINAL_LEN, factors.target_len)
    except UserError as error:
        row.refusal = str(error).replace(f"{folder}/", "").replace(f"{folder}: ", "")
        return row
    given = look_at(folder)
    arrangement = given.rotary.arrangement.value
    row.rope = f"{given.rotary.rotary_dim} at {given.rotary.rope_base:g}, {arrangement}"
    row.head = str(given.head_rule)
    plain = plain_model(folder)
    parity = compare(model, run_plain(plain, ORIGINAL_LEN))
    row.differences = {column: getattr(parity, column) for column in PARITY}
    row.differences["gradients"] = gradient_difference(model, plain)
    row.differences["shares"] = shares_difference(folder, factors, model)
    if slow:
        row.differences["generation"] = generation_difference(folder, model)
        try:
            row.differences["export"] = export_difference(folder, factors)
        except Exception as error:  # the other columns are worth their time; the test fails on it
            print(f"{name}: {first_line(error)}", file=sys.stderr)
            row.differences["export"] = math.inf
    return row


def rescaled(folder: Path) -> RescaleFactors:
    """Factors like a search finds them: 1 for fast channels, up to the ratio for slow ones."""
    geometry = rope_geometry(folder, ORIGINAL_LEN)
    last = max(geometry.num_frequencies - 1, 1)
    ratio = TARGET_LEN / ORIGINAL_LEN
    values = tuple(ratio ** (i / last) for i in range(geometry.num_frequencies))
    return RescaleFactors(
        geometry=geometry, target_len=TARGET_LEN, factors=values, method="longrope2"
    )


def plain_model(folder: Path) -> Any:
    """As transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


class _Given(torch.nn.Module):
    """Stands in for a base model and gives the hidden states that it holds."""

    def __init__(self, hidden_BTH: Tensor) -> None:
        super().__init__()
        self.states = [hidden_BTH]

    def forward(self, *_: Any, **__: Any) -> MoeModelOutputWithPast:
        return MoeModelOutputWithPast(last_hidden_state=self.states[0])


def gradient_difference(model: WindowedModel, plain: Any) -> float:
    """Gradients of the loss by hidden states, head and bias against autograd in transformers."""
    generator = torch.Generator().manual_seed(2)
    size, tokens = plain.config.hidden_size, 24
    hidden_BTH = torch.randn(1, tokens, size, generator=generator).requires_grad_()
    labels_T = torch.randint(0, plain.config.vocab_size, (tokens,), generator=generator)
    labels_T[::5] = IGNORED_LABEL
    head = model.hf.get_output_embeddings()
    ours = token_loss_sum(
        hidden_BTH[0], head.weight, labels_T, bias_V=head.bias, rule=model.head_rule
    )
    inputs = [hidden_BTH, head.weight, *([] if head.bias is None else [head.bias])]
    found = torch.autograd.grad(ours, inputs)
    base, name = plain.base_model, plain.base_model_prefix
    plain._modules[name] = _Given(hidden_BTH)
    try:
        logits_BTV = plain(input_ids=torch.zeros(1, tokens, dtype=torch.long)).logits
    finally:
        plain._modules[name] = base
    theirs = F.cross_entropy(logits_BTV[0].float(), labels_T, reduction="sum")
    head = plain.get_output_embeddings()
    inputs = [hidden_BTH, head.weight, *([] if head.bias is None else [head.bias])]
    wanted = torch.autograd.grad(theirs, inputs)
    pairs = zip(found, wanted, strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def shares_difference(folder: Path, factors: RescaleFactors, model: WindowedModel) -> float:
    """Largest difference of weights read one by one, as ZeRO-3 reads them, and whole; exact."""
    shared = load_windowed_model(folder, factors, take=lambda parameter: None)
    found, wanted = dict(shared.hf.named_parameters()), dict(model.hf.named_parameters())
    if found.keys() != wanted.keys():
        return math.inf
    buffers = dict(shared.hf.named_buffers())
    for name, buffer in model.hf.named_buffers():
        if not torch.equal(buffer, buffers[name]):
            return math.inf
    return max(float((found[name] - wanted[name]).abs().max()) for name in wanted)


@torch.inference_mode()
def generation_difference(folder: Path, model: WindowedModel) -> float:
    """Share of greedy tokens that differ across L0, cached here and read anew in transformers.

    Under identity factors both windows are the model's own RoPE.
    """
    factors, new = model.factors, 8
    ones = (1.0,) * factors.geometry.num_frequencies
    model.set_factors(
        RescaleFactors(
            geometry=factors.geometry, target_len=TARGET_LEN, factors=ones, method="none"
        )
    )
    prompt = torch.randint(3, 2000, (ORIGINAL_LEN - 4,), generator=torch.Generator().manual_seed(5))
    try:
        tokens = generate_tokens(model, prompt.tolist(), max_new_tokens=new)
        found = [token.token_id for token in tokens]
    finally:
        model.set_factors(factors)
    plain, ids = plain_model(folder), prompt.tolist()
    for _ in range(new):
        logits_V = plain(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        ids.append(int(logits_V.argmax()))
    wanted = ids[len(prompt) :]
    return sum(a != b for a, b in zip(found, wanted, strict=True)) / new


def export_difference(folder: Path, factors: RescaleFactors) -> float:
    """Logits of plain transformers from every variant, both layouts together and alone."""
    largest = 0.0
    for variant in ExportVariant:
        applied = variant_factors(factors, variant)
        lengths = [n for n in (ORIGINAL_LEN, ORIGINAL_LEN + 1) if n <= applied.target_len]
        layouts = ("rope_scaling", "rope_parameters") if variant is ExportVariant.dual else ()
        for dropped in (None, *layouts):
            with tempfile.TemporaryDirectory() as place:
                out = Path(place)
                write_hugging_face_folder(folder, factors, out, torch.float32, variant)
                config = json.loads((out / "config.json").read_text())
                config.pop(dropped, None)
                (out / "config.json").write_text(json.dumps(config))
                read = AutoConfig.from_pretrained(out).rope_parameters or {}
                if dropped and read.get("rope_type", "default") == "default":
                    continue  # a class younger than the older layout, which it never reads
                found = verify_export(folder, applied, out, torch.float32, lengths)
            largest = max(largest, *found.values())
    return largest


def two_rank_differences(names: list[str], parent: Path) -> dict[str, float]:
    """Two sequence-parallel ranks (gloo) against one, all families in one pair of processes."""
    out = parent / "two_ranks.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", "-m", "tests.reference.model_table", str(parent), str(out)]
    command += names
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    ended = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads(out.read_text())


def two_ranks(parent: Path, out: Path, names: list[str]) -> None:
    """One of the two ranks: long and packed segments, in chunks and whole."""
    torch.set_num_threads(1)
    processes = join_processes(ParallelConfig(sequence=2))
    found = {}
    for name in names:
        folder = folder_of(name, parent)
        model = load_windowed_model(folder, rescaled(folder)).eval()
        largest = torch.zeros(())
        for window, ends in ((Window.LONG, [90, 200]), (Window.SHORT, [90, 130, 200])):
            largest = torch.maximum(largest, _rank_difference(model, window, ends, processes))
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        found[name] = float(largest)
    if processes.is_main:
        out.write_text(json.dumps(found))
    leave_processes()


def _rank_difference(
    model: WindowedModel, window: Window, ends: list[int], processes: Processes
) -> Tensor:
    """Logits of this rank's half and the gradient of its loss, against one rank."""
    tokens_BT = torch.randint(3, 2000, (1, 200), generator=torch.Generator().manual_seed(1))
    labels_BT = tokens_BT.roll(-1)
    rank, group = processes.dims.sequence_rank, processes.sequence_group
    mine = slice(100 * rank, 100 * (rank + 1))
    parts = build_layout(window, ends, sequence=Axis(rank, 2, group))
    whole = build_layout(window, ends)
    with torch.no_grad():
        one_BTV = model.logits(tokens_BT, window, whole)
        half_BTV = model.logits(tokens_BT[:, mine], window, parts)
    logits = (half_BTV - one_BTV[:, mine]).abs().max() / one_BTV.abs().max()
    weight = model.hf.get_input_embeddings().weight
    (wanted,) = torch.autograd.grad(model(tokens_BT, labels_BT, window, whole), [weight])
    loss = model(tokens_BT[:, mine], labels_BT[:, mine], window, parts)
    (found,) = torch.autograd.grad(loss, [weight])
    dist.all_reduce(found)
    return torch.maximum(logits, (found - wanted).abs().max() / wanted.abs().max())


def write_table(rows: list[Row]) -> str:
    """docs/models.md."""
    supported = [row for row in rows if row.refusal is None]
    refused = [row for row in rows if row.refusal is not None]
    columns = [*PARITY, "gradients", "shares", *SLOW]
    lines = [
        "# Models",
        "",
        f"Made by `{COMMAND}` from tiny random models (tests/reference/tiny_families.py) in",
        "float32, computed by this project and by plain transformers. Do not edit by hand;",
        "tests/reference/test_model_families.py compares it with a fresh run.",
        "",
        "A number is a bound of the largest difference, relative to the largest logit (loss,",
        "gradient): logits of one document; training loss; loss of scored tokens; two documents",
        "packed together against each alone; positions beyond the original window; gradients of",
        "the loss by hidden states, head and bias; weights read in shares against read whole;",
        "share of greedy tokens that differ when generating across the original window; an export",
        "in every variant and config layout, reloaded; two sequence-parallel ranks against one,",
        "logits and gradients. Other models are measured in the same way when they are loaded.",
        "",
        f"## Supported ({len(supported)})",
        "",
        "| family | rotated channels | head | " + " | ".join(columns) + " |",
        "|---" * (3 + len(columns)) + "|",
    ]
    for row in supported:
        cells = [_bound(row.differences.get(column)) for column in columns]
        lines.append(f"| {row.name} | {row.rope} | {row.head} | {' | '.join(cells)} |")
    lines += ["", f"## Refused ({len(refused)})", "", "| family | message |", "|---|---|"]
    lines += [f"| {row.name} | {row.refusal} |" for row in refused]
    return "\n".join(lines) + "\n"


def _bound(value: float | None) -> str:
    """A difference as the next of a few bounds."""
    if value is None:
        return ""
    if math.isinf(value):
        return "fails"
    bounds = (0.0, 1e-6, 1e-5, BOUND)
    return next((f"{b:g}" if b == 0 else f"<{b:.0e}" for b in bounds if value <= b), f"{value:.1g}")


def main() -> None:
    """Measure all columns of all families and print the table."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as place:
        with contextlib.redirect_stdout(io.StringIO()):
            rows = [measure(name, Path(place), slow=True) for name in FAMILIES]
            supported = [row for row in rows if row.refusal is None]
            ranks = two_rank_differences([row.name for row in supported], Path(place))
        for row in supported:
            row.differences["two ranks"] = ranks[row.name]
    print(write_table(rows), end="")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) > 1:
        two_ranks(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
    else:
        main()
