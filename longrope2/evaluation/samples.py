"""Questions of generation tasks: a prompt, what a right answer is, and the rule that scores one.

RULER, the needle map and the long tasks all come down to this; one runner answers them (``generation_run.py``).
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

__all__ = ["GenerationTask", "Sample"]


@dataclass(frozen=True)
class Sample:
    """One question, ready to be read by a model.

    Attributes:
        prompt_T: Token ids of the prompt, BOS included where the model has one; int32 [T].
        answers: Strings that the score is taken against; what they mean is the task's rule.
        max_new_tokens: Upper bound on the answer's tokens; prompt and answer fit into the task's length.
        facts: What is known about the sample (realised depth, tokens left out, ...); plain JSON values.
    """

    prompt_T: np.ndarray
    answers: tuple[str, ...]
    max_new_tokens: int
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def sha256(self) -> str:
        """Hash of all that an answer and its score depend on."""
        head = json.dumps([list(self.answers), self.max_new_tokens, len(self.prompt_T)]).encode()
        return hashlib.sha256(head + np.ascontiguousarray(self.prompt_T, dtype="<i4").tobytes()).hexdigest()


@dataclass(frozen=True)
class GenerationTask:
    """One task at one length, the same samples for every model.

    Attributes:
        suite: ``ruler``, ``needle_map``, ``longbench``, ...
        name: The task within it.
        length: Tokens that prompt and answer may take together.
        score: From a sample and the text a model answered to a number from 0 (wrong) to 1 (right).
    """

    suite: str
    name: str
    length: int
    samples: tuple[Sample, ...]
    score: Callable[[Sample, str], float]
