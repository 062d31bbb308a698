"""Checkpoints of a run as a table, and what verification found."""

import rich.console
import rich.progress
import rich.table

from qwen_jax.checkpoint import verify


def show_verification(path: str) -> int:
    """Verify with a progress bar, print what was found; the exit code, 0 or 2."""
    bar = rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.DownloadColumn(),
        rich.progress.TimeRemainingColumn(),
    )
    with bar:
        task = bar.add_task("opening", total=None)
        report = verify.verify(
            path,
            on_progress=lambda done, total, what: bar.update(
                task, completed=done, total=total, description=what
            ),
        )
    for problem in report.problems:
        print(problem)
    read = f"{report.num_arrays} arrays, {report.num_bytes / 1e9:.3g} GB read"
    if report.problems:
        print(f"{report.path}: damaged; {read}")
        return 2
    unsummed = report.num_arrays - report.num_summed
    sums = f"; {unsummed} have no recorded sum to compare" if unsummed else ", all as saved"
    print(f"{report.path}: whole; {read}{sums}")
    return 0


def show_steps(output: str) -> int:
    """Print the checkpoints of a run; the exit code, 2 where the newest is not whole."""
    found = verify.steps(output)
    shown = rich.table.Table("step", "GB", "state", "path")
    for step in found:
        shown.add_row(str(step.number), f"{step.num_bytes / 1e9:.3g}", step.state, str(step.path))
    rich.console.Console().print(shown)
    return 0 if found and found[-1].state == "whole" else 2
