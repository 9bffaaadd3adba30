"""The shipped miniature retrieves inside its window and fails beyond twice it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from longrope2.corpora.build import heldout_texts
from longrope2.corpora.config import CorpusConfig, CorpusKind
from longrope2.corpora.needles import build_needle_set
from longrope2.model.loading import load_tokenizer

FOLDER = Path(__file__).parent.parent.parent / "models" / "tiny"


def exact_share(length: int, num_samples: int) -> float:
    """Share of needle values that plain transformers gets right, token by token, at this length."""
    model = AutoModelForCausalLM.from_pretrained(FOLDER)
    texts = heldout_texts(CorpusConfig(name="sample", kind=CorpusKind.sample))
    depths = [0.0, 0.25, 0.5, 0.75, 1.0]
    needles = build_needle_set(
        load_tokenizer(FOLDER),
        texts,
        length=length,
        depths=depths,
        num_samples=num_samples,
        seed=31,
    )
    hits = []
    for sample in needles.samples:
        tokens = torch.from_numpy(sample.through_value)[None]
        with torch.no_grad():
            predicted = model(tokens).logits[0, sample.value_start - 1 : -1].argmax(-1)
        hits.append(torch.equal(predicted, tokens[0, sample.value_start :]))
    return float(np.mean(hits))


def test_it_retrieves_inside_its_window() -> None:
    assert exact_share(128, 200) >= 0.90


@pytest.mark.parametrize("length", [512, 1024])
def test_it_fails_beyond_twice_its_window(length: int) -> None:
    assert exact_share(length, 40) <= 0.15


def test_it_is_a_few_megabytes_and_between_one_and_three_million_parameters() -> None:
    model = AutoModelForCausalLM.from_pretrained(FOLDER)
    assert 1_000_000 <= sum(p.numel() for p in model.parameters()) <= 3_000_000
    assert (FOLDER / "model.safetensors").stat().st_size < 8_000_000
