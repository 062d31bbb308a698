"""Shows a conversion on the terminal: the plan first, then a progress bar."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rich import console, progress

from qwen_jax.checkpoint import block_plan


@dataclass(frozen=True, kw_only=True)
class Callbacks:
    """The callbacks that `import_checkpoint` and `export_checkpoint` take under the same names."""

    on_plan: Callable[[block_plan.Plan], None]
    on_progress: block_plan.Progress


@contextlib.contextmanager
def progress_bar(out: console.Console | None = None) -> Iterator[Callbacks]:
    """Callbacks that print the plan and keep a bar of bytes, speed and time left."""
    bar = progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
        console=out,
    )
    with bar:
        task = bar.add_task("reading headers", total=None)

        def on_plan(planned: block_plan.Plan) -> None:
            bar.console.print(str(planned), markup=False, highlight=False)
            bar.update(task, total=planned.total_bytes, completed=planned.done_bytes)

        def on_progress(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total, description=what)

        yield Callbacks(on_plan=on_plan, on_progress=on_progress)
