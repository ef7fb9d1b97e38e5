"""Training on eight devices in any arrangement: the numbers of one device, less memory on each."""

import re
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from jaxseg import config as configs
from jaxseg import sharding
from jaxseg.backbones.layers import ConvNorm, Norm
from jaxseg.models import deeplabv3plus, pspnet, unet
from jaxseg.ops.pool import max_pool
from jaxseg.optim import make_optimizer
from jaxseg.train import compile_step, init_state, train_step

STEPS = 20


class Backbone(nn.Module):
    """What a ResNet is made of, seven layers of it: image [B,H,W,C] -> c1 to c5, dilated in c5."""

    output_stride: int = 8

    @nn.compact
    def __call__(self, image: jax.Array, train: bool) -> dict[str, jax.Array]:
        x = c1 = ConvNorm(8, 3, 2, name="stem")(image, train)
        x = c2 = ConvNorm(16, name="conv2")(max_pool(x, 3, 2, 1), train)
        x = c3 = ConvNorm(16, 3, 2, name="conv3")(x, train)
        x = c4 = ConvNorm(16, 3, self.output_stride // 8, name="conv4")(x, train)
        x = ConvNorm(16, 3, rate=2, name="conv5")(x, train)
        return {"c1": c1, "c2": c2, "c3": c3, "c4": c4, "c5": x}


PSPNET = pspnet.Model(
    num_classes=5,
    backbone=Backbone(),
    bins=(2, 4),  # one bin would leave eight numbers to normalise by
    pooled=4,
    features=16,
    dropout=0.1,
    aux=8,
    align_corners=False,
)
DEEPLAB = deeplabv3plus.Model(
    num_classes=5,
    backbone=Backbone(16),
    rates=(2, 6, 12),
    features=8,
    low_level=4,
    decoder=(8,),
    fit_corners=False,  # with corners aligned, at sizes that space divides
)
UNET = unet.Model(num_classes=5, widths=(4, 8), padding="same", norm=Norm())


def mesh_of(data=1, fsdp=1, space=1):
    """The first devices in this arrangement."""
    devices = np.array(jax.devices()[: data * fsdp * space]).reshape(data, fsdp, space)
    return Mesh(devices, sharding.AXES, axis_types=(AxisType.Auto,) * 3)


def setting(crop, batch=8):
    config = configs.default()
    config.data.crop = crop
    config.train.update(steps=STEPS, batch=batch, ema=0.9)
    config.optim.lr = 0.02
    return config


def example(config, seed=0):
    """A batch whose label can be seen in the image."""
    rng = np.random.default_rng(seed)
    shape = (config.train.batch, *config.data.crop)
    label = np.repeat(
        np.repeat(rng.integers(0, 5, (shape[0], 4, 4)), shape[1] // 4, 1), shape[2] // 4, 2
    )
    image = 40 * label[..., None] + rng.integers(0, 60, (*shape, 3))
    label[:, :3] = 255
    return {"image": image.astype(np.uint8), "label": label.astype(np.int32)}


def prepared(model, loss, config, mesh):
    """(state, compiled step) on the mesh."""
    image = jnp.zeros((1, *config.data.crop, 3))
    shapes = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), image)
    tx = make_optimizer(config.optim, STEPS, shapes["params"])
    init = partial(init_state, config, model, tx)
    places = sharding.state_sharding(jax.eval_shape(init), mesh)
    state = jax.jit(init, out_shardings=places)()
    step = partial(train_step, config=config, model=model, loss=loss, tx=tx)
    batch = sharding.put_batch(example(config), mesh)
    return state, compile_step(sharding.traced_on(mesh, step), state, batch, mesh)


def losses(mesh):
    config = setting((64, 64))
    loss = partial(pspnet.loss, align_corners=False)
    state, step = prepared(PSPNET, loss, config, mesh)
    before, values = state, []
    for i in range(STEPS):
        state, logs = step(state, sharding.put_batch(example(config, i), mesh))
        values.append(logs["loss"])
    assert all(x.is_deleted() for x in jax.tree.leaves(before)), "its memory is not used again"
    return np.array(jax.device_get(values)), state


@pytest.fixture(scope="module")
def one_device():
    return losses(mesh_of())


MESHES = [
    {"data": 2, "fsdp": 2, "space": 2},
    pytest.param({"data": 8}, marks=pytest.mark.slow),
    pytest.param({"fsdp": 8}, marks=pytest.mark.slow),
    pytest.param({"space": 8}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("sizes", MESHES, ids=lambda m: "-".join(f"{k}{v}" for k, v in m.items()))
def test_a_run_on_eight_devices_has_the_losses_of_one(sizes, one_device, monkeypatch):
    monkeypatch.setattr(sharding, "SMALLEST_SHARDED", 256)
    expected, alone = one_device
    found, state = losses(mesh_of(**sizes))
    assert expected[-1] < expected[0]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(state.ema), jax.tree.leaves(alone.ema), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)
    split = [x for x in jax.tree.leaves(state.params) if not x.is_fully_replicated]
    assert bool(split) == (sizes.get("fsdp", 1) > 1)


COLLECTIVE = re.compile(r"= (.*?) (all-gather|all-to-all|all-reduce|reduce-scatter)(?:-start)?\(")


def moved_whole(text, parameters, batch=2):
    """Results of collectives that are no gradients of parameters and no statistics."""
    found = []
    for shapes, kind in COLLECTIVE.findall(text):
        for shape in re.findall(r"\[([\d,]+)\]", shapes):
            axes = tuple(map(int, shape.split(",")))
            images = len(axes) >= 4 and axes[0] == batch and sorted(axes) not in parameters
            if kind != "all-reduce" or images:
                found.append(f"{kind} {axes}")
    return found


def test_a_resize_that_gathers_rows_is_found_out():
    mesh = mesh_of(space=8)
    rows = jax.NamedSharding(mesh, jax.P(None, "space"))
    x = jax.device_put(jnp.ones((2, 64, 32, 16)), rows)
    enlarge = partial(jax.image.resize, shape=(2, 96, 96, 16), method="bilinear")
    program = jax.jit(enlarge, out_shardings=rows).lower(x).compile()
    assert moved_whole(program.as_text(), []) != []


NETWORKS = {
    "deeplabv3plus": (DEEPLAB, partial(deeplabv3plus.loss, align_corners=True), (256, 32)),
    "unet": (UNET, unet.loss, (64, 32)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_no_device_gathers_the_rows_of_the_others(name):
    model, loss, crop = NETWORKS[name]
    config = setting(crop, batch=2)
    mesh = mesh_of(space=8)
    state, step = prepared(model, loss, config, mesh)
    parameters = [sorted(x.shape) for x in jax.tree.leaves(state.params)]
    text = step.as_text()
    assert text.count("collective-permute") > 20  # halos
    assert moved_whole(text, parameters) == []
    assert np.isfinite(step(state, sharding.put_batch(example(config), mesh))[1]["loss"])


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_a_device_needs_less_memory_where_rows_are_shared(name):
    model, loss, (height, width) = NETWORKS[name]
    config = setting((height, 4 * width), batch=2)
    steps = (prepared(model, loss, config, mesh_of(space=n))[1] for n in (8, 1))
    shared, alone = (step.memory_analysis().temp_size_in_bytes for step in steps)
    assert shared < alone / 3
