"""What ends in a message, and what in a traceback."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from jaxseg import main
from jaxseg.errors import RestartError, of_the_machine, translated

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), ["No space left on device"]),
        (PermissionError(errno.EACCES, "Permission denied", "run/eval.json"), ["run/eval.json"]),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 GiB"), ["9 GiB", "train.batch"]),
    ],
)
def test_what_the_machine_lacks_is_no_traceback(monkeypatch, capsys, problem, expected):
    def run(_):
        raise problem

    monkeypatch.setattr(main, "run", run)
    with pytest.raises(SystemExit) as caught:
        main.main()
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.startswith("error: ")
    assert all(part in error for part in expected)


@pytest.mark.parametrize(
    "problem",
    [
        FileNotFoundError(errno.ENOENT, "No such file", "x"),
        jax.errors.JaxRuntimeError("INVALID_ARGUMENT: shapes differ"),
        jax.errors.JaxRuntimeError("INTERNAL: CpuCallback error\nConnection reset by peer"),
    ],
)
def test_a_defect_stays_a_traceback(monkeypatch, problem):
    def run(_):
        raise problem

    monkeypatch.setattr(main, "run", run)
    with pytest.raises(type(problem)):
        main.main()


@pytest.mark.parametrize(
    "text",
    [
        "UNKNOWN: Gloo all-reduce failed: [gloo/transport/tcp/pair.cc] Connection closed by peer",
        "INTERNAL: NCCL operation ncclAllReduce failed: remote process exited",
        "UNAVAILABLE: The tasks have crashed",
        "DEADLINE_EXCEEDED: Barrier timed out",
    ],
)
def test_a_collective_that_lost_a_process_says_that_the_same_command_goes_on(text):
    error = translated(jax.errors.JaxRuntimeError(text))
    assert isinstance(error, RestartError) and str(error) == f"a peer is gone: {text}"


def test_what_the_system_refused_is_known_in_a_librarys_words():
    known = ValueError("Error writing x/y [OS error 28: ENOSPC No space left on device]")
    assert of_the_machine(known) and of_the_machine(PermissionError(errno.EACCES, "no"))
    assert not of_the_machine(ValueError("no")) and not of_the_machine(OSError(errno.ENOENT, "no"))


def test_a_device_without_enough_memory_says_so():
    """What XLA raises is what is looked for."""
    with pytest.raises(Exception, match="RESOURCE_EXHAUSTED") as caught:
        jax.block_until_ready(jax.numpy.zeros((2**50,), jax.numpy.uint8))
    assert "out of memory" in str(translated(caught.value))


def test_an_installation_without_jax_says_what_to_activate():
    missing = ModuleNotFoundError("No module named 'jax'", name="jax")
    assert "jax is not installed for" in str(translated(missing))
    assert "activate" in str(translated(missing))
    other = ModuleNotFoundError("No module named 'mine'", name="mine")
    assert translated(other) is other


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.7, 1.4, 2.1, 2.8, 3.5, 4.2])
def test_an_interrupt_before_there_is_anything_to_save_ends_the_command(tmp_path, seconds):
    words = ["--config", ROOT / "experiments" / "quickstart.py", "--workdir", tmp_path / "run"]
    command, env = [sys.executable, "-m", "jaxseg.main", *words], {**os.environ, "XLA_FLAGS": ""}
    with open(tmp_path / "said.txt", "w") as said:
        child = subprocess.Popen(command, cwd=ROOT, env=env, stdout=said, stderr=said)
    try:
        time.sleep(seconds)
        child.send_signal(signal.SIGINT)
        code = child.wait(60)
    finally:
        child.kill()
    text = (tmp_path / "said.txt").read_text()
    assert code in (130, 42), text
    assert "Traceback" not in text or "Exception ignored" in text
