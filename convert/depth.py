"""Where a config says another number of layers than a checkpoint holds: both numbers, and where each comes from."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .rules import Config, Family, Rule, numbers_of


@dataclass(frozen=True)
class Misfit:
    """``sentence`` tells it; ``patterns`` are the names of the layers that only one of the two has."""

    sentence: str
    patterns: tuple[re.Pattern[str], ...]
    common: int

    def explains(self, name: str) -> bool:
        """Whether ``name``, of a source or a target tensor, is in a layer that is too many."""
        found = (pattern.fullmatch(name) for pattern in self.patterns)
        return any(int(one[1]) >= self.common for one in found if one)


def misfits(family: Family, rules: Sequence[Rule], config: Config, header: Mapping[str, Any]) -> list[Misfit]:
    """One for each letter of ``rules`` that stands for more or fewer layers than ``header`` has names for."""
    asked = _Asked(config)
    layers = family.layers(asked)
    found = []
    for letter in layers:
        promised = numbers_of(layers, letter).stop
        sources, targets = ([_pattern(name, letter) for name in names if f"{{{letter}}}" in name] for names in (
            [name for rule in rules for names in rule.sources for name in names],
            [name for rule in rules for name in rule.targets]))
        held = {int(one[1]): name for name in header for pattern in sources if (one := pattern.fullmatch(name))}
        if held and 1 + max(held) != promised:
            keys = [key for key in asked.keys_read if config[key] == promised] or asked.keys_read
            found.append(Misfit(_sentence(family, keys, promised, held, header), (*sources, *targets),
                                min(promised, 1 + max(held))))
    return found


class _Asked(dict):
    """A config that remembers which of its keys somebody has asked for."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.keys_read: list[str] = []

    def get(self, key: str, default: Any = None) -> Any:
        if super().get(key) is not None and key not in self.keys_read:
            self.keys_read.append(key)
        return super().get(key, default)


def _pattern(template: str, letter: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(re.escape(f"{{{letter}}}"), r"(\d{1,9})"))


def _sentence(family: Family, keys: Sequence[str], promised: int, held: Mapping[int, str], header: Mapping[str, Any],
              ) -> str:
    names = [re.match(rf".*?\.{number}(?=\.)", held[number]) for number in (min(held), max(held))]
    first, last = (found[0] if found else held[max(held)] for found in names)
    files = {getattr(header[name], "file", None) for name in held.values()}
    file = next(iter(files)) if len(files) == 1 else None
    said = ("config.json" if set(keys) - family.states.keys() else "the family file") + (
        f" ({' and '.join(keys)})" if keys else "")
    many = f"{promised} layer{'s' if promised != 1 else ''}"
    where = first if first == last else f"{first} to {last}"
    return (f"{said} says {many}, {file.name if file else 'the checkpoint'} holds {1 + max(held)} ({where}). Correct "
            "the number, or give the checkpoint that it belongs to.")
