"""``--target package.module:build``: a net of the user's own against the reference."""

import json

import pytest
from align_fixtures import save_checkpoint

from align.forward import STAGE as FORWARD
from align.stage import main as align
from convert.bert import FAMILY as BERT
from convert.cli import main as convert
from convert.gptj import FAMILY

NET = """
import paddle
from paddle.nn import functional as F

from models.gptj import GPTJBlock, GPTJForCausalLM, causal_mask

def build(config, directory):
    return GPTJForCausalLM.from_pretrained(directory)

def wrong(config, directory):
    net = build(config, directory)
    net.transformer.h[1].mlp.act.name = "relu"
    return net

def nothing(config, directory):
    return None

def short(config):
    return None

class Tuple(GPTJForCausalLM):
    def forward(self, **inputs):
        return super().forward(**inputs)["logits"],

def tuples(config, directory):
    return Tuple.from_pretrained(directory)

class Block(GPTJBlock):
    epsilon = 1e-5

    def forward(self, *, hidden_states, mask, sin, cos):
        normed = F.layer_norm(hidden_states, hidden_states.shape[-1:], self.ln_1.weight, self.ln_1.bias, self.epsilon)
        return self.attn(normed, mask, sin, cos, None)[0] + self.mlp(normed) + hidden_states

class ByKeyword(GPTJForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.transformer.h = paddle.nn.LayerList([Block(config) for _ in range(config.n_layer)])

    def forward(self, input_ids, attention_mask):
        net, length = self.transformer, input_ids.shape[1]
        hidden = net.drop(net.wte(input_ids))
        mask = causal_mask(attention_mask, length, length, hidden.dtype)
        sin, cos = net.rotary(paddle.arange(length).unsqueeze(0))
        for block in net.h:
            hidden = block(hidden_states=hidden, mask=mask, sin=sin, cos=cos)
        return {"logits": self.lm_head(net.ln_f(hidden))}

def by_keyword(config, directory):
    return ByKeyword.from_pretrained(directory)

def other_settings(config, directory):
    net = build(config, directory)
    net.transformer.h[1].mlp.dropout.p = 0.25
    net.transformer.h[2].ln_1._epsilon = 1.0001e-5
    net.config = {"n_head": 8, "activation_function": "gelu_new", "rotary_dim": None, "unknown": object()}
    return net

def late_epsilon(config, directory):
    net = by_keyword(config, directory)
    net.transformer.h[2].epsilon = 1.02e-5
    return net
"""

TORCH_NET = """
import torch
import transformers

def build(config, directory):
    return transformers.GPTJForCausalLM.from_pretrained("source").eval()

def wrong(config, directory):
    net = build(config, directory)
    with torch.no_grad():
        weight = net.transformer.h[1].attn.q_proj.weight
        weight.copy_(weight.T.clone())
    return net

def relu(config, directory):
    net = build(config, directory)
    net.transformer.h[1].mlp.act = torch.nn.ReLU()
    return net
"""


class Forward:
    """``align.forward`` on the demo in the current directory, or on what :meth:`make` made last."""

    def __init__(self, capsys):
        self.capsys = capsys

    def make(self, directory):
        save_checkpoint(directory, "GPTJForCausalLM")
        assert convert(FAMILY, ["--source", str(directory), "--output", "out/own"]) == 0

    def __call__(self, target, *flags):
        self.capsys.readouterr()
        return align(FORWARD, ["--target", target, *flags]), self.capsys.readouterr()


@pytest.fixture
def forward(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "paper_net.py").write_text(NET)
    assert convert(FAMILY, []) == 0
    return Forward(capsys)


def test_a_net_of_the_users_own_is_aligned_and_reported_in_its_own_place(forward, tmp_path):
    assert forward("paper_net:build")[0] == 0
    assert (tmp_path / "reports/demo-gptj/paper_net.build/forward.json").is_file()


def test_its_wrong_activation_is_named_and_explained(forward):
    code, said = forward("paper_net:wrong")
    assert code == 1
    assert "transformer.h.1: mlp activation, before mlp.fc_out" in said.out.replace("\n", " ")
    assert "why:" in said.out and "relu" in said.out


def test_blocks_called_by_keyword_are_fed_too(forward):
    assert forward("paper_net:by_keyword")[0] == 0


def test_an_epsilon_of_a_norm_without_a_module_shows_at_its_block_on_a_small_input(forward, tmp_path):
    """2 % of an epsilon of 1e-5 in the last block: nothing on ordinary inputs, where variances are 1 and more."""
    forward.make(directory=tmp_path / "source")
    code, _ = forward("paper_net:late_epsilon")
    report = json.loads((tmp_path / "reports/own/paper_net.late_epsilon/forward.json").read_text())
    assert code == 1
    assert [tensor["name"] for tensor in report["tensors"] if not tensor["passed"]] == [
        "transformer.h.2 (small input)"]
    assert report["named"] == "transformer.h.2: on a small input"
    assert "epsilon" in report["diagnosis"]["sentence"] and "transformer.h.2.ln_1" in report["diagnosis"]["sentence"]


def test_lint_tells_what_outputs_do_not_show(forward, tmp_path):
    forward("paper_net:other_settings")
    notes = json.loads((tmp_path / "reports/demo-gptj/paper_net.other_settings/forward.json").read_text())["notes"]
    assert [note for note in notes if note.startswith("Lint")] == [
        "Lint: heads (n_head) is 4 in torch's config and 8 in the candidate's.",
        "Lint: rotary dimension (rotary_dim) is 8 in torch's config and None in the candidate's.",
        "Lint: the epsilon of transformer.h.2.ln_1 is 1e-05 in torch and 1.0001e-05 in the candidate. An ordinary "
        "input may not show it.",
        "Lint: dropout in transformer.h.1 is none in torch and 0.25 in the candidate. Outputs do not show it, training "
        "does.",
        "Lint of both nets as built: 4 differences in activation, heads, rotary dimension, each norm's epsilon, each "
        "module's dropout."]


def test_lint_finds_no_difference_in_the_familys_own_net(forward, tmp_path):
    forward("models")
    notes = json.loads((tmp_path / "reports/demo-gptj/forward.json").read_text())["notes"]
    assert [note for note in notes if note.startswith("Lint")] == [
        "Lint of both nets as built: no differences in activation, dropout, epsilon, heads, rotary dimension, tied "
        "weights, each norm's epsilon, each module's dropout."]


def test_lint_tells_a_weight_that_is_no_longer_tied(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "untied_net.py").write_text("""
import paddle
from models.bert import BertForMaskedLM

class Untied(BertForMaskedLM):
    pass

def build(config, directory):
    net = Untied.from_pretrained(directory)
    head = net.cls.predictions
    weight = net.bert.embeddings.word_embeddings.weight.clone()
    head.decoder.weight = paddle.create_parameter(weight.shape, "float32")
    head.decoder.weight.set_value(weight)
    return net
""")
    save_checkpoint(tmp_path / "source", "BertForMaskedLM")
    assert convert(BERT, ["--source", "source", "--output", "out/bert"]) == 0
    assert align(FORWARD, ["--target", "untied_net:build"]) == 0
    notes = json.loads((tmp_path / "reports/bert/untied_net.build/forward.json").read_text())["notes"]
    assert any("word_embeddings.weight and cls.predictions.decoder.weight are one weight in torch and several"
               in note for note in notes)


class TestTorchNet:
    """Two torch models: the reference, and one of the user's own under torch's names."""

    @pytest.fixture
    def against(self, forward, tmp_path):
        (tmp_path / "torch_net.py").write_text(TORCH_NET)
        forward.make(directory=tmp_path / "source")

        def run(function, *flags):
            code, said = forward(f"torch_net:{function}", *flags)
            file = tmp_path / f"reports/own/torch_net.{function}/forward.json"
            return code, said, json.loads(file.read_text()) if file.is_file() else None

        return run

    def test_it_is_refused_unless_allowed(self, against):
        code, said, report = against("build")
        assert code == 2 and report is None
        assert "proves nothing about Paddle" in said.err and "--allow-same-framework" in said.err

    def test_the_same_model_is_aligned_and_the_report_says_what_that_is_worth(self, against):
        code, _, report = against("build", "--allow-same-framework")
        assert code == 0
        assert len(report["sublayers"]) == 3 * 15
        assert any("says nothing about another" in note for note in report["notes"])

    def test_a_transposed_weight_is_named_and_explained(self, against):
        code, _, report = against("wrong", "--allow-same-framework")
        assert (code, report["first_divergence"]) == (1, "transformer.h.1.attn.q_proj.weight")
        assert "transpose" in report["diagnosis"]["sentence"]

    def test_a_wrong_activation_is_named_and_explained(self, against):
        code, _, report = against("relu", "--allow-same-framework")
        assert (code, report["named"]) == (1, "transformer.h.1: mlp activation, before mlp.fc_out")
        assert "relu" in report["diagnosis"]["sentence"]


@pytest.mark.parametrize("target,says", [
    ("paper_net:nothing", "NoneType"), ("paper_net:short", "is called with the config"),
    ("paper_net:tuples", "a mapping"), ("paper_net:absent", "cannot be imported"),
    ("no_such_module:build", "cannot be imported"), ("other", "is not one of")])
def test_what_cannot_be_used_is_told_in_a_sentence(forward, target, says):
    code, said = forward(target)
    assert code == 2
    assert says in said.err
