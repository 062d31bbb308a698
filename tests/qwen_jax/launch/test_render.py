"""Rendered files against the tools that will read them, and the scripts run with stand-ins."""

import re
import stat
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from qwen_jax.launch import render, rendered_checks

TOPOLOGIES = ("v4-32", "v5e-1", "v5e-8", "2xv5e-256", "v5p-128", "v5p:4x4x16", "v6e-256")
GKE_ONLY = ("tpu7x-2", "tpu7x-8", "2xtpu7x-128")
CASES = [
    *[(target, name) for target in ("queued-resource", "xpk", "gke") for name in TOPOLOGIES],
    *[(target, name) for target in ("xpk", "gke") for name in GKE_ONLY],
]


@pytest.mark.parametrize(("target", "topology"), CASES)
def test_every_slice_renders_to_files_that_pass_the_check(job, target, topology):
    for capacity in ("spot", "on-demand"):
        made = job(target, topology=topology, capacity=capacity)
        files = render.render(made, target=target)
        rendered_checks.check(files, made)
        assert any("--spot" in text or "gke-spot" in text for text in files.values()) == (
            capacity == "spot"
        )
        assert not any("{{" in text or "{%" in text for text in files.values())


@pytest.mark.parametrize("target", ["queued-resource", "xpk", "gke"])
def test_shellcheck_finds_nothing(job, target, tmp_path):
    for topology in ("v5p-128", "2xv6e-256"):
        files = render.render(job(target, topology=topology), target=target)
        for name, text in files.items():
            if name.endswith(".sh"):
                (tmp_path / name).write_text(text)
                done = subprocess.run(
                    [str(Path(sys.executable).with_name("shellcheck")), str(tmp_path / name)],
                    capture_output=True,
                    text=True,
                    check=False,
                )
                assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("topology", ["v5e-8", "2xv5e-256", "tpu7x-128"])
def test_the_jobs_of_the_set_pass_kubernetes_own_schema(job, topology):
    manifest = yaml.safe_load(
        render.render(job("gke", topology=topology), target="gke")["jobset.yaml"]
    )
    (group,) = manifest["spec"]["replicatedJobs"]
    child = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": manifest["metadata"],
        "spec": group["template"]["spec"],
    }
    kubernetes_validate.validate(child, "1.33", strict=True)
    child["spec"]["backoffLimits"] = 0
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(child, "1.33", strict=True)


@pytest.mark.parametrize(
    ("message", "action"),
    [
        # The two sentences of Kubernetes' pod_failure_policy.go.
        ("Container train for pod n/p failed with exit code 75 matching FailJob rule at index 0",
         "RestartJobSetAndIgnoreMaxRestarts"),
        ("Pod n/p has condition DisruptionTarget matching FailJob rule at index 1",
         "RestartJobSetAndIgnoreMaxRestarts"),
        ("Container train for pod n/p failed with exit code 3 matching FailJob rule at index 2",
         "FailJobSet"),
        ("Container train for pod n/p failed with exit code 2 matching FailJob rule at index 2",
         "FailJobSet"),
    ],
)  # fmt: skip
def test_exit_codes_choose_what_the_set_does(job, message, action):
    manifest = yaml.safe_load(render.render(job("gke"), target="gke")["jobset.yaml"])
    chosen = next(
        rule["action"]
        for rule in manifest["spec"]["failurePolicy"]["rules"]
        if "PodFailurePolicy" in rule["onJobFailureReasons"]
        and any(re.search(p, message) for p in rule.get("onJobFailureMessagePatterns", [""]))
    )
    assert chosen == action


def test_words_reach_the_run_as_they_were_written(job):
    made = job("gke", train="pretrain-7b --data.paths '$(HOME) \"x\".jsonl'")
    files = render.render(made, target="gke")
    manifest = yaml.safe_load(files["jobset.yaml"])
    pod = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    # Kubernetes writes $ for $$, and would put a variable in place of $(HOME).
    assert pod["containers"][0]["command"] == [
        *("qwen-jax", "train", "pretrain-7b", "--data.paths", '$$(HOME) "x".jsonl'),
        *("--output", "gs://bucket/run", "--cluster.launch", "auto"),
    ]


def _stand_in(folder: Path, name: str, body: str) -> None:
    file = folder / name
    file.write_text(f"#!/usr/bin/env bash\n{body}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)


def _run(script: Path, commands: Path) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": f"{commands}:/usr/bin:/bin"}
    return subprocess.run(
        ["bash", str(script)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("codes", "runs", "ended"),
    [
        ("75 75 0", 3, "0"),  # interruptions go on, uncounted
        ("1 75 1 0", 3, "1"),  # one restart is allowed; the second crash is the last
        ("3 0", 1, "3"),  # diverged
        ("2 0", 1, "2"),  # a user's error
    ],
)
def test_the_startup_script_goes_on_or_stops_by_exit_code(job, tmp_path, codes, runs, ended):
    files = render.render(job("queued-resource", max_restarts=1), target="queued-resource")
    home, commands = tmp_path / "home", tmp_path / "commands"
    (home / "venv/bin").mkdir(parents=True)
    commands.mkdir()
    text = files["startup.sh"].replace("/opt/qwen-jax", str(home))
    script = tmp_path / "startup.sh"
    script.write_text(text.replace("/var/log/qwen-jax.log", str(tmp_path / "log")))
    (tmp_path / "codes").write_text("\n".join(codes.split()) + "\n")
    _stand_in(
        home / "venv/bin",
        "qwen-jax",
        f'echo "$@" >>{tmp_path}/runs; code=$(head -1 {tmp_path}/codes); '
        f'sed -i 1d {tmp_path}/codes; exit "$code"',
    )
    _stand_in(
        commands,
        "gcloud",
        f'case "$*" in *cat*) cat {tmp_path}/ended ;; *cp*) cat >{tmp_path}/ended ;; esac',
    )
    _stand_in(commands, "curl", "echo 0")
    _stand_in(commands, "sleep", "true")
    assert _run(script, commands).returncode == 0, (tmp_path / "log").read_text()
    lines = (tmp_path / "runs").read_text().splitlines()
    words = "pretrain-7b --data.paths /data/a b.jsonl --output gs://bucket/run"
    assert lines == [f"train {words} --cluster.launch auto"] * runs
    assert (tmp_path / "ended").read_text().strip() == ended
    assert _run(script, commands).returncode == 0  # the machine boots again after the end
    assert len((tmp_path / "runs").read_text().splitlines()) == runs


def test_the_watcher_queues_again_after_a_preemption_and_gives_back_at_the_end(job, tmp_path):
    files = render.render(job("queued-resource"), target="queued-resource")
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    commands = tmp_path / "commands"
    commands.mkdir()
    states = ["ABSENT", "ACTIVE", "SUSPENDED", "ABSENT", "ACTIVE"]
    (tmp_path / "states").write_text("\n".join(states) + "\n")
    _stand_in(
        commands,
        "gcloud",
        f"""case "$*" in
  *"storage cat"*) [[ -s {tmp_path}/states ]] && exit 1; echo 3 ;;
  *describe*) head -1 {tmp_path}/states; sed -i 1d {tmp_path}/states ;;
  *create*) echo create >>{tmp_path}/did ;;
  *delete*) echo delete >>{tmp_path}/did ;;
esac""",
    )
    _stand_in(commands, "sleep", "true")
    assert _run(tmp_path / "watch.sh", commands).returncode == 3
    assert (tmp_path / "did").read_text().split() == ["create", "delete", "create", "delete"]
