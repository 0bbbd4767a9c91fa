"""The built-in demo checkpoint: a small random torch-side model of a family, with a tokenizer, made from its rules.

Weights are seeded and have the spread of trained ones (biases and layer norms away from 0 and 1), so that a
missed transpose, a lost bias or a swapped name shows in every output.
"""

from __future__ import annotations

import json
import string
import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from .dtypes import BY_NAME
from .plan import Move, expand
from .rules import Config, Family, Rule
from .writer import MARKER, Staging, make_layout, refuse_existing

SEED = 20260601
REMOTE = Path(__file__).with_name("remote")
"""Torch nets of our own for families whose checkpoints bring their code along; they are data here, and not imported."""


def build_demo(family: Family, directory: Path, changes: Config = MappingProxyType({})) -> Path:
    """Write the demo checkpoint of ``family`` into ``directory``, in the place of an earlier one.

    ``changes`` are entries of its config that are to be others: another head, another activation.
    """
    config = {**family.demo, **changes}
    marker = directory / MARKER
    ours = marker.is_file() and json.loads(marker.read_text("utf-8")).get("demo") == family.name
    refuse_existing(directory, overwrite=ours)
    head = family.head(config["architectures"][0])
    rules = [rule for rule in family.rules_of(head) if rule.when(config) and rule.moves and not rule.otherwise]
    sizes, layers = family.sizes(config), family.layers(config)
    moves = [move for rule in expand(rules, layers) for move in _stored(rule, sizes)]
    layout = make_layout(moves, "safetensors", shard_size=1 << 40, framework="pt")
    generator = np.random.default_rng(SEED)
    with Staging(directory) as staging:
        staging.allocate(layout)
        for move in moves:
            values = _trained_like(move, generator)
            staging.write(layout.places[move.target][0], memoryview(values.reshape(-1).view(np.uint8)),
                          layout.places[move.target][1])
        for name, text in _companions(family, config).items():
            (staging.path / name).write_text(text, "utf-8")
        for name, content in MODELS.get(family.tokenizer, lambda vocab_size: {})(config.get("vocab_size", 0)).items():
            (staging.path / name).write_bytes(content)
        staging.publish()
    return directory


def _stored(rule: Rule, sizes: Mapping[str, int]) -> Iterator[Move]:
    """The torch-side tensors as the writer's layout wants them: under their source names, in their source shapes."""
    float32 = BY_NAME["float32"]
    for number, (name, *_) in enumerate(rule.sources):
        shape = rule.source_shape(sizes, number)
        yield Move(name, rule, (name,), None, shape, float32, shape, float32)


def _trained_like(move: Move, generator: np.random.Generator) -> np.ndarray:
    noise = generator.standard_normal(prod(move.shape)).astype(np.float32).reshape(move.shape)
    if len(move.shape) == 4:
        return noise / np.float32(np.sqrt(prod(move.shape[1:])))
    if move.target.endswith("running_var"):
        return np.exp(np.float32(0.5) * noise)
    if len(move.shape) == 2:
        return noise * np.float32(0.5 if move.rule.kind == "keep" else
                                  1.4 / np.sqrt(move.shape[move.rule.transposed]))
    if move.target.endswith("weight"):
        return 1 + np.float32(0.2) * noise
    return np.float32(0.1) * noise


def _companions(family: Family, config: Config) -> dict[str, str]:
    files = {"config.json": json.dumps(config, indent=2), MARKER: json.dumps({"demo": family.name})}
    if family.remote_code:
        files |= {file.name: file.read_text("utf-8") for file in sorted((REMOTE / family.name).glob("*.py"))}
    return files | TOKENIZERS[family.tokenizer](config.get("vocab_size", 0))


def _wordpiece(vocab_size: int) -> dict[str, str]:
    """A vocabulary of single characters; BERT's tokenizer splits every word into them."""
    letters = string.ascii_lowercase + string.digits
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters),
              *string.punctuation, "–", "’"]
    tokens += [f"[unused{number}]" for number in range(vocab_size - len(tokens))]
    return {"vocab.txt": "\n".join(tokens) + "\n",
            "tokenizer_config.json": json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": True})}


def _byte_level(vocab_size: int) -> dict[str, str]:
    """GPT-2's byte-level vocabulary without merges: a token is a byte (byte-to-letter table of Radford et al.)."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    letters = [chr(byte) for byte in visible] + [chr(256 + number) for number in range(len(hidden))]
    vocabulary = {letter: number for number, letter in enumerate([*letters, "<|endoftext|>"])}
    return {"vocab.json": json.dumps(vocabulary), "merges.txt": "#version: 0.2\n",
            "tokenizer_config.json": json.dumps({"tokenizer_class": "GPT2Tokenizer", "pad_token": "<|endoftext|>"})}


def _pictures(vocab_size: int) -> dict[str, str]:
    """No tokenizer: what is done to pictures, which come out at 64 x 64 with ImageNet's mean and deviation."""
    return {"preprocessor_config.json": json.dumps({
        "image_processor_type": "ConvNextImageProcessor", "do_resize": True, "size": {"shortest_edge": 64},
        "crop_pct": 0.875, "resample": 3, "do_rescale": True, "do_normalize": True,
        "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}, indent=2)}


def _byte_level_fast(vocab_size: int) -> dict[str, str]:
    """The same as BLOOM has it, in one ``tokenizer.json`` with BLOOM's own cut into words; </s> is every special token.
    """
    letters = json.loads(_byte_level(vocab_size)["vocab.json"])
    vocabulary = {("</s>" if letter == "<|endoftext|>" else letter): number for letter, number in letters.items()}
    word = {"type": "Split", "pattern": {"Regex": " ?[^(\\s|[.,!?…。，、।۔،])]+"}, "behavior": "Isolated",
            "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None,
        "added_tokens": [_special(vocabulary["</s>"], "</s>")],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [word, level]}, "post_processor": level,
        "decoder": level, "model": {"type": "BPE", "vocab": vocabulary, "merges": []}}
    names = dict.fromkeys(("unk_token", "bos_token", "eos_token", "pad_token"), "</s>")
    return {"tokenizer.json": json.dumps(tokenizer, ensure_ascii=False), "tokenizer_config.json": json.dumps(
        {"tokenizer_class": "BloomTokenizerFast", "padding_side": "left", **names})}


def _special(number: int, token: str) -> dict[str, Any]:
    return {"id": number, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": True}


def _unigram(vocab_size: int) -> list[tuple[str, float]]:
    """Pieces and scores of T5's: of letters, their most frequent pairs and triples, and words, the fewest win."""
    special = ["<pad>", "</s>", "<unk>"]
    words = ["the", "a", "to", "and", "of", "in", "is", "der", "die", "das", "und", "ein", "zu"]
    syllables = ["en", "er", "ch", "de", "ei", "nd", "te", "in", "ie", "ge", "es", "ne", "un", "st", "re", "he", "an",
                 "se", "ng", "it", "sch", "ich", "ein", "ing", "ung"]
    letters = [*string.ascii_letters, *string.digits, *string.punctuation, *"ÄÖÜäöüß–’"]
    pieces = ["▁", *letters, *syllables, *(f"▁{word}" for word in words)]
    found = [(piece, 0.0) for piece in special] + [(piece, -8.0) for piece in pieces]
    return found + [(f"<unused{number}>", -99.0) for number in range(vocab_size - len(found))]


def _sentencepiece(vocab_size: int) -> dict[str, str]:
    """A Unigram vocabulary (Kudo 2018) as T5's fast tokenizer has it in its ``tokenizer.json``: a space is ▁, runs of
    them are one, and every text ends with </s>.
    """
    spaces = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    one = {"type": "Sequence", "normalizers": [
        {"type": "Strip", "strip_left": False, "strip_right": True},
        {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"}]}
    end = {"SpecialToken": {"id": "</s>", "type_id": 0}}
    texts = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": one, "pre_tokenizer": spaces,
        "decoder": spaces,
        "added_tokens": [_special(number, token) for number, token in enumerate(("<pad>", "</s>", "<unk>"))],
        "post_processor": {"type": "TemplateProcessing", "single": [texts[0], end],
                           "pair": [texts[0], end, texts[1], end],
                           "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}}},
        "model": {"type": "Unigram", "unk_id": 2, "vocab": _unigram(vocab_size), "byte_fallback": False},
    }
    return {"tokenizer.json": json.dumps(tokenizer, ensure_ascii=False),
            "tokenizer_config.json": json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 0})}


def _prompts(vocab_size: int) -> dict[str, str]:
    return {"tokenizer_config.json": json.dumps({
        "tokenizer_class": "ChatGLMTokenizer", "num_image_tokens": 0, "do_lower_case": False, "remove_space": False,
        "bos_token": "<sop>", "eos_token": "<eop>", "mask_token": "[MASK]", "gmask_token": "[gMASK]",
        "pad_token": "<pad>", "unk_token": "<unk>", "padding_side": "left"})}


TOKENIZERS = {"wordpiece": _wordpiece, "byte-level": _byte_level, "byte-level fast": _byte_level_fast,
              "pictures": _pictures, "sentencepiece": _sentencepiece, "prompts": _prompts,
              "none": lambda vocab_size: {}}


# SentencePiece's own files --------------------------------------------------------------------------------------------

NORMAL, UNKNOWN, CONTROL, OURS = 1, 2, 3, 4
"""The kinds of a piece in ``sentencepiece_model.proto``; ours are cut out of a text before all others."""
SPECIAL_PIECES = {"<unk>": UNKNOWN, "<s>": CONTROL, "</s>": CONTROL, "<pad>": CONTROL}


def _t5_model(vocab_size: int) -> dict[str, bytes]:
    """The vocabulary of ``tokenizer.json`` once more, as ``spiece.model``, which PaddleNLP reads."""
    return {"spiece.model": _model(_unigram(vocab_size))}


def _chatglm_model(vocab_size: int) -> dict[str, bytes]:
    """ChatGLM's ``ice_text.model``: lines, tabs and runs of blanks are pieces, and its marks are the ids of the demo's
    config.
    """
    pieces = [(piece, 0.0) for piece in ("<unk>", "<s>", "</s>", "<pad>")]
    blanks = ["<n>", "<|tab|>", *(f"<|blank_{length}|>" for length in range(2, 81))]
    pieces += [(piece, 0.0) for piece in blanks] + [piece for piece in _unigram(0)[3:] if piece[0] not in blanks]
    pieces += [(f"<unused{number}>", -99.0) for number in range(len(pieces), 256)]
    pieces += [(mark, 0.0) for mark in ("[MASK]", "[gMASK]", "<sop>", "<eop>")]
    pieces += [(f"<unused{number}>", -99.0) for number in range(len(pieces), vocab_size)]
    return {"ice_text.model": _model(pieces, {"[MASK]", "[gMASK]", "<sop>", "<eop>", *blanks})}


def _model(pieces: Sequence[tuple[str, float]], ours: Collection[str] = ()) -> bytes:
    """A Unigram model that leaves letters as they are (``sentencepiece_model.proto``)."""
    names = [piece for piece, _ in pieces]
    content = b"".join(_field(1, _field(1, piece.encode()) + _field(2, score) + _field(
        3, OURS if piece in ours else SPECIAL_PIECES.get(piece, NORMAL))) for piece, score in pieces)
    trainer = b"".join(_field(number, names.index(piece) if piece in names else -1) for number, piece in (
        (40, "<unk>"), (41, "<s>"), (42, "</s>"), (43, "<pad>")))
    return content + _field(2, _field(3, 1) + trainer) + _field(3, _field(1, b"identity"))


def _field(number: int, value: bytes | float | int) -> bytes:
    """One field of a protocol buffer: bytes, a float32, or a whole number."""
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    return _varint(number << 3) + _varint(value & (1 << 64) - 1)


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


MODELS = {"sentencepiece": _t5_model, "prompts": _chatglm_model}
"""Files of a demo's tokenizer that are no text."""
