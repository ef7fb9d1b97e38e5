"""The networks of PyTorch libraries with random weights: what ours must compute too.

    python scripts/parity.py tests/references/parity.npz     # stores what the tests compare with

The tests compare live where these libraries are installed, and with the stored values elsewhere.
The weights come from the names alone, so that the file need not hold them. Needs torch, torchvision
and segmentation_models_pytorch, in any build; where mmsegmentation is installed too, its networks.
"""

import argparse
import json
import re
import sys
import zlib
from pathlib import Path
from types import ModuleType

import numpy as np

SIZES = ((64, 96), (65, 97))  # even and odd; smp takes the even one alone
CLASSES = 5
CASES = {
    "torchvision": (
        *("fcn_resnet50", "fcn_resnet101", "deeplabv3_resnet50", "deeplabv3_resnet101"),
        "deeplabv3_mobilenet_v3_large",
    ),
    "smp": (
        *("Unet/resnet18", "Unet/resnet50", "Unet/mobilenet_v2", "PSPNet/resnet50"),
        *("PSPNet/mobilenet_v2", "DeepLabV3/resnet50", "DeepLabV3/mobilenet_v2"),
        *("DeepLabV3Plus/resnet50", "DeepLabV3Plus/mobilenet_v2"),
    ),
    "mmseg": (
        *("fcn_r50-d8", "pspnet_r50-d8", "deeplabv3_r50-d8", "deeplabv3plus_r50-d8"),
        "unet-s5-d16_fcn",
    ),
}


# ImageNet networks of timm whose features are backbones of ours: ours, and fields that differ.
BACKBONES = {
    "resnet50d": ("resnet50", {"stem": "v1d"}),
    "xception41": ("xception41", {}),
    "xception65": ("xception65", {}),
    "mobilenetv2_100": ("mobilenetv2", {"last": 1280}),
    "mobilenetv3_large_100": ("mobilenetv3_large", {"epsilon": 1e-5}),
}


def image(size):
    """The input: float32 [1,H,W,3], normalised values."""
    return np.random.default_rng(0).standard_normal((1, *size, 3)).astype(np.float32)


def random_state(shapes, scales=()):
    """name -> float32 array, drawn from the name; norms with statistics that are not trivial.

    scales: (regex of a name, factor); the first that matches counts.
    """
    state = {}
    for name, shape in shapes.items():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        leaf = name.rpartition(".")[2]
        if leaf == "num_batches_tracked":
            state[name] = np.zeros(shape, np.int64)
            continue
        if len(shape) > 1:
            value = rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
        elif leaf in ("weight", "running_var"):
            value = rng.uniform(0.5, 1.5, shape)
        else:
            value = 0.1 * rng.standard_normal(shape)
        scale = next((s for pattern, s in scales if re.fullmatch(pattern, name)), 1)
        state[name] = (value * scale).astype(np.float32)
    return state


def sizes(source, arch):
    return SIZES[:1] if source == "smp" or arch.startswith("unet") else SIZES


def without_operators():
    """Lets torchvision be imported beside a torch that its compiled operators do not fit.

    While it is imported it registers shapes and gradients of these operators, which fails where
    they are not defined. No network here uses them, so those two modules may be empty.
    """
    import torch

    if not hasattr(torch.ops.torchvision, "nms"):
        for name in ("_meta_registrations", "_autograd_registrations"):
            sys.modules[f"torchvision.{name}"] = ModuleType(name)


def network(source, arch):
    """The library's network, in evaluation mode, for CLASSES classes."""
    if source == "torchvision":
        without_operators()
        from torchvision.models import segmentation

        options = {"weights": None, "weights_backbone": None, "aux_loss": True}
        return getattr(segmentation, arch)(num_classes=CLASSES, **options).eval()
    if source == "smp":
        without_operators()
        import segmentation_models_pytorch as smp

        name, encoder = arch.split("/")
        return getattr(smp, name)(encoder, encoder_weights=None, classes=CLASSES).eval()
    return mmseg(arch)


class Absent(ModuleType):
    """mmcv's compiled operators where they were not built: none of these networks calls one."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def mmseg(arch):
    """A network of MMSegmentation, from the keys of its configs."""
    sys.modules.setdefault("mmcv._ext", Absent("mmcv._ext"))
    import mmseg.models  # noqa: F401
    from mmengine.registry import init_default_scope
    from mmseg.registry import MODELS

    init_default_scope("mmseg")

    norm = {"type": "BN", "requires_grad": True}
    common = {"num_classes": CLASSES, "norm_cfg": norm, "align_corners": False}
    common |= {"dropout_ratio": 0.1, "loss_decode": {"type": "CrossEntropyLoss"}}
    deep = {"in_channels": 2048, "in_index": 3, "channels": 512, **common}
    heads = {
        "fcn": {"type": "FCNHead", "num_convs": 2, "concat_input": True, **deep},
        "pspnet": {"type": "PSPHead", "pool_scales": (1, 2, 3, 6), **deep},
        "deeplabv3": {"type": "ASPPHead", "dilations": (1, 12, 24, 36), **deep},
        "deeplabv3plus": {
            **{"type": "DepthwiseSeparableASPPHead", "dilations": (1, 12, 24, 36)},
            **{"c1_in_channels": 256, "c1_channels": 48},
            **deep,
        },
    }
    plain = {"type": "FCNHead", "num_convs": 1, "concat_input": False, **common}
    if arch.startswith("unet"):
        backbone = {"type": "UNet", "norm_cfg": norm, "in_channels": 3}
        head = {**plain, "in_channels": 64, "in_index": 4, "channels": 64}
        aux = {**plain, "in_channels": 128, "in_index": 3, "channels": 64}
    else:
        backbone = {
            **{"type": "ResNetV1c", "depth": 50, "norm_cfg": norm, "contract_dilation": True},
            **{"dilations": (1, 1, 2, 4), "strides": (1, 2, 1, 1)},
        }
        head = heads[arch.split("_")[0]]
        aux = {**plain, "in_channels": 1024, "in_index": 2, "channels": 256}
    parts = {"backbone": backbone, "decode_head": head, "auxiliary_head": aux}
    return MODELS.build({"type": "EncoderDecoder", **parts, "test_cfg": {"mode": "whole"}}).eval()


def shapes_of(net):
    return {name: tuple(value.shape) for name, value in net.state_dict().items()}


def fill(net):
    """Gives a network its random weights."""
    import torch

    state = random_state(shapes_of(net))
    net.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})
    return net


def logits(source, net, size):
    """What the library's network gives for `image(size)`, in float64: [H,W,K], at full size."""
    import torch

    x = torch.from_numpy(image(size).transpose(0, 3, 1, 2)).double()
    with torch.no_grad():
        y = full_size(source, net.double(), x)
    return y[0].numpy().transpose(1, 2, 0).astype(np.float32)


def full_size(source, net, x):
    """Logits [B,K,H,W] at the size of x."""
    if source == "mmseg":
        import torch.nn.functional as F

        y = net.decode_head(net.extract_feat(x))
        return F.interpolate(y, size=x.shape[2:], mode="bilinear", align_corners=False)
    y = net(x)
    return y["out"] if isinstance(y, dict) else y


def backbone(name):
    """timm's network of that name with its random weights, in evaluation mode."""
    without_operators()
    import timm

    return fill(timm.create_model(name, pretrained=False).eval())


def features(net, size):
    """Its last features for `image(size)`, in float64: [h,w,C]."""
    import torch

    x = torch.from_numpy(image(size).transpose(0, 3, 1, 2)).double()
    with torch.no_grad():
        y = net.double().forward_features(x)
    return y[0].numpy().transpose(1, 2, 0).astype(np.float32)


def training_step(source, net, size):
    """(loss, name -> gradient) of one step in training mode, without dropout, in float64.

    The loss is cross entropy with ignored pixels, of the logits and, times 0.4, the auxiliary ones.
    """
    import torch
    import torch.nn.functional as F

    net = net.double().train()
    for module in net.modules():
        if isinstance(module, torch.nn.Dropout | torch.nn.Dropout2d):
            module.p = 0.0
    x = torch.from_numpy(images(size).transpose(0, 3, 1, 2)).double()
    label = torch.from_numpy(labels(size)).long()
    if source == "mmseg":
        levels = net.extract_feat(x)
        outputs = [net.decode_head(levels), net.auxiliary_head(levels)]
        scale = {"size": x.shape[2:], "mode": "bilinear", "align_corners": False}
        outputs = [F.interpolate(y, **scale) for y in outputs]
    else:
        y = net(x)
        outputs = [y["out"], y["aux"]] if isinstance(y, dict) else [y]
    losses = [F.cross_entropy(y, label, ignore_index=255) for y in outputs]
    loss = sum(weight * value for weight, value in zip((1.0, 0.4), losses, strict=False))
    loss.backward()
    grads = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    return float(loss.detach()), {name: grad.numpy() for name, grad in grads.items()}


def images(size):
    """A batch of four: float32 [4,H,W,3]."""
    return np.random.default_rng(1).standard_normal((4, *size, 3)).astype(np.float32)


def labels(size):
    """int32 [4,H,W] of classes and 255."""
    label = np.random.default_rng(2).integers(0, CLASSES + 1, (4, *size))
    return np.where(label == CLASSES, 255, label).astype(np.int32)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    sources = [*CASES, "timm"]
    parser.add_argument("--source", choices=sources, nargs="+", default=sources)
    args = parser.parse_args()
    stored = dict(np.load(args.output, allow_pickle=False)) if args.output.exists() else {}
    for name in BACKBONES if "timm" in args.source else ():
        net = backbone(name)
        stored[f"timm {name} shapes"] = np.array(json.dumps(shapes_of(net)))
        stored[f"timm {name}"] = features(net, SIZES[1])[..., ::64]  # every 64th channel
        print("timm", name, f"largest {np.abs(stored[f'timm {name}']).max():.3g}")
    for source in [source for source in args.source if source in CASES]:
        for arch in CASES[source]:
            net = fill(network(source, arch))
            stored[f"{source} {arch} shapes"] = np.array(json.dumps(shapes_of(net)))
            for size in sizes(source, arch):
                value = logits(source, net, size)[::13, ::13]  # every 13th pixel is enough
                stored[f"{source} {arch} {size[0]}x{size[1]}"] = value
                print(source, arch, size, f"largest {abs(value).max():.3g}")
    args.output.parent.mkdir(exist_ok=True)
    np.savez_compressed(args.output, **stored)


if __name__ == "__main__":
    main()
