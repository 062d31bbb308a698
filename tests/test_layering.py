"""Who may import whom: configs <- partitioning <- qwen_jax <- train, infer <- qwen_jax/cli."""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "configs": {"configs"},
    "partitioning": {"configs", "partitioning"},
    "qwen_jax": {"configs", "partitioning", "qwen_jax"},
    "train": {"configs", "partitioning", "qwen_jax", "train"},
    "infer": {"configs", "partitioning", "qwen_jax", "infer"},
}
CLI = "qwen_jax/cli/"
# What every command loads at the start; the rest of the command line is loaded by the command.
START = ("qwen_jax/cli/__init__.py", "qwen_jax/cli/apps.py", "qwen_jax/cli/commands/")
FLAX = {
    "qwen_jax/model/module.py",
    "qwen_jax/model/layers.py",
    "qwen_jax/model/transformer.py",
    "qwen_jax/model/moe.py",
}


@dataclass(frozen=True)
class Import:
    """A module imported at a line; `lazily` is inside a function, or for type checkers only."""

    module: str
    line: int
    lazily: bool

    @property
    def top(self) -> str:
        return self.module.partition(".")[0]


def _imports(source: str) -> Iterator[Import]:
    def walk(node: ast.AST, lazily: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, lazily)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            for alias in node.names:
                yield Import(f"{node.module}.{alias.name}", node.lineno, lazily)
        inside = lazily or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        inside = inside or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        for child in ast.iter_child_nodes(node):
            yield from walk(child, inside)

    return walk(ast.parse(source), False)


def _violations(name: str, source: str) -> list[str]:
    """What the file `name`, a path below the root, imports but may not."""
    package = name.partition("/")[0]
    found = []
    for seen in _imports(source):
        ours = seen.top in ALLOWED
        of_cli = f"{seen.module}.".startswith("qwen_jax.cli.")
        if name.startswith(CLI):
            early = name.startswith(START) and not seen.lazily
            if ours and seen.top != "configs" and not of_cli and early:
                found.append(f"{name}:{seen.line} imports {seen.module} before a command needs it")
            continue
        if ours and seen.top not in ALLOWED[package]:
            found.append(f"{name}:{seen.line} imports {seen.module}: {package} is below {seen.top}")
        if of_cli:
            found.append(f"{name}:{seen.line} imports the command line")
        if seen.top == "flax" and name not in FLAX:
            found.append(f"{name}:{seen.line} imports flax; only {sorted(FLAX)} do")
        if package == "configs" and not ours and seen.top not in sys.stdlib_module_names:
            found.append(f"{name}:{seen.line} imports {seen.module}; configs needs only Python")
        if seen.top in ("torch", "transformers", "tests") and not seen.lazily:
            found.append(f"{name}:{seen.line} imports {seen.module}, which users need not have")
    return found


def _sources() -> list[Path]:
    return [path for package in ALLOWED for path in sorted((ROOT / package).rglob("*.py"))]


def test_every_package_is_walked():
    assert {path.relative_to(ROOT).parts[0] for path in _sources()} == set(ALLOWED)


@pytest.mark.parametrize("path", _sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    found = _violations(path.relative_to(ROOT).as_posix(), path.read_text())
    assert not found, "\n".join(found)


def test_flax_is_used_in_class_statements_only():
    """Outside module.py, `nnx` appears as a base class and nowhere else."""
    for name in sorted(FLAX - {"qwen_jax/model/module.py"}):
        tree = ast.parse((ROOT / name).read_text())
        bases = {id(node) for c in ast.walk(tree) if isinstance(c, ast.ClassDef) for b in c.bases
                 for node in ast.walk(b)}  # fmt: skip
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and node.id in ("nnx", "flax"):
                assert id(node) in bases, f"{name}:{node.lineno} uses {node.id}"


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("configs/x.py", "import numpy"),
        ("configs/x.py", "from partitioning import mesh"),
        ("partitioning/x.py", "def f():\n    from qwen_jax import model"),
        ("qwen_jax/x.py", "import train.core.step"),
        ("qwen_jax/x.py", "from qwen_jax import cli"),
        ("qwen_jax/x.py", "import qwen_jax.cli"),
        ("qwen_jax/x.py", "from flax import nnx"),
        ("qwen_jax/x.py", "import torch"),
        ("train/x.py", "from infer import engine"),
        ("infer/x.py", "from train.losses import language_model"),
        ("infer/x.py", "from qwen_jax.cli import main"),
        ("qwen_jax/cli/commands/x.py", "from train import loop"),
        (
            "qwen_jax/cli/apps.py",
            "try:\n    import qwen_jax.model.transformer\nexcept ImportError:\n    pass",
        ),
    ],
)
def test_the_walk_sees(name, source):
    assert _violations(name, source)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("qwen_jax/cli/x.py", "from configs import schema\nfrom qwen_jax.cli import app"),
        ("qwen_jax/cli/x.py", "def f():\n    from train import loop"),
        ("qwen_jax/cli/x.py", "if TYPE_CHECKING:\n    from infer import generate"),
        ("qwen_jax/x.py", "def f():\n    import torch"),
        ("train/x.py", "from qwen_jax import model\nfrom partitioning import mesh"),
    ],
)
def test_the_walk_lets_through(name, source):
    assert not _violations(name, source)
