"""Intervals of measured shares."""

import math

__all__ = ["wilson_interval"]

NORMAL_95 = 1.959963984540054  # 97.5 % quantile of the standard normal distribution


def wilson_interval(num_correct: int, num_samples: int) -> tuple[float, float]:
    """95 % score interval of a success probability (Wilson 1927): stays inside [0, 1] and is honest at 0 and 1.

    Args:
        num_correct: Successes, 0 .. ``num_samples``.
        num_samples: Trials, > 0.
    """
    z2 = NORMAL_95**2
    share = num_correct / num_samples
    centre = (share + z2 / (2 * num_samples)) / (1 + z2 / num_samples)
    spread = share * (1 - share) / num_samples + z2 / (4 * num_samples**2)
    half_width = NORMAL_95 * math.sqrt(spread) / (1 + z2 / num_samples)
    # At 0 and n of n the bound is exactly 0 and 1; rounding must not leave 1e-17.
    low = 0.0 if num_correct == 0 else centre - half_width
    high = 1.0 if num_correct == num_samples else centre + half_width
    return low, high
