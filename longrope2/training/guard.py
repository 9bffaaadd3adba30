"""Steps that must not be applied: a loss or gradient norm that is not finite, or a norm far above the usual.

A refused step is refused on all ranks alike, because what it is judged by (loss and norm of the whole step) is the same on
all of them. Then

- the parameters and the optimizer's state, moments and bias-correction counters alike, stay as they were;
- the step still counts: the learning-rate schedule and the order of segments go on, and its segments are not tried again
  (they are the likeliest cause);
- ``train/skipped_steps`` counts it, and ``training.max_skipped_steps`` of them in a row end the run.

How: DeepSpeed computes the global norm inside its optimizer step, just before it calls the optimizer it wraps, once per
group of parameters. Hooks of that optimizer take the gradients away before the step and put them back after it (DeepSpeed
keeps some of these buffers), and an Adam without gradients does nothing, save that apex's counts the step all the same: the
counters of groups are put back too.
(DeepSpeed itself leaves a step out when the norm is not finite, before it comes to the hook.)
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

from longrope2.errors import UserError

__all__ = ["SkippedSteps", "StepGuard"]


class StepGuard:
    """Judges every step of one engine; make it once, after ``deepspeed.initialize`` has taken its own first steps."""

    def __init__(self, engine: Any, max_norm: float | None = None) -> None:
        """Hook into the engine's optimizer.

        Args:
            engine: DeepSpeed engine; ``engine.basic_optimizer`` is the optimizer that was given to it.
            max_norm: Gradient norm (before clipping) above which a step is refused; None refuses none for its size.
        """
        self._engine = engine
        self._max_norm = math.inf if max_norm is None else max_norm
        self._loss = 0.0
        self._norm: float | None = None
        self._refused = False
        self._taken: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        self._counted: list[tuple[dict[str, Any], Any]] = []
        engine.basic_optimizer.register_step_pre_hook(self._take_gradients_if_refused)
        engine.basic_optimizer.register_step_post_hook(self._put_gradients_back)

    def step(self, loss: float, norm: float | None) -> bool:
        """Call ``engine.step()`` for the last micro-step; returns whether the update was applied.

        Args:
            loss: Loss of the whole step, the same on all ranks.
            norm: Global gradient norm, where DeepSpeed does not compute it itself; else None.
        """
        self._loss, self._norm, self._refused = loss, norm, False
        self._engine.step()
        return not self._refused and bool(self._engine.was_step_applied())

    def _take_gradients_if_refused(self, optimizer: torch.optim.Optimizer, *unused: Any) -> None:
        """Hook: without gradients the optimizer changes neither parameters nor state."""
        norm = float(self._engine.optimizer._global_grad_norm) if self._norm is None else self._norm
        self._refused = not (math.isfinite(self._loss) and math.isfinite(norm) and norm <= self._max_norm)
        if self._refused:
            self._taken = [(p, p.grad) for group in optimizer.param_groups for p in group["params"]]
            self._counted = [(group, group.get("step")) for group in optimizer.param_groups]
            for parameter, _ in self._taken:
                parameter.grad = None

    def _put_gradients_back(self, *unused: Any) -> None:
        """Hook: DeepSpeed goes on as after any step."""
        for parameter, gradient in self._taken:
            parameter.grad = gradient
        for group, step in self._counted:
            group.pop("step", None)
            if step is not None:
                group["step"] = step
        self._taken, self._counted = [], []


@dataclass
class SkippedSteps:
    """How many steps were refused; kept in checkpoints."""

    total: int = 0
    """Since the start of the run."""
    in_a_row: int = 0
    """Up to and including the latest step."""

    def count(self, applied: bool) -> None:
        """Count one step."""
        self.in_a_row = 0 if applied else self.in_a_row + 1
        self.total += not applied

    def stop_if_too_many(self, at_most: int, *, step: int, loss: float, norm: float) -> None:
        """End a run that no longer trains.

        Args:
            at_most: ``training.max_skipped_steps``.
            step: Number of the latest step, 1-based.
            loss: Its loss.
            norm: Its gradient norm.

        Raises:
            UserError: ``at_most`` steps in a row were refused.
        """
        if self.in_a_row >= at_most:
            raise UserError(
                f"training.max_skipped_steps={at_most}: that many steps in a row were skipped, the last one step {step} "
                f"with loss {loss} and gradient norm {norm}; the checkpoints are intact. Lower training.learning_rate, "
                "raise training.skip_grad_norm if the norm is finite, or look at the segments of these steps"
            )
