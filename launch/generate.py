"""``python -m launch.generate``: continue a text with a trained model, beyond its first window.

The text goes to standard output as it comes; standard error says where the RoPE switched and, at
the end, tokens, window and speed. The prompt comes from a file, or with ``generate.prompt_file=-``
from standard input.
"""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from longrope2.command import run_command
from longrope2.config import compose
from longrope2.errors import ConfigError, DataError, waiting_lines
from longrope2.evaluation.before import missing_checkpoint, trained_faults
from longrope2.inference.config import GenerateRoot, KvPolicy, settings_faults
from longrope2.model.folder import ModelLook, look_before
from longrope2.rope.factors import RescaleFactors, Window

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from longrope2.model.windowed import WindowedModel

_CHECKPOINT, _STANDARD_INPUT = "generate.checkpoint", "-"
_SWITCHED = {
    KvPolicy.reprefill: "the whole text was read again",
    KvPolicy.rerotate: "the cached keys were turned, which is not exact",
}


def main() -> None:
    """Compose, check, load, generate."""
    config = compose(GenerateRoot, "generate", sys.argv[1:])
    look, given = look_before(config.model), config.generate.checkpoint
    prompt = _read_prompt(config.generate.prompt_file, _known_faults(config, look))
    look.print_notes()
    if config.dry_run and (missing := _missing(config)):
        print(
            f"checkpoint not there yet: window {config.model.original_len} -> {config.target_len}"
        )
        print(waiting_lines("generation", [missing]))
        return
    # Only now: torch and transformers load for seconds.
    from longrope2.evaluation.subjects import find_extended
    from longrope2.model.loading import load_to_run, load_tokenizer

    checkpoint, factors = find_extended(config, _CHECKPOINT, given)
    if config.dry_run:
        window = f"window {factors.geometry.original_len} -> {factors.target_len}"
        print(f"checkpoint {checkpoint}: {window}")
        print(f"prompt     {_prompt_name(config.generate.prompt_file)}: {len(prompt)} characters")
        return
    _stream_text(load_to_run(checkpoint, factors), load_tokenizer(checkpoint), prompt, config)


def _missing(config: GenerateRoot) -> str | None:
    given = config.generate.checkpoint
    return missing_checkpoint(config, _CHECKPOINT, given, takes_exports=True)


def _known_faults(config: GenerateRoot, look: ModelLook) -> list[str]:
    """All faults of a generation that are known without loading anything, but for its prompt's."""
    config = look.with_its_window(config)
    faults, given = [*look.faults, *settings_faults(config)], config.generate.checkpoint
    return faults + trained_faults(config, _CHECKPOINT, given, takes_exports=True)


def _stream_text(
    model: "WindowedModel", tokenizer: "PreTrainedTokenizerBase", prompt: str, config: GenerateRoot
) -> None:
    """Print the continuation as it comes; say on standard error where the rescaled RoPE begins."""
    from longrope2.corpora.tokenizer import DocumentTokenizer
    from longrope2.inference import generation
    from longrope2.inference.generation import TextStream

    generate, original_len = config.generate, model.factors.geometry.original_len
    encoder = DocumentTokenizer(tokenizer, config.model.document_start)
    prompt_ids = encoder.start_ids + encoder.encode(prompt)
    text = TextStream(tokenizer, prompt_ids)
    tokens = generation.generate_tokens(
        model,
        prompt_ids,
        max_new_tokens=generate.max_new_tokens,
        stop_ids={encoder.eos_id},
        temperature=generate.temperature,
        seed=config.seed,
        prefill_chunk=generate.prefill_chunk,
        kv_policy=generate.kv_policy,
    )
    window = generation.window_for_length(len(prompt_ids), original_len)
    if window is Window.LONG:
        is_long = f"the prompt has {len(prompt_ids)} tokens, more than {original_len}"
        _say(f"{is_long}: rescaled RoPE from the start")
    began, times = time.monotonic(), list[float]()
    for length, token in enumerate(tokens, start=len(prompt_ids)):
        times.append(time.monotonic())
        if token.window is not window:
            window, how = token.window, _SWITCHED[generate.kv_policy]
            _say(f"switched to the rescaled RoPE at {length} tokens: {how}")
        print(text.push(token.token_id), end="", flush=True)
    print(text.finish())
    if times:
        _say(_summary(len(prompt_ids), model.factors, began, times))


def _summary(num_prompt: int, factors: RescaleFactors, began: float, times: list[float]) -> str:
    """Tokens, window and speed; ``times`` are when each new token was there.

    The first one waits for the whole prompt, which is no speed of generation.
    """
    from longrope2.inference.generation import window_for_length

    length, original_len = num_prompt + len(times), factors.geometry.original_len
    window = window_for_length(length - 1, original_len)
    rope = "original" if window is Window.SHORT else "rescaled"
    read = f"{num_prompt} tokens read in {times[0] - began:.1f} s"
    written = f"{len(times)} written"
    if len(times) > 1:
        written += f" at {(len(times) - 1) / max(times[-1] - times[0], 1e-9):.1f} tokens/s"
    return f"{read}, {written}; {length} of {factors.target_len} tokens, {rope} RoPE at the end"


def _say(message: str) -> None:
    print(f"\n[{message}]", file=sys.stderr, flush=True)


def _read_prompt(path: str, faults: list[str]) -> str:
    """Text of the prompt file, or of standard input for ``-``.

    Raises:
        ConfigError: the ``faults`` found before, and the prompt's.
        DataError: the prompt alone cannot be used.
    """
    name = _prompt_name(path)
    text, fault = "", f"{name} is empty; write the text to continue into it"
    try:
        if not (faults and path == _STANDARD_INPUT):  # nobody need type for a refusal
            is_input = path == _STANDARD_INPUT
            content = sys.stdin.buffer.read() if is_input else Path(path).read_bytes()
            text = content.decode("utf-8")
    except OSError as error:
        fault = f"{name} cannot be read: {error.strerror}"
    except UnicodeDecodeError:
        fault = f"{name} is not UTF-8 text"
    if faults:
        raise ConfigError(faults if text or path == _STANDARD_INPUT else [*faults, fault])
    if not text:
        raise DataError(fault)
    return text


def _prompt_name(path: str) -> str:
    return f"generate.prompt_file={path}" + (" (standard input)" if path == _STANDARD_INPUT else "")


if __name__ == "__main__":
    run_command(main)
