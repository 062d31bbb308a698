"""Runs tests/multidevice in a process of its own: a process has one number of devices."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("chosen", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_on_eight_devices(chosen):
    command = [sys.executable, "-m", "pytest", "-q", "--durations=5", "-m", chosen]
    command.append("tests/multidevice")
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
