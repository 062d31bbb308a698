"""The array database inside a native checkpoint: zarr arrays in one OCDBT key-value store.

This is the layout that Orbax reads and writes. Conversion writes it through tensorstore without
jax, because opening an accelerator to rearrange files would disturb other users of it.
The database only ever names data that is complete: a chunk that is listed was written whole.
"""

import contextlib
import json
import os
import threading
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tensorstore as ts

from configs import schema
from configs.models.architecture import ModelConfig
from qwen_jax import storage

FORMAT = 1  # of native checkpoints, in model/metadata
_MANIFEST = "manifest.ocdbt"
_DICT_KEY = 2  # Orbax's number for a dictionary key
# Data files this large; a file is also ended by each commit, which follows the writes.
_DATA_FILE_BYTES = 64 << 20
_ZARR_DTYPES = {  # others are called there as here
    "float16": "<f2",
    "float32": "<f4",
    "int32": "<i4",
    "int8": "|i1",
    "uint8": "|u1",
}
_SYNC_SECONDS = 0.1  # between two looks for files to sync


class Stored(Protocol):
    """An array to be written: its path (keys joined by dots), shape, chunks and dtype."""

    path: str
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: np.dtype
    nbytes: int


def context() -> ts.Context:
    """The tensorstore context: no cache, and few threads, whose buffers are in the planned memory.

    Files are not synced one by one, which on a busy disk takes most of the time: a process may be
    killed at any moment, but a writer calls `sync_tree` before it declares the result complete,
    and does not resume from files written before the machine itself stopped (`boot_id`).
    """
    return ts.Context(
        {
            "cache_pool": {"total_bytes_limit": 0},
            "data_copy_concurrency": {"limit": 2},
            "file_io_concurrency": {"limit": 4},
            "file_io_sync": False,
        }
    )


def _kvstore(folder: Path, path: str = "") -> dict:
    return {
        "driver": "ocdbt",
        "base": storage.kvstore(folder),
        "path": path,
    }


def open_for_writing(folder: Path, stored: Stored, ctx: ts.Context) -> ts.TensorStore:
    """The zarr array of one parameter, created if it does not exist."""
    kvstore = _kvstore(folder, f"{stored.path}/")
    kvstore["config"] = {
        "max_inline_value_bytes": 1024,
        "max_decoded_node_bytes": 1 << 20,
        "manifest_kind": "single",
    }
    kvstore["target_data_file_size"] = _DATA_FILE_BYTES
    spec = {
        "driver": "zarr",
        "kvstore": kvstore,
        "metadata": {
            "shape": stored.shape,
            "chunks": stored.chunks,
            "dtype": _zarr_dtype(stored.dtype.name),
            "compressor": None,
            "order": "C",
        },
        # Orbax takes a missing chunk for damage, so a chunk of zeros is stored as well.
        "store_data_equal_to_fill_value": True,
        "recheck_cached_data": False,
        "recheck_cached_metadata": False,
    }
    return ts.open(spec, open=True, create=True, context=ctx).result()


def _zarr_dtype(name: str) -> str:
    return _ZARR_DTYPES.get(name, name)


def open_all_for_reading(folder: Path, ctx: ts.Context) -> dict[str, ts.TensorStore]:
    """Every stored array by path of the Orbax checkpoint `folder`, by whichever program written.

    Raises `ValueError` if its metadata or an array cannot be read.
    """
    path = folder / "_METADATA"
    try:
        form = json.loads(path.read_text(encoding="utf-8"))
        names = [
            ".".join(key["key"] for key in entry["key_metadata"])
            for entry in form["tree_metadata"].values()
            if not entry["value_metadata"]["skip_deserialize"]
        ]
        driver = "zarr3" if form["use_zarr3"] else "zarr"
        ocdbt = form["use_ocdbt"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no Orbax metadata: {error!r}") from None
    opening = {}
    for name in names:
        spec = {
            "driver": driver,
            "kvstore": _kvstore(folder, f"{name}/") if ocdbt else storage.kvstore(folder / name),
            "fill_missing_data_reads": False,
            "recheck_cached_data": False,
            "recheck_cached_metadata": False,
        }
        opening[name] = ts.open(spec, open=True, read=True, context=ctx)
    arrays = {}
    for name, future in opening.items():
        try:
            arrays[name] = future.result()
        except ValueError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{folder}: array {name} cannot be opened: {reason}") from None
    return arrays


@contextlib.contextmanager
def write_errors() -> Iterator[None]:
    """Turns the `ValueError` with which tensorstore reports a failed write into `OSError`."""
    try:
        yield
    except ValueError as error:
        raise OSError(str(error).splitlines()[0]) from None


def written_chunks(folder: Path) -> set[str]:
    """Names `array/chunk` of all chunks in the database; empty where there is none."""
    if not (folder / _MANIFEST).exists():
        return set()
    keys = ts.KvStore.open(_kvstore(folder)).result().list().result()
    return {key.decode() for key in keys}


def remove_leftovers(folder: Path) -> None:
    """Deletes files that a killed writer left and the database does not name."""
    if not (folder / _MANIFEST).exists():
        keep = set()
    else:
        base = ts.KvStore.open(_kvstore(folder)["base"]).result()
        manifest = ts.ocdbt.dump(base).result()
        keep = {_MANIFEST} | {_file(n["location"]) for n in manifest["version_tree_nodes"]}
        root = manifest["versions"][-1]["root"]
        pending = [root["location"]] if "location" in root else []
        while pending:
            location = pending.pop()
            keep.add(_file(location))
            if location.startswith("btreenode:"):
                for entry in ts.ocdbt.dump(base, location).result()["entries"]:
                    if "inline_value" not in entry:
                        pending.append(entry.get("location") or entry["indirect_value"])
    for path in folder.rglob("*"):
        if path.is_file() and str(path.relative_to(folder)) not in keep:
            path.unlink()


def _file(location: str) -> str:
    """The file in `<kind>:<base>:<file>:<offset>:<length>`."""
    return location.split(":", 2)[2].rsplit(":", 2)[0]


def tree_metadata(arrays: Iterable[Stored]) -> dict:
    """Contents of Orbax's `_METADATA`: the tree of parameters and how each is stored.

    Values are declared numpy arrays, which belong to no device, so that Orbax restores to any.
    """
    tree = {}
    for stored in arrays:
        keys = tuple(stored.path.split("."))
        tree[str(keys)] = {
            "key_metadata": [{"key": key, "key_type": _DICT_KEY} for key in keys],
            "value_metadata": {
                "value_type": "np.ndarray",
                "skip_deserialize": False,
                "write_shape": list(stored.chunks),
            },
        }
    return {
        "tree_metadata": tree,
        "use_ocdbt": True,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }


def metadata(model: ModelConfig, **extra: Any) -> dict:
    """Contents of model/metadata of a native checkpoint, as JSON values."""
    return {"format": FORMAT, "model": schema.to_dict(model), **extra}


def sum_json(values: dict) -> int:
    """CRC-32 of values, the same before and after a round trip through JSON."""
    read = json.loads(json.dumps(values))
    return zlib.crc32(json.dumps(read, sort_keys=True).encode())


def write_json(path: Path, values: dict) -> None:
    """Writes a JSON file that is either complete and on disk, or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(values, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def sync(path: Path) -> None:
    """Makes a file durable, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Makes a folder and everything in it durable."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


@contextlib.contextmanager
def syncing(folder: Path) -> Iterator[None]:
    """Syncs files in a thread, so that the disk works while blocks are converted.

    Otherwise the system keeps gigabytes in memory until the last sync, which waits for all of
    them.
    """
    stop = threading.Event()
    synced: dict[Path, int] = {}

    def run() -> None:
        while not stop.wait(_SYNC_SECONDS):
            for path in folder.rglob("*"):
                # A file that goes away is a temporary one; an error shows again in `sync_tree`.
                with contextlib.suppress(OSError):
                    size = path.stat().st_size
                    if path.is_file() and synced.get(path) != size:
                        sync(path)
                        synced[path] = size

    thread = threading.Thread(target=run, name="sync", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def boot_id() -> str | None:
    """Identifier of the machine's current boot; None where the system does not say."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else None
