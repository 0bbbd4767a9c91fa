"""ResNet: torchvision's names on the Paddle side; running statistics get new names, the classifier is transposed.

Sources are transformers' checkpoints, or torchvision's, which come without a config.json: their headers say what they
are.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import Any

from convert.errors import BadInput
from convert.rules import (
    Condition,
    Config,
    Family,
    Head,
    Layers,
    Rule,
    Size,
    Sizes,
    batch_norm,
    keep,
    labels_of,
    linear,
    rules,
    size_of,
)
from convert.traits import Shortcut, Traits

STAGES = (1, 2, 3, 4)
LETTERS = "abcd"
DEPTHS, WIDTHS = [3, 4, 6, 3], [256, 512, 1024, 2048]


def sizes(config: Config) -> Sizes:
    """Widths by stage: of what enters it, of its blocks' outputs, and inside of its blocks; and kernels' sides."""
    widths, stem = config.get("hidden_sizes", WIDTHS), size_of(config, "embedding_size", default=64)
    inner = widths if basic(config) else [width // 4 for width in widths]
    by_stage = {f"{word}{stage}": width for word, column in (
        ("entering", [stem, *widths[:-1]]), ("width", widths), ("inner", inner))
        for stage, width in zip(STAGES, column, strict=True)}
    return {"channels": size_of(config, "num_channels", default=3), "stem": stem, "features": widths[-1],
            "labels": labels_of(config), "first": 3 if basic(config) else 1, **by_stage}


def layers(config: Config) -> Layers:
    """A letter for each stage; its first block, which other rules are about, is none of them."""
    return {letter: range(1, depth) for letter, depth in zip(LETTERS, config.get("depths", DEPTHS), strict=True)}


def unsupported(config: Config) -> str | None:
    """Why ``paddle.vision.models.ResNet`` cannot be built so, None where it can."""
    depths, widths = config.get("depths", DEPTHS), config.get("hidden_sizes", WIDTHS)
    kind, function = config.get("layer_type", "bottleneck"), config.get("hidden_act", "relu")
    for name, numbers in (("depths", depths), ("hidden_sizes", widths)):
        if not isinstance(numbers, (list, tuple)) or not all(
                type(number) is int and 0 < number < 1 << 20 for number in numbers):
            return f"{name} is {str(numbers)[:40]}; a whole number above 0 for each stage is needed"
        if len(numbers) != len(STAGES):
            return f"{name} names {len(numbers)} stages; paddle.vision.models.ResNet has {len(STAGES)}"
    if kind not in ("basic", "bottleneck"):
        return f"layer_type is {kind!r}; basic and bottleneck are known"
    if function != "relu":
        return f"hidden_act is {function!r}; the blocks of paddle.vision.models.ResNet know relu only"
    if kind == "bottleneck" and any(width % 4 for width in widths):
        return (f"hidden_sizes are {list(widths)}; a bottleneck is a quarter as wide as what it gives, so each must be "
                "a multiple of 4")
    return None


def basic(config: Config) -> bool:
    return config.get("layer_type") == "basic"


def bottleneck(config: Config) -> bool:
    return not basic(config)


def projected(config: Config) -> bool:
    """Whether the first block of the first stage has a shortcut of its own; those of the others always have."""
    return bool(config.get("downsample_in_first_stage")) or (
        config.get("embedding_size", 64) != config.get("hidden_sizes", WIDTHS)[0])


def always(config: Config) -> bool:
    return True


# Rules ----------------------------------------------------------------------------------------------------------------

def unit(name: str, convolution: str, norm: str, outputs: Size, inputs: Size, kernel: Size,
         when: Condition = always) -> tuple[Rule, ...]:
    """A convolution and its batch norm, which torchvision calls as Paddle does."""
    return rules(
        keep(f"{name}.convolution.weight", outputs, inputs, kernel, kernel, to=f"{convolution}.weight",
             also=(f"{convolution}.weight",), when=when),
        batch_norm(f"{name}.normalization", outputs, to=norm, also=(norm,), when=when),
    )


def block(stage: int, layer: int | str, entering: Size) -> tuple[Rule, ...]:
    """Two convolutions in a basic block, three in a bottleneck; a shortcut in the first block of a stage."""
    name, to, inner, width = *paths(stage, layer), f"inner{stage}", f"width{stage}"
    shortcut = unit(f"{name}.shortcut", f"{to}.downsample.0", f"{to}.downsample.1", width, entering, 1,
                    when=projected if stage == 1 else always)
    return rules(
        unit(f"{name}.layer.0", f"{to}.conv1", f"{to}.bn1", inner, entering, "first"),
        unit(f"{name}.layer.1", f"{to}.conv2", f"{to}.bn2", inner, inner, 3),
        unit(f"{name}.layer.2", f"{to}.conv3", f"{to}.bn3", width, inner, 1, when=bottleneck),
        shortcut if layer == 0 else (),
    )


def paths(stage: int, layer: int | str) -> tuple[str, str]:
    """A block's path in transformers' class and in Paddle's."""
    return f"resnet.encoder.stages.{stage - 1}.layers.{layer}", f"layer{stage}.{layer}"


BLOCKS = [(stage, layer) for stage, letter in zip(STAGES, LETTERS, strict=True) for layer in (0, f"{{{letter}}}")]
INSIDE = (
    ("layer.0.convolution", "conv1", "input"),
    ("layer.0.normalization", "bn1", "wiring of the convolution"),
    ("layer.1.convolution", "conv2", "relu"),
    ("layer.1.normalization", "bn2", "wiring of the convolution"),
    ("layer.2.convolution", "conv3", "relu"),
    ("layer.2.normalization", "bn3", "wiring of the convolution"),
    ("shortcut.convolution", "downsample.0", "input"),
    ("shortcut.normalization", "downsample.1", "wiring of the convolution"),
)


# What a header says ---------------------------------------------------------------------------------------------------

def config_of(header: Mapping[str, Any]) -> Config:
    """The config of a checkpoint with torchvision's names."""
    if "conv1.weight" not in header or not all(f"layer{stage}.0.conv2.weight" in header for stage in STAGES):
        raise BadInput("there is no config.json beside the source, and its tensors do not have torchvision's names "
                       f"(conv1.weight, layer1.0.conv1.weight, …, fc.weight): {', '.join(list(header)[:3])}. Put the "
                       "config.json beside it.")
    last = "conv3" if "layer1.0.conv3.weight" in header else "conv2"
    shapes = [_shape(header, f"layer{stage}.0.{last}.weight") for stage in STAGES]
    widths, stem = [shape[0] for shape in shapes], _shape(header, "conv1.weight")
    numbers = [{int(found[1]) for name in header if (found := re.match(rf"layer{stage}\.(\d{{1,6}})\.", name))}
               for stage in STAGES]
    if last == "conv3":
        _refuse_wide(header, widths)
    return {
        "model_type": "resnet", "architectures": ["ResNetForImageClassification" if "fc.weight" in header else
                                                  "ResNetModel"],
        "num_channels": stem[1], "embedding_size": stem[0], "hidden_sizes": widths,
        "depths": [max(found) + 1 for found in numbers], "layer_type": "bottleneck" if last == "conv3" else "basic",
        "hidden_act": "relu", "downsample_in_bottleneck": False,
        "downsample_in_first_stage": stem[0] == widths[0] and "layer1.0.downsample.0.weight" in header,
        **({"num_labels": _shape(header, "fc.weight", 2)[0]} if "fc.weight" in header else {}),
    }


def _shape(header: Mapping[str, Any], name: str, dimensions: int = 4) -> tuple[int, ...]:
    shape = tuple(header[name].shape) if name in header else ()
    if len(shape) != dimensions:
        raise BadInput(f"{name} has shape {list(shape)}; a ResNet's has {dimensions} dimensions.")
    return shape


def _refuse_wide(header: Mapping[str, Any], widths: list[int]) -> None:
    shape = _shape(header, "layer1.0.conv2.weight")
    if shape[0] != shape[1]:
        raise BadInput(f"layer1.0.conv2.weight is {list(shape)}: a convolution in {shape[0] // max(1, shape[1])} "
                       "groups, a ResNeXt. transformers' ResNet, the reference, has none.")
    if shape[0] * 4 != widths[0]:
        raise BadInput(f"layer1.0.conv2.weight is {list(shape)} where the block gives {widths[0]} channels: a wide "
                       "ResNet. The bottlenecks of transformers' ResNet, the reference, are a quarter as wide.")


FAMILY = Family(
    name="resnet", prefix="resnet.", target_prefix="", layers=layers, sizes=sizes, unsupported=unsupported,
    config_of=config_of,
    rules=rules(
        unit("resnet.embedder.embedder", "conv1", "bn1", "stem", "channels", 7),
        *(block(stage, layer, f"width{stage}" if layer else f"entering{stage}") for stage, layer in BLOCKS),
    ),
    heads=(
        Head("ResNetForImageClassification", None, "image-classification", rules(
            linear("classifier.1", "labels", "features", to="fc", also=("fc",))), inputs="pixels"),
        Head("ResNetModel", None, "image-encoder", base=True, inputs="pixels"),
    ),
    modules=(
        ("resnet.embedder.embedder.convolution", "conv1"),
        ("resnet.embedder.embedder.normalization", "bn1"),
        ("resnet.embedder.embedder.activation", "relu"),
        ("resnet.embedder.pooler", "maxpool"),
        *(paths(stage, layer) for stage, layer in BLOCKS),
        ("resnet.pooler", "avgpool"),
    ),
    inside={paths(stage, layer)[1]: INSIDE for stage, layer in BLOCKS},
    tokenizer="pictures",
    demo={
        "model_type": "resnet", "architectures": ["ResNetForImageClassification"], "num_channels": 3,
        "embedding_size": 16, "hidden_sizes": [32, 32, 48, 64], "depths": [2, 3, 2, 2], "layer_type": "bottleneck",
        "hidden_act": "relu", "downsample_in_first_stage": False, "downsample_in_bottleneck": False, "num_labels": 64,
    },
    variants={
        "basic": {"layer_type": "basic"},
        "basic, stride in the first stage": {
            "layer_type": "basic", "embedding_size": 32, "downsample_in_first_stage": True},
        "strides in front": {"downsample_in_bottleneck": True},
        "both": {"downsample_in_bottleneck": True, "downsample_in_first_stage": True},
        "no shortcut in the first stage": {"embedding_size": 32},
    },
    traits=Traits(shortcut=Shortcut(branch="layer", shortcut="shortcut", activation="activation")),
)

if __name__ == "__main__":
    from convert.cli import main
    sys.exit(main(FAMILY))
