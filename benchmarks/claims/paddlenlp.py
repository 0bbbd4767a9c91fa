"""Conversion beside PaddleNLP's own ``from_pretrained(…, convert_from_torch=True)``: time, and whether it is right."""

from __future__ import annotations

import json
import os
from pathlib import Path
from statistics import median
from typing import Any

from ..bench import Bench, settle
from ..claim import Claim, Measured, absolute
from ..shapes import Scale, Shape

PAIRS = 3


def beside_paddlenlp(bench: Bench, shape: Shape, cls: str) -> Measured:
    """Seconds of both processes; what PaddleNLP's class then holds is compared bit by bit with our result."""
    converted = bench.outputs / bench.converted(shape)
    source = bench.source(shape)
    answers: list[dict[str, Any]] = []

    def convert() -> float:
        with bench.scratch("beside") as target:
            settle(source, warm=True)
            return bench.convert(shape, target).seconds

    def load(*judged_by: Path) -> float:
        with bench.scratch("beside") as copied:
            _linked(source, copied)
            settle(source, warm=True)
            answer = copied / "answer"
            ran = bench.python("-m", "benchmarks.rivals.paddlenlp_convert", cls, copied, answer, *judged_by)
            answers.append(json.loads(answer.read_text("utf-8")))
            return ran.seconds

    bench.tell(f"whether PaddleNLP's {cls} converts {shape.name}")
    load(converted)
    judged = answers.pop()
    if judged["error"]:
        return absolute([convert()], (), "s", notes=(f"PaddleNLP's {cls} does not convert it: {judged['error']}",))
    ours, rival = bench.alternately(f"convert and PaddleNLP's {cls} on {shape.name}", convert, load, PAIRS)
    inner = median(answer["seconds"] for answer in answers)
    return absolute(ours, rival, "s", notes=(_judged(judged), f"Without its imports PaddleNLP took {inner:.2f} s.",
                                             "Ours is read back; PaddleNLP's is not, and holds a model in the end."))


def _judged(answer: dict[str, Any]) -> str:
    wrong = answer["different"]
    shown = f": {', '.join(wrong[:3])}{' …' if len(wrong) > 3 else ''}" if wrong else ""
    return f"PaddleNLP has {answer['equal']} of {answer['equal'] + len(wrong)} tensors right{shown}."


def _linked(source: Path, copied: Path) -> None:
    """A directory of the same files: PaddleNLP writes its result beside its source."""
    copied.mkdir()
    for file in source.iterdir():
        os.link(file, copied / file.name)


def _bert(scale: Scale) -> Shape:
    return scale.bert


def _gptj(scale: Scale) -> Shape:
    return scale.gptj


CLAIMS = tuple(
    Claim(f"paddlenlp.{cls}", f"converting beside PaddleNLP's own `{cls}.from_pretrained(…, convert_from_torch=True)`",
          None, f"PaddleNLP's `{cls}`",
          lambda bench, cls=cls, shape=shape: beside_paddlenlp(bench, shape(bench.scale), cls),
          lambda scale, shape=shape: (shape(scale),))
    for cls, shape in (("BertModel", _bert), ("BertForPretraining", _bert), ("GPTJForCausalLM", _gptj))
)
