"""Norms and residuals of a block in another place: the block's parts, as the family names them, joined otherwise."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from convert.traits import Wiring

from .. import surgery
from ..place import Place
from .variant import Idea, Variant

Part = Callable[[Any], Any]
Mix = Callable[[Sequence[Part], Part, Part, Any], Any]
"""``mix(norms, attend, feed, x)`` as the block's answer to x; attend and feed come without residual and norm."""
PLACED, RESIDUAL = "layer-norm-placement", "missing-residual"


def norm_placements(place: Place) -> Iterator[Variant]:
    wiring = place.wiring
    for kind, told, mix in MIXES[wiring.kind] if wiring else ():
        yield Variant(kind, place.name, told, surgery.forward(
            "", lambda block, run, mix=mix: _joined(block, run, wiring, mix)))
    for setting, told in place.traits.switches.items():
        held = vars(place.root).get(setting)
        if isinstance(held, bool):
            yield Variant(PLACED, place.name, told[held], surgery.attributes("", {setting: not held}))


def _joined(block: Any, run: Callable[..., Any], wiring: Wiring, mix: Mix) -> Callable[..., Any]:
    """A forward of ``block``, in the place of ``run``, that joins its parts by ``mix``."""
    norms, signature = [block.get_submodule(path) for path in wiring.norms], inspect.signature(run)

    def joined(*arguments: Any, **named: Any) -> Any:
        (_, x), *rest = signature.bind(*arguments, **named).arguments.items()
        return (mix(norms, lambda x: _through(block, wiring.attention, x, dict(rest)),
                    lambda x: _through(block, wiring.feed, x, {}), x),)
    return joined


def _through(block: Any, paths: Sequence[str], x: Any, named: Mapping[str, Any]) -> Any:
    """``x`` through modules of ``block``, one after the other; of ``named`` each is given what it takes."""
    for module in map(block.get_submodule, paths):
        x = surgery.first_of(module(x, **{
            name: value for name, value in named.items() if surgery.has_argument(module, name)}))
    return x


def _pre_norm(norms: Sequence[Part], attend: Part, feed: Part, x: Any) -> Any:
    first, second = norms
    y = x + attend(first(x))
    return y + feed(second(y))


def _post_norm(norms: Sequence[Part], attend: Part, feed: Part, x: Any) -> Any:
    first, second = norms
    y = first(x + attend(x))
    return second(y + feed(y))


def _one_norm(norms: Sequence[Part], attend: Part, feed: Part, x: Any) -> Any:
    y = x + attend(norms[0](x))
    return y + feed(norms[0](y))


def _side_by_side(norms: Sequence[Part], attend: Part, feed: Part, x: Any) -> Any:
    first, second = norms
    return x + attend(first(x)) + feed(second(x))


def _normed_residual(norms: Sequence[Part], attend: Part, feed: Part, x: Any) -> Any:
    first, second = norms
    y = first(x) + attend(first(x))
    return second(y) + feed(second(y))


def _only_feed_residual(norms: Sequence[Part], attend: Part, feed: Part, x: Any) -> Any:
    first, second = norms
    y = attend(first(x))
    return y + feed(second(y))


def _only_attention_residual(norms: Sequence[Part], attend: Part, feed: Part, x: Any) -> Any:
    first, second = norms
    return feed(second(x + attend(first(x))))


def _norm_before_residual(norms: Sequence[Part], attend: Part, feed: Part, x: Any) -> Any:
    first, second = norms
    y = x + first(attend(x))
    return y + second(feed(y))


def _first_norm_before_residual(norms: Sequence[Part], attend: Part, feed: Part, x: Any) -> Any:
    first, second = norms
    y = x + first(attend(x))
    return second(y + feed(y))


def _second_norm_before_residual(norms: Sequence[Part], attend: Part, feed: Part, x: Any) -> Any:
    first, second = norms
    y = first(x + attend(x))
    return y + second(feed(y))


def _residual_before_norm(norms: Sequence[Part], attend: Part, feed: Part, x: Any) -> Any:
    first, second = norms
    y = x + attend(x)
    return second(y + feed(first(y)))


def _no_first_residual(norms: Sequence[Part], attend: Part, feed: Part, x: Any) -> Any:
    first, second = norms
    y = first(attend(x))
    return second(y + feed(y))


def _no_second_residual(norms: Sequence[Part], attend: Part, feed: Part, x: Any) -> Any:
    first, second = norms
    return second(feed(first(x + attend(x))))


def _residual_of_the_input(norms: Sequence[Part], attend: Part, feed: Part, x: Any) -> Any:
    first, second = norms
    return second(x + feed(first(x + attend(x))))


def _with_one_norm(join: Callable[[Any, Any, Part, Part, Part], Any]) -> Mix:
    """``join(x, norm x, norm, attend, feed)`` of a block with one norm."""
    return lambda norms, attend, feed, x: join(x, norms[0](x), norms[0], attend, feed)


MIXES: Mapping[str, tuple[tuple[str, str, Mix], ...]] = {
    "side by side": (
        (PLACED, "feeds the MLP the attention's result, one after the other instead of side by side", _one_norm),
        (PLACED, "feeds the MLP without the layer norm",
         _with_one_norm(lambda x, normed, norm, attend, feed: attend(normed) + feed(x) + x)),
        (PLACED, "feeds the attention without the layer norm",
         _with_one_norm(lambda x, normed, norm, attend, feed: attend(x) + feed(normed) + x)),
        (PLACED, "adds the layer norm's output as residual, not its input",
         _with_one_norm(lambda x, normed, norm, attend, feed: attend(normed) + feed(normed) + normed)),
        (PLACED, "puts the layer norm behind the sum instead of before it",
         _with_one_norm(lambda x, normed, norm, attend, feed: norm(attend(x) + feed(x) + x))),
        (RESIDUAL, "does not add its input",
         _with_one_norm(lambda x, normed, norm, attend, feed: attend(normed) + feed(normed))),
        (RESIDUAL, "adds its input twice",
         _with_one_norm(lambda x, normed, norm, attend, feed: attend(normed) + feed(normed) + 2 * x)),
    ),
    "norms before": (
        (PLACED, "has its layer norms behind attention and MLP instead of before them", _post_norm),
        (PLACED, "has attention and MLP side by side instead of one after the other", _side_by_side),
        (PLACED, "adds the layer norms' outputs as residuals, not their inputs", _normed_residual),
        (PLACED, "uses its first layer norm twice", _one_norm),
        (RESIDUAL, "has no residual around the attention", _only_feed_residual),
        (RESIDUAL, "has no residual around the MLP", _only_attention_residual),
    ),
    "norms behind": (
        (PLACED, "has its layer norms before attention and MLP instead of behind them", _pre_norm),
        (PLACED, "norms before it adds the residual", _norm_before_residual),
        (PLACED, "norms the attention's output before it adds the residual", _first_norm_before_residual),
        (PLACED, "norms the MLP's output before it adds the residual", _second_norm_before_residual),
        (PLACED, "adds what was before the first norm as the second residual", _residual_before_norm),
        (RESIDUAL, "has no residual around the attention", _no_first_residual),
        (RESIDUAL, "has no residual around the MLP", _no_second_residual),
        (RESIDUAL, "adds its own input around the MLP, not the attention's result", _residual_of_the_input),
    ),
}
"""By the kind of wiring that is right: (kind, what a net does instead, how it joins the parts)."""

IDEAS = (
    Idea("a layer norm in the wrong place, a residual missing", norm_placements),
)
