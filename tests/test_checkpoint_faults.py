"""Checkpoints in a bad world: damaged files, full disks, folders that go, readers beside a run."""

import gc
import os
import resource
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils
from processes import memory, tidy

from jaxseg import checkpoint
from jaxseg.checkpoint import Saver
from jaxseg.errors import InputError, RestartError

# Where orbax fails to read, its other reads finish in an event loop that is closed by then.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
]


def state_of(step, size=64):
    rng = np.random.default_rng(step)
    state = {"step": jnp.int32(step), "w": jnp.asarray(rng.normal(size=size), jnp.float32)}
    # On one device: programs of eight that two threads start at once wait for each other forever.
    return jax.device_put(state, jax.devices()[0])


def target_of(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def restore(workdir, size=64, until=None):
    """(the step that the state says, the step of the folder)."""
    with checkpoint.manager(workdir) as manager:
        state, step, digest = checkpoint.restore(manager, target_of(state_of(0, size)), until)
    assert digest == checkpoint.fingerprint(state_of(step, size)), "silently wrong"
    return step


def folders(workdir):
    return {p.name for p in (workdir / "checkpoints").iterdir()}


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("three")
    saver = Saver(workdir, keep=3)
    for step in (1, 2, 3):
        saver.save(step, state_of(step))
    saver.close()
    return workdir


def damage(folder, kind, rng):
    """One fault on one file of a checkpoint."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    path = files[rng.integers(len(files))]
    if kind == "delete":
        path.unlink()
        return
    content = bytearray(path.read_bytes())
    if kind == "truncate":
        content = content[: rng.integers(len(content))] if content else content
    elif content:
        content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
    path.write_bytes(content)


def try_faults(three, workdir, kinds, seed):
    """How often the damaged checkpoint was passed over; it must never be wrong."""
    rng, passed = np.random.default_rng(seed), 0
    for n, kind in enumerate(kinds):
        shutil.copytree(three, workdir)
        damage(workdir / "checkpoints" / "3", kind, rng)
        step = restore(workdir)
        assert step in (2, 3)
        passed += step == 2
        shutil.rmtree(workdir)
        if n % 10 == 9:
            gc.collect()  # what failed reads leave slows the later ones
    return passed


@pytest.mark.parametrize("times", [6, pytest.param(50, marks=pytest.mark.slow)])
def test_random_faults_on_the_newest_checkpoint_are_never_silent(three, tmp_path, times):
    kinds = ["flip"] * 4 * times + ["truncate"] * times + ["delete"] * times
    assert try_faults(three, tmp_path / "run", kinds, seed=0) > 0.6 * times


def empty(newest):
    newest.mkdir()


def without_data(newest):
    shutil.copytree(newest.with_name("3"), newest)
    for path in newest.rglob("d"):
        shutil.rmtree(path)


def unfinished(newest):
    shutil.copytree(newest.with_name("3"), newest.with_name("4.orbax-checkpoint-tmp"))


def plain_file(newest):
    newest.write_text("no folder")


def junk(newest):
    newest.mkdir()
    (newest / "notes.txt").write_text("mine")
    newest.with_name("old").mkdir()


def half_copied(newest):
    shutil.copytree(newest.with_name("3"), newest)
    (newest / "_CHECKPOINT_METADATA").unlink()
    shutil.rmtree(newest / "meta")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [empty, without_data, unfinished, plain_file, junk, half_copied])
def test_the_newest_that_is_whole_is_taken_and_saving_goes_on(three, tmp_path, kind):
    workdir = tmp_path / "run"
    shutil.copytree(three, workdir)
    kind(workdir / "checkpoints" / "4")
    assert restore(workdir) == 3
    checkpoint.set_aside(workdir, after=3)
    saver = Saver(workdir, keep=3)
    saver.save(4, state_of(4))
    saver.close()
    assert restore(workdir) == 4
    gc.collect()


def test_only_checkpoints_until_a_step_are_taken(three):
    assert restore(three, until=2) == 2
    assert checkpoint.exists(three, 1) and not checkpoint.exists(three, 0)


def test_the_position_in_the_data_is_saved_beside(tmp_path):
    saver = Saver(tmp_path, keep=2)
    saver.save(3, state_of(3), position=8)
    saver.save(4, state_of(4))
    saver.close()
    assert checkpoint.position(tmp_path, 3) == 8 and checkpoint.position(tmp_path, 4) == 4
    assert checkpoint.position(tmp_path, 5) == 5  # there is none: a fresh run, or an older one


LARGE = 2**18  # numbers, 1 MB


@pytest.fixture
def no_room():
    """A function that lets files grow to so many bytes only."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_told_and_costs_no_older_checkpoint(tmp_path, no_room, capfd):
    saver = Saver(tmp_path, keep=2)
    for step in (1, 2):
        saver.save(step, state_of(step, LARGE))
    saver.settle(wait=True)
    no_room(2**16)
    saver.save(3, state_of(3, LARGE))
    saver.settle(wait=True)
    assert "checkpoint 3 could not be saved" in capfd.readouterr().err
    with pytest.raises(InputError, match="checkpoint 3 could not be saved.*the same command"):
        saver.finish()
    assert folders(tmp_path) == {"1", "2"} and restore(tmp_path, LARGE) == 2
    no_room(-1)
    saver.save(4, state_of(4, LARGE))
    saver.finish()
    saver.close()
    assert restore(tmp_path, LARGE) == 4 and len(folders(tmp_path)) == 2
    gc.collect()


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(28, "No space left on device"), InputError),
        (ValueError("cannot write x [OS error 28: No space left on device]"), InputError),
        (ValueError("barrier timed out"), RestartError),
    ],
)
def test_what_a_failed_save_of_several_processes_ends_with(tmp_path, monkeypatch, error, kind):
    saver = Saver(tmp_path, keep=2)
    with monkeypatch.context() as patch:
        patch.setattr(saver, "_probe", lambda: _raise(error))
        patch.setattr(jax, "process_count", lambda: 2)
        with pytest.raises(kind, match="checkpoint 3 could not be saved"):
            saver.save(3, state_of(3))
    saver.close()


def _raise(error):
    raise error


def test_a_folder_that_is_gone_is_made_again(tmp_path, capfd):
    saver = Saver(tmp_path / "run", keep=2)
    saver.save(1, state_of(1))
    saver.settle(wait=True)
    shutil.rmtree(tmp_path / "run")
    for step in (2, 3):
        saver.save(step, state_of(step))
        saver.settle(wait=True)
    saver.finish()
    saver.close()
    assert restore(tmp_path / "run") == 3


def test_a_folder_that_cannot_be_made_is_told_at_every_save(tmp_path, capfd):
    saver = Saver(tmp_path / "run", keep=2)
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").write_text("no folder")  # root may write into any folder, but not this
    for step in (1, 2):
        assert saver.save(step, state_of(step)) is None
    with pytest.raises(InputError, match="checkpoint 2 could not be saved"):
        saver.finish()
    assert capfd.readouterr().err.count("could not be saved") == 2
    (tmp_path / "run").unlink()
    saver.save(3, state_of(3))
    saver.finish()
    saver.close()
    assert restore(tmp_path / "run") == 3


def test_a_roll_back_takes_an_older_one_and_keeps_the_later_ones_aside(three, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(three, workdir)
    saver = Saver(workdir, keep=3)
    state, step = saver.roll_back(target_of(state_of(0)), good=2)
    assert step == 2 and int(state["step"]) == 2
    assert folders(workdir) == {"1", "2", "3.rolled_back"}
    saver.save(3, state_of(3))
    saver.finish()
    assert saver.roll_back(target_of(state_of(0)), good=0) == (None, 0)
    assert not checkpoint.exists(workdir)
    saver.save(1, state_of(1))
    saver.close()
    assert restore(workdir) == 1


def test_a_step_that_is_there_is_not_saved_again(three):
    saver = Saver(three, keep=3)
    assert saver.save(3, state_of(3)) == checkpoint.fingerprint(state_of(3))
    saver.finish()
    saver.close()


def test_processes_that_differ_do_not_save(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    other = {"same": lambda x: np.stack([x, x]), "else": lambda x: np.stack([x, x ^ 1])}
    monkeypatch.setattr(multihost_utils, "process_allgather", other["same"])
    checkpoint.check_same("00ff" * 4, 7)
    monkeypatch.setattr(multihost_utils, "process_allgather", other["else"])
    with pytest.raises(RestartError, match=r"different states at step 7, .*00ff.*01fe"):
        checkpoint.check_same("00ff" * 4, 7)


def read_while_saving(workdir, count, keep=2):
    """The steps that a reader saw while another thread saved `count` checkpoints."""
    saver, seen = Saver(workdir, keep), []
    saver.save(1, state_of(1))
    saver.settle(wait=True)

    def work():
        for step in range(2, count + 1):
            saver.save(step, state_of(step))
        saver.close()

    thread = threading.Thread(target=work)
    thread.start()
    while thread.is_alive():
        seen.append(restore(workdir))
    thread.join()
    return seen


@pytest.mark.filterwarnings("ignore")  # both threads change the filters, which are the process'
@pytest.mark.parametrize("count", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_a_reader_beside_a_run_that_deletes_always_finds_a_whole_one(tmp_path, count):
    seen = read_while_saving(tmp_path, count)
    assert len(seen) > 3 and seen == sorted(seen) and restore(tmp_path) == count
    gc.collect()


@pytest.mark.slow
def test_five_hundred_saves_leak_nothing(tmp_path):
    saver, state = Saver(tmp_path, keep=2), state_of(0, 2**20)  # 4 MB
    for step in range(1, 501):
        saver.save(step, state)
        if step == 50:
            saver.settle(wait=True)
            tidy()
            before = memory(), len(os.listdir("/proc/self/fd")), threading.active_count()
    saver.settle(wait=True)
    tidy()
    after = memory(), len(os.listdir("/proc/self/fd")), threading.active_count()
    saver.close()
    assert after[0] - before[0] <= 25
    assert after[1:] == before[1:]
    assert folders(tmp_path) == {"499", "500"}
