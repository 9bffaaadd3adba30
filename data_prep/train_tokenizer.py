"""Train the miniature's tokenizer: SentencePiece BPE on the sample corpus.

``python -m data_prep.train_tokenizer --output models/tiny`` writes ``tokenizer.model``
(SentencePiece), ``tokenizer.json`` and ``tokenizer_config.json``. Both forms give the same ids:
identity normalisation, every space kept, no space added in front, digits one by one, unknown
characters as bytes. The same Python version gives the same files.
"""

import argparse
import io
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from longrope2.corpora.corpus import Split
from longrope2.corpora.needle_wording import draw_key, draw_value, needle_wording
from longrope2.corpora.sample import SampleCorpus
from longrope2.corpora.tokenizer import SPACE_MARKER, WORDS
from longrope2.files.artifacts import atomic_path, write_text

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

VOCABULARY_SIZE = 2048
UNK, BOS, EOS = "<unk>", "<s>", "</s>"
NUM_NEEDLE_EXAMPLES = 60_000  # enough for most needle words to become one piece
SEED = 0


def train_sentencepiece(sentences: Iterator[str], vocabulary_size: int) -> bytes:
    """Train a BPE model and return it as SentencePiece's serialized proto."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences,
        model_writer=model,
        model_type="bpe",
        vocab_size=vocabulary_size,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        split_digits=True,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        allow_whitespace_only_pieces=True,
        character_coverage=0.9999,
        num_threads=1,
        minloglevel=1,
    )
    return model.getvalue()


def hugging_face_tokenizer_json(sentencepiece_model: bytes) -> str:
    """The same tokenizer as a ``tokenizer.json``; it puts BOS in front by default."""
    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from tokenizers.pre_tokenizers import Split as SplitWords
    from tokenizers.processors import TemplateProcessing

    processor = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model)
    pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    merges = _merges(processor, vocabulary)
    pieces_model = models.BPE(vocabulary, merges, unk_token=UNK, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(pieces_model)
    tokenizer.normalizer = normalizers.Replace(" ", SPACE_MARKER)
    # No piece holds the marker after another character, so cutting in front of a run of markers
    # changes no id; it keeps long documents linear and lets the library cache words.
    tokenizer.pre_tokenizer = SplitWords(WORDS, behavior="isolated")
    steps = [decoders.Replace(SPACE_MARKER, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps)
    special = [AddedToken(t, special=True, normalized=False) for t in (UNK, BOS, EOS)]
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return tokenizer.to_str(pretty=True)


def main() -> None:
    """Command line."""
    prog, as_written = "python -m data_prep.train_tokenizer", argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog, description=__doc__, formatter_class=as_written)
    folder = "model folder that gets the tokenizer files"
    parser.add_argument("--output", type=Path, required=True, help=folder)
    parser.add_argument("--vocabulary-size", type=int, default=VOCABULARY_SIZE)
    arguments = parser.parse_args()
    model = train_sentencepiece(_training_lines(), arguments.vocabulary_size)
    with atomic_path(arguments.output / "tokenizer.model") as temporary:
        temporary.write_bytes(model)
    write_text(arguments.output / "tokenizer.json", hugging_face_tokenizer_json(model) + "\n")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "unk_token": UNK,
        "clean_up_tokenization_spaces": False,
    }
    write_text(arguments.output / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")
    print(f"wrote tokenizer.model, tokenizer.json and tokenizer_config.json to {arguments.output}")


def _training_lines() -> Iterator[str]:
    """Lines of the training split, then lines in the needle wording."""
    for document in SampleCorpus().documents(Split.train):
        yield from document.text.splitlines()
    rng = random.Random(SEED)
    for _ in range(NUM_NEEDLE_EXAMPLES):
        wording = needle_wording(draw_key(rng), draw_value(rng))
        for text in (wording.needle, wording.question, wording.answer_prefix + wording.answer):
            yield text.strip("\n")


def _merges(
    processor: "SentencePieceProcessor", vocabulary: dict[str, int]
) -> list[tuple[str, str]]:
    """Merge rules as SentencePiece applies them: best score of the merged piece first."""
    merges = []
    for piece, index in vocabulary.items():
        if processor.is_control(index) or processor.is_unknown(index) or processor.is_byte(index):
            continue
        for cut in range(1, len(piece)):
            a, b = piece[:cut], piece[cut:]
            if a in vocabulary and b in vocabulary:
                merges.append((-processor.get_score(index), vocabulary[a], vocabulary[b], a, b))
    return [(a, b) for *_, a, b in sorted(merges)]


if __name__ == "__main__":
    main()
