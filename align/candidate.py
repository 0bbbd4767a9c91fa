"""What a candidate answers to the steps of the reference: a pass of its own, and passes fed torch's activations.

Every target answers the same calls as the reference, so the stages need not know which one is behind them.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import re
import sys
import traceback
import warnings
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import xxhash

from convert.errors import BadInput, FrameworkMissing, require

from .inputs import Inputs
from .inside import Places, small_input
from .lockstep import heard_by, in_step, in_turn
from .paging import Pages, gates_of
from .runs import Run
from .side import Modules, Side
from .trace import RECORDED, Step

TARGETS = ("models", "paddlenlp")
Look = Callable[[str, np.ndarray], None]


class Candidate(Side):
    """The model that is to be proved the same. ``paged``: its weights come in module by module, and leave again."""

    framework: str
    version: str
    model: Any
    reentrant = True
    """Whether several passes of the net may be under way at once; a net that keeps state while it runs is not."""

    def __init__(self, run: Run, paged: bool = False) -> None:
        self.run = run
        self._hashes: dict[str, str] = {}
        self.model = self._build_empty() if paged else self._build()
        self.model.eval()
        layers = self._layers()
        recorded = {self._path(pair): pair[1] for pair in run.modules}
        self.gates = gates_of([path for path in recorded if path in layers], self.model.state_dict().keys(),
                               {path for path, layer in layers.items() if not any(layer.children())})
        if paged:
            self._pages = self._paged()
        for path in self.gates:
            name = recorded.get(path, path)
            layers[path].register_forward_pre_hook(lambda *_, name=name: self.come_to(name))

    def blamed(self) -> AbstractContextManager[None]:
        """What fails meanwhile is told as the fault of a net that is not ours."""
        return nullcontext()

    @abstractmethod
    def state(self) -> Iterator[tuple[str, np.ndarray]]:
        """Every parameter and buffer that the net holds, by Paddle's name, in Paddle's layout."""

    def show(self, look: Look = lambda name, array: None) -> None:
        """``look`` is shown what :meth:`state` gives, each tensor once, and all of it is hashed on the way.

        Weights in memory are shown now. Those of a paged net are shown when they come in for the first time, so that
        they need not come in for that alone; :meth:`show_rest` brings in what nothing has asked for until then.
        """
        self._hashes = {}

        def seen(name: str, array: np.ndarray) -> None:
            if name in self._hashes:
                raise BadInput(f"two weights of this {type(self.model).__name__} go by the name {name}; only one of "
                               "them could be compared.")
            self._hashes[name] = f"{list(array.shape)} {xxhash.xxh3_128(np.ascontiguousarray(array)).hexdigest()}"
            look(name, array)
        if self._pages is None:
            for name, array in self.state():
                seen(name, array)
        else:
            self._show_when_in(seen)

    def show_rest(self) -> None:
        """Show what no pass has asked for since :meth:`show`."""
        if self._pages is not None:
            self._pages.show_rest()

    @cached_property
    def weights_digest(self) -> str:
        """xxh3-128 over names, shapes and bytes of what the net holds, sorted by name."""
        if not self._hashes:
            self.show()
        self.show_rest()
        lines = (f"{name} {line}\n" for name, line in sorted(self._hashes.items()))
        return xxhash.xxh3_128("".join(lines).encode()).hexdigest()

    def answers(self, inputs: Inputs, steps: Iterable[Step]) -> Iterator[Step]:
        """For each of the reference's ``steps``, what this net gives as far as that goes, and then the rest.

        Views by name: ``recorded``, what modules and then the model give in one pass of its own; ``isolated``, the same
        in a pass in which every module is fed what entered torch's; ``inside`` and ``arriving`` from a pass in which
        every sublayer is fed so too; ``small`` from it and from one of the first row, where modules are fed that made
        small. All are rows of real tokens.
        """
        places, known = Places.of(self.run), Known()
        asked = [(inputs, Own), (inputs, Isolated), (inputs.first, SmallRow), (inputs, Inside)]
        listeners = [kind(some, places, known) for some, kind in asked]

        def taken() -> Step:
            found = Step()
            for view, arrays in chain.from_iterable(listener.take().items() for listener in listeners):
                found.view(view).update(arrays)
            return found
        passes = [lambda some=some, listener=listener: self._listen(listener, some.arrays)
                  for (some, _), listener in zip(asked, listeners, strict=True)]
        if not self.reentrant:
            for step in list(steps):
                known.learn(step)
                yield Step()
            with self._hooks(places.all):
                in_turn(passes)
            yield taken()
            return
        with self._hooks(places.all), in_step(passes, self.enter) as walks:
            for step in steps:
                known.learn(step)
                while walks.gate is not None and not known.lacks(walks.gate):
                    walks.advance()
                self.leave()
                yield taken()
            while walks.gate is not None:
                walks.advance()
            self.leave()
            yield taken()

    def record_inside(self, inputs: Inputs, modules: Modules, entering: Mapping[str, np.ndarray] = MappingProxyType({}),
                      ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Of these modules, each fed ``entering``: (its output, what would have entered it), rows of real tokens."""
        found = _Once(inputs, entering)
        with self._hooks(modules), heard_by(found):
            outputs = self.outputs(inputs.arrays)
        self.leave()
        return found.given | {name: inputs.rows(name, array) for name, array in outputs.items()}, (
            found.arriving)

    def _shown(self, names: Sequence[str]) -> Sequence[str]:
        """Under which of its names a weight is shown: all that the plan knows, of which T5's table has one, and those
        that are tied to a weight which this is not.
        """
        ties = dict(self.run.tied.values())
        return [name for name in names if name in self._planned or ties.get(name, names[0]) not in names] or names[:1]

    @cached_property
    def _planned(self) -> set[str]:
        return {move.target for move in self.run.plan.moves}

    @abstractmethod
    def token_loss(self, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Cross entropy without reduction, with the loss of the target. logits [n, classes], labels [n]."""

    @abstractmethod
    def contrastive_loss(self, hidden: np.ndarray, mask: np.ndarray, scale: float) -> np.ndarray:
        """In-batch contrastive loss of mean-pooled rows, as the reference's."""

    @abstractmethod
    def _build(self) -> Any: ...

    @abstractmethod
    def _build_empty(self) -> Any:
        """The net without memory for its weights."""

    @abstractmethod
    def _paged(self) -> Pages: ...

    @abstractmethod
    def _show_when_in(self, look: Look) -> None:
        """``look`` is shown the weights of each page when that comes in for the first time."""

    @abstractmethod
    def _layers(self) -> dict[str, Any]:
        """Every module of the net by its path, itself under no name."""

    @abstractmethod
    def _path(self, pair: tuple[str, str]) -> str:
        """Which of a module's (torch, Paddle) paths is the one in this net."""


def open_candidate(run: Run, target: str, device: str, paged: bool = False, *,
                   allow_same_framework: bool = False,
                   beside: Callable[[], Collection[type] | None] = lambda: None) -> Candidate:
    """The candidate that ``--target`` names. ``beside`` gives the classes of the reference in this process, if any."""
    from .paddle_net import OwnNet, PaddleNLPNet
    if target == "models":
        return OwnNet(run, device, paged)
    if target == "paddlenlp":
        return PaddleNLPNet(run, device, paged)
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", target):
        from .own_net import open_own
        return open_own(run, target, device, paged, allow_same_framework, beside())
    raise BadInput(f"--target {target} is not one of {', '.join(TARGETS)} or package.module:build.")


@contextmanager
def paddlenlp_imported() -> Iterator[None]:
    """PaddleNLP, without what it warns of when it is imported, and what its modules warn of when they are imported
    inside; :class:`convert.errors.FrameworkMissing` where it is not there.
    """
    before = logging.root.manager.disable
    logging.getLogger("datasets").setLevel(logging.ERROR)
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            require("paddlenlp")
            yield
    finally:
        logging.disable(before)


@contextmanager
def blamed(net: str) -> Iterator[None]:
    """What fails in somebody else's net is told as its fault, with the place; :class:`BadInput`."""
    try:
        yield
    except BadInput:
        raise
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        if Path(last.filename).parent == Path(__file__).parent:
            raise  # a fault of ours: hooks of ours run within the net
        said = " ".join(str(error).split()).partition(" [Hint")[0][:300]
        raise BadInput(f"{net} failed at {Path(last.filename).name}:{last.lineno}: {type(error).__name__}: "
                       f"{said}") from error


def function_named(flag: str, name: str, called_with: str, *arguments: Any) -> Callable[..., Any]:
    """The user's ``package.module:function``, on their path or where they are; :class:`BadInput` where it cannot be
    imported, or does not take ``arguments``, which are what it is ``called_with``.
    """
    module, _, function = name.partition(":")
    sys.path.insert(0, "")
    try:
        found = getattr(importlib.import_module(module), function)
    except (BadInput, FrameworkMissing):
        raise
    except Exception as error:  # whatever their module stumbles over
        raise BadInput(f"{flag} {name} cannot be imported ({type(error).__name__}: {error}).") from error
    finally:
        sys.path.remove("")
    try:
        inspect.signature(found).bind(*arguments)
    except (TypeError, ValueError) as error:
        raise BadInput(f"{name} is called with {called_with}, which it does not take ({error}).") from error
    return found


# What the hooks of a pass tell ----------------------------------------------------------------------------------------

class Known:
    """What the reference has told so far: what entered its modules and sublayers, and which modules it is done with."""

    def __init__(self) -> None:
        self.entering: dict[str, np.ndarray] = {}
        self.small: dict[str, np.ndarray] = {}
        self._awaited: set[str] = set()

    def learn(self, step: Step) -> None:
        self._awaited |= set(step.told.get("present", ()))
        self._awaited -= step.recorded.keys()
        self.entering |= step.view("entering")
        self.small |= step.view("small input")

    def lacks(self, gate: str) -> bool:
        """Whether torch has this module, and has not told yet what enters it."""
        return gate in self._awaited

    def forget(self, names: Iterable[str]) -> None:
        for name in names:
            self.entering.pop(name, None)
            self.small.pop(name, None)


class Listener:
    """``arrived(name, read)`` returns what a module is to be fed instead, whole arrays."""

    def __init__(self, inputs: Inputs, places: Places, known: Known) -> None:
        self.rows, self.places, self.known = inputs.rows, places, known
        self.views: dict[str, dict[str, np.ndarray]] = {}

    def take(self) -> dict[str, dict[str, np.ndarray]]:
        """What has been told since the last time."""
        views, self.views = self.views, {}
        return views

    def arrived(self, name: str, read: Callable[[], np.ndarray]) -> np.ndarray | None:
        return None

    def answered(self, name: str, array: np.ndarray) -> None: ...

    def probed(self, name: str, norm: Callable[[np.ndarray], np.ndarray]) -> None: ...

    def projected(self, name: str, array: np.ndarray, linear: Any) -> None: ...

    def put(self, view: str, name: str, array: np.ndarray) -> None:
        self.views.setdefault(view, {})[name] = self.rows(name, array)


class Own(Listener):
    """The net's own pass."""

    def answered(self, name: str, array: np.ndarray) -> None:
        if name not in self.places.sublayers:
            self.put(RECORDED, name, array)


class Isolated(Listener):
    """Every module is fed what entered torch's."""

    def __init__(self, inputs: Inputs, places: Places, known: Known) -> None:
        super().__init__(inputs, places, known)
        self.fed: set[str] = set()

    def arrived(self, name: str, read: Callable[[], np.ndarray]) -> np.ndarray | None:
        self.fed.add(name)
        return None if name in self.places.sublayers else self.known.entering.get(name)

    def answered(self, name: str, array: np.ndarray) -> None:
        if name in self.places.sublayers:
            return
        if name in self.known.entering and name not in self.fed:
            raise BadInput(f"{name} is called in a way in which it cannot be fed what enters torch's. Call it as "
                           "block(hidden_states, …) or block(hidden_states=…).")
        self.put("isolated", name, array)


class SmallRow(Listener):
    """Every module is fed what entered torch's, of the first row; but for norms it is made small."""

    def arrived(self, name: str, read: Callable[[], np.ndarray]) -> np.ndarray | None:
        if self._is_asked(name):
            return small_input(self.rows.first_of(self.known.entering[name]))
        entered = None if name in self.places.sublayers else self.known.entering.get(name)
        return None if entered is None else self.rows.first_of(entered)

    def answered(self, name: str, array: np.ndarray) -> None:
        if self._is_asked(name):
            self.put("small", name, array)

    def _is_asked(self, name: str) -> bool:
        return name in self.known.entering and name not in self.places.sublayers and name not in self.known.small


class Inside(Listener):
    """Every module and every sublayer is fed what entered torch's; what came to a sublayer is told too."""

    def arrived(self, name: str, read: Callable[[], np.ndarray]) -> np.ndarray | None:
        if name in self.places.operations and name in self.known.entering:
            self.put("arriving", name, read())
        return self.known.entering.get(name)

    def answered(self, name: str, array: np.ndarray) -> None:
        if name in self.places.inside:
            self.put("inside", name, array)
        if name not in self.places.sublayers:
            self.known.forget([name, *(part for part in self.places.sublayers if part.startswith(f"{name}."))])

    def probed(self, name: str, norm: Callable[[np.ndarray], np.ndarray]) -> None:
        if name in self.known.small:
            self.put("small", name, norm(self.known.small[name]))


class _Once:
    """One pass, recorded whole."""

    def __init__(self, inputs: Inputs, entering: Mapping[str, np.ndarray]) -> None:
        self.rows, self.entering = inputs.rows, entering
        self.given: dict[str, np.ndarray] = {}
        self.arriving: dict[str, np.ndarray] = {}

    def arrived(self, name: str, read: Callable[[], np.ndarray]) -> np.ndarray | None:
        if name in self.entering:
            self.arriving[name] = self.rows(name, read())
        return self.entering.get(name)

    def answered(self, name: str, array: np.ndarray) -> None:
        self.given[name] = self.rows(name, array)

    def probed(self, name: str, norm: Callable[[np.ndarray], np.ndarray]) -> None: ...
