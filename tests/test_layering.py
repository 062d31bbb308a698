"""The structure of the code: who may import whom, no import cycles, sizes, and names.

Every rule is a function from files (path below the root -> text) to violations, so that a test can
show it a violation beside the test that shows it this repository.
"""

import ast
import collections
import functools
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parent.parent
Files = Mapping[str, str]

ALLOWED = {
    "configs": {"configs"},
    "partitioning": {"configs", "partitioning"},
    "qwen_jax": {"configs", "partitioning", "qwen_jax"},
    "train": {"configs", "partitioning", "qwen_jax", "train"},
    "infer": {"configs", "partitioning", "qwen_jax", "infer"},
}
# Inside qwen_jax each level imports itself and the levels before it; the parts of one level do not
# import each other.
LEVELS = (
    ("storage",),
    ("quant", "text", "launch"),
    ("ops",),
    ("model",),
    ("checkpoint", "decode"),
    ("tasks", "rollout", "analysis"),
    ("cli",),
)
CLI = "qwen_jax/cli/"
# The one file of the command line that imports train and infer, inside functions.
COMPOSE = "qwen_jax/cli/compose.py"
# What every command loads at the start; the rest of the command line is loaded by the command.
START = ("qwen_jax/cli/__init__.py", "qwen_jax/cli/apps.py", "qwen_jax/cli/commands/")
FLAX = {
    "qwen_jax/model/module.py",
    "qwen_jax/model/layers.py",
    "qwen_jax/model/transformer.py",
    "qwen_jax/model/moe.py",
}
MOST_LINES, MOST_FILES = 400, 12
# Names that several files of the five packages have, each with its one meaning.
SHARED_NAMES = {
    "api.py": "what callers of an op import: it chooses the implementation",
    "cluster.py": "processes that find each other: their settings, and the code",
    "engine.py": "the batch engine: its settings, and the engine",
    "gpu.py": "an op's implementation for GPUs",
    "mesh.py": "the device mesh: its settings, and how it is made",
    "optimizer.py": "the optimizer: its settings, and how it is made",
    "pretrain.py": "pre-training: the whole runs by name, and the recipe",
    "reference.py": "an op in plain JAX, which the other implementations must equal",
    "registry.py": "objects by name, and what is needed to find them",
    "remat.py": "rematerialisation: the policies by name, and the policy in the model",
    "sampling.py": "sampling: its settings, and the sampler",
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


@functools.cache
def _imports(source: str) -> tuple[Import, ...]:
    def walk(node: ast.AST, lazily: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, lazily)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            for alias in node.names:
                yield Import(f"{node.module}.{alias.name}", node.lineno, lazily)
        if not isinstance(node, ast.mod | ast.stmt | ast.excepthandler | ast.match_case):
            return  # no import is inside an expression
        inside = lazily or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        inside = inside or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        for child in ast.iter_child_nodes(node):
            yield from walk(child, inside)

    return tuple(walk(ast.parse(source), False))


def _in_packages(files: Files) -> dict[str, str]:
    return {name: text for name, text in files.items() if name.partition("/")[0] in ALLOWED}


def order_of_packages(files: Files) -> list[str]:
    """Imports that go against configs <- partitioning <- qwen_jax <- train, infer <- cli."""
    found = []
    for name, source in _in_packages(files).items():
        package = name.partition("/")[0]
        for seen in _imports(source):
            where = f"{name}:{seen.line} imports {seen.module}"
            ours = seen.top in ALLOWED
            of_cli = f"{seen.module}.".startswith("qwen_jax.cli.")
            if name.startswith(CLI):
                early = name.startswith(START) and not seen.lazily
                if ours and seen.top != "configs" and not of_cli and early:
                    found.append(f"{where} before a command needs it")
                loops = seen.top in ("train", "infer")
                if loops and not (seen.lazily and name.startswith(COMPOSE)):
                    found.append(f"{where}; only {COMPOSE} does, inside functions")
                continue
            if ours and seen.top not in ALLOWED[package]:
                found.append(f"{where}: {package} is below {seen.top}")
            if of_cli:
                found.append(f"{where}, the command line")
            if seen.top == "flax" and name not in FLAX:
                found.append(f"{where}; only {sorted(FLAX)} do")
            if package == "configs" and not ours and seen.top not in sys.stdlib_module_names:
                found.append(f"{where}; configs needs only Python")
            if seen.top in ("torch", "transformers", "tests") and not seen.lazily:
                found.append(f"{where}, which users need not have")
    return found


def order_inside_qwen_jax(files: Files) -> list[str]:
    """Imports of qwen_jax that go against the order of `LEVELS`."""
    level = {part: number for number, parts in enumerate(LEVELS) for part in parts}
    found = []
    for name, source in files.items():
        if not name.startswith("qwen_jax/") or name == "qwen_jax/__init__.py":
            continue
        part = name.split("/")[1].removesuffix(".py")
        if part not in level:
            found.append(f"{name}: {part} has no place in the order inside qwen_jax")
            continue
        for seen in _imports(source):
            if seen.top != "qwen_jax" or seen.module.count(".") == 0:
                continue
            other = seen.module.split(".")[1]
            if other != part and level.get(other, len(LEVELS)) >= level[part]:
                found.append(f"{name}:{seen.line} imports {seen.module}: {other} is above {part}")
    return found


def _graph(files: Files) -> dict[str, set[str]]:
    """The files that each file of the packages imports, lazily or not."""
    packages = _in_packages(files)
    modules = {name.removesuffix(".py").replace("/", "."): name for name in packages}
    modules = {module.removesuffix(".__init__"): name for module, name in modules.items()}
    graph: dict[str, set[str]] = {}
    for name, source in packages.items():
        seen = {one.module for one in _imports(source)}
        targets = (modules.get(m) or modules.get(m.rpartition(".")[0]) for m in seen)
        graph[name] = {target for target in targets if target not in (None, name)}
    return graph


def _cycles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """The sets of nodes that reach each other, each sorted."""

    def reached(start: str) -> set[str]:
        found, pending = set(), [start]
        while pending:
            for node in graph.get(pending.pop(), ()):
                if node not in found:
                    found.add(node)
                    pending.append(node)
        return found

    closure = {node: reached(node) for node in graph}
    cycles = {
        tuple(sorted(n for n in others if node in closure.get(n, ())))
        for node, others in closure.items()
        if node in others
    }
    return sorted(map(list, cycles))


def file_cycles(files: Files) -> list[str]:
    """Files that import each other, lazily or not, directly or through others."""
    return [" ".join(cycle) for cycle in _cycles(_graph(files))]


def folder_cycles(files: Files) -> list[str]:
    """Neighbours in a folder that import each other; a folder is one with all that is in it."""
    graphs: dict[str, dict[str, set[str]]] = collections.defaultdict(
        lambda: collections.defaultdict(set)
    )
    for name, targets in _graph(files).items():
        for target in targets:
            ours, theirs = name.split("/"), target.split("/")
            depth = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
            if depth:  # the packages themselves have an order of their own
                nodes = [
                    "/".join(path[: depth + 1]) + ("/" if len(path) > depth + 1 else "")
                    for path in (ours, theirs)
                ]
                graphs["/".join(ours[:depth])][nodes[0]].add(nodes[1])
    return [
        " ".join(cycle)
        for graph in graphs.values()
        for cycle in _cycles(graph)
        if any(node.endswith("/") for node in cycle)
    ]


def long_files(files: Files) -> list[str]:
    """Python files of more than `MOST_LINES` lines."""
    return [name for name, text in files.items() if len(text.splitlines()) > MOST_LINES]


def full_folders(files: Files) -> list[str]:
    """Folders of the packages with more than `MOST_FILES` Python files, __init__.py included."""
    count = collections.Counter(str(PurePosixPath(name).parent) for name in _in_packages(files))
    return [folder for folder, number in count.items() if number > MOST_FILES]


def shared_names(files: Files) -> list[str]:
    """File names that several files of the packages have, and that mean more than one thing."""
    count = collections.Counter(PurePosixPath(name).name for name in _in_packages(files))
    allowed = {*SHARED_NAMES, "__init__.py"}
    return [name for name, number in count.items() if number > 1 and name not in allowed]


@pytest.fixture(scope="module")
def files() -> Files:
    names = [path for top in (*ALLOWED, "tests", "benchmarks") for path in (ROOT / top).rglob("*")]
    return {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted(names)
        if path.suffix == ".py"
    }


def test_every_package_is_walked(files):
    assert {name.partition("/")[0] for name in files} == {*ALLOWED, "tests", "benchmarks"}
    assert len(_in_packages(files)) > 150


RULES = {
    "import": order_of_packages,
    "order": order_inside_qwen_jax,
    "file cycle": file_cycles,
    "folder cycle": folder_cycles,
    "file size": long_files,
    "folder size": full_folders,
    "name": shared_names,
}


@pytest.mark.parametrize("rule", RULES)
def test_structure(files, rule):
    found = RULES[rule](files)
    assert not found, RULES[rule].__doc__ + "\n" + "\n".join(found)


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
        ("qwen_jax/cli/compose.py", "from train import loop"),
        ("qwen_jax/cli/x.py", "def f():\n    from train import loop"),
        (
            "qwen_jax/cli/apps.py",
            "try:\n    import qwen_jax.model.transformer\nexcept ImportError:\n    pass",
        ),
    ],
)
def test_the_order_of_packages_is_seen(name, source):
    assert order_of_packages({name: source})


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("qwen_jax/cli/x.py", "from configs import schema\nfrom qwen_jax.cli import app"),
        ("qwen_jax/cli/compose.py", "def f():\n    from train import loop"),
        ("qwen_jax/cli/compose.py", "if TYPE_CHECKING:\n    from infer import generate"),
        ("qwen_jax/x.py", "def f():\n    import torch"),
        ("train/x.py", "from qwen_jax import model\nfrom partitioning import mesh"),
    ],
)
def test_the_order_of_packages_lets_through(name, source):
    assert not order_of_packages({name: source})


@pytest.mark.parametrize(
    ("name", "source", "seen"),
    [
        ("qwen_jax/ops/x.py", "from qwen_jax.model import rope", True),
        ("qwen_jax/ops/x.py", "def f():\n    import qwen_jax.decode.weights", True),
        ("qwen_jax/quant/x.py", "from qwen_jax import text", True),  # of one level
        ("qwen_jax/new/x.py", "import math", True),  # has no place
        ("qwen_jax/new.py", "import math", True),
        ("qwen_jax/model/x.py", "from qwen_jax import new", True),
        ("qwen_jax/model/x.py", "from qwen_jax import storage\nfrom qwen_jax.ops import a", False),
        ("qwen_jax/model/x.py", "from qwen_jax.model import rope", False),
        ("train/x.py", "from qwen_jax import decode", False),
    ],
)
def test_the_order_inside_qwen_jax_is_seen(name, source, seen):
    assert bool(order_inside_qwen_jax({name: source})) == seen


def test_file_cycles_are_seen():
    lazily = "def f():\n    from train.core import {}"
    files = {
        "train/core/a.py": "from train.core import b",
        "train/core/b.py": lazily.format("c"),
        "train/core/c.py": "if TYPE_CHECKING:\n    from train.core.a import A",
        "train/core/d.py": "from train.core import a, b, c",
    }
    assert file_cycles(files) == ["train/core/a.py train/core/b.py train/core/c.py"]
    del files["train/core/c.py"]
    assert file_cycles(files) == []


def test_folder_cycles_are_seen():
    files = {
        "infer/left/a.py": "from infer.right import b",
        "infer/left/c.py": "",
        "infer/right/b.py": "",
        "infer/right/d.py": "from infer.left.c import C",
        "infer/right/deep/e.py": "from infer.right import b",
    }
    assert file_cycles(files) == []
    assert folder_cycles(files) == ["infer/left/ infer/right/"]
    files["infer/right/d.py"] = "from infer.right.deep import e"
    assert folder_cycles(files) == []
    files["infer/right/b.py"] = "from infer.right import f"
    files["infer/right/f.py"] = "from infer.right.deep import g"
    files["infer/right/deep/g.py"] = ""
    assert file_cycles(files) == []
    assert folder_cycles(files) == ["infer/right/b.py infer/right/deep/ infer/right/f.py"]


def test_sizes_are_seen():
    files = {f"train/core/f{i}.py": "x = 1\n" for i in range(MOST_FILES)}
    files["tests/long.py"] = "x = 1\n" * MOST_LINES
    assert full_folders(files) == [] and long_files(files) == []
    files["train/core/__init__.py"] = ""
    files["tests/long.py"] += "x = 1\n"
    assert full_folders(files) == ["train/core"]
    assert long_files(files) == ["tests/long.py"]


def test_shared_names_are_seen():
    files = {"train/a/plan.py": "", "infer/plan.py": "", "tests/plan.py": "", "infer/once.py": ""}
    files |= {"train/__init__.py": "", "infer/__init__.py": ""}
    files |= {"configs/mesh.py": "", "partitioning/mesh.py": ""}
    assert shared_names(files) == ["plan.py"]
