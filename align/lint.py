"""What the two nets say of themselves as built: settings that the outputs of a pass may not show.

Dropout and tied weights show in training only, an epsilon on small inputs only, a mask value on masks only. Each side
describes itself by Paddle's names, in values that JSON holds, so that the two may run in different environments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convert.rules import Family

    from .runs import Run

Description = dict[str, Any]

USUAL = {
    "epsilon": ("layer_norm_epsilon", "layer_norm_eps"),
    "activation": ("activation_function", "hidden_act"),
    "heads": ("n_head", "num_attention_heads"),
    "tied weights": ("tie_word_embeddings",),
}
"""What every config has, under one of these keys; a family may call it otherwise, and has settings of its own."""
EPSILONS = ("eps", "_epsilon", "epsilon", "variance_epsilon")
LOWEST = -3.4028234663852886e38
SHOWN = 3
THROUGH_FLOAT32 = 2.0**-24


def describe(model: Any, modules: Mapping[str, Any], weights: Mapping[str, Any], run: Run,
             named: Callable[[str], str]) -> Description:
    """``modules`` and ``weights`` (parameters and buffers) of ``model`` by its paths; ``named`` makes them Paddle's.

    Dropouts are told by the recorded module that holds them.
    """
    found: Description = {"settings": _settings(getattr(model, "config", None), run.family), "epsilon": {},
                          "dropout": {}, "momentum": {}, "running variance": {}, "mask value": {}}
    for path, module in modules.items():
        kind, name = type(module).__name__, named(path)
        epsilon = next((number for key in EPSILONS if isinstance(number := _held(module, key), (int, float))), None)
        if "Norm" in kind and epsilon is not None:
            found["epsilon"][name] = float(epsilon)
        if "BatchNorm" in kind:
            found["momentum"][name] = _share_of_batch(module)
            found["running variance"][name] = "biased" if _held(module, "_variance") is not ... else "unbiased"
        if "Dropout" in kind and isinstance(getattr(module, "p", None), (int, float)):
            home = next((place for _, place in run.modules if f"{name}.".startswith(f"{place}.")), "the other modules")
            found["dropout"][home] = sorted({*found["dropout"].get(home, ()), float(module.p)})
    shared: dict[int, list[str]] = {}
    for path, weight in weights.items():
        shared.setdefault(id(weight), []).append(named(path))
        if is_mask(path, run.family) and math.prod(weight.shape) == 1:
            found["mask value"][named(path)] = float(weight)
    return found | {"tied": sorted(sorted(names) for names in shared.values() if len(names) > 1),
                    "weights": sorted(named(path) for path in weights)}


def is_mask(name: str, family: Family) -> bool:
    """Whether a buffer is the number that a mask adds to the scores."""
    return bool(family.traits.mask_value) and name.endswith(family.traits.mask_value)


def differences(reference: Description, candidate: Description) -> list[str]:
    """A sentence for each difference, and one on what was compared."""
    settings = {key for key in reference["settings"] if key in candidate["settings"]}
    told = [f"{concept} ({key}) is {reference['settings'][key][1]!r} in torch's config and "
            f"{candidate['settings'][key][1]!r} in the candidate's."
            for key in sorted(settings) for concept in [reference["settings"][key][0]]
            if reference["settings"][key][1] != candidate["settings"][key][1]]
    norms = [name for name in reference["epsilon"] if name in candidate["epsilon"]]
    told += _grouped("the epsilon of", reference["epsilon"], candidate["epsilon"], norms,
                     "An ordinary input may not show it.")
    running = [name for name in reference["momentum"] if name in candidate["momentum"]]
    told += _grouped("what a batch counts for in the running statistics of", reference["momentum"],
                     candidate["momentum"], running, "Outputs do not show it, training does.")
    parting = [name for name in running if reference["running variance"][name] != candidate["running variance"][name]]
    told += [f"the running variance of {_some(parting)} is in training the sum of squares over n - 1 in torch and "
             "over n in the candidate, n = batch x height x width. Outputs do not show it."] * bool(parting)
    homes = [name for name in reference["dropout"] if name in candidate["dropout"]]
    told += _grouped("dropout in", *({name: [p for p in side["dropout"][name] if p] for name in homes}
                                     for side in (reference, candidate)), homes,
                     "Outputs do not show it, training does.")
    held = set(candidate["weights"])
    tied = [[name for name in names if name in held] for names in reference["tied"]]
    parted = [names for names in tied if len(names) > 1 and not any(
        set(names) <= set(others) for others in candidate["tied"])]
    told += [f"{' and '.join(names)} are one weight in torch and several in the candidate: equal or not now, they part "
             "in training." for names in parted]
    told += [f"{name} is held by the candidate and compared with nothing: Paddle's side has no place for it."
             for name in candidate.get("not compared", ())]
    values = sorted(set(candidate["mask value"].values()) - {LOWEST})
    told += [f"the mask value of the candidate is {value:g}; torch's class adds {LOWEST:.1e}. A row whose scores are "
             "lower still would show it." for value in values]
    configs = sorted({reference["settings"][key][0] for key in settings})
    built = [*(["each norm's epsilon"] * bool(norms)), *(["each batch norm's momentum"] * bool(running)),
             *(["each module's dropout"] * bool(homes)),
             *(["the mask value"] * bool(candidate["mask value"])),
             *(["shared weights"] * any(len(one) > 1 for one in tied))]
    compared = [f"of the configs: {', '.join(configs)}"] * bool(configs) + [
        f"of the nets as built: {', '.join(built)}"] * bool(built)
    return [*(f"Lint: {one}" for one in told),
            f"Lint: {len(told) or 'no'} difference{'s' * (len(told) != 1)} among what was compared, "
            f"{'; '.join(compared)}." if compared else "Lint: this net says nothing of itself that could be compared."]


def _settings(config: Any, family: Family) -> dict[str, tuple[str, Any]]:
    """(what it is, value) of every known setting of a config, a mapping or an object, by its first key's name."""
    groups = [(about, (*keys, *family.settings.get(about, ()))) for about, keys in USUAL.items()]
    groups += [(about, tuple(dict.fromkeys((key, family.paddle_keys.get(key, key)))))
               for about, keys in family.settings.items() if about not in USUAL for key in keys]
    found = {}
    for about, keys in groups:
        values = [value for key in keys if isinstance(value := _held(config, key), (str, int, float, type(None)))]
        if values:
            found[keys[0]] = (about, values[0])
    return found


def _share_of_batch(module: Any) -> float:
    """How much of a batch's statistics goes into the running ones: torch's momentum, and 1 minus Paddle's."""
    kept = _held(module, "_momentum")
    return 1.0 - kept if isinstance(kept, float) else float(_held(module, "momentum") or 0.0)


def _held(holder: Any, key: str) -> Any:
    """What a mapping or an object of any kind has under ``key``; Ellipsis where it has nothing."""
    try:
        return holder[key] if isinstance(holder, Mapping) else getattr(holder, key)
    except Exception:
        return ...


def _grouped(what: str, torch: Mapping[str, Any], candidate: Mapping[str, Any], names: Sequence[str],
             therefore: str) -> list[str]:
    """One sentence for all names that differ in the same way."""
    alike: dict[tuple[str, str], list[str]] = {}
    for name in names:
        if torch[name] != candidate[name] and not (isinstance(torch[name], float) and math.isclose(
                torch[name], candidate[name], rel_tol=THROUGH_FLOAT32)):
            alike.setdefault((_shown(torch[name]), _shown(candidate[name])), []).append(name)
    return [f"{what} {_some(names)} is {left} in torch and {right} in the candidate. {therefore}"
            for (left, right), names in alike.items()]


def _some(names: Sequence[str]) -> str:
    return f"{', '.join(names[:SHOWN])}{f' (+{len(names) - SHOWN} more)' if len(names) > SHOWN else ''}"


def _shown(value: Any) -> str:
    return " and ".join(f"{one:.9g}" for one in value) or "none" if isinstance(value, list) else f"{value:.9g}"
