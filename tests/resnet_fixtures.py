"""Small ResNets of transformers with weights and statistics of trained scale, and other people's names for them."""

import re

import numpy as np
import torch
import transformers

TINY = dict(embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[2, 1, 2, 1], num_labels=5)
VARIANTS = {
    "basic": dict(layer_type="basic"),
    "bottleneck": dict(layer_type="bottleneck"),
    "basic with a wider stem": dict(layer_type="basic", embedding_size=12),
    "stride in the first stage": dict(layer_type="basic", downsample_in_first_stage=True),
    "bottlenecks with strides in front": dict(layer_type="bottleneck", downsample_in_bottleneck=True),
    "both": dict(layer_type="bottleneck", downsample_in_bottleneck=True, downsample_in_first_stage=True),
    "one channel": dict(layer_type="basic", num_channels=1),
    "five channels": dict(layer_type="bottleneck", num_channels=5),
    "resnet-26": dict(layer_type="bottleneck", depths=[2, 2, 2, 2]),
}
STANDARD = {
    18: dict(layer_type="basic", hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2]),
    34: dict(layer_type="basic", hidden_sizes=[64, 128, 256, 512], depths=[3, 4, 6, 3]),
    50: dict(depths=[3, 4, 6, 3]),
    101: dict(depths=[3, 4, 23, 3]),
    152: dict(depths=[3, 8, 36, 3]),
}
PARTS = {"convolution": "conv", "normalization": "bn"}
STATISTICS = {"running_mean": "_mean", "running_var": "_variance"}


def reference(head="ResNetForImageClassification", seed=0, **overrides):
    """The class of transformers with weights of trained scale, and running statistics of pictures that it has seen.

    Each variance is off by its own factor all the same, and none is far below the others: a channel that these
    pictures left dead would blow up the next.
    """
    torch.manual_seed(seed)
    net = getattr(transformers, head)(transformers.ResNetConfig(**TINY | overrides))
    with torch.no_grad():
        for name, weight in net.named_parameters():
            noise = torch.randn(weight.shape)
            if weight.dim() > 1:
                weight.copy_(noise * (2 / weight[0].numel()) ** 0.5)
            else:
                weight.copy_(1 + 0.2 * noise if name.endswith("weight") else 0.3 * noise)
        for norm in (module for module in net.modules() if isinstance(module, torch.nn.BatchNorm2d)):
            norm.momentum = 1.0
        net.train()(torch.tensor(pictures(97, 64, net.config.num_channels, batch=4, seed=seed + 1)))
        for name, buffer in net.named_buffers():
            if name.endswith("running_var"):
                buffer.mul_(torch.exp(0.3 * torch.randn(buffer.shape))).add_(0.3 * buffer.mean())
    return net.eval()


def torchvision_name(name):
    """What torchvision calls a tensor of transformers' class."""
    name = name.removeprefix("resnet.").replace("classifier.1", "fc")
    stem = re.fullmatch(r"embedder\.embedder\.(\w+)\.(\w+)", name)
    part = re.fullmatch(r"encoder\.stages\.(\d)\.layers\.(\d+)\.layer\.(\d)\.(\w+)\.(\w+)", name)
    shortcut = re.fullmatch(r"encoder\.stages\.(\d)\.layers\.0\.shortcut\.(\w+)\.(\w+)", name)
    if stem:
        kind, end = stem.groups()
        name = f"{PARTS[kind]}1.{end}"
    elif part:
        stage, layer, number, kind, end = part.groups()
        name = f"layer{int(stage) + 1}.{layer}.{PARTS[kind]}{int(number) + 1}.{end}"
    elif shortcut:
        stage, kind, end = shortcut.groups()
        name = f"layer{int(stage) + 1}.0.downsample.{int(kind == 'normalization')}.{end}"
    return name


def paddle_name(name):
    """What paddle.vision calls a tensor of transformers' class."""
    return re.sub("running_mean|running_var", lambda found: STATISTICS[found[0]], torchvision_name(name))


def pictures(height, width, channels=3, batch=2, seed=0):
    return np.random.default_rng(seed).standard_normal((batch, channels, height, width)).astype("float32")
