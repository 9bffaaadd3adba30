"""``python -m launch.lm_eval --model longrope2 --model_args ... --tasks ...``.

The harness's own command with our model in it: lm-eval finds models by import alone, so this
registers ours and hands over. ``python -m launch.evaluate suite=short`` runs the same from our
configuration, with results kept per task.
"""

import sys

from longrope2.command import run_command
from longrope2.evaluation.config import INSTALL, lm_eval_version, require_lm_eval
from longrope2.help import HELP_FLAGS


def main() -> None:
    """Register the model and run lm-eval's command line."""
    if set(sys.argv[1:]) & set(HELP_FLAGS):
        print(__doc__)
        if lm_eval_version() is None:
            print(f"Its flags are lm-eval's, which is not installed: {INSTALL}")
            return
    require_lm_eval()
    from lm_eval.__main__ import cli_evaluate

    import longrope2.evaluation.lm_eval_model  # noqa: F401  (registers the model)

    cli_evaluate()


if __name__ == "__main__":
    run_command(main)
