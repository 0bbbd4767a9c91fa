"""``--target package.module:build``: a net of the user's own against the reference."""

import importlib
import json
import re
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
import torch
import transformers
from align_fixtures import save_checkpoint

from align import lint
from align.forward import STAGE as FORWARD
from align.stage import main as align
from align.unmodified import Unmodified
from align.weights import STAGE as WEIGHTS
from convert.bert import FAMILY as BERT
from convert.cli import main as convert
from convert.errors import BadInput
from convert.gpt2 import FAMILY as GPT2
from convert.gptj import FAMILY
from convert.t5 import FAMILY as T5

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

def extra(config, directory):
    net = build(config, directory)
    net.transformer.h[1].register_parameter("gate", torch.nn.Parameter(torch.ones(3)))
    return net

def absent(config, directory):
    net = build(config, directory)
    del net.transformer.h[1].mlp.fc_in.bias
    net.transformer.h[1].mlp.fc_in.bias = None
    return net

def double(config, directory):
    return build(config, directory).double()

def half(config, directory):
    return build(config, directory).bfloat16()

def masks(config, directory):
    net = build(config, directory)
    positions = config["n_positions"]
    for block in net.transformer.h:
        block.attn.register_buffer("bias", torch.ones(1, 1, positions, positions, dtype=torch.bool).tril())
        block.attn.register_buffer("masked_bias", torch.tensor(-1e9))
    return net

class InPlace(torch.nn.Module):
    def __init__(self, block):
        super().__init__()
        self.ln_1, self.attn, self.mlp = block.ln_1, block.attn, block.mlp

    def forward(self, hidden_states, **named):
        named = {key: named[key] for key in ("attention_mask", "position_ids")}
        normed = self.ln_1(hidden_states)
        hidden_states += self.attn(hidden_states=normed, **named)[0] + self.mlp(normed)
        return hidden_states, None

def in_place(config, directory):
    net = build(config, directory)
    for number, block in enumerate(net.transformer.h):
        net.transformer.h[number] = InPlace(block)
    return net

def patched(config, directory):
    from transformers.models.gptj import modeling_gptj
    def forward(self, hidden_states):
        return self.dropout(self.fc_out(torch.relu(self.fc_in(hidden_states))))
    modeling_gptj.GPTJMLP.forward = forward
    return build(config, directory)
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


def test_parts_of_a_fused_linear_that_are_not_judged_are_told(tmp_path, monkeypatch, capsys):
    """GPT-2's q, k and v are one module in torch; this net computes them without a module of their own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "functional_net.py").write_text("""
import paddle
from paddle.nn import functional as F
from models.gpt2 import GPT2LMHeadModel

class Held(paddle.nn.Linear):
    def __call__(self, hidden):
        return F.linear(hidden, self.weight, self.bias)

def build(config, directory):
    net = GPT2LMHeadModel.from_pretrained(directory)
    for layer in net.gpt.decoder.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            projection.__class__ = Held
    return net
""")
    assert convert(GPT2, []) == 0
    assert align(FORWARD, ["--target", "functional_net:build"]) == 0
    notes = json.loads((tmp_path / "reports/demo-gpt2/functional_net.build/forward.json").read_text())["notes"]
    told = next(note for note in notes if note.startswith("Not judged on their own"))
    assert all(f"gpt.decoder.layers.0.self_attn.{letter}_proj" in told for letter in "qkv")


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
        "Lint: 4 differences among what was compared, of the configs: activation, heads, rotary dimension; of the nets "
        "as built: each norm's epsilon, each module's dropout."]


def test_lint_finds_no_difference_in_the_familys_own_net(forward, tmp_path):
    forward("models")
    notes = json.loads((tmp_path / "reports/demo-gptj/forward.json").read_text())["notes"]
    assert [note for note in notes if note.startswith("Lint")] == [
        "Lint: no differences among what was compared, of the configs: activation, dropout, epsilon, heads, rotary "
        "dimension, tied weights; of the nets as built: each norm's epsilon, each module's dropout."]


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


    @pytest.mark.parametrize("function,named", [
        ("extra", "transformer.h.1.gate"), ("absent", "transformer.h.1.mlp.fc_in.bias"),
        ("double", "transformer.wte.weight")])
    def test_weights_that_the_source_does_not_have_diverge(self, against, function, named):
        code, said, report = against(function, "--allow-same-framework")
        assert (code, report["first_divergence"]) == (1, named), said

    def test_old_masks_of_bools_are_the_masks_that_are_made(self, against):
        assert against("masks", "--allow-same-framework")[0] == 0

    def test_a_block_that_adds_in_place_does_not_change_what_the_next_pass_is_fed(self, against):
        code, _, report = against("in_place", "--allow-same-framework")
        assert (code, report["failures"]) == (0, [])

    def test_a_dtype_that_cannot_be_compared_is_told(self, against):
        code, said, _ = against("half", "--allow-same-framework")
        assert code == 2 and "torch.bfloat16, which cannot be compared" in said.err

    def test_a_target_that_changes_the_reference_is_refused(self, against):
        from transformers.models.gptj import modeling_gptj
        forward = modeling_gptj.GPTJMLP.forward
        try:
            code, said, report = against("patched", "--allow-same-framework")
        finally:
            modeling_gptj.GPTJMLP.forward = forward
        assert code == 2 and report is None
        assert "replaces transformers.models.gptj.modeling_gptj.GPTJMLP.forward" in said.err


@pytest.mark.parametrize("family,patch,named", [
    ("resnet", "functools.partialmethod(torch.nn.BatchNorm2d.__init__, eps=1e-3)",
     "torch.nn.modules.batchnorm.BatchNorm2d.__init__"),
    ("resnet", "lambda self, x: x", "torch.nn.modules.batchnorm.BatchNorm2d.forward"),
    ("gpt2", "lambda self, x: x @ self.weight", "transformers.pytorch_utils.Conv1D.forward"),
    ("gpt2", "lambda self, *sizes: self", "torch.Tensor.permute")])
def test_a_target_that_changes_a_class_the_reference_is_made_of_is_refused(tmp_path, monkeypatch, capsys, family, patch,
                                                                           named):
    """Also by a method that the class inherits; recorded apart from the reference it may."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    module, cls, method = named.rsplit(".", 2)
    name = f"patching_{family}_{method.strip('_')}"
    (tmp_path / f"{name}.py").write_text(f"""
import functools, importlib, torch, models
def build(config, directory):
    importlib.import_module("{module}").{cls}.{method} = {patch}
    return models.from_pretrained(directory)
""")
    assert convert(importlib.import_module(f"convert.{family}").FAMILY, []) == 0
    held = getattr(importlib.import_module(module), cls)
    whole = dict(vars(held))
    assert align(FORWARD, ["--only", "reference"]) == 0
    try:
        assert align(FORWARD, ["--target", f"{name}:build"]) == 2
        assert f"replaces {named}" in capsys.readouterr().err
        assert align(FORWARD, ["--target", f"{name}:build", "--only", "candidate"]) == 0
    finally:
        if method in whole:
            setattr(held, method, whole[method])
        else:
            delattr(held, method)


@pytest.mark.parametrize("patch,undo,named", [
    ("torch.nn.modules.module.register_module_forward_hook(lambda module, given, found: None)",
     "torch.nn.modules.module._global_forward_hooks.clear()", "torch.nn.modules.module._global_forward_hooks"),
    ("transformers.loss.loss_utils.LOSS_MAPPING.update(ForCausalLM=lambda *given, **named: None)",
     "transformers.loss.loss_utils.LOSS_MAPPING.update(ForCausalLM=transformers.loss.loss_utils.ForCausalLMLoss)",
     "LOSS_MAPPING['ForCausalLM']"),
    ("held['loss'] = torch.nn.CrossEntropyLoss.forward; torch.nn.CrossEntropyLoss.forward = lambda *given: None",
     "torch.nn.CrossEntropyLoss.forward = held['loss']", "torch.nn.modules.loss.CrossEntropyLoss.forward"),
    ("held['update'] = transformers.DynamicCache.update; transformers.DynamicCache.update = lambda *given: None",
     "transformers.DynamicCache.update = held['update']", "transformers.cache_utils.DynamicCache.update"),
])
def test_so_is_one_that_changes_what_the_class_only_calls(patch, undo, named):
    """Hooks on every module there is, a table of losses, a loss of torch's, the cache."""
    from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel
    names = {"torch": torch, "transformers": transformers, "held": {}}
    reference = Unmodified({GPT2LMHeadModel})
    reference.require("patching:build")
    exec(patch, names)
    try:
        with pytest.raises(BadInput, match=re.escape(named)):
            reference.require("patching:build")
    finally:
        exec(undo, names)
    reference.require("patching:build")


def test_what_an_earlier_target_left_changed_is_told_to_every_later_one(tmp_path, monkeypatch, capsys):
    """In one process, as from Python: what was looked at first counts, not what the last target came upon."""
    from transformers.pytorch_utils import Conv1D
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "left_changed.py").write_text("""
import models
from transformers.pytorch_utils import Conv1D
def build(config, directory):
    Conv1D.forward = lambda self, x: x @ self.weight
    return models.from_pretrained(directory)
""")
    (tmp_path / "innocent.py").write_text(
        "import models\ndef build(config, directory):\n    return models.from_pretrained(directory)\n")
    assert convert(importlib.import_module("convert.gpt2").FAMILY, []) == 0
    monkeypatch.setattr(Conv1D, "forward", Conv1D.forward)
    assert align(FORWARD, ["--target", "left_changed:build"]) == 2
    capsys.readouterr()
    for flags in (["--target", "innocent:build"], []):
        assert align(FORWARD, flags) == 2
        assert "Conv1D.forward has been replaced in this process" in capsys.readouterr().err
    monkeypatch.undo()


class TestTied:
    """A weight that torch ties is compared with what it must be tied to, whatever else it is."""

    @pytest.fixture
    def weights(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)

        def run(family, build, *flags, head):
            name = f"net_of_{tmp_path.name}"
            (tmp_path / f"{name}.py").write_text(
                f"import copy, transformers, models\n\ndef build(config, directory):\n{build}    return net\n")
            save_checkpoint(tmp_path / "source", head, tie_word_embeddings=True)
            assert convert(family, ["--source", "source", "--output", "out/tied"]) == 0
            code = align(WEIGHTS, ["--target", f"{name}:build", *flags])
            return code, json.loads((tmp_path / f"reports/tied/{name}.build/weights.json").read_text())
        return run

    @pytest.mark.parametrize("family,head,place,name", [
        (GPT2, "GPT2LMHeadModel", "lm_head", "lm_head.weight"),
        (T5, "T5ForConditionalGeneration", "lm_head", "lm_head.weight"),
        (T5, "T5ForConditionalGeneration", "decoder.embed_tokens", "t5.decoder.embed_tokens.weight")])
    @pytest.mark.parametrize("changed", [False, True])
    def test_of_a_torch_net(self, weights, family, head, place, name, changed):
        """One row of the copy differs, which an input need not use."""
        build = (f"    net = transformers.{head}.from_pretrained('source')\n"
                 f"    net.{place} = copy.deepcopy(net.{place})\n"
                 f"    net.{place}.weight.data[7] += {int(changed)}\n")
        code, report = weights(family, build, "--allow-same-framework", head=head)
        assert [tensor["name"] for tensor in report["tensors"] if not tensor["passed"]] == [name] * changed
        assert code == changed

    @pytest.mark.parametrize("place,failing", [("wpe", ["lm_head.weight"]), ("wte", [])])
    def test_of_a_paddle_net_that_ties_it_to_another(self, weights, place, failing):
        """GPT-2's head is the table of positions, which the plan knows too."""
        table = {"wpe": "position", "wte": "word"}[place]
        build = ("    net = models.from_pretrained(directory)\n"
                 f"    net.lm_head.weight = net.gpt.embeddings.{table}_embeddings.weight\n")
        code, report = weights(GPT2, build, head="GPT2LMHeadModel")
        assert [tensor["name"] for tensor in report["tensors"] if not tensor["passed"]] == failing
        assert code == bool(failing)


def test_two_weights_under_one_name_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shadow_net.py").write_text("""
import torch
import transformers

def build(config, directory):
    net = transformers.BertForMaskedLM.from_pretrained("source").eval()
    layer = net.bert.encoder.layer[0]
    right = layer.attention.self.key.bias.detach().clone()
    layer.attention.self.key.bias.data += 0.5
    places = net.bert.encoder.layers = torch.nn.Module()
    setattr(places, "0", torch.nn.Module())
    getattr(places, "0").self_attn = torch.nn.Module()
    getattr(places, "0").self_attn.k_proj = torch.nn.Module()
    getattr(places, "0").self_attn.k_proj.register_buffer("bias", right)
    return net

def positions(config, directory):
    net = transformers.BertForMaskedLM.from_pretrained("source").eval()
    held = net.bert.embeddings.position_ids.clone()
    del net.bert.embeddings.position_ids
    net.bert.embeddings.register_buffer("position_ids", held)
    return net
""")
    save_checkpoint(tmp_path / "source", "BertForMaskedLM")
    assert convert(BERT, ["--source", "source", "--output", "out/bert"]) == 0
    capsys.readouterr()
    assert align(FORWARD, ["--target", "shadow_net:build", "--allow-same-framework"]) == 2
    assert "go by the name bert.encoder.layers.0.self_attn.k_proj.bias" in capsys.readouterr().err
    assert align(FORWARD, ["--target", "shadow_net:positions", "--allow-same-framework"]) == 0
    notes = json.loads((tmp_path / "reports/bert/shadow_net.positions/forward.json").read_text())["notes"]
    assert any("bert.embeddings.position_ids is held by the candidate and compared with nothing" in note
               for note in notes)


@pytest.mark.parametrize("config", [
    "[]", "'n_head'", "type('Odd', (), {'__slots__': ()})()", "type('Odd', (), {'__getattr__': lambda *_: None})()",
    "type('Odd', (), {'n_head': property(lambda self: 1 / 0)})()", "{'n_head': object()}"])
def test_a_config_of_any_kind_is_no_trouble(config):
    held = eval(config)
    assert all(isinstance(value, (str, int, float, type(None))) for _, value in lint._settings(held, GPT2).values())


def test_an_epsilon_that_is_no_number_is_left_out_and_one_in_float32_is_the_same(tmp_path):
    class RMSNorm:
        eps = None

    class LayerNorm:
        eps = 1e-5

    class Rounded:
        _epsilon = float(np.float32(1e-5))
    Rounded.__name__ = "LayerNorm"
    run = SimpleNamespace(modules=[], family=GPT2)
    left = lint.describe(None, {"a": RMSNorm(), "b": LayerNorm()}, {}, run, str)
    right = lint.describe(None, {"a": RMSNorm(), "b": Rounded()}, {}, run, str)
    assert left["epsilon"] == {"b": 1e-5}
    assert lint.differences(left, right) == [
        "Lint: no differences among what was compared, of the nets as built: each norm's epsilon."]


def test_batch_norms_of_the_two_frameworks_agree_but_for_the_variance_that_they_keep_in_training():
    run = SimpleNamespace(modules=[], family=GPT2)
    torchs = lint.describe(None, {"bn1": torch.nn.BatchNorm2d(3, momentum=0.1)}, {}, run, str)
    paddles, hasty = (lint.describe(None, {"bn1": paddle.nn.BatchNorm2D(3, momentum=momentum)}, {}, run, str)
                      for momentum in (0.9, 0.1))
    variance = ("Lint: the running variance of bn1 is in training the sum of squares over n - 1 in torch and over n in "
                "the candidate, n = batch x height x width. Outputs do not show it.")
    compared = "among what was compared, of the nets as built: each norm's epsilon, each batch norm's momentum."
    assert lint.differences(torchs, paddles) == [variance, f"Lint: 1 difference {compared}"]
    assert lint.differences(torchs, torchs) == [f"Lint: no differences {compared}"]
    assert lint.differences(torchs, hasty) == [
        "Lint: what a batch counts for in the running statistics of bn1 is 0.1 in torch and 0.9 in the candidate. "
        "Outputs do not show it, training does.", variance, f"Lint: 2 differences {compared}"]


@pytest.mark.parametrize("target,says", [
    ("paper_net:nothing", "NoneType"), ("paper_net:short", "is called with the config"),
    ("paper_net:tuples", "a mapping"), ("paper_net:absent", "cannot be imported"),
    ("no_such_module:build", "cannot be imported"), ("other", "is not one of"),
    ("unreadable_net:build", "cannot be imported (SyntaxError"), ("failing_net:build", "(RuntimeError: no weights)"),
    ("inner_net:build", "the net has no parameter transformer.wte.weight; it has wte.weight, ")])
def test_what_cannot_be_used_is_told_in_a_sentence(forward, tmp_path, target, says):
    (tmp_path / "unreadable_net.py").write_text("def build(config, directory:\n")
    (tmp_path / "inner_net.py").write_text(
        "import models\ndef build(config, directory):\n    return models.from_pretrained(directory).transformer\n")
    (tmp_path / "failing_net.py").write_text("raise RuntimeError('no weights')\n")
    code, said = forward(target)
    assert code == 2
    assert says in said.err
