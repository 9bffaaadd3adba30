"""Decompressors for files that may be damaged or hostile: bounded output, members in a row.

A file of some kilobytes can be made that becomes gigabytes. Whatever it is, no more than about
``BLOCK_BYTES`` come back at once, and no decoder keeps more than the window that its format allows:
32 KiB (gzip), 9 MB (bzip2), ``XZ_BYTES`` (xz), ``ZSTD_WINDOW_BYTES`` (zstd).
"""

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import Protocol

import zstandard

BLOCK_BYTES = 2**20
SLICE_BYTES = 2**14
XZ_BYTES = 2**28  # xz -9 needs 65 MiB
ZSTD_WINDOW_BYTES = 2**31  # zstd --ultra --long=31
# A block of zstd, at least 4 bytes of a file, holds at most 128 KiB: a slice becomes 8 MiB at most.
ZSTD_SLICE_BYTES = 2**8

_FAULTS = (zlib.error, zstandard.ZstdError, lzma.LZMAError, OSError, EOFError, ValueError)


class DamagedData(Exception):
    """What is stored is not of its format."""


class TruncatedData(Exception):
    """What is stored stops before its end."""


class _Decoder(Protocol):
    """One member (gzip, bzip2, xz) or frame (zstd)."""

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def blocks(self, data: bytes) -> Iterator[bytes]:
        """Decompress all of ``data``, a bounded piece at a time."""
        ...


class _Gzip:
    def __init__(self) -> None:
        self._decoder = zlib.decompressobj(wbits=31)

    @property
    def eof(self) -> bool:
        return self._decoder.eof

    @property
    def unused_data(self) -> bytes:
        return self._decoder.unused_data

    def blocks(self, data: bytes) -> Iterator[bytes]:
        while data and not self.eof:
            yield self._decoder.decompress(data, BLOCK_BYTES)
            data = self._decoder.unconsumed_tail


class _Bounded:
    """bzip2 and xz, whose decoders keep what they have not yet used."""

    def __init__(self, decoder: bz2.BZ2Decompressor | lzma.LZMADecompressor) -> None:
        self._decoder = decoder

    @property
    def eof(self) -> bool:
        return self._decoder.eof

    @property
    def unused_data(self) -> bytes:
        return self._decoder.unused_data

    def blocks(self, data: bytes) -> Iterator[bytes]:
        yield self._decoder.decompress(data, BLOCK_BYTES)
        while not (self._decoder.eof or self._decoder.needs_input):
            yield self._decoder.decompress(b"", BLOCK_BYTES)


class _Zstd:
    def __init__(self) -> None:
        decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES)
        self._decoder = decompressor.decompressobj()
        self.unused_data = b""

    @property
    def eof(self) -> bool:
        return self._decoder.eof

    def blocks(self, data: bytes) -> Iterator[bytes]:
        parts, size = [], 0
        for start in range(0, len(data), ZSTD_SLICE_BYTES):
            part = self._decoder.decompress(data[start : start + ZSTD_SLICE_BYTES])
            parts.append(part)
            size += len(part)
            if self.eof:
                self.unused_data = self._decoder.unused_data + data[start + ZSTD_SLICE_BYTES :]
                break
            if size >= BLOCK_BYTES:
                yield b"".join(parts)
                parts, size = [], 0
        yield b"".join(parts)


_DECODERS: dict[str, Callable[[], _Decoder]] = {
    ".gz": _Gzip,
    ".bz2": lambda: _Bounded(bz2.BZ2Decompressor()),
    ".xz": lambda: _Bounded(lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=XZ_BYTES)),
    ".zst": _Zstd,
    ".zstd": _Zstd,
}
PACKED = tuple(_DECODERS)
"""Endings of packed files, in small letters."""


def packing_of(name: str) -> str:
    """The ending that says how a file is packed; "" for one that is not."""
    return next((ending for ending in PACKED if name.lower().endswith(ending)), "")


def decoded(name: str, stored: Iterator[bytes]) -> Iterator[bytes]:
    """Content of a file by what its name ends in, in blocks of some megabytes at most.

    Members (gzip, bzip2, xz) and frames (zstd) may follow each other, with zero bytes behind them.

    Raises:
        DamagedData: or TruncatedData, after everything that can be read was yielded.
    """
    packing = packing_of(name)
    return _decoded(stored, _DECODERS[packing]) if packing else stored


def _slices(stored: Iterator[bytes]) -> Iterator[bytes]:
    """Small enough that what a decoder did not yet use is copied quickly."""
    for block in stored:
        for start in range(0, len(block), SLICE_BYTES):
            yield block[start : start + SLICE_BYTES]


def _decoded(stored: Iterator[bytes], new_decoder: Callable[[], _Decoder]) -> Iterator[bytes]:
    decoder, any_member = None, False
    for data in _slices(stored):
        while data:
            if decoder is None:
                data = data.lstrip(b"\0")  # padding after the last member
                if not data:
                    break
                decoder, any_member = new_decoder(), True
            try:
                yield from filter(None, decoder.blocks(data))
            except _FAULTS:
                raise DamagedData from None
            data = decoder.unused_data if decoder.eof else b""
            decoder = None if decoder.eof else decoder
    if decoder is not None or not any_member:
        raise TruncatedData
