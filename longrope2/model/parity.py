"""Parity at load: ours against plain transformers, before anything is searched or trained.

The same module computes some hundred tokens twice: as transformers runs it, and with what this
project attaches. Compared are (a) the logits, (b) the training loss and the scored loss with the
loss of transformers' logits, (c) the rotary table with our geometry, (d) two packed documents with
each document alone, (e) positions beyond the original window under identity factors, (f) doubled
positions under factors of 2, which turn by the same angles: whether all rotation comes from our
module, (g) hidden states in training mode: whether the class draws noise. What the class does and
ours does not shows here, by name where it can be named, whatever family it is of.

What is computed once serves several comparisons: attention is causal, so that the logits of a
prefix are a prefix of the logits. Only the packed documents are read whole; the other runs read
their first half.

A model that no process holds whole (ZeRO-3 shares) is checked on a cut of itself: its own config
with two layers, or as many as show every kind of layer, a small vocabulary, a narrow MLP and random
weights: its attention, rotary module, norms and head are as wide as they are.

Shape letters: B = rows, T = tokens, V = vocabulary, N = scored tokens.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from longrope2.attention.layout import SegmentLayout, build_layout
from longrope2.attention.windowed import watch_layouts
from longrope2.errors import ArtifactError
from longrope2.model.given import cut_layers, shrink_vocabulary
from longrope2.model.loss import IGNORED_LABEL
from longrope2.model.scoring import token_nll
from longrope2.model.windowed import WindowedModel
from longrope2.rope.factors import RescaleFactors, Window

NUM_TOKENS = 96
FIRST_DOCUMENT = 32
CUT_VOCABULARY = 2048
CUT_MLP = 256
# A prime, so that no two rows of a matrix begin at the same number soon.
_NOISE_NUMBERS = 1_000_003
# Largest difference over the largest logit (or the loss), by number format: rounding alone reaches
# a tenth of these.
TOLERANCES = {
    torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2,
}  # fmt: skip


@dataclass(frozen=True)
class PlainRun:
    """What transformers itself makes of the tokens, before anything is attached."""

    tokens_BT: Tensor
    """Two documents."""
    first: int
    """Tokens of the first one."""
    half_BT: Tensor
    """The first half of the tokens, more than the first document: read without its boundary."""
    logits_BTV: Tensor
    """Of the half."""
    documents_BTV: Tensor
    """Both documents, each alone."""
    beyond_BTV: Tensor
    """The half at positions that begin inside the original window and end beyond it."""


@dataclass(frozen=True)
class Parity:
    """Largest differences, relative to the largest logit, hidden state, or loss."""

    logits: float
    loss: float
    scored: float
    documents: float
    beyond: float
    factors: float
    training: float

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:.1e}" for name, value in vars(self).items())


@torch.no_grad()
def run_plain(hf: Any, original_len: int) -> PlainRun:
    """Run a model as transformers does; to be called before ours is attached to it.

    Args:
        hf: The causal model, real, in evaluation mode.
        original_len: L0 in tokens.

    Raises:
        ArtifactError: transformers itself cannot run it.
    """
    try:
        return _run_plain(hf, original_len)
    except (torch.OutOfMemoryError, ArtifactError):
        raise
    except Exception as error:  # whatever the class raises
        raise ArtifactError(
            f"{hf.config.model_type} is not supported: transformers itself cannot run it with "
            f"this config.json: {_reason(error)}"
        ) from error


def _run_plain(hf: Any, original_len: int) -> PlainRun:
    """``run_plain`` without its refusal."""
    device, vocabulary = next(hf.parameters()).device, hf.get_input_embeddings().num_embeddings
    num_tokens = min(NUM_TOKENS, original_len)
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(0, vocabulary, (1, num_tokens), generator=generator).to(device)
    first = min(FIRST_DOCUMENT, num_tokens // 3)
    half_BT = tokens_BT[:, : num_tokens // 2]
    logits_BTV = _logits(hf, half_BT)
    if not logits_BTV.isfinite().all():
        raise ArtifactError(
            f"the weights of this {hf.config.model_type} give logits that are not finite in "
            "transformers itself: some hold NaN or infinity; fetch or save them again"
        )
    documents = logits_BTV[:, :first], _logits(hf, tokens_BT[:, first:])
    return PlainRun(
        tokens_BT=tokens_BT,
        first=first,
        half_BT=half_BT,
        logits_BTV=logits_BTV,
        documents_BTV=torch.cat(documents, dim=1),
        beyond_BTV=_logits(hf, half_BT, _positions_beyond(half_BT, original_len)),
    )


@torch.no_grad()
def compare(model: WindowedModel, plain: PlainRun) -> Parity:
    """Run the same tokens through ours and compare; the factors of ``model`` are put aside.

    Raises:
        ArtifactError: a difference beyond rounding; names what differs and by how much.
    """
    kind, factors, half_BT = model.hf.config.model_type, model.factors, plain.half_BT
    positions_BT = _positions_beyond(half_BT, factors.geometry.original_len)
    try:
        model.set_factors(_constant(factors, 1.0))  # the short window's may be rescaled, too
        with watch_layouts() as seen:
            packed = _layout(plain, plain.tokens_BT)
            hidden_BTH = model.hidden_states(plain.tokens_BT, Window.SHORT, packed)
        _refuse_lost_layouts(kind, seen)
        beyond_BTV = model.logits(half_BT, Window.LONG, positions_BT=positions_BT)
        parity = Parity(
            logits=_difference(model.logits(half_BT, Window.SHORT), plain.logits_BTV),
            loss=_loss_difference(model, plain, hidden_BTH),
            scored=_scored_difference(model, plain),
            documents=_difference(model.head_logits(hidden_BTH), plain.documents_BTV),
            beyond=_difference(beyond_BTV, plain.beyond_BTV),
            factors=_factors_difference(model, plain, positions_BT),
            training=_training_difference(model, plain, hidden_BTH),
        )
    except (torch.OutOfMemoryError, ArtifactError):
        raise
    except Exception as error:  # whatever the class raises
        raise ArtifactError(
            f"{kind} is not supported: its class cannot run with the attention and rotary module "
            f"of this project: {_reason(error)}"
        ) from error
    finally:
        model.set_factors(factors)
    _refuse_difference(model.hf.config, parity, TOLERANCES[plain.logits_BTV.dtype])
    return parity


def check_cut(config: Any, factors: RescaleFactors) -> Parity:
    """The same on a cut of the model with random weights: all that is needed is its config.

    Raises:
        ArtifactError: as ``compare``, or the class cannot be built.
    """
    from transformers import AutoModelForCausalLM

    cut = cut_layers(config)
    shrink_vocabulary(cut, CUT_VOCABULARY)
    for key, value in config.to_dict().items():
        if "intermediate_size" in key and isinstance(value, int):
            setattr(cut, key, min(value, CUT_MLP))
    try:
        # A model that starts at random draws the same afterwards.
        with torch.random.fork_rng(devices=[]), _NoDrawing():
            hf = AutoModelForCausalLM.from_config(cut, dtype=torch.float32).eval()
    except Exception as error:  # whatever the class raises
        raise ArtifactError(
            f"transformers cannot build a {config.model_type} from its config.json: "
            f"{_reason(error)}"
        ) from error
    _fill_with_noise(hf)
    plain = run_plain(hf, factors.geometry.original_len)
    return compare(WindowedModel(hf, factors), plain)


class _NoDrawing(TorchFunctionMode):
    """Classes draw every matrix twice when they are built, which takes seconds; here not at all."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Whatever is called, but for drawing matrices."""
        given = kwargs or {}
        if getattr(func, "__name__", "").endswith(("normal_", "uniform_")):
            tensor = args[0] if args else given["tensor"]  # torch.nn.init's own name for it
            if tensor.dim() >= 2:
                return tensor
        return func(*args, **given)


@torch.no_grad()
def _fill_with_noise(hf: Any) -> None:
    """Matrices of variance 1 / columns: stretches of one sequence, each row begins elsewhere."""
    noise_N = torch.randn(_NOISE_NUMBERS, generator=torch.Generator().manual_seed(0))
    for parameter in hf.parameters():
        if parameter.dim() >= 2:
            scaled_N = noise_N / parameter.shape[-1] ** 0.5
            for stretch in parameter.view(-1).split(_NOISE_NUMBERS):
                stretch.copy_(scaled_N[: len(stretch)])


def _logits(hf: Any, tokens_BT: Tensor, positions_BT: Tensor | None = None) -> Tensor:
    """Logits of plain transformers."""
    return hf(input_ids=tokens_BT, position_ids=positions_BT, use_cache=False).logits


def _positions_beyond(tokens_BT: Tensor, original_len: int) -> Tensor:
    """Positions of as many tokens, half of them beyond the original window."""
    num_tokens = tokens_BT.shape[1]
    first = original_len - num_tokens // 2
    return torch.arange(first, first + num_tokens, device=tokens_BT.device)[None]


def _constant(factors: RescaleFactors, value: float) -> RescaleFactors:
    """One factor for all frequencies of the long window."""
    same = (value,) * factors.geometry.num_frequencies
    # Factors may grow to the ratio of the windows only.
    target_len = max(factors.target_len, 2 * factors.geometry.original_len)
    return RescaleFactors(
        geometry=factors.geometry, target_len=target_len, factors=same, method="none"
    )


def _difference(ours_BTV: Tensor, plain_BTV: Tensor) -> float:
    """Largest difference over the largest logit (or hidden state)."""
    plain_BTV = plain_BTV.float()
    return float((ours_BTV.float() - plain_BTV).abs().max() / plain_BTV.abs().max())


def _factors_difference(model: WindowedModel, plain: PlainRun, positions_BT: Tensor) -> float:
    """Doubled positions under factors of 2; leaves those factors."""
    model.set_factors(_constant(model.factors, 2.0))
    doubled_BTV = model.logits(plain.half_BT, Window.LONG, positions_BT=2 * positions_BT)
    model.set_factors(_constant(model.factors, 1.0))
    return _difference(doubled_BTV, plain.beyond_BTV)


def _loss_difference(model: WindowedModel, plain: PlainRun, hidden_BTH: Tensor) -> float:
    """Training loss of both documents against the loss of transformers' logits of each alone."""
    labels_BT = _labels(plain)
    ours = float(model.loss_sum(hidden_BTH, labels_BT))
    documents_TV = plain.documents_BTV[0].float()
    losses_T = F.cross_entropy(
        documents_TV, labels_BT[0], reduction="none", ignore_index=IGNORED_LABEL
    )
    wanted = float(losses_T.sum())
    return abs(ours - wanted) / wanted


def _training_difference(model: WindowedModel, plain: PlainRun, hidden_BTH: Tensor) -> float:
    """Hidden states of the half in training mode against those in evaluation mode."""
    half_BT, was_training = plain.half_BT, model.hf.training
    model.hf.train()
    try:
        with torch.random.fork_rng(devices=[]):
            found_BTH = model.hidden_states(half_BT, Window.SHORT, _layout(plain, half_BT))
    finally:
        model.hf.train(was_training)
    return _difference(found_BTH, hidden_BTH[:, : half_BT.shape[1]])


def _layout(plain: PlainRun, tokens_BT: Tensor) -> SegmentLayout:
    """Both documents packed into one segment, as far as the tokens go."""
    ends = [plain.first, tokens_BT.shape[1]]
    return build_layout(Window.SHORT, ends, device=tokens_BT.device)


def _labels(plain: PlainRun) -> Tensor:
    """Next tokens, inside each document."""
    labels_BT = torch.full_like(plain.tokens_BT, IGNORED_LABEL)
    labels_BT[:, :-1] = plain.tokens_BT[:, 1:]
    labels_BT[0, plain.first - 1] = IGNORED_LABEL
    return labels_BT


def _scored_difference(model: WindowedModel, plain: PlainRun) -> float:
    """Loss of single tokens as search and evaluation score them, from a third of the half on."""
    first = plain.half_BT.shape[1] // 3
    ours_N = token_nll(model, plain.half_BT, Window.SHORT, first)[0]
    logits_NV = plain.logits_BTV[0, first - 1 : -1].float()
    wanted_N = F.cross_entropy(logits_NV, plain.half_BT[0, first:], reduction="none")
    return float((ours_N - wanted_N).abs().max() / wanted_N.max())


def _reason(error: Exception) -> str:
    """What the class raised, on one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _refuse_lost_layouts(kind: str, seen: list[bool]) -> None:
    """Refuse a class whose attention is never told where documents end."""
    if not seen:
        raise ArtifactError(
            f"{kind} is not supported: its attention does not go through transformers' attention "
            "functions, so that it cannot be replaced"
        )
    if not all(seen):
        raise ArtifactError(
            f"{kind} is not supported: its decoder layers do not hand keyword arguments on to "
            "attention, which is then not told where documents end"
        )


def _refuse_difference(config: Any, parity: Parity, tolerance: float) -> None:
    """Refuse what rounding does not explain."""
    noise = [f"{k}={v:g}" for k, v in config.to_dict().items() if "jitter" in k and v]
    reasons = {
        "logits": "its logits",
        "loss": "its training loss",
        "scored": "the loss of scored tokens",
        "documents": "documents packed together (a layer that carries state past attention?)",
        "beyond": "positions beyond the original window",
        "factors": "rescaled positions (a rotation that is not its rotary module's?)",
        "training": f"training mode (noise that its class draws: {', '.join(noise) or '?'})",
    }
    broken = [
        f"{text} by {getattr(parity, name):.2g}"
        for name, text in reasons.items()
        if not getattr(parity, name) <= tolerance
    ]
    if broken:
        raise ArtifactError(
            f"{config.model_type} is not supported: computed by this project it differs from "
            "transformers in "
            f"{', '.join(broken)} (relative; rounding explains {tolerance:g})"
        )
