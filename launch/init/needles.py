"""Whether the model finds a needle inside its own window: what a search by needles asks for."""

from dataclasses import dataclass

import torch

from launch.init.before import InitRoot
from launch.init.survey import ModelFacts
from longrope2.corpora.build import heldout_documents
from longrope2.corpora.needle_wording import choose_wording
from longrope2.corpora.needles import build_needle_set
from longrope2.errors import DataError
from longrope2.model.loading import load_to_run, load_tokenizer, rope_geometry
from longrope2.rope.methods import RopeMethod, closed_form_factors
from longrope2.rope.window import Window
from longrope2.search.config import SearchConfig
from longrope2.search.objective import SampleLosses, needle_samples
from longrope2.search.selftests import check_needle_guidance

_SAMPLES, _DEPTHS = 4, (0.0, 0.5)
# FLOPs of a trial that takes well below a minute on a core, or on a GPU.
_MOST_FLOPS = {"cpu": 2e12, "cuda": 1e15}


@dataclass(frozen=True)
class NeedleTrial:
    """How the trial went."""

    fault: str | None = None
    """What a search by needles would say against this model."""
    was_made: bool = True
    """False where it would take too long on this machine."""


def try_needles(config: InitRoot, model: ModelFacts) -> NeedleTrial:
    """Ask the model for a few needles at its own window, as the search does before it begins."""
    length, device = model.window, "cuda" if torch.cuda.is_available() else "cpu"
    if 2 * _SAMPLES * model.shape.forward_flops(length) > _MOST_FLOPS[device]:
        return NeedleTrial(was_made=False)
    search, tokenizer = SearchConfig(), load_tokenizer(model.folder)
    geometry = rope_geometry(model.folder, length)
    factors = closed_form_factors(RopeMethod.none, geometry, config.target_len)
    loaded, books = load_to_run(model.folder, factors), heldout_documents(config.corpus)

    def losses(with_needle: bool) -> SampleLosses:
        needles = build_needle_set(
            tokenizer,
            books,
            length=length,
            num_samples=_SAMPLES,
            depths=_DEPTHS,
            seed=config.seed,
            with_needle=with_needle,
            wording=choose_wording(search.wording, length),
            document_start=config.model.document_start,
        )
        return SampleLosses(loaded, needle_samples(needles), 1, Window.SHORT)

    try:
        check_needle_guidance(losses(True), losses(False), factors, search)
    except DataError as error:
        return NeedleTrial(fault=str(error).rpartition(": ")[0])
    return NeedleTrial()
