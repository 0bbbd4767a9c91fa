"""The pictures that a metric runs on, and what is done to them before a model sees them."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from align.inputs import DEVIATION, MEAN
from align.pictures import IMAGENET, PROCESSOR, as_array, draw, drawn, load_processor, prepared
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
    """Shorter side to 256, bilinear; 224 x 224 from the centre; scaled to 0 … 1, mean and deviation of ImageNet."""
    processor, told = load_processor(tmp_path, 3)
    picture = Image.fromarray(draw(number))
    scale = 256 / min(picture.size)
    resized = picture.resize((int(picture.width * scale), int(picture.height * scale)), Image.BILINEAR)
    left, top = (resized.width - 224) // 2, (resized.height - 224) // 2
    cut = np.asarray(resized.crop((left, top, left + 224, top + 224)), np.float64) / 255
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
