"""The terminal shows the plan before the bar ends full."""

import io

from rich import console as rich_console

from qwen_jax.checkpoint.huggingface import exporter, importer
from qwen_jax.cli import conversion_progress
from tests.qwen_jax.checkpoint import conftest as folders


def test_plan_and_bar(tmp_path):
    folder = folders.make(tmp_path / "hf")
    for function, source, target in (
        (importer.import_checkpoint, "hf", "native"),
        (exporter.export_checkpoint, "native", "back"),
    ):
        text = io.StringIO()
        out = rich_console.Console(file=text, width=200, force_terminal=False)
        with conversion_progress.progress_bar(out) as shown:
            function(
                tmp_path / source, tmp_path / target,
                on_plan=shown.on_plan, on_progress=shown.on_progress,
            )  # fmt: skip
        tensors = len(folders.tensors(folder))
        assert f"{tmp_path / target}: {tensors} tensors, 0.00 GB; planned peak" in text.getvalue()
        done, total = text.getvalue().split("━ ")[-1].split()[0].split("/")
        assert done == total
