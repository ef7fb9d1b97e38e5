"""Faults on purpose: only in a rehearsal, only where they are asked for."""

import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxseg import faults
from jaxseg.config import default
from jaxseg.errors import InputError
from jaxseg.life import Life
from jaxseg.sharding import make_mesh, replicated
from jaxseg.train import TrainState


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


@pytest.mark.parametrize(
    "text", ["kill", "kill@", "boom@3", "nan_loss@eval", "term@lunch", "@3", "flip@save"]
)
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


def test_poison_reaches_a_pixel_the_loss_and_one_array_of_the_gradient_alone(ask):
    ask("nan_image@1,nan_loss@2,nan_grad@3,spike@4,inf_image@5,inf_loss@6,inf_grad@7")
    batch = {"image": np.ones((2, 4, 4, 3), np.uint8)}
    batches = [faults.poison(batch, n) for n in range(8)]
    images = [b["image"] for b in batches]
    assert [int(np.isnan(image).sum()) for image in images] == [0, 1, 0, 0, 0, 0, 0, 0]
    assert [int(np.isinf(image).sum()) for image in images] == [0, 0, 0, 0, 0, 1, 0, 0]
    assert {image.dtype for image in images} == {np.dtype(np.float32)}

    def loss(outputs, batch):
        value = sum((x**2).sum() for x in outputs.values())
        return value, {"loss": value}

    wrapped = faults.poisoned(loss)

    @jax.jit
    def value_and_grad(params, fault):
        batch = {"fault": fault}
        (value, _), grad = jax.value_and_grad(wrapped, has_aux=True)(params, batch)
        return value, faults.spoiled(grad, batch)

    params = {"a": jnp.float32([1, 2]), "b": jnp.float32([3])}
    values, grads = zip(*[value_and_grad(params, b["fault"]) for b in batches], strict=True)
    np.testing.assert_array_equal(values, [14, 14, np.nan, 14, 14, 14, np.inf, 14])
    for number in (0, 1, 2, 5, 6):
        np.testing.assert_array_equal(grads[number]["a"], [2, 4])
        np.testing.assert_array_equal(grads[number]["b"], [6])
    assert np.isnan(grads[3]["a"]).all() and np.isinf(grads[7]["a"]).all()
    assert grads[3]["b"] == grads[7]["b"] == 6
    np.testing.assert_allclose(grads[4]["a"], [2e4, 4e4])
    np.testing.assert_allclose(grads[4]["b"], [6e4])


def test_a_flip_changes_one_bit_of_one_parameter(ask):
    ask("flip@3")
    params = {"a": jnp.float32([1, 2]), "b": jnp.float32([3])}
    params = jax.device_put(params, replicated(make_mesh(default().mesh)))
    state = TrainState(0, 0, params, {}, {}, {})
    assert faults.flipped(state, 2) is state
    found = faults.flipped(state, 3).params
    assert found["a"].sharding == params["a"].sharding
    words = [np.asarray(x["a"]).view(np.uint32) for x in (params, found)]
    assert [int(n).bit_count() for n in words[0] ^ words[1]] == [1, 0] and found["b"] == 3


def test_a_stall_stops_the_batches_that_follow(ask, monkeypatch):
    slept = []
    monkeypatch.setattr(faults.time, "sleep", slept.append)
    ask("stall@3")
    batches = faults.stalled((n for n in "abc"), 2)
    assert next(batches) == "a" and slept == []
    assert next(batches) == "b" and slept == [faults.FOREVER]
    batches.close()
