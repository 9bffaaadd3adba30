"""Look at a model and at documents, and write the experiment file of their extension.

``python -m launch.init model.path=FOLDER_OR_HUB_ID corpus.folder=FOLDER target_len=TOKENS`` writes
``conf/experiment/NAME.yaml``: window, heads, tokenizer, lengths of the documents, a layout of
processes for this machine (``processes=``, ``hardware=`` for another one), batch, steps, learning
rate, search and evaluation, each value with its reason. All of it has passed the checks of every
stage when it is written; after it every command is ``python -m launch.train experiment=NAME``.
"""

import shlex
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from launch.init.before import InitRoot, prepare
from longrope2.command import run_command
from longrope2.config import compose
from longrope2.errors import ConfigError, UserError


def main() -> None:
    """Compose, look, propose, check, write."""
    config = compose(InitRoot, "init", sys.argv[1:])
    path = prepare(config)
    # Only now: torch and transformers load for seconds.
    from launch.init.experiment_file import experiment_text, write_new
    from launch.init.proposal import propose
    from launch.init.survey import look_at_documents, look_at_model

    model = look_at_model(config)
    proposal = propose(config, model, look_at_documents(config, model.encoder))
    name = path.stem if config.file is None else shlex.quote(str(path))
    made_by = f"python -m launch.init {shlex.join(sys.argv[1:])}"
    text = experiment_text(proposal, name, made_by)
    check_text(text)
    for warning in proposal.warnings:
        print(f"note: {warning}")
    if config.dry_run:
        print(text, end="")
        return
    write_new(path, text)
    print(f"experiment in {path}; next: python -m data_prep.pack experiment={name}")


def check_text(text: str) -> None:
    """Ask every stage whether it would take the experiment.

    Raises:
        ConfigError: what they say against it, all together.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "proposed.yaml"
        path.write_text(text, encoding="utf-8")
        given = [f"experiment={path}", "dry_run=true"]
        checks = (_check_pack, _check_search, _check_train, _check_evaluate, _check_export)
        faults = [fault for check in checks for fault in _faults_of(check, given)]
    if faults:
        raise ConfigError(list(dict.fromkeys(faults)))


def _faults_of(check: Callable[[list[str]], object], given: list[str]) -> tuple[str, ...]:
    try:
        check(given)
    except ConfigError as error:
        return error.faults
    except UserError as error:
        return (str(error),)
    return ()


def _check_pack(given: list[str]) -> None:
    from data_prep.config import PackConfig
    from data_prep.pack import check

    check(compose(PackConfig, "pack", given))


def _check_search(given: list[str]) -> None:
    from longrope2.search.config import SearchRoot
    from longrope2.search.prepare import check

    check(compose(SearchRoot, "search", given))


def _check_train(given: list[str]) -> None:
    from longrope2.training.config import TrainRoot
    from longrope2.training.plan import resolve_run

    config = compose(TrainRoot, "train", given)
    resolve_run(config, config.parallel.processes)


def _check_evaluate(given: list[str]) -> None:
    from longrope2.evaluation.config import EvaluateRoot, check

    check(compose(EvaluateRoot, "evaluate", given))


def _check_export(given: list[str]) -> None:
    from longrope2.export.variants import ExportRoot, check

    check(compose(ExportRoot, "export", given))


if __name__ == "__main__":
    run_command(main)
