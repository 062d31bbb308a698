"""The pages of `docs/` hold together: links, modules of the API reference, cited commits."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*.md")])
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_to_files(name):
    page = ROOT / name
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    inside = [link for link in links if "://" not in link]
    missing = [link for link in inside if not (page.parent / link).exists()]
    assert not missing, f"{name} links to {missing}"


def test_the_reference_names_modules():
    named = [
        name
        for page in (ROOT / "docs/api").glob("*.md")
        for name in re.findall(r"^::: (\S+)$", page.read_text(), re.M)
    ]
    assert len(named) > 50 and len(set(named)) == len(named)
    missing = [name for name in named if not (ROOT / f"{name.replace('.', '/')}.py").is_file()]
    assert not missing, f"docs/api names {missing}"


def test_paths_in_backquotes_are_there():
    """Paths below the packages that a page names; experiments name trees of their own time."""
    folders = "configs|partitioning|qwen_jax|train|infer|tests|benchmarks|docs|examples"
    pattern = rf"`((?:{folders})/[^`\s{{}}*]+)`"
    missing = [
        f"{name}: {path}"
        for name in NAMES
        if not name.startswith(("docs/experiments/", "CHANGELOG"))
        for path in re.findall(pattern, (ROOT / name).read_text())
        if not (ROOT / path).exists()
    ]
    assert not missing, missing


def test_cited_commits_are_in_the_history():
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a clone")
    shallow = subprocess.run(
        ["git", "rev-parse", "--is-shallow-repository"], cwd=ROOT, capture_output=True, text=True
    )
    if shallow.stdout.strip() != "false":
        pytest.skip("a shallow clone lacks the history")
    text = "\n".join(page.read_text() for page in (ROOT / "docs/experiments").glob("*.md"))
    cited = set(re.findall(r"\b(?=[0-9a-f]*\d)[0-9a-f]{7}\b(?<!\d{7})", text))
    assert len(cited) > 10
    for commit in sorted(cited):
        found = subprocess.run(
            ["git", "merge-base", "--is-ancestor", commit, "HEAD"], cwd=ROOT, capture_output=True
        )
        assert found.returncode == 0, f"{commit} is not in the history"
