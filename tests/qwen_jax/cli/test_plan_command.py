"""`qwen-jax plan` as a person uses it: what it prints, draws and refuses."""

import re

import pytest

from qwen_jax import cli
from qwen_jax.analysis.plan import memory


def run(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    return run_qwen_jax(monkeypatch, capsys, "plan", *arguments)


def run_qwen_jax(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["qwen-jax", *arguments])
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    said = capsys.readouterr()
    return stopped.value.code, said.out, said.err


def test_a_newcomer_learns_what_to_rent_and_why(monkeypatch, capsys):
    asked = ("--model", "qwen2.5-32b", "--recipe", "finetune", "--length", "32768")
    code, out, _ = run(monkeypatch, capsys, *asked)
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == "qwen2.5-32b, training, 32,768 tokens a row, recipe finetune"
    name = re.match(r"Rent (\S+) \(\d+ chip\(s\)", lines[1])[1]
    for start in ("Memory: ", "Smaller does not do: ", "Speed: ", "Prices are not known here"):
        assert sum(line.startswith(start) for line in lines) == 1
    assert "what binds: arithmetic" in out
    # The alternatives, of every chip, and the two commands that come next.
    for chip in ("v5e-", "v6e-", "v5p-", "h100-8", "h200-8"):
        assert any(chip in line for line in lines[8:])
    assert f"--topology {name} --length 32768 --recipe finetune" in out
    (command,) = re.findall(r"^Train with: qwen-jax (train finetune .*)$", out, re.MULTILINE)
    assert "--batch-size 32 " in command  # the recipe's
    # Every flag of it is understood: only the data is missing.
    code, _, err = run_qwen_jax(monkeypatch, capsys, *command.split(), "--output", "never-made")
    assert code == 2 and "data.paths is empty" in err


def test_one_slice_in_detail(monkeypatch, capsys):
    asked = ("--model", "qwen2.5-72b", "--topology", "v5p-128")
    code, out, _ = run(monkeypatch, capsys, *asked)
    assert code == 0
    assert "on v5p-128: 64 chip(s) of v5p (4x4x4), 64 device(s), 16 machine(s)" in out
    assert "Recommended: mesh fsdp=64, remat minimal, batch 64 = 1 row(s) on each of 64" in out
    for kind in ("parameters", "optimizer moments", "activations kept", "gradients"):
        assert re.search(rf"^{kind} +\d+\.\d\d *$", out, re.MULTILINE)
    assert re.search(r"^MFU at most, attention causal / full +\d+% / \d+%", out, re.MULTILINE)
    assert re.search(r"^fsdp +[\d.]+ +540", out, re.MULTILINE)  # GB and GB/s of the axis
    assert "Legal meshes, each at its best" in out and "context=16,tensor=4" in out
    assert "mesh(es) do not divide" in out
    assert max(map(len, (line for line in out.splitlines() if "─" in line))) <= 80


@pytest.mark.parametrize(
    ("topology", "says"),
    [
        ("2xv5e-64", "128 chip(s) of v5e (8x8), 128 device(s), 32 machine(s)"),
        ("h100-8", "8 chip(s) of h100, 8 device(s), 1 machine(s)"),
        ("4xh100-8", "32 chip(s) of h100, 32 device(s), 4 machine(s)"),
        ("cpu-8", "8 chip(s) of cpu, 8 device(s), 1 machine(s)"),
        ("tpu7x-8", "4 chip(s) of tpu7x (2x2x1), 8 device(s), 1 machine(s)"),
        ("v4-16", "8 chip(s) of v4 (2x2x2), 8 device(s), 2 machine(s)"),
        ("v5p:4x4x4", "64 chip(s) of v5p (4x4x4)"),
    ],
)
def test_slices_hosts_and_fake_devices_by_name(monkeypatch, capsys, topology, says):
    asked = ("--model", "qwen2.5-0.5b", "--topology", topology, "--rows", "1", "--remat", "full")
    code, out, err = run(monkeypatch, capsys, *asked)
    assert code == 0, err
    assert says in out
    assert ("dcn_data=" in out) == (topology[1] == "x")
    assert ("no time: not known" in out) == topology.startswith("cpu")


def test_the_picture_names_every_kind_and_parameter(monkeypatch, capsys, tmp_path):
    drawn = ""
    for purpose in ("train", "decode"):
        path = tmp_path / f"{purpose}.svg"
        asked = ("--model", "qwen2.5-0.5b", "--topology", "v5e-16", "--mesh", "fsdp=16")
        code, out, err = run(
            monkeypatch, capsys, *asked, "--rows", "1", "--purpose", purpose, "--picture", str(path)
        )
        assert code == 0, err
        assert f"{path}: memory and sharding" in out
        drawn += path.read_text()
    for label in memory.KINDS.values():
        assert label in drawn
    for text in ("layers.mlp.gate.kernel", "embed/fsdp", "less the reserve", "save_all_but_mlp"):
        assert text in drawn


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "qwen2.5-7b", "--topology", "v5q-128"), "topology='v5q-128' is unknown"),
        (("--model", "qwen2.5-7b", "--topology", "v5p-100"), "nearest: v5p-64 and v5p-128"),
        (("--model", "qwen9"), "unknown model 'qwen9'"),
        ((), "plan needs --model or --recipe"),
        (
            ("--model", "qwen2.5-7b", "--topology", "v5p-128", "--mesh", "fsdp=8,tensor=8"),
            "does not lie on v5p-128",
        ),
        (
            ("--model", "qwen2.5-7b", "--topology", "v5p-128", "--mesh", "fsdp=4,tensor=4"),
            "needs a total of 16 devices",
        ),
        (
            ("--model", "qwen2.5-7b", "--topology", "h100-8", "--mesh", "tensor=8"),
            "num_attention_heads=28 is not divisible by mesh axis tensor=8; use 1, 2, 4",
        ),
        (
            ("--model", "qwen1.5-moe-a2.7b", "--topology", "v5e-64", "--mesh", "fsdp=8,expert=8"),
            "num_experts=60 is not divisible by mesh axis expert=8; use 1, 2, 3, 4, 5, 6, or set "
            "pad_experts_to=64",
        ),
        (
            ("--model", "qwen1.5-moe-a2.7b", "--topology", "v5e-64", "--length", "32768"),
            "length 32768 exceeds max_position_embeddings=8192",
        ),
        (
            ("--model", "qwen2.5-72b", "--topology", "v5e-64"),
            "does not fit v5e-64: the least need is",
        ),
        (("--model", "qwen2.5-7b", "--mesh", "fsdp=8"), "mesh=fsdp=8 needs a --topology"),
        (
            ("--model", "qwen2.5-7b", "--topology", "v5e-4", "--purpose", "eval", "--batch", "8"),
            "batch=8 is of training",
        ),
        (
            (
                "--model",
                "qwen2.5-7b",
                "--topology",
                "v5e-4",
                "--purpose",
                "decode",
                "--mesh",
                "context=4",
            ),
            "decoding does not spread a sequence: context=4",
        ),
        (
            ("--model", "qwen2.5-0.5b", "--topology", "v5e-4", "--picture", "plan.txt"),
            "picture=plan.txt",
        ),
    ],
)
def test_bad_input_is_one_line_and_code_2(monkeypatch, capsys, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(monkeypatch, capsys, *arguments)
    assert code == 2
    assert err.startswith("qwen-jax: ") and message in err and err.count("\n") == 1


def test_what_does_not_fit_is_told_what_would(monkeypatch, capsys):
    asked = ("--model", "qwen2.5-14b", "--topology", "v6e-8", "--length", "16384")
    code, _, err = run(monkeypatch, capsys, *asked)
    assert code == 2
    larger = re.search(r"; (v6e-\d+) fits", err)[1]
    assert run(monkeypatch, capsys, *asked[:3], larger, *asked[4:])[0] == 0


def test_shorter_rows_are_named_where_they_would_do(monkeypatch, capsys):
    asked = (
        "--model",
        "qwen2.5-7b",
        "--topology",
        "v6e-8",
        "--mesh",
        "fsdp=8",
        "--length",
        "32768",
    )
    code, _, err = run(monkeypatch, capsys, *asked)
    assert code == 2
    shorter = re.search(r"or rows of at most [\d,]+ tokens here \(--length (\d+)\)", err)[1]
    assert run(monkeypatch, capsys, *asked[:-1], shorter)[0] == 0
