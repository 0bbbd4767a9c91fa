"""PaddleNLP's own conversion: ``paddlenlp_convert CLASS SOURCE ANSWER [CONVERTED]``.

Writes as JSON into ANSWER the seconds it took without imports, and its exception if it raised one; with our result
CONVERTED also which tensors of the class are then the same, bit by bit.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from convert.checkpoint import open_checkpoint


def load(cls: str, source: str) -> Any:
    """The class filled by ``from_pretrained(source, convert_from_torch=True)``."""
    import paddlenlp.transformers
    from paddlenlp.transformers.gptj import modeling
    found = getattr(modeling, cls, None) or getattr(paddlenlp.transformers, cls)
    return found.from_pretrained(source, convert_from_torch=True)


def judged(model: Any, converted: str) -> dict[str, Any]:
    """``equal`` and ``different``: the parameters of ``model`` that are, and are not, those of our result."""
    equal, different = 0, []
    with open_checkpoint(converted) as ours:
        for name, held in model.state_dict().items():
            known = next((key for key in (name, f"{model.base_model_prefix}.{name}") if key in ours.tensors), None)
            if known is not None and np.array_equal(ours.read(known), held.numpy()):
                equal += 1
            else:
                different.append(name)
    return {"equal": equal, "different": different}


def main(cls: str, source: str, answer: str, converted: str | None = None) -> None:
    import paddlenlp.transformers  # noqa: F401
    started = time.perf_counter()
    try:
        model = load(cls, source)
    except Exception as error:
        said = " ".join(str(error).split())
        found: dict[str, Any] = {"error": f"{type(error).__name__}{f': {said[:190]}' if said else ''}"}
    else:
        found = {"error": None, "seconds": time.perf_counter() - started}
        found |= judged(model, converted) if converted else {}
    Path(answer).write_text(json.dumps(found), "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
