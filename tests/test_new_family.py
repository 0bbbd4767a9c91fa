"""A new family is two files: the first GPT (Radford et al. 2018), which nothing here knows, through every stage.

A copy of the three packages with ``convert/openai_gpt.py`` and ``models/openai_gpt.py`` beside the others is all there
is; every command is a process of its own.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import convert

ROOT = Path(convert.__file__).parents[1]
FAMILY = '''
"""OpenAI GPT: fused q, k, v stay fused; what torch keeps in Conv1D is [in, out] already, as in Paddle."""

import sys

from convert.rules import Family, Head, conv1d, counted, keep, norm, rules, size_of, tied
from convert.traits import Traits, Wiring


def sizes(config):
    hidden = size_of(config, "n_embd")
    return {"hidden": hidden, "fused": 3 * hidden, "inner": 4 * hidden, "vocab": size_of(config, "vocab_size"),
            "positions": size_of(config, "n_positions")}


BLOCK, WORDS = "transformer.h.{i}", "transformer.tokens_embed.weight"
FAMILY = Family(
    name="openai_gpt", model_type="openai-gpt", prefix="transformer.", layers=counted("n_layer"), sizes=sizes,
    rules=rules(
        keep(WORDS, "vocab", "hidden"),
        keep("transformer.positions_embed.weight", "positions", "hidden"),
        conv1d(f"{BLOCK}.attn.c_attn", "hidden", "fused"),
        conv1d(f"{BLOCK}.attn.c_proj", "hidden", "hidden"),
        norm(f"{BLOCK}.ln_1", "hidden"),
        conv1d(f"{BLOCK}.mlp.c_fc", "hidden", "inner"),
        conv1d(f"{BLOCK}.mlp.c_proj", "inner", "hidden"),
        norm(f"{BLOCK}.ln_2", "hidden"),
    ),
    heads=(
        Head("OpenAIGPTLMHeadModel", None, "causal-lm", rules(
            tied("lm_head.weight", "vocab", "hidden", of=WORDS, again="lm_head.weight"))),
        Head("OpenAIGPTModel", None, "encoder", base=True),
    ),
    modules=(("transformer.drop", "transformer.drop"), (BLOCK, BLOCK)),
    inside={BLOCK: (
        ("attn.c_attn", "attn.c_attn", "input"), ("attn.c_proj", "attn.c_proj", "attention: scale, mask, softmax"),
        ("ln_1", "ln_1", "residual"), ("mlp.c_fc", "mlp.c_fc", "wiring of the norm"),
        ("mlp.c_proj", "mlp.c_proj", "activation"), ("ln_2", "ln_2", "residual"),
    )},
    tokenizer="byte-level",
    demo={
        "model_type": "openai-gpt", "architectures": ["OpenAIGPTLMHeadModel"], "vocab_size": 272, "n_positions": 128,
        "n_embd": 64, "n_layer": 3, "n_head": 4, "afn": "gelu", "layer_norm_epsilon": 1e-05, "resid_pdrop": 0.1,
        "embd_pdrop": 0.1, "attn_pdrop": 0.1, "initializer_range": 0.02, "pad_token_id": 256, "eos_token_id": 256,
    },
    settings={"dropout": ("resid_pdrop", "embd_pdrop", "attn_pdrop")},
    traits=Traits(wiring={BLOCK: Wiring("norms behind", norms=("ln_1", "ln_2"), attention=("attn",), feed=("mlp",))}),
)

if __name__ == "__main__":
    from convert.cli import main
    sys.exit(main(FAMILY))
'''
NET = '''
"""OpenAI GPT, as transformers computes it."""

from dataclasses import dataclass

import paddle
from paddle import nn

from .activation import activation
from .attention import attend, heads_first, padding_mask, split_heads
from .config import Config
from .layer import Embedding, LayerNorm, VocabularyLinear, linear
from .loss import causal_lm_loss
from .pretrained import Pretrained


@dataclass(frozen=True, kw_only=True)
class OpenAIGPTConfig(Config):
    vocab_size: int = 40478
    n_positions: int = 512
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    layer_norm_epsilon: float = 1e-5
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    initializer_range: float = 0.02


class Attention(nn.Layer):
    def __init__(self, config):
        super().__init__()
        width, self.heads = config.n_embd, config.n_head
        self.c_attn = linear(width, 3 * width, config.initializer_range)
        self.c_proj = linear(width, width, config.initializer_range)
        self.attn_dropout, self.resid_dropout = nn.Dropout(config.attn_pdrop), nn.Dropout(config.resid_pdrop)

    def forward(self, x, mask):
        query, key, value = (heads_first(split_heads(part, self.heads)) for part in self.c_attn(x).chunk(3, -1))
        return self.resid_dropout(self.c_proj(attend(query, key, value, mask, self.attn_dropout)))


class MLP(nn.Layer):
    def __init__(self, config):
        super().__init__()
        self.c_fc = linear(config.n_embd, 4 * config.n_embd, config.initializer_range)
        self.act = activation("gelu_new")
        self.c_proj = linear(4 * config.n_embd, config.n_embd, config.initializer_range)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x):
        return self.dropout(self.c_proj(self.act(self.c_fc(x))))


class Block(nn.Layer):
    def __init__(self, config):
        super().__init__()
        self.attn, self.mlp = Attention(config), MLP(config)
        self.ln_1, self.ln_2 = (LayerNorm(config.n_embd, config.layer_norm_epsilon) for _ in range(2))

    def forward(self, x, mask):
        y = self.ln_1(x + self.attn(x, mask))
        return self.ln_2(y + self.mlp(y))


class OpenAIGPTModel(Pretrained):
    config_class = OpenAIGPTConfig

    def __init__(self, config):
        super().__init__(config)
        self.tokens_embed = Embedding(config.vocab_size, config.n_embd, config.initializer_range)
        self.positions_embed = Embedding(config.n_positions, config.n_embd, config.initializer_range)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.LayerList([Block(config) for _ in range(config.n_layer)])

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        length = input_ids.shape[1]
        places = paddle.arange(length) if position_ids is None else position_ids
        hidden = self.drop(self.tokens_embed(input_ids) + self.positions_embed(places))
        mask = -1e4 * (1 - paddle.ones([1, 1, length, length]).tril())
        if attention_mask is not None:
            mask = mask + padding_mask(attention_mask, hidden.dtype)
        for block in self.h:
            hidden = block(hidden, mask)
        return {"last_hidden_state": hidden}


class OpenAIGPTLMHeadModel(Pretrained):
    config_class = OpenAIGPTConfig

    def __init__(self, config):
        super().__init__(config)
        self.transformer = OpenAIGPTModel(config)
        self.lm_head = VocabularyLinear(self.transformer.tokens_embed.weight, bias=False)

    def forward(self, input_ids, attention_mask=None, position_ids=None, labels=None):
        logits = self.lm_head(self.transformer(input_ids, attention_mask, position_ids)["last_hidden_state"])
        return {"logits": logits, **({} if labels is None else {"loss": causal_lm_loss(logits, labels)})}
'''
RIGHT = "y = self.ln_1(x + self.attn(x, mask))\n        return self.ln_2(y + self.mlp(y))"
WRONG = "y = x + self.ln_1(self.attn(x, mask))\n        return y + self.ln_2(self.mlp(y))"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkout")
    for package in ("convert", "align", "models"):
        shutil.copytree(ROOT / package, directory / package, ignore=shutil.ignore_patterns("__pycache__"))
    for package, text in (("convert", FAMILY), ("models", NET)):
        (directory / package / "openai_gpt.py").write_text(text)
    return directory


ALL_STAGES = """
import sys
from importlib import import_module
from types import SimpleNamespace
from align import __main__ as program
def run(command):
    module = import_module(command[2])
    return SimpleNamespace(returncode=module.main(module.STAGE, command[3:]))
program.subprocess.run = run
sys.exit(program.run_all([]))
"""
"""``python -m align``, its stages in one process: the frameworks are imported once."""


@pytest.fixture(scope="module")
def python(checkout):
    def run(*arguments, code=0):
        done = subprocess.run([sys.executable, *arguments], cwd=checkout, capture_output=True, text=True,
                              env={**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"})
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout
    return run


def report(checkout, run, stage):
    return json.loads((checkout / "reports" / run / f"{stage}.json").read_text("utf-8"))


def test_it_is_converted_and_aligned_from_end_to_end(checkout, python):
    python("-m", "convert.openai_gpt")
    python("-c", ALL_STAGES)
    for stage in ("weights", "forward", "metric", "loss"):
        found = report(checkout, "demo-openai_gpt", stage)
        assert (found["family"], found["verdict"]) == ("openai_gpt", "aligned") and found["tensors"]
    assert len(report(checkout, "demo-openai_gpt", "forward")["sublayers"]) == 3 * (2 * 6 + 1)


def test_its_config_names_it_and_it_goes_back_to_torch(checkout, python):
    assert json.loads((checkout / "out/demo-openai_gpt/config.json").read_text())["model_type"] == "openai-gpt"
    python("-m", "convert.back", "--source", "out/demo-openai_gpt", "--output", "back")
    python("-m", "convert", "--source", "back", "--output", "out/again")
    assert (checkout / "out/again/model.safetensors").read_bytes() == (
        checkout / "out/demo-openai_gpt/model.safetensors").read_bytes()


def test_what_is_wrong_with_its_net_is_explained_by_what_it_says_of_its_blocks(checkout, python):
    net = checkout / "models" / "openai_gpt.py"
    assert RIGHT in NET
    net.write_text(NET.replace(RIGHT, WRONG))
    try:
        python("-m", "align.forward", "--run", "demo-openai_gpt", code=1)
    finally:
        net.write_text(NET)
    found = report(checkout, "demo-openai_gpt", "forward")
    assert found["first_divergence"] == "transformer.h.0"
    assert found["diagnosis"]["kind"] == "layer-norm-placement", found["diagnosis"]
    assert "norms before it adds the residual" in found["diagnosis"]["sentence"]
