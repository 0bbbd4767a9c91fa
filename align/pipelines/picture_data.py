"""``align.data`` for a model that looks at pictures: transformers' image processor against ``paddle.vision``.

Up to the crop both work on whole numbers, which must be equal; what is divided and normalised then is equal up to what
rounding of float32 allows. Pictures go to both as PIL holds them, so that both resize with PIL, which averages over all
that falls into a smaller pixel; OpenCV, and torch's and Paddle's ``interpolate``, look at the nearest pixels only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from convert.errors import BadInput, require

from ..compare import TensorResult, compare, missing
from ..diagnose import Explanation
from ..inputs import Inputs
from ..pictures import PIXELS, PROCESSOR, as_array, drawn, load_processor
from ..stage import Findings, Session
from ..texts import columns, load_rows, renamed
from ..tolerance import EXACT, METRIC
from ..trace import RECORDED, Step
from .sheets import digests

CROPPED, VALUES, SUPPOSED = "cropped", PIXELS, "supposed"
COUNT, ROWS = 8, 64
INTERPOLATIONS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
"""PIL's numbers, by Paddle's words."""
LARGEST_CROPPED = 384
"""From this size on ConvNext's processor resizes to a square and crops nothing (``image_processing_convnext.py``)."""


@dataclass(frozen=True)
class Plan:
    """What a preprocessor does, step by step: resize the shorter side or both, crop the centre, divide, normalise."""

    resize: int | tuple[int, int] | None
    interpolation: int
    crop: tuple[int, int] | None
    scale: float | None
    mean: tuple[float, ...] | None
    deviation: tuple[float, ...] | None


def plan_of(directory: Path) -> Plan:
    """That of the ``preprocessor_config.json`` in ``directory``; :class:`BadInput` for one whose steps are others."""
    try:
        told = json.loads((directory / PROCESSOR).read_text("utf-8"))
        size, kind = told.get("size", {}), told.get("image_processor_type") or told.get("feature_extractor_type")
        size = {"shortest_edge": size} if isinstance(size, int) else size
        if str(kind).removesuffix("Fast") not in KINDS:
            raise BadInput(f"{PROCESSOR} in {directory} is for a {kind}; what paddle.vision has for it is not known "
                           f"here, only for {', '.join(KINDS)}. So nothing can be compared.")
        if told.get("do_resize", True) and told.get("resample", 2) not in INTERPOLATIONS:
            raise BadInput(f"{PROCESSOR} in {directory} says resample is {told['resample']!r}; PIL's numbers are "
                           f"{', '.join(map(str, INTERPOLATIONS))}.")
        resize, crop = KINDS[str(kind).removesuffix("Fast")](told, size)
        rescales, normalises = told.get("do_rescale", True), told.get("do_normalize", True)
        return Plan(resize if told.get("do_resize", True) else None, told.get("resample", 2), crop,
                    told.get("rescale_factor", 1 / 255) if rescales else None,
                    tuple(told["image_mean"]) if normalises else None,
                    tuple(told["image_std"]) if normalises else None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{PROCESSOR} in {directory} cannot be used ({type(error).__name__}: {error}).") from error


def _convnext(told: Mapping[str, Any], size: Mapping[str, int]) -> tuple[Any, tuple[int, int] | None]:
    edge = size["shortest_edge"]
    if edge >= LARGEST_CROPPED:
        return (edge, edge), None
    return int(edge / told.get("crop_pct", 224 / 256)), (edge, edge)


def _cropping(told: Mapping[str, Any], size: Mapping[str, int]) -> tuple[Any, tuple[int, int] | None]:
    """ViT's, CLIP's and the like: resize to the size told, and crop if told so."""
    crop = told.get("crop_size")
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
    crops = crop is not None and told.get("do_center_crop", True)
    return (size["shortest_edge"] if "shortest_edge" in size else (size["height"], size["width"]),
            (crop["height"], crop["width"]) if crops else None)


KINDS: dict[str, Callable[[Mapping[str, Any], Mapping[str, int]], tuple[Any, tuple[int, int] | None]]] = {
    "ConvNextImageProcessor": _convnext, "ConvNextFeatureExtractor": _convnext, "ViTImageProcessor": _cropping,
    "ViTFeatureExtractor": _cropping, "CLIPImageProcessor": _cropping, "BitImageProcessor": _cropping}


# The two sides --------------------------------------------------------------------------------------------------------

def reference(session: Session) -> Step:
    """What transformers' processor makes of the pictures, whole numbers and floats, and what known mistakes would."""
    run, options = session.run, session.options
    directory, channels = run.source if run.source.is_dir() else run.source.parent, run.sizes["channels"]
    if channels not in (1, 3):
        raise BadInput(f"pictures have 3 channels, or 1 if grey; this model takes {channels}, so there is nothing to "
                       "compare.")
    if options.data is None:
        name, rows = "pictures that are drawn by paddle-parity", drawn(COUNT, run.sizes["labels"])
    else:
        name, rows = load_rows(options.data, options.split, options.limit or ROWS, flag="--data")
    rows = renamed(rows, options.columns)
    columns(rows, image=object)
    if not rows:
        raise BadInput(f"{name} has no row, so there is nothing to compare.")
    if not (directory / PROCESSOR).is_file():
        raise BadInput(f"the source of run {run.name}, {directory}, has no {PROCESSOR} that says how its pictures are "
                       "prepared, so there is nothing to compare. Put it beside the checkpoint and convert again.")
    processor, told = load_processor(directory, channels)
    pictures = [as_array(row["image"], number, channels) for number, row in enumerate(rows)]
    session.advance("transformers' processor")
    step = _step(pictures, [processed(processor, picture, do_rescale=False, do_normalize=False).astype(np.uint8)
                            for picture in pictures], [processed(processor, picture) for picture in pictures])
    plan, cropped = plan_of(directory), _rows_of(step, CROPPED)
    counts = {f"picture.{number}.{CROPPED}": 1 for number in range(len(pictures))}
    mistakes = {told: [change(picture) for picture in pictures] for told, change in _of_place(plan)}
    step.told |= {"count": len(pictures), "counts": counts, "mistakes": list(mistakes), "notes": [
        f"Data: {len(pictures)} {name}, {told}.", f"Reference: transformers' {type(processor).__name__}; candidate: "
        f"paddle.vision.transforms by the {PROCESSOR} of the conversion's output. Both resize with PIL."]}
    step.view("pictures").update({str(number): picture for number, picture in enumerate(pictures)})
    step.view(SUPPOSED)["digests"] = np.stack([_digests(cropped, counts)] + [
        _digests(rows, counts) for rows in mistakes.values()])
    step.view("values").update({told: array for told, array in _of_values(plan, cropped[0])})
    return step


def processed(processor: Any, picture: np.ndarray, **given: bool) -> np.ndarray:
    """[channels, height, width], as the processor leaves a picture."""
    try:
        return processor(picture, input_data_format="channels_last", return_tensors="np", **given)["pixel_values"][0]
    except Exception as error:
        raise BadInput(f"the preprocessor fails on a picture of {picture.shape[1]} x {picture.shape[0]} pixels "
                       f"({type(error).__name__}: {error}).") from error


def candidate(session: Session, step: Step) -> Step:
    """What ``paddle.vision.transforms`` makes of the same pictures."""
    for framework in ("paddle", "PIL"):
        require(framework)
    from paddle.vision import transforms
    if "count" not in step.told:
        raise BadInput("the reference was recorded without its pictures, so the candidate cannot be fed them. Record "
                       "it again: python -m align.data --only reference")
    plan = plan_of(session.run.output)
    pictures = [step.view("pictures")[str(number)] for number in range(step.told["count"])]
    places = [transforms.Resize(plan.resize if isinstance(plan.resize, int) else list(plan.resize),
                                interpolation=INTERPOLATIONS[plan.interpolation])] if plan.resize else []
    places += [transforms.CenterCrop(plan.crop)] if plan.crop else []
    geometry = transforms.Compose(places) if places else lambda image: image
    cropped = [_with_channels(geometry(_image(picture)), picture.shape[2]) for picture in pictures]
    return _step(pictures, [np.moveaxis(array, -1, 0) for array in cropped],
                 [_paddle_values(plan, array) for array in cropped])


def _with_channels(image: Any, channels: int) -> np.ndarray:
    """[height, width, channels], one of grey pictures too."""
    array = np.asarray(image)
    return array.reshape(*array.shape[:2], channels)


def _paddle_values(plan: Plan, array: np.ndarray) -> np.ndarray:
    """float32 [channels, height, width]; ``ToTensor`` divides by 255, for any other scale there is no such step."""
    from paddle.vision import transforms
    usual = plan.scale is not None and math.isclose(plan.scale, 1 / 255)
    scaled = transforms.ToTensor()(array) if usual else (
        np.moveaxis(array, -1, 0) * (1.0 if plan.scale is None else plan.scale)).astype(np.float32)
    if plan.mean is not None:
        scaled = transforms.normalize(scaled, list(plan.mean), list(plan.deviation), data_format="CHW")
    return np.asarray(scaled.numpy() if hasattr(scaled, "numpy") else scaled, np.float32)


def _step(pictures: Sequence[np.ndarray], cropped: Sequence[np.ndarray], values: Sequence[np.ndarray]) -> Step:
    recorded: dict[str, np.ndarray] = {}
    for number, (whole, floats) in enumerate(zip(cropped, values, strict=True)):
        recorded |= {f"picture.{number}.{CROPPED}": np.ascontiguousarray(whole),
                     f"picture.{number}.{VALUES}": np.ascontiguousarray(floats, np.float32)}
    shown = {str(number): picture for number, picture in enumerate(pictures)}
    return Step({RECORDED: recorded}, told={"inputs_digest": Inputs(shown).digest})


def _rows_of(step: Step, what: str) -> list[np.ndarray]:
    return [array for name, array in step.recorded.items() if name.endswith(f".{what}")]


def _digests(rows: Sequence[np.ndarray], counts: Mapping[str, int]) -> np.ndarray:
    return digests({name: [np.ascontiguousarray(row)] for name, row in zip(counts, rows, strict=True)}, counts)


# Mistakes -------------------------------------------------------------------------------------------------------------

def _of_place(plan: Plan) -> Iterator[tuple[str, Callable[[np.ndarray], np.ndarray]]]:
    """(what is done instead, uint8 [height, width, channels] to [channels, height, width]), with PIL and torch."""
    usual = INTERPOLATIONS.get(plan.interpolation, "?")
    if plan.crop:
        yield ("the crop begins at half of what is left over rounded to the even number, instead of rounded down, so "
               "that it lies one pixel lower or further right"), lambda picture: _placed(plan, picture, rounds=True)
        yield "the picture is resized to the size of the crop instead of cropped", lambda picture: _placed(
            plan, picture, resize=plan.crop, crops=False)
    for number, word in INTERPOLATIONS.items():
        if number != plan.interpolation:
            yield f"pictures are resized by {word} instead of {usual} interpolation", lambda picture, number=number: (
                _placed(plan, picture, interpolation=number))
            yield (f"pictures are resized by {word} instead of {usual} interpolation, and cropped one pixel lower or "
                   "further right"), lambda picture, number=number: _placed(
                       plan, picture, interpolation=number, rounds=True)
    for word in ("bilinear", "bicubic"):
        yield (f"pictures are resized by {word} interpolation of the nearest pixels alone (without antialiasing), as "
               "OpenCV and interpolate() do it"), lambda picture, word=word: _placed(plan, picture, bare=word)
    yield "red and blue are exchanged (BGR instead of RGB)", lambda picture: _placed(plan, picture)[::-1]


def _placed(plan: Plan, picture: np.ndarray, *, interpolation: int | None = None, rounds: bool = False,
            resize: Any = None, crops: bool = True, bare: str | None = None) -> np.ndarray:
    """Resize and crop as ``plan`` says, but for what is given otherwise."""
    height, width = picture.shape[:2]
    size = resize or plan.resize or (height, width)
    if isinstance(size, int):
        short = min(height, width)
        size = (size * height // short, size * width // short)
    image = _bare(picture, size, bare) if bare else np.asarray(_image(picture).resize(
        (size[1], size[0]), plan.interpolation if interpolation is None else interpolation)).reshape(*size, -1)
    if crops and plan.crop:
        left = [found - wanted for found, wanted in zip(size, plan.crop, strict=True)]
        top, side = (round(some / 2) if rounds else some // 2 for some in left)
        image = image[top: top + plan.crop[0], side: side + plan.crop[1]]
    return np.ascontiguousarray(np.moveaxis(image, -1, 0))


def _bare(picture: np.ndarray, size: tuple[int, int], word: str) -> np.ndarray:
    import torch
    array = torch.tensor(picture).permute(2, 0, 1)[None].float()
    found = torch.nn.functional.interpolate(array, size, mode=word, align_corners=False, antialias=False)
    return found[0].permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8).numpy()


def _image(picture: np.ndarray) -> Any:
    from PIL import Image
    return Image.fromarray(picture[..., 0] if picture.shape[2] == 1 else picture)


def _of_values(plan: Plan, cropped: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """(what is done instead, float32 [channels, height, width]) of the first picture once it is cropped."""
    array = cropped.astype(np.float64)
    column = (-1, 1, 1)
    mean, deviation = (np.array(part).reshape(column) for part in (plan.mean or (0.0,), plan.deviation or (1.0,)))
    if plan.mean is not None:
        yield "mean and deviation are not taken out", (array * (plan.scale or 1)).astype(np.float32)
        yield "mean and deviation are 0.5 each", ((array * (plan.scale or 1) - 0.5) / 0.5).astype(np.float32)
        yield "values are not divided by the deviation", (array * (plan.scale or 1) - mean).astype(np.float32)
        yield "mean and deviation are applied in the order blue, green, red", (
            (array * (plan.scale or 1) - mean[::-1]) / deviation[::-1]).astype(np.float32)
    if plan.scale is not None:
        yield "values are not divided by 255", ((array - mean) / deviation).astype(np.float32)


# Judgement ------------------------------------------------------------------------------------------------------------

def judge(step: Step, answer: Step) -> Findings:
    """Whole numbers first, picture by picture, then floats."""
    found: list[TensorResult] = []
    for what, allowed in ((CROPPED, EXACT), (VALUES, METRIC)):
        for name, expected in step.recorded.items():
            if name.endswith(f".{what}"):
                given = answer.recorded.get(name)
                found.append(missing(name, "candidate") if given is None else compare(name, expected, given, allowed))
    return Findings(found, step.told["notes"], diagnosis=_diagnosis(step, answer, found))


def _diagnosis(step: Step, answer: Step, found: Sequence[TensorResult]) -> Explanation | None:
    wrong = next((tensor for tensor in found if not tensor.passed), None)
    if wrong is None:
        return None
    if wrong.name.endswith(f".{CROPPED}"):
        counts, supposed = step.told["counts"], step.view(SUPPOSED)["digests"]
        given = digests({name: [array] for name, array in answer.recorded.items()}, counts)
        before = float(np.mean(given != supposed[0]))
        fitting = np.flatnonzero((supposed[1:] == given).all(axis=1))
        return Explanation("data", wrong.name, f"{step.told['mistakes'][fitting[0]]}: with that done on torch's side, "
                           f"the pictures that differ fall from {before:.1%} to none.", before, 0.0) if len(
                               fitting) else None
    name = f"picture.0.{VALUES}"
    fits = ((told, compare(name, array, answer.recorded[name], METRIC)) for told, array in step.view("values").items())
    told, result = next(((told, result) for told, result in fits if result.passed), (None, None))
    if result is None or wrong.measures is None:
        return None
    return Explanation("data", wrong.name, f"{told}: with that done on torch's side, the error of {name} falls from "
                       f"{wrong.measures.rel_l2:.1e} to {result.measures.rel_l2:.1e}.", wrong.measures.rel_l2,
                       result.measures.rel_l2)
