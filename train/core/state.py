"""Training state on disk: Orbax checkpoints that resume bitwise, with parameters as a plain tree.

    OUTPUT/checkpoints/STEP/params      parameters, a plain tree (OCDBT)
                            optimizer   step and moments
                            data        where the data stands, JSON
                            model       {"format": 1, "model": its config, "step": STEP,
                                        "checksums": {"params": .., "optimizer": ..,
                                                      "json": ..}}, JSON

A step's folder gets its name when everything in it is written; the remains of a killed save have
another name, are ignored, and are removed at the next start.

A save copies this process's shards to host memory, and training continues while that copy is
written. A second save waits for the first.
"""

import contextlib
import errno
import functools
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from configs import schema
from configs.models import architecture
from configs.models.architecture import ModelConfig
from configs.train import CheckpointConfig
from qwen_jax import storage
from qwen_jax.checkpoint.native import store
from train.core.step import State

FORMAT = 1
_CHUNK_BYTES = 256 * 2**20
_STACKS = ("layers", "dense_layers")
_KEYS = ("key", "idx", "name")  # of a dictionary, a sequence, an attribute


class DiskFull(OSError):
    """A full disk prevented a write; the checkpoints that exist are complete."""


@dataclass(frozen=True)
class Restored:
    """A training state as it was after `step` updates, and the data state that belongs to it."""

    step: int
    state: State
    data: dict


class Store:
    """The checkpoints of one run. Saving is asynchronous; leaving `with` waits for it.

    like: shapes, dtypes and shardings of the state that is saved and restored.
    """

    def __init__(
        self, output: Path, config: CheckpointConfig, cfg: ModelConfig, like: State
    ) -> None:
        self.folder = output / "checkpoints"
        self._like = like
        self._model = schema.to_dict(cfg)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=config.keep,
            keep_period=config.keep_every_steps or None,
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
        )
        handlers = {
            "params": _handler(),
            "optimizer": _handler(),
            "data": ocp.JsonCheckpointHandler(),
            "model": ocp.JsonCheckpointHandler(),
        }
        self._manager = ocp.CheckpointManager(
            storage.absolute(self.folder),
            options=options,
            item_handlers=handlers,
        )

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, or `None`."""
        return self._manager.latest_step()

    def restore(self) -> Restored | None:
        """The newest state, in the shardings of `like`; `None` where there is none.

        Raises `ValueError` if the checkpoint belongs to another model, or is damaged. An older one
        is never taken in its place: that is for a person to say, by removing the newer.
        """
        step = self.latest()
        if step is None:
            return None
        read = ocp.args.JsonRestore()
        with self._explain_damage(step):
            model = self._manager.restore(step, args=ocp.args.Composite(model=read))["model"]
        self._check_model(model, step)
        trees = {name: _restore_args(tree) for name, tree in _parts(self._like).items()}
        with self._explain_damage(step):
            for part in trees:  # one clear error, where Orbax has one of every array
                store.open_all_for_reading(self.folder / str(step) / part, store.context())
            saved = self._manager.restore(step, args=ocp.args.Composite(**trees, data=read))
            optimizer = saved["optimizer"]
            state = State(optimizer["step"], saved["params"], optimizer["state"])
            if "checksums" in model:  # older checkpoints have none
                found = checksums(state, model=model["model"], data=saved["data"])
                _compare(model["checksums"], found)
        return Restored(step, state, saved["data"])

    def save(self, step: int, state: State, data: dict) -> None:
        """Start to save; returns when `state` may be donated. A step already saved is left alone.

        Raises what stopped this save, or the one before it, and `OSError` where the disk has no
        room for the state.
        """
        if step == self.latest():
            return
        self._check_room(state)
        trees = {
            name: ocp.args.PyTreeSave(tree, save_args=_chunks(tree))
            for name, tree in _parts(state).items()
        }
        model = {"format": FORMAT, "model": self._model, "step": step}
        model["checksums"] = checksums(state, model=self._model, data=data)
        self._manager.save(
            step,
            args=ocp.args.Composite(
                **trees,
                data=ocp.args.JsonSave(data),
                model=ocp.args.JsonSave(model),
            ),
            force=True,
        )

    def check(self) -> None:
        """Raises the error that stopped a save in the background, if there is one."""
        self._manager.check_for_errors()

    def wait(self) -> None:
        """Wait until the last save is complete. Raises the error that stopped it."""
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
        # A check before the save gives one error; a disk that fills during it, one per array.
        self.wait()
        if storage.is_remote(self.folder):
            return
        needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise OSError(
                errno.ENOSPC,
                f"a checkpoint takes {needed / 1e9:.3g} GB and {free / 1e9:.3g} GB are free",
            )

    @contextlib.contextmanager
    def _explain_damage(self, step: int) -> Iterator[None]:
        try:
            yield
        except jax.errors.JaxRuntimeError:
            raise  # an error of a device or of another process, not of the checkpoint
        except Exception as error:  # Orbax raises, among many others, `Exception` itself
            older = [n for n in self._manager.all_steps() if n < step]
            instead = f"the checkpoint of step {max(older)}" if older else "the beginning"
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"{self.folder / str(step)} is damaged: {reason}. `qwen-jax checkpoint verify` "
                f"names all that is; remove the folder to go on from {instead}"
            ) from error

    def _check_model(self, saved: dict, step: int) -> None:
        if saved.get("format") != FORMAT:
            raise ValueError(
                f"{self.folder / str(step)} has format {saved.get('format')!r}; this version reads "
                f"{FORMAT}"
            )
        model = schema.to_dict(architecture.model_from_dict(saved["model"]))
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
    """Context that turns the errors of a full disk (Orbax, tensorstore, ours) into `DiskFull`."""
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


def checksums(state: State, **json_values: dict) -> dict[str, dict[str, int]]:
    """Checksum of every array by its stored name: the sum of the array's words modulo 2^32.

    The checksum is equal on every mesh, and any single changed bit changes it;
    `qwen_jax/checkpoint/verify.py` computes it from the files. `json` holds those of `json_values`.
    """
    sums = jax.device_get(_sum_words(_parts(state), where=state.step.sharding))

    def name(path: tuple) -> str:
        return ".".join(str(getattr(key, k)) for key in path for k in _KEYS if hasattr(key, k))

    named = {
        part: {name(path): int(value) for path, value in jax.tree_util.tree_leaves_with_path(tree)}
        for part, tree in sums.items()
    }
    return named | {"json": {item: store.sum_json(values) for item, values in json_values.items()}}


@functools.partial(jax.jit, static_argnames="where")
def _sum_words(tree, *, where):
    def add(x: jax.Array) -> jax.Array:
        words = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
        total = jnp.sum(words.astype(jnp.uint32), dtype=jnp.uint32)
        return jax.lax.with_sharding_constraint(total, where)

    return jax.tree.map(add, tree)


def _compare(saved: dict, found: dict) -> None:
    for part, sums in found.items():
        for name, value in sums.items():
            if saved[part][name] != value:
                raise ValueError(f"the values of {part} {name} are not those that were saved")


def _parts(state: State) -> dict[str, dict]:
    """Stored form of the state: the trees `params` and `optimizer`."""
    optimizer = {"step": state.step, "state": state.optimizer}
    return {"params": state.params, "optimizer": optimizer}


def _handler() -> ocp.PyTreeCheckpointHandler:
    # Compressing float32 weights takes more time than it saves space.
    return ocp.PyTreeCheckpointHandler(use_compression=False)


def _restore_args(like) -> ocp.args.PyTreeRestore:
    args = ocp.checkpoint_utils.construct_restore_args(like)
    return ocp.args.PyTreeRestore(item=like, restore_args=args)


def _chunks(tree: dict):
    """Save arguments that store stacked layers one by one, so that each can be read alone."""

    def choose(path, leaf: jax.Array) -> ocp.SaveArgs:
        stacked = any(getattr(key, "key", None) in _STACKS for key in path)
        return ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES, shard_axes=(0,) if stacked else ())

    return jax.tree_util.tree_map_with_path(choose, tree)


def _is_disk_full(error: BaseException) -> bool:
    """Whether `error`, or one of its causes, is a full disk; tensorstore says so only in text."""
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    seen: BaseException | None = error
    while seen is not None:
        if getattr(seen, "errno", None) in codes or any(
            os.strerror(code) in str(seen) for code in codes
        ):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
