"""What align has to know of a family besides its weights, as data: how its blocks are wired, what its parts are called.

Without a trait its explanations have one idea less; everything else goes by what torch's modules are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Wiring:
    """How a block of torch's joins its parts, each named by its path below the block.

    ``side by side`` is x + attention(norm x) + feed(norm x); ``norms before`` is y = x + attention(first x),
    y + feed(second y); ``norms behind`` is y = first(x + attention x), second(y + feed y). Attention and feed, without
    norm and residual, may be several modules one after the other.
    """

    kind: Literal["side by side", "norms before", "norms behind"]
    norms: tuple[str, ...]
    attention: tuple[str, ...]
    feed: tuple[str, ...]


@dataclass(frozen=True)
class Shortcut:
    """A block is activation(branch x + shortcut x): the names of these three in torch."""

    branch: str
    shortcut: str
    activation: str


@dataclass(frozen=True)
class Rotary:
    """The function ``turn(x, sin, cos)`` beside torch's attention class that turns neighbouring channels, keys before
    queries; and the attention's attributes for how many channels turn, and for the table of sines and cosines.
    """

    turn: str
    width: str
    table: str


@dataclass(frozen=True)
class RelativePositions:
    """Attributes of torch's attention that has a learned number for each head and range of distances.

    ``held`` says whether this one has the ``table``, an embedding; ``one_way`` whether keys behind the query are alike.
    """

    held: str
    table: str
    buckets: str
    farthest: str
    one_way: str


@dataclass(frozen=True)
class Traits:
    """``attn`` and ``mlp`` stand for whatever ends in a module of such a name."""

    wiring: Mapping[str, Wiring] = field(default_factory=dict)
    """By Paddle's path of a module, as ``Family.modules`` has it."""
    switches: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Attributes of torch's blocks that are true or false, and what a net does for which they are not False, not True.
    """
    shortcut: Shortcut | None = None
    branches: tuple[str, ...] = ("attn", "mlp")
    """Names of the modules that are what a block adds to its residual."""
    fused: str = ""
    """The name of one linear whose rows hold query, key and value by turns, head by head, in Paddle too."""
    scaled: bool = True
    """Whether the scores are divided by the root of the head width."""
    activations: Mapping[str, str] = field(default_factory=dict)
    """Classes of its own in torch for activations, and what transformers calls what they compute."""
    rotary: Rotary | None = None
    relative: RelativePositions | None = None
    alibi: str = ""
    """The function ``build(mask, heads, dtype)`` beside torch's block class whose result the block is given as alibi.
    """
    residual_scale: str = ""
    """A block's attribute that its residuals are multiplied by."""
    residual_depth: str = ""
    """A block's attribute the root of whose double its residuals are multiplied by: DeepNorm's number of layers."""
    mask_value: str = ""
    """How buffers end that hold the number which a mask adds to the scores."""


@dataclass(frozen=True)
class Prompts:
    """GLM's prompts as the kind of a head's inputs: what their marks are, and how texts are spelled in words.

    ``marks`` are the ids that a config may leave out, by its keys; ``two_dimensions`` says of a config whether the
    answer is counted apart from the context. ``words`` is the file of a SentencePiece model, in which ``spelled`` stand
    for characters and ``blanks`` (a template with a length, the longest) for runs of blanks; ``images`` is the key of
    tokenizer_config.json, with its default, for how many ids come before its first.
    """

    marks: Mapping[str, int]
    two_dimensions: Callable[[Mapping[str, Any]], bool]
    words: str
    spelled: Mapping[str, str]
    blanks: tuple[str, int]
    images: tuple[str, int]

    def __str__(self) -> str:
        return "prompts"
