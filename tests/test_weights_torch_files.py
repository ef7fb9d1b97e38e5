"""What torch.save writes: every number right, whatever lies around the weights.

The files are written here byte by byte; where torch is installed, also by torch.save.
"""

import argparse
import io
import pickle
import sys
import types
from collections import OrderedDict
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from weight_files import (
    ARRAY,
    EXPECTED,
    FLAT,
    NUMBERS,
    TYPES,
    Call,
    Name,
    Stored,
    as_numpy,
    assert_same,
    dump,
    layouts,
    ordered,
    save,
    save_stream,
    tensor,
    values_of,
)

from jaxseg.errors import InputError
from jaxseg.weights.files import read

STORAGES = {
    **{"Double": "float64", "Float": "float32", "Half": "float16", "Long": "int64", "Int": "int32"},
    **{"Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool"},
    **{"ComplexFloat": "complex64", "ComplexDouble": "complex128"},
}


@pytest.mark.parametrize("order", ["little", "big"])
@pytest.mark.parametrize("kind", STORAGES)
def test_a_torch_zip_of_every_type(tmp_path, kind, order):
    values = values_of(STORAGES[kind])
    raw = values.astype(values.dtype.newbyteorder("<" if order == "little" else ">")).tobytes()
    tree = ordered(w=tensor("0", 6, (2, 3), kind=f"{kind}Storage"))
    path = save(tmp_path / "w.pth", dump(tree), {"0": raw}, byteorder=order.encode())
    assert_same(read(path), {"w": values})


@pytest.mark.parametrize("order", ["little", "big"])
def test_a_torch_zip_of_bfloat16(tmp_path, order):
    codes = np.arange(2**16, dtype=np.uint16)
    raw = codes.astype("<u2" if order == "little" else ">u2").tobytes()
    tree = {"w": tensor("0", 2**16, (2**16,), kind="BFloat16Storage")}
    path = save(tmp_path / "w.pt", dump(tree), {"0": raw}, byteorder=order.encode())
    assert_same(read(path), {"w": codes.view(ml_dtypes.bfloat16).astype(np.float32)})


def test_types_without_a_storage_of_their_own(tmp_path):
    values = np.array([1, 65535, 300], np.uint16)
    place = ("storage", Name("torch.storage UntypedStorage"), "0", "cpu", 6)
    rest = (1, (2,), (1,), False, ordered(), Name("torch uint16"), None)
    tree = {"w": Call(Name("torch._utils _rebuild_tensor_v3"), (Stored(place), *rest))}
    path = save(tmp_path / "w.pth", dump(tree), {"0": values.tobytes()})
    assert_same(read(path), {"w": values[1:]})


LAYOUTS = {  # shape, strides, offset: the same by numpy
    "whole": (((2, 3, 4), (12, 4, 1), 0), NUMBERS.reshape(2, 3, 4)),
    "part": (((5,), (1,), 7), NUMBERS[7:12]),
    "transposed": (((4, 6), (1, 4), 0), NUMBERS.reshape(6, 4).T),
    "channels_last": (
        ((2, 3, 2, 2), (12, 1, 6, 3), 0),
        NUMBERS.reshape(2, 2, 2, 3).transpose(0, 3, 1, 2),
    ),
    "every_second": (((3, 4), (8, 2), 1), NUMBERS.reshape(3, 8)[:, 1::2]),
    "windows": (((3, 4), (1, 2), 2), np.lib.stride_tricks.as_strided(NUMBERS[2:], (3, 4), (4, 8))),
    "scalar": (((), (), 23), NUMBERS[23].reshape(())),
    "empty": (((0, 3), (3, 1), 24), NUMBERS[:0].reshape(0, 3)),
}


@pytest.mark.parametrize("form", ["zip", "stream"])
def test_strides_offsets_and_shared_storages(tmp_path, form):
    legacy = form == "stream"
    tree = {n: tensor("k", 24, *layout, legacy=legacy) for n, (layout, _) in LAYOUTS.items()}
    path = tmp_path / "w.pth"
    if legacy:
        other = np.arange(3, dtype=np.int64)
        tree["steps"] = tensor("j", 3, (3,), kind="LongStorage", legacy=True)
        save_stream(path, ordered(**tree), {"j": other, "k": NUMBERS})
    else:
        save(path, dump(ordered(**tree)), {"k": NUMBERS.tobytes()})
    expected = {name: array for name, (_, array) in LAYOUTS.items()}
    if legacy:
        expected["steps"] = other
    weights = read(path)
    assert_same(weights, expected)
    assert np.shares_memory(weights["whole"], weights["transposed"])


HISTORY = Call(Name("mmengine.logging.history_buffer HistoryBuffer"), ())
META = {  # what mmsegmentation writes: plain values
    "config": "model = dict(type='EncoderDecoder')",
    "CLASSES": ["road", "sky"],
    "PALETTE": [[128, 64, 128], [70, 130, 180]],
    "epoch": 12,
    "lr": 0.01,
    "shape": (512, 1024),
    "hooks": {"a": None, "b": True, 3: "three"},
}


@pytest.mark.parametrize(
    "tree",
    [
        FLAT,
        ordered(**FLAT),
        {"module." + name: value for name, value in FLAT.items()},
        {**FLAT, "version": 3, "note": "text", "nothing": None},
        {"state_dict": ordered(**FLAT), "meta": META, "optimizer": {"state": {0: FLAT}}},
        {"meta": META, "model": ordered(**FLAT), "epoch": 3, "best": tensor("0", 24, ())},
        {"model_state": {"module." + name: value for name, value in FLAT.items()}},
        {"model": {"state_dict": FLAT}},
        {"model": FLAT, "args": Call(Name("argparse Namespace"), ())},
        {"state_dict": FLAT, "message_hub": [HISTORY, ARRAY, Name("torch float32")]},
        {"state_dict": {n: Call(Name("torch._utils _rebuild_parameter"), (v, True, ordered()))
                        for n, v in FLAT.items()}},
        {n: Call(Name("torch.nn.parameter Parameter"), (v, True)) for n, v in FLAT.items()},
        {n: Call(Name("torch._utils _rebuild_tensor"), v.args[:4]) for n, v in FLAT.items()},
    ],
)  # fmt: skip
def test_checkpoints_are_unwrapped(tmp_path, tree):
    path = save(tmp_path / "w.ckpt", dump(tree), {"0": NUMBERS.tobytes()})
    assert_same(read(path), EXPECTED)


def test_module_stays_where_not_every_name_has_it(tmp_path):
    tree = {"module.a": FLAT["a.weight"], "b": FLAT["b.bias"]}
    path = save(tmp_path / "w.bin", dump(tree), {"0": NUMBERS.tobytes()})
    assert list(read(path)) == ["module.a", "b"]


def test_only_the_storages_of_the_weights_are_read(tmp_path):
    tree = {"model": FLAT, "optimizer": {"momentum": tensor("absent", 9, (9,))}}
    path = save(tmp_path / "w.pth", dump(tree), {"0": NUMBERS.tobytes()})
    assert_same(read(path), EXPECTED)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol(tmp_path, monkeypatch, protocol):
    """By Python's own pickler, which memoises, with modules of torch's names."""

    class FloatStorage:
        pass

    def _rebuild_tensor_v2(*args):
        raise AssertionError("nothing is called")

    class Tensor:
        def __init__(self, *args):
            self.args = args

        def __reduce__(self):
            return _rebuild_tensor_v2, (*self.args, False, OrderedDict())

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", FloatStorage, "0", "cpu", 24) if value is storage else None

    for name, value in {"torch": FloatStorage, "torch._utils": _rebuild_tensor_v2}.items():
        module = types.ModuleType(name)
        value.__module__, value.__qualname__ = name, value.__name__
        setattr(module, value.__name__, value)
        monkeypatch.setitem(sys.modules, name, module)
    storage, state = object(), OrderedDict()
    state["a.weight"], state["b.bias"] = (
        Tensor(storage, 0, (4, 6), (6, 1)),
        Tensor(storage, 6, (6,), (1,)),
    )
    state._metadata = {"": {"version": 1}}
    again = [2**40, -1, 2.5, b"\0\xff", {1, 2}, "text" * 100, None, True]
    buffer = io.BytesIO()
    Pickler(buffer, protocol).dump({"meta": again, "again": again, "state_dict": state})
    path = save(tmp_path / "w.pth", buffer.getvalue(), {"0": NUMBERS.tobytes()})
    assert_same(read(path), EXPECTED)


def _assert_as_torch(path: Path, tensors: dict) -> None:
    weights = read(path)
    assert list(weights) == list(tensors)
    for name, value in tensors.items():
        theirs = as_numpy(value)
        assert weights[name].dtype == theirs.dtype and weights[name].shape == theirs.shape, name
        np.testing.assert_array_equal(weights[name], theirs)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "stream"])
@pytest.mark.parametrize("dtype", TYPES)
def test_torch_save_of_every_type_and_layout(tmp_path, dtype, zipped):
    torch = pytest.importorskip("torch")
    tensors = layouts(torch, dtype)
    path = tmp_path / "w.pth"
    torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
    _assert_as_torch(path, tensors)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_torch_save_of_a_training_run(tmp_path, protocol):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    optimiser = torch.optim.Adam(net.parameters())
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, [2, 5])
    net(torch.randn(2, 3, 8, 8)).sum().backward()
    optimiser.step()
    schedule.step()
    wrapped = torch.nn.DataParallel(net)
    args = argparse.Namespace(lr=0.1, device=torch.device("cpu"))
    checkpoint = {
        "model": wrapped.state_dict(),
        "optimizer": optimiser.state_dict(),
        "lr_scheduler": schedule.state_dict(),
        "history": [np.float64(0.5), np.arange(3.0)],
        "args": args,
        "size": torch.zeros(2, 3).shape,
    }
    torch.save(checkpoint, tmp_path / "w.pth", pickle_protocol=protocol)
    _assert_as_torch(tmp_path / "w.pth", net.state_dict())
    torch.save(dict(net.named_parameters()), tmp_path / "p.pth", pickle_protocol=protocol)
    _assert_as_torch(tmp_path / "p.pth", dict(net.named_parameters()))


def test_what_torch_can_save_and_is_refused(tmp_path):
    torch = pytest.importorskip("torch")
    net, path = torch.nn.Linear(2, 3), tmp_path / "w.pth"
    for value, words in (
        (net, r"names torch\.nn\.modules\.linear\.Linear"),
        ({"w": torch.zeros(1).expand(5)}, r"contiguous\(\)"),
        ({"w": torch.eye(2).to_sparse()}, "_rebuild_sparse_tensor"),
        (torch.zeros(3), "no tensors by name"),
    ):
        torch.save(value, path)
        with pytest.raises(InputError, match=words):
            read(path)
