"""Imports in a process of their own, and what is needed to compare their results."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp

from qwen_jax.checkpoint import tensor_table

ROOT = Path(__file__).resolve().parents[4]
CHILD = """
import resource, sys
from qwen_jax.checkpoint.huggingface import importer
hf_dir, out, max_memory, file_limit = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
if file_limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
try:
    planned = importer.import_checkpoint(
        hf_dir, out, max_memory=max_memory or None,
        on_progress=lambda done, total, what: print(done, flush=True),
    )
except (OSError, ValueError) as error:
    sys.exit(f"{type(error).__name__}: {error}")
with open("/proc/self/status") as status:
    print(next(int(s.split()[1]) * 1024 for s in status if s.startswith("VmHWM")))
    print(planned.peak_bytes)
"""


def start_import(hf_dir, out, *, max_memory=0, file_limit=0) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(hf_dir), str(out), str(max_memory), str(file_limit)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def restored(out: Path) -> dict:
    """The parameters by path, as plain Orbax restores them."""
    return tensor_table.flatten(ocp.PyTreeCheckpointer().restore(out.resolve() / "params"))


def assert_same_params(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for path, array in theirs.items():
        assert ours[path].dtype == array.dtype, path
        assert ours[path].shape == array.shape, path
        assert np.asarray(ours[path]).tobytes() == np.asarray(array).tobytes(), path
