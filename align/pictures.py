"""The pictures a metric runs on: a few that are drawn here, or a set of the ``datasets`` library.

Pictures are uint8 [height, width, 3]. What a checkpoint's ``preprocessor_config.json`` asks for is done to them by
transformers' own processor, else what torchvision evaluates its ResNets with.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from convert.errors import BadInput, require
from convert.rules import Sizes

from .inputs import DEVIATION, MEAN, Inputs
from .texts import Example, Row, columns

PIXELS = "pixel_values"
PROCESSOR = "preprocessor_config.json"
RESIZED, CROPPED = 256, 224
GREY_MEAN, GREY_DEVIATION = (0.449,), (0.226,)
SIZES = ((96, 128), (120, 96), (97, 97), (100, 131))
Canvas = np.ndarray
Draw = Callable[[Canvas, np.ndarray, np.ndarray, np.random.Generator], None]


def load_processor(directory: Path, channels: int) -> tuple[Any, str]:
    """(transformers' processor for pictures of 3 channels or of 1, what is told of it)."""
    for package in ("transformers", "PIL"):
        require(package)
    from transformers import AutoImageProcessor
    if (directory / PROCESSOR).is_file():
        try:
            return (AutoImageProcessor.from_pretrained(directory, use_fast=False, trust_remote_code=False),
                    "preprocessed as the source does")
        except Exception as error:
            raise BadInput(f"{PROCESSOR} in {directory} cannot be used ({type(error).__name__}: {error}).") from error
    mean, deviation = (MEAN, DEVIATION) if channels == 3 else (GREY_MEAN, GREY_DEVIATION)
    return (partial(as_torchvision, mean=mean, deviation=deviation),
            f"as torchvision evaluates, because the checkpoint has no {PROCESSOR}: shorter side 256, 224 x 224 from "
            "the centre, ImageNet's mean and deviation")


def as_torchvision(picture: np.ndarray, *, mean: Sequence[float], deviation: Sequence[float], **_: object,
                   ) -> dict[str, list[np.ndarray]]:
    """What torchvision's references evaluate ResNets with (``ImageClassification``), called as a processor is.

    The shorter side to 256 by PIL's bilinear; 224 x 224 from the centre, where half of an odd remainder is rounded to
    the even number (``functional.center_crop``), unlike in transformers, which rounds down; float32, normalised.
    """
    from PIL import Image
    image = Image.fromarray(picture[..., 0] if picture.shape[2] == 1 else picture)
    short = min(image.size)
    width, height = (RESIZED * side // short for side in image.size)
    left, top = (round((side - CROPPED) / 2) for side in (width, height))
    cut = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR).crop(
        (left, top, left + CROPPED, top + CROPPED)), np.float32).reshape(CROPPED, CROPPED, -1)
    return {PIXELS: [np.moveaxis((cut / 255 - np.float32(mean)) / np.float32(deviation), -1, 0)]}


def examples_of(rows: Sequence[Row], directory: Path, sizes: Sizes) -> tuple[list[Example], str]:
    """An example a row, float32 [channels, height, width] with its label, and what is told of how they were made."""
    channels = sizes["channels"]
    if channels not in (1, 3):
        raise BadInput(f"pictures have 3 channels, or 1 if grey; this model takes {channels}, so there is nothing to "
                       "measure it on. align.forward and align.loss feed it seeded values.")
    processor, told = load_processor(directory, channels)
    columns(rows, image=object, label=float if sizes["labels"] == 1 else int)
    pictures = [prepared(processor, as_array(row["image"], number, channels)) for number, row in enumerate(rows)]
    found = {picture.shape for picture in pictures}
    if len(found) > 1:
        shapes = ", ".join(" x ".join(map(str, shape)) for shape in sorted(found)[:3])
        raise BadInput(f"the preprocessor leaves pictures of several shapes ({shapes}), which make no batch. Let "
                       f"{PROCESSOR} crop them or resize both sides.")
    size = " x ".join(map(str, next(iter(found), ())))
    return ([Example({PIXELS: picture}, {"label": row["label"]}) for picture, row in zip(pictures, rows, strict=True)],
            f"{told}: {size} each")


def batches(examples: Sequence[Example], size: int) -> list[Inputs]:
    """Pictures in order, none dropped."""
    return [Inputs({PIXELS: np.stack([example.inputs[PIXELS] for example in examples[start: start + size]])})
            for start in range(0, len(examples), size)]


def prepared(processor: Any, picture: np.ndarray) -> np.ndarray:
    """float32 [channels, height, width], as a model of as many channels as ``picture`` has takes it."""
    try:
        given = processor(picture, input_data_format="channels_last", return_tensors="np")
    except Exception as error:
        raise BadInput(f"the preprocessor fails on a picture of {picture.shape[1]} x {picture.shape[0]} pixels "
                       f"({type(error).__name__}: {error}).") from error
    return given["pixel_values"][0].astype(np.float32)


def as_array(value: Any, number: int, channels: int) -> np.ndarray:
    """uint8 [height, width, channels] of a row's ``image``: an array, a picture of PIL's, a path, or what the
    ``datasets`` library makes of a picture, {"bytes": …, "path": …}."""
    from PIL import Image, UnidentifiedImageError
    try:
        if isinstance(value, str):
            value = Image.open(value)
        elif isinstance(value, Mapping):
            value = Image.open(io.BytesIO(value["bytes"]) if value.get("bytes") else value["path"])
        if not isinstance(value, Image.Image):
            rows = np.asarray(value, np.uint8)
            if rows.ndim not in (2, 3):
                raise ValueError(f"an array of {rows.ndim} axes")
            value = Image.fromarray(rows)
        return np.asarray(value.convert("RGB" if channels == 3 else "L"), np.uint8).reshape(
            value.height, value.width, channels)
    except (UnidentifiedImageError, OSError, TypeError, ValueError, KeyError) as error:
        raise BadInput(f"row {number} of the data set has an image that is no picture "
                       f"({type(error).__name__}: {next(iter(str(error).splitlines()), '')}).") from error


def drawn(count: int, labels: int) -> list[dict[str, Any]]:
    """``count`` pictures by turns of ten things that a few strokes can draw, always the same.

    A model of 1000 labels is asked for ImageNet's number of the thing, another for its number here.
    """
    return [{"image": draw(number), "label": IMAGENET[number % len(IMAGENET)] if labels == 1000 else
             number % len(IMAGENET) % max(1, labels)} for number in range(count)]


def draw(number: int) -> np.ndarray:
    """Picture ``number``: place, size, colours and noise are seeded by it."""
    generator = np.random.default_rng(20260925 + number)
    height, width = SIZES[number % len(SIZES)]
    canvas = np.empty((height, width, 3))
    canvas[:] = generator.uniform(60, 230, 3)
    canvas += np.linspace(-25, 25, width)[:, None] * generator.choice([-1, 1])
    scale = generator.uniform(0.38, 0.47) * min(height, width)
    down, right = generator.uniform(-0.05, 0.05, 2) * (height, width)
    y = (np.arange(height)[:, None] - height / 2 - down) / scale
    x = (np.arange(width)[None, :] - width / 2 - right) / scale
    THINGS[number % len(THINGS)](canvas, *np.broadcast_arrays(x, y), generator)
    return np.clip(canvas + generator.normal(0, 4, canvas.shape), 0, 255).astype(np.uint8)


# Ten things, on axes x to the right and y down, each some 1 to either side -------------------------------------------

def _clock(canvas: Canvas, x: np.ndarray, y: np.ndarray, generator: np.random.Generator) -> None:
    radius, hours = np.hypot(x, y), np.arctan2(y, x) * 6 / np.pi
    canvas[radius < 1] = (40, 40, 45)
    canvas[radius < 0.9] = (245, 245, 240)
    canvas[(radius > 0.72) & (radius < 0.86) & (np.abs(hours - np.round(hours)) < 0.1)] = (20, 20, 20)
    for length, thick in ((0.45, 0.07), (0.68, 0.045)):
        _stroke(canvas, x, y, generator.uniform(0, 2 * np.pi), length, thick)


def _stroke(canvas: Canvas, x: np.ndarray, y: np.ndarray, angle: float, length: float, thick: float) -> None:
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    canvas[(along > -0.05) & (along < length) & (np.abs(across) < thick)] = (20, 20, 20)


def _envelope(canvas: Canvas, x: np.ndarray, y: np.ndarray, generator: np.random.Generator) -> None:
    inside = (np.abs(x) < 1) & (np.abs(y) < 0.65)
    canvas[inside] = generator.uniform((220, 210, 190), (250, 240, 220))
    flap = np.abs(y + 0.65 - 0.75 * (1 - np.abs(x))) < 0.035
    edge = (np.abs(x) > 0.96) | (np.abs(y) > 0.61)
    canvas[inside & (flap | edge)] = (130, 110, 90)


def _honeycomb(canvas: Canvas, x: np.ndarray, y: np.ndarray, generator: np.random.Generator) -> None:
    size = generator.uniform(0.24, 0.3)
    waves = sum(np.cos((x * np.cos(angle) + y * np.sin(angle)) * 4 * np.pi / (3 * size) * 0.87)
                for angle in np.arange(3) * np.pi / 3)
    canvas[:] = (225, 165, 45)
    canvas[waves < -0.6] = (150, 90, 15)
    canvas[waves > 1.2] = (120, 70, 10)


def _traffic_light(canvas: Canvas, x: np.ndarray, y: np.ndarray, generator: np.random.Generator) -> None:
    canvas[(np.abs(x) < 0.42) & (np.abs(y) < 1)] = (30, 32, 30)
    lit = generator.integers(3)
    for number, colour in enumerate(((230, 40, 30), (240, 190, 40), (40, 200, 90))):
        canvas[np.hypot(x, y - 0.62 * (number - 1)) < 0.26] = np.array(colour) * (1.0 if number == lit else 0.35)


def _crossword(canvas: Canvas, x: np.ndarray, y: np.ndarray, generator: np.random.Generator) -> None:
    black = generator.random((9, 9)) < 0.2
    column, row = (np.clip(np.floor((axis + 1) * 4.5), 0, 8).astype(int) for axis in (x, y))
    inside = (np.abs(x) < 1) & (np.abs(y) < 1)
    lines = (np.abs((x + 1) * 4.5 % 1 - 0.5) > 0.43) | (np.abs((y + 1) * 4.5 % 1 - 0.5) > 0.43)
    canvas[inside] = (250, 250, 248)
    canvas[inside & ((black | black[::-1, ::-1])[row, column] | lines)] = (15, 15, 15)


def _tennis_ball(canvas: Canvas, x: np.ndarray, y: np.ndarray, generator: np.random.Generator) -> None:
    _ball(canvas, x, y, (205, 225, 60))
    side = generator.choice([-1, 1])
    for sign in (-1, 1):
        seam = np.abs(np.hypot(x - sign * 1.15, y - side * sign * 0.4) - 0.85) < 0.045
        canvas[seam & (np.hypot(x, y) < 0.98)] = (245, 248, 235)


def _orange(canvas: Canvas, x: np.ndarray, y: np.ndarray, generator: np.random.Generator) -> None:
    _ball(canvas, x, y, (240, 140, 25))
    dimples = (generator.random(x.shape) < 0.08) & (np.hypot(x, y) < 0.95)
    canvas[dimples] *= 0.88
    canvas[np.hypot(x - 0.1, y + 0.6) < 0.07] = (70, 90, 30)


def _lemon(canvas: Canvas, x: np.ndarray, y: np.ndarray, generator: np.random.Generator) -> None:
    _ball(canvas, x * 1.02, y * 1.5, (245, 220, 50))
    tips = (np.hypot((np.abs(x) - 0.97) * 1.2, y * 1.6) < 0.17)
    canvas[tips] = (225, 200, 45)


def _stop_sign(canvas: Canvas, x: np.ndarray, y: np.ndarray, generator: np.random.Generator) -> None:
    reach = np.maximum(np.maximum(np.abs(x), np.abs(y)), (np.abs(x) + np.abs(y)) / np.sqrt(2))
    canvas[reach < 0.95] = (240, 240, 240)
    canvas[reach < 0.87] = (190, 25, 30)
    letters = (np.abs(y) < 0.22) & (np.abs(x) < 0.7) & (np.abs((x + 0.7) % 0.36 - 0.18) < 0.12)
    canvas[letters & ~((np.abs(y) < 0.1) & (np.abs((x + 0.7) % 0.36 - 0.18) < 0.05))] = (245, 245, 245)


def _pizza(canvas: Canvas, x: np.ndarray, y: np.ndarray, generator: np.random.Generator) -> None:
    radius = np.hypot(x, y)
    canvas[radius < 1] = (200, 140, 70)
    canvas[radius < 0.86] = (240, 200, 90)
    for angle, out in zip(generator.uniform(0, 2 * np.pi, 9), generator.uniform(0.1, 0.68, 9), strict=True):
        canvas[np.hypot(x - out * np.cos(angle), y - out * np.sin(angle)) < 0.15] = (175, 45, 30)


def _ball(canvas: Canvas, x: np.ndarray, y: np.ndarray, colour: Sequence[int]) -> None:
    """Lit from the upper left."""
    light = np.clip(1.1 - 0.35 * np.hypot(x + 0.35, y + 0.4), 0, 1)
    inside = np.hypot(x, y) < 1
    canvas[inside] = np.array(colour) * light[inside][:, None]


THINGS: tuple[Draw, ...] = (_clock, _envelope, _honeycomb, _traffic_light, _crossword, _tennis_ball, _orange, _lemon,
                            _stop_sign, _pizza)
IMAGENET = (409, 549, 599, 920, 918, 852, 950, 951, 919, 963)
"""The numbers of these ten among ImageNet's 1000 classes, in the order that torchvision and transformers have."""
