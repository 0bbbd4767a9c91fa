"""The texts that ``align.data`` gives both tokenizers: those that ship with the project, or the user's own."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass

from convert.errors import BadInput

from ..texts import DATA, Row, columns, load_rows, renamed

TEXTS = "texts.jsonl"
NAME = "the texts that ship with paddle-parity"
OWN = "data"
LONG = "very long"
SHOWN = 40
LETTERS = 4500


@dataclass(frozen=True)
class Text:
    """A text, or a pair of them where ``pair`` is one; ``group`` says what is to be seen by it."""

    group: str
    text: str
    pair: str | None = None

    @property
    def excerpt(self) -> str:
        """The first letters, as Python writes them: control characters are shown, not obeyed."""
        told = self.text if self.pair is None else f"{self.text} | {self.pair}"
        return repr(told if len(told) <= SHOWN else told[: SHOWN - 1] + "…")


def shipped(special: Iterable[str]) -> list[Text]:
    """What ships, group by group; ``special`` are the reference's own special tokens, written out in texts."""
    found = [Text(row["group"], row["text"], row.get("next"))
             for row in map(json.loads, (DATA / TEXTS).read_text("utf-8").split("\n")[:-1])]
    named = sorted(set(special))
    return [*found, Text("special tokens", " ".join(named)), Text("special tokens", "a".join(["", *named, ""])),
            *_long()]


def _long() -> list[Text]:
    """The first of the passages as one text, parted as a pair with the longer part behind, and a word of 300 letters.
    """
    passages = " ".join(row["text"] for row in load_rows(None, None, 64)[1])[:LETTERS]
    return [Text(LONG, passages), Text(LONG, passages[: LETTERS // 3], passages[LETTERS // 3:]), Text(LONG, "ab" * 150)]


def own(dataset: str, split: str | None, limit: int, mapping: str | None) -> tuple[str, list[Text]]:
    """(name, texts) of the user's set: its column ``text``, and ``next`` where a row has one to make a pair."""
    name, rows = load_rows(dataset, split, limit, flag="--data")
    renamed_rows: list[Row] = renamed(rows, mapping)
    columns(renamed_rows, text=str)
    if not renamed_rows:
        raise BadInput(f"{name} has no row, so there is nothing to compare.")
    for number, row in enumerate(renamed_rows):
        if not isinstance(row.get("next"), (str, type(None))):
            raise BadInput(f"row {number} of the data set has next = {row['next']!r}; a text is needed.")
    return name, [Text(OWN, row["text"], row.get("next")) for row in renamed_rows]


def packed(texts: Sequence[Text]) -> list[list[str | None]]:
    """As JSON holds them."""
    return [list(astuple(text)) for text in texts]


def unpacked(rows: Iterable[Sequence[str | None]]) -> list[Text]:
    return [Text(*row) for row in rows]


def grouped(texts: Sequence[Text]) -> dict[str, list[int]]:
    """The numbers of the texts of each group, in the order in which groups begin."""
    found: dict[str, list[int]] = {}
    for number, text in enumerate(texts):
        found.setdefault(text.group, []).append(number)
    return found
