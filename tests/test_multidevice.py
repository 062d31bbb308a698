"""Runs tests/multidevice in processes of their own: a process has one number of devices."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(path.name for path in (ROOT / "tests/multidevice").glob("test_*.py"))


@pytest.mark.parametrize(
    ("chosen", "file"),
    [
        *[("not slow", file) for file in FILES],
        pytest.param("slow", "", marks=pytest.mark.slow, id="slow"),
    ],
)
def test_on_eight_devices(chosen, file):
    command = [sys.executable, "-m", "pytest", "-q", "--durations=5", "-m", chosen]
    command.append(f"tests/multidevice/{file}")
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"QWEN_JAX_MULTIDEVICE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
