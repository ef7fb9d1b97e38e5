"""A dense CRF after inference: by name or from a file, on grey images, over devices."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_inference import K, _agree, _config, _image, _run, _softmax, _variables

from jaxseg import inference, models
from jaxseg.errors import InputError
from jaxseg.inference import make_infer
from jaxseg.ops import crf
from jaxseg.sharding import make_mesh, replicated


@pytest.fixture(scope="module")
def variables() -> dict:
    return _variables(_config())


def test_a_crf_follows_and_looks_at_the_image_without_its_padding(variables, monkeypatch):
    mine = {**crf.PARAMETERS["pydensecrf"], "iterations": 2, "method": "exact"}
    monkeypatch.setitem(crf.PARAMETERS, "mine", mine)
    image = _image(18, 20)
    image[:, :, 10:] //= 4
    grown = np.pad(image, [(0, 0), (0, 6), (0, 4), (0, 0)], mode="symmetric")
    said = _run(_config(), variables, grown)["logits"][0, :18, :20]
    expected = crf.mean_field(-jax.nn.log_softmax(said), image[0], **mine)
    out = _run(_config({"crf": "mine"}), variables, grown, extent=np.array([[18, 20]]))
    cut = {k: v[:, :18, :20] if v.ndim > 1 else v for k, v in out.items()}
    _agree(cut, np.asarray(expected)[None], atol=1e-4)
    assert (cut["semantic"][0] != said.argmax(-1)).any()


def test_a_crf_needs_colours():
    config = _config({"crf": "pydensecrf"})
    config.data.channels, config.data.mean, config.data.std = 2, (0.0, 0.0), (1.0, 1.0)
    with pytest.raises(InputError, match="data.channels is 2: needs 1 or 3"):
        make_infer(config)


MINE = dict(
    w_bilateral=4.0, sigma_xy=9.0, sigma_rgb=20.0, w_gaussian=2.0, sigma_gamma=2.0, iterations=2
)


def _file(folder, **changes) -> str:
    given = {**MINE, "method": "exact", "mIoU": 0.5, "images": 3, **changes}
    given = {key: value for key, value in given.items() if value != "gone"}
    (folder / "best.json").write_text(json.dumps(given))
    return str(folder / "best.json")


def test_a_crf_may_be_a_file_of_its_parameters(variables, tmp_path):
    image = _image(10, 12)
    said = _run(_config(), variables, image)["logits"][0]
    expected = crf.mean_field(-jax.nn.log_softmax(said), image[0], method="exact", **MINE)
    config = _config({"crf": _file(tmp_path)})
    _agree(_run(config, variables, image), np.asarray(expected)[None], atol=1e-4)
    assert inference.settings(config)["crf"] == {**MINE, "method": "exact"}
    mu = (1 - np.eye(K)).tolist()
    each = {"w_gaussian": [2.0] * K, "compatibility": mu}
    config = _config({"crf": _file(tmp_path, **each)})
    _agree(_run(config, variables, image), np.asarray(expected)[None], atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"sigma_xyz": 3}, r"unknown CRF parameter in .*best\.json.*sigma_xy"),
        ({"sigma_xy": "gone"}, r"best\.json lacks sigma_xy"),
        ({"sigma_xy": "wide"}, "sigma_xy 'wide' has to be a number"),
        ({"sigma_rgb": 0}, "sigma_rgb 0 has to be a positive number"),
        ({"iterations": 2.5}, "iterations 2.5"),
        ({"normalization": "pixels"}, "pixels"),
        ({"w_gaussian": [1.0, 2.0]}, r"w_gaussian \(2,\) has to be a number or \(4,\)"),
        ({"compatibility": [[0, 1], [1, 0]]}, r"compatibility \(2, 2\)"),
    ],
)
def test_a_file_that_is_no_set_of_crf_parameters_is_refused(tmp_path, changes, expected):
    with pytest.raises(InputError, match=expected):
        make_infer(_config({"crf": _file(tmp_path, **changes)}))


@pytest.mark.parametrize(("content", "expected"), [("[1]", "no JSON object"), ("{", "no JSON")])
def test_a_file_that_is_no_json_object_is_refused(tmp_path, content, expected):
    (tmp_path / "best.json").write_text(content)
    with pytest.raises(InputError, match=expected):
        make_infer(_config({"crf": str(tmp_path / "best.json")}))
    with pytest.raises(InputError, match=r"no file .*none\.json"):
        make_infer(_config({"crf": str(tmp_path / "none.json")}))


@pytest.mark.slow
@pytest.mark.parametrize("method", crf.METHODS)
def test_a_crf_over_eight_devices_says_what_it_says_on_one(variables, tmp_path, method):
    config = _config({"crf": _file(tmp_path, method=method)})
    mesh, image = make_mesh(config.mesh), _image(10, 12, batch=16)
    extent = np.array([[10, 12], [9, 12]] * 8)
    alone = _run(config, variables, image, extent=extent)
    infer = jax.jit(make_infer(config, mesh), static_argnames="size")
    on_all = (jax.device_put(variables, replicated(mesh)), image)
    out = infer(*on_all, size=(10, 12), extent=extent)
    _agree(jax.device_get(out), _softmax(alone["logits"]), atol=1e-5)
    one = jax.device_get(infer(on_all[0], image[:1], size=(10, 12), extent=extent[:1]))
    _agree(one, _softmax(alone["logits"][:1]), atol=1e-5)
    jaxpr = str(jax.make_jaxpr(lambda v, x: make_infer(config, mesh)(v, x, (10, 12)))(*on_all))
    assert "shard_map" in jaxpr and "f32[2,10,12,4]" in jaxpr  # a device's share of the images


@pytest.mark.slow
def test_a_crf_takes_grey_as_a_colour(tmp_path):
    config = _config({"crf": _file(tmp_path)})
    config.data.update(channels=1, mean=(100.0,), std=(50.0,))
    model, _, _ = models.build(config)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 16, 16, 1)), train=False)
    variables = {"batch_stats": {}, **variables}
    image = _image(10, 12)[..., :1]
    without = config.copy_and_resolve_references()
    without.eval.crf = ""
    said = _run(without, variables, image)["logits"][0]
    colours = np.repeat(image[0], 3, axis=-1)
    expected = crf.mean_field(-jax.nn.log_softmax(said), colours, method="exact", **MINE)
    _agree(_run(config, variables, image), np.asarray(expected)[None], atol=1e-4)
