"""What every family's config has in common, read from ``config.json`` with the defaults of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from convert.errors import BadInput

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, kw_only=True)
class Config:
    """Fields of ``PretrainedConfig`` that change what a net computes; ``aliases`` are their other names."""

    aliases: ClassVar[Mapping[str, str]] = {}

    num_labels: int = 2
    problem_type: str | None = None
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Known keys of ``config``. Where ``id2label`` is given it says how many labels there are."""
        named = {cls.aliases.get(key, key): value for key, value in config.items()}
        if config.get("id2label") is not None:
            named["num_labels"] = len(config["id2label"])
        return cls(**{field.name: named[field.name] for field in fields(cls) if field.name in named})


def refuse_uneven_heads(family: str, config: Config, width: str, heads: str) -> None:
    """:class:`BadInput` where the heads do not divide the width, each a field of ``config``."""
    channels, number = getattr(config, width), getattr(config, heads)
    if not number or channels % number:
        raise BadInput(f"{family}: {width} {channels} is not a multiple of {heads} {number}.")
