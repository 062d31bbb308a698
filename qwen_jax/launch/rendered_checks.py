"""Checks of rendered launch files, read as their tools would, against the slice.

No account and no network: shell syntax through `bash -n`, options against those that the tools
know, YAML parsed, and everything that counts chips multiplied out.
"""

import re
import shutil
import subprocess
from collections.abc import Mapping

import yaml

from configs.hardware import launch, topologies

# Options that `COMMAND --help` of Google Cloud SDK 528.0.0 lists (cloud.google.com/sdk/gcloud/
# reference), and that xpk of June 2026 declares (its src/xpk/parser), of those that we may use.
_EVERYWHERE = ("--project", "--quiet", "--format")
OPTIONS: Mapping[str, tuple[str, ...]] = {
    "gcloud compute tpus queued-resources create": (
        *("--zone", "--accelerator-type", "--type", "--topology", "--runtime-version"),
        *("--node-id", "--node-count", "--node-prefix", "--spot", "--scopes"),
        *("--metadata-from-file", "--valid-until-duration", "--service-account"),
    ),
    "gcloud compute tpus queued-resources delete": ("--zone", "--force"),
    "gcloud compute tpus queued-resources describe": ("--zone",),
    "gcloud compute tpus tpu-vm ssh": ("--zone", "--worker", "--command"),
    "gcloud alpha compute tpus queued-resources ssh": (
        *("--zone", "--worker", "--node", "--command"),
    ),
    "gcloud compute resource-policies create workload-policy": (
        *("--region", "--type", "--accelerator-topology"),
    ),
    "gcloud container node-pools create": (
        *("--cluster", "--location", "--node-locations", "--machine-type", "--tpu-topology"),
        *("--placement-policy", "--num-nodes", "--spot", "--scopes"),
    ),
    "gcloud storage cat": (),
    "gcloud storage cp": (),
    "xpk workload create": (
        *("--workload", "--cluster", "--zone", "--tpu-type", "--num-slices", "--docker-image"),
        *("--spot", "--on-demand", "--max-restarts", "--restart-on-exit-codes", "--env"),
        *("--termination-grace-period-seconds", "--command"),
    ),
}

_ACTIONS = {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"}


def check(files: Mapping[str, str], job: launch.LaunchConfig) -> None:
    """Checks the files that `render` made for `job`.

    Raises:
        ValueError: names the file and what is wrong with it.
    """
    for name, text in files.items():
        if name.endswith(".sh"):
            _check_shell(name, text)
            _check_options(name, text)
    if "create.sh" in files:
        _check_queued(files["create.sh"], job.slice)
    if "node_pools.sh" in files:
        _check_pools(files["node_pools.sh"], job.slice)
    if "workload.sh" in files:
        _check_workload(files["workload.sh"], job.slice)
    if "jobset.yaml" in files:
        check_jobset(files["jobset.yaml"], job.slice)


def _check_shell(name: str, text: str) -> None:
    bash = shutil.which("bash")
    _check(bash is not None, f"{name}: bash is not installed, and it is what runs the file")
    done = subprocess.run([bash, "-n"], input=text, capture_output=True, text=True, check=False)
    _check(done.returncode == 0, f"{name}: {done.stderr.strip()}")


def commands(text: str) -> list[tuple[str, list[str]]]:
    """Pairs (command, options) of every gcloud and xpk command, without quoted text."""
    joined = re.sub(r"\\\n\s*", " ", text)
    found = []
    for line in joined.splitlines():
        if line.lstrip().startswith(("#", "echo")):
            continue
        plain = re.sub(r"'[^']*'|\"[^\"]*\"", "", line)
        for match in re.finditer(r"\b(?:gcloud|xpk)(?: [a-z][a-z-]*)+", plain):
            rest = re.split(r"\|\||;|\)", plain[match.end() :])[0]
            found.append((match[0], re.findall(r"(?<=\s)--[a-z][a-z-]*", rest)))
    return found


def _check_options(name: str, text: str) -> None:
    for command, given in commands(text):
        known = [key for key in OPTIONS if command == key or command.startswith(f"{key} ")]
        _check(bool(known), f"{name}: unknown command {command!r}")
        unknown = set(given) - set(OPTIONS[known[0]]) - set(_EVERYWHERE)
        _check(not unknown, f"{name}: {known[0]} has no option {', '.join(sorted(unknown))}")


def _option(text: str, name: str, default: str = "") -> str:
    found = re.search(rf"(?<=\s)--{name}=(\S+)", text)
    return found[1] if found else default


def _check_queued(text: str, part: topologies.Slice) -> None:
    nodes = int(_option(text, "node-count", "1"))
    if shape := _option(text, "topology"):
        rented = topologies.parse(f"{_option(text, 'type')}:{shape}")
    else:
        rented = topologies.parse(_option(text, "accelerator-type"))
    _check_chips("create.sh", nodes * rented.num_chips, part)


def _check_workload(text: str, part: topologies.Slice) -> None:
    kind = re.sub(r"-(\d+x[\dx]+)$", r":\1", _option(text, "tpu-type"))
    rented = topologies.parse(kind.replace("v5litepod:", "v5e:"))
    _check_chips("workload.sh", int(_option(text, "num-slices")) * rented.num_chips, part)


def _check_pools(text: str, part: topologies.Slice) -> None:
    pools = text.split("gcloud container node-pools create")[1:]
    chips = 0
    for pool in pools:
        per_machine = re.search(r"-(\d+)t$", _option(pool, "machine-type"))
        _check(per_machine is not None, "node_pools.sh: --machine-type has no number of chips")
        chips += int(_option(pool, "num-nodes")) * int(per_machine[1])
    _check_chips("node_pools.sh", chips, part)
    for shape in re.findall(r"--(?:tpu|accelerator)-topology=(\S+)", text):
        _check_shape("node_pools.sh", shape, part)


def check_jobset(text: str, part: topologies.Slice) -> None:
    """Checks the fields of JobSet as its CRD would, and chips = slices x machines x chips of one.

    Source: github.com/kubernetes-sigs/jobset, api/jobset/v1alpha2/jobset_types.go, 0.10. Its pod
    template is an ordinary batch/v1 Job; the tests hold that against Kubernetes' own schema.
    """
    try:
        manifest = yaml.safe_load(text)
        spec = manifest["spec"]
        (group,) = spec["replicatedJobs"]
        job = group["template"]["spec"]
        pod = job["template"]["spec"]
        (container,) = pod["containers"]
        chips = container["resources"]["limits"]["google.com/tpu"]
        shape = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"jobset.yaml: not a JobSet of one container: {error!r}") from error
    kind = (manifest["apiVersion"], manifest["kind"])
    _check(kind == ("jobset.x-k8s.io/v1alpha2", "JobSet"), f"jobset.yaml: is {kind}")
    for rule in spec["failurePolicy"]["rules"]:
        _check(rule["action"] in _ACTIONS, f"jobset.yaml: unknown action {rule['action']!r}")
    _check(
        job["completions"] == job["parallelism"],
        "jobset.yaml: completions and parallelism differ; every machine must run at once",
    )
    _check(
        pod["restartPolicy"] == "Never" and job["backoffLimit"] == 0,
        "jobset.yaml: podFailurePolicy needs restartPolicy Never, a lost process backoffLimit 0",
    )
    _check(
        chips == container["resources"]["requests"]["google.com/tpu"],
        "jobset.yaml: requests and limits of google.com/tpu differ",
    )
    _check_chips("jobset.yaml", group["replicas"] * job["completions"] * chips, part)
    _check_shape("jobset.yaml", shape, part)


def _check_chips(name: str, chips: int, part: topologies.Slice) -> None:
    _check(chips == part.num_chips, f"{name}: rents {chips} chips; {part.name} is {part.num_chips}")


def _check_shape(name: str, shape: str, part: topologies.Slice) -> None:
    sides = tuple(map(int, shape.split("x")))
    _check(
        sides == part.shape,
        f"{name}: topology {shape}; {part.name} is {part.shape_name}",
    )


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
