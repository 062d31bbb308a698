"""What the wheel holds: the five packages, whole, and nothing else."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("configs", "partitioning", "qwen_jax", "train", "infer")


@pytest.fixture(scope="module")
def names(tmp_path_factory) -> list[str]:
    """The files of a wheel built from a copy: setuptools leaves its build folder behind."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in (*PACKAGES, "tests"):
        leave = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, copy / name, ignore=leave)
    shutil.copy(ROOT / "pyproject.toml", copy)
    (copy / "README.md").write_text("The readme is not what is tested.\n")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation",
               "--no-index", "--quiet", "--wheel-dir", str(out), str(copy)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = out.glob("qwen_jax-*.whl")
    return zipfile.ZipFile(wheel).namelist()


@pytest.mark.takes(30, "builds the wheel for the tests below")
def test_wheel_holds_the_five_packages_and_nothing_else(names):
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(PACKAGES)


def test_wheel_holds_every_source_file(names):
    sources = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert sources == {name for name in names if ".dist-info/" not in name}


def test_wheel_has_the_console_script(names):
    assert any(name.endswith(".dist-info/entry_points.txt") for name in names)
