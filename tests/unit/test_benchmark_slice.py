"""The slice of one rank: its stand-in exchange has the shapes, its FLOPs are the rank's."""

import json
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from benchmarks.gpu import slice as rank_slice
from longrope2.attention import windowed
from longrope2.planning.memory import Recompute
from longrope2.rope.factors import Window


def test_rearrangement_has_the_shapes_of_the_exchange() -> None:
    group = rank_slice._NoGroup(8)
    q, k = torch.randn(1, 32, 6, 4), torch.randn(1, 8, 6, 4)
    exchanged = rank_slice._tokens_to_heads(q, k, k, group)
    assert [x.shape for x in exchanged] == [(1, 4, 48, 4), (1, 1, 48, 4), (1, 1, 48, 4)]
    back = rank_slice._heads_to_tokens(exchanged[0].transpose(1, 2), group)
    assert torch.equal(back, q.transpose(1, 2))


def test_both_windows_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "slice.json"
    size = rank_slice.TINY
    with (
        patch.object(sys, "argv", ["slice", "--tiny", "--layers", "3", "--json", str(file)]),
        patch.object(
            windowed, "document_attention", wraps=windowed.document_attention
        ) as attention,
    ):
        rank_slice.main()
    found = json.loads(file.read_text())
    assert found == json.loads(capsys.readouterr().out)
    assert (found["layers"], found["recompute"]) == (3, Recompute.dense.value)
    shapes = [call.args[0].shape for call in attention.call_args_list]
    local, head_dim = size.segment_tokens // 8, size.hidden // size.heads
    passes_and_layers = 4 * 3  # nothing is attended twice under dense
    assert shapes[:passes_and_layers] == [(1, size.heads, local, head_dim)] * passes_and_layers
    assert shapes[passes_and_layers:] == [(1, 1, size.segment_tokens, head_dim)] * passes_and_layers
    matrices = 3 * (4 * 64 * 64 + 3 * 64 * 96) + 64 * 101
    for window, span in ((Window.SHORT, size.document_tokens), (Window.LONG, size.segment_tokens)):
        expected = 6 * local * (matrices + 3 * size.hidden * span)
        assert found["windows"][window.value]["tflop"] * 1e12 == pytest.approx(expected)
        assert found["windows"][window.value]["tokens_per_second"] > 0
