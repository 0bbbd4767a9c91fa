"""models/resnet.py against the unmodified classes of transformers, and against paddle.vision.models itself."""

import math
import re

import numpy as np
import paddle
import pytest
import torch
import transformers
from resnet_fixtures import STANDARD, TINY, VARIANTS, paddle_name, pictures, reference

from convert.errors import BadInput
from models import resnet

SIZES = [(64, 64), (97, 65), (63, 98), (1, 1), (32, 224)]


def in_paddle_layout(net):
    state = {paddle_name(name): tensor.numpy() for name, tensor in net.state_dict().items()
             if not name.endswith("num_batches_tracked")}
    return state | {name: state[name].T for name in state if name == "fc.weight"}


def pair(head="ResNetForImageClassification", **overrides):
    theirs = reference(head, **overrides)
    ours = getattr(resnet, head).from_config(theirs.config.to_dict())
    ours.load(in_paddle_layout(theirs))
    ours.eval()
    return theirs, ours


def run(net, **inputs):
    """The net's outputs by name as numpy arrays, whichever framework it belongs to."""
    module, convert = (torch, torch.tensor) if isinstance(net, torch.nn.Module) else (paddle, paddle.to_tensor)
    with module.no_grad():
        outputs = net(**{name: convert(value) for name, value in inputs.items()})
    return {name: value.numpy() for name, value in outputs.items() if hasattr(value, "numpy")}


def distance(expected, found):
    assert expected.shape == found.shape
    return np.linalg.norm(found.astype("float64") - expected) / np.linalg.norm(expected.astype("float64"))


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "{}x{}".format(*size))
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_transformers_at_every_size(variant, size):
    theirs, ours = pair(**VARIANTS[variant])
    pixels = pictures(*size, theirs.config.num_channels)
    assert distance(run(theirs, pixel_values=pixels)["logits"], run(ours, pixel_values=pixels)["logits"]) < 2e-6


@pytest.mark.parametrize("variant", ["basic", "bottleneck", "both"])
def test_the_bare_model_gives_feature_maps_and_their_mean(variant):
    theirs, ours = pair("ResNetModel", **VARIANTS[variant])
    pixels = pictures(97, 64)
    expected, found = run(theirs, pixel_values=pixels), run(ours, pixel_values=pixels)
    assert set(found) == {"last_hidden_state", "pooler_output"}
    assert all(distance(expected[name], found[name]) < 2e-6 for name in found)


@pytest.mark.parametrize("depth", [18, 50])
def test_paddle_visions_own_class_takes_the_same_weights_to_the_same_logits(depth):
    theirs = reference(**TINY | dict(embedding_size=64, hidden_sizes=[256, 512, 1024, 2048]) | STANDARD[depth])
    builder = getattr(paddle.vision.models, f"resnet{depth}")
    net = builder(num_classes=TINY["num_labels"])
    missing, unexpected = net.set_state_dict(in_paddle_layout(theirs))
    assert not missing and not unexpected
    net.eval()
    pixels = pictures(64, 48)
    with paddle.no_grad():
        found = net(paddle.to_tensor(pixels)).numpy()
    assert distance(run(theirs, pixel_values=pixels)["logits"], found) < 2e-6


@pytest.mark.parametrize("depth", STANDARD)
def test_the_five_depths_are_built_layer_for_layer_as_paddle_vision_builds_them(depth):
    with paddle.LazyGuard():
        ours = resnet.ResNetForImageClassification.from_config(STANDARD[depth] | dict(num_labels=1000))
        theirs = getattr(paddle.vision.models, f"resnet{depth}")()
    described = [[(name, type(layer).__name__, layer.extra_repr()) for name, layer in net.named_sublayers()]
                 for net in (ours, theirs)]
    assert described[0] == described[1]
    shapes = [{name: tuple(tensor.shape) for name, tensor in net.state_dict().items()} for net in (ours, theirs)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("labels, problem", [
    ([0, 4], None), ([0, -100], None), ([[0.0, 1, 1, 0, 1], [1, 0, 0, 0, 0]], "multi_label_classification"),
    ([[0.5, -1, 2, 0, 1], [1, 0, 3, 0, -2]], "regression"),
], ids=["classes", "one ignored", "several", "numbers"])
def test_losses_are_those_of_transformers(labels, problem):
    theirs, ours = pair(layer_type="basic", problem_type=problem)
    inputs = dict(pixel_values=pictures(64, 64), labels=np.array(labels, "int64" if problem is None else "float32"))
    assert run(ours, **inputs)["loss"] == pytest.approx(run(theirs, **inputs)["loss"], rel=1e-6)


def test_one_label_is_a_regression():
    theirs, ours = pair(layer_type="basic", num_labels=1)
    inputs = dict(pixel_values=pictures(64, 64), labels=np.array([9.0, -8.0], "float32"))
    assert run(ours, **inputs)["loss"] == pytest.approx(run(theirs, **inputs)["loss"], rel=1e-6)


@pytest.mark.parametrize("config, says", [
    (dict(hidden_act="gelu"), "hidden_act is 'gelu'"),
    (dict(depths=[2, 2, 2], hidden_sizes=[8, 16, 24]), "depths names 3 stages"),
    (dict(depths=[2, 0, 2, 2]), "a whole number above 0 for each stage"),
    (dict(hidden_sizes=[8, 16, 24, 30]), "multiple of 4"),
    (dict(layer_type="wide"), "layer_type is 'wide'"),
])
def test_what_paddles_resnet_cannot_be_is_refused_with_a_sentence(config, says):
    with pytest.raises(BadInput, match=re.escape(says)):
        resnet.ResNetModel.from_config(TINY | config)


def test_fresh_weights_have_transformers_spread():
    ours = resnet.ResNetForImageClassification.from_config(dict(
        layer_type="basic", hidden_sizes=[64, 128, 256, 512], depths=[1, 1, 1, 1], num_labels=100))
    torch.manual_seed(0)
    theirs = transformers.ResNetForImageClassification(transformers.ResNetConfig(
        layer_type="basic", hidden_sizes=[64, 128, 256, 512], depths=[1, 1, 1, 1], num_labels=100))
    expected = in_paddle_layout(theirs)
    for name, tensor in ours.state_dict().items():
        luck = 5 / math.sqrt(tensor.size)  # of a deviation that is estimated on both sides
        assert float(tensor.std()) == pytest.approx(float(expected[name].std()), rel=luck, abs=1e-12), name
        assert float(tensor.max()) <= max(1.5 * float(expected[name].max()), 1e-12), name
