"""``python -m launch.lm_eval --model longrope2 --model_args ... --tasks ...``: the harness's
command with our model in it.

lm-eval finds models by import alone, so this registers ours and hands over. ``python -m
launch.evaluate suite=short`` runs the same from our configuration, with results kept per task.
"""

from longrope2.command import run_command
from longrope2.evaluation.config import require_lm_eval


def main() -> None:
    """Register the model and run lm-eval's command line."""
    require_lm_eval()
    from lm_eval.__main__ import cli_evaluate

    import longrope2.evaluation.lm_eval_model  # noqa: F401  (registers the model)

    cli_evaluate()


if __name__ == "__main__":
    run_command(main)
