"""A refused step where the optimizer counts steps before it looks at gradients, as apex's does."""

from types import SimpleNamespace
from typing import Any

import torch

from longrope2.training.step import StepGuard


class CountingAdam(torch.optim.Optimizer):
    """Group-wise step counter of apex; the update itself does not matter here."""

    def __init__(self, parameter: torch.nn.Parameter) -> None:
        super().__init__([parameter], {"lr": 1.0})

    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                if p.grad is not None:
                    p.data -= group["lr"] * p.grad / group["step"]


def test_a_refused_step_is_not_counted_by_the_group() -> None:
    parameter = torch.nn.Parameter(torch.ones(1))
    parameter.grad = torch.ones(1)
    optimizer = CountingAdam(parameter)
    engine = SimpleNamespace(
        basic_optimizer=optimizer, step=optimizer.step, was_step_applied=lambda: True
    )
    guard = StepGuard(engine, max_norm=10.0)
    assert not guard.step(loss=1.0, norm=float("nan"))
    assert "step" not in optimizer.param_groups[0] and parameter.item() == 1.0
    assert guard.step(loss=1.0, norm=1.0)
    assert not guard.step(loss=1.0, norm=11.0)
    assert guard.step(loss=1.0, norm=1.0)
    assert optimizer.param_groups[0]["step"] == 2
    assert parameter.item() == 1.0 - 1.0 - 0.5 and parameter.grad is not None
