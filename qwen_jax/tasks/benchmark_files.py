"""Readers of the file formats in which benchmarks are published."""

import csv
import gzip
import io
import json
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def read_lines(path: str | Path, *, needed: Iterable[str]) -> list[dict[str, Any]]:
    """The objects of a JSONL file, gzipped where its name ends in .gz.

    Raises `ValueError` with file and line for a line that is not an object with the `needed` keys.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is not a file; give the benchmark's JSONL file, or its folder")
    data = path.read_bytes()
    if path.suffix == ".gz":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError) as error:
            raise ValueError(f"{path} is not a complete gzip file: {error}; get it again") from None
    records = []
    for number, line in enumerate(data.decode("utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number} is not JSON: {error}") from None
        missing = sorted(set(needed) - set(record)) if isinstance(record, dict) else sorted(needed)
        if missing:
            raise ValueError(f"{path}:{number} lacks {', '.join(missing)}; is it this benchmark's?")
        records.append(record)
    return records


def find(path: str | Path, *, names: Iterable[str]) -> Path:
    """The file `path`, or where it is a folder the first of `names` in it.

    Raises `ValueError` where there is no such file.
    """
    path = Path(path)
    if path.is_file():
        return path
    for name in names:
        if (path / name).is_file():
            return path / name
    raise ValueError(f"{path} holds none of {', '.join(names)}; give the file itself")


def read_tables(path: str | Path, *, folder: str) -> dict[str, list[list[str]]]:
    """The rows of each `<folder>/<name>.csv` in a folder or a zip file, sorted by name.

    Enclosing folders (`data/` in the published archive) are ignored. Raises `ValueError` where
    there is no such file.
    """
    path = Path(path)
    texts = {}
    if path.is_dir():
        for file in path.rglob(f"{folder}/*.csv"):
            texts[file.stem] = file.read_text(encoding="utf-8")
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                parts = name.split("/")
                if len(parts) > 1 and parts[-2] == folder and name.endswith(".csv"):
                    texts[parts[-1].removesuffix(".csv")] = archive.read(name).decode("utf-8")
    else:
        raise ValueError(f"{path} is neither a folder nor a zip file; give one of them")
    if not texts:
        raise ValueError(f"{path} holds no {folder}/*.csv; give the published folder or zip file")
    return {name: list(csv.reader(io.StringIO(texts[name], newline=""))) for name in sorted(texts)}
