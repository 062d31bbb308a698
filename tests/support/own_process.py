"""Tests that need a process of their own, since jax reads some settings once in a process."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_pytest(*arguments: str, setting: str) -> int:
    """Number of tests that passed in a pytest of its own, with the environment variable `setting`
    set; at least one failure fails the caller."""
    command = [sys.executable, "-m", "pytest", "-q", "--durations=5", *arguments]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {setting: "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    return int(re.search(r"(\d+) passed", done.stdout)[1])
