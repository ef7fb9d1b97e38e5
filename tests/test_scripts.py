"""The scripts that launch jaxseg elsewhere: their syntax, and what their dry runs would do."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from jaxseg import main

SCRIPTS = Path(__file__).parent.parent / "scripts"
SHELL = sorted(p for p in SCRIPTS.iterdir() if p.suffix in (".sh", ".sbatch"))
WORDS = ["train", "--config", "experiments/pspnet.py:dataset=my data", "--workdir", "/mnt/a b"]


def _dry(*command, **env):
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env={**os.environ, **env}
    )
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def _asked(words):
    """What the command line makes of the words after `python -m jaxseg.main`."""
    assert words[:1] == ["train"]
    return main.parser("train").parse_args(words[1:])


@pytest.mark.parametrize("path", SHELL, ids=lambda p: p.name)
def test_the_shell_understands(path):
    subprocess.run(["bash", "-n", path], check=True)


def test_the_dry_run_on_a_tpu_pod():
    if not (SCRIPTS.parent / ".git").exists():
        pytest.skip("needs git: the script sends the last commit")
    script = [SCRIPTS / "tpu_pod.sh", "--dry-run", "pod", "us-central2-b", *WORDS]
    copy, install, start = _dry(*script, JAXSEG_DATA="/mnt/data")
    assert copy[:5] == ["gcloud", "compute", "tpus", "tpu-vm", "scp"]
    assert copy[6:] == ["pod:jaxseg.tar.gz", "--zone=us-central2-b", "--worker=all"]
    assert not Path(copy[5]).exists()  # the archive is gone again
    assert "EXTRAS=tpu . scripts/venv.sh" in install[-1]
    assert "--worker=all" in start
    words = shlex.split(start[-1].removeprefix("--command="))
    assert "JAXSEG_DATA=/mnt/data" in words
    args = _asked(words[words.index("jaxseg.main") + 1 :])
    assert (args.config, str(args.workdir), args.multihost) == (WORDS[2], WORDS[4], True)


def test_the_dry_run_on_slurm():
    start, again = _dry("bash", SCRIPTS / "slurm.sbatch", *WORDS, DRY_RUN="1", SLURM_JOB_ID="7")
    assert start[0] == "srun" and again == ["scontrol", "requeue", "7"]
    args = _asked(start[start.index("jaxseg.main") + 1 :])
    assert (args.config, str(args.workdir)) == (WORDS[2], WORDS[4])
    options = re.findall(
        r"^#SBATCH --([\w-]+)=?(.*)$", (SCRIPTS / "slurm.sbatch").read_text(), re.M
    )
    assert dict(options)["signal"] == "USR1@120"
    assert dict(options)["ntasks-per-node"] == dict(options)["gpus-per-node"]


@pytest.mark.parametrize(
    ("code", "restarts", "again"),
    [
        *((code, 0, False) for code in (0, 1, 2, 76, 130)),
        *((code, 19, True) for code in (42, 75, 134, 137)),
        *((code, 20, code == 42) for code in (42, 75, 134, 137)),
    ],
)
def test_slurm_queues_again_what_goes_on_and_not_forever(tmp_path, code, restarts, again):
    for name, line in {"srun": f"exit {code}", "scontrol": 'echo "$@" > asked'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    env["SLURM_RESTART_COUNT"] = str(restarts)
    done = subprocess.run(["bash", SCRIPTS / "slurm.sbatch", *WORDS], cwd=tmp_path, env=env)
    assert done.returncode == code and (tmp_path / "asked").exists() == again
    assert not again or (tmp_path / "asked").read_text() == "requeue 7\n"


@pytest.mark.parametrize("script", ["tpu_pod.sh", "slurm.sbatch"])
def test_without_words_they_tell_their_usage(script):
    done = subprocess.run(["bash", SCRIPTS / script], capture_output=True, text=True)
    assert done.returncode == 2 and "train --config" in done.stderr and not done.stdout


def test_the_jobset():
    yaml = pytest.importorskip("yaml")
    (jobset,) = yaml.safe_load_all((SCRIPTS / "jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (workers,) = jobset["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    words = shlex.split(container["args"][0].replace("$JOB_COMPLETION_INDEX", "1"))
    args = _asked(words[words.index("jaxseg.main") + 1 :])
    assert args.processes == job["parallelism"] == job["completions"]
    host, port = args.coordinator.split(":")
    name = jobset["metadata"]["name"]
    assert host == f"{name}-{workers['name']}-0-0.{name}"
    assert int(port) == container["ports"][0]["containerPort"]
    rule = job["podFailurePolicy"]["rules"][0]
    assert rule["onExitCodes"]["values"] == [2, 76]
    mounts = {m["name"] for m in container["volumeMounts"]}
    assert mounts == {v["name"] for v in job["template"]["spec"]["volumes"]}
