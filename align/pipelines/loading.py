"""Rows in batches: ``torch.utils.data.DataLoader`` and ``paddle.io.DataLoader`` with the same order given to both."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from convert.errors import BadInput

from ..candidate import blamed
from ..inputs import SEED
from .sheets import Sheet
from .tokenizing import IDS, MASK, Row

LABEL, LABELS = "label", "labels"
"""The number of its text goes with each row, as a label does, and tells the order in which rows come back."""
KEPT, DROPPED = "batches", "drop_last"
Batch = dict[str, np.ndarray]
Collate = Callable[[list[dict[str, Any]]], Any]


def order_of(count: int) -> list[int]:
    """The seeded order in which rows are taken."""
    return np.random.default_rng(SEED).permutation(count).tolist()


def features(rows: Sequence[Row], numbers: Sequence[int], fields: Sequence[str]) -> list[dict[str, Any]]:
    """The rows as collators take them: lists under the names of ``fields``, and each row's number as its label."""
    return [{name: row[name].tolist() for name in fields if name in row} | {LABEL: number}
            for row, number in zip(rows, numbers, strict=True)]


def batched(batches_of: Callable[[bool], Iterator[Batch]]) -> Sheet:
    """Both ways through a loader: with the last batch kept, of which everything is recorded, and with it dropped."""
    found: Sheet = {}
    for word, drop_last in ((KEPT, False), (DROPPED, True)):
        batches = list(batches_of(drop_last))
        labels = [batch[LABELS].reshape(-1) for batch in batches]
        found[f"{word}.order"] = [np.concatenate([*labels, np.zeros(0, np.int64)])]
        found[f"{word}.rows"] = [np.array([len(batch[IDS]) for batch in batches], np.int64)]
        if not drop_last:
            found |= {f"batch.{number}.{name}": [array] for number, batch in enumerate(batches)
                      for name, array in batch.items() if name != LABELS}
    return found


def torch_batches(rows: list[dict[str, Any]], order: Sequence[int], size: int, drop_last: bool,
                  collate: Collate) -> Iterator[Batch]:
    """What torch's loader gives."""
    from torch.utils.data import DataLoader
    for batch in DataLoader(rows, batch_size=size, sampler=order, drop_last=drop_last, collate_fn=collate):
        yield {name: np.asarray(tensor) for name, tensor in batch.items()}


def torch_collate(tokenizer: Any) -> Collate:
    from transformers import DataCollatorWithPadding
    return DataCollatorWithPadding(tokenizer)


def paddle_batches(rows: list[dict[str, Any]], order: Sequence[int], size: int, drop_last: bool,
                   collate: Collate) -> Iterator[Batch]:
    """What Paddle's loader gives."""
    from paddle.io import BatchSampler, DataLoader, Dataset, Sampler

    class Rows(Dataset):
        def __getitem__(self, number: int) -> dict[str, Any]:
            return rows[number]

        def __len__(self) -> int:
            return len(rows)

    class Given(Sampler):
        def __iter__(self) -> Iterator[int]:
            return iter(order)

        def __len__(self) -> int:
            return len(order)
    sampler = BatchSampler(sampler=Given(rows), batch_size=size, drop_last=drop_last)
    with blamed("Paddle's side of the batches"):
        for batch in DataLoader(Rows(), batch_sampler=sampler, collate_fn=collate, return_list=True):
            found = {name: np.asarray(tensor.numpy() if hasattr(tensor, "numpy") else tensor)
                     for name, tensor in batch.items()}
            if not {IDS, LABELS} <= found.keys():
                raise BadInput(f"Paddle's side of the batches has {', '.join(found)}; it needs {IDS}, and {LABELS}, "
                               f"the {LABEL} of each row, by which its order is told.")
            yield found


def paddle_collate(tokenizer: Any) -> Collate:
    """The tokenizer's own ``collate``, PaddleNLP's for a tokenizer that pads, else its ``Pad`` and ``Stack``."""
    if hasattr(tokenizer, "collate"):
        return tokenizer.collate
    from paddlenlp.data import DataCollatorWithPadding
    if hasattr(tokenizer, "pad"):
        return DataCollatorWithPadding(tokenizer)
    return lambda rows: _padded(tokenizer, rows)


def _padded(tokenizer: Any, rows: list[dict[str, Any]]) -> Batch:
    from paddlenlp.data import Pad, Stack
    number = getattr(tokenizer, "pad_token_id", None)
    if number is None:
        raise BadInput(f"{type(tokenizer).__name__} has neither collate, nor pad, nor pad_token_id, so that its rows "
                       "make no batch. Give it one of them.")
    right = getattr(tokenizer, "padding_side", "right") == "right"
    masked = [row | {MASK: row.get(MASK, [1] * len(row[IDS]))} for row in rows]
    fills = {name: number if name == IDS else 0 for name in masked[0] if name != LABEL}
    found = {name: Pad(pad_val=fill, dtype="int64", pad_right=right)([row[name] for row in masked])
             for name, fill in fills.items()}
    return found | {LABELS: Stack(dtype="int64")([row[LABEL] for row in rows])}
