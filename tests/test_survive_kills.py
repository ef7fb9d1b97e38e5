"""Runs in processes of their own: killed at any moment, stuck, stopped; alone and in pairs."""

import json
import os
import random
import re
import signal
import time
from pathlib import Path

import pytest
from processes import readers
from survivor import Family, free_port

from jaxseg.errors import RESTART
from jaxseg.life import STOPPED

REHEARSAL = {"JAXSEG_TESTING": "1"}


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    family = Family(tmp_path_factory.mktemp("family"))
    yield family
    family.close()


def saves(workdir):
    """step -> fingerprint of the saves that were started, as the run logged them."""
    found = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        if '"checkpoint"' in line and line.endswith("}"):
            record = json.loads(line)
            found[record["step"]] = record["fingerprint"]
    return found


@pytest.mark.parametrize("kills", [3, pytest.param(100, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_moments_loses_at_most_one_save(family, tmp_path, kills):
    seed = random.randrange(2**32)
    rng, known, last, n = random.Random(seed), {}, 0, -1
    while n < kills or last <= kills:  # on a slow machine some are killed before they save
        n += 1
        assert n < 20 * (kills + 1), f"seed {seed}: {n} runs saved {last} times"
        child = family.start(tmp_path)
        if n and rng.random() < 0.2:  # while it starts
            time.sleep(rng.uniform(0.05, 1))
        else:
            family.until(child, "s, once")
            time.sleep(rng.uniform(0.05, 1))
        child.kill(signal.SIGKILL)
        assert family.wait(child) == -signal.SIGKILL
        found = re.search(r"resuming at step (\d+), fingerprint (\w+)", child.text())
        if found:
            step = int(found[1])
            assert known[step] == found[2], f"seed {seed}, kill {n}"
            assert step >= last - 1, f"seed {seed}, kill {n}: {last - step} saves lost"
        assert "damaged" not in child.text(), f"seed {seed}, kill {n}"
        if "s, once" in child.text():
            assert found or last <= 1, f"seed {seed}, kill {n}: started anew"
            now = saves(tmp_path)
            assert all(known.get(k, v) == v for k, v in now.items()), f"seed {seed}, kill {n}"
            known |= now
            last = max(now, default=last)
        left = [p.name for p in (tmp_path / "checkpoints").glob("*-tmp*")]
        assert len(left) <= 1, f"seed {seed}, kill {n}: {left}"
    assert last > kills
    child = family.start(tmp_path)  # and it goes on
    family.until(child, rf"step {last + 2}/")
    child.kill(signal.SIGTERM)
    assert family.wait(child) == STOPPED


def test_a_stuck_step_prints_its_stacks_and_exits_restartably(family, tmp_path):
    env = REHEARSAL | {"JAXSEG_FAULT": "hang@4"}
    child = family.start(tmp_path, env=env, train__watchdog=3)
    family.until(child, "step 2/")
    begin = time.monotonic()
    assert family.wait(child) == RESTART
    assert time.monotonic() - begin < 3 + 3
    assert "no progress for" in child.text() and "in strike" in child.text()
    again = family.start(tmp_path, train__watchdog=3)
    family.until(again, r"resuming at step [23]\b")
    family.until(again, "step 5/")
    again.kill(signal.SIGTERM)
    assert family.wait(again) == STOPPED


def pair(family, workdir, **options):
    address = f"127.0.0.1:{free_port()}"
    return [family.start(workdir, peer=(address, 2, i), devices=2, **options) for i in range(2)]


@pytest.mark.slow
def test_a_signal_to_one_of_two_stops_both_at_the_same_step(family, tmp_path):
    children = pair(family, tmp_path, train__checkpoint_every=0)
    family.until(children[0], "step 3/")
    begin = time.monotonic()
    children[1].kill(signal.SIGTERM)
    assert [family.wait(child) for child in children] == [STOPPED] * 2
    assert time.monotonic() - begin < 10
    (step,) = saves(tmp_path)
    assert f"saved step {step} in" in children[0].text()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [str(step)]


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "step"), [("int@compile:p1", 0), ("term@save:p0", 2)])
def test_a_signal_reaches_both_in_compilation_and_in_a_save(family, tmp_path, fault, step):
    env = REHEARSAL | {"JAXSEG_FAULT": fault}
    children = pair(family, tmp_path, env=env, train__checkpoint_every=2)
    assert [family.wait(child) for child in children] == [STOPPED] * 2
    saved = re.search(r"saved step (\d+) in", children[0].text())
    assert step <= int(saved[1]) <= step + 3  # they agree on a step to come


@pytest.mark.slow
def test_a_signal_reaches_both_in_an_evaluation_and_in_a_stall(family, tmp_path):
    env = REHEARSAL | {"JAXSEG_FAULT": "usr1@eval:p1"}
    children = pair(family, tmp_path, env=env, train__eval_every=5)
    assert [family.wait(child) for child in children] == [STOPPED] * 2
    assert "saved step 5 in" in children[0].text()
    env = REHEARSAL | {"JAXSEG_FAULT": "stall@8:p0"}
    children = pair(family, tmp_path, env=env)
    family.until(children[0], "resuming at step 5")
    family.until(children[0], "step 6/")
    time.sleep(2)
    children[0].kill(signal.SIGTERM)
    assert [family.wait(child) for child in children] == [STOPPED] * 2
    assert "saved step 7 in" in children[0].text()


@pytest.mark.slow
def test_a_dead_peer_ends_the_other_and_both_resume(family, tmp_path):
    for index in (1, 0):
        children = pair(family, tmp_path)
        family.until(children[0], r"step (\d+)/")
        time.sleep(1)
        children[index].kill(signal.SIGKILL)
        begin = time.monotonic()
        assert family.wait(children[1 - index]) == RESTART
        assert time.monotonic() - begin < 20
        said = rf"error: (process {index}|a peer) is gone: "  # by the line, or by a collective
        assert re.search(said, children[1 - index].text())
    children = pair(family, tmp_path)
    family.until(children[0], r"resuming at step [1-9]")
    family.until(children[0], r"step (\d+)/")
    children[0].kill(signal.SIGTERM)
    assert [family.wait(child) for child in children] == [STOPPED] * 2


@pytest.mark.slow
def test_a_device_that_computes_wrongly_ends_both_at_the_next_save(family, tmp_path):
    env = REHEARSAL | {"JAXSEG_FAULT": "flip@8:p1"}
    children = pair(family, tmp_path, env=env, train__checkpoint_every=5)
    assert [family.wait(child) for child in children] == [RESTART] * 2
    said = "error: the processes hold different states at step 10, fingerprints"
    assert any(said in child.text() for child in children)
    children = pair(family, tmp_path)
    family.until(children[0], "resuming at step 5")
    children[0].kill(signal.SIGTERM)
    assert [family.wait(child) for child in children] == [STOPPED] * 2


@pytest.mark.slow
def test_a_stuck_peer_ends_both_restartably(family, tmp_path):
    env = REHEARSAL | {"JAXSEG_FAULT": "hang@5:p1"}
    children = pair(family, tmp_path, env=env, train__watchdog=20)
    family.until(children[0], "step 3/")
    begin = time.monotonic()
    assert [family.wait(child) for child in children] == [RESTART] * 2
    assert time.monotonic() - begin < 20 + 5


@pytest.mark.slow
def test_two_processes_are_equal_at_every_save_and_as_one(family, tmp_path):
    options = {"train__steps": 500, "train__checkpoint_every": 50, "train__log_every": 50}
    children = pair(family, tmp_path / "two", **options)
    assert [family.wait(child, 300) for child in children] == [0, 0]
    assert sorted(saves(tmp_path / "two")) == list(range(50, 501, 50))


@pytest.mark.slow
@pytest.mark.parametrize("number", ["SIGKILL", "SIGTERM", "SIGSTOP"])
def test_a_data_worker_that_dies_or_stops_is_named(family, tmp_path, number):
    child = family.start(tmp_path, data__workers=1, train__watchdog=15)
    family.until(child, "step 3/")
    workers = readers(child.pid)
    assert workers
    for pid in workers:
        os.kill(pid, getattr(signal, number))
    assert family.wait(child, 60) == RESTART
    named = "no progress for" if number == "SIGSTOP" else "a process that reads data died"
    assert named in child.text()


@pytest.mark.slow
def test_the_processes_that_read_data_end_with_a_run_that_was_killed(family, tmp_path):
    child = family.start(tmp_path, data__workers=2)
    family.until(child, "step 3/")
    workers = readers(child.pid)
    assert len(workers) == 2
    child.kill(signal.SIGKILL)
    family.wait(child)
    timer = time.monotonic()
    while any(Path(f"/proc/{pid}/cmdline").exists() for pid in workers):
        assert time.monotonic() - timer < 10
        time.sleep(0.1)
