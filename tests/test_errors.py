"""What ends in a message, and what in a traceback."""

import errno

import jax
import pytest

from jaxseg import main
from jaxseg.errors import translated


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


def test_a_defect_stays_a_traceback(monkeypatch):
    def run(_):
        raise FileNotFoundError(errno.ENOENT, "No such file", "x")

    monkeypatch.setattr(main, "run", run)
    with pytest.raises(FileNotFoundError):
        main.main()


def test_a_device_without_enough_memory_says_so():
    """What XLA raises is what is looked for."""
    with pytest.raises(Exception, match="RESOURCE_EXHAUSTED") as caught:
        jax.block_until_ready(jax.numpy.zeros((2**50,), jax.numpy.uint8))
    assert "out of memory" in str(translated(caught.value))
