"""Memory by device, for meshes that are not here, and the batch that fits a budget."""

import json

import jax
import numpy as np
import pytest
from conftest import tiny_config
from jax.sharding import AxisType, Mesh

from jaxseg import main, models, sharding
from jaxseg.errors import InputError
from jaxseg.train import build, compile_step
from jaxseg.verbs.benchmark import synthetic
from jaxseg.verbs.describe import device_facts, network_facts


def _facts(budget=0, **changes):
    config = tiny_config()
    with config.unlocked():
        for key, value in changes.items():
            section, name = key.split("__")
            config[section][name] = value
    model, loss, _ = models.build(config)
    return device_facts(config, model, loss, budget)


def test_without_a_mesh_or_a_budget_there_is_one_device():
    assert set(_facts()) == {"train_memory_bytes"}


def test_a_mesh_shares_state_images_and_rows():
    assert jax.device_count() == 8  # more of them need not be there
    whole = _facts()["train_memory_bytes"]
    data, rows, many = (
        _facts(**{f"mesh__{axis}": n for axis, n in sizes.items()})
        for sizes in ({"data": 8}, {"data": 1, "space": 8}, {"data": 64, "fsdp": 2})
    )
    assert data["mesh"] == {"data": 8, "fsdp": 1, "space": 1}
    assert many["mesh"] == {"data": 64, "fsdp": 2, "space": 1}
    assert whole / 8 < data["device_memory_bytes"] < whole / 4
    # A device has one image of the batch, or an eighth of each.
    assert rows["device_memory_bytes"] == pytest.approx(data["device_memory_bytes"], rel=0.01)
    assert many["device_memory_bytes"] == data["device_memory_bytes"]  # no less than an image


@pytest.mark.parametrize("sizes", [{"data": 1}, {"space": 8}], ids=str)
def test_the_estimate_is_near_what_the_compiler_plans(sizes):
    config = tiny_config().unlock()
    config.data.crop, config.train.batch = (256, 128), 2
    config.mesh.update({"data": 1, **sizes})
    count = config.mesh.space
    devices = np.array(jax.devices()[:count]).reshape(1, 1, count)
    mesh = Mesh(devices, sharding.AXES, axis_types=(AxisType.Auto,) * 3)
    _, init, step = build(config, mesh)
    state, batch = init(), sharding.put_batch(synthetic(config, 2), mesh)
    plan = compile_step(step, state, batch, mesh).memory_analysis()
    used = plan.temp_size_in_bytes + plan.argument_size_in_bytes
    model, loss, _ = models.build(config)
    facts = device_facts(config, model, loss, 2**30)
    assert facts["device_memory_bytes"] == pytest.approx(used, rel=0.5)


def test_large_parameters_are_shared_over_fsdp():
    wide = {"data__crop": (16, 16), "model__widths": (8, 512), "train__batch": 1}
    alone, shared = (_facts(**wide, mesh__fsdp=n, mesh__data=1) for n in (1, 8))
    state = _facts(**wide)["train_memory_bytes"]
    assert alone["device_memory_bytes"] == state
    assert shared["device_memory_bytes"] < 0.6 * state


def test_the_largest_batch_fits_and_one_more_does_not():
    budget = 8 * 2**20
    found = _facts(budget)["largest_batch"]
    assert found > 8 and found % 8 == 0  # of the eight devices here, the mesh of the config
    assert _facts(budget, train__batch=found)["device_memory_bytes"] <= budget
    assert _facts(budget, train__batch=found + 8)["device_memory_bytes"] > budget
    assert _facts(budget, train__accumulate=2)["largest_batch"] == 2 * found
    assert _facts(2**10)["largest_batch"] == 0


def test_blocks_computed_again_are_not_kept():
    plain, again = (_facts(train__remat=r)["train_memory_bytes"] for r in ("none", "blocks"))
    assert again < 0.7 * plain


@pytest.mark.parametrize("sizes", [{"fsdp": 0}, {"data": 0}, {"space": -1}])
def test_a_mesh_of_nothing_is_refused(sizes):
    with pytest.raises(InputError, match="needs 1 or more"):
        _facts(**{f"mesh__{axis}": n for axis, n in sizes.items()})


def test_the_verb_knows_mesh_and_budget(tmp_path, monkeypatch, capsys):
    (tmp_path / "tiny.py").write_text(
        "from jaxseg.config import default\n\n\ndef get_config():\n    config = default()\n"
        '    config.model.update(name="unet", widths=(4, 8), padding="same")\n'
        "    config.data.crop = (32, 32)\n    return config\n"
    )
    monkeypatch.chdir(tmp_path)
    words = ["describe", "--config", "tiny.py", "--config.mesh.fsdp=16", "--budget", "1.5G"]
    assert main.run([*words, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["mesh"]["fsdp"] == 16 and facts["budget_bytes"] == 3 * 2**29
    assert facts["largest_batch"] % 16 == 0 < facts["largest_batch"]
    assert main.run(words) == 0
    assert "largest_batch" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "G", "12X", "-3G", "0", "nan"])
def test_a_budget_that_is_no_size(text):
    with pytest.raises(InputError, match="such as 16G"):
        main.parse_bytes(text)


def test_sizes_in_powers_of_1024():
    assert [main.parse_bytes(t) for t in ("7", "2k", "16G", None)] == [7, 2048, 2**34, 0]


def test_facts_of_a_network_are_numbers_for_json():
    facts = network_facts(tiny_config(), (32, 32), budget=2**30)
    assert json.loads(json.dumps(facts)) == facts
