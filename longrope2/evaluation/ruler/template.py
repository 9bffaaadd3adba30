"""What stands around RULER's prompts for a model that was tuned to be chatted with.

RULER asks base models bare and others inside the template that is named for them
(``scripts/data/template.py`` of its checkout). Which one fits is seen at the model's own chat
template: RULER's must hold the same control tokens. A model that RULER has none for is asked inside
its own.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longrope2.errors import ConfigError, DataError
from longrope2.evaluation.ruler.config import RulerConfig
from longrope2.evaluation.ruler.upstream_draws import literal_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BASE, OWN = "base", "own"
_TEMPLATE_FILE = Path("scripts/data/template.py")
_TASK = "{task_template}"
_PLACEHOLDER = "The task stands here."
_CONTROL = re.compile(r"<\|?[^<>\s]+?\|?>|\[/?[A-Z]+\]")


@dataclass(frozen=True)
class PromptTemplate:
    """What stands before and behind a task; the start of the answer follows it."""

    name: str
    """``base``, ``own``, or that of RULER's template."""
    head: str = ""
    tail: str = ""
    control_ids: Mapping[str, int] = field(default_factory=dict)
    """Control tokens of head and tail; what a prompt's texts look like never becomes one."""

    @property
    def label(self) -> str:
        """For the titles of tables."""
        if self.name == BASE:
            return "no chat template"
        owner = "the model's own" if self.name == OWN else f"RULER's {self.name}"
        return f"{owner} chat template"

    def around(self, task: str) -> str:
        """A task's template inside; braces of head and tail stay as they are when it is filled."""
        head, tail = (part.replace("{", "{{").replace("}", "}}") for part in (self.head, self.tail))
        return f"{head}{task}{tail}"

    def pieces(self, text: str) -> list[str | int]:
        """A prompt as pieces of text and ids of control tokens, in order."""
        marks = [re.escape(part) for part in (self.head, self.tail) if part]
        names = "|".join(map(re.escape, self.control_ids))
        found: list[str | int] = [""]
        for part in re.split(f"({'|'.join(marks)})", text) if marks else [text]:
            is_mark = part in (self.head, self.tail) and bool(names)
            for piece in re.split(f"({names})", part) if is_mark else [part]:
                if is_mark and piece in self.control_ids:
                    found += [self.control_ids[piece], ""]
                else:
                    found[-1] = f"{found[-1]}{piece}"
        return [piece for piece in found if piece != ""]


def choose_template(config: RulerConfig, tokenizer: "PreTrainedTokenizerBase") -> PromptTemplate:
    """The template of ``config``, or the one that fits the model.

    Raises:
        ConfigError: a name that neither RULER nor the model has.
        DataError: the checkout holds no templates.
    """
    name, own = config.template, _own_template(tokenizer)
    if name == BASE or (name is None and own is None) or config.upstream_checkout is None:
        return PromptTemplate(BASE)
    rulers = _rulers_templates(Path(config.upstream_checkout))
    if name is None:
        assert own is not None
        name = _fitting(rulers, "".join(own)) or OWN
    known = {**rulers, **({OWN: own} if own is not None else {})}
    if name not in known:
        fault = f"suite.ruler.template={name} is no template of RULER's or the model's"
        raise ConfigError([f"{fault}; use {BASE}, {', '.join(known)}, or null to have one chosen"])
    head, tail = known[name]
    return PromptTemplate(name, head, tail, _control_ids(tokenizer, head + tail))


def _rulers_templates(checkout: Path) -> dict[str, tuple[str, str]]:
    """Head and tail of each of RULER's templates by name, but for the empty ``base``."""
    path = checkout / _TEMPLATE_FILE
    if not path.is_file():
        fault = f"suite.ruler.upstream_checkout={checkout} holds no {_TEMPLATE_FILE}"
        raise DataError(f"{fault}; give a checkout of github.com/NVIDIA/RULER")
    found = {}
    for name, template in literal_of(path, "Templates").items():
        head, mark, tail = str(template).partition(_TASK)
        if not mark:
            raise DataError(f"{path}: the template {name} holds no {_TASK}")
        if name != BASE:
            found[name] = head, tail
    return found


def _own_template(tokenizer: "PreTrainedTokenizerBase") -> tuple[str, str] | None:
    """Head and tail of the model's own chat template around one message of a user."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    messages: list[dict[str, str]] = [{"role": "user", "content": _PLACEHOLDER}]
    options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True}
    head, mark, tail = str(tokenizer.apply_chat_template(messages, **options)).partition(
        _PLACEHOLDER
    )
    if not mark:
        way_out = f"set suite.ruler.template={BASE}, or to one of RULER's"
        raise DataError(f"the model's chat template drops what the user says; {way_out}")
    return head, tail


def _fitting(rulers: Mapping[str, tuple[str, str]], own: str) -> str | None:
    """RULER's template with the most control tokens, all of them the model's own template's too."""
    fitting = {}
    for name, parts in rulers.items():
        control = set(_CONTROL.findall("".join(parts)))
        if control and all(token in own for token in control):
            fitting[name] = len(control)
    return max(fitting, key=lambda name: fitting[name]) if fitting else None


def _control_ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> dict[str, int]:
    added = tokenizer.added_tokens_decoder.items()
    names = {token.content: number for number, token in added if token.content in text}
    # The longest first: one may be the beginning of another.
    return {name: names[name] for name in sorted(names, key=len, reverse=True)}
