"""The two tokenizers of ``align.data``, and what each makes of texts.

The reference is the source's own, as transformers' ``AutoTokenizer`` loads it; the candidate is PaddleNLP's class for
the family, from the directory that the conversion wrote, or what a function of the user's builds.
"""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from convert.errors import BadInput, require
from convert.traits import Prompts

from .. import prompts
from ..candidate import blamed, function_named, paddlenlp_imported
from ..runs import Run
from ..texts import TOKENIZER_FILES, load_tokenizer
from .corpus import Text

IDS, MASK, TYPES, SPECIAL, PLACES = ("input_ids", "attention_mask", "token_type_ids", "special_tokens_mask",
                                     "position_ids")
SPECIAL_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
Row = dict[str, np.ndarray]
OWN = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def fields_of(run: Run) -> tuple[str, ...]:
    """What the model takes of a text's row, and which of its tokens are special.

    ChatGLM's mask is made of a batch, and the code that it brings along does not say which tokens are special.
    """
    types = (TYPES,) if run.sizes.get("types", 0) > 1 else ()
    return (IDS, *types) if isinstance(run.head.inputs, Prompts) else (IDS, *types, MASK, SPECIAL)


# The reference --------------------------------------------------------------------------------------------------------

def open_reference(run: Run, fast: bool = True) -> Any:
    """The source's tokenizer; :class:`BadInput` where it has none. Not ``fast`` is transformers' own in Python."""
    directory = run.source if run.source.is_dir() else run.source.parent
    kind = run.head.inputs
    if isinstance(kind, Prompts):
        if not (directory / kind.words).is_file():
            raise BadInput(f"the source of run {run.name}, {directory}, has no {kind.words}, so there is no tokenizer "
                           "to compare. Put it beside the checkpoint and convert again.")
        return glm_tokenizer(directory, kind, prompts.marks_of(kind, run.config, run.sizes))
    found = load_tokenizer(directory) if fast else _slow(directory)
    if found is None:
        raise BadInput(f"the source of run {run.name}, {directory}, has no tokenizer ({', '.join(TOKENIZER_FILES)}), "
                       "so there is nothing to compare. Put its files beside the checkpoint and convert again.")
    return found


def _slow(directory: Path) -> Any:
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(directory, use_fast=False, trust_remote_code=False)


@contextmanager
def silent() -> Iterator[None]:
    """transformers meanwhile says nothing of texts that are long, of padding, and of how it was before."""
    require("transformers")
    from transformers.utils import logging as told
    before = told.get_verbosity()
    told.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        told.set_verbosity(before)


def glm_tokenizer(directory: Path, kind: Prompts, marks: Mapping[str, int]) -> Any:
    """GLM's, on transformers' base class, by the rules of the code that the checkpoint brings along.

    ChatGLM-6B's code itself cannot be made by transformers 4.55: its base class asks for words before the model is
    loaded. The rules: lines, tabs and runs of blanks are words; behind a text stand the mask and the bos, and behind a
    second text the eos.
    """
    for framework in ("transformers", "sentencepiece"):
        require(framework)
    from transformers import PreTrainedTokenizer
    words = prompts.Tokenizer(directory, kind, dict(marks))
    model, offset = words.model, words.offset
    for name, number in marks.items():
        if not offset <= number < offset + model.get_piece_size():
            raise BadInput(f"config.json says {name} is {number}, which is no word of {directory / kind.words}: those "
                           f"are {offset} to {offset + model.get_piece_size() - 1}.")
    names = {name: model.id_to_piece(number - offset) for name, number in marks.items()}

    class GLM(PreTrainedTokenizer):
        """A slow tokenizer: texts are parted at special tokens by transformers, all else by the SentencePiece model."""

        model_input_names = (IDS, MASK)
        vocab_size = property(lambda self: offset + model.get_piece_size())
        fold = staticmethod(words.folded)

        def get_vocab(self) -> dict[str, int]:
            return {model.id_to_piece(number): offset + number for number in range(model.get_piece_size())}

        def _tokenize(self, text: str, **_: Any) -> list[str]:
            return model.encode(self.fold(text), out_type=str)

        def _convert_token_to_id(self, token: str) -> int:
            return offset + model.piece_to_id(token)

        def _convert_id_to_token(self, number: int) -> str:
            return model.id_to_piece(number - offset) if number >= offset else f"<image_{number}>"

        def build_inputs_with_special_tokens(self, first: list[int], second: list[int] | None = None) -> list[int]:
            opened = [*first, marks["gmask_token_id"], marks["bos_token_id"]]
            return opened if second is None else [*opened, *second, marks["eos_token_id"]]

        def get_special_tokens_mask(self, first: list[int], second: list[int] | None = None,
                                    already_has_special_tokens: bool = False) -> list[int]:
            opened = [0] * len(first) + [1, 1]
            return opened if second is None else [*opened, *[0] * len(second), 1]

    given = {name: names[f"{name}_id"] for name in ("bos_token", "eos_token", "mask_token", "pad_token")}
    return GLM(unk_token=model.id_to_piece(model.unk_id()), additional_special_tokens=[names["gmask_token_id"]],
               padding_side="left", **given)


# The candidate --------------------------------------------------------------------------------------------------------

def open_candidate(run: Run, given: str | None) -> Any:
    """PaddleNLP's tokenizer from the conversion's output alone, or what ``given``, a module:function, builds of it.

    :class:`BadInput` where PaddleNLP has no counterpart, or cannot load what is there.
    """
    quiet()
    if given is not None:
        return _own(given, run.output)
    if not run.family.paddlenlp_tokenizer:
        raise BadInput(f"PaddleNLP has no counterpart of the tokenizer of family {run.family.name}, so nothing can be "
                       "compared. Give your own: --tokenizer MODULE:BUILD")
    cls = paddlenlp_class(run)
    try:
        found = cls.from_pretrained(str(run.output))
    except Exception as error:
        found, why = None, f" ({type(error).__name__}: {next(iter(str(error).splitlines()), '')[:200]})"
    else:
        why = ""
    if not callable(found):  # it returns False where SentencePiece cannot read its file
        wanted = ", ".join(cls.resource_files_names.values())
        raise BadInput(f"PaddleNLP's {cls.__name__} cannot be loaded from {run.output}{why}, so nothing can be "
                       f"compared. It reads {wanted}: put {'them' if ',' in wanted else 'it'} beside the source "
                       "checkpoint and convert again.")
    return found


def quiet() -> None:
    """PaddleNLP, without what it says when it is imported and of tokens that are not set."""
    require("paddle")
    with paddlenlp_imported():
        from paddlenlp.utils.log import logger
    logger.set_level("CRITICAL")


def paddlenlp_class(run: Run) -> Any:
    module, _, name = run.family.paddlenlp_tokenizer.partition(":")
    with paddlenlp_imported():
        return getattr(importlib.import_module(f"paddlenlp.transformers.{module}"), name)


def _own(given: str, directory: Path) -> Any:
    if not OWN.fullmatch(given):
        raise BadInput(f"--tokenizer {given} is not of the form package.module:build.")
    build = function_named("--tokenizer", given, "the output directory (a Path)", directory)
    with blamed(f"your {given}"):
        return build(directory)


def name_of(tokenizer: Any) -> str:
    """Whose it is, and what it is called."""
    cls = type(tokenizer)
    package = cls.__module__.partition(".")[0]
    return f"PaddleNLP {version('paddlenlp')}'s {cls.__name__}" if package == "paddlenlp" else (
        f"transformers' {cls.__name__}" if package == "transformers" else f"{cls.__module__}.{cls.__name__}")


# What both make of texts ----------------------------------------------------------------------------------------------

def encoded_by(tokenizer: Any, text: Text, limit: int | None) -> Row:
    """Every flat row of numbers that the candidate gives for ``text``, cut at ``limit`` tokens if there is one;
    :class:`BadInput` where it fails, or gives no ids.
    """
    cut = {} if limit is None else {"truncation": True, "max_length": limit}
    with blamed(name_of(tokenizer)):
        found = tokenizer(text.text, text.pair, return_attention_mask=True, return_special_tokens_mask=True, **cut)
        rows = {name: np.asarray(found[name]) for name in found}
        flat = {name: row.astype(np.int64) for name, row in rows.items() if row.ndim == 1}
    if IDS not in flat:
        raise BadInput(f"{name_of(tokenizer)} gives no flat row of {IDS} for {text.excerpt}, but {', '.join(rows)}. A "
                       f"mapping with {IDS}, a list of whole numbers, is needed.")
    return flat


def pieces(tokenizer: Any, rows: Sequence[np.ndarray]) -> dict[str, str]:
    """What each id that occurs stands for, by the id."""
    ids = sorted({int(number) for row in rows for number in row.reshape(-1)})
    read = getattr(tokenizer, "convert_ids_to_tokens", lambda numbers: numbers)
    found = {}
    for number in ids:
        try:
            found[str(number)] = str(next(iter(read([number])), "?"))
        except Exception:  # an id that the vocabulary does not hold is what we are here to tell of
            found[str(number)] = "?"
    return found


def special_ids(tokenizer: Any) -> np.ndarray:
    """int64 [7]: the ids of ``SPECIAL_TOKENS``, -1 where there is none."""
    found = []
    for name in SPECIAL_TOKENS:
        number = getattr(tokenizer, f"{name}_token_id", None)
        found.append(number if isinstance(number, int) else -1)
    return np.array(found, np.int64)


def pad_with(tokenizer: Any, token: str | None) -> None:
    """Give a tokenizer without padding the ``token`` that the other side pads with."""
    if token is not None and getattr(tokenizer, "pad_token_id", None) is None:
        tokenizer.pad_token = token


def torch_shift(run: Run) -> Any:
    """transformers' way from labels to what the decoder reads, int64 [texts, tokens] to the same; None without one."""
    import torch
    import transformers
    cls = getattr(transformers, run.head.architecture, None)
    if run.head.inputs != "tokens to tokens" or not hasattr(cls, "_shift_right"):
        return None
    config = cls.config_class(**run.config)
    return lambda labels: cls._shift_right(SimpleNamespace(config=config), torch.tensor(labels)).numpy()


def paddle_shift(run: Run) -> Any:
    """The same of PaddleNLP's class, by the config that the conversion wrote."""
    import paddle
    package = run.family.paddlenlp or run.family.name
    cls = getattr(importlib.import_module(f"paddlenlp.transformers.{package}.modeling"), run.head.paddlenlp)
    config = cls.config_class.from_pretrained(str(run.output))

    def shift(labels: np.ndarray) -> np.ndarray:
        with blamed(f"PaddleNLP's {cls.__name__}"):
            return cls._shift_right(SimpleNamespace(config=config), paddle.to_tensor(labels)).numpy()
    return shift


def judged(row: Mapping[str, np.ndarray], fields: Sequence[str]) -> Row:
    """Of a row what both sides are asked for."""
    return {name: row[name] for name in fields if name in row}
