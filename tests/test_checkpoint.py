"""Checkpoints: what comes back is what was saved, bit for bit, or is passed over aloud."""

import gc
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxseg import checkpoint
from jaxseg.config import default
from jaxseg.errors import InputError
from jaxseg.sharding import make_mesh, replicated

# Where orbax fails to read, its other reads finish in an event loop that is closed by then.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def _state(seed: int = 0) -> dict[str, Any]:
    """Like a TrainState: a step, parameters, an optimizer's tuples, and empty places."""
    rng = np.random.default_rng(seed)
    params = {
        "conv": {"kernel": rng.normal(size=(3, 3, 4, 16)), "bias": rng.normal(size=16)},
        "head": {"kernel": rng.normal(size=(16, 8))},
    }
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.trace(0.9), optax.scale_by_adam())
    state = {
        "step": jnp.int32(seed),
        "params": params,
        "batch_stats": {},
        "opt_state": tx.init(params),
        "half": jnp.asarray(rng.normal(size=(8, 3)), jnp.bfloat16),
        "flags": jnp.asarray(rng.random(8) < 0.5),
        "bytes": jnp.asarray(rng.integers(0, 256, 8), jnp.uint8),
        "ema": {},
    }
    return jax.device_put(state, replicated(make_mesh(default().mesh)))


def _target(state: Any) -> Any:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def _save(workdir: Path, steps: list[int], keep: int = 5) -> None:
    with checkpoint.manager(workdir, keep) as manager:
        for step in steps:
            checkpoint.save(manager, step, _state(step))


def _restore(workdir: Path) -> tuple[Any, int, str]:
    with checkpoint.manager(workdir) as manager:
        return checkpoint.restore(manager, _target(_state()))


def _assert_identical(ours: Any, theirs: Any) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def _steps(workdir: Path) -> list[int]:
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("two")
    _save(workdir, [1, 2])
    return workdir


@pytest.fixture
def workdir(two, tmp_path):
    shutil.copytree(two, tmp_path / "run")
    yield tmp_path / "run"
    gc.collect()  # so that what a failed read leaves ends here, not in a later test


def test_what_is_restored_is_what_was_saved(workdir):
    state, step, digest = _restore(workdir)
    assert step == 2 and digest == checkpoint.fingerprint(_state(2))
    _assert_identical(state, _state(2))
    assert state["ema"] == state["batch_stats"] == {}


def test_restoring_leaves_all_checkpoints_there(workdir):
    _restore(workdir)
    assert _steps(workdir) == [1, 2]


def test_save_returns_the_fingerprint_that_restore_gives(tmp_path):
    with checkpoint.manager(tmp_path, 1) as manager:
        digest = checkpoint.save(manager, 7, _state(7))
    assert _restore(tmp_path)[1:] == (7, digest)


def test_a_saved_state_may_be_overwritten_at_once(tmp_path):
    state, change = _state(3), jax.jit(lambda s: jax.tree.map(jnp.zeros_like, s), donate_argnums=0)
    with checkpoint.manager(tmp_path, 1) as manager:
        checkpoint.save(manager, 3, state)
        change(state)
    _assert_identical(_restore(tmp_path)[0], _state(3))


def test_a_position_that_was_changed_is_noticed(workdir, capsys):
    path = workdir / "checkpoints/2/meta/metadata"
    text = path.read_text()
    assert '"position": 2' in text
    path.write_text(text.replace('"position": 2', '"position": 6'))
    assert _restore(workdir)[1] == 1
    assert "position in the data were changed" in capsys.readouterr().err


def test_keep_leaves_the_newest(tmp_path):
    _save(tmp_path, [1, 2, 3, 4, 5], keep=2)
    assert _steps(tmp_path) == [4, 5]
    assert _restore(tmp_path)[1] == 5


def test_a_workdir_without_checkpoints_has_none(tmp_path, workdir):
    assert not checkpoint.exists(tmp_path / "nothing")
    (tmp_path / "fresh" / "checkpoints").mkdir(parents=True)
    assert not checkpoint.exists(tmp_path / "fresh")
    assert checkpoint.exists(workdir)


def test_a_reader_does_not_disturb_a_save_in_another_process(workdir):
    saving = workdir / "checkpoints" / "3.orbax-checkpoint-tmp"
    shutil.copytree(workdir / "checkpoints" / "2", saving)
    assert _restore(workdir)[1] == 2
    assert sorted(p.name for p in saving.iterdir()) == sorted(
        p.name for p in (workdir / "checkpoints" / "2").iterdir()
    )


def test_the_one_that_saves_clears_what_an_interrupted_save_left(workdir):
    left = workdir / "checkpoints" / "3.orbax-checkpoint-tmp"
    shutil.copytree(workdir / "checkpoints" / "2", left)
    _save(workdir, [3])
    assert _restore(workdir)[1] == 3
    assert _steps(workdir) == [1, 2, 3]


@pytest.mark.parametrize("seed", range(3))
def test_flipped_bytes_are_passed_over_aloud(workdir, capsys, seed):
    rng = np.random.default_rng(seed)
    for data in (workdir / "checkpoints/2/state").rglob("d/*"):
        content = bytearray(data.read_bytes())
        for place in rng.integers(0, len(content), 20):
            content[place] ^= 0xFF
        data.write_bytes(content)
    state, step, digest = _restore(workdir)
    assert step == 1 and digest == checkpoint.fingerprint(_state(1))
    _assert_identical(state, _state(1))
    assert "checkpoint 2 is damaged and passed over" in capsys.readouterr().err


def test_other_values_under_a_good_checkpoint_are_noticed(workdir, capsys):
    shutil.rmtree(workdir / "checkpoints/2/state")
    shutil.copytree(workdir / "checkpoints/1/state", workdir / "checkpoints/2/state")
    assert _restore(workdir)[1] == 1
    assert "its fingerprint is" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["state", "meta", "state/_METADATA", "state/manifest.ocdbt"])
def test_deleted_files_are_passed_over_aloud(workdir, capsys, part):
    path = workdir / "checkpoints" / "2" / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    _assert_identical(_restore(workdir)[0], _state(1))
    assert "checkpoint 2 is damaged and passed over" in capsys.readouterr().err


def test_a_checkpoint_without_its_data_is_passed_over(workdir):
    for path in (workdir / "checkpoints/2/state").rglob("d/*"):
        path.unlink()
    assert _restore(workdir)[1] == 1


def test_an_empty_folder_with_a_number_is_passed_over(workdir, capsys):
    (workdir / "checkpoints" / "9").mkdir()
    assert _restore(workdir)[1] == 2
    assert "checkpoint 9 is damaged and passed over" in capsys.readouterr().err


def test_damaged_checkpoints_are_set_aside_and_their_steps_saved_again(workdir):
    for _ in range(2):
        shutil.rmtree(workdir / "checkpoints/2/meta")
        (workdir / "checkpoints" / "9").mkdir()
        _, step, _ = _restore(workdir)
        checkpoint.set_aside(workdir, after=step)
        assert _steps(workdir) == [1]
        _save(workdir, [2])
        _assert_identical(_restore(workdir)[0], _state(2))
    aside = {p.name for p in (workdir / "checkpoints").iterdir() if not p.name.isdigit()}
    assert aside == {"2.damaged", "9.damaged", "2.damaged2", "9.damaged2"}
    assert (workdir / "checkpoints/2.damaged/state").is_dir()


@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("first\nsecond")])
def test_whatever_orbax_raises_becomes_a_line(workdir, capsys, monkeypatch, error):
    def broken(*_, **__):
        raise error

    with checkpoint.manager(workdir) as manager, pytest.raises(InputError, match="none of the"):
        monkeypatch.setattr(manager, "restore", broken)
        checkpoint.restore(manager, _target(_state()))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and type(error).__name__ in lines[0] and "second" not in lines[0]


@pytest.mark.parametrize(
    ("name", "size", "said"),
    [
        ("bias", 17, "params/conv/bias is (16,) there and (17,) here"),
        ("offset", 16, "params/conv/bias is (16,) there and missing here"),
    ],
)
def test_a_state_of_another_network_is_not_taken_and_not_called_damaged(
    workdir, capsys, name, size, said
):
    target = _target(_state())
    bias = target["params"]["conv"].pop("bias")
    target["params"]["conv"][name] = jax.ShapeDtypeStruct(
        (size,), bias.dtype, sharding=bias.sharding
    )
    with checkpoint.manager(workdir) as manager:
        with pytest.raises(InputError, match=r"the network and the version of .* saved \[2, 1\]"):
            checkpoint.restore(manager, target)
    lines = capsys.readouterr().err.splitlines()
    other = "was saved by another network or version of jaxseg and passed over"
    assert lines == [f"checkpoint {step} {other}: {said}" for step in (2, 1)]


def test_where_none_is_good_the_error_says_what_to_do(workdir):
    for step in (1, 2):
        meta = workdir / "checkpoints" / str(step) / "meta" / "metadata"
        assert json.loads(meta.read_text())["fingerprint"] == checkpoint.fingerprint(_state(step))
        meta.write_text(json.dumps({"fingerprint": "0" * 16}))
    with pytest.raises(InputError, match=r"none of the checkpoints \[2, 1\].*another workdir"):
        _restore(workdir)


def test_the_fingerprint_is_the_same_on_one_device_and_on_eight():
    state = _state()
    mesh = make_mesh(default().mesh)
    one = jax.device_put(state, jax.devices()[0])

    def split(x: jax.Array) -> jax.Array:
        along = P(*("data" if n % 8 == 0 else None for n in x.shape[-1:]))
        spec = P(*(None,) * (x.ndim - 1), *along) if x.ndim else P()
        return jax.device_put(x, NamedSharding(mesh, spec))

    eight = jax.tree.map(split, state)
    assert len(eight["params"]["conv"]["kernel"].addressable_shards) == 8
    assert not eight["params"]["conv"]["kernel"].is_fully_replicated
    digest = checkpoint.fingerprint(one)
    assert len(digest) == 16 and int(digest, 16)
    assert checkpoint.fingerprint(eight) == checkpoint.fingerprint(state) == digest


@pytest.mark.slow
def test_any_flipped_bit_changes_the_fingerprint():
    state, rng = jax.device_put(_state(), jax.devices()[0]), np.random.default_rng(0)
    leaves, tree = jax.tree.flatten(state)
    bits = [8 * x.nbytes for x in leaves]
    digests = {checkpoint.fingerprint(state)}
    for _ in range(100):
        number = rng.choice([i for i, x in enumerate(leaves) if x.dtype != bool])
        content = bytearray(np.asarray(leaves[number]).tobytes())
        place = int(rng.integers(bits[number]))
        content[place // 8] ^= 1 << place % 8
        flipped = np.frombuffer(bytes(content), leaves[number].dtype).reshape(leaves[number].shape)
        changed = [*leaves[:number], jnp.asarray(flipped), *leaves[number + 1 :]]
        digests.add(checkpoint.fingerprint(jax.tree.unflatten(tree, changed)))
    assert len(digests) > 90  # a bit may be drawn twice
    assert checkpoint.fingerprint({**state, "flags": ~state["flags"]}) not in digests


def test_the_fingerprint_sees_swapped_values_names_and_shapes():
    a, b = jnp.arange(6.0), jnp.arange(6.0) + 1
    states = [
        {"a": a, "b": b},
        {"a": b, "b": a},
        {"a": a, "c": b},
        {"a": a, "b": b[::-1]},
        {"a": a, "b": b.reshape(2, 3)},
        {"a": a, "b": b.view(jnp.int32)},
        {"a": a, "b": {"b": b}},
        {"a": a},
    ]
    assert len({checkpoint.fingerprint(state) for state in states}) == len(states)
    assert checkpoint.fingerprint({"b": b, "a": a}) == checkpoint.fingerprint(states[0])
