"""torchvision's Mask R-CNN with random weights: what ours must compute too.

    python scripts/parity_detection.py tests/references/detection.npz

As parity.py does for semantic networks; needs torch and torchvision in any build.
"""

import argparse
import importlib
import json
from functools import partial
from pathlib import Path

import numpy as np
from parity import random_state, shapes_of, without_operators

SIZE = (90, 120)  # no multiples of 32: filled up to 96 x 128
SMALLER = (52, 69)  # resized by 90/52 and 119/69, to be seen at 90 x 119
# Few boxes, and the scores of random weights.
LIMITS = {
    **{"rpn_pre_nms_top_n_test": 100, "rpn_post_nms_top_n_test": 60, "box_score_thresh": 0.03},
    **{"box_detections_per_img": 30, "min_size": min(SIZE), "max_size": max(SIZE)},
}
ARCHS = ("small", "maskrcnn_resnet50_fpn")  # small: a ResNet-18 with narrow heads, six classes
CANONICAL = 16  # of `small`: boxes of all four levels, where 224 would leave the finest alone
# Drawn smaller, so that no number explodes: boxes of the size of their anchors, several classes.
SCALES = (
    *((r".*bbox_pred\.\w+", 0.1), (r".*cls_score\.weight", 0.5)),
    *((r".*bn[23]\.weight", 0.25), (r".*(inner|layer)_blocks.*weight", 0.5)),
)


def images(size=SIZE):
    """Two of them, float64 [2,H,W,3], 0..1."""
    return np.random.default_rng(0).random((2, *size, 3))


def random_weights(shapes):
    """Those of parity.py, drawn as SCALES says."""
    return random_state(shapes, SCALES)


def torchvision():
    """The library, with its compiled operators in Python where they do not fit the torch here."""
    without_operators()
    import torchvision

    align = importlib.import_module("torchvision.ops.roi_align")
    align._roi_align = getattr(align._roi_align, "__wrapped__", align._roi_align)  # uncompiled
    importlib.import_module("torchvision.ops.boxes").nms = nms
    return torchvision


def nms(boxes, scores, threshold):
    """Greedy: indices of what stays, best first."""
    import torch

    order, stays = torch.argsort(scores, descending=True, stable=True).tolist(), []
    for i in order:
        low, high = (f(boxes[i], boxes[stays]) for f in (torch.maximum, torch.minimum))
        both = (high[:, 2:] - low[:, :2]).clamp(min=0).prod(1)
        area = [(b[..., 2:] - b[..., :2]).prod(-1) for b in (boxes[i], boxes[stays])]
        if not (both / (area[0] + area[1] - both) > threshold).any():
            stays.append(i)
    return torch.tensor(stays, dtype=torch.long)


def network(arch):
    """In evaluation mode, float64, with its random weights."""
    import torch

    models = torchvision().models
    detection, options = models.detection, {"weights": None, "weights_backbone": None}
    if arch == "small":
        parts = detection.backbone_utils, detection.mask_rcnn, detection.faster_rcnn
        body = models.resnet18(weights=None)
        pyramid = parts[0].BackboneWithFPN(
            body, {f"layer{i}": str(i - 1) for i in range(1, 5)}, [64, 128, 256, 512], 32
        )
        pool = partial(parts[2].MultiScaleRoIAlign, list("0123"), canonical_scale=CANONICAL)
        net = parts[1].MaskRCNN(
            pyramid,
            **LIMITS,
            box_roi_pool=pool(output_size=7, sampling_ratio=2),
            mask_roi_pool=pool(output_size=14, sampling_ratio=2),
            rpn_anchor_generator=detection.anchor_utils.AnchorGenerator(
                tuple((s,) for s in (16, 32, 64, 128, 256)), ((0.5, 1.0, 2.0),) * 5
            ),
            box_head=parts[2].TwoMLPHead(32 * 49, 64),
            box_predictor=parts[2].FastRCNNPredictor(64, 6),
            mask_head=parts[1].MaskRCNNHeads(32, (32, 32), 1),
            mask_predictor=parts[1].MaskRCNNPredictor(32, 32, 6),
        )
    else:
        net = getattr(detection, arch)(**options, **LIMITS)
        detection._utils.overwrite_eps(net, 0.0)  # as for its published weights
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eps = 0.0
    state = random_weights(shapes_of(net))
    net.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})
    return net.double().eval()


def run(net):
    """What the network computes on the way and finds: name -> array, boxes as (y0, x0, y1, x1)."""
    import torch

    given, smaller = (
        [torch.from_numpy(image.transpose(2, 0, 1)) for image in images(size)]
        for size in (SIZE, SMALLER)
    )
    with torch.no_grad():
        batch, _ = net.transform(given)
        levels = net.backbone(batch.tensors)
        objectness, codes = net.rpn.head(list(levels.values()))
        proposals, _ = net.rpn(batch, levels)
        rois = net.roi_heads.box_roi_pool(levels, proposals, batch.image_sizes)
        logits, _ = net.roi_heads.box_predictor(net.roi_heads.box_head(rois))
        found, resized = net(given), net(smaller)
    last = {key: value.numpy().transpose(0, 2, 3, 1) for key, value in levels.items()}
    counts = [len(x) for x in proposals]
    results = {
        "p2": last["0"],
        "p5": last["3"],
        "p6": last["pool"],
        "objectness": flat(objectness, 1),
        "codes": flat(codes, 4),
        "proposals": padded([x[:, [1, 0, 3, 2]] for x in proposals], 60),
        "rois": padded([x.permute(0, 2, 3, 1) for x in rois.split(counts)], 60),
        "logits": padded(logits.split(counts), 60),
        **objects(found),
        **{f"resized {key}": value for key, value in objects(resized).items()},
    }
    return {key: x.astype(np.float32) if x.dtype == np.float64 else x for key, x in results.items()}


def objects(found):
    """What the network finds in both images."""
    return {
        "boxes": padded([x["boxes"][:, [1, 0, 3, 2]] for x in found], 30),
        "scores": padded([x["scores"] for x in found], 30),
        "labels": padded([x["labels"] for x in found], 30).astype(np.int32),
        "masks": padded([x["masks"][:, 0] > 0.5 for x in found], 30).astype(bool),
    }


def flat(levels, width):
    """Outputs of a head on all levels [B,A*width,h,w] -> [B,N,width], row by row."""
    rows = [x.numpy().transpose(0, 2, 3, 1).reshape(len(x), -1, width) for x in levels]
    return np.concatenate(rows, axis=1)


def padded(each, slots):
    """Arrays [n,..] of the images -> [B,slots,..], zero where there is none."""
    rows = [x.numpy() for x in each]
    return np.stack([np.pad(x, [(0, slots - len(x))] + [(0, 0)] * (x.ndim - 1)) for x in rows])


# How much of each result is stored.
PARTS = {
    "p2": np.s_[:, ::5, ::5, ::16],
    "p5": np.s_[..., ::16],
    "p6": np.s_[..., ::16],
    "objectness": np.s_[:, ::41],
    "codes": np.s_[:, ::41],
    "rois": np.s_[:, ::9, ::3, ::3, ::16],
    "logits": np.s_[:, ::7],
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    output, stored = parser.parse_args().output, {}
    for arch in ARCHS:
        net = network(arch)
        stored[f"{arch} shapes"] = np.array(json.dumps(shapes_of(net)))
        for key, value in run(net).items():
            value = value[PARTS[key]] if key in PARTS else value
            stored[f"{arch} {key}"] = np.packbits(value) if key.endswith("masks") else value
            print(arch, key, value.shape, f"largest {np.abs(value).max():.3g}")
    np.savez_compressed(output, **stored)


if __name__ == "__main__":
    main()
