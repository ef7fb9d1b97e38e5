"""Faults on purpose: only in a rehearsal, only where they are asked for."""

import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxseg import faults
from jaxseg.errors import InputError
from jaxseg.life import Life


@pytest.fixture
def ask(monkeypatch):
    def ask(text, testing="1"):
        monkeypatch.setenv("JAXSEG_FAULT", text)
        monkeypatch.setenv("JAXSEG_TESTING", testing)

    return ask


def test_nothing_is_read_unless_it_is_a_rehearsal(ask, monkeypatch):
    for testing in ("0", "", "true"):
        ask("kill@1,rubbish", testing)
        assert faults.faults() == []
        faults.strike(1)
    monkeypatch.delenv("JAXSEG_TESTING")
    assert faults.faults() == []


def test_places_are_steps_ranges_phases_and_processes(ask):
    ask("term@7,nan_loss@3-5,usr1@eval,hang@9:p1,kill@2:p0")
    assert [faults.due(n) for n in (2, 3, 5, 6, 7, 9)] == [
        {"kill"},
        {"nan_loss"},
        {"nan_loss"},
        set(),
        {"term"},
        set(),  # another process
    ]
    assert faults.due("eval") == {"usr1"} and faults.due("compile") == set()


@pytest.mark.parametrize("text", ["kill", "kill@", "boom@3", "nan_loss@eval", "term@lunch", "@3"])
def test_what_is_no_fault_is_refused(ask, text):
    ask(text)
    with pytest.raises(InputError, match="needs KIND@STEP"):
        faults.faults()


def test_signals_and_errors_strike(ask):
    ask("usr1@4,full@save")
    with Life() as life:
        faults.strike(3)
        assert life.signal == ""
        faults.strike(4)
        assert life.signal == signal.SIGUSR1.name
    with pytest.raises(OSError, match="No space left"):
        faults.strike("save")


def test_batches_are_untouched_outside_a_rehearsal_of_poisons(ask):
    batch = {"image": np.zeros((2, 4, 4, 3), np.uint8)}
    ask("kill@9")
    assert faults.poison(batch, 1) is batch
    assert faults.stalled(iter([1]), 1) is not None
    loss = object()
    assert faults.poisoned(loss) is loss


def test_poison_reaches_a_pixel_the_loss_and_the_gradient_alone(ask):
    ask("nan_image@1,nan_loss@2,nan_grad@3,spike@4")
    batch = {"image": np.ones((2, 4, 4, 3), np.uint8)}
    images = [faults.poison(batch, n)["image"] for n in range(6)]
    assert [int(np.isnan(image).sum()) for image in images] == [0, 1, 0, 0, 0, 0]
    assert {image.dtype for image in images} == {np.dtype(np.float32)}

    def loss(outputs, batch):
        value = (outputs["logits"] ** 2).sum()
        return value, {"loss": value}

    wrapped = faults.poisoned(loss)

    @jax.jit
    def value_and_grad(x, fault):
        outputs = {"logits": x, "ids": jnp.arange(3)}
        (value, _), grad = jax.value_and_grad(
            lambda x: wrapped({**outputs, "logits": x}, {"fault": fault}), has_aux=True
        )(x)
        return value, grad

    x = jnp.float32([1, 2])
    found = [value_and_grad(x, faults.poison(batch, n)["fault"]) for n in range(5)]
    values, grads = zip(*found, strict=True)
    assert [float(v) for v in values[:2]] == [5, 5] and np.isnan(values[2]) and values[3] == 5
    np.testing.assert_array_equal(grads[0], [2, 4])
    assert np.isnan(grads[3]).all()
    np.testing.assert_allclose(grads[4], [2e4, 4e4])


def test_a_stall_stops_the_batches_that_follow(ask, monkeypatch):
    slept = []
    monkeypatch.setattr(faults.time, "sleep", slept.append)
    ask("stall@3")
    batches = faults.stalled((n for n in "abc"), 2)
    assert next(batches) == "a" and slept == []
    assert next(batches) == "b" and slept == [faults.FOREVER]
    batches.close()
