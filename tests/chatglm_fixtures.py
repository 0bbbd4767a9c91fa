"""Tiny ChatGLM checkpoints that bring code along, as the real one does: that of ``convert/remote/chatglm``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

import convert.demo

REMOTE = Path(convert.demo.__file__).with_name("remote") / "chatglm"
CODE = ("configuration_chatglm.py", "modeling_chatglm.py")
SPECIAL = {"pad_token_id": 3, "unk": 0, "mask_token_id": 150, "gmask_token_id": 151, "bos_token_id": 154,
           "eos_token_id": 155}
WORDS = range(4, 150)
TINY: dict[str, Any] = {
    "architectures": ["ChatGLMModel"], "model_type": "chatglm",
    "auto_map": {"AutoConfig": "configuration_chatglm.ChatGLMConfig",
                 "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
                 "AutoModelForSeq2SeqLM": "modeling_chatglm.ChatGLMForConditionalGeneration"},
    "vocab_size": 160, "hidden_size": 32, "num_layers": 3, "num_attention_heads": 4, "inner_hidden_size": 48,
    "layernorm_epsilon": 1e-5, "max_sequence_length": 96, "position_encoding_2d": True, "use_cache": True,
    "torch_dtype": "float16", "transformers_version": "4.23.1",
    **{name: SPECIAL[name] for name in SPECIAL if name.endswith("_id")},
}


def config_of(**overrides: Any) -> dict[str, Any]:
    return {**TINY, **overrides}


def state_of(config: dict[str, Any], seed: int = 0, *, bare: bool = False) -> dict[str, torch.Tensor]:
    """Torch's names and layout, float32, with the spread of trained weights: nothing is 0, nothing is 1."""
    hidden, inner, vocabulary = config["hidden_size"], config["inner_hidden_size"], config["vocab_size"]
    generator = torch.Generator().manual_seed(seed)
    width = hidden // config["num_attention_heads"] // (2 if config["position_encoding_2d"] else 1)

    def matrix(rows: int, columns: int, spread: float | None = None) -> torch.Tensor:
        return (spread or 1.4 / columns**0.5) * torch.randn(rows, columns, generator=generator)

    def linear(name: str, outputs: int, inputs: int) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": matrix(outputs, inputs),
                f"{name}.bias": 0.1 * torch.randn(outputs, generator=generator)}

    def norm(name: str) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": 1 + 0.2 * torch.randn(hidden, generator=generator),
                f"{name}.bias": 0.1 * torch.randn(hidden, generator=generator)}

    state = {"word_embeddings.weight": matrix(vocabulary, hidden, 0.5)}
    for layer in (f"layers.{number}" for number in range(config["num_layers"])):
        frequencies = 1 / 10000 ** (torch.arange(0, width, 2).float() / width)
        state |= {**norm(f"{layer}.input_layernorm"), f"{layer}.attention.rotary_emb.inv_freq": frequencies.half(),
                  **linear(f"{layer}.attention.query_key_value", 3 * hidden, hidden),
                  **linear(f"{layer}.attention.dense", hidden, hidden),
                  **norm(f"{layer}.post_attention_layernorm"),
                  **linear(f"{layer}.mlp.dense_h_to_4h", inner, hidden),
                  **linear(f"{layer}.mlp.dense_4h_to_h", hidden, inner)}
    state |= norm("final_layernorm")
    if bare:
        return state
    tied = config.get("tie_word_embeddings", True)
    head = state["word_embeddings.weight"].clone() if tied else matrix(vocabulary, hidden)
    return {**{f"transformer.{name}": tensor for name, tensor in state.items()}, "lm_head.weight": head}


def as_published(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The dtypes of the real checkpoint: norms float32, all else float16."""
    return {name: tensor if "layernorm" in name else tensor.half() for name, tensor in state.items()}


def save_checkpoint(directory: Path, *, dtype: str = "published", binary: bool = False, code: bool = True,
                    bare: bool = False, seed: int = 0, without: str = "(nothing)", **overrides: Any) -> Path:
    """``dtype`` is that of the real checkpoint (``published``), or one for all tensors but the frequencies."""
    directory.mkdir(parents=True, exist_ok=True)
    config = config_of(**overrides)
    state = state_of(config, seed, bare=bare)
    state = as_published(state) if dtype == "published" else {
        name: tensor if name.endswith("inv_freq") else tensor.to(getattr(torch, dtype))
        for name, tensor in state.items()}
    state = {name: tensor for name, tensor in state.items() if without not in name}
    if binary:
        torch.save(state, directory / "pytorch_model.bin")
    else:
        save_file(state, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config, indent=1), "utf-8")
    for name in CODE if code else ():
        shutil.copy(REMOTE / name, directory / name)
    return directory


def prompts(lengths: list[tuple[int, int]], seed: int = 0, mask: str = "gmask_token_id") -> np.ndarray:
    """Rows of (context, answer) tokens, padded on the left: words, the mask | bos, words. Lengths count the marks."""
    generator = np.random.default_rng(seed)
    width = max(map(sum, lengths))
    rows = []
    for context, answer in lengths:
        words = generator.integers(WORDS.start, WORDS.stop, context + answer)
        words[context - 1], words[context] = SPECIAL[mask], SPECIAL["bos_token_id"]
        rows.append([SPECIAL["pad_token_id"]] * (width - context - answer) + words.tolist())
    return np.array(rows)


def as_the_tokenizer_pads(ids: np.ndarray) -> dict[str, np.ndarray]:
    """What the checkpoint's tokenizer gives for rows padded on the left: nobody looks at a pad, and pads stand at 0.

    ``attention_mask`` bool [batch, 1, time, time], True where a query may not look; ``position_ids`` [batch, 2, time].
    """
    batch, time = ids.shape
    masked = np.ones((batch, 1, time, time), bool)
    places = np.zeros((batch, 2, time), np.int64)
    for row, words in enumerate(ids.tolist()):
        start = next(at for at, word in enumerate(words) if word != SPECIAL["pad_token_id"])
        context = words.index(SPECIAL["bos_token_id"])
        mask = min(words.index(SPECIAL[name]) for name in ("mask_token_id", "gmask_token_id") if SPECIAL[name] in words)
        for query in range(start, time):
            masked[row, 0, query, start: max(context, query + 1)] = False
            places[row, :, query] = (query - start, 0) if query < context else (mask - start, query - context + 1)
    return {"input_ids": ids, "attention_mask": masked, "position_ids": places}
