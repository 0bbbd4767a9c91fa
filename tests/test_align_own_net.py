"""``--target package.module:build``: a net of the user's own against the reference."""

import pytest

from align.forward import STAGE as FORWARD
from align.stage import main as align
from convert.cli import main as convert
from convert.gptj import FAMILY

NET = """
from models.gptj import GPTJForCausalLM

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
"""


@pytest.fixture
def forward(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "paper_net.py").write_text(NET)
    assert convert(FAMILY, []) == 0

    def run(target):
        return align(FORWARD, ["--target", target]), capsys.readouterr()

    return run


def test_a_net_of_the_users_own_is_aligned_and_reported_in_its_own_place(forward, tmp_path):
    assert forward("paper_net:build")[0] == 0
    assert (tmp_path / "reports/demo-gptj/paper_net.build/forward.json").is_file()


def test_its_wrong_activation_is_named_and_explained(forward):
    code, said = forward("paper_net:wrong")
    assert code == 1
    assert "transformer.h.1: mlp activation, before mlp.fc_out" in said.out.replace("\n", " ")
    assert "why:" in said.out and "relu" in said.out


@pytest.mark.parametrize("target,says", [
    ("paper_net:nothing", "NoneType"), ("paper_net:short", "is called with the config"),
    ("paper_net:tuples", "a mapping"), ("paper_net:absent", "cannot be imported"),
    ("no_such_module:build", "cannot be imported"), ("other", "is not one of")])
def test_what_cannot_be_used_is_told_in_a_sentence(forward, target, says):
    code, said = forward(target)
    assert code == 2
    assert says in said.err
