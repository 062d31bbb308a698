"""Folders and files on file systems and in buckets of Google Cloud Storage."""

import importlib.util
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from etils import epath

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://")


def folder(path: Path | str) -> Path:
    """`path` as a `pathlib.Path`, or an `epath.Path` that behaves like one for `gs://`.

    Raises `ValueError` for other schemes. Orbax 0.12 opens arrays on file systems and in gs:// only
    (tensorstore_utils.py takes anything else for a file name), although tensorstore has a driver
    for s3://.
    """
    found = _SCHEME.match(str(path))
    if found is None:
        return Path(path)
    if found[1] != "gs":
        raise ValueError(
            f"{path}: {found[1]}:// is not supported; use gs://, or mount the bucket as a folder "
            f"(mountpoint-s3, s3fs, gcsfuse) and give that"
        )
    if importlib.util.find_spec("gcsfs") is None:
        raise ValueError(f"{path} needs the package gcsfs; install qwen-jax[gcs]")
    return epath.Path(path)


def is_remote(path: Path) -> bool:
    """Whether `path` is in a bucket: no file there can be appended to, renamed or mapped."""
    return str(path).startswith("gs://")


def absolute(path: Path) -> Path:
    """`path` from the root of its file system or bucket."""
    return path if is_remote(path) else path.resolve()


def kvstore(path: Path) -> dict:
    """The tensorstore key-value store of a folder."""
    if not is_remote(path):
        return {"driver": "file", "path": f"{path.resolve()}/"}
    bucket, _, inside = str(path).removeprefix("gs://").partition("/")
    return {"driver": "gcs", "bucket": bucket, "path": f"{inside}/"}


def copy_tree(source: Path, target: Path) -> None:
    """Copies every file below `source` to its path below `target`; either may be in a bucket."""
    for file in files(source):
        to = target / file.relative_to(source)
        to.parent.mkdir(parents=True, exist_ok=True)
        with file.open("rb") as read, to.open("wb") as write:
            shutil.copyfileobj(read, write, 1 << 24)


def publish(made: Path, target: Path) -> None:
    """Copies the folder `made` to `target`, which appears only when it is complete.

    In a bucket, where no name can change, a reader may see some of the files before the others.
    """
    if is_remote(target):
        copy_tree(made, target)
        return
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    copy_tree(made, partial)
    partial.rename(target)


def read_json(path: Path) -> dict:
    """The JSON object in a file. Raises `ValueError` naming the file where it holds no such."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(values).__name__}")
    return values


def write_text(path: Path, text: str) -> None:
    """Writes a file that is either complete or absent."""
    if is_remote(path):
        path.write_text(text, encoding="utf-8")  # appears when all of it has arrived
        return
    written = path.with_name(f"{path.name}.{os.getpid()}")
    written.write_text(text, encoding="utf-8")
    written.replace(path)


@contextmanager
def local(path: Path) -> Iterator[Path]:
    """A local folder with the files of `path`: `path` itself, or a temporary copy of a bucket."""
    if not is_remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as copy:
        copy_tree(path, Path(copy))
        yield Path(copy)


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A local folder for writers that cannot write to buckets; its files are copied to `path`."""
    if not is_remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as made:
        try:
            yield Path(made)
        finally:
            copy_tree(Path(made), path)


def size(file: Path) -> int:
    """Size of a file in bytes."""
    return file.stat().length if is_remote(file) else file.stat().st_size


def files(folder: Path) -> Iterator[Path]:
    """Every file below a folder, sorted by path."""
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from files(path)
        else:
            yield path
