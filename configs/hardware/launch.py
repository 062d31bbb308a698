"""Settings of a training job on Cloud TPU: the chips to rent and the command to start."""

import re
import shlex
from typing import Literal

from configs import schema
from configs.hardware import topologies

Target = Literal["queued-resource", "xpk", "gke"]
Capacity = Literal["spot", "on-demand"]

# What each way to the chips cannot do without, beside the fields that have no default.
NEEDS: dict[str, tuple[str, ...]] = {
    "queued-resource": ("package",),
    "xpk": ("cluster", "image"),
    "gke": ("cluster", "image"),
}

# RFC 1123, shortened: JobSet and XPK add up to 23 characters and Kubernetes stops at 63.
_NAME = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")
_BUCKET = re.compile(r"gs://[a-z0-9][a-z0-9._-]{1,61}[a-z0-9](/[A-Za-z0-9._/=-]*)?")
_PACKAGE = re.compile(r"((gs://|git\+https://)[A-Za-z0-9._/@:+=-]+)?")
_ZONE = re.compile(r"[a-z]+-[a-z]+\d+-[a-z]")
_PROJECT = re.compile(r"([a-z0-9.-]+:)?[a-z][a-z0-9-]{4,28}[a-z0-9]")


@schema.config()
class LaunchConfig:
    """One training command on one slice, or several. Fields that do not apply must be left out."""

    name: str  # name of the job and of the resources rented for it
    topology: str  # such as v5p-128 or 2xv5e-256 (configs/hardware/topologies.py)
    project: str
    zone: str
    output: str  # gs://BUCKET/FOLDER: checkpoints and metrics, passed on as --output
    train: str  # arguments of `qwen-jax train` without --output, as one quoted word
    capacity: Capacity = "spot"
    package: str = ""  # package for pip on the machines: gs://.../x.whl or git+https://...
    cluster: str = ""  # name of the GKE cluster
    cluster_location: str = ""  # a region or a zone; left out, the region of `zone`
    image: str = ""  # container with qwen-jax and the tpu extra in it
    # Crashes that start the run again. A preemption is no crash, and is not counted where the
    # scheduler lets us say so (all but XPK).
    max_restarts: schema.NonNegative[int] = 10
    # From SIGTERM until the machine kills the run: time to save. Spot TPUs give about 30 seconds
    # whatever is asked for.
    grace_seconds: schema.Positive[int] = 120

    def __post_init__(self) -> None:
        chip = self.slice.chip
        schema.check(
            chip.platform == "tpu",
            f"topology={self.topology!r} is no TPU slice; cloud launch files are for TPUs, such "
            "as v5p-128",
        )
        for value, pattern, field, form in (
            (self.name, _NAME, "name", "lower-case letters, digits and -, at most 40 of them"),
            (self.project, _PROJECT, "project", "a Google Cloud project's id"),
            (self.zone, _ZONE, "zone", "a zone such as us-east5-a"),
            (self.output, _BUCKET, "output", "gs://BUCKET/FOLDER, which every machine can reach"),
            (self.package, _PACKAGE, "package", "gs://... or git+https://... without spaces"),
        ):
            schema.check(bool(pattern.fullmatch(value)), f"{field}={value!r}; it must be {form}")
        words = self.train_words
        schema.check(bool(words), "train is empty; say what follows `qwen-jax train`: a recipe")
        schema.check(
            not any(word == "--output" or word.startswith("--output=") for word in words),
            "train holds --output; it is taken from `output`",
        )

    @property
    def train_words(self) -> list[str]:
        """`train` as the shell would split it."""
        try:
            return shlex.split(self.train)
        except ValueError as error:
            raise ValueError(f"train={self.train!r} is not shell: {error}") from error

    @property
    def slice(self) -> topologies.Slice:
        return topologies.parse(self.topology)

    @property
    def location(self) -> str:
        """Region or zone of the cluster."""
        return self.cluster_location or self.region

    @property
    def region(self) -> str:
        return self.zone.rpartition("-")[0]

    def check_target(self, target: Target) -> None:
        """Refuses a way that these chips, or these fields, do not allow.

        Raises:
            ValueError: a field is missing, or would be ignored; Cloud TPU's own interface does not
                sell tpu7x (docs.cloud.google.com/tpu/docs/runtimes).
        """
        needs = NEEDS[target]
        for field in ("package", "cluster", "image"):
            value = getattr(self, field)
            if field in needs:
                schema.check(bool(value), f"{target} needs {field}; give --{field}")
            else:
                schema.check(
                    not value, f"{field}={value!r} means nothing to {target}; leave it out"
                )
        schema.check(
            target != "queued-resource" or self.slice.chip.name != "tpu7x",
            f"topology={self.topology!r}: queued resources do not offer tpu7x; use gke or xpk",
        )
        schema.check(
            target == "queued-resource"
            or self.slice.num_slices == 1
            or self.slice.hosts_per_slice > 1,
            f"topology={self.topology!r}: GKE joins only slices of several machines",
        )
