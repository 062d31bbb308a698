"""Imports a Hugging Face folder as a native checkpoint.

    OUT/params/         the parameters, an Orbax PyTree checkpoint
    OUT/model/metadata  {"format": 1, "model": ..., "source": ...}
    OUT/assets/         config.json, generation_config.json and tokenizer files as they were

Everything is written into OUT.partial, which is renamed to OUT when it is complete. The array
database is the journal: what it names was written completely, so a later run resumes from there.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path

import numpy as np
import tensorstore as ts

from qwen_jax import storage
from qwen_jax.checkpoint import block_plan, dtypes, resolve, tensor_table
from qwen_jax.checkpoint.huggingface import quantised_importer, source
from qwen_jax.checkpoint.native import store, writer

_JOURNAL = "import.json"


def import_checkpoint(
    hf_dir: Path | str,
    out: Path | str,
    *,
    max_memory: int | None = None,
    on_plan: Callable[[block_plan.Plan], None] | None = None,
    on_progress: block_plan.Progress | None = None,
) -> block_plan.Plan:
    """Writes the native checkpoint `out` from the Hugging Face folder `hf_dir`.

    Tensors keep their dtype. `max_memory` bounds the resident bytes of the process. `on_plan` is
    called before anything is written. A run that was killed resumes when called again. Quantised
    kernels keep their values and scales, in our packing; an import of them begins anew.

    Raises `ValueError` for a folder that is not a sound Qwen2.5 checkpoint, too small a
    `max_memory`, or an `out` in the way; `OSError` when the disk is full: run again after.
    """
    out = Path(out)
    resolved = resolve.resolve_huggingface(hf_dir)
    opened = source.open_source(resolved)
    _ = resolved.generation_config  # raises for what it asks and is not supported
    if opened.quantisation is not None:
        return quantised_importer.import_opened(
            opened, out, max_memory=max_memory, on_plan=on_plan, on_progress=on_progress
        )
    partial = out.with_name(out.name + ".partial")
    with _lock(partial):
        journal = {"format": 1, "source": _fingerprint(opened)}
        if _finished(out, journal):
            return _plan(opened, out, [], block_bytes=0, max_memory=max_memory, done=set())
        block_bytes = _begin(partial, journal, max_memory=max_memory)
        arrays = [
            block_plan.array(
                row, opened.model, source.row_dtype(opened, row), block_bytes=block_bytes
            )
            for row in tensor_table.rows(opened.model)
        ]
        params = partial / "params"
        store.remove_leftovers(params)
        done = store.written_chunks(params)
        planned = _plan(
            opened, out, arrays, block_bytes=block_bytes, max_memory=max_memory, done=done
        )
        _check_space(partial, planned)
        if on_plan:
            on_plan(planned)
        _check_tied(opened, block_bytes=block_bytes)
        try:
            with store.syncing(params):
                _write_arrays(opened, params, arrays, planned, done=done, on_progress=on_progress)
            _commit(opened, partial, out, arrays)
        except OSError as error:
            raise OSError(
                f"cannot write {partial}: {error}; make room and run the import again, "
                f"it goes on where it stopped"
            ) from error
    return planned


@contextlib.contextmanager
def _lock(partial: Path) -> Iterator[None]:
    """Keeps two imports out of one place; the system drops the lock of a killed process."""
    partial.parent.mkdir(parents=True, exist_ok=True)
    path = partial.with_name(partial.name + ".lock")
    locked = False
    with path.open("w") as file:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The one who held it may have deleted the file that was just locked.
            locked = path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino
        if not locked:
            raise ValueError(f"another import is writing {partial}; wait for it to end")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _fingerprint(opened: source.Source) -> dict:
    """A fingerprint of the source files that needs no read of them."""
    config = json.dumps(opened.resolved.config, sort_keys=True).encode()
    stats = {path.name: path.stat() for path in opened.files}
    return {
        "config_sha256": hashlib.sha256(config).hexdigest(),
        "files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
    }


def _finished(out: Path, journal: dict) -> bool:
    """Whether `out` is this very import, killed between its commit and its end."""
    if not out.exists():
        return False
    path = out / _JOURNAL
    if path.exists():
        written = storage.read_json(path)
        if written.get("source") == journal["source"]:
            path.unlink()
            return True
    raise ValueError(f"{out} exists already; delete it, or choose another place")


def _begin(partial: Path, journal: dict, *, max_memory: int | None) -> int:
    """Block size in bytes, after the journal is started or an earlier one is checked."""
    path = partial / _JOURNAL
    boot_id = store.boot_id()
    if partial.exists() and any(not p.name.startswith(_JOURNAL) for p in partial.iterdir()):
        if not path.exists():
            raise ValueError(f"{partial} is in the way and no unfinished import; delete it")
    else:  # nothing is written yet, whatever an earlier journal says
        block_bytes = block_plan.choose_block_bytes(max_memory)
        store.write_json(path, {**journal, "block_bytes": block_bytes, "boot_id": boot_id})
        return block_bytes
    earlier = storage.read_json(path)
    if any(earlier.get(key) != value for key, value in journal.items()):
        raise ValueError(
            f"{partial} is an unfinished import of other files; delete it to start again"
        )
    block_bytes = earlier["block_bytes"]
    if max_memory is not None and block_plan.choose_block_bytes(max_memory) < block_bytes:
        needed = block_plan.peak_bytes(block_bytes) / block_plan.MIB
        raise ValueError(
            f"{partial} was begun with more memory than "
            f"max_memory={max_memory / block_plan.MIB:.0f} MiB; "
            f"go on with at least {needed:.0f} MiB, or delete it to start again"
        )
    if boot_id is None or earlier["boot_id"] != boot_id:
        # Nothing was synced when the machine stopped: what the database names may not be there.
        shutil.rmtree(partial / "params", ignore_errors=True)
        store.write_json(path, {**earlier, "boot_id": boot_id})
    return block_bytes


def _plan(
    opened: source.Source,
    out: Path,
    arrays: list[block_plan.Array],
    *,
    block_bytes: int,
    max_memory: int | None,
    done: set[str],
) -> block_plan.Plan:
    done_bytes = largest = 0
    for stored in arrays:
        for block in block_plan.blocks(stored, opened.model):
            nbytes = block_plan.block_bytes(stored, block)
            largest = max(largest, nbytes)
            done_bytes += nbytes if _is_done(stored, block, done) else 0
    return block_plan.Plan(
        source=opened.folder,
        target=out,
        model=opened.model,
        num_tensors=len(opened.tensors),
        total_bytes=sum(stored.nbytes for stored in arrays),
        done_bytes=done_bytes,
        block_bytes=block_bytes,
        peak_bytes=block_plan.peak_bytes(min(block_bytes, largest)),
        max_memory=max_memory,
    )


def _is_done(stored: block_plan.Array, block: block_plan.Block, done: set[str]) -> bool:
    return all(f"{stored.row.path}/{key}" in done for key in block_plan.chunk_keys(stored, block))


def _check_space(partial: Path, planned: block_plan.Plan) -> None:
    free = shutil.disk_usage(partial).free
    needed = planned.total_bytes - planned.done_bytes
    if free < needed:
        raise OSError(
            f"{partial} needs {needed / 1e9:.2f} GB more and the disk has {free / 1e9:.2f} GB "
            f"free; make room and run the import again, it goes on where it stopped"
        )


def _check_tied(opened: source.Source, *, block_bytes: int) -> None:
    """Raises `ValueError` if a stored copy of the tied LM head differs from the embedding."""
    name, embed = tensor_table.LM_HEAD.hf, tensor_table.EMBED.hf
    if not opened.model.tie_word_embeddings or name not in opened.tensors:
        return
    row_bytes = opened.model.hidden_size * dtypes.DTYPES[opened.tensors[embed].dtype].itemsize
    step = max(1, block_bytes // row_bytes)
    for start in range(0, opened.model.vocab_size, step):
        slices = (slice(start, min(start + step, opened.model.vocab_size)), slice(None))
        tied, embedding = source.read(opened, name, slices), source.read(opened, embed, slices)
        if tied.dtype != embedding.dtype or not np.array_equal(
            tied.view("u1"), embedding.view("u1")
        ):
            raise ValueError(
                f"{name} differs from {embed} near row {start}, but tie_word_embeddings is true; "
                f"set it to false in config.json to keep both"
            )


def _write_arrays(
    opened: source.Source,
    params: Path,
    arrays: list[block_plan.Array],
    planned: block_plan.Plan,
    *,
    done: set[str],
    on_progress: block_plan.Progress | None,
) -> None:
    """Writes every block that is not done, with a bounded number of blocks in flight."""
    context = store.context()
    written = planned.done_bytes
    under_way: deque[futures.Future[tuple[ts.WriteFutures, block_plan.Array, int]]] = deque()

    buffers = threading.local()  # pages that are used again need not be cleared again

    def convert(stored: block_plan.Array, array: ts.TensorStore, block: block_plan.Block):
        nbytes = block_plan.block_bytes(stored, block)
        if getattr(buffers, "bytes", np.empty(0)).size < nbytes:
            buffers.bytes = np.empty(nbytes, np.uint8)
        data = source.read_block(opened, stored, block, buffers.bytes[:nbytes])
        write = array[block.index(stored.row)].write(data)
        with store.write_errors():
            write.copy.result()
        return write, stored, nbytes

    def finish_oldest() -> None:
        nonlocal written
        write, stored, nbytes = under_way.popleft().result()
        with store.write_errors():
            write.result()
        written += nbytes
        if on_progress:
            on_progress(written, planned.total_bytes, stored.row.path)

    with futures.ThreadPoolExecutor(block_plan.CONVERTING) as pool:
        try:
            for stored in arrays:
                with store.write_errors():
                    array = store.open_for_writing(params, stored, context)
                for block in block_plan.blocks(stored, opened.model):
                    if not _is_done(stored, block, done):
                        under_way.append(pool.submit(convert, stored, array, block))
                    while len(under_way) > block_plan.UNDER_WAY:
                        finish_oldest()
            while under_way:
                finish_oldest()
        finally:
            pool.shutdown(cancel_futures=True)
            for future in under_way:
                if not future.cancelled() and not future.exception():
                    future.result()[0].exception()


def _commit(
    opened: source.Source, partial: Path, out: Path, arrays: list[block_plan.Array]
) -> None:
    """Writes the metadata that completes the checkpoint, and renames it into place."""
    store.remove_leftovers(partial / "params")
    done = store.written_chunks(partial / "params")
    for stored in arrays:
        assert all(
            _is_done(stored, block, done) for block in block_plan.blocks(stored, opened.model)
        )
    store.write_json(partial / "params" / "_METADATA", store.tree_metadata(arrays))
    writer.copy_assets(opened.folder, partial / "assets")
    # Export needs to know what is not in the parameters to give back the files as they were.
    stored_twice = opened.model.tie_word_embeddings and tensor_table.LM_HEAD.hf in opened.tensors
    origin = {"kind": opened.resolved.weights.format, "stores_tied_lm_head": stored_twice}
    store.write_json(partial / "model" / "metadata", store.metadata(opened.model, source=origin))
    store.sync_tree(partial)
    partial.rename(out)
    store.sync(out.parent)
    (out / _JOURNAL).unlink()
