"""``from align import align_models``: any torch module against any Paddle layer, without a checkpoint or a run.

The weights first, name by name and bit by bit; then every module that both sides call, in a pass of its own and fed
what entered torch's, judged by torch's own rounding error. It is the engine of ``align.forward``, and the same result.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from types import SimpleNamespace
from typing import Any

import numpy as np

from convert.errors import BadInput, require

from .compare import TensorResult, compare, missing
from .diagnose import Explanation, diagnose
from .evidence import compare_bits
from .explanations.weights import difference
from .forward import judged, look_into
from .inputs import Inputs
from .inside import PROBE
from .pairs.given import Arrays, Call, GivenInputs, GivenLayer, GivenModule, Outline, Stumbled, WholeRows
from .pairs.pairing import Layout, Names, Pairing, Weight
from .pairs.untouched import same_luck, untouched
from .report import ALIGNED, StageResult
from .stage import Findings
from .tolerance import EXACT
from .trace import Step

Given = Mapping[str, Any] | Sequence[Any]
FAILURES = 5
DTYPES = ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64")
"""What goes in. Paddle takes uint16 for bfloat16, and has no wider ones without a sign."""


def align_models(torch_module: Any, paddle_layer: Any, inputs: Given, names: Names | None = None, *,
                 layouts: Mapping[str, Layout] | None = None, name: str | None = None) -> StageResult:
    """Compare a ``torch.nn.Module`` with a ``paddle.nn.Layer`` on ``inputs``; both are left as they are.

    ``inputs`` are numpy arrays of any dtype and shape, given to both in eval mode: a mapping as keyword arguments, a
    tuple or list as positional ones; float64 is rounded to float32. Of a 2-D ``attention_mask`` of 0 and 1 among them,
    the positions that are 0 are not compared.

    ``names`` maps torch's paths of parameters, buffers or modules to Paddle's, as a mapping or as a function (None for
    no opinion); a module's entry holds for all that is in it. Without an entry the names are taken to be equal, and
    what is then left is paired by :mod:`convert.matching`, which the result's notes say. ``layouts`` says of Paddle's
    names ``same`` or ``transposed`` where a matrix belongs to a layer of no known kind. ``name`` is what the result
    calls the pair.

    All numbers that both return are compared: floating and complex ones by torch's own rounding error, whole numbers
    and truth values for equality wherever torch gives the same in each of its runs with reordered sums.

    The result has ``verdict``, ``tensors``, ``sublayers``, ``first_divergence``, ``diagnosis``, ``notes``, ``print()``
    and ``save(directory)``, which writes ``forward.json`` and ``forward.md``. Raises :class:`convert.errors.BadInput`
    where nothing could be compared: two modules of one framework, a net that fails, names that do not exist.
    """
    started = time.perf_counter()
    _require_two_frameworks(torch_module, paddle_layer)
    arrays, notes = _arrays(inputs)
    with _undisturbed(torch_module, paddle_layer):
        bench = _bench(Pairing(torch_module, paddle_layer, names, layouts), torch_module, paddle_layer, arrays,
                       not isinstance(inputs, Mapping))
        weights, told = compare_weights(bench.run.pairing)
        wrong = [result for result in weights if not result.passed]
        bench.weights_divergence = wrong[0].name if wrong else None
        findings = _behaviour(bench)
        sides = [{"framework": side.framework, "version": side.version, "weights_digest": net.digest}
                 for side, net in ((bench.reference, bench.run.pairing.torch),
                                   (bench.candidate, bench.run.pairing.paddle))]
    return StageResult(
        run=name or type(torch_module).__name__, family=bench.run.family.name, head=type(torch_module).__name__,
        stage="forward", target=type(paddle_layer).__name__, tensors=[*wrong, *findings.tensors],
        reference=sides[0], candidate=sides[1], inputs_digest=bench.inputs.digest,
        seconds=time.perf_counter() - started,
        peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        weights_divergence=bench.weights_divergence, notes=[*notes, *told, *findings.notes], named=findings.named,
        sublayers=findings.sublayers, diagnosis=findings.diagnosis)


def assert_aligned(torch_module: Any, paddle_layer: Any, inputs: Given, names: Names | None = None, *,
                   layouts: Mapping[str, Layout] | None = None) -> None:
    """Raise :class:`AssertionError`, with the first divergence and its figures, unless :func:`align_models` says
    ``aligned``.
    """
    __tracebackhide__ = True  # pytest then ends its traceback at the test
    result = align_models(torch_module, paddle_layer, inputs, names, layouts=layouts)
    if result.verdict != ALIGNED:
        why = [f"Why: {result.diagnosis.sentence}"] if result.diagnosis else []
        more = len(result.failures) - FAILURES
        raise AssertionError("\n".join([
            f"{result.head} and {result.target} are not aligned. {result.summary().replace('`', '')}", *why,
            *result.failures[:FAILURES], *[f"… and {more} more"] * (more > 0)]))


def load_weights(torch_module: Any, paddle_layer: Any, names: Names | None = None, *,
                 layouts: Mapping[str, Layout] | None = None) -> list[tuple[str, str]]:
    """Copy torch's weights and buffers into the Paddle layer, turned where that holds them otherwise.

    ``names`` and ``layouts`` are those of :func:`align_models`. Returns (torch, Paddle) name of each. Raises
    :class:`convert.errors.BadInput`, before anything is copied, where a parameter of either side has no counterpart,
    a counterpart would have to be guessed, a shape or dtype does not fit, a square matrix may lie either way, or two
    that differ would go to one.
    """
    _require_two_frameworks(torch_module, paddle_layer)
    pairing = Pairing(torch_module, paddle_layer, names, layouts, by_values=False)
    turned = list(_turned(pairing))
    for weight, array in turned:
        pairing.paddle.tensors[weight.paddle].set_value(array)
    return [(weight.torch, weight.paddle) for weight, _ in turned]


def _turned(pairing: Pairing) -> Iterator[tuple[Weight, np.ndarray]]:
    """What each of Paddle's tensors is to hold."""
    doubts = [doubt for match in pairing.proposed for doubt in match.doubts if not doubt.startswith("square")]
    if doubts:
        pairs = {ours: theirs for match in pairing.proposed for left, right in match.pairs
                 for ours, theirs in zip(left.names, right.names, strict=True)}
        raise BadInput(f"which weight is which would be a guess ({doubts[0]}). If it is right, say so: names={pairs}")
    for side, absent, net in (("Paddle layer", pairing.only_torch, pairing.torch),
                              ("torch module", pairing.only_paddle, pairing.paddle)):
        left = [name for name in absent if name in net.parameters]
        if left:
            more = f" (+{len(left) - 1} more)" if left[1:] else ""
            raise BadInput(f"{left[0]}{more} has no counterpart in the {side}. Give names= (torch's path to Paddle's).")
    filled: dict[str, tuple[str, np.ndarray]] = {}
    for weight in pairing.weights:
        if weight.layout is None:
            raise BadInput(f"{weight.paddle} is square and belongs to a layer of no known kind, so that nothing tells "
                           f'whether Paddle holds it transposed. Say so: layouts={{"{weight.paddle}": "same"}} or '
                           '"transposed".')
        array = weight.turned(pairing.torch.array(weight.torch)[weight.rows] if pairing.torch.shape(weight.torch)
                              else pairing.torch.array(weight.torch), weight.layout)
        wanted = pairing.paddle.shape(weight.paddle)
        if array.shape != wanted and not array.size == np.prod(wanted) == 1:
            raise BadInput(f"torch's {weight.torch} {list(pairing.torch.shape(weight.torch))} does not fit Paddle's "
                           f"{weight.paddle} {list(wanted)}, where it would be {list(array.shape)}: one of the two "
                           "nets has another width.")
        array = np.array(array.reshape(wanted), order="C")
        held = pairing.paddle.array(weight.paddle).dtype
        if array.dtype != held:
            raise BadInput(f"{weight.torch} is {array.dtype} and {weight.paddle} {held}; one of them has to be cast.")
        other, before = filled.setdefault(pairing.paddle.aliases[weight.paddle][0], (weight.torch, array))
        if not np.array_equal(before, array):
            raise BadInput(f"{other} and {weight.torch} of torch differ, and Paddle holds one for both, "
                           f"{weight.paddle}.")
        yield weight, array


def compare_weights(pairing: Pairing) -> tuple[list[TensorResult], list[str]]:
    """Every parameter and buffer against torch's, in torch's layout, bit for bit; and what is told of it."""
    results, notes = [], list(pairing.told)
    for weight in pairing.weights:
        expected = pairing.torch.array(weight.torch)
        expected = expected[weight.rows] if expected.ndim else expected
        held = pairing.paddle.array(weight.paddle)
        layout = weight.layout or _layout_of_values(expected, held)
        if weight.layout is None:
            notes.append(f"Weights: {weight.paddle} is square and belongs to a layer of no known kind; it is taken to "
                         f"lie in Paddle {'transposed' if layout == 'transposed' else 'as in torch'}, by its values. "
                         "layouts= says it for certain.")
        found = weight.turned(held, layout)
        scalar = expected.size == found.size == 1
        result = compare_bits(weight.paddle, expected, found.reshape(expected.shape) if scalar else found)
        results.append(result if result.passed else _explained(pairing, weight, expected, found, result))
    results += [missing(name, "candidate") for name in pairing.only_torch if name in pairing.torch.parameters]
    results += [missing(name, "reference") for name in pairing.only_paddle if name in pairing.paddle.parameters]
    order = {name: number for number, name in enumerate(pairing.torch.tensors)}
    sources = {weight.paddle: order[weight.torch] for weight in pairing.weights}
    results.sort(key=lambda result: sources.get(result.name, order.get(result.name, len(order))))
    good = sum(result.passed for result in results)
    notes.append(f"Weights: {good} of {len(results)} tensors are equal bit by bit." if results else
                 "Weights: neither side has any.")
    for side, absent in (("torch", pairing.only_torch), ("Paddle", pairing.only_paddle)):
        buffers = [name for name in absent if name not in (pairing.torch if side == "torch" else pairing.paddle
                                                          ).parameters]
        if buffers:
            notes.append(f"Weights: buffers that only {side}'s side has are not compared: {', '.join(buffers[:6])}"
                         f"{f' (+{len(buffers) - 6} more)' if buffers[6:] else ''}.")
    return results, notes


def _layout_of_values(expected: np.ndarray, held: np.ndarray) -> Layout:
    return "transposed" if np.array_equal(expected, held.T) and not np.array_equal(expected, held) else "same"


def _explained(pairing: Pairing, weight: Weight, expected: np.ndarray, held: np.ndarray,
               result: TensorResult) -> TensorResult:
    """A failing weight, with what became of it: transposed, another weight's, shifted, …"""
    def peers() -> Iterator[tuple[str, np.ndarray]]:
        for other in pairing.weights:
            if other.torch != weight.torch and other.rows == slice(None):
                yield other.paddle, pairing.torch.array(other.torch)
    if expected.shape != held.shape or not expected.size or not np.issubdtype(held.dtype, np.floating):
        return replace(result, failure=f"{result.failure} (torch's {weight.torch})")
    return replace(result, failure=f"{result.failure}; {weight.paddle} {difference(expected, held, peers).told}")


# Behaviour ------------------------------------------------------------------------------------------------------------

@dataclass
class Bench:
    """Two given models where a stage has a session: what to compare, both sides, and nobody to tell how far it is."""

    run: Outline
    reference: GivenModule
    candidate: GivenLayer
    inputs: Inputs
    weights_divergence: str | None = None
    options: Any = field(default_factory=lambda: SimpleNamespace(compare=False, only=None))

    def advance(self, told: str) -> None: ...


def _bench(pairing: Pairing, module: Any, layer: Any, arrays: dict[str, np.ndarray], positional: bool) -> Bench:
    run, inputs = Outline(pairing), GivenInputs(arrays)
    reference = GivenModule(run, module, positional)
    bench = Bench(run, reference, GivenLayer(run, layer, positional, reference), inputs)
    called = reference.calls(inputs)
    if not reference.told.arrays and not reference.told.whole:
        told = f" ({', '.join(reference.told.others)})" if reference.told.others else ""
        raise BadInput(f"what the torch module {type(module).__name__} returns holds no tensor and no number{told}, so "
                       "there is nothing to compare. Return tensors: alone, or in a sequence, mapping or dataclass.")
    try:
        run.look_into(called, bench.candidate.calls(inputs))
    except Stumbled as error:
        raise BadInput(f"{error}{_parted(pairing, called, error.calls)}") from error
    return bench


def _parted(pairing: Pairing, torch: Mapping[str, Call], paddle: Mapping[str, Call]) -> str:
    """Where the shapes parted before a pass failed."""
    for path, call in torch.items():
        name = pairing.modules.get(path, "")
        if name in paddle and None not in (call.gives, paddle[name].gives) and call.gives != paddle[name].gives:
            return f" Before that, {name} gave {list(paddle[name].gives)}, and torch's {path} {list(call.gives)}."
    return ""


def _behaviour(bench: Bench) -> Findings:
    """Every module and output, and what more there is to say."""
    returned = bench.reference.told, bench.candidate.told
    shapes = [known | {name: array.shape for name, array in told.arrays.items()}
              for known, told in zip(bench.run.shapes, returned, strict=True)]
    others = dict.fromkeys([*returned[0].others, *returned[1].others])
    steps = list(bench.reference.steps(bench.inputs))
    answers = bench.candidate.answers(bench.inputs, steps)
    findings = judged(bench, _described(bench, zip_longest(steps, answers, fillvalue=Step())), _why,
                      _inside)
    tensors = [_of_one_shape(result, *shapes) for result in findings.tensors]
    whole = list(_whole_numbers(returned[0].whole, bench.reference.repeated, returned[1].whole, bench.inputs.rows))
    more = [f"Outputs that hold no numbers are not compared: {', '.join(others)}."] if others else []
    return replace(findings, tensors=[*tensors, *whole], notes=[*findings.notes, *more])


def _whole_numbers(expected: Arrays, repeated: Sequence[Arrays], found: Arrays, rows: WholeRows,
                   ) -> Iterator[TensorResult]:
    """Whole numbers and truth values are equal wherever torch gives the same in each of its ``repeated`` runs."""
    for name, array in expected.items():
        if name not in found:
            yield missing(name, "candidate")
            continue
        given, again = found[name], [one[name] for one in repeated if one.get(name, array).shape == array.shape]
        if given.shape == array.shape and given.dtype == array.dtype:
            given = np.where(np.all([one == array for one in again], axis=0), given, array)
        if array.size or given.size:
            yield compare(name, *(rows.of_whole(one) for one in (array, given)), EXACT)
    yield from (missing(name, "reference") for name in found if name not in expected)


def _described(bench: Bench, pairs: Iterator[tuple[Step, Step]]) -> Iterator[tuple[Step, Step]]:
    told = {"described": bench.candidate.described()}
    for step, answer in pairs:
        answer.told, told = answer.told | told, {}
        yield step, answer


def _of_one_shape(result: TensorResult, reference: Mapping[str, tuple[int, ...]],
                  candidate: Mapping[str, tuple[int, ...]]) -> TensorResult:
    """What has another shape fails, also where the same rows can be made of both."""
    left, right = reference.get(result.name), candidate.get(result.name)
    if left is None or right is None or left == right:
        return result
    return replace(result, passed=False, failure=f"{result.name}: the shape is {list(right)}, the reference's "
                   f"{list(left)}")


def _why(bench: Bench, inputs: Inputs, bad: TensorResult | None) -> Explanation | None:
    """The explanation of the first bad module, where the catalogue has one that fits.

    It calls parts of somebody's modules with parts of them changed. What they raise then says nothing of the two
    models, only that there is no explanation.
    """
    modules = {name for _, name in bench.run.modules}
    if bad is None or bench.weights_divergence or bad.name.removesuffix(PROBE) not in modules:
        return None
    try:
        return diagnose(bench, inputs, bad.name)
    except Exception:
        return None


def _inside(bench: Bench, inputs: Inputs, named: str) -> str:
    """``named``, or the part of that module that is at fault, where its parts can be run by themselves."""
    try:
        return look_into(bench, inputs, named)
    except Exception:
        return named


@contextmanager
def _undisturbed(torch_module: Any, paddle_layer: Any) -> Iterator[None]:
    """Both in eval mode for a while, and then as they were."""
    with ExitStack() as held:
        held.enter_context(same_luck())
        held.enter_context(untouched(torch_module.modules()))
        held.enter_context(untouched(paddle_layer.sublayers(include_self=True)))
        torch_module.eval()
        paddle_layer.eval()
        yield


def _arrays(inputs: Given) -> tuple[dict[str, np.ndarray], list[str]]:
    """By name, or by place as ``0``, ``1``, …, as both sides are given them."""
    if isinstance(inputs, np.ndarray) or not isinstance(inputs, (Mapping, Sequence)) or isinstance(inputs, str):
        raise BadInput(f"inputs is a {type(inputs).__name__}; a dictionary of arrays (keyword arguments) or a tuple of "
                       "arrays (positional arguments) is needed.")
    named = dict(inputs) if isinstance(inputs, Mapping) else {str(place): one for place, one in enumerate(inputs)}
    arrays = {str(name): _array(str(name), given) for name, given in named.items()}
    if not arrays:
        raise BadInput("inputs is empty: a model that is fed nothing shows nothing.")
    wide = [name for name, array in arrays.items() if array.dtype == np.float64]
    arrays |= {name: arrays[name].astype(np.float32) for name in wide}
    told = f"Inputs in float64 were rounded to float32, for both sides: {', '.join(f'input {name}' for name in wide)}."
    broken = [name for name, array in arrays.items() if array.dtype.kind == "f" and np.isnan(array).any()]
    return arrays, [told] * bool(wide) + [f"Input {name} holds NaN." for name in broken]


def _array(name: str, given: Any) -> np.ndarray:
    """One input as both frameworks take it."""
    try:
        array = np.asarray(given)
    except Exception as error:  # of nested lists, of tensors that want to be detached or are elsewhere
        raise BadInput(f"input {name} cannot be made an array ({error}); numbers are needed.") from error
    if array.dtype.newbyteorder("=").name not in DTYPES:
        raise BadInput(f"input {name} has dtype {array.dtype}; numbers are needed that both frameworks have: "
                       f"{', '.join(DTYPES)}.")
    if not array.size:
        raise BadInput(f"input {name} is empty, {list(array.shape)}: a model that is fed nothing shows nothing.")
    return np.ascontiguousarray(array, array.dtype.newbyteorder("=")).reshape(array.shape)


def _require_two_frameworks(torch_module: Any, paddle_layer: Any) -> None:
    for framework in ("torch", "paddle"):
        require(framework)
    torch, paddle = sys.modules["torch"], sys.modules["paddle"]
    for given, place, kind, wanted in ((torch_module, "first", torch.nn.Module, "torch.nn.Module"),
                                       (paddle_layer, "second", paddle.nn.Layer, "paddle.nn.Layer")):
        if not isinstance(given, kind):
            same = any(isinstance(torch_module, one) and isinstance(paddle_layer, one)
                       for one in (torch.nn.Module, paddle.nn.Layer))
            told = " Comparing a framework with itself proves nothing." if same else ""
            raise BadInput(f"the {place} argument is a {type(given).__name__}; a {wanted} is needed.{told}")
