"""``python -m benchmarks.false_alarms``: how close random clean models come to the limits of the noise floor.

Each configuration is a random model made by transformers, with weights that have the spread and the outlier channels
of trained ones, converted and run through the real ``align.forward``, or with ``--stage`` through ``align.metric``,
``align.loss``, ``align.backward`` or ``align.quick``. No failure is right here. ``align.forward`` is given GPT-J and
BERT; its limits in ``align/tolerance.py`` and its tests were chosen with seeds 0 to 4 in sight and are proved on
others. The others are given GPT-2, OPT and BLOOM, too; how the floor of a single number is pooled was chosen with seed
11 in sight, what is asked of gradients at kinks and of such as cancel with seeds 51 to 53. ``align.quick`` has no
floor: how much of its one tolerance is used is told as ``fixed``; so is what ``align.metric`` need not ask torch for.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from align import environment

ACTIVATIONS = ("gelu", "gelu_new", "relu", "silu", "gelu_pytorch_tanh", "quick_gelu")
HEADS = {
    "gptj": ("GPTJForCausalLM", "GPTJForSequenceClassification", "GPTJForQuestionAnswering", "GPTJModel"),
    "bert": ("BertForPreTraining", "BertForMaskedLM", "BertForSequenceClassification", "BertForTokenClassification",
             "BertForQuestionAnswering", "BertModel"),
    "gpt2": ("GPT2LMHeadModel", "GPT2ForSequenceClassification", "GPT2ForTokenClassification",
             "GPT2ForQuestionAnswering", "GPT2Model"),
    "opt": ("OPTForCausalLM", "OPTForSequenceClassification", "OPTForQuestionAnswering", "OPTModel"),
    "bloom": ("BloomForCausalLM", "BloomForSequenceClassification", "BloomForTokenClassification",
              "BloomForQuestionAnswering", "BloomModel"),
}
FAMILIES = {"forward": ("gptj", "bert"), **{stage: tuple(HEADS) for stage in ("metric", "loss", "backward", "quick")}}


def draw(generator: np.random.Generator, families: Sequence[str] = FAMILIES["forward"]) -> tuple[str, dict[str, Any]]:
    """(architecture, config): sizes, heads, rotary dimension, activation, positions."""
    family = str(generator.choice(list(families)))
    heads = int(generator.choice([1, 2, 4, 8]))
    width = int(generator.choice([8, 16, 32, 64]))
    hidden, layers = heads * width, int(generator.integers(1, 7))
    activation = str(generator.choice(ACTIVATIONS))
    shared = {"vocab_size": int(generator.integers(60, 2000)), "num_labels": int(generator.integers(2, 5))}
    positions = int(generator.choice([64, 96, 200]))
    architecture = str(generator.choice(HEADS[family]))
    if architecture.endswith("QuestionAnswering"):
        shared["num_labels"] = 2
    if family == "gptj":
        rotary = int(generator.choice([size for size in (4, 8, 16, 32, 64) if size <= width]))
        return architecture, shared | {
            "n_embd": hidden, "n_head": heads, "n_layer": layers, "rotary_dim": rotary, "n_positions": positions,
            "activation_function": activation, "layer_norm_epsilon": float(generator.choice([1e-5, 1e-6])),
            "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1}
    if family != "bert":
        return architecture, shared | _decoder(generator, family, hidden, heads, layers, positions, activation)
    return architecture, shared | {
        "hidden_size": hidden, "num_attention_heads": heads, "num_hidden_layers": layers, "hidden_act": activation,
        "intermediate_size": hidden * int(generator.choice([2, 4])), "max_position_embeddings": positions,
        "layer_norm_eps": float(generator.choice([1e-12, 1e-5]))}


def _decoder(generator: np.random.Generator, family: str, hidden: int, heads: int, layers: int, positions: int,
             activation: str) -> dict[str, Any]:
    """The rest of a GPT-2's, OPT's or BLOOM's config."""
    marks = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1}
    if family == "opt":
        return marks | {
            "hidden_size": hidden, "word_embed_proj_dim": hidden, "num_attention_heads": heads,
            "num_hidden_layers": layers, "ffn_dim": hidden * int(generator.choice([2, 4])),
            "max_position_embeddings": positions, "activation_function": activation,
            "do_layer_norm_before": bool(generator.random() < 0.7)}
    epsilon = {"layer_norm_epsilon": float(generator.choice([1e-5, 1e-6]))}
    if family == "bloom":
        return marks | epsilon | {"hidden_size": hidden, "n_head": heads, "n_layer": layers, "seq_length": positions}
    return marks | epsilon | {"n_embd": hidden, "n_head": heads, "n_layer": layers, "n_positions": positions,
                              "activation_function": activation}


def build(architecture: str, config: dict[str, Any], directory: Path, seed: int) -> None:
    """A torch model with trained-like weights: wide spread, biases, a few channels 10 to 30 times as large."""
    import torch
    import transformers
    cls = getattr(transformers, architecture)
    torch.manual_seed(seed)
    model = cls(cls.config_class(**config, architectures=[architecture]))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 2 and "embeddings" not in name and "wte" not in name:
                parameter.copy_(noise * float(1.0 + seed % 3) / parameter.shape[1] ** 0.5)
            elif parameter.dim() == 2:
                parameter.copy_(noise * 0.3)
            elif name.endswith("weight"):
                parameter.copy_(1 + 0.3 * noise)
                outliers = torch.randint(0, parameter.shape[0], (1 + parameter.shape[0] // 64,), generator=generator)
                parameter[outliers] *= 10.0 + 10.0 * (seed % 3)
            else:
                parameter.copy_(0.2 * noise)
    model.save_pretrained(directory)


def measure(architecture: str, config: dict[str, Any], seed: int, target: str, stage: str = "forward",
            ) -> dict[str, Any]:
    """The verdict of a stage and, for each test, the largest share of its limit that was used up."""
    from importlib import import_module

    from align.stage import main as align
    from convert.__main__ import main as convert
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        build(architecture, config, Path("source"), seed)
        dtype = ("keep", "keep", "float16", "bfloat16")[seed % 4]
        told = io.StringIO()
        with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
            converted = convert(["--source", "source", "--output", "out/clean", "--dtype", dtype])
            code = align(import_module(f"align.{stage}").STAGE, ["--run", "clean", "--target", target])
        if converted or code not in (0, 1):
            return {"verdict": "broken", "failures": [told.getvalue()[-2000:]], "used": {}}
        report = Path("reports/clean") / ("" if target == "models" else target) / f"{stage}.json"
        result = json.loads(report.read_text())
    used: dict[str, float] = defaultdict(float)
    for tensor in result["tensors"] + result["sublayers"]:
        if not tensor["judgements"] and tensor["rel_l2"] is not None and tensor["allowed"]:
            used["fixed"] = max(used["fixed"], tensor["rel_l2"] / tensor["allowed"])
        for judged in tensor["judgements"]:
            key = f"{judged['kind']} {judged['test']}" + (" of a mean" if not tensor["shape"] else "")
            used[key] = max(used[key], judged["ratio"] / judged["limit"])
    again = any("just beyond" in note or "beyond the fixed bounds" in note for note in result["notes"])
    return {"verdict": result["verdict"], "failures": result["failures"], "used": dict(used), "again": again}


def main() -> int:
    """Exit code 0 when no clean configuration failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.false_alarms", description=__doc__.split("\n")[0])
    parser.add_argument("--configs", type=int, default=200)
    parser.add_argument("--stage", choices=FAMILIES, default="forward")
    parser.add_argument("--seed", type=int, default=7, help="default 7; limits were chosen with 0 to 4 and 11 in sight")
    parser.add_argument("--target", choices=("models", "paddlenlp"), default="models")
    options = parser.parse_args()
    environment.prepare()
    shares: dict[str, list[float]] = defaultdict(list)
    failed, again = [], 0
    for number in range(options.configs):
        generator = np.random.default_rng([options.seed, number])
        architecture, config = draw(generator, FAMILIES[options.stage])
        found = measure(architecture, config, 1000 * options.seed + number, options.target, options.stage)
        again += found.get("again", False)
        for key, share in found["used"].items():
            shares[key].append(share)
        if found["verdict"] != "aligned":
            failed.append(number)
            print(f"{number} {architecture} {config}: {found['failures'][:3]}", flush=True)
        elif sys.stderr.isatty():
            print(f"\r{number + 1}/{options.configs}", end="", file=sys.stderr)
    print(f"{options.stage}, seed {options.seed}, {options.target}: {len(failed)} of {options.configs} clean "
          f"configurations failed; {again} were looked at twice")
    print("| test | median | 99 % | worst | (share of its limit) |\n| --- | --- | --- | --- | --- |")
    for key in sorted(shares):
        values = np.array(shares[key])
        print(f"| {key} | {np.median(values):.2f} | {np.quantile(values, 0.99):.2f} | {values.max():.2f} | |")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
