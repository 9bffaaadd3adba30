"""What ``mode=upstream`` reads from a RULER checkout and from wonderwords: prompts, essays, words. Nothing is shipped.

Prompts are taken from ``scripts/data/synthetic/constants.py`` without running it, and must be the known ones: RULER
changed its prompts before, and a changed one makes another benchmark.
"""

import ast
import hashlib
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longrope2.errors import ArtifactError, DataError

__all__ = ["PROMPT_SHA256", "UpstreamWords", "read_prompts", "read_upstream_essays", "read_upstream_words"]

DATA_FOLDER = Path("scripts/data/synthetic")
# First 16 hexadecimal digits of the SHA-256 of template and answer prefix, NVIDIA/RULER@c3f5e3b (2026-07-22).
PROMPT_SHA256 = {
    "niah": ("b373c00e238df12b", "994f3a46e763414f"),
    "variable_tracking": ("fcfaf2eab2bc3e35", "4a4e9010ec4141a3"),
    "common_words_extraction": ("45fff5d17627b65a", "8ee526599bbc7372"),
    "freq_words_extraction": ("a0c7b873cf500d6c", "9a72271c5762c96d"),
    "qa": ("18a659c9723f24f1", "255204f061d7e266"),
}
WORD_FILES = ("nounlist.txt", "adjectivelist.txt", "verblist.txt")


@dataclass(frozen=True)
class UpstreamWords:
    """RULER's vocabularies: pairs for keys, words to count, and the list it changes to when those do not suffice."""

    pairs: list[str]
    words: list[str]
    further_words: list[str]


def read_prompts(checkout: Path) -> dict[str, str]:
    """Template and answer prefix, joined, of each of RULER's five generators.

    Raises:
        DataError: no such file, or one without the prompts.
        ArtifactError: a prompt is not the known one; names it with both hashes.
    """
    path = checkout / DATA_FOLDER / "constants.py"
    if not path.is_file():
        raise DataError(
            f"ruler.upstream_checkout={checkout} holds no {DATA_FOLDER}/constants.py; "
            "give a checkout of github.com/NVIDIA/RULER"
        )
    tasks = _literal_tasks(path)
    prompts = {}
    for name, expected in PROMPT_SHA256.items():
        try:
            parts = tasks[name]["template"], tasks[name]["answer_prefix"]
        except (KeyError, TypeError):
            raise DataError(
                f"{path}: TASKS has no template and answer_prefix of {name}; use RULER of 2025-06 or later"
            ) from None
        for part, field, known in zip(parts, ("template", "answer_prefix"), expected, strict=True):
            found = hashlib.sha256(part.encode()).hexdigest()[:16]
            if found != known:
                raise ArtifactError(
                    f"{path}: the {field} of {name} is not RULER's (SHA-256 {found}..., expected {known}...); check out "
                    "an unchanged NVIDIA/RULER, or use mode=fixed"
                )
        prompts[name] = "".join(parts)
    return prompts


def read_upstream_essays(checkout: Path, essays: str | None) -> str:
    """Text of the essays: ``ruler.essays``, else what RULER's own download left in the checkout.

    Raises:
        DataError: neither is there.
    """
    path = Path(essays) if essays is not None else checkout / DATA_FOLDER / "json" / "PaulGrahamEssays.json"
    if not path.is_file():
        raise DataError(
            f"mode=upstream needs RULER's essays: {path} is not there; run download_paulgraham_essay.py in the checkout, "
            "or give the file as ruler.essays"
        )
    return str(json.loads(path.read_text(encoding="utf-8"))["text"])


def read_upstream_words(checkout: Path, wordlists: str | None) -> UpstreamWords:
    """Word lists of wonderwords (a folder, or the installed package) and of the checkout.

    Raises:
        DataError: a list is missing.
    """
    folder = Path(wordlists) if wordlists is not None else _installed_lists()
    lists = []
    for name in WORD_FILES:
        if not (folder / name).is_file():
            raise DataError(f"ruler.wordlists={folder} holds no {name}; give the folder of wonderwords' word lists")
        lines = (folder / name).read_text(encoding="utf-8").splitlines()
        lists.append([line.rstrip() for line in lines])
    nouns, adjectives, verbs = lists
    further = checkout / DATA_FOLDER / "json" / "english_words.json"
    if not further.is_file():
        raise DataError(f"ruler.upstream_checkout={checkout} holds no {further.relative_to(checkout)}")
    return UpstreamWords(
        pairs=sorted({f"{adjective}-{noun}" for adjective in adjectives for noun in nouns}),
        words=sorted({*nouns, *adjectives, *verbs}),
        further_words=list(json.loads(further.read_text(encoding="utf-8")).values()),
    )


def _literal_tasks(path: Path) -> dict[str, Any]:
    """The value of ``TASKS`` in a Python file, which is not run."""
    try:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "TASKS" for t in node.targets):
                return ast.literal_eval(node.value)
    except (SyntaxError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    raise DataError(f"{path} defines no TASKS; give a checkout of github.com/NVIDIA/RULER")


def _installed_lists() -> Path:
    """Folder of the word lists inside the installed wonderwords package."""
    spec = importlib.util.find_spec("wonderwords")
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            "mode=upstream needs the word lists of wonderwords: `pip install wonderwords==3.0.1`, or give ruler.wordlists"
        )
    return Path(next(iter(spec.submodule_search_locations))) / "assets"
