"""The processes of one run: how they find each other, and how long they wait."""

from typing import Annotated, Literal

from configs import schema
from configs.schema import NonNegative, Positive, Range


@schema.config(prefix="cluster.")
class ClusterConfig:
    """The processes of a run, one a host: how they find each other, how long they wait."""

    # single: one process. auto: ask Cloud TPU, GKE, Slurm, Open MPI or Kubernetes. explicit: below,
    # or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.
    launch: Literal["single", "auto", "explicit"] = "single"
    coordinator: str = ""  # HOST:PORT of process 0, as the others reach it
    num_processes: NonNegative[int] = 0  # 0: not said
    process_id: Annotated[int, Range(min=-1)] = -1  # of this process, from 0; -1: not said
    # For all processes to come, and for each step of the start
    start_seconds: Positive[int] = 300
    silence_seconds: Positive[int] = 60  # without a sign of life a process counts as lost
    # Longest for a training step, an evaluation, a save, a compilation
    stall_seconds: Positive[int] = 1800

    def __post_init__(self) -> None:
        given = self.coordinator or self.num_processes or self.process_id >= 0
        schema.check(
            self.launch != "single" or not given,
            "cluster.coordinator, num_processes and process_id have no effect with "
            "cluster.launch=single; use explicit, or auto to find the rest",
        )
