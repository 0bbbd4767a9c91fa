"""What every family's config has in common, read from ``config.json`` with the defaults of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

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
