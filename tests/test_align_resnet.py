"""ResNet through conversion and every stage: both namings, both heads, every shape that paddle.vision can have."""

import json
import re
import struct
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
import torch
from align_fixtures import Workshop, all_aligned, strict_json
from conftest import call, fast
from resnet_fixtures import STANDARD, TINY, VARIANTS, paddle_name, pictures, reference, torchvision_name
from safetensors.numpy import load_file
from safetensors.torch import save_file

from convert.cli import main as convert
from convert.dtypes import BY_NAME
from convert.errors import BadInput
from convert.plan import make_plan
from convert.resnet import FAMILY, config_of

HEAD = "ResNetForImageClassification"
SAME = ("verdict", "first_divergence", "tensors", "sublayers", "values", "candidate", "reference", "inputs_digest")
QUICK = ("--limit", "6")
SMALL = {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 48}, "crop_pct": 0.875,
         "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("resnet"))


def checkpoint(shop, name, head=HEAD, dtype="float32", **options):
    """As transformers saves it, with a preprocessor that leaves pictures of 48 x 48."""
    directory = shop.root / f"source-{name}"
    reference(head, **options).to(getattr(torch, dtype)).save_pretrained(directory)
    if options.get("num_channels", 3) == 3:
        (directory / "preprocessor_config.json").write_text(json.dumps(SMALL))
    return directory


def torchvision_state(head=HEAD, **options):
    return {torchvision_name(name): tensor for name, tensor in reference(head, **options).state_dict().items()}


def make(shop, name, *flags, **options):
    return shop.convert("resnet", checkpoint(shop, name, **options), name, *flags)


@pytest.mark.parametrize("head, variant", [
    (HEAD, "basic"), ("ResNetModel", "bottleneck"),
    *(pytest.param(head, variant, marks=pytest.mark.full)
      for head, variant in ((HEAD, "bottleneck"), ("ResNetModel", "basic")))])
def test_both_heads_are_aligned_at_every_stage(shop, head, variant):
    run = make(shop, f"{head}-{variant}", head=head, **VARIANTS[variant])
    outcomes = {stage: shop.align(stage, run, *(QUICK if stage == "metric" else ()))
                for stage in ("weights", "forward", "metric", "loss")}
    assert all_aligned(outcomes)
    blocks = [f"layer{stage}.{layer}" for stage, depth in enumerate(TINY["depths"], 1) for layer in range(depth)]
    modules = [tensor["name"] for tensor in outcomes["forward"].modules]
    outputs = ["logits"] if head == HEAD else ["last_hidden_state", "pooler_output"]
    assert modules == ["conv1", "bn1", "relu", "maxpool", *blocks, "avgpool", *outputs]
    assert all(tensor["rel_l2"] <= 1e-5 for tensor in outcomes["forward"].report["tensors"])
    parts = {part["name"] for part in outcomes["forward"].report["sublayers"]}
    count = 2 if variant == "basic" else 3
    assert {f"layer2.0.bn{number}" for number in range(1, count + 1)} <= parts
    assert "layer2.0.downsample.1" in parts and f"layer2.0.conv{count + 1}" not in parts
    assert not any("Not judged" in note for note in outcomes["forward"].report["notes"])
    expected = {"top1_accuracy"} if head == HEAD else {"nearest_neighbour_accuracy", "nearest_neighbour_f1"}
    assert set(outcomes["metric"].report["values"]) == expected
    assert set(outcomes["loss"].report["values"]) == (
        {"loss.plain", "loss.resized", "loss.ignored"} if head == HEAD else {"loss.contrastive"})


@pytest.mark.parametrize("variant", fast([name for name in VARIANTS if name not in ("basic", "bottleneck")],
                                         "stride in the first stage", "five channels"))
def test_every_shape_is_aligned(shop, variant):
    run = make(shop, variant.replace(" ", "-"), **VARIANTS[variant])
    assert all_aligned({stage: shop.align(stage, run) for stage in ("weights", "forward", "loss")})


@pytest.mark.parametrize("dtype, flags", [
    pytest.param("float16", (), marks=pytest.mark.full),
    pytest.param("bfloat16", ("--dtype", "float32"), marks=pytest.mark.full), ("float32", ("--dtype", "float16"))])
def test_every_dtype_is_aligned_and_running_statistics_are_rounded_on_both_sides(shop, dtype, flags):
    run = make(shop, f"from-{dtype}", *flags, dtype=dtype, layer_type="basic")
    assert all_aligned({stage: shop.align(stage, run) for stage in ("weights", "forward")})
    assert all_aligned({"forward": shop.align("forward", run, "--paging", "on")})


@pytest.mark.parametrize("stage, flags", {"weights": (), "forward": (), "metric": QUICK, "loss": ()}.items())
def test_paged_equals_unpaged_with_running_statistics_from_the_file(shop, stage, flags):
    run = "paged"
    if not shop.output(run).is_dir():
        make(shop, run, layer_type="bottleneck")
    whole, paged = (shop.align(stage, run, *flags, "--paging", word) for word in ("off", "on"))
    assert (whole.code, paged.code) == (0, 0), paged.stderr
    assert [whole.report[key] for key in SAME] == [paged.report[key] for key in SAME]


# torchvision's names --------------------------------------------------------------------------------------------------

SAVE = {
    "zip": lambda state, file: torch.save(state, file),
    "legacy": lambda state, file: torch.save(state, file, _use_new_zipfile_serialization=False),
    "safetensors": lambda state, file: save_file(state, file),
}


@pytest.mark.parametrize("kind, variant", [("zip", "basic"), ("legacy", "bottleneck"), ("safetensors", "basic")])
def test_a_checkpoint_with_torchvisions_names_needs_no_config_and_gives_the_same_bytes(shop, kind, variant):
    file = shop.root / f"lone-{kind}" / ("resnet.safetensors" if kind == "safetensors" else "resnet.pth")
    file.parent.mkdir()
    SAVE[kind](torchvision_state(**VARIANTS[variant]), file)
    run = shop.convert("resnet", file, f"torchvision-{kind}")
    twin = make(shop, f"transformers-{kind}", **VARIANTS[variant])
    assert (shop.output(run) / "model.safetensors").read_bytes() == (
        shop.output(twin) / "model.safetensors").read_bytes()
    if kind == "zip":
        assert all_aligned({stage: shop.align(stage, run) for stage in ("weights", "forward", "loss")})
        assert all_aligned({"forward": shop.align("forward", run, "--paging", "on")})


def test_python_m_convert_knows_a_checkpoint_with_torchvisions_names_by_its_header(shop):
    from convert.__main__ import main
    file = shop.root / "unnamed" / "resnet.pth"
    file.parent.mkdir()
    torch.save(torchvision_state(layer_type="basic"), file)
    code, out, err = call(main, ["--source", str(file), "--dry-run"])
    assert code == 0, err
    assert f"resnet ({HEAD})" in out
    torch.save({"some.weight": torch.ones(2)}, file)
    code, _, err = call(main, ["--source", str(file), "--dry-run"])
    assert code == 2 and "there is no config.json" in err


@pytest.mark.parametrize("name, options", {
    "18": STANDARD[18], "50": dict(hidden_sizes=[256, 512, 1024, 2048], **STANDARD[50]),
    "tiny": VARIANTS["basic"], "wider stem": VARIANTS["basic with a wider stem"],
    "stride in the first stage": VARIANTS["stride in the first stage"], "one channel": VARIANTS["one channel"],
}.items())
def test_the_header_says_what_a_checkpoint_with_torchvisions_names_is(name, options):
    given = {**TINY, **(dict(embedding_size=64) if name in STANDARD or name.isdigit() else {}), **options}
    with torch.device("meta"):
        import transformers
        net = getattr(transformers, HEAD)(transformers.ResNetConfig(**given))
    header = {torchvision_name(name): SimpleNamespace(shape=tuple(tensor.shape))
              for name, tensor in net.state_dict().items()}
    found = config_of(header)
    expected = net.config.to_dict() | {"num_labels": net.config.num_labels}
    assert {key: expected[key] for key in found if key != "architectures"} == {
        key: value for key, value in found.items() if key != "architectures"}
    assert found["architectures"] == [HEAD]
    bare = {name: info for name, info in header.items() if not name.startswith("fc.")}
    assert config_of(bare)["architectures"] == ["ResNetModel"] and "num_labels" not in config_of(bare)


PARAMETERS = {18: 11_689_512, 34: 21_797_672, 50: 25_557_032, 101: 44_549_160, 152: 60_192_808}
"""As torchvision's documentation has them."""


@pytest.mark.parametrize("depth", PARAMETERS)
def test_torchvisions_five_depths_are_planned_in_full_from_their_header_alone(shop, depth):
    """A file of the right length with nothing in it; the plan has torchvision's number of parameters."""
    with paddle.LazyGuard():
        net = getattr(paddle.vision.models, f"resnet{depth}")()
    shapes = {name.replace("._mean", ".running_mean").replace("._variance", ".running_var"): (
        list(tensor.shape)[::-1] if name == "fc.weight" else list(tensor.shape))
        for name, tensor in net.state_dict().items()}
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    file = shop.root / f"resnet{depth}" / "model.safetensors"
    file.parent.mkdir()
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        out.truncate(8 + len(text) + offset)
    code, out, err = call(convert, FAMILY, ["--source", str(file), "--dry-run"])
    assert code == 0, err
    statistics = sum(int(np.prod(shape)) for name, shape in shapes.items() if "running" in name)
    total = int(re.search(r"in all ([\d,]+) bytes", out)[1].replace(",", ""))
    assert total == 4 * (PARAMETERS[depth] + statistics)
    assert out.count("fc.weight") and " T" in out


def test_paddle_visions_own_class_loads_the_pdparams(shop):
    """The result is not for our nets alone: ``paddle.vision.models.resnet18().set_state_dict(paddle.load(…))``."""
    options = dict(embedding_size=64, **STANDARD[18])
    run = make(shop, "pdparams", "--format", "pdparams", **options)
    net = paddle.vision.models.resnet18(num_classes=TINY["num_labels"])
    missing, unexpected = net.set_state_dict(paddle.load(str(shop.output(run) / "model_state.pdparams")))
    assert not missing and not unexpected
    net.eval()
    pixels = pictures(64, 48)
    with torch.no_grad(), paddle.no_grad():
        expected = reference(**options)(torch.tensor(pixels)).logits.numpy()
        found = net(paddle.to_tensor(pixels)).numpy()
    assert np.linalg.norm(found - expected) <= 2e-6 * np.linalg.norm(expected)


def test_what_is_written_is_the_source_under_paddles_names(shop):
    source = checkpoint(shop, "bytes", layer_type="bottleneck")
    run = shop.convert("resnet", source, "bytes")
    written, read = load_file(shop.output(run) / "model.safetensors"), load_file(source / "model.safetensors")
    dropped = {name for name in read if name.endswith("num_batches_tracked")}
    assert dropped and written.keys() == {paddle_name(name) for name in read.keys() - dropped}
    for name in read.keys() - dropped:
        expected = read[name].T if name == "classifier.1.weight" else read[name]
        assert expected.tobytes() == written[paddle_name(name)].tobytes() and expected.shape == written[
            paddle_name(name)].shape
    report = strict_json(shop.reports / run / "convert.json")
    assert {row["source"] for row in report["dropped"]} == dropped
    assert all("momentum is None" in row["why"] for row in report["dropped"])
    assert [row["target"] for row in report["tensors"] if row["transposed"]] == ["fc.weight"]


# What cannot be -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options, says", [
    (dict(hidden_act="gelu"), "hidden_act is 'gelu'"),
    (dict(depths=[2, 2, 2], hidden_sizes=[8, 16, 24]), "depths names 3 stages"),
])
def test_what_paddle_vision_cannot_be_is_refused_and_nothing_is_written(shop, options, says):
    source = checkpoint(shop, says[:6], **options)
    code, _, err = call(convert, FAMILY, ["--source", str(source), "--output", str(shop.root / "refused")])
    assert code == 2 and says in err and err.count("\n") == 1
    assert not (shop.root / "refused").exists()


def refused_header(**changes):
    names = {name: tuple(tensor.shape) for name, tensor in torchvision_state(layer_type="bottleneck").items()}
    return {name: SimpleNamespace(shape=shape) for name, shape in (names | changes).items() if shape is not None}


@pytest.mark.parametrize("changes, says", [
    ({"layer1.0.conv2.weight": (128, 4, 3, 3)}, "in 32 groups, a ResNeXt"),
    ({"layer1.0.conv2.weight": (4, 4, 3, 3)}, "a wide ResNet"),
    ({"conv1.weight": None}, "do not have torchvision's names"),
    ({"layer4.0.conv2.weight": None}, "do not have torchvision's names"),
    ({"conv1.weight": (8, 3)}, "conv1.weight has shape [8, 3]"),
])
def test_a_header_that_is_of_another_net_is_refused_with_a_sentence(changes, says):
    with pytest.raises(BadInput, match=re.escape(says)):
        config_of(refused_header(**changes))


@pytest.mark.parametrize("name, says", [
    ("bn1.running_var", "bn1._variance"), ("layer2.0.downsample.0.weight", "layer2.0.downsample.0.weight")])
def test_a_tensor_that_is_not_there_is_named(name, says):
    state = torchvision_state(layer_type="basic")
    del state[name]
    header = {key: SimpleNamespace(shape=tuple(tensor.shape), dtype=BY_NAME[
        str(tensor.dtype).removeprefix("torch.")]) for key, tensor in state.items()}
    with pytest.raises(BadInput, match=re.escape(says)):
        make_plan(FAMILY, config_of(header), header)


def test_a_wrong_depth_of_a_stage_is_told_with_both_numbers(shop):
    source = checkpoint(shop, "depths", layer_type="basic")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "depths": [2, 1, 3, 1]}))
    code, _, said = call(convert, FAMILY, ["--source", str(source), "--output", str(shop.root / "depths")])
    assert code == 2 and ("config.json (depths) says 3 layers, model.safetensors holds 2 (resnet.encoder.stages.2."
                          "layers.0 to resnet.encoder.stages.2.layers.1)") in said


def test_paddlenlp_has_no_resnet(shop):
    run = make(shop, "no-paddlenlp", layer_type="basic")
    outcome = shop.align("forward", run, "--target", "paddlenlp")
    assert outcome.code == 2 and f"PaddleNLP has no counterpart of {HEAD}" in outcome.stderr


@pytest.mark.parametrize("flags, says", [
    (("--tokens", "8"), "--tokens is not for"), (("--pixels", "8"), "is no size"), (("--pixels", "0x8"), "is no size")])
def test_a_size_that_cannot_be_is_refused(shop, flags, says):
    run = make(shop, "sizes", layer_type="basic") if not shop.output("sizes").is_dir() else "sizes"
    outcome = shop.align("forward", run, *flags)
    assert outcome.code == 2 and says in outcome.stderr


@pytest.mark.parametrize("flag, value, says", [
    ("--stride", "8", f"{HEAD} is none"), ("--max-length", "8", f"the inputs of {HEAD} are pictures"),
    ("--prefix", "say: ", f"{HEAD} does not translate")])
def test_flags_of_texts_are_refused_for_pictures(shop, flag, value, says):
    run = make(shop, "texts", layer_type="basic") if not shop.output("texts").is_dir() else "texts"
    outcome = shop.align("metric", run, flag, value)
    assert (outcome.code, outcome.report) == (2, {}) and outcome.stderr.count("\n") == 1
    assert outcome.stderr.startswith(f"error: {flag} ") and says in outcome.stderr


def test_feature_maps_of_one_place_are_recorded_before_the_shortcut_is_added_into_them(shop):
    """torch adds in place to what the last norm gave; at 32 x 32 the last maps are 1 x 1, and rows of them a view."""
    run = make(shop, "one-place", **VARIANTS["bottleneck"])
    outcome = shop.align("forward", run, "--pixels", "32x32")
    assert all_aligned({"forward": outcome})
    assert next(tensor for tensor in outcome.report["tensors"] if tensor["name"] == "layer4.0")["shape"] == [4, 32]
