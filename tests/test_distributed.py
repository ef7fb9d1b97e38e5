"""How processes meet, agree and end; then two of them, with four devices each, as one run."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from jaxseg import distributed
from jaxseg.distributed import Line, Place, find
from jaxseg.errors import InputError, RestartError

ROOT = Path(__file__).parent.parent
EXPERIMENT = """from jaxseg.config import default


def get_config(dataset: str = "shapes"):
    config = default()
    config.data.dataset = dataset
    config.data.crop = (32, 32)
    config.data.threads = 1
    config.model.update(name="unet", widths=(4, 8), padding="same", dropout=0.0)
    config.model.update(num_classes=8, norm={"kind": "batch"})
    config.optim.lr = 0.05
    config.train.update(steps=6, batch=8, log_every=1, eval_every=0, checkpoint_every=3)
    config.eval.update(batch=8, pictures=1)
    return config
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def meet(places, configs=(), patience=3.0):
    """What each of the processes, here threads, comes to: its peers or its error."""

    def one(i):
        try:
            line = Line(places[i], patience)
        except InputError as error:
            return error
        with contextlib.closing(line):
            try:
                if configs:
                    line.agree(configs[i])
                return sorted(line.peers)
            except (InputError, RestartError) as error:
                return error

    with ThreadPoolExecutor(len(places)) as pool:
        return list(pool.map(one, range(len(places))))


def places(count, present=None, port=None):
    port = port or free_port()
    return [Place("127.0.0.1", port, count, i) for i in (present or range(count))]


def test_all_meet_and_agree():
    found = meet(places(3), [{"optim.lr": 0.1, "data.crop": (8, 8)}] * 3)
    assert found == [[1, 2], [0], [0]]


def test_another_config_is_named_to_all():
    configs = [{"optim.lr": 0.1}, {"optim.lr": 0.1}, {"optim.lr": 0.2}]
    errors = meet(places(3), configs)
    assert {type(e) for e in errors} == {InputError}
    assert {str(e) for e in errors} == {
        "process 2 has another config: optim.lr is 0.2 there and 0.1 in process 0: start all with "
        "the same command"
    }


def test_who_is_missing_is_named_to_all():
    errors = meet(places(3, present=(0, 2)), patience=1.0)
    assert {str(e) for e in errors} == {"no word of process [1] of 3 in 1 s"}


def test_two_with_one_number_are_refused():
    port = free_port()
    errors = meet([Place("127.0.0.1", port, 3, i) for i in (0, 1, 1)])
    assert {str(e) for e in errors} == {"two processes are number 1"}


def test_another_count_is_refused():
    port = free_port()
    errors = meet([Place("127.0.0.1", port, 2, 0), Place("127.0.0.1", port, 4, 1)])
    assert {str(e) for e in errors} == {"process 1 is one of 4, and process 0 of 2"}


def test_a_first_process_that_is_not_there():
    (error,) = meet(places(2, present=(1,)), patience=0.5)
    assert "not reached at 127.0.0.1:" in str(error) and "is the port open?" in str(error)


def test_a_port_in_use():
    with socket.create_server(("", 0)) as taken:
        (error,) = meet([Place("127.0.0.1", taken.getsockname()[1], 2, 0)], patience=0.5)
    assert "cannot listen on port" in str(error)


def test_strangers_do_not_disturb():
    port = free_port()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(meet, places(2, present=(0,), port=port), patience=10.0)
        for word in (b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b'{"hello": ["a"]}\n', b""):
            for _ in range(200):
                with (
                    contextlib.suppress(OSError),
                    socket.create_connection(("127.0.0.1", port)) as s,
                ):
                    s.sendall(word)
                    break
                time.sleep(0.02)
        assert meet(places(2, present=(1,), port=port)) == [[0]]
        assert first.result() == [[1]]


def test_a_peer_that_dies_before_the_start_is_told_to_the_others():
    port = free_port()
    found = []

    def rest(i):
        found.append(meet(places(3, present=(i,), port=port), [{}])[0])

    others = [threading.Thread(target=rest, args=(i,)) for i in (0, 2)]
    for thread in others:
        thread.start()
    Line(places(3, present=(1,), port=port)[0], 3).close()
    for thread in others:
        thread.join()
    assert {(type(e), str(e)) for e in found} == {(RestartError, "process 1 is gone")}


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (OSError(28, "No space left on device"), 2, "No space left on device. Mend that"),
        (PermissionError(13, "Permission denied", "run/eval.json"), 2, "run/eval.json: Permission"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 GiB"), 2, "out of memory"),
        (jax.errors.JaxRuntimeError("INTERNAL: Gloo failed"), 75, "a peer is gone: INTERNAL"),
        (jax.errors.JaxRuntimeError("INVALID_ARGUMENT: x"), 1, "INVALID_ARGUMENT: x"),
        (FloatingPointError("it diverges"), 76, "it diverges"),
    ],
)
def test_what_ends_one_ends_all_with_the_code_that_one_alone_has(
    monkeypatch, capsys, error, code, said
):
    ended = []
    line = SimpleNamespace(fail=lambda *what: ended.append(what))
    monkeypatch.setattr(distributed, "Line", lambda *_: line)
    with distributed.joined(Place("host", 12, 2, 0)):
        raise error
    ((found, problem),) = ended
    assert found == code and said in problem
    told = capsys.readouterr().err
    assert said in told and ("Traceback" in told) == (code == 1)


SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_NODELIST": "node[003-004]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}


def test_the_place_of_the_command_line_and_of_slurm(monkeypatch):
    for key in SLURM:
        monkeypatch.delenv(key, raising=False)
    assert find("", 0, -1, False) is None
    assert find("host:12", 1, 0, False) is None
    assert find("host:12", 3, 2, False) == Place("host", 12, 3, 2)
    for key, value in SLURM.items():
        monkeypatch.setenv(key, value)
    assert find("", 0, -1, False) == Place("node003", 65535 - 2**12 + 1 + 77, 2, 1, (0,))
    assert find("host:12", 3, 0, False) == Place("host", 12, 3, 0)
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert find("", 0, -1, False) is None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("", 2, 0), "needs HOST:PORT"),
        (("host", 2, 0), "needs HOST:PORT"),
        (("host:0", 2, 0), "needs HOST:PORT"),
        (("host:12", 0, -1), "--processes 0 --process -1"),
        (("host:12", 2, 2), "--processes 2 --process 2"),
    ],
)
def test_half_an_address_is_refused(given, words):
    with pytest.raises(InputError, match=words):
        find(*given, False)


def pair(folder, words, second=(), devices=4, env=({}, {})):
    """The exit codes and outputs of two processes of one command; `second` has more words."""
    (folder / "tiny.py").write_text(EXPERIMENT)
    port = free_port()
    started = []
    for i in range(2):
        environment = {**os.environ, **env[i], "PYTHONPATH": str(ROOT)}
        environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
        command = [sys.executable, "-m", "jaxseg.main", *words, *(second if i else ())]
        command += ["--coordinator", f"127.0.0.1:{port}", "--processes", "2", "--process", str(i)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen(command, cwd=folder, env=environment, **pipes))
    outputs = [process.communicate(timeout=300)[0] for process in started]
    return [process.returncode for process in started], outputs


def test_another_config_ends_both_commands(tmp_path):
    words = ["train", "--config", "tiny.py", "--workdir", "run"]
    codes, outputs = pair(tmp_path, words, ["--config.optim.lr=0.2"])
    assert codes == [2, 2]
    for text in outputs:
        assert "error: process 1 has another config: optim.lr is 0.2 there and 0.05 in" in text
        assert "Traceback" not in text
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_what_fails_in_one_ends_both(tmp_path, write_folder):
    write_folder(tmp_path / "here" / "own")
    words = ["train", "--config", "tiny.py:dataset=own", "--workdir", "run"]
    env = [{"JAXSEG_DATA": str(tmp_path / name)} for name in ("here", "nowhere")]
    words += ["--config.model.num_classes=3"]
    codes, outputs = pair(tmp_path, words, devices=1, env=env)
    assert codes == [2, 2]
    assert "error: process 1 of 2: " in outputs[0] and "nowhere" in outputs[0]
    assert "Traceback" not in "".join(outputs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "codes", "said"),
    [
        ("kill@3:p1", [75, -9], "error: (process 1|a peer) is gone: "),
        ("full@save:p1", [2, 2], "process 1 of 2: checkpoint 3 could not be saved: OSError"),
        ("flip@2:p1", [75, 75], "the processes hold different states at step 3, fingerprints"),
    ],
)
def test_what_befalls_one_of_two_commands_ends_both_with_a_code_and_a_reason(
    tmp_path, fault, codes, said
):
    rehearsal = {"JAXSEG_TESTING": "1", "JAXSEG_FAULT": fault}
    words = ["train", "--config", "tiny.py", "--workdir", "run"]
    found, outputs = pair(tmp_path, words, devices=1, env=(rehearsal, rehearsal))
    assert found == codes, outputs
    assert re.search(said, outputs[0]) and "Traceback" not in "".join(outputs)


def records(workdir, kind="train"):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == kind]


@pytest.mark.slow
def test_two_processes_are_one_run(tmp_path):
    """Losses equal those of one process with eight devices; only the first process writes."""
    words = ["train", "--config", "tiny.py", "--workdir", "two"]
    words += ["--config.mesh.fsdp=2", "--config.mesh.space=2"]
    codes, outputs = pair(tmp_path, words)
    assert codes == [0, 0], outputs
    assert outputs[1].count("step ") == 0
    alone = [sys.executable, "-m", "jaxseg.main", *words[:4], "one", *words[5:]]
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "PYTHONPATH": str(ROOT)}
    subprocess.run(alone, cwd=tmp_path, env={**os.environ, **flags}, check=True)
    one, two = (records(tmp_path / name) for name in ("one", "two"))
    assert [r["step"] for r in two] == [1, 2, 3, 4, 5, 6]
    for key in ("loss", "grad_norm"):
        assert [r[key] for r in two] == pytest.approx([r[key] for r in one], rel=1e-5)
    for name in ("curves.png", "eval.json", "config.json", "classes.json"):
        assert (tmp_path / "two" / name).is_file()
    scores = [json.loads((tmp_path / n / "eval.json").read_text())["mIoU"] for n in ("one", "two")]
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)
    codes, outputs = pair(tmp_path, ["eval", "--workdir", "two"])
    assert codes == [0, 0] and "mIoU" in outputs[0], outputs
