"""Processes of one run: launch, addresses and time limits."""

from typing import Annotated, Literal

from configs import schema
from configs.schema import NonNegative, Positive, Range


@schema.config(prefix="cluster.")
class ClusterConfig:
    """Processes of a run, one per host: launch, addresses and time limits."""

    # single: one process. auto: found by asking Cloud TPU, GKE, Slurm, Open MPI or Kubernetes.
    # explicit: coordinator, num_processes and process_id below, or the variables
    # JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.
    launch: Literal["single", "auto", "explicit"] = "single"
    coordinator: str = ""  # HOST:PORT at which the others reach process 0
    num_processes: NonNegative[int] = 0  # Number of processes; 0: not given
    process_id: Annotated[int, Range(min=-1)] = -1  # Own number, from 0; -1: not given
    # Seconds until all processes must have arrived, and for each step of the start-up
    start_seconds: Positive[int] = 300
    silence_seconds: Positive[int] = 60  # Seconds without a heartbeat before a loss
    # Most seconds that a training step, an evaluation, a save or a compilation may take
    stall_seconds: Positive[int] = 1800

    def __post_init__(self) -> None:
        given = self.coordinator or self.num_processes or self.process_id >= 0
        schema.check(
            self.launch != "single" or not given,
            "cluster.coordinator, num_processes and process_id have no effect with "
            "cluster.launch=single; use explicit, or auto to find the rest",
        )
