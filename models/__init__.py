"""Paddle nets of our own: parameter names as PaddleNLP has them, numbers as torch computes them.

A family is one file, ``models/<model_type>.py``, whose classes carry the names of ``transformers``. It is
found by that name, so a new family needs no edit here. Importing this package does not import paddle.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from convert.errors import BadInput

if TYPE_CHECKING:
    from .pretrained import Pretrained

PROJECT = "paddle-parity"


class UnknownModel(BadInput, ValueError):
    """No family, or no head of a family, answers to what a config asks for."""


def from_pretrained(directory: str | Path, head: str | None = None) -> Pretrained:
    """The net that ``config.json`` names, or ``head`` of its family, with the weights of ``directory``."""
    from convert.checkpoint import read_config

    config = read_config(Path(directory))
    return model_class(config, head).from_pretrained(directory)


def model_class(config: dict, head: str | None = None) -> type[Pretrained]:
    """The class that ``model_type`` and ``head``, or the first of ``architectures``, name."""
    family = _family(config.get("model_type"))
    name = head or next(iter(config.get("architectures") or []), None)
    if name is None:
        raise UnknownModel('config.json names no architectures; pass head=, for example head="BertModel".')
    found = getattr(family, name, None)
    if not _is_net(found):
        heads = ", ".join(sorted(key for key, value in vars(family).items() if _is_net(value)))
        raise UnknownModel(f"{family.__name__} has no net {name!r}. It has: {heads}.")
    return found


def _family(model_type: object):
    name = str(model_type).replace("-", "_")
    module = f"{__name__}.{name}"
    unknown = UnknownModel(f"no net for model_type {model_type!r}: there is no models/{name}.py.")
    if not name.isidentifier():
        raise UnknownModel(f"model_type {model_type!r} in config.json is not the name of a family.")
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise unknown from error


def _is_net(value: object) -> bool:
    """Whether ``value`` is a class with a config and a ``forward`` of ours, which what nets have in common lacks."""
    return isinstance(value, type) and "config_class" in dir(value) and any(
        "forward" in vars(cls) for cls in value.__mro__ if cls.__module__.startswith(f"{__name__}."))
