"""Recipes: numbers against their sources, dropout where it is, and arguments that do not apply."""

import flax.linen as nn
import pytest
from networks import EXPERIMENTS, experiment, trace

from jaxseg import config as configs
from jaxseg import models
from jaxseg.backbones.layers import Conv
from jaxseg.errors import InputError
from jaxseg.evaluate import open_source
from jaxseg.experiment import resolve


def load(arguments, *overrides):
    name, _, rest = arguments.partition(":")
    return resolve(str(EXPERIMENTS / name) + (f":{rest}" if rest else ""), list(overrides))


def test_pspnet_of_mmsegmentation_is_its_annotated_configuration_number_by_number():
    """pspnet_r50-d8_4xb2-40k_cityscapes-512x1024.py with all that it inherits."""
    config = load("pspnet.py:recipe=mmseg")
    model, data, optim = config.model, config.data, config.optim
    assert model.backbone.to_dict() == {
        **{"name": "resnet50", "depth": 50, "stem": "v1c"},  # ResNetV1c, depth=50
        **{"output_stride": 8, "strides": "pytorch"},  # strides (1,2,1,1), dilations (1,1,2,4)
        **{"contract": True, "multi_grid": (1, 1, 1), "absolute_grid": False},
        **{"hybrid": (), "second_rate": False, "ceil_mode": False},
        "norm": {"kind": "batch", "momentum": 0.9, "epsilon": 1e-5, "frozen": False, "groups": 32},
    }
    # PSPHead: in_index=3, channels=512, pool_scales=(1, 2, 3, 6), dropout_ratio=0.1
    assert (model.source, model.features, model.bins) == ("c5", 512, (1, 2, 3, 6))
    assert (model.pooled, model.kernel, model.classifier_kernel) == (0, 3, 1)  # 0: 2048 / 4 = 512
    assert (model.dropout, model.channel_dropout, model.norm_single) == (0.1, True, True)
    # FCNHead: in_index=2, channels=256, num_convs=1, dropout_ratio=0.1, loss_weight=0.4
    assert (model.aux_on, model.aux, model.aux_dropout) == ("c4", 256, 0.1)
    assert config.loss.aux_weight == 0.4 and not model.align_corners
    assert config.loss.pixel.name == "cross_entropy"
    assert config.loss.pixel.reduction == "mean_all"  # avg_non_ignore=False
    assert data.dataset == "cityscapes" and model.num_classes == 19
    assert data.mean == (123.675, 116.28, 103.53) and data.std == (58.395, 57.12, 57.375)
    # RandomResize(scale=(2048, 1024), ratio_range=(0.5, 2.0)), RandomCrop(cat_max_ratio=0.75)
    assert data.resize == (2048, 1024) and data.scale == (0.5, 2.0) and data.scale_step == 0.0
    assert data.crop == (512, 1024) and data.cat_max_ratio == 0.75
    assert data.flip and not data.flip_vertical  # RandomFlip(prob=0.5)
    # PhotoMetricDistortion: brightness 32, contrast and saturation 0.5 to 1.5 are not to be set;
    # hue_delta=18 counts OpenCV's hues, two degrees each.
    assert data.photometric and data.hue == 36.0
    # SGD(lr=0.01, momentum=0.9, weight_decay=0.0005), no clipping
    assert (optim.name, optim.lr, optim.momentum, optim.weight_decay) == ("sgd", 0.01, 0.9, 5e-4)
    assert optim.decay_all and optim.clip == 0.0 and optim.multipliers == () and optim.drops == ()
    # PolyLR(eta_min=1e-4, power=0.9, begin=0, end=40000), no warm-up
    assert (optim.power, optim.min_lr, optim.warmup) == (0.9, 1e-4, 0)
    assert config.train.steps == 40_000 and config.train.batch == 8  # 4 devices of 2
    assert config.train.eval_every == config.train.checkpoint_every == 4_000
    assert config.eval.mode == "whole" and config.eval.scales == (1.0,) and not config.eval.flip
    slide = load("pspnet.py:recipe=mmseg", ("eval.mode", "slide"), ("eval.stride", "(341,683)"))
    assert slide.eval.mode == "slide"


def layers(model):
    """Dropouts that drop, as (rate, axes that share a draw), and the names of convolutions."""
    found = []

    def note(run, args, kwargs, context):
        module = context.module
        if context.method_name == "__call__" and isinstance(module, nn.Dropout) and module.rate:
            found.append((module.rate, tuple(module.broadcast_dims)))
        if context.method_name == "__call__" and isinstance(module, Conv):
            found.append("/".join(module.path))
        return run(*args, **kwargs)

    with nn.intercept_methods(note):
        trace(model, (64, 64))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "main", "aux"),
    [
        ("fcn", "head/classifier", "aux/classifier"),
        ("pspnet", "classifier", "aux/classifier"),
        ("deeplabv3", "classifier", "aux/classifier"),
        ("deeplabv3plus", "classifier", "aux/classifier"),
        ("unet", "classifier", "aux_classifier"),
    ],
)
def test_mmsegmentation_drops_channels_just_before_both_classifiers_and_nowhere_else(
    name, main, aux
):
    """BaseDecodeHead.cls_seg: Dropout2d(0.1), then conv_seg."""
    found = layers(experiment(name, "recipe=mmseg,num_classes=5"))
    drops = [i for i, entry in enumerate(found) if isinstance(entry, tuple)]
    assert [found[i] for i in drops] == [(0.1, (1, 2))] * 2
    assert [found[i + 1] for i in drops] == [main, aux]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("pspnet.py:variant=same", "variant=same means nothing to pspnet.py: leave it out"),
        ("deeplabv3plus.py:variant=aspp", "variant=aspp means nothing to deeplabv3plus.py"),
        ("deeplabv3.py:recipe=smp,variant=cascade", "variant=cascade means nothing to recipe=smp"),
        ("deeplabv3.py:backbone=mobilenetv2,stem=deep", "nothing to backbone=mobilenetv2"),
        ("fcn.py:recipe=torchvision,variant=32s", "variant=32s means nothing to recipe"),
        ("fcn.py:recipe=mmseg,upsampling=all", "upsampling=all means nothing to recipe=mmseg"),
        ("fcn.py:output_stride=16", "output_stride=16 means nothing to recipe=paper"),
        ("fcn.py:stem=deep", "stem=deep means nothing to backbone=vgg16"),
        ("unet.py:backbone=resnet18", "backbone=resnet18 means nothing to recipe=paper"),
        ("unet.py:recipe=mmseg,backbone=resnet18", "backbone=resnet18 means nothing to recipe"),
        ("unet.py:recipe=smp,variant=same", "variant=same means nothing to recipe=smp"),
        ("unet.py:output_stride=8", "output_stride=8 means nothing to recipe=paper"),
        ("unet.py:variant=matting,num_classes=3", "num_classes=3 means nothing to variant=matting"),
        ("segnet.py:backbone=resnet18", "backbone=resnet18 means nothing to segnet.py"),
        ("segnet.py:stem=deep", "stem=deep means nothing to segnet.py"),
        ("segnet.py:recipe=smp", 'unknown recipe of .*"smp".*Valid: paper'),
        ("deeplabv1.py:stem=deep", "stem=deep means nothing to backbone=vgg16"),
        ("deeplabv2.py:backbone=vgg16,stem=deep", "stem=deep means nothing to backbone=vgg16"),
    ],
)
def test_an_argument_that_does_not_apply_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        load(arguments)


PAPERS = "fcn unet segnet deeplabv1 deeplabv2 pspnet deeplabv3 deeplabv3plus".split()
ARGUMENTS = "dataset backbone variant recipe output_stride stem num_classes".split()


@pytest.mark.parametrize("name", PAPERS)
def test_every_papers_experiment_takes_the_same_arguments(name):
    with pytest.raises(InputError) as refused:
        load(f"{name}.py:nonsense=1")
    known = str(refused.value).replace(",", " ").replace(".", " ").split()
    assert set(ARGUMENTS) <= set(known)


@pytest.mark.parametrize(
    ("arguments", "dataset", "split"),
    [
        ("deeplabv1.py:", "voc2012", "trainaug"),
        ("deeplabv3.py:recipe=torchvision", "coco_voc", "train"),
        ("deeplabv3.py:recipe=mmseg", "cityscapes", "train"),
        ("deeplabv3plus.py:recipe=smp", "voc2012", "trainaug"),
        ("fcn.py:recipe=torchvision", "coco_voc", "train"),
        ("pspnet.py:dataset=voc2012", "voc2012", "trainaug"),
        ("pspnet.py:", "ade20k", "train"),
        ("unet.py:recipe=mmseg", "cityscapes", "train"),
        ("segnet.py:", "camvid", "train"),
    ],
)
def test_a_recipe_reads_what_its_steps_and_figures_are_of(arguments, dataset, split):
    data = load(arguments).data
    assert (data.dataset, data.train_split, data.eval_split) == (dataset, split, "val")


@pytest.mark.parametrize(
    ("arguments", "dataset"),
    [
        ("fcn.py", "camvid"),
        ("pspnet.py", "cityscapes"),
        ("pspnet.py", "voc2012"),
        ("segnet.py", "camvid"),
        ("unet.py:variant=same", "camvid"),
        ("unet.py:variant=same", "isbi2012"),
        ("classical.py", "isbi2012"),
        ("maskrcnn.py:recipe=torchvision", "coco"),
        *((f"{name}.py:variant=small", "nuclei") for name in ("maskrcnn", "solo", "solov2")),
        *((f"{name}.py:variant=small", "nuclei") for name in ("upsnet", "panoptic_deeplab")),
    ],
)
def test_a_data_set_elsewhere_is_read_as_that_of_the_name(arguments, dataset):
    comma = "," if ":" in arguments else ":"
    named, elsewhere = (
        configs.load(f"{EXPERIMENTS}/{arguments}{comma}dataset={dataset}{place}")
        for place in ("", ":/elsewhere")
    )
    elsewhere.data.dataset = dataset
    assert elsewhere == named != configs.load(f"{EXPERIMENTS}/{arguments}{comma}dataset=other")


def test_what_is_no_thing_stays_none_where_the_number_of_classes_is_given():
    config = load("panoptic_deeplab.py:dataset=shapes,variant=small,num_classes=8")
    assert config.model.things == (1, 2, 3, 4, 5, 6, 7)
    with pytest.raises(InputError, match="model.things has 0, whose objects shapes does not tell"):
        open_source(
            load("maskrcnn.py:dataset=shapes,variant=small", ("model.things", "(0,1)")), "val"
        )


@pytest.mark.parametrize("stride", [8, 16])
@pytest.mark.parametrize("name", ["deeplabv3", "deeplabv3plus"])
def test_smps_rates_are_12_24_and_36_at_every_output_stride(name, stride):
    model = experiment(name, f"recipe=smp,backbone=resnet18,output_stride={stride},num_classes=5")
    found = {}

    def note(run, args, kwargs, context):
        if isinstance(context.module, Conv) and "atrous" in "/".join(context.module.path):
            if context.module.kernel == 3:
                found[context.module.path[1]] = context.module.rate
        return run(*args, **kwargs)

    with nn.intercept_methods(note):
        trace(model, (64, 64))
    assert found == {"atrous1": 12, "atrous2": 24, "atrous3": 36}


def test_an_auxiliary_head_that_is_off_has_no_learning_rate():
    config = load("deeplabv3.py:recipe=torchvision", ("model.aux", "0"))
    assert config.optim.multipliers == ()
    kept = load("pspnet.py:dataset=ade20k", ("model.aux", "0")).optim.multipliers
    assert len(kept) == 2  # of the other new layers too


def test_a_backbone_can_be_named_for_a_network_that_had_none():
    overrides = [("model.backbone.name", "resnet18"), ("model.widths", "(8,8,8,8,8)")]
    config = load("unet.py:variant=same,dataset=shapes", *overrides, ("model.patch", "1"))
    assert config.model.backbone.name == "resnet18" and config.model.backbone.depth == 18
    models.build(config)
    with pytest.raises(InputError, match="unknown key of model segnet"):
        load("segnet.py", ("model.backbone.name", "resnet18"))


def test_hue_is_a_field_of_the_config_with_limits():
    assert configs.default().data.hue == 18.0
    with pytest.raises(InputError, match="data.hue is 200.0: needs at most 180 degrees"):
        load("pspnet.py", ("data.hue", "200"))
