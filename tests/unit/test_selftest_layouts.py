"""The start-up self-test can be built for every layout that a model's heads allow."""

from itertools import product
from pathlib import Path

import pytest
import torch

from longrope2.attention.layout import Gathered
from longrope2.model.shape import ModelShape
from longrope2.parallel.dims import ParallelDims, head_faults
from longrope2.rope.factors import Window
from longrope2.training.batch import load_rank_batch
from longrope2.training.selftest import TinySegments, tiny_heads, tiny_model

ROOT = Path(__file__).parent.parent.parent
# Query and key/value heads of the presets in conf/model, whose own config.json is here for some.
PRESETS = {
    "llama2_7b": (32, 32), "llama3_8b": (32, 8), "mistral_7b": (32, 8), "phi3_mini": (32, 32),
    "phi4_mini": (24, 8), "qwen3_0p6b": (16, 8), "qwen3_8b": (32, 8), "smollm2_135m": (9, 3),
    "smollm2_1p7b": (32, 32), "tiny": (4, 4),
}  # fmt: skip
OTHERS = {
    "llama2_13b": (40, 40), "llama3_70b": (64, 8), "llama3_2_3b": (24, 8), "phi3_medium": (40, 10),
    "qwen2_5_1_5b": (12, 2), "one_kv_head": (8, 1), "one_head": (1, 1),
}  # fmt: skip
CONTEXTS = (1, 2, 3)


def allowed_sequences(heads: int, kv_heads: int) -> list[int]:
    """Every sequence-parallel size that the configuration lets through."""
    return [n for n in range(1, heads + 1) if not head_faults(n, heads, kv_heads)]


def test_every_preset_is_here_with_its_heads() -> None:
    presets = {path.stem for path in (ROOT / "conf" / "model").glob("*.yaml")} - {"custom"}
    assert presets == PRESETS.keys(), "a preset's heads are missing in PRESETS"
    for folder in (ROOT / "models").glob("*/"):
        shape = ModelShape.from_folder(folder)
        assert (shape.num_heads, shape.num_kv_heads) == PRESETS[folder.name]


@pytest.mark.parametrize(("heads", "kv_heads"), sorted({*PRESETS.values(), *OTHERS.values()}))
def test_the_tiny_model_is_built_in_every_layout(heads: int, kv_heads: int) -> None:
    for sequence in allowed_sequences(heads, kv_heads):
        tiny = tiny_heads(sequence, heads, kv_heads)
        assert head_faults(sequence, *tiny) == []
        assert (tiny[0] == tiny[1]) == (heads == kv_heads)
        assert (tiny[1] < sequence) == (kv_heads < sequence)
        config = tiny_model(*tiny, segment_ranks=2 * sequence).hf.config
        assert (config.num_attention_heads, config.num_key_value_heads) == tiny
        assert config.hidden_size < 32 + tiny[0]


@pytest.mark.parametrize("window", list(Window))
@pytest.mark.parametrize(("sequence", "context"), [*product((1, 2, 3, 40), CONTEXTS), (9, 1)])
def test_ranks_share_the_tiny_segments(sequence: int, context: int, window: Window) -> None:
    """In every grid both kinds of segment, aligned and crossing, are shared without loss."""
    num_ranks = sequence * context
    for number in range(2):
        tokens, gathered = [], set()
        for rank in range(num_ranks):
            dims = ParallelDims(1, sequence, rank, context)
            store = TinySegments(window, dims)
            batch = load_rank_batch(store, store.micro_step(number), dims, None)
            tokens.append(batch.tokens_BT)
            gathered.add(isinstance(batch.layout.documents, Gathered))
        whole = store.segment(number).tokens
        assert torch.equal(
            torch.cat(tokens, dim=1)[0].sort().values, torch.from_numpy(whole.astype(int)).sort()[0]
        )
        crosses = window is Window.LONG or number == 1
        assert gathered == {context > 1 and crosses}
