"""Index of the documents on disk, and reading one of them.

An index holds positions and no text: 24 bytes a document. A document is

- a row of a `.jsonl` file (its byte range; blank lines do not count),
- a row of a `.parquet` file (its number; the row group that holds it is decoded as a whole), or
- a text file. One longer than `BLOCK_BYTES` is cut into blocks of about that size, behind a line
  feed where there is one. Otherwise a corpus of one big file could be neither shuffled, nor
  held out in part, nor read by several rows of a batch at a time.
"""

import bisect
import collections
import dataclasses
import hashlib
import json
import os
import pathlib
import threading
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from configs.data import DataConfig

BLOCK_BYTES = 1 << 14
_SCAN_BYTES = 1 << 24
_LINES_A_GROUP = 1024
_ROW_GROUP_CACHE_BYTES = 1 << 30  # decoded parquet kept in one process: a group or two per row


@dataclasses.dataclass(frozen=True, kw_only=True)
class Document:
    """A text, and whether the document ends with it (a block may stop before its file does)."""

    text: str
    ends: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """The documents of one path, with random access: `len(corpus)`, `corpus[i] -> Document`.

    `start` and `stop` are bytes in a text or JSONL file and row numbers in a parquet file.
    """

    path: str
    names: tuple[str, ...]  # relative to `path`, sorted: what identifies a file wherever it lies
    files: tuple[str, ...]
    sizes: tuple[int, ...]  # bytes of a text or JSONL file
    row_groups: tuple[tuple[int, ...], ...]  # first row of each group, then the number of rows
    text_field: str
    file: np.ndarray  # int32, one entry a document, as have the three below
    ordinal: np.ndarray  # int32: number of the document within its file
    start: np.ndarray  # int64
    stop: np.ndarray  # int64

    def __len__(self) -> int:
        return len(self.file)

    def __getitem__(self, index: int) -> Document:
        number, start, stop = self.file[index], int(self.start[index]), int(self.stop[index])
        path = self.files[number]
        match pathlib.Path(path).suffix.lower():
            case ".jsonl":
                return Document(text=_read_json(path, start, stop, self.text_field), ends=True)
            case ".parquet":
                text = _read_row(path, start, self.row_groups[number], self.text_field)
                return Document(text=text, ends=True)
        return Document(text=_read_text(path, start, stop), ends=stop == self.sizes[number])

    def select(self, mask: np.ndarray) -> "Corpus":
        """The documents where `mask` is true, in the same order."""
        return dataclasses.replace(
            self,
            file=self.file[mask],
            ordinal=self.ordinal[mask],
            start=self.start[mask],
            stop=self.stop[mask],
        )

    def digest(self) -> str:
        """A hash of the names and places of all documents: equal where the data order is."""
        value = hashlib.sha256(repr((self.names, self.row_groups)).encode())
        for array in (self.file, self.start, self.stop):
            value.update(np.ascontiguousarray(array).view(np.uint8))
        return value.hexdigest()[:16]


def index_path(path: str, *, text_field: str, text_suffixes: Sequence[str]) -> Corpus:
    """The documents under a file or folder (recursive, sorted by name).

    A folder's files of other suffixes are not part of the corpus. Raises `ValueError` where the
    path is missing, a named file has another suffix, a parquet file lacks the column, or no
    document is found.
    """
    names = list_files(path, text_suffixes=text_suffixes)
    root = pathlib.Path(path)
    files = [str(root / name if root.is_dir() else root) for name in names]
    sizes, row_groups, starts, stops = [], [], [], []
    for file in files:
        bounds: tuple[int, ...] = ()
        sizes.append(pathlib.Path(file).stat().st_size)
        match pathlib.Path(file).suffix.lower():
            case ".jsonl":
                start, stop = _index_lines(file)
            case ".parquet":
                bounds = _index_row_groups(file, text_field=text_field)
                start = np.arange(bounds[-1], dtype=np.int64)
                stop = start + 1
            case _:
                start, stop = _index_blocks(file, size=sizes[-1])
        row_groups.append(bounds)
        starts.append(start)
        stops.append(stop)
    counts = [len(start) for start in starts]
    if not sum(counts):
        raise ValueError(f"{path} holds no document: its {len(files)} file(s) are empty")
    return Corpus(
        path=path,
        names=tuple(names),
        files=tuple(files),
        sizes=tuple(sizes),
        row_groups=tuple(row_groups),
        text_field=text_field,
        file=np.repeat(np.arange(len(files), dtype=np.int32), counts),
        ordinal=np.concatenate([np.arange(count, dtype=np.int32) for count in counts]),
        start=np.concatenate(starts),
        stop=np.concatenate(stops),
    )


def list_files(path: str, *, text_suffixes: Sequence[str]) -> list[str]:
    """The data files of `path`, relative to it and sorted; a file's own name if it is one."""
    known = (".jsonl", ".parquet", *(suffix.lower() for suffix in text_suffixes))
    root = pathlib.Path(path)
    if root.is_file():
        if root.suffix.lower() not in known:
            raise ValueError(
                f"{path} has suffix {root.suffix!r}, which is none of {', '.join(known)}; "
                f"add it to data.text_suffixes if it is plain text"
            )
        return [root.name]
    if not root.is_dir():
        raise ValueError(f"data path {path!r} does not exist; give a file or a folder")
    names = [
        (pathlib.Path(folder) / file).relative_to(root).as_posix()
        for folder, _, files in os.walk(root, onerror=_raise)
        for file in files
        if pathlib.Path(file).suffix.lower() in known
    ]
    if not names:
        raise ValueError(
            f"folder {path} holds no document: no file in it ends in {', '.join(known)}"
        )
    return sorted(names)


def _raise(error: OSError) -> None:
    raise error


def merge_blocks(corpus: Corpus, *, limit: int) -> Corpus:
    """`corpus` with neighbouring blocks of one text file joined, up to `limit` bytes."""
    is_text = np.array(
        [pathlib.Path(name).suffix.lower() not in (".jsonl", ".parquet") for name in corpus.names]
    )
    keep = np.ones(len(corpus), bool)
    stop = corpus.stop.copy()
    joinable = is_text[corpus.file[1:]] & (corpus.file[1:] == corpus.file[:-1])
    joinable &= corpus.start[1:] == corpus.stop[:-1]
    head = 0
    for tail in np.flatnonzero(joinable) + 1:
        # The head is the block before, unless that one was itself joined to an earlier head.
        if keep[tail - 1]:
            head = tail - 1
        if corpus.stop[tail] - corpus.start[head] <= limit:
            keep[tail] = False
            stop[head] = corpus.stop[tail]
    return dataclasses.replace(corpus, stop=stop).select(keep)


def group_sizes(corpus: Corpus) -> np.ndarray:
    """Sizes of the groups of consecutive documents that are read at the cost of one document.

    Row groups in parquet, as far as they are in the corpus; `_LINES_A_GROUP` in other files.
    """
    group = corpus.ordinal // _LINES_A_GROUP
    for number, bounds in enumerate(corpus.row_groups):
        if bounds:
            rows = corpus.file == number
            group[rows] = np.searchsorted(bounds, corpus.start[rows], side="right")
    changes = (np.diff(group) != 0) | (np.diff(corpus.file) != 0)
    return np.diff(np.flatnonzero(np.concatenate([[True], changes, [True]])))


def index_paths(paths: Sequence[str], config: DataConfig) -> list[Corpus]:
    """One corpus per path."""
    return [
        index_path(path, text_field=config.text_field, text_suffixes=config.text_suffixes)
        for path in paths
    ]


def _index_lines(file: str) -> tuple[np.ndarray, np.ndarray]:
    """Byte ranges of the lines that are not empty, line feed included."""
    ends, offset = [], 0
    with pathlib.Path(file).open("rb") as stream:
        while chunk := stream.read(_SCAN_BYTES):
            ends.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + offset + 1)
            offset += len(chunk)
    stop = np.concatenate([*ends, np.array([offset])]).astype(np.int64)
    start = np.concatenate([np.zeros(1, np.int64), stop[:-1]])
    keep = stop - start > 1
    with pathlib.Path(file).open("rb") as stream:
        # Lines of one or two bytes hold no object: blank ones ("\r\n" too) are left out, others
        # stay, to be refused when they are read.
        for short in np.flatnonzero((stop - start <= 2) & (stop > start)):
            stream.seek(start[short])
            keep[short] = bool(stream.read(int(stop[short] - start[short])).strip())
    return start[keep], stop[keep]


def _index_row_groups(file: str, *, text_field: str) -> tuple[int, ...]:
    """The first row of each row group, and the number of rows."""
    try:
        with pq.ParquetFile(file) as parquet:
            arrow, meta = parquet.schema_arrow, parquet.metadata
            counts = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
    except pa.ArrowInvalid as error:
        raise ValueError(f"{file} is not a readable parquet file: {error}") from error
    if text_field not in arrow.names:
        raise ValueError(
            f"{file} has no column {text_field!r}; its columns are {', '.join(arrow.names)}; "
            f"name one with data.text_field"
        )
    kind = arrow.field(text_field).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise ValueError(f"column {text_field!r} of {file} holds {kind}; text must be string")
    return (0, *np.cumsum(counts, dtype=np.int64).tolist())


def _index_blocks(file: str, *, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Byte ranges of about `BLOCK_BYTES` that cover a text file and cut no character."""
    cuts = [0]
    if size > BLOCK_BYTES:
        with pathlib.Path(file).open("rb") as stream:
            for at in range(BLOCK_BYTES, size - BLOCK_BYTES // 2, BLOCK_BYTES):
                stream.seek(at)
                cuts.append(at + _cut(stream.read(BLOCK_BYTES // 2)))
    bounds = np.array([*cuts, size] if size else [0], np.int64)
    return bounds[:-1], bounds[1:]


def _cut(window: bytes) -> int:
    """Offset in `window` at which to cut: after a line feed, else before a space or character."""
    for at in (window.find(b"\n") + 1, window.find(b" ")):
        if at > 0:
            return at
    return next((i for i, byte in enumerate(window) if byte & 0xC0 != 0x80), 0)


def _read_bytes(file: str, start: int, stop: int) -> bytes:
    with pathlib.Path(file).open("rb") as stream:
        stream.seek(start)
        data = stream.read(stop - start)
    if len(data) != stop - start:
        raise ValueError(f"{file} became shorter than {stop} bytes while it was in use")
    return data


def _read_text(file: str, start: int, stop: int) -> str:
    try:
        return _read_bytes(file, start, stop).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is not UTF-8 at byte {start + error.start}: {error.reason}"
        ) from error


def _read_json(file: str, start: int, stop: int, text_field: str) -> str:
    line = _read_bytes(file, start, stop).rstrip(b"\r\n")
    try:
        row = _parse(line.decode("utf-8"))
        if not isinstance(row, dict):
            raise ValueError(f"expected an object, found {type(row).__name__}")
        if text_field not in row:
            raise ValueError(f"no field {text_field!r}; its fields are {', '.join(row)}")
        text = row[text_field]
        if not isinstance(text, str):
            raise ValueError(f"field {text_field!r} is {type(text).__name__}, not a string")
        text.encode("utf-8")  # "\ud800" is valid JSON and no character
    except ValueError as error:  # UnicodeError is one
        raise ValueError(f"{file}:{_line_number(file, start)}: {error}") from error
    return text


def _parse(line: str) -> object:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error


def _line_number(file: str, offset: int) -> int:
    """The 1-based number of the line that starts at byte `offset`."""
    number = 1
    with pathlib.Path(file).open("rb") as stream:
        while offset > 0:
            chunk = stream.read(min(offset, _SCAN_BYTES))
            number += chunk.count(b"\n")
            offset -= len(chunk)
    return number


# The row groups decoded last in this process, oldest first; training reads in a thread of its own
# while evaluation reads in the main one.
_row_group_lock = threading.Lock()
_row_group_cache: collections.OrderedDict[tuple[str, str, int], pa.ChunkedArray] = (
    collections.OrderedDict()
)


def _read_row(file: str, row: int, bounds: Sequence[int], text_field: str) -> str:
    group = bisect.bisect_right(bounds, row) - 1
    column = _read_row_group(file, group, text_field)
    try:
        text = column[row - bounds[group]].as_py()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: row {row} of {text_field!r} is not UTF-8: {error}") from error
    if text is None:
        raise ValueError(f"{file}: row {row} of column {text_field!r} is null")
    return text


def _read_row_group(file: str, group: int, text_field: str) -> pa.ChunkedArray:
    key = (file, text_field, group)
    with _row_group_lock:
        column = _row_group_cache.pop(key, None)
        if column is None:
            with pq.ParquetFile(file) as parquet:
                column = parquet.read_row_group(group, columns=[text_field]).column(0)
        _row_group_cache[key] = column
        while (
            len(_row_group_cache) > 1
            and sum(kept.nbytes for kept in _row_group_cache.values()) > _ROW_GROUP_CACHE_BYTES
        ):
            _row_group_cache.popitem(last=False)
    return column
