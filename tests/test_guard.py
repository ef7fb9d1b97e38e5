"""The guard: which steps are bad, when a run rolls back and to where, and when it gives up."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxseg.guard import IN_A_ROW, LIMIT, WINDOW, Guard


def look(guard, loss, norm=1.0, **more):
    logs = {"loss": jnp.float32(loss), "grad_norm": jnp.float32(norm), "lr": 1.0, **more}
    return guard.look(logs)[0]


def warm(guard, level=1.0):
    for noise in np.random.default_rng(0).normal(0, 0.05, WINDOW):
        assert look(guard, level + noise) == ""
    return guard


@pytest.mark.parametrize(
    ("loss", "norm", "wrong"),
    [
        (math.nan, 1.0, "the loss is nan"),
        (math.inf, 1.0, "the loss is inf"),
        (1.0, math.nan, "the gradient's norm is nan"),
        (1.0, math.inf, "the gradient's norm is inf"),
        (1.0, 1.0, ""),
    ],
)
def test_what_is_not_finite_is_bad(loss, norm, wrong):
    assert look(Guard(), loss, norm) == wrong


def test_five_bad_steps_in_a_row_roll_back_to_before_the_first():
    guard = Guard()
    for _ in range(IN_A_ROW - 1):
        look(guard, math.nan)
    look(guard, 1.0)
    assert guard.bad == 0
    for _ in range(11, 11 + IN_A_ROW):
        assert not guard.spent
        look(guard, math.nan)
    assert guard.spent
    assert guard.roll(15, "the loss is nan") == 9  # 11 was the first; the update of 10 broke it
    assert not guard.spent


def test_it_tells_leaps_which_break_weights_from_steps_that_changed_nothing():
    guard = warm(Guard())
    assert look(guard, math.nan) and (guard.bad, guard.leaps) == (1, 0)
    assert look(guard, 9.0) and look(guard, math.inf) and (guard.bad, guard.leaps) == (3, 1)
    assert guard.good(20) == 16
    assert look(guard, 1.0) == "" and guard.leaps == 0


def test_after_three_roll_backs_it_diverges():
    guard = Guard()
    for _ in range(LIMIT):
        guard.roll(7, "the loss is nan")
    with pytest.raises(FloatingPointError, match=r"the loss is nan at step 7, .*3 roll-backs.*lr"):
        guard.roll(7, "the loss is nan")


def test_a_checkpoint_beyond_the_trouble_makes_the_next_trouble_new():
    guard = Guard()
    for _ in range(LIMIT):
        guard.roll(7, "the loss is nan")
    guard.saved(7)
    with pytest.raises(FloatingPointError):
        guard.roll(7, "the loss is nan")
    guard.saved(8)
    guard.roll(9, "the loss is nan")


def test_a_leap_is_seen_at_once_and_one_alone_is_forgiven():
    guard = warm(Guard())
    assert "the loss leapt to 9, the median is" in look(guard, 9.0)
    assert guard.bad == 1 and look(guard, 1.0) == "" and guard.bad == 0
    for _ in range(IN_A_ROW):
        assert look(guard, 50.0)
    assert guard.spent


def test_a_leap_needs_a_full_window_six_deviations_and_twice_the_median():
    assert look(Guard(), 1e6) == ""
    assert look(warm(Guard()), 1.9) == ""  # far beyond six deviations, but not twice as large
    assert look(warm(Guard(spike=0)), 1e6) == ""
    guard = Guard()
    for loss in np.random.default_rng(0).uniform(0, 2, WINDOW):  # a noisy run: deviation 0.5
        look(guard, loss)
    assert look(guard, 3.0) == "" and look(guard, 5.0)


def test_losses_that_only_fall_or_jitter_are_never_bad():
    rng, guard = np.random.default_rng(1), Guard()
    for step in range(3000):
        look(guard, 2 * math.exp(-step / 500) * rng.lognormal(0, 0.6) + 0.02)
        assert not guard.spent


def test_a_request_to_stop_is_seen_and_its_step_is_not_judged():
    guard = Guard()
    logs = {"loss": jnp.float32(math.nan), "grad_norm": jnp.float32(1), "stop": jnp.bool_(True)}
    assert guard.look(logs) == ("", True) and guard.bad == 0
    assert guard.look(None) == ("", False)
