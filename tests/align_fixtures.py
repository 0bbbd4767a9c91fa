"""Tiny torch checkpoints with trained-like weights, and a workshop that converts and aligns them in this process."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers.modeling_utils import no_init_weights
from transformers.models.gpt2.tokenization_gpt2 import bytes_to_unicode

from convert import demo
from convert.cli import main as convert_main

torch.set_num_threads(1)  # models this small lose more than they gain by a second one
STAGES = ("weights", "forward", "metric", "loss")
TINY = {
    "bloom": dict(vocab_size=257, hidden_size=32, n_layer=2, n_head=4, seq_length=96, pad_token_id=256),
    "opt": dict(vocab_size=257, hidden_size=32, num_hidden_layers=2, ffn_dim=48, num_attention_heads=4,
                max_position_embeddings=96, bos_token_id=256, eos_token_id=256, pad_token_id=256),
    "bert": dict(vocab_size=160, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
                 max_position_embeddings=96),
    "gpt2": dict(vocab_size=257, n_embd=32, n_layer=3, n_head=4, n_positions=96, bos_token_id=256, eos_token_id=256),
    "gptj": dict(vocab_size=257, n_embd=32, n_layer=3, n_head=4, rotary_dim=4, n_positions=96, n_inner=48,
                 bos_token_id=256, eos_token_id=256),
    "t5": dict(vocab_size=190, d_model=32, d_kv=4, d_ff=48, num_layers=2, num_decoder_layers=3, num_heads=4,
               feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0),
}
GPTJ_HEADS = ("GPTJForCausalLM", "GPTJForSequenceClassification", "GPTJForQuestionAnswering", "GPTJModel")
BERT_HEADS = ("BertForPreTraining", "BertForMaskedLM", "BertForSequenceClassification", "BertForTokenClassification",
              "BertForQuestionAnswering", "BertModel")


def family_of(head: str) -> str:
    return getattr(transformers, head).config_class.model_type


def torch_model(head: str, seed: int = 0, **overrides: Any) -> Any:
    """A tiny ``head`` with the spread of trained weights: nothing is 0, nothing is 1, norms and biases differ."""
    cls = getattr(transformers, head)
    config = cls.config_class(**{**TINY[family_of(head)], **overrides})
    with no_init_weights():  # OPT's fails on layer norms without weights
        model, generator = cls(config).eval(), torch.Generator().manual_seed(seed)
    model.tie_weights()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 2:
                spread = 0.5 if "embed" in name or "wte" in name else 1.4 / parameter.shape[1] ** 0.5
                if name.endswith("Attention.q.weight"):
                    spread /= config.d_kv ** 0.5  # T5 divides its queries, not its scores
                parameter.copy_(spread * noise)
            else:
                parameter.copy_(1 + 0.2 * noise if name.endswith("weight") else 0.1 * noise)
    return model


def save_checkpoint(directory: Path, head: str, *, dtype: str = "float32", tokenizer: bool = False,
                    binary: bool = False, shard: str = "5GB", **overrides: Any) -> Path:
    """``torch_model`` on disk as transformers saves it."""
    model = torch_model(head, **overrides).to(getattr(torch, dtype))
    model.save_pretrained(directory, safe_serialization=not binary, max_shard_size=shard)
    if tokenizer:
        for name, text in TOKENIZERS[family_of(head)].items():
            (directory / name).write_text(text, "utf-8")
    return directory


def _single_letters() -> dict[str, str]:
    letters = string.ascii_lowercase + string.digits
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters),
              *string.punctuation]
    return {"vocab.txt": "\n".join(tokens), "tokenizer_config.json": '{"tokenizer_class": "BertTokenizer"}'}


def _single_bytes() -> dict[str, str]:
    letters = [*bytes_to_unicode().values(), "<|endoftext|>"]
    return {"vocab.json": json.dumps({letter: number for number, letter in enumerate(letters)}),
            "merges.txt": "#version: 0.2\n", "tokenizer_config.json": '{"tokenizer_class": "GPT2Tokenizer"}'}


TOKENIZERS = {
    "bert": _single_letters(),
    "bloom": _single_bytes(),
    "gpt2": _single_bytes(),
    "gptj": _single_bytes(),
    "opt": _single_bytes(),
    "t5": demo.TOKENIZERS["sentencepiece"](190),
}


@dataclass(frozen=True)
class Outcome:
    """What a stage said: exit code, its JSON, and what went to the terminal."""

    code: int
    report: dict[str, Any]
    stdout: str
    stderr: str

    def tensor(self, name: str) -> dict[str, Any]:
        return next(tensor for tensor in self.report["tensors"] if tensor["name"] == name)

    @property
    def modules(self) -> list[dict[str, Any]]:
        """The tensors that forward recorded on its ordinary input, without probes such as ``norm (small input)``."""
        return [tensor for tensor in self.report["tensors"] if " " not in tensor["name"]]

    @property
    def failing(self) -> list[str]:
        return [tensor["name"] for tensor in self.report["tensors"] if not tensor["passed"]]


@dataclass(frozen=True)
class Workshop:
    """A directory with sources, outputs and reports of its own."""

    root: Path

    @property
    def reports(self) -> Path:
        return self.root / "reports"

    def output(self, run: str) -> Path:
        return self.root / "out" / run

    def source(self, head: str, name: str | None = None, **options: Any) -> Path:
        return save_checkpoint(self.root / f"source-{name or head}", head, **options)

    def convert(self, family: str, source: Path, run: str, *flags: str) -> str:
        """Convert ``source``; returns the run's name."""
        program = importlib.import_module(f"convert.{family}")
        arguments = ["--source", str(source), "--output", str(self.output(run)), "--reports", str(self.reports), *flags]
        with contextlib.redirect_stdout(io.StringIO()):
            code = convert_main(program.FAMILY, arguments)
        assert code == 0
        return run

    def make(self, head: str, run: str | None = None, flags: tuple[str, ...] = (), **options: Any) -> str:
        """A tiny ``head``, saved and converted; returns the run's name."""
        run = run or head
        return self.convert(family_of(head), self.source(head, run, **options), run, *flags)

    def align(self, stage: str, run: str | None, *flags: str) -> Outcome:
        """Carry out ``stage``, as ``python -m align.<stage>`` does."""
        program = importlib.import_module(f"align.{stage}")
        directory = self.reports / (run or "") / ("paddlenlp" if "paddlenlp" in flags else "")
        file = directory / f"{stage}.json"
        file.unlink(missing_ok=True)
        named = ["--run", run] if run else []
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = program.main(program.STAGE, [*named, "--reports", str(self.reports), *flags])
            except SystemExit as stopped:
                code = stopped.code
        report = strict_json(file) if file.is_file() else {}
        return Outcome(code, report, out.getvalue(), err.getvalue())

    def align_all(self, run: str, *flags: str) -> dict[str, Outcome]:
        return {stage: self.align(stage, run, *flags) for stage in STAGES}


def strict_json(file: Path) -> Any:
    """JSON without the NaN and Infinity that Python's parser lets through."""
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in {file}")
    return json.loads(file.read_text("utf-8"), parse_constant=refuse)


def all_aligned(outcomes: dict[str, Outcome]) -> bool:
    """Every stage ended in 0, said aligned, and compared something; the failing sentence otherwise."""
    for stage, outcome in outcomes.items():
        assert (outcome.code, outcome.report.get("verdict")) == (0, "aligned"), (stage, outcome.report.get("failures"),
                                                                               outcome.stderr)
        assert outcome.report["tensors"], stage
    return True


def rel_l2(reference: np.ndarray, candidate: np.ndarray) -> float:
    """|candidate - reference| / |reference|, written once more."""
    reference, candidate = reference.astype(np.float64), candidate.astype(np.float64)
    return float(np.linalg.norm(candidate - reference) / np.linalg.norm(reference))
