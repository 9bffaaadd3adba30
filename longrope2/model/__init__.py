"""Load a Hugging Face model and attach the windowed rotary, the windowed attention, the fused loss and norms."""

from longrope2.model.cost import ForwardCost
from longrope2.model.factors_source import FACTORS_FILE, RopeConfig, factors_path, resolve_factors
from longrope2.model.loading import load_tokenizer, load_windowed_model, rope_geometry
from longrope2.model.loss import IGNORED_LABEL, token_loss_sum
from longrope2.model.norms import NormKernel, choose_norm, norm_fault, use_norm
from longrope2.model.scoring import head_nll, token_nll
from longrope2.model.windowed import WindowedModel

__all__ = [
    "FACTORS_FILE",
    "IGNORED_LABEL",
    "ForwardCost",
    "NormKernel",
    "RopeConfig",
    "WindowedModel",
    "choose_norm",
    "factors_path",
    "head_nll",
    "load_tokenizer",
    "load_windowed_model",
    "norm_fault",
    "resolve_factors",
    "rope_geometry",
    "token_loss_sum",
    "token_nll",
    "use_norm",
]
