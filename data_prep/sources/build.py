"""The adapter, or the mix of adapters, that a configuration describes."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from data_prep.corpora import Corpus, CorpusConfig, CorpusKind
from longrope2.errors import ConfigError

__all__ = ["build_adapters"]


def build_adapters(config: CorpusConfig) -> Corpus:
    """The corpus; public places are tried side by side, so that waiting for several costs no more than for one.

    Raises:
        ConfigError: all faults together.
    """
    faults = _faults(config)
    if faults:
        raise ConfigError(faults)
    if config.kind is not CorpusKind.mix:
        return _adapter(config, config.kind)
    with ThreadPoolExecutor(max_workers=len(config.members)) as pool:
        results = list(pool.map(lambda kind: _built_or_faults(lambda: _adapter(config, kind)), config.members))
    corpora = [result for result in results if not isinstance(result, ConfigError)]
    faults = [fault for result in results if isinstance(result, ConfigError) for fault in result.faults]
    if faults:
        raise ConfigError(faults)
    from data_prep.sources.mix import MixedCorpus

    members = {kind.value: corpus for kind, corpus in zip(config.members, corpora, strict=True)}
    return MixedCorpus(members, heldout_fraction=config.heldout_fraction)


def _faults(config: CorpusConfig) -> list[str]:
    """Values that are wrong whatever the files are."""
    found = []
    if not 0.0 <= config.heldout_fraction <= 1.0:
        found.append(f"corpus.heldout_fraction={config.heldout_fraction} must be from 0 to 1")
    if config.heldout_characters is not None and config.heldout_characters < 1:
        found.append(f"corpus.heldout_characters={config.heldout_characters} must be at least 1, or null")
    if config.kind is CorpusKind.mix:
        allowed = ", ".join(kind.value for kind in CorpusKind if kind is not CorpusKind.mix)
        names = [kind.value for kind in config.members]
        if not names or len(set(names)) < len(names) or CorpusKind.mix in config.members:
            found.append(f"corpus.members={names}: name different ones of {allowed}")
    if config.folder is None and CorpusKind.folder in (config.kind, *config.members):
        found.append("corpus.folder is not set; corpus=folder needs corpus.folder=PATH")
    return found


def _built_or_faults(build: Callable[[], Corpus]) -> Corpus | ConfigError:
    """A corpus, or why there is none."""
    try:
        return build()
    except ConfigError as error:
        return error


def _adapter(config: CorpusConfig, kind: CorpusKind) -> Corpus:
    """One adapter; only its own module is imported."""
    heldout = config.heldout_fraction
    match kind:
        case CorpusKind.sample:
            from data_prep.sample_corpus import SampleCorpus

            return SampleCorpus(heldout_fraction=heldout)
        case CorpusKind.folder:
            from data_prep.folder_corpus import FolderCorpus

            assert config.folder is not None
            return FolderCorpus(
                config.folder, text_field=config.text_field, title_field=config.title_field, heldout_fraction=heldout
            )
        case CorpusKind.redpajama_v1:
            from data_prep.sources.redpajama_v1 import RedpajamaV1

            return RedpajamaV1(config.redpajama_v1, heldout_fraction=heldout)
        case CorpusKind.redpajama_v2:
            from data_prep.sources.redpajama_v2 import RedpajamaV2

            return RedpajamaV2(config.redpajama_v2, heldout_fraction=heldout)
        case CorpusKind.starcoder:
            from data_prep.sources.starcoder import Starcoder

            return Starcoder(config.starcoder, heldout_fraction=heldout)
        case CorpusKind.fineweb_edu:
            from data_prep.sources.fineweb_edu import FinewebEdu

            return FinewebEdu(config.fineweb_edu, heldout_fraction=heldout)
        case CorpusKind.pg19:
            from data_prep.sources.pg19 import Pg19

            return Pg19(config.pg19)
        case CorpusKind.mix:
            raise AssertionError("a mix has no mix among its members")
