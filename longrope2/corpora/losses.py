"""What a corpus could not use: records by reason, and damaged files by name."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

MOST_NAMED = 8  # damaged files in a message
_USER_AND_PASSWORD = re.compile(r"(?<=://)[^/@]*@")


@dataclass(frozen=True, order=True)
class DamagedFile:
    """A file that could not be read to its end, or not at all."""

    file: str
    """Path or address, without a password."""
    fault: str
    """The reason that it is counted under."""
    num_records: int
    """Records of it that were found before the damage, faulty ones included."""

    def __str__(self) -> str:
        """One line for people."""
        read = f"{self.num_records:,} records read" if self.num_records else "nothing read"
        return f"{self.file}: {self.fault}, {read}"


class Losses(Counter[str]):
    """Reason -> records that could not be used, and the damaged files among the reasons.

    A reason that ends in "(kept)" tells of a document that was kept and is counted for information.
    """

    def __init__(self, numbers: Mapping[str, int] | None = None) -> None:
        super().__init__(numbers)
        self.files: list[DamagedFile] = []

    def damaged(self, location: str, fault: str, num_records: int) -> None:
        """Count and name a file of which nothing more can be read."""
        self[fault] += 1
        file = printable(_USER_AND_PASSWORD.sub("", location))
        self.files.append(DamagedFile(file, fault, num_records))

    def copy(self) -> "Losses":
        """Another one with the same."""
        other = Losses(self)
        other.files = list(self.files)
        return other

    def since(self, before: "Losses") -> "Losses":
        """What was added after ``before`` was copied from it."""
        added = Losses(self - before)
        added.files = self.files[len(before.files) :]
        return added

    def take(self, others: "Losses", prefix: str = "", suffix: str = "") -> None:
        """Add those of another reading, each reason between ``prefix`` and ``suffix``."""
        self.update({f"{prefix}{reason}{suffix}": number for reason, number in others.items()})
        self.files += [
            DamagedFile(f.file, f"{prefix}{f.fault}{suffix}", f.num_records) for f in others.files
        ]


def named_files(files: Iterable[DamagedFile], elsewhere: str) -> list[str]:
    """Damaged files, a line each, the first ``MOST_NAMED`` by name; then how many more there are.

    ``elsewhere``: where the others are named.
    """
    lines = sorted({str(file) for file in files})
    more = len(lines) - MOST_NAMED
    return lines[:MOST_NAMED] + ([f"and {more:,} more files; {elsewhere}"] if more > 0 else [])


def printable(name: str) -> str:
    """A name as text that any file can hold: bytes that are no UTF-8 are spelt."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
