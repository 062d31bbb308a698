"""Convert a Hugging Face folder to a native checkpoint and back, and compare every tensor.

    python examples/convert_both_ways.py --model Qwen2.5-0.5B-Instruct

A native checkpoint is what training writes and what loads straight into shardings. The conversion
streams slices of tensors, so its memory is bounded whatever the model's size.
"""

from pathlib import Path

import safetensors
import tiny_model

from qwen_jax.checkpoint import verify
from qwen_jax.checkpoint.huggingface import exporter, importer


def tensors(folder: Path) -> dict[str, bytes]:
    """Bytes of every tensor of a Hugging Face folder, by name."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= {name: bytes(value["data"]) for name, value in safetensors.deserialize(
            file.read_bytes())}  # fmt: skip
    return found


def main(folder: Path, model: Path) -> None:
    """Imports `model`, verifies the result, exports it, and raises where a tensor differs."""
    native, exported = folder / "native", folder / "exported"
    # Bytes that the process may use, with all that it holds already.
    plan = importer.import_checkpoint(model, native, max_memory=12 * 10**9)
    print(f"import: {plan.peak_bytes / 2**20:.0f} MiB planned at most")

    report = verify.verify(native, on_progress=lambda done, total, name: None)
    print(f"verify: {len(report.problems)} problems")

    exporter.export_checkpoint(native, exported)
    before, after = tensors(model), tensors(exported)
    if before != after:
        raise SystemExit(f"tensors differ: {sorted(set(before) ^ set(after)) or 'their bytes'}")
    print(f"export: {len(after)} tensors, every byte as it was")


if __name__ == "__main__":
    given = tiny_model.arguments(__doc__)
    main(given.folder / "convert", given.model)
