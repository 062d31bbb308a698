"""Several processes as one JAX: finds the cluster, starts it, and ends it when one is lost.

A run is one process unless its `schema.Cluster` says otherwise. `joined` surrounds the run: inside,
JAX sees the devices of all processes, `stage` bounds what may take how long, and `gather` and
`agree` exchange small values. With one process they cost nothing.

Exit codes: a process that is missing, lost or stuck ends all of them with 75, start again; an error
in one process ends the others with its code and its reason.
"""

import atexit
import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
from jax._src import clusters  # the detection that jax.distributed.initialize would use itself

from configs.cluster import ClusterConfig
from partitioning.processes import watch as watch_lib

_watch: watch_lib.Watch | None = None
_limit = 0.0


@dataclass(frozen=True)
class Membership:
    """Place of one process in a cluster, as arguments of `jax.distributed.initialize`."""

    coordinator: str
    num_processes: int
    process_id: int
    local_device_ids: tuple[int, ...] | None = None


def find(config: ClusterConfig) -> Membership | None:
    """This process's place in the cluster; `None` where the run is one process.

    `launch="auto"` asks JAX's cluster detection: Cloud TPU (metadata server), GKE with TPUs
    (TPU_WORKER_ID, TPU_WORKER_HOSTNAMES and MEGASCALE_*), Slurm, Open MPI, and Kubernetes Jobs and
    JobSets (package `kubernetes`). Values in `config`, or in the variables JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID, take precedence; all three together are explicit start-up.

    Raises `ValueError` naming the values that are missing.
    """
    if config.launch == "single":
        return None
    coordinator = config.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS") or None
    num_processes = config.num_processes or _number("JAX_NUM_PROCESSES")
    process_id = config.process_id if config.process_id >= 0 else _number("JAX_PROCESS_ID")
    local_device_ids = None
    if config.launch == "auto" and None in (coordinator, num_processes, process_id):
        try:
            found = clusters.ClusterEnv.auto_detect_unset_distributed_params(
                coordinator, num_processes, process_id, None, None, config.start_seconds
            )
        except Exception as error:  # whatever the environment's own interface raises
            raise ValueError(f"cluster.launch=auto cannot read this cluster: {error}") from error
        coordinator, num_processes, process_id, local_device_ids = found
    known = {
        "coordinator": coordinator,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    if unknown := [f"cluster.{name}" for name, value in known.items() if value is None]:
        raise ValueError(
            f"{', '.join(unknown)} not known: cluster.launch={config.launch} found no Cloud TPU, "
            f"GKE, Slurm, Open MPI or Kubernetes Job here that says; give them as flags, or as "
            f"JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        )
    if not 0 <= process_id < num_processes:
        raise ValueError(
            f"cluster.process_id={process_id} must be below cluster.num_processes={num_processes}"
        )
    ids = None if local_device_ids is None else tuple(local_device_ids)
    return Membership(coordinator, num_processes, process_id, ids)


@contextlib.contextmanager
def joined(config: ClusterConfig) -> Iterator[None]:
    """Context in which this process is a member of its cluster; without effect for one process.

    Enter the context before anything asks JAX for its devices. If the body raises, the other
    processes end with the same reason, and this process exits without waiting for them.
    Raises `watch.Lost` if processes do not arrive, and the errors of `find`.
    """
    global _watch, _limit
    place = find(config)
    if place is None or place.num_processes == 1:
        yield
        return
    watch = _watch = watch_lib.call_roll(
        place.coordinator,
        process_id=place.process_id,
        num_processes=place.num_processes,
        seconds=config.start_seconds,
        silence=config.silence_seconds,
    )
    _limit = config.stall_seconds
    try:
        _start(place, config)
        yield
        stage("the end of the run", seconds=config.start_seconds)
        watch.close()
        jax.distributed.shutdown()
    except BaseException as error:
        code = exit_code(error)
        watch.fail(code, str(error) or type(error).__name__)
        atexit.register(_leave, code)  # runs before JAX's handler, which waits for the others
        raise
    finally:
        _watch = None


def exit_code(error: BaseException) -> int:
    """Exit code of a process after `error`: the error's own code, or 2 for a user's mistake."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    usual = 2 if isinstance(error, ValueError | OSError) else 1
    return getattr(error, "exit_code", usual)


def stage(name: str, *, seconds: float | None = None) -> None:
    """Announces that this process, like all others, has begun the stage `name`.

    After `seconds` (default: the cluster's `stall_seconds`) in one stage, the run ends with an
    error that names the processes that are behind.
    """
    if _watch is not None:
        _watch.stage(name, _limit if seconds is None else seconds)


def gather(value: Any) -> list:
    """JSON values of all processes, in the order of the processes; equal on every process."""
    return [value] if _watch is None else _watch.gather(value)


def agree(values: dict[str, Any]) -> None:
    """Raises `ValueError` naming the values (JSON) in which this process differs from process 0."""
    first = gather(values)[0]
    differing = [
        f"{name}: {first.get(name)!r} there, {values.get(name)!r} here"
        for name in sorted({*first, *values})
        if first.get(name) != values.get(name)
    ]
    if differing:
        raise ValueError(
            f"process {jax.process_index()} was started unlike process 0 ({'; '.join(differing)}); "
            f"start all processes with the same settings and files"
        )


def _start(place: Membership, config: ClusterConfig) -> None:
    stage("JAX's start", seconds=config.start_seconds)
    _delay_aborts()
    # JAX aborts at its own timeout without naming a process; the watch has a shorter timeout.
    jax.distributed.initialize(
        place.coordinator,
        place.num_processes,
        place.process_id,
        place.local_device_ids,
        initialization_timeout=config.start_seconds + 60,
        heartbeat_timeout_seconds=config.silence_seconds + 60,
        shutdown_timeout_seconds=config.start_seconds + 60,
    )
    stage("finding the devices of all processes", seconds=config.start_seconds)
    jax.devices()


def _delay_aborts() -> None:
    """Delays JAX's abort by 6 seconds, so that the watch can report the lost process first.

    When process 0 dies, its coordinator dies with it, and within milliseconds JAX's client aborts
    the other processes from a thread of its own. The C library's `sleep`, called in that thread
    with the signal's number, 6, delays the abort by that many seconds; by then the watch has seen
    the loss, reported it, and exited with its code. Every other abort is also delayed by 6 seconds.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))


def _leave(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _number(variable: str) -> int | None:
    text = os.environ.get(variable, "")
    if text and not text.isdecimal():
        raise ValueError(f"{variable}={text!r} is not a whole number")
    return int(text) if text else None
