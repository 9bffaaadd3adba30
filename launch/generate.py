"""``python -m launch.generate``: continue a text with a trained model, across the end of its
original window.

The text goes to standard output as it comes; where the RoPE switched is said once, on standard
error. The prompt comes from a file, or with ``generate.prompt_file=-`` from standard input.
"""

import sys
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from longrope2.command import run_command
from longrope2.config import compose
from longrope2.corpora.tokenizer import DocumentTokenizer
from longrope2.errors import ArtifactError, DataError
from longrope2.evaluation.subjects import check_same_model, read_checkpoint_factors
from longrope2.files.artifacts import product_folder
from longrope2.inference.cache import KvPolicy
from longrope2.inference.generation import (
    GenerateRoot,
    TextStream,
    check,
    generate_tokens,
    window_for_length,
)
from longrope2.model.folder import model_identity, resolve_model_folder
from longrope2.model.loading import load_to_run, load_tokenizer
from longrope2.model.windowed import WindowedModel
from longrope2.rope.factors import RescaleFactors, Window

STANDARD_INPUT = "-"
SWITCHED = {
    KvPolicy.reprefill: "the whole text was read again",
    KvPolicy.rerotate: "the cached keys were turned, which is not exact",
}


def main() -> None:
    """Compose, check, load, generate."""
    config = compose(GenerateRoot, "generate", sys.argv[1:])
    check(config)
    prompt = read_prompt(config.generate.prompt_file)
    checkpoint, factors = find_checkpoint(config)
    if config.dry_run:
        print(
            f"checkpoint {checkpoint}: window {factors.geometry.original_len} -> {factors.target_len}"
        )
        print(f"prompt     {_prompt_name(config.generate.prompt_file)}: {len(prompt)} characters")
        return
    stream_text(load_to_run(checkpoint, factors), load_tokenizer(checkpoint), prompt, config)


def find_checkpoint(config: GenerateRoot) -> tuple[Path, RescaleFactors]:
    """The checkpoint to use and its factors.

    Raises:
        ArtifactError: it is missing, unfinished, or belongs to another model or other lengths.
    """
    own = product_folder(config.run.folder, "checkpoints") / "final"
    checkpoint = Path(config.generate.checkpoint) if config.generate.checkpoint else own
    if not checkpoint.is_dir():
        raise ArtifactError(
            f"generate.checkpoint={checkpoint} does not exist; run launch.train first"
        )
    factors = read_checkpoint_factors(checkpoint, config.model.original_len, config.target_len)
    base_folder = resolve_model_folder(config.model.path)
    check_same_model(f"generate.checkpoint={checkpoint}", model_identity(checkpoint), base_folder)
    return checkpoint, factors


def stream_text(
    model: WindowedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, config: GenerateRoot
) -> None:
    """Print the continuation of ``prompt`` as it comes; say on standard error where the rescaled RoPE begins."""
    generate, original_len = config.generate, model.factors.geometry.original_len
    encoder = DocumentTokenizer(tokenizer)
    prompt_ids = [encoder.bos_id, *encoder.encode(prompt)]
    text = TextStream(tokenizer, prompt_ids)
    tokens = generate_tokens(
        model,
        prompt_ids,
        max_new_tokens=generate.max_new_tokens,
        stop_ids={encoder.eos_id},
        temperature=generate.temperature,
        seed=config.seed,
        prefill_chunk=generate.prefill_chunk,
        kv_policy=generate.kv_policy,
    )
    window = window_for_length(len(prompt_ids), original_len)
    if window is Window.LONG:
        _say(
            f"the prompt has {len(prompt_ids)} tokens, more than {original_len}: rescaled RoPE from the start"
        )
    for number, token in enumerate(tokens):
        if token.window is not window:
            window = token.window
            _say(
                f"switched to the rescaled RoPE at {len(prompt_ids) + number} tokens: {SWITCHED[generate.kv_policy]}"
            )
        print(text.push(token.token_id), end="", flush=True)
    print(text.finish())


def _say(message: str) -> None:
    """One line on standard error, apart from the text."""
    print(f"\n[{message}]", file=sys.stderr, flush=True)


def read_prompt(path: str) -> str:
    """Text of the prompt file, or of standard input for ``-``.

    Raises:
        DataError: it is missing, empty, or not UTF-8.
    """
    name = _prompt_name(path)
    try:
        content = sys.stdin.buffer.read() if path == STANDARD_INPUT else Path(path).read_bytes()
        text = content.decode("utf-8")
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"{name} is not UTF-8 text") from None
    if not text:
        raise DataError(f"{name} is empty; write the text to continue into it")
    return text


def _prompt_name(path: str) -> str:
    """The prompt's source as messages name it."""
    return f"generate.prompt_file={path}" + (" (standard input)" if path == STANDARD_INPUT else "")


if __name__ == "__main__":
    run_command(main)
