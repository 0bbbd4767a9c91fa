"""Why a tokenizer is not the reference's: what known mistakes make of the reference itself.

A mistake is a change of a :class:`Recipe`, the way from texts to rows and batches with transformers' own tokenizer.
It explains the candidate where the changed recipe gives all that the candidate gives, text by text and batch by batch:
those that were equal stay so. Two mistakes may be made at once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import combinations, product
from typing import Any

import numpy as np

from .corpus import Text
from .sheets import Sheet, digests
from .tokenizing import IDS, MASK, PLACES, SPECIAL, TYPES, Row

EVERYTHING = {"return_attention_mask": True, "return_special_tokens_mask": True}
KNOWN = (IDS, MASK, TYPES, SPECIAL)
PART = "part"
Edit = Callable[[Row], Row]
Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class Recipe:
    """How rows and batches are made. ``normalizer`` and ``pre_tokenizer`` belong to a fast tokenizer's
    machinery; they and the settings below them are put into the tokenizer while the recipe is followed.

    ``prepared`` change a text before it is taken apart, ``edits`` its row behind, without what they make of special
    tokens; ``room`` is how many tokens more than the limit a row of one text, and one of a pair, may have before they
    are edited; ``settled`` changes a batch. ``one_by_one``: of a pair that is too long tokens are taken from the end of
    the longer text, one after the other.
    """

    tokenizer: Any
    limit: int
    fields: tuple[str, ...]
    asked: Mapping[str, Any] = field(default_factory=dict)
    normalizer: Any = None
    pre_tokenizer: Any = None
    split_special_tokens: bool = False
    truncation_side: str = "right"
    padding_side: str = "right"
    prepared: tuple[Callable[[str], str], ...] = ()
    edits: tuple[Edit, ...] = ()
    room: tuple[int, int] = (0, 0)
    cuts: bool = True
    settled: tuple[Callable[[Batch], Batch], ...] = ()
    collate: Callable[[Sequence[Row]], Batch] | None = None
    start: Callable[[np.ndarray], np.ndarray] | None = None

    one_by_one: bool = False
    seen: dict[Any, Any] = field(default_factory=dict, repr=False)

    def rows(self, texts: Sequence[Text]) -> tuple[list[Row], list[Row]]:
        """A row for each text, and the same with those that are longer than the limit cut to it."""
        whole = self._encoded(texts, range(len(texts)), None)
        longer = [number for number, row in enumerate(whole) if self.cuts
                  and len(row[IDS]) > self.limit + self.room[texts[number].pair is not None]]
        cut = dict(enumerate(whole))
        for paired in (False, True):
            chosen = [number for number in longer if (texts[number].pair is not None) == paired]
            limit = self.limit + self.room[paired]
            rows = self._encoded(texts, chosen, limit + (paired and self.one_by_one))
            cut |= zip(chosen, [_shortened(row, limit) for row in rows], strict=True)
        return [self._edited(row) for row in whole], [self._edited(cut[number]) for number in range(len(texts))]

    def _encoded(self, texts: Sequence[Text], numbers: Sequence[int], limit: int | None) -> list[Row]:
        """Rows before they are edited, kept for recipes that differ in nothing that they hang on."""
        held = (texts, self.tokenizer, self.normalizer, self.pre_tokenizer)
        key = (*map(id, held), tuple(numbers), self.split_special_tokens, limit and (limit, self.truncation_side),
               self.prepared)
        if key not in self.seen:
            chosen = [self._prepared(texts[number]) for number in numbers]
            self.seen[key] = held, _encoded(self.tokenizer, chosen, limit, self.asked)
        return self.seen[key][1]

    def _prepared(self, text: Text) -> Text:
        for change in self.prepared:
            text = Text(text.group, change(text.text), text.pair if text.pair is None else change(text.pair))
        return text

    def _edited(self, row: Row) -> Row:
        for edit in self.edits:
            row = edit(row)
        return {name: row[name] for name in self.fields if name in row}

    def batch(self, rows: Sequence[Row]) -> Batch:
        """Rows as one batch, padded as the tokenizer does it."""
        given = [{name: row[name] for name in self.fields if name in row and name != SPECIAL} for row in rows]
        found = self.collate(given) if self.collate else dict(self.tokenizer.pad(
            {name: [row[name].tolist() for row in given] for name in given[0]}, padding=True, return_tensors="np"))
        for change in self.settled:
            found = change(found)
        return {name: np.asarray(array) for name, array in found.items()}

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Meanwhile the tokenizer is as this recipe says."""
        tokenizer, machinery = self.tokenizer, getattr(self.tokenizer, "backend_tokenizer", None)
        wanted = {name: getattr(self, name) for name in ("truncation_side", "padding_side", "split_special_tokens")}
        held = {name: getattr(tokenizer, name) for name in wanted}
        parts = (machinery.normalizer, machinery.pre_tokenizer) if machinery is not None else None
        _set(tokenizer, wanted, machinery, (self.normalizer, self.pre_tokenizer))
        try:
            yield
        finally:
            _set(tokenizer, held, machinery, parts)


def _encoded(tokenizer: Any, texts: Sequence[Text], limit: int | None, asked: Mapping[str, Any]) -> list[Row]:
    found: dict[int, Row] = {}
    limits = {} if limit is None else {"truncation": True, "max_length": limit}
    for paired in (False, True):
        chosen = [number for number, text in enumerate(texts) if (text.pair is not None) == paired]
        if chosen:
            given = [[texts[number].text for number in chosen], *([[texts[number].pair for number in chosen]] * paired)]
            encoded = tokenizer(*given, **EVERYTHING, **limits, **asked)
            found |= {number: _row(encoded, place) for place, number in enumerate(chosen)}
    return [found[number] for number in range(len(texts))]


def _row(encoded: Any, place: int) -> Row:
    """What a tokenizer gives for one of several texts, and which text each token is of, -1 for none."""
    row = {name: np.array(rows[place], np.int64) for name, rows in encoded.items() if name in KNOWN}
    if not encoded.is_fast:
        return row
    return row | {PART: np.array([-1 if part is None else part for part in encoded.sequence_ids(place)], np.int64)}


def _shortened(row: Row, limit: int) -> Row:
    """Without the last token of the longer text of a pair, the second where they are equally long, if over the limit.
    """
    if len(row[IDS]) <= limit or PART not in row:
        return row
    first, second = (np.flatnonzero(row[PART] == part) for part in (0, 1))
    out = first[-1] if len(first) > len(second) else second[-1]
    return {name: np.delete(array, out) for name, array in row.items()}


def _set(tokenizer: Any, settings: Mapping[str, Any], machinery: Any, parts: tuple[Any, Any] | None) -> None:
    for name, value in settings.items():
        setattr(tokenizer, name, value)
    if machinery is not None:
        machinery.normalizer, machinery.pre_tokenizer = parts


def recipe_of(tokenizer: Any, limit: int, fields: tuple[str, ...], **more: Any) -> Recipe:
    """The reference's own way."""
    machinery = getattr(tokenizer, "backend_tokenizer", None)
    parts = {} if machinery is None else {"normalizer": machinery.normalizer, "pre_tokenizer": machinery.pre_tokenizer}
    asked = {"return_token_type_ids": True} if TYPES in fields else {}
    return Recipe(tokenizer, limit, fields, asked, truncation_side=tokenizer.truncation_side,
                  padding_side=tokenizer.padding_side, **parts, **more)


# Mistakes -------------------------------------------------------------------------------------------------------------

Change = Callable[[Recipe], Recipe]
Mistake = tuple[tuple[str, ...], Change]


def suppositions(recipe: Recipe, slow: Callable[[], Any]) -> Iterator[tuple[tuple[str, ...], Recipe]]:
    """(what is done instead, the recipe with it) of every mistake, then of each beside what PaddleNLP is known to do.

    ``slow`` gives transformers' own tokenizer in Python for the same files.
    """
    letters, rest = ([((told,), change) for told, change in some] for some in (
        (*_of_letters(recipe), *_of_parting(recipe)),
        (*_of_special_tokens(recipe), *_of_lengths(recipe), *_of_padding(recipe), *_of_decoders(recipe))))
    habits = [((told,), change) for told, change in (
        *_of_symbols(recipe), *_of_blanks(recipe), *_of_blanks_around(recipe), *_of_pairs(recipe))]
    known = [*habits, *(_both(*two) for two in combinations(habits, 2))]
    older = [((told,), change) for told, change in _of_other_code(recipe, slow)]
    older += [_both(*two) for two in product(older, habits)]
    for told, change in (*letters, *rest, *known, *older, *(_both(*two) for two in (
            *product((*letters, *rest), known), *product(rest, older)))):
        yield told, change(recipe)


def _both(one: Mistake, other: Mistake) -> Mistake:
    return (*one[0], *other[0]), lambda old: other[1](one[1](old))


Changes = Iterator[tuple[str, Change]]
"""What is done instead, in words, and the change."""


def _of_letters(recipe: Recipe) -> Changes:
    """Lower case, accents, Chinese characters, control characters."""
    if recipe.normalizer is None and not hasattr(recipe.tokenizer, "backend_tokenizer"):
        if hasattr(recipe.tokenizer, "fold"):
            yield "runs of blanks, tabs and lines are not folded into words of their own", lambda old: replace(
                old, tokenizer=_unfolded(old.tokenizer))
        return
    from tokenizers import normalizers
    state = _state(recipe.normalizer)
    if state.get("type") != "BertNormalizer":
        def before(*steps: Any) -> Callable[[Recipe], Recipe]:
            return lambda old: replace(old, normalizer=normalizers.Sequence(
                [*steps, *([old.normalizer] if old.normalizer else [])]))
        yield "texts are lower-cased", before(normalizers.Lowercase())
        yield "accents are stripped", before(normalizers.NFD(), normalizers.StripAccents())
        return

    def turned(**change: Any) -> Callable[[Recipe], Recipe]:
        def made(old: Recipe) -> Recipe:
            held = {key: value for key, value in _state(old.normalizer).items() if key != "type"}
            return replace(old, normalizer=normalizers.BertNormalizer(**held | change))
        return made
    strips = state["lowercase"] if state["strip_accents"] is None else state["strip_accents"]
    yield ("texts are not lower-cased" if state["lowercase"] else "texts are lower-cased",
           turned(lowercase=not state["lowercase"]))
    if state["strip_accents"] is None:
        yield (f"texts are {'not ' if state['lowercase'] else ''}lower-cased (and accents "
               f"{'stripped all the same' if strips else 'kept all the same'})",
               turned(lowercase=not state["lowercase"], strip_accents=strips))
    yield "accents are not stripped" if strips else "accents are stripped", turned(strip_accents=not strips)
    yield ("Chinese characters are not split" if state["handle_chinese_chars"] else "Chinese characters are split",
           turned(handle_chinese_chars=not state["handle_chinese_chars"]))
    yield ("control characters are not cleaned away" if state["clean_text"] else "control characters are cleaned away",
           turned(clean_text=not state["clean_text"]))


def _of_parting(recipe: Recipe) -> Changes:
    """Where a text is cut into words, and the space before the first."""
    if recipe.pre_tokenizer is None:
        return
    from tokenizers import pre_tokenizers
    kinds = _kinds(recipe.pre_tokenizer)
    if "ByteLevel" in kinds:
        prefix, regex = kinds["ByteLevel"]["add_prefix_space"], kinds["ByteLevel"]["use_regex"]

        if not regex:
            yield "texts are cut into words as GPT-2 cuts them", lambda old: replace(
                old, pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=True))
        if len(kinds) == 1:
            level = pre_tokenizers.ByteLevel(add_prefix_space=not prefix, use_regex=regex)
            yield ("no space is put before a text" if prefix else "a space is put before a text (prefix space)",
                   lambda old: replace(old, pre_tokenizer=level))
        if not prefix:
            yield "a space is put before every text, also where there is one (prefix space)", _prepares(" {}".format)
    if "Metaspace" in kinds and len(kinds) == 1:
        always = kinds["Metaspace"]["prepend_scheme"] == "always"
        yield ("no space is put before a text" if always else "a space is put before every part of a text",
               lambda old: replace(old, pre_tokenizer=pre_tokenizers.Metaspace(
                   prepend_scheme="never" if always else "always", split=kinds["Metaspace"]["split"])))


def _of_symbols(recipe: Recipe) -> Changes:
    if "BertPreTokenizer" not in _kinds(recipe.pre_tokenizer):
        return
    from tokenizers import Regex, pre_tokenizers
    apart = pre_tokenizers.Split(Regex(SYMBOLS), "isolated")
    yield "symbols are split off like punctuation", lambda old: replace(
        old, pre_tokenizer=pre_tokenizers.Sequence([old.pre_tokenizer, apart]))


def _of_blanks(recipe: Recipe) -> Changes:
    if "Metaspace" not in _kinds(recipe.pre_tokenizer):
        return
    yield "tabs, lines and every run of blanks are one space", _prepares(lambda text: " ".join(text.split()))
    end = recipe.tokenizer.eos_token_id

    def once(row: Row) -> Row:
        added = (row[IDS] == end) & (row[SPECIAL] == 1)
        again = added & np.roll((row[IDS] == end) & (row[SPECIAL] == 0), 1)
        return {name: array[~again] for name, array in row.items()}
    yield f"no {recipe.tokenizer.eos_token} (EOS) is put behind a text that ends with one", lambda old: replace(
        old, edits=(*old.edits, once))


def _of_blanks_around(recipe: Recipe) -> Changes:
    special = recipe.tokenizer.all_special_tokens
    if "ByteLevel" not in _kinds(recipe.pre_tokenizer) or not special:
        return
    written = re.compile(rf"\s*({'|'.join(map(re.escape, special))})\s*")
    yield "blanks around special tokens that are written out in a text are dropped", _prepares(
        lambda text: written.sub(r"\1", text))


def _of_pairs(recipe: Recipe) -> Changes:
    if hasattr(recipe.tokenizer, "backend_tokenizer"):
        yield ("of a pair that is too long the first text may keep one token more than the second, as tokenizers in "
               "Python cut it, instead of the other way round"), lambda old: replace(old, one_by_one=True)


SYMBOLS = r"[\p{S}\u00ad\u00b2\u00ba\u3007\u00b5\u00d8\u014b\u01b1]"
"""Unicode's symbols, and the eight more that PaddleNLP counts among them (``tokenizer_utils.py``, ``_is_symbol``)."""


def _of_special_tokens(recipe: Recipe) -> Changes:
    """Those that a row begins and ends with, and those that are written out in the text."""
    tokenizer = recipe.tokenizer
    yield "special tokens that are written out in a text are not recognised", lambda old: replace(
        old, split_special_tokens=True)
    first, last, special = _around_texts(recipe)
    roles = {tokenizer.cls_token_id: " (BOS)", tokenizer.sep_token_id: " (EOS)", tokenizer.bos_token_id: " (BOS)",
             tokenizer.eos_token_id: " (EOS)"}
    for numbers, where in ((first, "before"), (last, "behind")):
        for number in numbers:
            role = " (BOS)" if where == "before" else roles.get(number, "")
            yield (f"{tokenizer.convert_ids_to_tokens(number)}{role} is missing {where} a text",
                   _without(special, number))
    if len(first) + len(last) > 1:
        yield "no special token is put around a text", _without(special, *first, *last)
    if not len(first) and tokenizer.bos_token_id is not None:
        yield f"{tokenizer.bos_token} (BOS) is put before a text", _around(tokenizer.bos_token_id, front=True)
    if not len(last) and tokenizer.eos_token_id is not None:
        yield f"{tokenizer.eos_token} (EOS) is put behind a text", _around(tokenizer.eos_token_id, front=False)


def _around_texts(recipe: Recipe) -> tuple[list[int], list[int], tuple[list[int], list[int]]]:
    """Special tokens before a text, behind it, and all of those of a text and of a pair."""
    rows, _ = replace(recipe, fields=(IDS, SPECIAL)).rows([Text("", "a"), Text("", "a", "a")])
    special = tuple(row[IDS][row[SPECIAL] == 1].tolist() for row in rows)
    inner = np.flatnonzero(rows[0][SPECIAL] == 0)
    if not len(inner):
        return [], [], special
    return rows[0][IDS][: inner[0]].tolist(), rows[0][IDS][inner[-1] + 1:].tolist(), special


def _without(special: tuple[list[int], list[int]], *numbers: int) -> Change:
    """Special tokens with these ids are not added, which leaves room for as many more tokens in a row that is cut."""
    def edit(row: Row) -> Row:
        kept = ~((row[SPECIAL] == 1) & np.isin(row[IDS], numbers))
        return {name: array[kept] for name, array in row.items()}
    one, two = (sum(number in numbers for number in kind) for kind in special)
    return lambda old: replace(old, edits=(*old.edits, edit), room=(old.room[0] + one, old.room[1] + two))


def _around(number: int, front: bool) -> Change:
    """One special token more, at one end of a row."""
    added = {IDS: number, MASK: 1, TYPES: 0, SPECIAL: 1}

    def edit(row: Row) -> Row:
        return {name: np.concatenate([[added.get(name, -1)], array] if front else [array, [added.get(name, -1)]])
                for name, array in row.items()}
    return lambda old: replace(old, edits=(*old.edits, edit), room=(old.room[0] - 1, old.room[1] - 1))


def _of_lengths(recipe: Recipe) -> Changes:
    other = "left" if recipe.truncation_side == "right" else "right"
    count = recipe.tokenizer.num_special_tokens_to_add(False)
    yield f"what is too long is cut on the {other} instead of the {recipe.truncation_side}", lambda old: replace(
        old, truncation_side=other)
    yield "what is too long is not cut", lambda old: replace(old, cuts=False)
    for shift, told in ((count, "special tokens are not counted when a text is cut"), (1, None), (-1, None)):
        if shift and recipe.limit + shift > count:
            yield (told or f"texts are cut at {recipe.limit + shift} tokens instead of {recipe.limit}",
                   lambda old, shift=shift: replace(old, room=(old.room[0] + shift, old.room[1] + shift)))


def _of_padding(recipe: Recipe) -> Changes:
    """Side and id; the mask and the token types."""
    pad, other = recipe.tokenizer.pad_token_id, "left" if recipe.padding_side == "right" else "right"
    if recipe.collate is None:
        yield f"batches are padded on the {other} instead of the {recipe.padding_side}", lambda old: replace(
            old, padding_side=other)
    else:
        yield "batches are padded on the right instead of the left", lambda old: replace(
            old, settled=(*old.settled, _rolled))
    for number, told in {0: "0", recipe.tokenizer.eos_token_id: "that of EOS", recipe.tokenizer.unk_token_id:
                         "that of an unknown token"}.items():
        if number is not None and number != pad:
            yield (f"the id that batches are padded with is {told}, {number}, instead of {pad}",
                   lambda old, number=number: replace(old, settled=(
                       *old.settled, lambda batch: _filled(batch, IDS, number))))
    if MASK in recipe.fields:
        yield "the attention mask shows padding too", lambda old: replace(
            old, settled=(*old.settled, lambda batch: _filled(batch, MASK, 1)))
    if TYPES in recipe.fields:
        yield "token_type_ids are absent", lambda old: replace(
            old, fields=tuple(name for name in old.fields if name != TYPES))
        yield "token_type_ids are 0 throughout", lambda old: replace(old, edits=(
            *old.edits, lambda row: row | {TYPES: np.zeros_like(row[IDS])}))


def _filled(batch: Batch, name: str, number: int) -> Batch:
    """The batch with ``number`` where there is padding."""
    padding = batch[MASK] == 0 if batch[MASK].ndim == 2 else ~np.diagonal(batch[MASK][:, 0], axis1=1, axis2=2).astype(
        bool)
    return batch | {name: np.where(padding, number, batch[name])}


def _rolled(batch: Batch) -> Batch:
    """Prompts with their padding moved from the left to the right."""
    real = np.diagonal(batch[MASK][:, 0], axis1=1, axis2=2).astype(bool)
    found = {name: array.copy() for name, array in batch.items()}
    for number, shift in enumerate((~real).sum(1)):
        found[IDS][number] = np.roll(batch[IDS][number], -shift)
        found[PLACES][number] = np.roll(batch[PLACES][number], -shift, axis=-1)
        found[MASK][number] = np.roll(batch[MASK][number], (-shift, -shift), axis=(-2, -1))
    return found


def _of_decoders(recipe: Recipe) -> Changes:
    """What a decoder's texts begin with."""
    if recipe.start is None:
        return
    right = int(recipe.start(np.array([[7, 8]]))[0, 0])
    tokenizer = recipe.tokenizer
    for number, told in {tokenizer.pad_token_id: "padding", tokenizer.eos_token_id: "EOS", tokenizer.unk_token_id:
                         "an unknown token", tokenizer.bos_token_id: "BOS", 0: "id 0"}.items():
        if number is not None and number != right:
            def begun(labels: np.ndarray, number: int = number) -> np.ndarray:
                return np.concatenate([np.full((len(labels), 1), number), labels[:, :-1]], axis=1)
            yield f"the decoder starts with {told} ({number}) instead of {right}", lambda old, begun=begun: replace(
                old, start=begun)
    yield "the decoder reads the labels themselves, not shifted", lambda old: replace(old, start=lambda labels: labels)


def _of_other_code(recipe: Recipe, slow: Callable[[], Any]) -> Changes:
    """What transformers' own slow tokenizer makes of it, which others were copied from."""
    if not hasattr(recipe.tokenizer, "backend_tokenizer"):
        return
    try:
        found = slow()
    except Exception:  # many have none, or want a file that is not there; then there is nothing to suppose
        return
    if found is None or hasattr(found, "backend_tokenizer"):
        return
    if found.pad_token_id is None:
        found.pad_token = recipe.tokenizer.pad_token
    yield (f"texts are taken apart as transformers' {type(found).__name__} does it, the one in Python, and not as its "
           f"{type(recipe.tokenizer).__name__}"), lambda old: replace(old, tokenizer=found)


def _prepares(change: Callable[[str], str]) -> Change:
    return lambda old: replace(old, prepared=(*old.prepared, change))


def _unfolded(tokenizer: Any) -> Any:
    import copy
    found = copy.copy(tokenizer)
    found.fold = lambda text: text
    return found


def _state(part: Any) -> dict[str, Any]:
    return {} if part is None else json.loads(part.__getstate__())


def _kinds(pre_tokenizer: Any) -> dict[str, Any]:
    """What a pre-tokenizer consists of, by the type of each part."""
    state = _state(pre_tokenizer)
    return {part["type"]: part for part in state.get("pretokenizers", [state] if state else [])}


def explained(told: Mapping[str, Any], candidate: Sheet, supposed: np.ndarray) -> tuple[str, float, float] | None:
    """(what is done instead, shares of rows that differ before and after) of the mistake that gives just what the
    candidate does, None where none does. Where several do, the fewest at once are told, and if the texts do not tell
    these apart, all of them.

    ``supposed`` [1 + mistakes, rows] holds digests, the reference's first; of what, and under which mistakes, is
    ``told``.
    """
    found = digests(candidate, told["counts"])
    before = float(np.mean(found != supposed[0]))
    fitting = [told["mistakes"][number] for number in np.flatnonzero((supposed[1:] == found).all(axis=1))]
    least: list[Sequence[str]] = []
    for parts in sorted(fitting, key=len):
        if not any(set(other) <= set(parts) for other in least):
            least.append(parts)
    sentences = [", and ".join(parts) for parts in least if len(parts) == len(least[0])]
    if not sentences or not before:
        return None
    return "; or, which these texts do not tell apart: ".join(sentences), before, 0.0
