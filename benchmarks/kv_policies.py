"""``python -m benchmarks.kv_policies``: the cost of not reading a text again at the switch.

Texts with a needle begin within the original window L0 and go on beyond it. The first L0 tokens are
read with the original RoPE; then the cache is treated by one of three policies and the rest of the
text is read with the rescaled RoPE:

* ``reprefill``: the L0 tokens are read again. This is the model that was trained.
* ``rerotate``: the cached keys are turned to the rescaled RoPE. Exact in layer 0 only.
* ``stale``: the cache stays as it is. No policy of ours, but what engines do that switch the
  factors and keep the cache.

Printed for each: seconds from the first token beyond L0 to its logits, needle accuracy (all tokens
of the value are the most likely ones) and perplexity of the value, and the KL divergence of the
next-token distribution from reprefill's, over the positions beyond L0, in nats.

Shape legend: N = positions beyond L0, V = vocabulary.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import DynamicCache

from longrope2.config import ModelConfig, SlidingWindow
from longrope2.corpora.build import heldout_documents
from longrope2.corpora.config import CorpusConfig, CorpusKind
from longrope2.corpora.needles import build_needle_set
from longrope2.inference.cache import next_logits, prefill, rerotate_keys, single_row
from longrope2.model.factors_source import FACTORS_FILE
from longrope2.model.folder import given_folder
from longrope2.model.loading import load_tokenizer, load_windowed_model, rope_geometry
from longrope2.model.windowed import WindowedModel
from longrope2.presets import CONF_FOLDER
from longrope2.rope.factors import RescaleFactors, Window
from longrope2.rope.methods import RopeMethod, closed_form_factors
from longrope2.segments.needle_set import NeedleSample

Crossing = Callable[[WindowedModel, list[int], DynamicCache], DynamicCache]


def reprefill(model: WindowedModel, ids: list[int], cache: DynamicCache) -> DynamicCache:
    """Read everything again."""
    return prefill(model, ids, Window.LONG, None)[1]


def rerotate(model: WindowedModel, ids: list[int], cache: DynamicCache) -> DynamicCache:
    """Turn the cached keys, then read the new token."""
    rerotate_keys(cache, model.factors)
    return stale(model, ids, cache)


def stale(model: WindowedModel, ids: list[int], cache: DynamicCache) -> DynamicCache:
    """Read the new token beside keys of the other RoPE."""
    next_logits(model, torch.tensor([ids[-1:]]), cache, Window.LONG)
    return cache


_POLICIES: dict[str, Crossing] = {"reprefill": reprefill, "rerotate": rerotate, "stale": stale}


@dataclass
class Tally:
    """What one policy gave, one entry a text."""

    seconds: list[float] = field(default_factory=list)
    exact: list[bool] = field(default_factory=list)
    value_nats: list[float] = field(default_factory=list)
    divergence_nats: list[Tensor] = field(default_factory=list)


@torch.inference_mode()
def measure(model: WindowedModel, sample: NeedleSample, tallies: dict[str, Tally]) -> None:
    """Read one text under each policy."""
    ids, original_len = sample.through_value.tolist(), model.factors.geometry.original_len
    # Earlier tokens are predicted before the cache is used again.
    first_scored = max(sample.value_start, original_len + 2)
    labels_S = torch.tensor(ids[first_scored:])
    reference_NV = torch.empty(0)
    _, short_cache = prefill(model, ids[:original_len], Window.SHORT, None)
    for name, crossing in _POLICIES.items():
        cache = single_row(short_cache, 0, 0)  # a copy
        started = time.perf_counter()
        cache = crossing(model, ids[: original_len + 1], cache)
        tallies[name].seconds.append(time.perf_counter() - started)
        model.use_window(Window.LONG)
        rest_BT = torch.tensor([ids[original_len + 1 : -1]])
        log_p_NV = model.hf(input_ids=rest_BT, past_key_values=cache).logits[0].log_softmax(-1)
        if name == "reprefill":
            reference_NV = log_p_NV
        divergence_N = (reference_NV.exp() * (reference_NV - log_p_NV)).sum(-1)
        tallies[name].divergence_nats.append(divergence_N)
        value_SV = log_p_NV[-len(labels_S) :]
        tallies[name].exact.append(bool((value_SV.argmax(-1) == labels_S).all()))
        tallies[name].value_nats.append(-float(value_SV.gather(1, labels_S[:, None]).mean()))


def report(tallies: dict[str, Tally]) -> None:
    """Print the table."""
    columns = ("policy", "median seconds at the switch", "needle accuracy", "value perplexity")
    print(f"| {' | '.join((*columns, 'KL mean', 'KL median', 'KL largest'))} |")
    print("|---|---|---|---|---|---|---|")
    for name, tally in tallies.items():
        divergence_N = torch.cat(tally.divergence_nats)
        perplexity = math.exp(sum(tally.value_nats) / len(tally.value_nats))
        print(
            f"| {name} | {statistics.median(tally.seconds):.4f} | "
            f"{sum(tally.exact)}/{len(tally.exact)} | {perplexity:.2f} | {divergence_N.mean():.2g} "
            f"| {divergence_N.median():.2g} | {divergence_N.max():.2g} |"
        )


def main() -> None:
    """Load, build the texts, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kv_policies")
    add = parser.add_argument
    add("--model", default="tiny", help="name of a file in conf/model")
    add("--checkpoint", type=Path, help="folder of a trained checkpoint; its factors are used")
    add("--factors", type=Path, help="factors JSON for the untrained model")
    add("--method", default="ntk", help="closed form for the untrained model, without --factors")
    add("--target", type=int, default=2048, help="target window of a closed form")
    add("--original", type=int, help="original window to assume, to measure quickly")
    add("--length", type=int, required=True, help="tokens of a text, beyond the original window")
    add("--depths", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.75, 1.0])
    add("--samples", type=int, default=4, help="texts per depth")
    add("--seed", type=int, default=0)
    options = parser.parse_args()
    model, folder = load(options)
    corpus = CorpusConfig(name="sample", kind=CorpusKind.sample, heldout_fraction=0.2)
    samples = build_needle_set(
        load_tokenizer(folder),
        list(heldout_documents(corpus)),
        length=options.length,
        depths=options.depths,
        num_samples=options.samples * len(options.depths),
        seed=options.seed,
    ).samples
    tallies = {name: Tally() for name in _POLICIES}
    for sample in track(samples, description="texts", console=Console(stderr=True)):
        measure(model, sample, tallies)
    factors, texts = model.factors, f"{len(samples)} texts of {options.length} tokens"
    print(
        f"{options.model}, {options.checkpoint or 'not trained'}, {factors.method}, window "
        f"{factors.geometry.original_len} -> {factors.target_len}, {texts}, "
        f"{torch.get_num_threads()} threads"
    )
    report(tallies)


def load(options: argparse.Namespace) -> tuple[WindowedModel, Path]:
    """The model with its factors, and the folder of its tokenizer."""
    settings = yaml.safe_load(
        (CONF_FOLDER / "model" / f"{options.model}.yaml").read_text(encoding="utf-8")
    )
    window = SlidingWindow(settings.pop("sliding_window", "keep"))
    given = ModelConfig(**settings, sliding_window=window)
    folder = options.checkpoint or given_folder(given, options.target)
    path = options.checkpoint / FACTORS_FILE if options.checkpoint else options.factors
    if path is not None:
        factors = RescaleFactors.from_json(path.read_text(encoding="utf-8"))
    else:
        geometry = rope_geometry(folder, options.original or settings["original_len"])
        factors = closed_form_factors(RopeMethod(options.method), geometry, options.target)
    return load_windowed_model(folder, factors).eval(), folder


if __name__ == "__main__":
    main()
