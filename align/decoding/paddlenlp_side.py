"""PaddleNLP's classes with what they keep between tokens, called as PaddleNLP's own ``generate`` calls them.

Its loops ask a class what it is given of a text (``prepare_inputs_for_generation``), what becomes of its answer
(``update_model_kwargs_for_generation``), and for the keys and values of the beams that go on (``reorder_cache``). So
does this: what goes wrong is then the class's, and how keys and values lie, and under which name, is its own affair.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import paddle

from ..candidate import blamed
from .feeding import MASK, KeepsNothing

IDS, BESIDE = "ids", "beside"
"""What is kept: the tokens so far, and what ``generate`` calls its ``model_kwargs``."""
HELD = ("cache", "past_key_values")
"""Under which of these names the loops look for keys and values; some classes go by one, some by the other."""
Kept = dict[str, Any]


def begun(net: Any, tensors: Mapping[str, Any]) -> Kept:
    """What ``generate`` makes of the arguments that it is given: an encoder runs once, a mask holds 0 and 1."""
    beside = {**tensors, "use_cache": True}
    if MASK in beside:
        beside[MASK] = beside[MASK].astype("int64")
    ids = beside.pop("input_ids")
    if not net.config.is_encoder_decoder:
        return {IDS: ids, BESIDE: beside}
    text = beside.pop("decoder_input_ids")
    with _blamed(net):
        return {IDS: text, BESIDE: net.prepare_encoder_decoder_kwargs_for_generation(ids, beside)}


def longer(kept: Mapping[str, Any], tensors: Mapping[str, Any]) -> Kept:
    """What is kept, with one token more of each text; PaddleNLP counts and masks itself what comes with that."""
    last = tensors["decoder_input_ids" if "decoder_input_ids" in tensors else "input_ids"]
    return {**kept, IDS: paddle.concat([kept[IDS], last[:, -1:]], axis=1)}


def answered(net: Any, kept: Mapping[str, Any]) -> tuple[Any, Kept, frozenset[str]]:
    """(Logits [rows, tokens, vocabulary], what is kept now, names that ``generate`` was given and the class was not).

    :class:`KeepsNothing` where the class gives no keys and values, or is not given them again; BadInput where it fails.
    """
    with _blamed(net):
        given = net.prepare_inputs_for_generation(kept[IDS], **kept[BESIDE])
        answer = net(**given)
        beside = net.update_model_kwargs_for_generation(
            answer, dict(kept[BESIDE]), is_encoder_decoder=net.config.is_encoder_decoder)
    if not _holds(beside) or (_holds(kept[BESIDE]) and not _holds(given)):
        raise KeepsNothing(f"PaddleNLP's {type(net).__name__} keeps nothing from one token to the next")
    logits = answer if isinstance(answer, paddle.Tensor) else answer[0]
    return logits, {**kept, BESIDE: beside}, frozenset(
        name for name, value in kept[BESIDE].items() if name not in HELD and value is not None
        and given.get(name) is None)


def selected(net: Any, kept: Mapping[str, Any], places: Any) -> Kept:
    """What is kept of the rows at ``places``; of what goes with them, the same for all texts of a row, nothing changes.
    """
    with _blamed(net):
        held = {name: net.reorder_cache(kept[BESIDE][name], places) for name in HELD
                if kept[BESIDE].get(name) is not None}
    return {IDS: paddle.index_select(kept[IDS], places), BESIDE: {**kept[BESIDE], **held}}


def _holds(arguments: Mapping[str, Any]) -> bool:
    return any(arguments.get(name) is not None for name in HELD)


def _blamed(net: Any) -> Any:
    """What fails meanwhile is the fault of the class."""
    return blamed(f"PaddleNLP's {type(net).__name__}, with its cache,")
