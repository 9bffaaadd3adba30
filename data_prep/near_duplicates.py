"""Near duplicates across all sources by MinHash (datasketch), where ``documents.near_duplicates`` asks for it.

Signatures are computed while the text is at hand; the choice is made when the run is planned, from signatures alone:
documents in their order of choice, each dropped if one before it is similar. Needs ``pip install datasketch``; costs
about as much time as tokenizing, half a kilobyte a document on disk, and memory for all signatures while planning.
"""

import re

import numpy as np

from longrope2.errors import ConfigError

__all__ = ["SIGNATURE_BYTES", "fault_of_near_duplicates", "near_duplicates", "signature_of"]

NUM_PERMUTATIONS = 128
SIGNATURE_BYTES = 4 * NUM_PERMUTATIONS
WORDS_PER_SHINGLE = 5
SCHEME = "affine32"  # of datasketch 2, whose values fit four bytes
SIMILARITY = 0.8  # estimated Jaccard similarity of the shingle sets
WORD = re.compile(r"\w+")


def fault_of_near_duplicates() -> str | None:
    """Why MinHash cannot be used, or None."""
    try:
        import datasketch  # noqa: F401
    except ImportError:
        return "documents.near_duplicates=true needs datasketch: pip install datasketch"
    return None


def signature_of(text: str) -> bytes:
    """MinHash signature of the text's overlapping runs of five words, case ignored."""
    from datasketch import MinHash

    words = WORD.findall(text.casefold())
    shingles = {" ".join(words[i : i + WORDS_PER_SHINGLE]) for i in range(max(1, len(words) - WORDS_PER_SHINGLE + 1))}
    signature = MinHash(num_perm=NUM_PERMUTATIONS, seed=1, scheme=SCHEME)
    signature.update_batch([shingle.encode() for shingle in shingles])
    return signature.hashvalues.astype("<u4").tobytes()


def near_duplicates(signatures: list[bytes]) -> np.ndarray:
    """Which documents are similar to an earlier one that stays; bool, one per signature, in the order given.

    Raises:
        ConfigError: datasketch is not installed.
    """
    fault = fault_of_near_duplicates()
    if fault:
        raise ConfigError([fault])
    from datasketch import MinHash, MinHashLSH

    seen = MinHashLSH(threshold=SIMILARITY, num_perm=NUM_PERMUTATIONS)
    dropped = np.zeros(len(signatures), dtype=bool)
    for number, signature in enumerate(signatures):
        values = np.frombuffer(signature, "<u4").astype(np.uint64)
        minhash = MinHash(num_perm=NUM_PERMUTATIONS, seed=1, scheme=SCHEME, hashvalues=values)
        candidates = [other for other in seen.query(minhash) if isinstance(other, int)]
        similar = (np.mean(values == np.frombuffer(signatures[other], "<u4")) for other in candidates)
        dropped[number] = any(share >= SIMILARITY for share in similar)
        if not dropped[number]:
            seen.insert(number, minhash)
    return dropped
