"""What once gave a false verdict or lost something, each kept as a test."""

import json
import zipfile

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from align.forward import STAGE as FORWARD
from align.stage import main as align
from convert import bert, gptj, writer
from convert.__main__ import main as convert


@pytest.fixture
def desk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_pad_token_changed_in_the_output_does_not_change_the_reference(desk, torch_model):
    torch_model("GPTJForSequenceClassification").save_pretrained("source")
    assert convert(["--source", "source", "--output", "out/classifier"]) == 0
    config = json.loads((desk / "out/classifier/config.json").read_text())
    assert align(FORWARD, []) == 0
    used = np.load(desk / "reports/classifier/traces/forward_inputs.npz")["input_ids"]
    (desk / "out/classifier/config.json").write_text(json.dumps(config | {"pad_token_id": int(used[0, -1])}))
    assert align(FORWARD, []) == 1
    told = json.loads((desk / "reports/classifier/forward.json").read_text())["notes"]
    assert any("pad_token_id" in note for note in told)


def demo(family):
    from pathlib import Path

    from convert.demo import build_demo
    return build_demo({"gptj": gptj, "bert": bert}[family].FAMILY, Path("made"))


def test_a_norm_that_the_users_net_does_not_call_is_told(desk, capsys):
    (desk / "functional.py").write_text(
        "import paddle\nfrom models.bert import BertForPreTraining, BertLayer\n"
        "class Layer(BertLayer):\n"
        "    def forward(self, hidden, mask=None):\n"
        "        hidden = self.norm1(self.self_attn(hidden, mask) + hidden)\n"
        "        added = self.linear2(self.activation(self.linear1(hidden))) + hidden\n"
        "        weight, bias = self.norm2.weight, self.norm2.bias\n"
        "        return paddle.nn.functional.layer_norm(added, added.shape[-1:], weight, bias, 1e-12)\n"
        "def build(config, directory):\n"
        "    net = BertForPreTraining.from_pretrained(directory)\n"
        "    net.bert.encoder.layers[2].__class__ = Layer\n"
        "    return net\n")
    assert convert(["--source", str(demo("bert"))]) == 0
    align(FORWARD, ["--target", "functional:build"])
    assert "Not judged on their own" in capsys.readouterr().out.replace("\n", " ")
    report = json.loads((desk / "reports/made/functional.build/forward.json").read_text())
    assert any("bert.encoder.layers.2.norm2" in note for note in report["notes"])


def test_a_header_with_reversed_shapes_is_not_bit_exact(desk, monkeypatch, capsys):
    source = demo("gptj")
    whole = writer._safetensors_file

    def reversed_shapes(framework, name, moves):
        from dataclasses import replace
        return whole(framework, name, [replace(move, shape=move.shape[::-1]) for move in moves])

    monkeypatch.setattr(writer, "_safetensors_file", reversed_shapes)
    assert convert(["--source", str(source), "--output", "out/reversed"]) == 4
    assert "came out as" in capsys.readouterr().err
    assert not (desk / "out").exists()


def test_a_pickle_cannot_change_what_this_program_knows_of_dtypes(desk, capsys):
    state = {"transformer.wte.weight": torch.full((4, 4), float("nan"))}
    (desk / "source").mkdir()
    torch.save(state, desk / "whole.bin")
    prefix = b"\x80\x02ctorch\nFloatStorage\n}X\x08\x00\x00\x00exponentJ\xff\xff\xff\x7fsb0"
    with zipfile.ZipFile(desk / "whole.bin") as good, zipfile.ZipFile(desk / "source/pytorch_model.bin", "w") as bad:
        for entry in good.infolist():
            data = good.read(entry)
            bad.writestr(entry.filename, prefix + data[2:] if entry.filename.endswith("data.pkl") else data)
    (desk / "source/config.json").write_text(json.dumps(gptj.FAMILY.demo))
    assert convert(["--source", "source"]) == 2
    assert "sets the state of" in capsys.readouterr().err
    from convert.dtypes import BY_NAME
    assert BY_NAME["float32"].exponent == 0x7F800000


def test_the_source_is_never_replaced_by_its_own_conversion(desk, capsys):
    source = demo("gptj")
    before = (source / "model.safetensors").read_bytes()
    assert convert(["--source", str(source), "--output", str(source), "--overwrite"]) == 2
    assert "would replace the source" in capsys.readouterr().err
    assert (source / "model.safetensors").read_bytes() == before


def test_the_demo_does_not_replace_a_conversion_that_bears_its_sources_name(desk):
    assert convert(["--source", str(demo("gptj")), "--output", "out/demo-gptj-source"]) == 0
    before = (desk / "out/demo-gptj-source/model.safetensors").read_bytes()
    from convert.cli import main
    assert main(gptj.FAMILY, []) == 2
    assert (desk / "out/demo-gptj-source/model.safetensors").read_bytes() == before


def test_a_refusal_leaves_no_empty_directory(desk):
    source = demo("gptj")
    weights = load_file(source / "model.safetensors")
    weights["transformer.ln_f.bias"][0] = np.nan
    from safetensors.numpy import save_file
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    assert convert(["--source", str(source), "--output", "a/b/c"]) == 2
    assert not (desk / "a").exists()


def test_tensors_that_fit_two_heads_are_not_guessed(desk, torch_model, capsys):
    torch_model("BertForSequenceClassification").save_pretrained("source")
    config = json.loads((desk / "source/config.json").read_text())
    del config["architectures"]
    (desk / "source/config.json").write_text(json.dumps(config))
    assert convert(["--source", "source"]) == 2
    assert "BertForSequenceClassification and BertForTokenClassification" in capsys.readouterr().err


def test_a_damaged_report_of_another_run_does_not_hide_the_latest(desk):
    (desk / "reports/old").mkdir(parents=True)
    (desk / "reports/old/convert.json").write_text("{")
    assert convert(["--source", str(demo("gptj"))]) == 0
    assert align(FORWARD, []) == 0
