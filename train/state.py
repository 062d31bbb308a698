"""Training state on disk: Orbax checkpoints that go on bitwise; their parameters anyone can read.

    OUTPUT/checkpoints/STEP/params      parameters, a plain tree (OCDBT)
                            optimizer   step and moments
                            data        where the data stands, JSON
                            model       {"format": 1, "model": its config, "step": STEP}, JSON

A step's folder appears under its name when everything in it is written; what a killed save left
behind has another name, is not looked at, and is removed at the next start.
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from configs import schema
from train.step import State

FORMAT = 1
_CHUNK_BYTES = 256 * 2**20


class DiskFull(OSError):
    """Something of a run could not be written; the checkpoints there are whole."""


@dataclass(frozen=True)
class Restored:
    """A training state as it was after `step` updates, and the data state that belongs to it."""

    step: int
    state: State
    data: dict


class Store:
    """The checkpoints of one run. Saving is asynchronous; leaving `with` waits for it."""

    def __init__(self, output: Path, config: schema.Checkpoint, cfg: schema.Model) -> None:
        self.folder = output / "checkpoints"
        self._model = schema.to_dict(cfg)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=config.keep,
            keep_period=config.keep_every_steps or None,
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
        )
        # Compressing float32 weights costs more time than it saves space.
        handlers = {
            "params": ocp.PyTreeCheckpointHandler(use_compression=False),
            "optimizer": ocp.PyTreeCheckpointHandler(use_compression=False),
            "data": ocp.JsonCheckpointHandler(),
            "model": ocp.JsonCheckpointHandler(),
        }
        self._manager = ocp.CheckpointManager(
            self.folder.resolve(),
            options=options,
            item_handlers=handlers,
        )

    def latest(self) -> int | None:
        """The newest whole checkpoint's step."""
        return self._manager.latest_step()

    def restore(self, like: State) -> Restored | None:
        """The newest state, in the shapes and shardings of `like`; `None` where there is none.

        Raises `ValueError` if the checkpoint belongs to another model.
        """
        step = self.latest()
        if step is None:
            return None
        saved = self._manager.restore(step, args=ocp.args.Composite(model=ocp.args.JsonRestore()))
        self._check_model(saved["model"], step)
        optimizer = {"step": like.step, "state": like.optimizer}
        saved = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=_restore_args(like.params),
                optimizer=_restore_args(optimizer),
                data=ocp.args.JsonRestore(),
            ),
        )
        optimizer = saved["optimizer"]
        state = State(optimizer["step"], saved["params"], optimizer["state"])
        return Restored(step, state, saved["data"])

    def save(self, step: int, state: State, data: dict) -> None:
        """Start to save; returns when `state` may be donated. A step already saved is left alone.

        Raises what stopped this save, or the one before it, and `OSError` where the disk has no
        room for the state.
        """
        if step == self.latest():
            return
        optimizer = {"step": state.step, "state": state.optimizer}
        model = {"format": FORMAT, "model": self._model, "step": step}
        self._check_room(state)
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.PyTreeSave(state.params, save_args=_chunks(state.params)),
                optimizer=ocp.args.PyTreeSave(optimizer),
                data=ocp.args.JsonSave(data),
                model=ocp.args.JsonSave(model),
            ),
            force=True,
        )

    def check(self) -> None:
        """Raises what has stopped a save in the background, if anything has."""
        self._manager.check_for_errors()

    def wait(self) -> None:
        """Wait until what was saved is whole. Raises what stopped it."""
        self._manager.wait_until_finished()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, kind: type | None, *exception: object) -> None:
        # Waits for a save that is under way. When something has failed already, that failure is
        # the one to report; and other processes, with which a save is finished, may be gone.
        if kind and jax.process_count() > 1:
            return
        with contextlib.suppress(Exception) if kind else contextlib.nullcontext():
            self._manager.close()

    def _check_room(self, state: State) -> None:
        # Asked for before, a full disk is one error. Met on the way, it is one of every array.
        self.wait()
        needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise OSError(
                errno.ENOSPC,
                f"a checkpoint takes {needed / 1e9:.3g} GB and {free / 1e9:.3g} GB are free",
            )

    def _check_model(self, saved: dict, step: int) -> None:
        if saved.get("format") != FORMAT:
            raise ValueError(
                f"{self.folder / str(step)} has format {saved.get('format')!r}; this version reads "
                f"{FORMAT}"
            )
        model = schema.to_dict(schema.model_from_dict(saved["model"]))
        if model == self._model:
            return
        changed = [
            f"{name}: {model[name]} -> {value}"
            for name, value in self._model.items()
            if model[name] != value
        ]
        raise ValueError(
            f"{self.folder / str(step)} is a checkpoint of another model ({'; '.join(changed)}); "
            f"choose another output, or the model it was trained with"
        )


@contextlib.contextmanager
def explain_full_disk(output: Path) -> Iterator[None]:
    """Turns whatever a full disk raises, in Orbax, in tensorstore or here, into one `DiskFull`."""
    try:
        yield
        return
    except Exception as error:
        if not _is_disk_full(error):
            raise
        ours = isinstance(error, OSError) and error.errno == errno.ENOSPC and not error.filename
        detail = f" ({error.strerror})" if ours else ""
    # Raised out here, and so without the first error, which holds on to tensorstore's unfinished
    # writes: they would complain one by one when the interpreter ends.
    folder = output / "checkpoints"
    steps = [int(path.name) for path in folder.glob("*") if path.name.isdecimal()]
    whole = f"the checkpoint of step {max(steps)} is whole" if steps else "no checkpoint exists"
    raise DiskFull(
        f"no space left (or a limit on the size of files) in {output}{detail}; {whole}. Free space "
        f"there, or lower checkpoint.keep, and run again to go on"
    )


def _restore_args(like) -> ocp.args.PyTreeRestore:
    args = ocp.checkpoint_utils.construct_restore_args(like)
    return ocp.args.PyTreeRestore(item=like, restore_args=args)


def _chunks(params: dict):
    """Stacked layers are stored layer by layer, so that one can be read without the others."""

    def choose(path, leaf: jax.Array) -> ocp.SaveArgs:
        axes = (0,) if path[0].key in ("layers", "dense_layers") else ()
        return ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES, shard_axes=axes)

    return jax.tree_util.tree_map_with_path(choose, params)


def _is_disk_full(error: BaseException) -> bool:
    """Whether `error`, or one it stems from, says so; tensorstore says it in its text alone."""
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    seen: BaseException | None = error
    while seen is not None:
        if getattr(seen, "errno", None) in codes or any(
            os.strerror(code) in str(seen) for code in codes
        ):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
