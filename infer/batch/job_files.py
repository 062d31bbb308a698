"""A job's files: input lines found by their custom_id, an output that survives being killed.

Nothing of a file is held in memory but 25 bytes a line.
"""

import array
import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

_SECONDS_UNSYNCED = 5.0  # of answers, that a machine losing power may take along

_BEGINNING = b'{"'  # of every record; a last line without an end has to begin like it


@dataclass(frozen=True)
class Share:
    """Which lines one of several processes answers: those of number - 1 = index, modulo count."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"share {self.index} of {self.count}: shares count from 0")

    @classmethod
    def parse(cls, text: str) -> "Share":
        """The share that a text names: `0/4` is the first of four."""
        index, _, count = text.partition("/")
        if not (index.isdecimal() and count.isdecimal()):
            raise ValueError(f"share {text!r} must be written like 0/4, the first of four")
        return cls(int(index), int(count))

    def has(self, number: int) -> bool:
        return (number - 1) % self.count == self.index

    def path(self, output: Path) -> Path:
        """The file of this share: out.jsonl, or out-00001-of-00004.jsonl beside it."""
        if self.count == 1:
            return output
        return output.with_name(f"{output.stem}-{self.index:05}-of-{self.count:05}{output.suffix}")


@dataclass(frozen=True)
class Line:
    """One line of the input file that is not blank."""

    number: int
    custom_id: str
    where: str  # file and line number
    record: dict[str, Any] | None  # None: not a JSON object, or without a usable custom_id
    problem: str = ""


def lines(path: Path) -> Iterator[Line]:
    """All lines that are not blank; numbers count the blank ones too."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if raw.strip():
                yield _parse(raw, number, where=f"{path}:{number}")


def _parse(raw: bytes, number: int, *, where: str) -> Line:
    default = f"request-{number}"
    try:
        record = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # of decoding, or of JSON
        return Line(number, default, where, None, f"not readable as JSON: {error}")
    if not isinstance(record, dict):
        problem = f"a JSON object is needed, not {type(record).__name__}"
        return Line(number, default, where, None, problem)
    custom_id = record.get("custom_id", default)
    if not isinstance(custom_id, str) or not _is_unicode(custom_id):
        problem = f"custom_id={custom_id!a} must be a Unicode string"
        return Line(number, default, where, None, problem)
    return Line(number, custom_id, where, record)


def _is_unicode(text: str) -> bool:
    """Whether UTF-8 can encode the text; JSON can spell lone surrogates, UTF-8 cannot."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


class Index:
    """Finds an input's lines by custom_id: rows are lines that are not blank, in their order."""

    def __init__(self, path: Path) -> None:
        """Raises `ValueError` if two lines share a custom_id."""
        self.path = path
        halves, numbers = array.array("Q"), array.array("Q")
        for line in lines(path):
            halves.frombytes(_digest(line.custom_id))
            numbers.append(line.number)
        self.numbers = np.asarray(numbers, np.uint64).astype(np.int64)
        keys = np.asarray(halves, np.uint64).reshape(-1, 2)
        self._order = np.lexsort((keys[:, 1], keys[:, 0]))
        self._keys = keys[self._order]
        same = np.flatnonzero((self._keys[1:] == self._keys[:-1]).all(axis=1))
        if same.size:
            self._refuse(*sorted(self.numbers[self._order[same[0] : same[0] + 2]].tolist()))

    def __len__(self) -> int:
        return len(self.numbers)

    def row(self, custom_id: str) -> int | None:
        """Row of the line with this custom_id; None if there is no such line."""
        first, second = np.frombuffer(_digest(custom_id), np.uint64)
        place = int(np.searchsorted(self._keys[:, 0], first))
        while place < len(self) and self._keys[place, 0] == first:
            if self._keys[place, 1] == second:
                return int(self._order[place])
            place += 1
        return None

    def rows(self, share: Share) -> np.ndarray:
        """Mask of the rows that belong to the share, as booleans."""
        return (self.numbers - 1) % share.count == share.index

    def _refuse(self, first: int, second: int) -> None:
        found = next(line for line in lines(self.path) if line.number == second)
        raise ValueError(
            f"{found.where}: custom_id {found.custom_id!r} was used at {self.path}:{first}; "
            "answers are told apart by it, give each its own"
        )


def _digest(custom_id: str) -> bytes:
    return hashlib.blake2b(custom_id.encode(), digest_size=16).digest()


class Output:
    """The file that answers go to. One process at a time has it; leave it with `close`.

    `done` says of the index' rows which were answered in an earlier run.
    """

    def __init__(
        self, path: Path, *, index: Index, share: Share, is_error: Callable[[dict], bool]
    ) -> None:
        """Drops a half-written last line, and errors: they are tried again.

        Raises `ValueError` for answers to other questions, unreadable lines, and where another
        process has the file.
        """
        if path.exists() and path.samefile(index.path):
            raise ValueError(f"{path} is the input; name another output")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.done = np.zeros(len(index), bool)
        self._file = _locked(path)
        try:
            self._repair(index, share=share, is_error=is_error)
        except BaseException:
            self._file.close()
            raise
        self._synced = time.monotonic()

    def _repair(self, index: Index, *, share: Share, is_error: Callable[[dict], bool]) -> None:
        kept = 0
        errors = np.zeros(len(index), bool)
        for start, raw, row, record in _records(self.path, index):
            if not share.has(int(index.numbers[row])):
                raise ValueError(f"{self.path} answers {record['custom_id']!r}, of another share")
            if self.done[row] or errors[row]:
                raise ValueError(f"{self.path} answers {record['custom_id']!r} twice; remove one")
            kept = start + len(raw)
            (errors if is_error(record) else self.done)[row] = True
        if errors.any():
            self._drop(errors, index)
        else:
            self._file.truncate(kept)

    def _drop(self, errors: np.ndarray, index: Index) -> None:
        temporary = self.path.with_name(f"{self.path.name}.tmp")
        temporary.unlink(missing_ok=True)
        file = _locked(temporary)
        for _, raw, row, _ in _records(self.path, index):
            if not errors[row]:
                file.write(raw)
        _sync(file)
        temporary.replace(self.path)
        self._file.close()
        self._file = file

    def write(self, record: dict[str, Any]) -> None:
        """Writes a record as one line, which the system has received when this returns."""
        self._file.write((json.dumps(record, ensure_ascii=False) + "\n").encode())
        self._file.flush()
        if time.monotonic() - self._synced > _SECONDS_UNSYNCED:
            self.sync()

    def sync(self) -> None:
        """Waits until all written records are on the disk."""
        _sync(self._file)
        self._synced = time.monotonic()

    def close(self) -> None:
        self.sync()
        self._file.close()


def merge(index: Index, parts: Sequence[Path], output: Path, *, share: Share | None = None) -> None:
    """Writes the records of all `parts` in the order of the input, if only of one share's lines.

    `output` may be one of the parts. Raises `ValueError` where lines have no record.
    """
    part_of = np.full(len(index), -1, np.int32)
    starts = np.zeros(len(index), np.int64)
    for number, path in enumerate(parts):
        if not path.exists():
            raise ValueError(f"{path} is not there; run its share of the job first")
        for start, _, row, record in _records(path, index):
            if part_of[row] >= 0:
                raise ValueError(f"{path} answers {record['custom_id']!r} a second time")
            part_of[row], starts[row] = number, start
    asked = index.rows(share or Share())
    missing = index.numbers[(part_of < 0) & asked]
    if missing.size:
        raise ValueError(
            f"{missing.size} lines have no answer yet, first {index.path}:{missing[0]}; run the "
            "job again, it does what is missing"
        )
    temporary = output.with_name(f"{output.name}.tmp")
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(path.open("rb")) for path in parts]
        out = stack.enter_context(temporary.open("wb"))
        for number, start in zip(part_of[asked].tolist(), starts[asked].tolist(), strict=True):
            files[number].seek(start)
            out.write(files[number].readline())
        _sync(out)
    temporary.replace(output)


def _records(path: Path, index: Index) -> Iterator[tuple[int, bytes, int, dict[str, Any]]]:
    """Whole lines of an output: where each begins, itself, its row and its record.

    Raises `ValueError` for a line that is no answer to the input.
    """
    start = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            where = f"{path}:{number}"
            try:
                if not raw.endswith(b"\n"):
                    if not raw.startswith(_BEGINNING[: len(raw)]):
                        raise ValueError
                    return
                record = json.loads(raw)
                row = index.row(record["custom_id"])
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ValueError(
                    f"{where} is not an answer of an earlier run; move the file away, or name "
                    "another output"
                ) from None
            if row is None:
                raise ValueError(
                    f"{where} answers {record['custom_id']!r}, which the input does not ask; move "
                    "the file away, or name another output"
                )
            yield start, raw, row, record
            start += len(raw)


def _locked(path: Path) -> BinaryIO:
    """The file at a path, open for appending and this process' own."""
    while True:
        file = path.open("a+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise ValueError(
                f"{path} is being written by another process; wait for it, or end it"
            ) from None
        # Its last owner may have put another file there since it was opened.
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
