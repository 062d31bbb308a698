"""Evaluation results as a printed table."""

from collections.abc import Sequence

from rich import console, table

from infer.eval.run import Result
from qwen_jax.tasks.estimates import Estimate


def show(results: Sequence[Result]) -> None:
    """Prints a table of metrics with standard errors and 95% intervals, without the groups."""
    grid = table.Table()
    for heading in ("task", "metric", "value", "standard error", "95% interval", "items"):
        grid.add_column(heading, justify="left" if heading in ("task", "metric") else "right")
    for result in results:
        for name, estimate in result.metrics.items():
            grid.add_row(result.task, name, *_cells(estimate), f"{result.count:,}")
    output = console.Console()
    output.print(grid)
    for result in results:
        if result.truncated:
            output.print(
                f"{result.task}: {result.truncated} of {result.count} prompts lost their "
                f"beginning, as the engine's max_length does not hold them"
            )


def _cells(estimate: Estimate) -> tuple[str, str, str]:
    value = f"{estimate.value:.4f}"
    if estimate.interval is None:
        return value, "", ""
    low, high = estimate.interval
    return value, f"{estimate.stderr:.4f}", f"{low:.4f} to {high:.4f}"
