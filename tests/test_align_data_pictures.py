"""``align.data`` for pictures: the crop that Paddle rounds, what is equal, and every other cause planted and named."""

import io
import json

import numpy as np
import pytest
from align_fixtures import Workshop
from PIL import Image

from align.pipelines import picture_data
from align.texts import load_rows
from convert.demo import build_demo
from convert.resnet import FAMILY

SETTINGS = {"do_resize": True, "resample": 3, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
            "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    workshop = Workshop(tmp_path_factory.mktemp("pictures"))
    workshop.convert("resnet", build_demo(FAMILY, workshop.root / "source"), "net")
    return workshop


def set_of(workshop, name, *sizes):
    """A parquet file of random pictures of these (height, width), and what load_rows makes of it."""
    import datasets
    generator = np.random.default_rng(3)
    pictures = []
    for height, width in sizes:
        content = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (height, width, 3), np.uint8)).save(content, "png")
        pictures.append({"bytes": content.getvalue(), "path": None})
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    file = workshop.root / f"{name}.parquet"
    datasets.Dataset.from_dict({"image": pictures, "label": [0] * len(pictures)}, features=features).to_parquet(file)
    return str(file), load_rows(str(file), None, 64)[1]


@pytest.fixture(scope="module")
def even(workshop):
    """Pictures of which an even number of rows and columns is cut away: both become 73 x 90."""
    return set_of(workshop, "even", (73, 90), (146, 180))[0]


def test_the_crop_of_what_ships_is_explained(workshop):
    """(91 - 64) / 2 = 13.5 is 14 by Python's round, and 13 rounded down."""
    outcome = workshop.align("data", "net")
    assert outcome.code == 1
    assert "the crop begins at half of what is left over rounded to the even number" in outcome.report["diagnosis"][
        "sentence"]
    assert outcome.failing == [f"picture.{number}.{what}" for what in ("cropped", "pixel_values")
                               for number in (1, 3, 5, 7)]
    assert round((91 - 64) / 2) == 14 and (91 - 64) // 2 == 13


def test_what_leaves_an_even_number_over_is_equal(workshop, even):
    outcome = workshop.align("data", "net", "--data", even)
    assert (outcome.code, outcome.report["verdict"]) == (0, "aligned"), outcome.report["failures"]
    assert [tensor["dtype"] for tensor in outcome.report["tensors"]] == ["uint8"] * 2 + ["float32"] * 2
    assert [tensor["allowed"] for tensor in outcome.report["tensors"]] == [0, 0, 1e-6, 1e-6]


def test_the_numbers_are_those_of_the_formula(workshop, even):
    """(x / 255 - mean) / deviation in float64, of PIL's own bicubic resize and the middle of it."""
    from align.trace import load_trace
    workshop.align("data", "net", "--data", even)
    _, rows = set_of(workshop, "again", (73, 90), (146, 180))
    for side in ("torch", "paddle"):
        arrays = load_trace(workshop.reports / "net" / "traces", "data", side, "").arrays
        for number, row in enumerate(rows):
            height, width = row["image"].height, row["image"].width
            wide = int(73 * width / height)
            image = np.asarray(row["image"].resize((wide, 73), Image.Resampling.BICUBIC))
            top, left = (73 - 64) // 2, (wide - 64) // 2
            expected = image[top: top + 64, left: left + 64].transpose(2, 0, 1)
            assert np.array_equal(arrays[f"picture.{number}.cropped"], expected)
            mean, deviation = (np.array(part).reshape(3, 1, 1) for part in (
                [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
            assert np.allclose(arrays[f"picture.{number}.pixel_values"], (expected / 255 - mean) / deviation, atol=1e-6)


@pytest.mark.parametrize("changes, why", [
    ({"resample": 2}, "pictures are resized by bilinear instead of bicubic interpolation"),
    ({"resample": 0}, "pictures are resized by nearest instead of bicubic interpolation"),
    ({"crop_pct": 1.0}, "the picture is resized to the size of the crop instead of cropped"),
    ({"do_normalize": False}, "mean and deviation are not taken out"),
    ({"image_mean": [0.406, 0.456, 0.485], "image_std": [0.225, 0.224, 0.229]}, "in the order blue, green, red"),
    ({"image_std": [1.0, 1.0, 1.0]}, "values are not divided by the deviation"),
    ({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}, "mean and deviation are 0.5 each"),
    ({"do_rescale": False}, "values are not divided by 255"),
], ids=str)
def test_a_setting_of_the_converted_directory(workshop, changes, why):
    square, _ = set_of(workshop, "square", (96, 96), (140, 140))  # 73 - 64 = 9, of which both cut 4 in front
    file = workshop.output("net") / "preprocessor_config.json"
    before = file.read_text("utf-8")
    file.write_text(json.dumps({**json.loads(before), **changes}), "utf-8")
    try:
        outcome = workshop.align("data", "net", "--data", square)
    finally:
        file.write_text(before, "utf-8")
    assert outcome.code == 1 and outcome.report["diagnosis"], outcome.report.get("failures")
    assert why in outcome.report["diagnosis"]["sentence"]


def changed(directory, **changes):
    """The settings in ``directory`` changed; returns what they were."""
    file = directory / "preprocessor_config.json"
    before = file.read_text("utf-8")
    file.write_text(json.dumps({**json.loads(before), **changes}), "utf-8")
    return before


def test_another_factor_to_rescale_by_is_followed_and_seen(workshop, even):
    """On both sides it is right; in the converted directory alone it is wrong."""
    source = workshop.root / "source-other"
    build_demo(FAMILY, source)
    changed(source, rescale_factor=1 / 127.5)
    workshop.convert("resnet", source, "other")
    assert workshop.align("data", "other", "--data", even).code == 0
    changed(workshop.output("other"), rescale_factor=1 / 255)
    assert workshop.align("data", "other", "--data", even).failing == ["picture.0.pixel_values",
                                                                      "picture.1.pixel_values"]


@pytest.mark.parametrize("settings", [
    {"image_processor_type": "ViTImageProcessor", "size": {"height": 48, "width": 64}},
    {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 73}, "crop_size": 64},
    {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 73}, "do_center_crop": False},
    {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 384}},
], ids=lambda settings: settings["image_processor_type"])
def test_every_kind_of_processor_that_is_known_does_as_transformers_does(workshop, settings):
    square, _ = set_of(workshop, "two", (73, 91), (146, 182))  # of which 9 rows and 27 columns are cut away
    even, _ = set_of(workshop, "even", (73, 90), (146, 180))
    name = settings["image_processor_type"]
    source = workshop.root / f"source-{name}"
    build_demo(FAMILY, source)
    told = {**SETTINGS, **settings}
    (source / "preprocessor_config.json").write_text(json.dumps(told), "utf-8")
    workshop.convert("resnet", source, name)
    outcome = workshop.align("data", name, "--data", even if name == "CLIPImageProcessor" else square)
    assert outcome.code == 0, outcome.report.get("failures", outcome.stderr)


def test_a_filter_that_pil_has_no_number_for_is_refused(workshop, even):
    before = changed(workshop.output("net"), resample=9)
    try:
        outcome = workshop.align("data", "net", "--data", even)
    finally:
        (workshop.output("net") / "preprocessor_config.json").write_text(before, "utf-8")
    assert outcome.code == 2 and "says resample is 9; PIL's numbers are 0, 1, 2, 3, 4, 5." in outcome.stderr


@pytest.mark.parametrize("broken, why", [
    (lambda array: array[..., ::-1], "red and blue are exchanged"),
    ("bilinear", "bilinear interpolation of the nearest pixels alone (without antialiasing)"),
])
def test_other_code_of_a_candidate(workshop, monkeypatch, broken, why):
    """What the loader of a candidate of one's own would do: BGR, or OpenCV's way to resize."""
    square, _ = set_of(workshop, "square", (96, 96), (140, 140))
    if callable(broken):
        monkeypatch.setattr(picture_data, "_image", lambda picture, plain=picture_data._image: plain(
            np.ascontiguousarray(broken(picture))), raising=True)
        monkeypatch.setattr(picture_data, "_placed", unpatched(picture_data._image, broken, picture_data._placed))
    else:
        import paddle.vision.transforms as transforms

        class Bare(transforms.Resize):
            def _apply_image(self, image):
                array = picture_data._bare(np.asarray(image), (73, 73), broken)
                return Image.fromarray(array)
        monkeypatch.setattr(transforms, "Resize", Bare)
    outcome = workshop.align("data", "net", "--data", square)
    assert outcome.code == 1 and outcome.report["diagnosis"], outcome.report.get("failures")
    assert why in outcome.report["diagnosis"]["sentence"]


def unpatched(image, broken, placed):
    """``placed`` with pictures turned beforehand, so that what the reference supposes is as it was."""
    return lambda plan, picture, **given: placed(plan, np.ascontiguousarray(broken(picture)), **given)


def test_a_processor_that_is_not_known_is_refused(workshop):
    file = workshop.output("net") / "preprocessor_config.json"
    before = file.read_text("utf-8")
    file.write_text(json.dumps({**json.loads(before), "image_processor_type": "SegformerImageProcessor"}), "utf-8")
    try:
        outcome = workshop.align("data", "net")
    finally:
        file.write_text(before, "utf-8")
    assert outcome.code == 2 and outcome.report == {} and "is for a SegformerImageProcessor" in outcome.stderr
    assert workshop.align("data", "net", "--tokenizer", "a:b").code == 2


def test_a_checkpoint_that_does_not_say_how_is_refused(workshop):
    """torchvision's files say nothing; what torchvision itself does is not here to be run."""
    source = workshop.root / "source-bare"
    build_demo(FAMILY, source)
    (source / "preprocessor_config.json").unlink()
    workshop.convert("resnet", source, "bare")
    outcome = workshop.align("data", "bare")
    assert outcome.code == 2 and "has no preprocessor_config.json" in outcome.stderr and outcome.report == {}
