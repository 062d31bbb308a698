"""`qwen-jax evaluate` and `lm-eval`: what they refuse at once, and a whole run on a tiny model."""

import json

import pytest

from qwen_jax import cli
from tests.qwen_jax.tasks import samples


def run(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["qwen-jax", *arguments])
    with pytest.raises(SystemExit) as left:
        cli.main()
    said = capsys.readouterr()
    return left.value.code or 0, said.out, said.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name at least one task"),
        (["gsm8k"], "'gsm8k' must be NAME=PATH with a name of gsm8k, mmlu"),
        (["arc=x"], "'arc=x' must be NAME=PATH"),
        (["gsm8k={folder}", "--answers", "2", "--temperature", "1"], "gsm8k takes one answer"),
        (["humaneval=x", "--answers", "2"], "answers=2 to a problem would all be the same"),
        (["humaneval=x", "--programs.seconds", "0"], "seconds=0"),
        (["humaneval={folder}"], "holds none of HumanEval.jsonl.gz"),
        (["ifeval={folder}", "--shots", "1"], "ifeval is asked without worked examples"),
        (["gsm8k={folder}", "--shots", "9"], "num_shots=9 but train.jsonl has 3"),
        (["gsm8k={folder}"], "nowhere"),  # all is well but the model
    ],
)
def test_errors_come_before_the_model_is_read(monkeypatch, capsys, tmp_path, arguments, message):
    samples.gsm8k(tmp_path)
    given = [text.format(folder=tmp_path) for text in arguments]
    if "--shots" not in given:
        given += ["--shots", "0"] if message == "nowhere" else []
    code, _, err = run(
        monkeypatch, capsys, "evaluate", *given, "--model", str(tmp_path / "nowhere"),
        "--output", str(tmp_path / "out"),
    )  # fmt: skip
    assert code == 2 and message in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


ENGINE = (
    "--engine.num-slots=4", "--engine.page-size=16", "--engine.num-pages=128",
    "--engine.prefill-chunk=256", "--engine.prefill-tokens=256", "--engine.buckets=one",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of lm-evaluation-harness and its libraries
def test_a_whole_run(monkeypatch, capsys, tmp_path, model_folder, task_folder):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    model = ("--model", str(model_folder), "--dtype=float32", *ENGINE)
    samples.write_lines(tmp_path / "HumanEval.jsonl", samples.HUMANEVAL)
    tasks = (
        f"gsm8k={samples.gsm8k(tmp_path)}",
        f"mmlu={samples.mmlu_zip(tmp_path / 'mmlu.zip')}",
        f"humaneval={tmp_path}",
    )
    arguments = ("evaluate", *tasks, "--shots=0", "--max-tokens=16", *model)
    code, said, _ = run(monkeypatch, capsys, *arguments, "--output", str(tmp_path / "out"))
    assert code == 0
    assert [name in said for name in ("strict", "flexible", "accuracy", "pass@1")] == [True] * 4
    kept = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert len(kept) == 6
    code, again, _ = run(monkeypatch, capsys, *arguments, "--output", str(tmp_path / "out"))
    assert again.splitlines()[-8:] == said.splitlines()[-8:]
    assert kept == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    code, said, err = run(
        monkeypatch, capsys, "lm-eval", "local_choice", "--include-path", str(task_folder), *model,
        "--output", str(tmp_path / "harness.json"),
    )  # fmt: skip
    assert code == 0, err
    found = json.loads((tmp_path / "harness.json").read_text())
    assert 0 <= found["results"]["local_choice"]["acc,none"] <= 1
    assert found["subject"] == {"model": str(model_folder), "dtype": "float32"}
