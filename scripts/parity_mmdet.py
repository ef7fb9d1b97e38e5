"""SOLO and SOLOv2 of MMDetection with random weights: what ours must compute too.

    python scripts/parity_mmdet.py tests/references/mmdet.npz   # stores what the tests compare with

As parity.py, whose random weights these are. Needs torch, mmdet and mmcv or mmcv-lite.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from parity import Absent, image, random_state, shapes_of

SIZE = (64, 96)
CLASSES = 5
# What is added to the bias of the categories: some 300 of them are then looked at.
ARCHS = {
    "solo_r18_fpn": -3.5,
    "decoupled-solo_r18_fpn": -3.5,
    "decoupled-solo-light_r18_fpn": -4.8,
    "solov2_r18_fpn": -5.2,
    "solov2-light_r18_fpn": -3.9,
}
# Class, top, left, bottom, right: ellipses, or boxes where the class is odd. Two share cells, one
# is large enough for two levels, one is cut off by the image's edge.
OBJECTS = (
    *((0, 2, 3, 20, 30), (1, 30, 40, 40, 47), (2, 28, 38, 46, 52), (3, 0, 20, 62, 92)),
    *((4, 50, 80, 64, 96), (0, 40, 2, 44, 9)),
)


def random_weights(arch, shapes):
    """Those of parity.py, with few categories of some probability; products of masks not empty."""
    state = random_state(shapes)
    state["mask_head.conv_cls.bias"] += np.float32(ARCHS[arch])
    for name in state:
        if name.startswith(("mask_head.conv_mask_list_x", "mask_head.conv_mask_list_y")):
            state[name] += np.float32(2.0 * name.endswith("bias"))
    return state


def objects():
    """(masks uint8 [N,H,W], classes int32 [N], boxes float32 [N,4]: y0, x0, y1, x1)."""
    y, x = np.mgrid[: SIZE[0], : SIZE[1]] + 0.5
    masks = []
    for kind, top, left, bottom, right in OBJECTS:
        v, u = (2 * y - top - bottom) / (bottom - top), (2 * x - left - right) / (right - left)
        masks.append(np.maximum(abs(u), abs(v)) < 1 if kind % 2 else u * u + v * v < 1)
    classes, *boxes = np.array(OBJECTS).T
    boxes = np.stack(boxes, 1).astype(np.float32)
    return np.array(masks, np.uint8), classes.astype(np.int32), boxes


def config(arch):
    """The keys of MMDetection's config of that name, for CLASSES classes."""
    depth = int(arch.split("_r")[1].split("_")[0])
    light, two = "light" in arch, arch.startswith("solov2")
    wide = ((1, 96), (48, 192), (96, 384), (192, 768), (384, 2048))
    if light:
        wide = ((1, 56), (28, 112), (56, 224), (112, 448), (224, 896))
        if not two:
            wide = ((1, 64), (32, 128), (64, 256), (128, 512), (256, 2048))
    norm = {"type": "GN", "num_groups": 32, "requires_grad": True}
    head = {
        **{"num_classes": CLASSES, "in_channels": 256, "strides": [8, 8, 16, 32, 32]},
        **{"scale_ranges": wide, "pos_scale": 0.2, "num_grids": [40, 36, 24, 16, 12]},
        **{"cls_down_index": 0, "norm_cfg": norm},
        "loss_mask": {"type": "DiceLoss", "use_sigmoid": True, "loss_weight": 3.0},
        "loss_cls": {"type": "FocalLoss", "use_sigmoid": True, "gamma": 2.0, "alpha": 0.25},
    }
    if two:
        feature = {"feat_channels": 128, "start_level": 0, "end_level": 3, "mask_stride": 4}
        feature |= {"out_channels": 128 if light else 256, "norm_cfg": norm}
        head |= {"type": "SOLOV2Head", "mask_feature_head": feature}
        head |= {"stacked_convs": 2 if light else 4, "feat_channels": 256 if light else 512}
    else:
        head |= {"stacked_convs": 4 if light else 7, "feat_channels": 256, "type": "SOLOHead"}
        if "decoupled" in arch:
            head["type"] = "DecoupledSOLOLightHead" if light else "DecoupledSOLOHead"
            head["loss_mask"]["activate"] = False
    test = {"nms_pre": 500, "score_thr": 0.1, "mask_thr": 0.5, "filter_thr": 0.05}
    test |= {"kernel": "gaussian", "sigma": 2.0, "max_per_img": 100}
    widths = [64, 128, 256, 512] if depth < 50 else [256, 512, 1024, 2048]
    return {
        "type": "SOLOv2" if two else "SOLO",
        "backbone": {"type": "ResNet", "depth": depth, "frozen_stages": 1},
        "neck": {"type": "FPN", "in_channels": widths, "out_channels": 256, "num_outs": 5},
        "mask_head": head,
        "test_cfg": test,
    }


def network(arch):
    """MMDetection's network with its random weights, in evaluation mode and in float64."""
    sys.modules.setdefault("mmcv._ext", Absent("mmcv._ext"))
    import mmdet.models  # noqa: F401
    import torch
    from mmdet.registry import MODELS
    from mmengine.config import ConfigDict
    from mmengine.registry import init_default_scope

    init_default_scope("mmdet")
    net = MODELS.build(ConfigDict(config(arch))).eval()
    state = random_weights(arch, shapes_of(net))
    net.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})
    return net.double()


def outputs(net):
    """(what `net` says of `image(SIZE)`, its objects, its losses), as the tests compare them."""
    import torch
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    x = torch.from_numpy(image(SIZE).transpose(0, 3, 1, 2)).double()
    meta = [{"img_shape": SIZE, "ori_shape": SIZE}]
    masks, classes, boxes = objects()
    truth = InstanceData(
        labels=torch.from_numpy(classes).long(),
        bboxes=torch.from_numpy(boxes[:, [1, 0, 3, 2]]).double(),
        masks=BitmapMasks(masks, *SIZE),
    )
    head = net.mask_head
    with torch.no_grad():
        levels = net.extract_feat(x)
        found = head.predict_by_feat(*head.forward(levels), batch_img_metas=meta)[0]
        head.train()
        raw = head.forward(levels)
        losses = head.loss_by_feat(*raw, [truth], meta)
        head.eval()
    arrays = {"losses": np.array([float(losses["loss_cls"]), float(losses["loss_mask"])])}
    *drawn, last = raw
    if type(head).__name__ == "SOLOV2Head":
        arrays["mask_features"] = channels_last(last)
        drawn, last = drawn[:1], drawn[1]
    names = {1: ("kernels",) if "mask_features" in arrays else ("masks",), 2: ("x", "y")}
    for name, values in zip((*names[len(drawn)], "categories"), (*drawn, last), strict=True):
        arrays |= {f"{name}{i}": channels_last(value) for i, value in enumerate(values, start=2)}
    kept = {key: getattr(found, key).numpy() for key in ("masks", "scores", "labels")}
    return {**arrays, **kept}


def channels_last(x):
    """[1,C,h,w] -> [h,w,C]."""
    return x[0].numpy().transpose(1, 2, 0)


def thinned(arrays):
    """A part that bites: every 17th channel of the outer levels, every 4th pixel of masks."""
    kept = {k: v[..., ::17] for k, v in arrays.items() if v.ndim == 3 and k[-1] not in "345"}
    kept = {k: v.astype(np.float32)[::3, ::3] for k, v in kept.items() if k != "masks"}
    kept |= {key: arrays[key] for key in ("scores", "labels", "losses")}
    return {**kept, "masks": arrays["masks"][:, ::4, ::4]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    stored = {}
    args = parser.parse_args()
    for arch in ARCHS:
        net = network(arch)
        stored[f"{arch} shapes"] = np.array(json.dumps(shapes_of(net)))
        values = thinned(outputs(net))
        stored |= {f"{arch} {key}": value for key, value in values.items()}
        print(arch, f"{len(values['scores'])} objects, losses {values['losses']}")
    args.output.parent.mkdir(exist_ok=True)
    np.savez_compressed(args.output, **stored)


if __name__ == "__main__":
    main()
