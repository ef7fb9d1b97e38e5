"""The mesh and the places of arrays on it, on eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxseg import sharding
from jaxseg.config import default, override
from jaxseg.errors import InputError
from jaxseg.train import check_sizes


def _mesh(data: int = -1, fsdp: int = 1, space: int = 1) -> Mesh:
    mesh = default().mesh
    mesh.update(data=data, fsdp=fsdp, space=space)
    return sharding.make_mesh(mesh)


def _batch(count: int = 8, size: tuple[int, int] = (8, 6)) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (count, *size, 3), np.uint8),
        "label": rng.integers(0, 5, (count, *size), np.int32),
        "valid": rng.random(count) < 0.5,
    }


@pytest.mark.parametrize(
    ("given", "shape"),
    [
        ((-1, 1, 1), (8, 1, 1)),
        ((-1, 2, 2), (2, 2, 2)),
        ((-1, 8, 1), (1, 8, 1)),
        ((4, 1, 2), (4, 1, 2)),
    ],
)
def test_a_mesh_takes_all_devices(given, shape):
    mesh = _mesh(*given)
    assert mesh.axis_names == ("data", "fsdp", "space")
    assert tuple(mesh.shape.values()) == shape
    assert sharding.batch_parts(mesh) == shape[0] * shape[1]
    assert {d.id for d in mesh.devices.flat} == {d.id for d in jax.devices()}


@pytest.mark.parametrize(
    "given", [(-1, 3, 1), (4, 1, 1), (16, 1, 1), (-1, 16, 1), (-1, 0, 1), (0, 1, 1), (-1, 1, -1)]
)
def test_sizes_that_do_not_multiply_to_the_devices_are_refused(given):
    names = ", ".join(
        f"{axis}={n}" for axis, n in zip(("data", "fsdp", "space"), given, strict=True)
    )
    with pytest.raises(InputError, match=f"mesh {names} does not multiply to the 8 devices"):
        _mesh(*given)


def test_an_axis_that_is_none_is_refused_with_those_there_are():
    with pytest.raises(
        InputError, match='unknown config key mesh.rows: "rows". Valid: data, fsdp, space'
    ):
        override(default(), [("mesh.rows", "2")])


@pytest.mark.parametrize(
    ("rows", "batch", "words"),
    [
        (36, 8, "data.crop has 36 rows: must be divisible by mesh.space, 8"),
        (32, 9, "train.batch is 9: must be divisible by 2"),
    ],
)
def test_rows_and_images_that_the_mesh_does_not_divide_are_refused(rows, batch, words):
    config = tiny_config().copy_and_resolve_references().unlock()
    config.data.crop, config.train.batch = (rows, 32), batch
    mesh = _mesh(1, 1, 8) if rows == 36 else _mesh(2, 1, 4)
    with pytest.raises(InputError, match=words):
        check_sizes(config, mesh)


def test_a_batch_lies_along_data_and_fsdp_and_its_rows_along_space():
    mesh = _mesh(fsdp=2, space=2)
    found = sharding.batch_sharding({**_batch(), "boxes": np.zeros((8, 5, 4))}, mesh)
    assert found["image"].spec == found["label"].spec == P(("data", "fsdp"), "space")
    assert found["valid"].spec == found["boxes"].spec == P(("data", "fsdp"))


@pytest.mark.parametrize(("fsdp", "space"), [(1, 1), (2, 1), (2, 2), (1, 8)])
def test_put_batch_changes_no_value(fsdp, space):
    mesh, batch = _mesh(fsdp=fsdp, space=space), _batch()
    placed = sharding.put_batch(batch, mesh)
    assert placed.keys() == batch.keys()
    for key, value in batch.items():
        assert placed[key].dtype == value.dtype
        np.testing.assert_array_equal(placed[key], value)
    shard = placed["image"].addressable_shards[0].data.shape
    assert shard == (8 // sharding.batch_parts(mesh), 8 // space, 6, 3)


@pytest.mark.parametrize("rows", [7, 1])
def test_rows_that_space_does_not_divide_are_not_split(rows):
    mesh, batch = _mesh(space=2), _batch(size=(rows, 6))
    placed = sharding.put_batch(batch, mesh)
    assert placed["image"].addressable_shards[0].data.shape == (2, rows, 6, 3)
    np.testing.assert_array_equal(placed["image"], batch["image"])


def test_large_arrays_are_split_over_fsdp_along_their_longest_divisible_axis():
    def shape(*sides: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sides, jnp.float32)

    shapes = {
        "wide": shape(3, 3, 128, 256),
        "deep": shape(3, 3, 512, 64),
        "square": shape(256, 256),
        "odd": shape(3, 3, 127, 256),
        "indivisible": shape(321, 321),
        "small": shape(3, 3, 64, 64),
        "vector": shape(2**16),
        "step": shape(),
    }
    found = sharding.state_sharding(shapes, _mesh(fsdp=4))
    assert {key: value.spec for key, value in found.items()} == {
        "wide": P(None, None, None, "fsdp"),
        "deep": P(None, None, "fsdp", None),
        "square": P(None, "fsdp"),
        "odd": P(None, None, None, "fsdp"),
        "indivisible": P(),
        "small": P(),
        "vector": P("fsdp"),
        "step": P(),
    }


def test_without_fsdp_the_state_is_on_every_device():
    shapes = {"kernel": jax.ShapeDtypeStruct((512, 512), jnp.float32)}
    mesh = _mesh()
    assert sharding.state_sharding(shapes, mesh) == {"kernel": sharding.replicated(mesh)}
    assert sharding.replicated(mesh).is_fully_replicated


def test_a_sum_over_a_sharded_batch_is_the_sum():
    batch = _batch()
    placed = sharding.put_batch(batch, _mesh(fsdp=2, space=2))
    total = jax.jit(lambda b: b["image"].astype(jnp.int32).sum())(placed)
    assert int(total) == batch["image"].sum()
