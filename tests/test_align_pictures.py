"""The pictures that a metric runs on, and what is done to them before a model sees them."""

import io
import json

import numpy as np
import paddle
import pytest
import torch
from align_fixtures import Workshop, all_aligned
from datasets import Dataset
from PIL import Image
from resnet_fixtures import TINY, reference

from align.inputs import DEVIATION, MEAN
from align.paddle_net import probed as probed_in_paddle
from align.pictures import IMAGENET, PROCESSOR, as_array, draw, drawn, load_processor, prepared
from align.torch_side import probed as probed_in_torch
from convert.errors import BadInput


def test_ten_things_are_drawn_always_the_same_and_never_twice():
    first, again = ([row["image"] for row in drawn(40, 10)] for _ in range(2))
    assert all((one == two).all() for one, two in zip(first, again, strict=True))
    assert len({picture.tobytes() for picture in first}) == 40
    assert {picture.shape[:2] for picture in first} == {(96, 128), (120, 96), (97, 97), (100, 131)}
    assert all(picture.std() > 20 and picture.dtype == np.uint8 for picture in first)


@pytest.mark.parametrize("labels, expected", [
    (1000, list(IMAGENET)), (10, list(range(10))), (3, [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]), (1, [0] * 10)])
def test_labels_are_imagenets_or_those_that_the_model_has(labels, expected):
    assert [row["label"] for row in drawn(10, labels)] == expected


@pytest.mark.parametrize("number", range(4))
def test_without_a_config_pictures_are_prepared_as_torchvision_evaluates(tmp_path, number):
    """Shorter side to 256, bilinear; 224 x 224 from the centre, half pixels to even, as its center_crop rounds; scaled
    to 0 … 1, mean and deviation of ImageNet. Paddle's CenterCrop was written after it.
    """
    processor, told = load_processor(tmp_path, 3)
    picture = Image.fromarray(draw(number))
    scale = 256 / min(picture.size)
    resized = picture.resize((int(picture.width * scale), int(picture.height * scale)), Image.BILINEAR)
    cut = np.asarray(paddle.vision.transforms.CenterCrop(224)(resized), np.float64) / 255
    expected = ((cut - MEAN) / DEVIATION).transpose(2, 0, 1)
    found = prepared(processor, draw(number))
    assert found.dtype == np.float32 and "as torchvision evaluates" in told
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_what_preprocessor_config_asks_for_is_done(tmp_path):
    config = {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 48}, "crop_pct": 0.75,
              "resample": 3, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}
    (tmp_path / PROCESSOR).write_text(json.dumps(config))
    processor, told = load_processor(tmp_path, 3)
    picture = Image.fromarray(draw(0))  # 96 x 128: to 64 x 85, and 48 x 48 of it
    resized = np.asarray(picture.resize((85, 64), Image.BICUBIC), np.float64)[8:56, 18:66] / 255
    np.testing.assert_allclose(prepared(processor, draw(0)), ((resized - 0.5) / 0.25).transpose(2, 0, 1), atol=2e-6)
    assert told == "preprocessed as the source does"


def test_a_preprocessor_config_that_nothing_can_be_made_of_is_told(tmp_path):
    (tmp_path / PROCESSOR).write_text('{"image_processor_type": "NoSuchProcessor"}')
    with pytest.raises(BadInput, match=PROCESSOR):
        load_processor(tmp_path, 3)


def test_a_grey_model_gets_grey_pictures(tmp_path):
    processor, _ = load_processor(tmp_path, 1)
    assert prepared(processor, as_array(draw(0), 0, 1)).shape == (1, 224, 224)


def encoded(picture, mode="RGB", kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(picture).convert(mode).save(file, kind)
    return file.getvalue()


def test_a_rows_image_may_be_an_array_a_picture_or_a_file(tmp_path):
    picture = draw(3)
    (tmp_path / "one.png").write_bytes(encoded(picture))
    for value in (picture, picture.tolist(), Image.fromarray(picture), {"bytes": encoded(picture), "path": None},
                  {"bytes": None, "path": str(tmp_path / "one.png")}):
        assert (as_array(value, 0, 3) == picture).all()
    grey = as_array({"bytes": encoded(picture, "L")}, 0, 3)
    assert grey.shape == picture.shape and (grey[..., 0] == grey[..., 2]).all()
    assert as_array({"bytes": encoded(picture, "RGBA")}, 0, 3).shape == picture.shape


@pytest.mark.parametrize("value", [{"bytes": b"no picture"}, {"path": "/nowhere.png"}, "a text", None, [1, 2], {}])
def test_what_is_no_picture_is_refused_by_its_row(value):
    with pytest.raises(BadInput, match="row 7 of the data set has an image that is no picture"):
        as_array(value, 7, 3)


# Sets, and the stage that runs on them --------------------------------------------------------------------------------

SMALL = {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 40}, "crop_pct": 0.8}


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """With a tiny basic ResNet that is converted as run ``tiny``."""
    found = Workshop(tmp_path_factory.mktemp("pictures"))
    source = found.root / "source"
    reference(layer_type="basic", num_labels=12).save_pretrained(source)
    (source / PROCESSOR).write_text(json.dumps(SMALL))
    found.convert("resnet", source, "tiny")
    return found


@pytest.fixture(scope="module")
def parquet(shop):
    """Twelve pictures in two modes and many sizes, as the datasets library writes them."""
    rows = [{"photo": {"bytes": encoded(draw(number), "L" if number % 3 == 0 else "RGB"), "path": None},
             "thing": number % 12} for number in range(12)]
    from datasets import Features, Value
    from datasets import Image as Picture
    Dataset.from_list(rows, features=Features({"photo": Picture(), "thing": Value("int64")})).to_parquet(
        shop.root / "set.parquet")
    return shop.root / "set.parquet"


def metric(shop, *flags):
    return shop.align("metric", "tiny", *flags)


def test_pictures_may_be_given_by_their_paths(shop, monkeypatch):
    """As people write such a file, and as the README has it; the same pictures by their bytes are the same inputs."""
    monkeypatch.chdir(shop.root)
    for number in range(3):
        (shop.root / f"{number}.png").write_bytes(encoded(draw(number), "RGB"))
    (shop.root / "rows.jsonl").write_text("".join(
        json.dumps({"image": f"{number}.png", "label": number}) + "\n" for number in range(3)))
    outcome = metric(shop, "--dataset", "rows.jsonl")
    assert all_aligned({"metric": outcome})
    rows = [{"image": {"bytes": encoded(draw(number), "RGB"), "path": None}, "label": number} for number in range(3)]
    Dataset.from_list(rows).to_parquet(shop.root / "same.parquet")
    assert metric(shop, "--dataset", "same.parquet").report["inputs_digest"] == outcome.report["inputs_digest"]
    (shop.root / "1.png").unlink()
    missing = metric(shop, "--dataset", "rows.jsonl")
    assert missing.code == 2 and "row 1 of the data set has an image that is no picture" in missing.stderr
    assert "1.png" in missing.stderr


def test_a_set_with_an_image_column_is_measured_in_the_words_of_sklearn(shop, parquet):
    outcome = metric(shop, "--dataset", str(parquet), "--columns", "image=photo,label=thing")
    assert all_aligned({"metric": outcome})
    assert any("12 of the" in note and "preprocessed as the source does: 3 x 40 x 40 each" in note
               for note in outcome.report["notes"])
    processor, _ = load_processor(shop.root / "source", 3)
    pixels = np.stack([prepared(processor, as_array(Image.open(io.BytesIO(
        encoded(draw(number), "L" if number % 3 == 0 else "RGB"))), 0, 3)) for number in range(12)])
    with torch.no_grad():
        logits = reference(layer_type="basic", num_labels=12)(torch.tensor(pixels)).logits.numpy()
    from sklearn.metrics import top_k_accuracy_score
    expected = {f"top{k}_accuracy": top_k_accuracy_score(np.arange(12), logits, k=k, labels=range(12)) for k in (1, 5)}
    assert {name: value["reference"] for name, value in outcome.report["values"].items()} == expected


def test_a_directory_of_pictures_by_class_is_a_set(shop):
    for number in range(4):
        file = shop.root / "folder" / "test" / "ab"[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(draw(number)))
    outcome = metric(shop, "--dataset", str(shop.root / "folder"))
    assert all_aligned({"metric": outcome})
    assert any(note.startswith("Data: 4 of the") for note in outcome.report["notes"])


def test_pictures_are_recorded_for_the_other_environment_and_give_the_same_report(shop, parquet):
    flags = ("--dataset", str(parquet), "--columns", "image=photo,label=thing")
    together = metric(shop, *flags)
    assert metric(shop, *flags, "--only", "reference").code == 0
    parquet.rename(parquet.with_suffix(".away"))  # the candidate is fed what was recorded
    try:
        assert metric(shop, "--only", "candidate").code == 0
        apart = metric(shop, "--compare")
    finally:
        parquet.with_suffix(".away").rename(parquet)
    assert apart.code == 0
    assert [apart.report[key] for key in ("tensors", "values", "inputs_digest")] == [
        together.report[key] for key in ("tensors", "values", "inputs_digest")]


@pytest.mark.parametrize("flags, says", [
    (("--columns", "label=thing"), "the column image is needed"),
    (("--columns", "image=photo"), "the column label is needed"),
    (("--columns", "image=thing,label=thing"), "row 0 of the data set has an image that is no picture"),
    (("--columns", "image=photo,label=photo"), "a whole number is needed")])
def test_a_set_that_cannot_be_used_is_told_in_a_sentence(shop, parquet, flags, says):
    outcome = metric(shop, "--dataset", str(parquet), *flags)
    assert outcome.code == 2 and says in outcome.stderr and outcome.stderr.count("\n") == 1


def test_a_preprocessor_that_leaves_pictures_of_several_shapes_is_told(shop, tmp_path):
    source = tmp_path / "source"
    reference(layer_type="basic").save_pretrained(source)
    (source / PROCESSOR).write_text(json.dumps(SMALL | {"do_resize": False}))
    shop.convert("resnet", source, "uncropped")
    outcome = shop.align("metric", "uncropped", "--limit", "4")
    assert outcome.code == 2 and "pictures of several shapes (3 x 96 x 128, 3 x 97 x 97" in outcome.stderr


def test_a_model_of_five_channels_has_no_pictures_to_be_measured_on(shop, tmp_path):
    reference(layer_type="basic", num_channels=5).save_pretrained(tmp_path / "source")
    shop.convert("resnet", tmp_path / "source", "five")
    outcome = shop.align("metric", "five")
    assert outcome.code == 2 and "this model takes 5" in outcome.stderr


# A batch norm's epsilon -----------------------------------------------------------------------------------------------

def test_an_epsilon_that_a_large_running_variance_hides_shows_on_a_small_input():
    x = np.random.default_rng(0).standard_normal((2, 8, 5, 5)).astype("float32") * 100
    torchs, paddles = torch.nn.BatchNorm2d(8).eval(), paddle.nn.BatchNorm2D(8, epsilon=2e-5)
    paddles.eval()
    for statistic, array in (("mean", np.full(8, 3.0)), ("var", np.full(8, 1e4))):
        getattr(torchs, f"running_{statistic}").copy_(torch.tensor(array))
        {"mean": paddles._mean, "var": paddles._variance}[statistic].set_value(array.astype("float32"))
    with torch.no_grad(), paddle.no_grad():
        ordinary = torchs(torch.tensor(x)).numpy(), paddles(paddle.to_tensor(x)).numpy()
        small = probed_in_torch(torchs, torch.tensor(x / 1e5)), probed_in_paddle(paddles, paddle.to_tensor(x / 1e5))
        again = torchs(torch.tensor(x)).numpy(), paddles(paddle.to_tensor(x)).numpy()
    np.testing.assert_allclose(*ordinary, rtol=1e-5, atol=1e-6)
    assert np.abs(small[0] - small[1]).max() > 0.2 * np.abs(small[0]).max()
    assert all((one == other).all() for one, other in zip(ordinary, again, strict=True))


def test_the_drawn_set_asks_for_labels_that_the_model_has():
    assert max(row["label"] for row in drawn(64, TINY["num_labels"])) < TINY["num_labels"]
