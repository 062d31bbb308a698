"""Small files in the formats that the benchmarks are published in."""

import csv
import gzip
import io
import json
import zipfile
from pathlib import Path

PROBLEMS = [
    {"question": "Ann has 3 pens and buys 4. How many?", "answer": "3+4=<<3+4=7>>7\n#### 7"},
    {"question": "A car costs $1,200 and a van twice that?", "answer": "2*1200\n#### 2,400"},
    {"question": "It falls from 2 to -3. What is it now?", "answer": "So -3.\n#### -3"},
]
HUMANEVAL = [
    {
        "task_id": "HumanEval/0",
        "prompt": 'def double(x: int) -> int:\n    """Twice x."""\n',
        "entry_point": "double",
        "canonical_solution": "    return 2 * x\n",
        "test": "\n\ndef check(candidate):\n    assert candidate(2) == 4 and candidate(0) == 0\n",
    },
    {
        "task_id": "HumanEval/1",
        "prompt": "import math\n\n\ndef root(x: float) -> float:\n",
        "entry_point": "root",
        "canonical_solution": "    return math.sqrt(x)\n",
        "test": "\n\ndef check(candidate):\n    assert candidate(9.0) == 3.0\n",
    },
]
IFEVAL = [
    {
        "key": 1,
        "prompt": "Write without commas. Twice the word tree.",
        "instruction_id_list": ["punctuation:no_comma", "keywords:frequency"],
        "kwargs": [{}, {"keyword": "tree", "frequency": 2, "relation": "at least"}],
    },
    {
        "key": 7,
        "prompt": "A title please.",
        "instruction_id_list": ["detectable_format:title"],
        "kwargs": [{"relation": None}],
    },
]


def mbpp(count: int = 14) -> list[dict]:
    return [
        {
            "task_id": i,
            "text": f"Write a function that adds {i}.",
            "code": f"def add(x):\r\n    return x + {i}",
            "test_setup_code": "two = add(2)" if i == 12 else "",
            "test_list": [f"assert add({n}) == {n + i}" for n in range(3)]
            + ["assert two == 14"] * (i == 12),
            "challenge_test_list": [],
        }
        for i in range(1, count + 1)
    ]


def write_lines(path: Path, records: list[dict]) -> Path:
    text = "".join(json.dumps(record) + "\n" for record in records)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def gsm8k(folder: Path) -> Path:
    write_lines(folder / "test.jsonl", PROBLEMS)
    write_lines(folder / "train.jsonl", [*reversed(PROBLEMS)])
    return folder


MMLU = {
    "dev/high_school_physics_dev.csv": [
        ["What falls?", "up", "a stone", "light, mostly", 'the "sky"', "B"],
        ["What is c?", "a letter", "fast", "slow", "late", "B"],
    ],
    "test/high_school_physics_test.csv": [
        ["Which of\nthese two?", "one", "two", "three", "four", "C"],
        [" Hm? ", "1", "2", "3", "4", "A"],
    ],
    "dev/law_dev.csv": [["Who?", "w", "x", "y", "z", "D"], ["Why?", "w", "x", "y", "z", "A"]],
    "test/law_test.csv": [["When?", "now", "then", "soon", "never", "D"]],
    "val/law_val.csv": [["Not read", "a", "b", "c", "d", "A"]],
}


def mmlu_zip(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, rows in MMLU.items():
            archive.writestr(f"data/{name}", _table(rows))
    return path


def mmlu_folder(folder: Path) -> Path:
    for name, rows in MMLU.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(_table(rows), encoding="utf-8")
    return folder


def _table(rows: list[list[str]]) -> str:
    out = io.StringIO(newline="")
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue()
