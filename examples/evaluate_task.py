"""Evaluate a model on a benchmark from files: ask, grade, and sum up with standard errors.

    python examples/evaluate_task.py --model Qwen2.5-0.5B-Instruct

The files have GSM8K's form; put the real ones in their place (`gsm8k=FOLDER` with test.jsonl and
train.jsonl). In a shell: `qwen-jax evaluate gsm8k=FOLDER --model MODEL --output RESULTS`.
"""

import json
from pathlib import Path

import batch_answers
import tiny_model

from configs.sampling import SamplingParams
from infer.eval import results_table, run
from infer.eval.service_backend import ServiceBackend
from infer.text import loading
from qwen_jax.tasks import registry

PROBLEMS = [
    ("Ann has 3 apples and buys 4 more. How many has she?", "3 + 4 = 7\n#### 7"),
    ("A box holds 6 eggs. How many eggs are in 5 boxes?", "6 * 5 = 30\n#### 30"),
    ("Tom reads 20 of 50 pages. How many are left?", "50 - 20 = 30\n#### 30"),
]


def write_problems(folder: Path) -> None:
    """Files as GSM8K has them: worked examples in train.jsonl, questions in test.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps({"question": question, "answer": answer}) for question, answer in PROBLEMS]
    (folder / "train.jsonl").write_text(rows[0] + "\n")
    (folder / "test.jsonl").write_text("\n".join(rows[1:]) + "\n")


def main(folder: Path, model: Path) -> run.Result:
    """The result of the task; answers and metrics are kept below `folder` and reused."""
    write_problems(folder / "gsm8k")
    options = registry.Options(style="plain", num_shots=1, max_tokens=32)
    task = registry.load(f"gsm8k={folder / 'gsm8k'}", options=options)
    service = loading.load(model, settings=batch_answers.ENGINE, sampling={}, dtype="float32")
    backend = ServiceBackend(service, max_length=256, num_open=8)
    result = run.run(
        backend,
        task,
        folder / "results",
        sampling=SamplingParams(temperature=0.0),
        subject={"model": str(model), "dtype": "float32"},
    )
    results_table.show([result])
    return result


if __name__ == "__main__":
    given = tiny_model.arguments(__doc__)
    main(given.folder / "evaluate", given.model)
