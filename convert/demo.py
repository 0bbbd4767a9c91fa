"""The built-in demo checkpoint: a small random torch-side model of a family, with a tokenizer, made from its rules.

Weights are seeded and have the spread of trained ones (biases and layer norms away from 0 and 1), so that a
missed transpose, a lost bias or a swapped name shows in every output.
"""

from __future__ import annotations

import json
import string
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path

import numpy as np

from .dtypes import BY_NAME
from .plan import Move, expand
from .rules import Family, Rule
from .writer import MARKER, Staging, make_layout, refuse_existing

SEED = 20260601


def build_demo(family: Family, directory: Path) -> Path:
    """Write the demo checkpoint of ``family`` into ``directory``, in the place of an earlier one."""
    marker = directory / MARKER
    ours = marker.is_file() and json.loads(marker.read_text("utf-8")).get("demo") == family.name
    refuse_existing(directory, overwrite=ours)
    head = family.head(family.demo["architectures"][0])
    rules = [rule for rule in family.rules_of(head) if rule.when(family.demo) and rule.moves]
    sizes, layers = family.sizes(family.demo), family.layers(family.demo)
    moves = [move for rule in expand(rules, layers) for move in _stored(rule, sizes)]
    layout = make_layout(moves, "safetensors", shard_size=1 << 40, framework="pt")
    generator = np.random.default_rng(SEED)
    with Staging(directory) as staging:
        staging.allocate(layout)
        for move in moves:
            values = _trained_like(move, generator)
            staging.write(layout.places[move.target][0], memoryview(values.reshape(-1).view(np.uint8)),
                          layout.places[move.target][1])
        for name, text in _companions(family).items():
            (staging.path / name).write_text(text, "utf-8")
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


def _companions(family: Family) -> dict[str, str]:
    files = {"config.json": json.dumps(family.demo, indent=2), MARKER: json.dumps({"demo": family.name})}
    return files | TOKENIZERS[family.tokenizer](family.demo.get("vocab_size", 0))


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


TOKENIZERS = {"wordpiece": _wordpiece, "byte-level": _byte_level, "pictures": _pictures,
              "none": lambda vocab_size: {}}
