"""Runs in processes of their own, one or several that train together, on this machine."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from configs import schema
from configs.cluster import ClusterConfig
from configs.train import TrainConfig

ROOT = Path(__file__).parents[2]
MEASURED = ("tokens_per_second", "tflops_causal", "tflops_full")

PROGRAM = """
import dataclasses, json, sys
from configs.models import architecture
from configs.train import TrainConfig
from partitioning.processes import cluster
from partitioning.processes import watch
from train.recipes import pretrain
values = json.loads(sys.argv[1])
plain = TrainConfig()
for name, value in values.items():
    kind = type(getattr(plain, name))
    if dataclasses.is_dataclass(kind):
        fields = {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()}
        values[name] = kind(**fields)
values["model"] = architecture.model_from_dict(values["model"])
config = TrainConfig(**values)
try:
    with cluster.joined(config.cluster):
        code = pretrain.run(config).exit_code
except watch.Lost as error:  # as the command line does
    code = error.exit_code
    print(error)
sys.exit(code)
"""


def start(
    config: TrainConfig,
    cache: Path,
    *,
    log: Path | None = None,
    program: str = PROGRAM,
    **variables,
) -> subprocess.Popen:
    """One process that trains; what it says goes behind what is in `log`."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        # Of several processes only the first one finds what it compiled before.
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false",
        **variables,
    }
    text = json.dumps(schema.to_dict(config))
    with (log or Path(f"{config.output}.log")).open("ab") as stream:
        return subprocess.Popen(
            [sys.executable, "-c", program, text],
            cwd=ROOT, env=environment, stdout=stream, stderr=stream,
        )  # fmt: skip


def metrics(output: Path | str) -> list[dict]:
    """metrics.jsonl without what a clock measured."""
    rows = [json.loads(row) for row in Path(output, "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in rows]


def last_step(folder: Path) -> int:
    """The step of the last whole line of metrics.jsonl; 0 before there is one."""
    path = folder / "metrics.jsonl"
    rows = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole = [row for row in rows if row.endswith("\n")]
    return json.loads(whole[-1])["step"] if whole else 0


class Group:
    """Processes that train together; `logs` holds what each one says."""

    def __init__(
        self, config: TrainConfig, cache: Path, count: int,
        *, leave_out=(), change=None, logs: Path | None = None, **cluster,
    ):  # fmt: skip
        change = change or {}  # of settings, by process
        port = free_port()
        self.config = config
        folder = logs or Path(f"{config.output}.logs")
        folder.mkdir(exist_ok=True)
        self.logs = [folder / f"{port}-{n}.log" for n in range(count)]
        settings = {
            "launch": "explicit", "coordinator": f"127.0.0.1:{port}", "num_processes": count,
            "start_seconds": 60, "silence_seconds": 20, "stall_seconds": 120,
        } | cluster  # fmt: skip
        self.processes = {
            n: start(
                dataclasses.replace(
                    config,
                    cluster=ClusterConfig(process_id=n, **settings),
                    **change.get(n, {}),
                ),
                cache, log=self.logs[n],
            )
            for n in range(count)
            if n not in leave_out
        }  # fmt: skip

    def wait(self, seconds: float = 120) -> dict[int, int]:
        """The exit codes of all; a process that still runs then is killed and fails the test."""
        deadline = time.monotonic() + seconds
        try:
            return {
                n: process.wait(max(deadline - time.monotonic(), 0.1))
                for n, process in self.processes.items()
            }
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running:\n{self.said()}") from None
        finally:
            for process in self.processes.values():
                process.kill()

    def reach(self, step: int) -> None:
        """Wait until the run has done `step`."""
        while last_step(Path(self.config.output)) < step:
            assert all(p.poll() is None for p in self.processes.values()), self.said()
            time.sleep(0.01)

    def said(self) -> str:
        return "\n".join(f"--- {log.name}\n{log.read_text()}" for log in self.logs if log.exists())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
