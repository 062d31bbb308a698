"""The command line: what it prints, what it refuses, and its exit codes."""

import json

import pytest
import tyro

from configs.models import huggingface, qwen2_5
from configs.recipes import registry as recipes
from configs.train import TrainConfig
from qwen_jax import cli
from qwen_jax.cli import apps
from qwen_jax.cli.commands import files


def run(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["qwen-jax", *arguments])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    said = capsys.readouterr()
    return stopped.value.code, said.out, said.err


def test_models_lists_every_preset_with_its_tensor_sizes(monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, "models")
    assert code == 0
    rows = {line.split("│")[1].strip(): line for line in out.splitlines() if "│" in line}
    assert set(qwen2_5.PRESETS) <= set(rows)
    assert "72.706 B" in rows["qwen2.5-72b"] and "1, 2, 4, 8" in rows["qwen2.5-72b"]


def test_shardings_says_what_one_device_holds(monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, "shardings", "qwen2.5-7b", "--mesh", "fsdp=4,tensor=2")
    assert code == 0
    assert "28x896x9472" in out  # mlp.up: 3584 / 4 by 18944 / 2
    assert "of 7.616 B parameters" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("shardings", "qwen2.5-9b", "--mesh", "fsdp=2"), "unknown model 'qwen2.5-9b'"),
        (("shardings", "qwen2.5-7b", "--mesh", "tensor=3"), "num_attention_heads=28"),
        (("shardings", "qwen2.5-7b", "--mesh", "fsdp=-1"), "name its size"),
        (("convert", "import", "nowhere", "out"), "nowhere"),
        (("convert", "import", "nowhere", "out", "--max-memory", "lots"), "'lots' is not a size"),
        (("generate", "hi", "--model", "nowhere"), "nowhere"),
        (("batch", "in", "out", "--model", "nowhere", "--share", "2"), "share '2'"),
        (("batch", "in", "out", "--model", "m", "--draft", "d"), "speculation='draft'"),
        (("merge", "in.jsonl", "out.jsonl", "--shares", "2"), "in.jsonl"),
        (("train", "quickstart", "--output", "x"), "data.paths is empty"),
    ],
)
def test_a_users_error_is_one_line_and_code_2(monkeypatch, capsys, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(monkeypatch, capsys, *arguments)
    assert code == 2
    assert err.startswith("qwen-jax: ") and message in err and "Traceback" not in err


def test_an_unknown_flag_is_refused(monkeypatch, capsys):
    code, _, err = run(monkeypatch, capsys, "train", "quickstart", "--data.bogus", "3")
    assert code == 2 and "--data.bogus" in err


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_recipe_explains_its_flags(monkeypatch, capsys, name):
    code, out, _ = run(monkeypatch, capsys, "train", name, "--help")
    assert code == 0
    assert "--optimizer.peak-learning-rate" in out and "--data.paths" in out


def test_a_model_may_be_a_config_file(tmp_path):
    path = tmp_path / "mine" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(huggingface.write_model(qwen2_5.tiny())))
    parsed = tyro.cli(TrainConfig, args=["--model", str(path)], registry=apps.registry())
    assert parsed.model.hidden_size == qwen2_5.tiny().hidden_size
    assert parsed.model.name == "mine"


@pytest.mark.parametrize(
    ("text", "size"),
    [(None, None), ("2GB", 2 * 10**9), ("1500MiB", 1500 * 2**20), ("1.5k", 1500), ("77", 77)],
)
def test_sizes(text, size):
    assert files._bytes(text) == size


LAUNCH = ("launch", "gke", "--name", "run", "--project", "my-project", "--zone", "us-east5-a",
          "--output", "gs://bucket/run", "--cluster", "c", "--image", "i")  # fmt: skip
DATA = "pretrain-7b --data.paths /data/text.jsonl --data.tokenizer gs://bucket/tok"


def test_launch_writes_files_and_says_what_they_rent(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    run_this = (*LAUNCH, "--topology", "2xv5e-256", "--train", DATA + " --mesh.fsdp=-1")
    code, out, _ = run(monkeypatch, capsys, *run_this)
    assert code == 0
    assert "512 v5e chips" in out and "128 machines" in out
    assert sorted(path.name for path in (tmp_path / "launch/run").iterdir()) == [
        "jobset.yaml",
        "node_pools.sh",
    ]


@pytest.mark.parametrize(
    ("topology", "train", "message"),
    [
        ("v5e-250", "pretrain-7b", "v5e-128 and v5e-256"),
        ("v5e-256", "pretrain-9b", "unknown recipe 'pretrain-9b'"),
        ("v5e-256", "pretrain-7b --bogus 3", "--bogus"),
        ("v5e-256", "pretrain-7b", "data.paths is empty"),
        ("v5e-256", DATA.replace("/data", "gs://bucket"), "text is read from disks"),
    ],
)
def test_launch_refuses_before_it_writes(monkeypatch, capsys, tmp_path, topology, train, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(monkeypatch, capsys, *LAUNCH, "--topology", topology, "--train", train)
    assert code == 2 and message in err
    assert not list(tmp_path.iterdir())
