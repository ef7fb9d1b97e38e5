"""ImageNet classifiers of torchvision and timm, whose features are backbones here."""

import re

from jaxseg.weights.names import Rule, pair, resnet

# timm's MobileNets count blocks within stages: the number of each stage's first block here.
MOBILENET_STAGES = {
    "mobilenetv2": (1, 2, 4, 7, 11, 14, 17),
    "mobilenetv3_large": (1, 2, 4, 7, 11, 13),
}
# Names of what comes after the features: classifiers, and the last 1x1 convolution of MobileNets.
CLASSIFIERS = r"(fc|classifier|head|last_linear|conv_head|bn2)(\..*)?\.\w+"
LAST = r"features\.18\..*"  # torchvision's MobileNetV2 has it among the features
# Modules of Xception's entry and middle flow; timm counts all on.
XCEPTION_FLOWS = {"xception41": (3, 8), "xception65": (3, 16), "xception71": (5, 16)}


def rules(name: str, prefix: str = "") -> list[Rule]:
    """How the modules of the backbone `name` (ours, such as "resnet50") are called here, in files
    of either library. prefix: regex of what stands before every name."""
    if name in ("vgg16", "vgg16_bn"):
        return vgg(name, prefix)
    timm = []
    if name in XCEPTION_FLOWS:
        timm = xception(*XCEPTION_FLOWS[name], prefix)
    if name in MOBILENET_STAGES:
        timm = timm_mobilenet(MOBILENET_STAGES[name], prefix)
    return [*timm, *torchvision(prefix)]


def torchvision(prefix: str = "", ours: str = "backbone/") -> list[Rule]:
    """torchvision's ResNets (timm's and others' have the same names) and MobileNets."""
    return [*resnet(prefix, ours), *torchvision_mobilenet(prefix, ours)]


def torchvision_mobilenet(prefix: str, ours: str) -> list[Rule]:
    """V2 counts the layers of a block in "conv", V3 in "block"; both have the stem at 0.

    Of a block's layers, the first is the expansion, but for the block without one; then follow the
    depthwise convolution, in V3 perhaps squeeze-and-excitation, and the projection.
    """
    squeezed = {4, 5, 6, 11, 12, 13, 14, 15}  # V3's blocks with squeeze-and-excitation

    def layer(match: re.Match) -> str:
        number, kind, index = int(match[1]), match[2], int(match[3])
        layers = ["expand"] * (number > 1) + ["depthwise"]
        layers += ["squeeze"] * (kind == "block" and number in squeezed) + ["project"]
        path, rest = f"{ours}block{number}", match[4]
        if kind == "conv" and index >= len(layers) - 1:  # V2's projection is not wrapped
            return f"{path}/project/{('conv', 'norm')[index - len(layers) + 1]}"
        if layers[index] == "squeeze":
            return f"{path}/squeeze/{ {'fc1': 'reduce', 'fc2': 'expand'}[rest] }"
        if layers[index] == "depthwise":
            return f"{path}/{('depthwise', 'norm')[int(rest)]}"
        return f"{path}/{layers[index]}/{('conv', 'norm')[int(rest)]}"

    block = rf"{prefix}(?:features\.)?([1-9]|1[0-7])\.(conv|block)\.(\d)(?:\.(\w+))?"
    return [
        *pair(rf"{prefix}(?:features\.)?0", f"{ours}stem"),
        (block, layer),
        *pair(rf"{prefix}(?:features\.)?1[678]", f"{ours}last"),
    ]


def timm_mobilenet(stages: tuple[int, ...], prefix: str) -> list[Rule]:
    """A block is conv_pw, conv_dw, conv_pwl; the first, which does not expand, conv_dw, conv_pw."""
    first = {
        "conv_dw": "depthwise",
        "bn1": "norm",
        "conv_pw": "project/conv",
        "bn2": "project/norm",
    }
    other = {
        **{"conv_pw": "expand/conv", "bn1": "expand/norm", "conv_dw": "depthwise", "bn2": "norm"},
        **{"conv_pwl": "project/conv", "bn3": "project/norm"},
        **{"se.conv_reduce": "squeeze/reduce", "se.conv_expand": "squeeze/expand"},
    }

    def layer(match: re.Match) -> str:
        stage, index, name = int(match[1]), int(match[2]), match[3]
        if stage == len(stages):  # V3's last convolution stands where a stage would
            return f"backbone/last/{'conv' if name == 'conv' else 'norm'}"
        number = stages[stage] + index
        return f"backbone/block{number}/{(first if number == 1 else other)[name]}"

    rules = [
        (rf"{prefix}conv_stem", "backbone/stem/conv"),
        (rf"{prefix}bn1", "backbone/stem/norm"),
        (rf"{prefix}blocks\.(\d)\.(\d)\.(conv\w*|bn\d|se\.conv_\w+)", layer),
    ]
    if len(stages) == 7:  # V2; V3's conv_head is a part of its classifier
        rules.append((rf"{prefix}conv_head", "backbone/last/conv"))
        rules.append((rf"{prefix}bn2", "backbone/last/norm"))
    return rules


def xception(entry: int, middle: int, prefix: str) -> list[Rule]:
    """timm's aligned Xception; entry, middle: the modules of these flows."""
    layers = {
        **{"conv_dw": "depthwise", "bn_dw": "inner_norm"},
        **{"conv_pw": "pointwise/conv", "bn_pw": "pointwise/norm"},
    }

    def module(number: int) -> str:
        if number < entry:
            return f"backbone/entry{number + 1}"
        if number < entry + middle:
            return f"backbone/middle{number - entry + 1}"
        return f"backbone/exit{number - entry - middle + 1}"

    def separable(match: re.Match) -> str:
        return f"{module(int(match[1]))}/separable{match[2]}/{layers[match[3]]}"

    def shortcut(match: re.Match) -> str:
        return f"{module(int(match[1]))}/shortcut/{ {'conv': 'conv', 'bn': 'norm'}[match[2]] }"

    def stem(match: re.Match) -> str:
        return f"backbone/stem{int(match[1]) + 1}/{ {'conv': 'conv', 'bn': 'norm'}[match[2]] }"

    return [
        (rf"{prefix}stem\.([01])\.(conv|bn)", stem),
        (rf"{prefix}blocks\.(\d+)\.stack\.conv([123])\.(\w+)", separable),
        (rf"{prefix}blocks\.(\d+)\.shortcut\.(conv|bn)", shortcut),
    ]


def vgg(name: str, prefix: str) -> list[Rule]:
    """torchvision counts all layers, poolings and ReLUs too; fc6 and fc7 are its classifier's."""
    convs, index, step = [], 0, 3 if name.endswith("bn") else 2
    for stage, units in enumerate((2, 2, 3, 3, 3), start=1):
        for unit in range(1, units + 1):
            convs += [(index, f"backbone/conv{stage}_{unit}")]
            index += step
        index += 1  # the pooling

    return [
        *[(rf"{prefix}features\.{i}", f"{path}/conv") for i, path in convs],
        *[(rf"{prefix}features\.{i + 1}", f"{path}/norm") for i, path in convs if step == 3],
        (rf"{prefix}classifier\.0", "fc6"),
        (rf"{prefix}classifier\.3", "fc7"),
    ]
