"""Planting: a plant is a context manager, and what it broke is whole again behind it.

A wrong weight is planted twice. In the *checkpoint* the file that the conversion wrote is rewritten, and comparing
weights names the tensor. In the *net* the weights that a comparison is shown are right and the net computes with
others, so that behaviour alone has to tell.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import paddle
from safetensors.numpy import load_file, save_file

from models.pretrained import Pretrained

from ..paddle_net import OwnNet
from .fault import Fault, NotPlanted, Plant, words
from .names import Names
from .wrong_nets import Break
from .wrong_weights import Edit, Tensors

Patterns = tuple[str, ...]


def weights(names: Names, kind: str, edit: Edit, block: str, expected: Patterns, explanation: str | None = None,
            why: str = "", also: str | None = None) -> list[Fault]:
    """A visible wrong weight, in the file and behind the net's back."""
    return [Fault(kind, names.family, place, how, plant(edit, names), block, frozenset(expected), words(explanation),
                  why=why, also=words(also) or frozenset(), changes=names.changes)
            for place, how, plant in (("checkpoint", "file", in_checkpoint), ("net", "weights held", in_held_weights))]


def invisible(names: Names, kind: str, edit: Edit, expected: Patterns, why: str, also: str | None = None
              ) -> list[Fault]:
    """A wrong weight that no output shows: only in the file, since behaviour has nothing to tell."""
    return [Fault(kind, names.family, "checkpoint", "file", in_checkpoint(edit, names), "", frozenset(expected), None,
                  False, why, words(also) or frozenset(), changes=names.changes)]


def code(names: Names, kind: str, break_net: Break, block: str, expected: Patterns, explanation: str | None = None,
         why: str = "", also: str | None = None, stage: str = "forward") -> list[Fault]:
    """A net that computes something else."""
    return [Fault(kind, names.family, "net", "code", in_net(partial(break_net, names)), block, frozenset(expected),
                  words(explanation), why=why, also=words(also) or frozenset(), changes=names.changes, stage=stage)]


def config(names: Names, kind: str, block: str, expected: Patterns, explanation: str | None = None, *,
           stage: str = "forward", **changes: Any) -> list[Fault]:
    """A config that says something else."""
    return [Fault(kind, names.family, "config", ", ".join(f"{key}={value}" for key, value in changes.items()),
                  in_config(**changes), block, frozenset(expected), words(explanation), changes=names.changes,
                  stage=stage)]


def in_checkpoint(edit: Edit, names: Names) -> Plant:
    """The converted file with ``edit`` done to its tensors; copies of one tensor stay copies."""
    @contextmanager
    def plant(output: Path) -> Iterator[None]:
        file = output / "model.safetensors"
        whole = file.read_bytes()
        tensors = load_file(file)
        before = dict(tensors)
        _edit(tensors, edit, names)
        if all(_same(before[name], tensors[name]) for name in before):
            raise NotPlanted("the edit changed no tensor of the file")
        save_file({name: np.array(array, order="C") for name, array in tensors.items()}, file, {"format": "np"})
        try:
            yield
        finally:
            file.write_bytes(whole)
    return plant


def in_config(**changes: Any) -> Plant:
    """The converted config with these values."""
    @contextmanager
    def plant(output: Path) -> Iterator[None]:
        file = output / "config.json"
        whole = file.read_text("utf-8")
        config = json.loads(whole)
        if all(config.get(key) == value for key, value in changes.items()):
            raise NotPlanted(f"the config says {changes} already")
        file.write_text(json.dumps({**config, **changes}), "utf-8")
        try:
            yield
        finally:
            file.write_text(whole, "utf-8")
    return plant


def in_net(break_net: Break) -> Plant:
    """The net, broken as soon as it is loaded; it may be broken in a way that shows only while a pass is under way."""
    @contextmanager
    def plant(output: Path) -> Iterator[None]:
        load = vars(Pretrained)["from_pretrained"].__func__
        broken = []

        def from_pretrained(cls: type[Pretrained], directory: str | Path) -> Pretrained:
            net = load(cls, directory)
            if Path(directory).resolve() == output.resolve():
                break_net(net)
                broken.append(cls)
            return net
        with patch.object(Pretrained, "from_pretrained", classmethod(from_pretrained)), patch.object(
                OwnNet, "reentrant", False):
            yield
        if not broken:
            raise NotPlanted(f"no net of models/ was loaded from {output}")
    return plant


def in_held_weights(edit: Edit, names: Names) -> Plant:
    """The net computes with edited weights, and whoever asks what it holds is shown the right ones."""
    def break_net(net: Any) -> None:
        held = {name: tensor.numpy().copy() for name, tensor in net.state_dict().items()}
        shown = {name: paddle.to_tensor(array) for name, array in held.items()}
        edited = dict(held)
        _edit(edited, edit, names)
        changed = [name for name in held if not _same(held[name], edited[name])]
        if not changed:
            raise NotPlanted("the edit changed no weight of the net")
        parameters = net.state_dict()
        for name in changed:
            paddle.to_tensor(np.array(edited[name], order="C"))._share_buffer_to(parameters[name])
        net.state_dict = lambda *arguments, **options: shown
    return in_net(break_net)


def together(*plants: Plant) -> Plant:
    @contextmanager
    def plant(output: Path) -> Iterator[None]:
        with ExitStack() as stack:
            for one in plants:
                stack.enter_context(one(output))
            yield
    return plant


def _edit(tensors: Tensors, edit: Edit, names: Names) -> None:
    """``edit``, on private arrays, and the same for tensors that are stored twice."""
    before = dict(tensors)
    for name, array in before.items():
        tensors[name] = array.copy()
    edit(tensors)
    for copy, original in names.copies.items():
        if copy in tensors and original in tensors and _same(tensors[copy], before[copy]):
            tensors[copy] = tensors[original].copy()


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    return one.shape == other.shape and one.tobytes() == other.tobytes()
