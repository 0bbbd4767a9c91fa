"""``python -m benchmarks.false_alarms``: how close random clean models come to the limits of the noise floor.

Each configuration is a random GPT-J or BERT made by transformers, with weights that have the spread and the
outlier channels of trained ones, converted and run through the real ``align.forward``. No failure is right here.
The limits in ``align/tolerance.py`` and the tests were chosen with seeds 0 to 4 in sight and are proved on others.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

ACTIVATIONS = ("gelu", "gelu_new", "relu", "silu", "gelu_pytorch_tanh", "quick_gelu")
HEADS = {
    "gptj": ("GPTJForCausalLM", "GPTJForSequenceClassification", "GPTJForQuestionAnswering", "GPTJModel"),
    "bert": ("BertForPreTraining", "BertForMaskedLM", "BertForSequenceClassification", "BertForTokenClassification",
             "BertForQuestionAnswering", "BertModel"),
}


def draw(generator: np.random.Generator) -> tuple[str, dict[str, Any]]:
    """(architecture, config): sizes, heads, rotary dimension, activation, positions."""
    family = str(generator.choice(list(HEADS)))
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
    return architecture, shared | {
        "hidden_size": hidden, "num_attention_heads": heads, "num_hidden_layers": layers, "hidden_act": activation,
        "intermediate_size": hidden * int(generator.choice([2, 4])), "max_position_embeddings": positions,
        "layer_norm_eps": float(generator.choice([1e-12, 1e-5]))}


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


def measure(architecture: str, config: dict[str, Any], seed: int, target: str) -> dict[str, Any]:
    """The verdict of ``align.forward`` and, for each test, the largest share of its limit that was used up."""
    from align.forward import STAGE
    from align.stage import main as align
    from convert.__main__ import main as convert
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        build(architecture, config, Path("source"), seed)
        dtype = ("keep", "keep", "float16", "bfloat16")[seed % 4]
        quiet = io.StringIO()
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            converted = convert(["--source", "source", "--output", "out/clean", "--dtype", dtype])
            code = align(STAGE, ["--run", "clean", "--target", target])
        if converted or code not in (0, 1):
            return {"verdict": "broken", "failures": [quiet.getvalue()[-2000:]], "used": {}}
        report = Path("reports/clean") / ("" if target == "models" else target) / "forward.json"
        result = json.loads(report.read_text())
    used: dict[str, float] = defaultdict(float)
    for tensor in result["tensors"] + result["sublayers"]:
        for judged in tensor["judgements"]:
            key = f"{judged['kind']} {judged['test']}"
            used[key] = max(used[key], judged["ratio"] / judged["limit"])
    return {"verdict": result["verdict"], "failures": result["failures"], "used": dict(used)}


def main() -> int:
    """Exit code 0 when no clean configuration failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.false_alarms", description=__doc__.split("\n")[0])
    parser.add_argument("--configs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=7, help="default 7; limits were chosen with 0 to 4 in sight")
    parser.add_argument("--target", choices=("models", "paddlenlp"), default="models")
    options = parser.parse_args()
    os.environ.setdefault("GLOG_minloglevel", "3")
    shares: dict[str, list[float]] = defaultdict(list)
    failed = []
    for number in range(options.configs):
        generator = np.random.default_rng([options.seed, number])
        architecture, config = draw(generator)
        found = measure(architecture, config, 1000 * options.seed + number, options.target)
        for key, share in found["used"].items():
            shares[key].append(share)
        if found["verdict"] != "aligned":
            failed.append(number)
            print(f"{number} {architecture} {config}: {found['failures'][:3]}", flush=True)
        elif sys.stderr.isatty():
            print(f"\r{number + 1}/{options.configs}", end="", file=sys.stderr)
    print(f"seed {options.seed}, {options.target}: {len(failed)} of {options.configs} clean configurations failed")
    print("| test | median | 99 % | worst | (share of its limit) |\n| --- | --- | --- | --- | --- |")
    for key in sorted(shares):
        values = np.array(shares[key])
        print(f"| {key} | {np.median(values):.2f} | {np.quantile(values, 0.99):.2f} | {values.max():.2f} | |")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
