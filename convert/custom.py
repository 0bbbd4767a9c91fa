"""Home-made GPTs: a net of somebody's own that has GPT-2's architecture, and names, layout and heads of its own.

The Paddle side of all of them is GPT-2's (``models/gpt2.py``, PaddleNLP's GPT). So a family file need only say what the
net calls its parts, and what no header can tell, the number of heads above all; see ``examples/my_gpt.py``.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mode
from types import ModuleType
from typing import Any

from . import gpt2
from .errors import BadInput
from .rules import (
    Config,
    Family,
    Head,
    Rule,
    buffer,
    constant,
    conv1d,
    counted,
    drop,
    keep,
    linear,
    rules,
    split,
    tied,
)
from .traits import Traits

PADDLE = gpt2.TO
FUSED = 3


def home_made_gpt2(
    name: str, *, n_head: int, words: str, positions: str, block: str, norms: tuple[str, str], qkv: Sequence[str],
    out: str, up: str, down: str, last_norm: str, head: str | None = None, embedded: str | None = None,
    conv1d_weights: bool = False, biases: bool = True, dropped: Mapping[str, str] | None = None,
    knows_masks: bool = False, config: Config | None = None, reference: Callable[[Config, Any], Any],
) -> Family:
    """The family of a home-made GPT-2.

    ``words`` and ``positions`` are the embeddings and ``last_norm`` the norm before the head, by their module paths.
    ``block`` is that of a block, as ``blocks.{i}``; below it lie ``norms``, ``qkv`` (three linears, or one that is
    fused), ``out``, ``up`` and ``down``. ``head`` is a head that shares the embedding's weight, ``embedded`` a module
    that gives the sum of the embeddings. ``conv1d_weights`` where the linears keep [in, out] as OpenAI's; ``biases``
    False where neither linears nor norms have any, and Paddle's are zeros. ``dropped`` says of buffers why they go.

    ``n_head`` and ``config`` (keys of GPT-2's config.json) say what the tensors do not show; a config.json beside the
    checkpoint that says otherwise is refused. ``reference`` builds the net with its weights: a ``torch.nn.Module`` that
    takes ``input_ids`` and ``attention_mask``, which it may ignore unless ``knows_masks``, and ``labels``; it returns
    {"logits": …, "loss": …}.
    """
    inside = _inside(norms, qkv, out, up, down)
    return Family(
        name=name, model_type="gpt2", paddlenlp="gpt", prefix="", sizes=gpt2.sizes, layers=counted("n_layer"),
        paddlenlp_tokenizer=gpt2.FAMILY.paddlenlp_tokenizer,
        unsupported=gpt2.unsupported, additions=gpt2.additions, paddle_keys=gpt2.FAMILY.paddle_keys,
        settings=gpt2.FAMILY.settings, traits=Traits(mask_value=gpt2.FAMILY.traits.mask_value),
        states={"n_head": n_head, **(config or {})},
        config_of=lambda header: {
            **_config(header, n_head, words, positions, block, up, down, conv1d_weights), **(config or {})},
        rules=rules(
            keep(f"{words}.weight", "vocab", "hidden", to="gpt.embeddings.word_embeddings.weight"),
            keep(f"{positions}.weight", "positions", "hidden", to="gpt.embeddings.position_embeddings.weight"),
            _norm(f"{block}.{norms[0]}", f"{PADDLE}.norm1", biases),
            _projections([f"{block}.{one}" for one in qkv], conv1d_weights, biases),
            _linear(f"{block}.{out}", "hidden", "hidden", f"{PADDLE}.self_attn.out_proj", conv1d_weights, biases),
            _norm(f"{block}.{norms[1]}", f"{PADDLE}.norm2", biases),
            _linear(f"{block}.{up}", "inner", "hidden", f"{PADDLE}.linear1", conv1d_weights, biases),
            _linear(f"{block}.{down}", "hidden", "inner", f"{PADDLE}.linear2", conv1d_weights, biases),
            *(drop(buffer, why=why) for buffer, why in (dropped or {}).items()),
            _norm(last_norm, "gpt.decoder.norm", biases),
        ),
        heads=(Head("GPT2LMHeadModel", "GPTLMHeadModel", "causal-lm", rules(
            tied(f"{head or 'lm_head'}.weight", "vocab", "hidden", of=f"{words}.weight", again="lm_head.weight")),
            inputs="tokens" if knows_masks else "whole rows", reference=reference),),
        modules=(*(((embedded, "gpt.embeddings.dropout"),) if embedded else ()), (block, PADDLE),
                 (last_norm, "gpt.decoder.norm")),
        inside={PADDLE: inside},
    )


def module_beside(file: str, name: str) -> ModuleType:
    """The Python file ``name`` in the directory of a family ``file``: the net that the family is of."""
    path = Path(file).with_name(f"{name}.py")
    if not path.is_file():
        raise BadInput(f"{path} is not there; {Path(file).name} builds its net from it.")
    specification = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def fill(net: Any, source: Path | str) -> Any:
    """``net`` with the tensors of a checkpoint of any kind. Of a shared parameter one name is enough, buffers may be
    absent.

    A :class:`BadInput` names the parameters that would stay random, and the tensors that the net has no place for.
    """
    import torch

    from .checkpoint import opened
    from .dtypes import to_float32
    with opened(Path(source)) as checkpoint:
        held = {name: torch.from_numpy(to_float32(checkpoint.read(name), info.dtype.name).copy())
                for name, info in checkpoint.tensors.items()}
    try:
        absent, extra = net.load_state_dict(held, strict=False)
    except RuntimeError as error:
        raise BadInput(f"{source} does not fit {type(net).__name__}: {str(error).splitlines()[-1].strip()}") from error
    shared: dict[int, list[str]] = {}
    for name, parameter in net.named_parameters(remove_duplicate=False):
        shared.setdefault(id(parameter), []).append(name)
    random = [names[0] for names in shared.values() if set(names) <= set(absent)]
    if random or extra:
        told = f"lacks {', '.join(random[:3])}" if random else f"has {', '.join(extra[:3])} in vain"
        raise BadInput(f"{source} does not fit {type(net).__name__}: it {told}.")
    return net


def _projections(names: Sequence[str], conv1d_weights: bool, biases: bool) -> list[Rule]:
    to = f"{PADDLE}.self_attn.{{q,k,v}}_proj"
    if len(names) == FUSED:
        letters = zip(names, "qkv", strict=True)
        return [rule for name, letter in letters for rule in _linear(
            name, "hidden", "hidden", f"{PADDLE}.self_attn.{letter}_proj", conv1d_weights, biases)]
    parts = FUSED * ("hidden",)
    shape = ("hidden", parts) if conv1d_weights else (parts, "hidden")
    weight = split(f"{names[0]}.weight", shape, to=f"{to}.weight", transposed=not conv1d_weights)
    if not biases:
        return [*weight, *(rule for letter in "qkv" for rule in _zeros(f"{PADDLE}.self_attn.{letter}_proj", "hidden"))]
    return [*weight, *split(f"{names[0]}.bias", (parts,), to=f"{to}.bias")]


def _linear(name: str, rows: str, columns: str, to: str, conv1d_weights: bool, biases: bool) -> list[Rule]:
    """``rows`` are what it gives, ``columns`` what it takes."""
    weight = (conv1d(name, columns, rows, to=to, bias=biases) if conv1d_weights else
              linear(name, rows, columns, to=to, bias=biases))
    return weight if biases else [*weight, *_zeros(to, rows)]


def _norm(name: str, to: str, biases: bool) -> list[Rule]:
    weight = keep(f"{name}.weight", "hidden", to=f"{to}.weight")
    return [*weight, *(keep(f"{name}.bias", "hidden", to=f"{to}.bias") if biases else _zeros(to, "hidden"))]


def _zeros(to: str, size: str) -> list[Rule]:
    return buffer(f"{to}.bias", size, filling=constant(0.0, checked=True))


def _inside(norms: tuple[str, str], qkv: Sequence[str], out: str, up: str, down: str,
            ) -> tuple[tuple[str, str, str], ...]:
    normed = "wiring of the norm"
    projections = qkv if len(qkv) == FUSED else FUSED * tuple(qkv)
    return (
        (norms[0], "norm1", "input"),
        *((name, f"self_attn.{letter}_proj", normed) for name, letter in zip(projections, "qkv", strict=True)),
        (out, "self_attn.out_proj", "attention: scale, mask, softmax"),
        (norms[1], "norm2", "residual"),
        (up, "linear1", normed),
        (down, "linear2", "mlp activation"),
    )


def _config(header: Mapping[str, Any], n_head: int, words: str, positions: str, block: str, up: str,
            down: str, conv1d_weights: bool) -> Config:
    """GPT-2's config.json as far as shapes show it, of the blocks as most of them have it; ``n_head`` is taken at its
    word.
    """
    shapes = {}
    for name in (f"{words}.weight", f"{positions}.weight", f"{block.format(i=0)}.{up}.weight"):
        if name not in header or len(header[name].shape) != 2:
            raise BadInput(f"there is no matrix {name} in the checkpoint, whose tensors are named as in "
                           f"{', '.join(list(header)[:3])}. Correct the names in the family file.")
        shapes[name] = header[name].shape
    (vocabulary, hidden), (length, _), _ = shapes.values()
    layer = re.compile(re.escape(block).replace(r"\{i\}", r"(\d+)") + r"\.(.+)")
    found = [match for match in map(layer.fullmatch, header) if match]
    numbers = [int(match.group(1)) for match in found]
    gives, takes = (-1, 0) if conv1d_weights else (0, -1)
    axes = {f"{up}.weight": gives, f"{down}.weight": takes, f"{up}.bias": 0}
    inner = mode(header[match.group()].shape[axes[match.group(2)]] for match in found
                 if match.group(2) in axes and header[match.group()].shape)
    return {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": vocabulary, "n_positions": length,
        "n_embd": hidden, "n_layer": 1 + max(numbers), "n_head": n_head, "n_inner": inner,
        "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
        "attn_pdrop": 0.0, "tie_word_embeddings": True, "bos_token_id": vocabulary - 1, "eos_token_id": vocabulary - 1,
    }
