"""What a search would be refused for and can be known at once: before torch is imported."""

from longrope2.config import target_faults
from longrope2.corpora.build import build_corpus
from longrope2.corpora.run_corpus import corpus_of_run, missing_corpus
from longrope2.errors import ConfigError
from longrope2.model.factors_source import RopeConfig, factors_faults
from longrope2.model.folder import ModelLook
from longrope2.model.shape import ModelShape
from longrope2.parallel.dims import ParallelConfig, grid_faults, head_faults
from longrope2.rope.methods import RopeMethod
from longrope2.search.config import SearchRoot, search_faults


def known_faults(config: SearchRoot, look: ModelLook) -> list[str]:
    """All faults of a search that are known without loading anything.

    A corpus that is not packed yet is none in a dry run.

    Args:
        config: What was given.
        look: At the model, by ``look_before``.
    """
    config = look.with_its_window(config)
    faults = [*look.faults, *search_faults(config.search)]
    faults += target_faults(config.model, config.target_len, extends=True)
    try:
        if not (config.dry_run and missing_corpus(config.corpus, config.run.folder)):
            build_corpus(corpus_of_run(config.corpus, config.run.folder))
    except ConfigError as error:
        faults += error.faults
    if look.shape is not None:
        faults += parallel_faults(config.parallel, look.shape)
    if config.search.short_window_of is not None:
        rope = RopeConfig(method=RopeMethod.from_file, factors=config.search.short_window_of)
        found = factors_faults(rope, config.run.folder, config.target_len)
        faults += [f"search.short_window_of: {fault}" for fault in found]
    return faults + look.missing_files()


def parallel_faults(parallel: ParallelConfig, shape: ModelShape) -> list[str]:
    """Processes that cannot share the candidates or a sample, with numbers that can."""
    faults = head_faults(parallel.sequence, shape.num_heads, shape.num_kv_heads)
    if parallel.processes < 1:
        return [*faults, f"parallel.processes={parallel.processes} must be above 0"]
    return faults + grid_faults(parallel.processes, parallel.sequence, parallel.context)
