"""Wrong ChatGLMs through the real pipeline: each is caught, and named at the block and the operation at fault."""

import numpy as np
import paddle
import pytest
from align_fixtures import Workshop
from chatglm_fixtures import save_checkpoint
from safetensors.numpy import load_file, save_file

from models import chatglm

TRUST = "--trust-remote-code"
BLOCK, ATTENTION = "chatglm.transformer.layers.0", "attention: heads, rotary, scale, mask, softmax"


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def run(workshop):
    """Sound: whatever is found below, the fault made."""
    source = save_checkpoint(workshop.root / "source", hidden_size=64, num_attention_heads=2)
    run = workshop.convert("chatglm", source, "sound")
    assert workshop.align("forward", run, TRUST).code == 0
    return run


def unrounded(places, width):
    frequencies = 1.0 / 10000 ** (paddle.arange(0, width, 2, dtype="float32") / width)
    angles = places.astype("float32").unsqueeze([-1, -1]) * frequencies
    return paddle.tile(paddle.cos(angles), [1, 1, 1, 2]), paddle.tile(paddle.sin(angles), [1, 1, 1, 2])


def first_dimension_only(old):
    return lambda self, position_ids: [old(self, position_ids)[0]] * 2


def in_neighbours(x, rotary):
    turned = []
    for part, (cos, sin) in zip(paddle.split(x, 2, axis=-1), rotary, strict=True):
        half = cos.shape[-1] // 2
        cos, sin = (paddle.repeat_interleave(table[..., :half], 2, axis=-1) for table in (cos, sin))
        pairs = part.reshape([*part.shape[:-1], half, 2])
        turned.append(part * cos + paddle.stack([-pairs[..., 1], pairs[..., 0]], -1).reshape(part.shape) * sin)
    return paddle.concat(turned, axis=-1)


def masked_by(change):
    def make(old):
        return lambda query, key, value, masked, depth: old(query, key, value, change(masked), depth)
    return make


def scaled_by(factor):
    def make(old):
        return lambda query, key, value, masked, depth: old(query * factor, key, value, masked, depth)
    return make


def causal(masked):
    length = masked.shape[-1]
    return masked | paddle.triu(paddle.ones([length, length], dtype="bool"), 1)


def split_whole(old):
    """All queries, then all keys, then all values."""
    def forward(self, hidden, masked, rotary, past):
        time, batch, width = hidden.shape
        fused = self.query_key_value(hidden).reshape([time, batch, 3, self.heads, width // self.heads])
        query, key, value = (chatglm.rotate(part, rotary) if number < 2 else part
                             for number, part in enumerate(paddle.unbind(fused, 2)))
        return self.dense(chatglm.attend(query, key, value, masked, float(self.depth))), (key, value)
    return forward


def around_the_norm(old):
    """Residuals of what enters a norm, as GPT-2 has them, not of what leaves it."""
    def forward(self, hidden, masked, rotary, past=None):
        attended, present = self.attention(self.input_layernorm(hidden), masked, rotary, past)
        middle = hidden * self.alpha + attended
        return middle * self.alpha + self.mlp(self.post_attention_layernorm(middle)), present
    return forward


def with_alpha(value):
    def make(old):
        def init(self, config, depth):
            old(self, config, depth)
            self.alpha = value
        return init
    return make


OPERATIONS = {
    "frequencies unrounded": ("rotary_of", lambda old: unrounded, ATTENTION),
    "second position ignored": ("ChatGLMModel.rotary", first_dimension_only, ATTENTION),
    "neighbours turned": ("rotate", lambda old: in_neighbours, ATTENTION),
    "mask upside down": ("attend", masked_by(lambda masked: ~masked), ATTENTION),
    "mask missing": ("attend", masked_by(lambda masked: None), ATTENTION),
    "context causal": ("attend", masked_by(causal), ATTENTION),
    "scores off by 1e-4": ("attend", scaled_by(1.0001), ATTENTION),
    "q, k, v not per head": ("ChatGLMAttention.forward", split_whole, ATTENTION),
    "mask of -5": ("HIDDEN_SCORE", lambda old: -5.0, ATTENTION),
    "alpha of one layer": ("ChatGLMBlock.__init__", with_alpha(2**0.5), "residual"),
    "alpha of 28 layers": ("ChatGLMBlock.__init__", with_alpha(56**0.5), "residual"),
    "residual of the input": ("ChatGLMBlock.forward", around_the_norm, "residual"),
    "gelu of erf": ("gelu_tanh", lambda old: lambda x: paddle.nn.functional.gelu(x), "activation"),
}


@pytest.fixture
def broken(monkeypatch):
    """``broken(name, make)``: ``make(old)`` in the place of this part of ``models.chatglm``."""
    def put(name, make):
        *owners, attribute = name.split(".")
        owner = chatglm
        for part in owners:
            owner = getattr(owner, part)
        monkeypatch.setattr(owner, attribute, make(getattr(owner, attribute)))
    return put


@pytest.mark.parametrize("fault", OPERATIONS)
def test_a_wrong_operation_is_named(workshop, run, broken, fault):
    name, make, operation = OPERATIONS[fault]
    broken(name, make)
    outcome = workshop.align("forward", run, TRUST)
    assert outcome.code == 1 and outcome.report["first_divergence"] == BLOCK
    assert outcome.report["named"].startswith(f"{BLOCK}: {operation}"), outcome.report["named"]


def test_unrounded_frequencies_are_explained(workshop, run, broken):
    broken("rotary_of", lambda old: unrounded)
    told = workshop.align("forward", run, TRUST).report["diagnosis"]
    assert told["kind"] == "rotary-frequencies"
    assert "unrounded; in the reference they are rounded to float16" in told["sentence"]


@pytest.mark.parametrize("layers", [1, 28])
def test_another_residual_scale_is_explained(workshop, run, broken, layers):
    broken("ChatGLMBlock.__init__", with_alpha((2 * layers) ** 0.5))
    told = workshop.align("forward", run, TRUST).report["diagnosis"]
    assert told["kind"] == "residual-scale"
    assert f"as with {layers} layers instead of 3" in told["sentence"]


def test_a_wrong_epsilon_shows_on_a_small_input(workshop, run, broken):
    broken("LayerNorm", lambda old: lambda width, epsilon: old(width, 1e-6))
    outcome = workshop.align("forward", run, TRUST)
    assert outcome.code == 1
    assert f"{BLOCK}.input_layernorm (small input)" in outcome.failing
    assert any("epsilon" in note and "1e-05 in torch and 1e-06" in note for note in outcome.report["notes"])


@pytest.mark.parametrize("stage", ["loss", "metric"])
def test_a_loss_that_is_not_shifted_is_diverged_at_the_loss_alone(workshop, run, broken, stage):
    broken("causal_lm_loss", lambda old: lambda logits, labels: chatglm_unshifted(logits, labels))
    assert workshop.align("forward", run, TRUST).code == 0
    assert workshop.align(stage, run, TRUST).code == (1 if stage == "loss" else 0)


def chatglm_unshifted(logits, labels):
    from models.loss import cross_entropy
    return cross_entropy(logits, labels)


@pytest.mark.parametrize("name,change", [
    ("attention.dense.weight", lambda array: array.T), ("mlp.dense_4h_to_h.bias", lambda array: array * 0),
    ("attention.query_key_value.weight", lambda array: np.roll(array, 1, axis=1)),
    ("post_attention_layernorm.weight", lambda array: array * np.float32(1.0001))])
def test_a_wrong_weight_is_named_exactly(workshop, name, change):
    full = f"chatglm.transformer.layers.1.{name}"
    run = workshop.convert("chatglm", save_checkpoint(workshop.root / f"source-{name}", dtype="float32"), name)
    file = workshop.output(run) / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {full: np.ascontiguousarray(change(tensors[full]))}, file, {"format": "np"})
    for stage in ("weights", "forward"):
        outcome = workshop.align(stage, run, TRUST)
        assert (outcome.code, outcome.report["first_divergence"]) == (1, full)
