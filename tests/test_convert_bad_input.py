"""Bad input: one sentence that names the thing, exit code 2, and every file as it was (see ``refused``)."""

import errno
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import pytest
import torch
from conftest import call
from safetensors.torch import load_file, save_file

from convert.__main__ import family_named
from convert.__main__ import main as convert_any
from convert.cli import main as convert_main
from convert.demo import build_demo

Q_PROJ = "transformer.h.1.attn.q_proj.weight"
EMBEDDING = "transformer.wte.weight"


@pytest.fixture
def source(checkpoint):
    return checkpoint()


@pytest.fixture
def with_tensors(source):
    """Rewrite the weights of ``source``: a value replaces a tensor, None takes it out."""
    def change(changes, name="model.safetensors"):
        state = load_file(source / "model.safetensors") | changes
        state = {key: value for key, value in state.items() if value is not None}
        (source / "model.safetensors").unlink()
        if name.endswith(".safetensors"):
            save_file(state, source / name)
        else:
            torch.save(state, source / name)
        return source
    return change


@pytest.fixture
def with_header(source):
    """Rewrite the header of ``source`` through ``change``: a dictionary or, as ``text``, what it is spelled as."""
    def rewrite(change=lambda header: None, text=lambda text: text, length=None):
        file = source / "model.safetensors"
        raw = file.read_bytes()
        end = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:end])
        change(header)
        spelled = text(json.dumps(header)).encode()
        file.write_bytes(struct.pack("<Q", len(spelled) if length is None else length) + spelled + raw[end:])
        return source
    return rewrite


@pytest.fixture
def with_config(source):
    def change(**changes):
        config = json.loads((source / "config.json").read_text()) | changes
        (source / "config.json").write_text(json.dumps(config))
        return source
    return change


# --- names and shapes


def test_a_key_without_a_rule_is_named_with_the_nearest_rule(with_tensors, refused):
    source = with_tensors({"transformer.h.0.attn.rotary": torch.ones(2), "transformer.h.1.attn.rotary": torch.ones(2)})
    refused(source, says=("2 source tensors that no rule claims: transformer.h.0.attn.rotary (+1 more)",
                          "Nearest rule: transformer.h.{i}.attn.bias", "Nothing was written"))


@pytest.mark.parametrize("name", ["transformer.h.00.ln_1.weight", "xtransformer.wte.weight", "transformer.wte.weightx",
                                  "transformer.h.0.mlp.fc_in.weight.old", "transformer.h.x.ln_1.bias",
                                  "transformer.h.-1.ln_1.weight", f"transformer.h.{'9' * 5000}.ln_1.weight"])
def test_patterns_are_anchored(name, with_tensors, refused):
    refused(with_tensors({name: torch.ones(16)}), says=(name, "no rule claims"))


def test_a_name_without_its_prefix_is_another_spelling(with_tensors, refused):
    refused(with_tensors({"h.0.ln_1.bias": torch.ones(16)}),
            says="transformer.h.0.ln_1.bias and h.0.ln_1.bias are two spellings of one tensor")


def test_a_target_that_nothing_fills(with_tensors, refused):
    refused(with_tensors({Q_PROJ: None}), says=("1 target tensor that no source tensor fills", Q_PROJ))


@pytest.mark.parametrize("name,shape", [(Q_PROJ, (16, 15)), ("transformer.h.0.mlp.fc_in.weight", (16, 24)),
                                        ("transformer.ln_f.weight", (1, 16)), (EMBEDDING, (41, 16))])
def test_a_wrong_shape(name, shape, with_tensors, refused):
    refused(with_tensors({name: torch.ones(shape)}), says=(name, str(list(shape)), "the config asks for"))


def test_a_weight_of_integers(with_tensors, refused):
    refused(with_tensors({Q_PROJ: torch.ones(16, 16, dtype=torch.int32)}), says=(Q_PROJ, "int32"))


def test_two_spellings_of_one_tensor(checkpoint, refused):
    source = checkpoint("BertModel")
    state = load_file(source / "model.safetensors") | {"embeddings.LayerNorm.gamma": torch.ones(16)}
    save_file(state, source / "model.safetensors")
    refused(source, says=("embeddings.LayerNorm.weight", "embeddings.LayerNorm.gamma"))


@pytest.mark.parametrize("name", ["cls.predictions.decoder.weight", "cls.predictions.decoder.bias"])
def test_tied_copies_that_differ(name, torch_model, tmp_path, refused):
    model = torch_model("BertForPreTraining")
    state = {key: value.clone() for key, value in model.state_dict().items()}
    state[name].view(-1)[-1] += 1
    model.config.save_pretrained(tmp_path / "source")
    torch.save(state, tmp_path / "source" / "pytorch_model.bin")
    refused(tmp_path / "source", says=(name, "tied"))


@pytest.mark.parametrize("mask", [torch.ones(1, 1, 8, 8), torch.tril(torch.ones(1, 1, 9, 9)),
                                  torch.triu(torch.ones(1, 1, 8, 8))], ids=["full", "larger", "upper"])
def test_a_mask_that_is_not_causal(mask, with_tensors, refused):
    name = "transformer.h.0.attn.bias"
    refused(with_tensors({name: mask.bool()}), says=(name, "causal mask"))


# --- values


@pytest.mark.parametrize("name", [Q_PROJ, EMBEDDING, "transformer.ln_f.bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nan_and_inf_are_named_and_only_let_through_on_demand(name, value, dtype, with_tensors, source, convert,
                                                              refused):
    state = {key: tensor.to(dtype) for key, tensor in load_file(source / "model.safetensors").items()}
    state[name].view(-1)[-1] = value
    with_tensors(state)
    refused(source, says=(name, "NaN or inf", "--allow-nonfinite"))
    run = convert(source, "--allow-nonfinite")
    assert run.code == 0, run.stderr
    held = load_file(run.output / "model.safetensors")[name].view(-1)[-1]
    assert torch.allclose(held, torch.tensor(value, dtype=dtype), equal_nan=True)


def test_overflow_in_float16(with_tensors, refused, convert):
    weight = torch.zeros(16, 16)
    weight[3, 5] = 65520.0  # the smallest that rounds to infinity
    source = with_tensors({Q_PROJ: weight})
    refused(source, "--dtype", "float16", says=(Q_PROJ, "overflows float16"))
    assert convert(source, "--dtype", "bfloat16").code == 0


def test_the_largest_float16_does_not_overflow(with_tensors, convert):
    weight = torch.full((16, 16), 65519.0)
    run = convert(with_tensors({Q_PROJ: weight}), "--dtype", "float16")
    assert load_file(run.output / "model.safetensors")[Q_PROJ].eq(65504).all()


# --- damaged safetensors


@pytest.mark.parametrize("kept", [0, 5, 8, 100, -1, -5000])
def test_a_file_cut_short(kept, source, refused):
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    refused(source, says="model.safetensors")


def test_the_sentence_for_a_file_cut_short_has_both_sizes(source, refused):
    file = source / "model.safetensors"
    size = file.stat().st_size
    os.truncate(file, size - 4)
    refused(source, says=f"model.safetensors is cut short: its header promises {size:,} bytes, it has {size - 4:,}. "
                         "Download it again.")
    (source / "paddle_parity.json").write_text("{}")
    refused(source, says="Convert it again, or get it again from where it came.")


def test_a_padded_file(source, refused):
    with open(source / "model.safetensors", "ab") as file:
        file.write(b"\0")
    refused(source, says=("model.safetensors", "longer than it should be"))


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 100_000_001, 0, 1, 7])
def test_an_absurd_header_length(length, with_header, refused):
    refused(with_header(length=length), says="model.safetensors")


OFFSETS = {
    "overlap": lambda start, stop: [start - 4, stop - 4],
    "gap": lambda start, stop: [start + 4, stop + 4],
    "negative": lambda start, stop: [start - stop, 0],
    "backwards": lambda start, stop: [stop, start],
    "short": lambda start, stop: [start, stop - 4],
    "huge": lambda start, stop: [2**64 + start, 2**64 + stop],
    "fraction": lambda start, stop: [float(start), float(stop)],
    "text": lambda start, stop: [str(start), str(stop)],
    "boolean": lambda start, stop: [False, True],
    "three": lambda start, stop: [start, stop, stop],
    "none": lambda start, stop: [],
    "not a list": lambda start, stop: start,
}


@pytest.mark.parametrize("change", OFFSETS.values(), ids=OFFSETS)
def test_absurd_offsets(change, with_header, refused):
    def move(header):
        header[Q_PROJ]["data_offsets"] = change(*header[Q_PROJ]["data_offsets"])
    refused(with_header(move), says="model.safetensors")


@pytest.mark.parametrize("shape", [[-16, -16], [16, 16, 1.0], ["16", 16], [[16, 16]], 256, "256", None, [2**70, 16]])
def test_absurd_shapes(shape, with_header, refused):
    refused(with_header(lambda header: header[Q_PROJ].update(shape=shape)), says="model.safetensors")


@pytest.mark.parametrize("code", ["F8_E4M3", "f32", "", None, 5, ["F32"], {"F32": 1}])
def test_an_unknown_dtype(code, with_header, refused):
    refused(with_header(lambda header: header[Q_PROJ].update(dtype=code)), says=(Q_PROJ, repr(code)))


SPELLINGS = {
    "not JSON": lambda text: "{" + text,
    "empty": lambda text: "",
    "a list": lambda text: f"[{text}]",
    "a number": lambda text: "5",
    "deep": lambda text: "[" * 100_000,
    "deep object": lambda text: '{"a":' * 100_000,
    "long number": lambda text: text.replace("[16, 16]", f"[{'9' * 5000}, 16]", 1),
    "an entry of another kind": lambda text: text[:-1] + ', "x": 5}',
    "an entry without offsets": lambda text: text[:-1] + ', "x": {"dtype": "F32", "shape": []}}',
    "a name twice": lambda text: text[:-1] + ', "transformer.wte.weight": {"dtype": "F32", "shape": [0], '
                                              '"data_offsets": [0, 0]}}',
}


@pytest.mark.parametrize("text", SPELLINGS.values(), ids=SPELLINGS)
def test_a_garbled_header(text, with_header, refused):
    refused(with_header(text=text), says="model.safetensors")


# --- indexes


@pytest.fixture
def shards(tmp_path, torch_model):
    """A sharded checkpoint, its index changed by ``change(weight_map)``."""
    def make(change, binary=False):
        directory = tmp_path / "sharded"
        torch_model("GPTJForCausalLM").save_pretrained(directory, max_shard_size="8KB", safe_serialization=not binary)
        index = next(directory.glob("*.index.json"))
        content = json.loads(index.read_text())
        content = change(content["weight_map"]) or content
        index.write_text(json.dumps(content))
        return directory
    return make


@pytest.mark.parametrize("binary", [False, True])
def test_a_missing_shard(binary, shards, refused):
    directory = shards(lambda weight_map: None, binary)
    gone = sorted(directory.glob("*-of-*"))[1]
    gone.unlink()
    refused(directory, says=(gone.name, "not there"))


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", ".", "", None,
                                   5, ["a"]])
def test_a_shard_outside_the_directory(shard, shards, refused):
    refused(shards(lambda weight_map: weight_map.update({Q_PROJ: shard})), says=("index.json", Q_PROJ, "outside"))


@pytest.mark.parametrize("shard", ["\0", "a" * 5000])
def test_a_shard_that_no_file_can_be(shard, shards, refused):
    refused(shards(lambda weight_map: weight_map.update({Q_PROJ: shard})), says="")


def test_a_tensor_that_is_not_in_its_shard(shards, refused):
    def swap(weight_map):
        other = next(shard for shard in weight_map.values() if shard != weight_map[Q_PROJ])
        weight_map[Q_PROJ] = other
    refused(shards(swap), says=("the index says", Q_PROJ))


def test_a_tensor_in_two_shards(shards, refused):
    directory = shards(lambda weight_map: None)
    first, second = sorted(directory.glob("model-*"))[:2]
    again = next(iter(load_file(first).items()))
    save_file(load_file(second) | dict([again]), second)
    refused(directory, says=(again[0], first.name, second.name))


@pytest.mark.parametrize("content", [{"weight_map": {}}, {"weight_map": [1]}, {"weight_map": None}, {}, [], 5])
def test_an_index_without_a_map(content, shards, refused):
    directory = shards(lambda weight_map: None)
    (directory / "model.safetensors.index.json").write_text(json.dumps(content))
    refused(directory, says="model.safetensors.index.json")


# --- pickles


class Boom:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("name,options", [("pytorch_model.bin", {}), ("weights.pt", {}),
                                          ("pytorch_model.bin", {"_use_new_zipfile_serialization": False})])
def test_a_pickle_that_runs_code_does_not(name, options, source, tmp_path, refused):
    state = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    torch.save(state | {"boom": Boom(tmp_path / "trace")}, source / name, **options)
    refused(source / name, says=(name, "wants to run code", "mkdir"))
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pdparams_that_runs_code_does_not(protocol, source, tmp_path, refused):
    (source / "model.safetensors").unlink()
    (source / "model_state.pdparams").write_bytes(pickle.dumps({"boom": Boom(tmp_path / "trace")}, protocol))
    refused(source, says=("model_state.pdparams", "wants to run code", "mkdir"))
    assert not (tmp_path / "trace").exists()


NOT_STATE_DICTS = {
    "a list": [torch.ones(2)],
    "a tensor": torch.ones(2),
    "a number": 5,
    "a nested dictionary": {"optimizer": {"step": torch.ones(2)}},
    "a name that is a number": {5: torch.ones(2)},
    "a number among tensors": {EMBEDDING: torch.ones(40, 16), "epoch": 5},
    "a dtype that Paddle has not": {EMBEDDING: torch.ones(40, 16).to(torch.float8_e4m3fn)},
    "nothing": {},
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("state", NOT_STATE_DICTS.values(), ids=NOT_STATE_DICTS)
def test_a_bin_that_is_no_state_dict(state, zipped, source, refused):
    (source / "model.safetensors").unlink()
    torch.save(state, source / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    told = refused(source, says="")
    assert "pytorch_model.bin" in told or "holds no tensor" in told


def test_a_dtype_that_paddle_has_not_is_no_accusation(source, refused):
    (source / "model.safetensors").unlink()
    torch.save({EMBEDDING: torch.ones(40, 16).to(torch.float8_e4m3fn)}, source / "pytorch_model.bin")
    assert "run code" not in refused(source, says="dtype")


@pytest.mark.parametrize("shape,strides,offset", [((4, 4), (-4, 1), 0), ((4, 4), (-1, 4), 0), ((4, 4), (4, 1), -1),
                                                  ((-4, -4), (4, 1), 0), ((4, 4), (5, 1), 0), ((4, 5), (4, 1), 0),
                                                  ((4, 4), (4, 1), 1), ((4, 4), (4,), 0), ((4, 4), (4, 1), "0")])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_view_that_leaves_its_storage(shape, strides, offset, zipped, source, refused):
    class View(torch.Tensor):
        def __reduce_ex__(self, protocol):
            storage = torch.Tensor(self.data)._reduce_ex_internal(protocol)[1][0]
            return torch._utils._rebuild_tensor_v2, (storage, offset, shape, strides, False, {})

    (source / "model.safetensors").unlink()
    torch.save({"transformer.x": torch.ones(4, 4).as_subclass(View)}, source / "pytorch_model.bin",
               _use_new_zipfile_serialization=zipped)
    refused(source, says=("pytorch_model.bin", "damaged"))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("content", [b"", b"PK", b"PK\x03\x04" + bytes(50), b"garbage", b"\x80\x02}q\x00.", bytes(99)])
def test_a_bin_that_is_garbage(content, zipped, source, refused):
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").write_bytes(content)
    refused(source, says="pytorch_model.bin")


# --- configs


def test_a_config_of_another_family(checkpoint, refused):
    refused(checkpoint("GPTJModel"), family="bert", says=("not of the bert family", "python -m convert.gptj"))
    refused(checkpoint("BertModel"), family="gptj", says=("not of the gptj family", "python -m convert.bert"))


def test_the_tensors_of_another_family(checkpoint, refused):
    gptj, bert = checkpoint("GPTJForCausalLM"), checkpoint("BertForPreTraining")
    shutil.copy(bert / "model.safetensors", gptj / "model.safetensors")
    refused(gptj, says=("gptj (GPTJForCausalLM)", "bert.embeddings", "no rule claims"))


@pytest.mark.parametrize("kind", ["llama", "", None, 5, ["gptj"], "../gptj"])
def test_a_family_that_there_is_not(kind, with_config, refused):
    assert "python -m" not in refused(with_config(model_type=kind), says=("config.json", "gptj family"))


def test_no_config(source, refused):
    (source / "config.json").unlink()
    for path in (source, source / "model.safetensors"):
        refused(path, says=("no config.json", "Put the one that belongs to the checkpoint there",
                            f"python -m convert --family FILE --source {path}"))


@pytest.mark.parametrize("content", ["", "{", "[]", "5", "\xff", "[" * 100_000, '{"n_layer": ' + "9" * 5000 + "}"])
def test_a_broken_config(content, source, refused):
    (source / "config.json").write_bytes(content.encode("latin-1"))
    refused(source, says="config.json")


TWO = "model.safetensors holds 2 (transformer.h.0 to transformer.h.1). Correct the number, or give the checkpoint"


@pytest.mark.parametrize("layers,says", [(1, f"config.json (n_layer) says 1 layer, {TWO}"),
                                         (3, f"config.json (n_layer) says 3 layers, {TWO}"),
                                         (0, f"config.json (n_layer) says 0 layers, {TWO}"),
                                         (-1, "n_layer"), (10**9, "n_layer"), (1.5, "n_layer"), ("2", "n_layer"),
                                         (None, "n_layer"), (True, "n_layer")])
def test_a_wrong_number_of_layers(layers, says, with_config, refused):
    said = refused(with_config(n_layer=layers), says=says)
    assert "no rule claims" not in said and "that no source tensor fills" not in said


@pytest.mark.parametrize("changes, told", [
    ({"num_layers": 4}, "config.json (num_layers) says 4 layers, model.safetensors holds 3 (encoder.block.0 to enc"),
    ({"num_decoder_layers": 1}, "config.json (num_decoder_layers) says 1 layer, model.safetensors holds 2 (decoder.b"),
])
def test_a_wrong_number_of_layers_of_one_list_of_two(changes, told, tmp_path, refused):
    source = build_demo(family_named("t5"), tmp_path / "t5")
    config = json.loads((source / "config.json").read_text())
    assert (config["num_layers"], config["num_decoder_layers"]) == (3, 2)
    (source / "config.json").write_text(json.dumps({**config, **changes}))
    refused(source, family="t5", says=told)


def test_a_wrong_number_of_layers_hides_no_other_fault(with_config, with_tensors, refused):
    with_config(n_layer=3)
    refused(with_tensors({"transformer.h.0.odd": torch.ones(3), "transformer.ln_f.bias": None}), says=(
        "config.json (n_layer) says 3 layers", "1 source tensor that no rule claims: transformer.h.0.odd.",
        "1 target tensor that no source tensor fills: transformer.ln_f.bias."))


ABSURD = [{"n_embd": 0}, {"n_embd": -16}, {"n_embd": "16"}, {"n_embd": 10**30}, {"vocab_size": None},
          {"vocab_size": 10**12}, {"n_inner": 17}, {"n_inner": [24]}, {"n_positions": 10**30}, {"n_positions": 10**9},
          {"n_positions": 10**7}, {"architectures": 5}, {"architectures": [["GPTJModel"]]}, {"architectures": {"a": 1}},
          {"id2label": 5, "architectures": ["GPTJForSequenceClassification"]}, {"tie_word_embeddings": True}]


@pytest.mark.parametrize("file_format", ["safetensors", "pdparams"])
@pytest.mark.parametrize("changes", ABSURD, ids=str)
def test_an_absurd_config(changes, file_format, with_config, refused):
    refused(with_config(**changes), "--format", file_format, says="")


@pytest.mark.parametrize("changes", [{"position_embedding_type": "relative_key"}, {"is_decoder": True},
                                     {"add_cross_attention": True}])
def test_a_bert_that_paddlenlp_has_not(changes, checkpoint, refused):
    source = checkpoint("BertModel")
    config = json.loads((source / "config.json").read_text()) | changes
    (source / "config.json").write_text(json.dumps(config))
    refused(source, says=next(iter(changes)))


@pytest.mark.parametrize("family,changes,says", [
    ("gpt2", {"n_head": 0, "scale_attn_weights": False}, "n_head is 0"), ("gpt2", {"n_head": 5}, "n_head is 5"),
    ("opt", {"num_attention_heads": 0}, "num_attention_heads is 0"), ("bloom", {"n_head": 5}, "n_head is 5"),
    ("bloom", {"n_head": 0}, "n_head is 0"), ("gptj", {"n_head": 5}, "n_head is 5"),
    ("bert", {"num_attention_heads": 0}, "num_attention_heads is 0"), ("t5", {"num_heads": 0}, "num_heads"),
    ("gpt2", {"n_head": None, "num_attention_heads": 5}, "is 5"),
    ("gpt2", {"activation_function": ["gelu"]}, "activation_function is ['gelu']"),
    ("opt", {"activation_function": 3}, "activation_function is 3"), ("bert", {"hidden_act": {}}, "hidden_act is {}"),
    ("t5", {"dense_act_fn": ["x"]}, "dense_act_fn is ['x']")], ids=str)
def test_heads_that_do_not_divide_the_width_and_activations_without_a_name(family, changes, says, tmp_path, refused):
    demo = family_named(family)
    source = build_demo(demo, tmp_path / "made")
    (source / "config.json").write_text(json.dumps({**demo.demo, **changes}))
    refused(source, says=says, family=family)


# --- outputs


def test_an_output_that_is_not_ours_is_never_touched(source, workdir, refused):
    (workdir / "out" / "run").mkdir(parents=True)
    (workdir / "out" / "run" / "thesis.tex").write_text("years of work")
    refused(source, says=("out/run", "not touched"))
    refused(source, "--overwrite", says=("out/run", "not touched"))


def test_an_output_that_is_a_file(source, workdir, refused):
    (workdir / "out").mkdir()
    (workdir / "out" / "run").write_text("mine")
    refused(source, "--overwrite", says="not touched")


def test_an_output_below_a_file(source, workdir, refused):
    (workdir / "file").write_text("mine")
    refused(source, output="file/run", says="file/run")


def test_an_output_of_ours_wants_overwrite(source, checkpoint, convert, refused):
    assert convert(source).code == 0
    refused(source, says="--overwrite")
    other = convert(checkpoint("BertModel"), "--overwrite")
    assert other.code == 0 and other.report["family"] == other.config["model_type"] == "bert"


def test_a_failure_leaves_the_output_that_should_be_overwritten(source, with_tensors, convert, refused):
    assert convert(source).code == 0
    with_tensors({Q_PROJ: torch.full((16, 16), float("nan"))})
    refused(source, "--overwrite", says=Q_PROJ)


@pytest.mark.parametrize("output", [".", "..", "out/..", "/"])
def test_an_output_without_a_name(output, source, refused):
    refused(source, output=output, says="--output")


def test_reports_that_cannot_be_written(source, workdir, refused):
    (workdir / "file").write_text("mine")
    refused(source, "--reports", "file", says="--reports file")
    refused(source, "--reports", "file/reports", says="--reports")


@pytest.mark.parametrize("size", ["", "big", "-5GB", "0", "5XB", "GB", "inf", "nan", "1e999GB", "5GB5"])
def test_a_bad_shard_size(size, source, refused):
    refused(source, f"--shard-size={size}", says="--shard-size")


@pytest.mark.parametrize("flags", [["--dtype", "int8"], ["--format", "onnx"], ["--frobnicate"], ["stray"]])
def test_bad_usage(flags, source, convert, workdir):
    run = convert(source, *flags)
    assert run.code == 2 and "error:" in run.stderr and not list(workdir.iterdir())


def test_no_space_seen_beforehand(source, monkeypatch, refused):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    refused(source, says=("no space left", "1,000 are free"))


@pytest.mark.parametrize("function", ["posix_fallocate", "pwrite"])
def test_no_space_when_it_comes_to_it(function, source, monkeypatch, refused):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, function, full)
    refused(source, says="No space left on device")


def test_no_space_for_the_small_files(source, monkeypatch, refused):
    def full(file, copy):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(copy))
    monkeypatch.setattr(shutil, "copyfile", full)
    refused(source, says="No space left on device")


def test_the_last_bytes_fail(source, monkeypatch, refused):
    write, calls = os.pwrite, []

    def full_at_last(*arguments):
        calls.append(arguments)
        if len(calls) > 10:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return write(*arguments)
    monkeypatch.setattr(os, "pwrite", full_at_last)
    refused(source, says=os.strerror(errno.EIO))


# --- sources


@pytest.mark.parametrize("path", ["/nowhere/model", "./nowhere", "nowhere/at/all", "with space", "a..b", "a--b",
                                  "a" * 5000, "nowhere.safetensors/"])
def test_a_source_that_is_neither_here_nor_a_hub_id(path, refused, monkeypatch):
    monkeypatch.setattr("huggingface_hub.hf_api.get_session", lambda: pytest.fail("the hub was asked"))
    refused(path, says=path[:50])


def test_an_empty_directory(tmp_path, checkpoint, refused):
    source = checkpoint()
    (source / "model.safetensors").unlink()
    refused(source, says=(str(source), "model.safetensors"))


def test_a_source_that_is_another_kind_of_file(source, refused):
    refused(source / "config.json", says="config.json")


TEXTS = {"README.md": b"# paddle-parity", "empty.pt": b"", "notes.bin": b"not\nthis", "page.pdparams": b"<html></html>"}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("main", ["the family's", "the one that finds it"])
def test_a_source_that_is_no_checkpoint_is_told_what_is_read(name, main, source, refused, workdir):
    (source / name).write_bytes(TEXTS[name])
    told = f"{name} is not a checkpoint. What is read: safetensors, what torch.save wrote (.bin, .pt, .pth), .pdparams"
    if main == "the family's":
        assert "Error" not in refused(source / name, says=told)
        return
    (source / "config.json").unlink()
    code, _, said = call(convert_any, ["--source", str(source / name)])
    assert code == 2 and said.startswith(f"error: {told}") and said.count("\n") == 1


def test_a_source_of_no_known_family_is_told_what_to_do(tmp_path, workdir):
    torch.save({"tokens.weight": torch.ones(3, 2), "out.weight": torch.ones(2)}, tmp_path / "my.pt")
    code, _, said = call(convert_any, ["--source", str(tmp_path / "my.pt")])
    assert code == 2 and said.count("\n") == 1
    for words in ("there is no config.json beside", "(tokens.weight, out.weight, …)", "examples/my_gpt.py",
                  "python -m convert.draft --help", f"python -m convert --family FILE --source {tmp_path / 'my.pt'}"):
        assert words in said


@pytest.mark.parametrize("config, says", [
    ({}, "names no model_type, so its family cannot be told. Name it, as python -m convert.gptj --source"),
    ({"model_type": "llama"}, "there is no family 'llama'; there are bert, bloom, chatglm, gpt2, gptj, opt, resnet,"),
    ({"model_type": "draft"}, "there is no family 'draft'; there are bert,"),
    ({"model_type": "a" * 400}, "there are bert, bloom, chatglm, gpt2, gptj, opt, resnet,"),
])
def test_a_config_of_no_known_family_is_told_what_to_do(config, says, source, workdir):
    (source / "config.json").write_text(json.dumps(config))
    code, _, said = call(convert_any, ["--source", str(source)])
    assert code == 2 and says in said and "--family FILE" in said and said.count("\n") == 1


def test_the_rules_of_a_family_file_need_no_source(source, workdir):
    (workdir / "mine.py").write_text("from convert.gptj import FAMILY")
    gptj = call(convert_main, family_named("gptj"), ["--rules"])
    assert call(convert_any, ["--rules", "--family", "mine.py"]) == gptj and gptj[0] == 0
    for flags, says in ((["--rules"], "whose rules? Give --family FILE or --source"), ([], "give --source")):
        code, told, said = call(convert_any, flags)
        assert (code, told) == (2, "") and said.startswith(f"error: {says}") and said.count("\n") == 1


def test_a_revision_without_a_source(refused):
    refused(None, "--revision", "main", output=None, says="--revision main is of a hub id, and there is no --source")


def test_a_revision_of_a_local_path(source, refused):
    refused(source, "--revision", "main", says="--revision")


def test_every_sentence_is_one(with_tensors, refused):
    told = refused(with_tensors({Q_PROJ: None}), says="")
    assert re.fullmatch(r"error: [^\n]+\.\n", told)


def test_a_zip_record_whose_header_has_another_length(source, refused):
    """The length of padding in front of the data, in the local header alone: one byte more moves every weight."""
    state = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    torch.save(state, source / "pytorch_model.bin")
    raw = bytearray((source / "pytorch_model.bin").read_bytes())
    with zipfile.ZipFile(source / "pytorch_model.bin") as archive:
        record = archive.getinfo("pytorch_model/data/0").header_offset
    raw[record + 28] -= 4
    (source / "pytorch_model.bin").write_bytes(raw)
    refused(source, says=("pytorch_model.bin", "data/0"))


def test_a_storage_whose_own_count_is_another(source, refused):
    state = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    torch.save(state, source / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    raw = (source / "pytorch_model.bin").read_bytes()
    data = state[EMBEDDING].numpy().tobytes()
    place = raw.index(data) - 8
    assert int.from_bytes(raw[place:place + 8], "little") == 640
    (source / "pytorch_model.bin").write_bytes(raw[:place] + (641).to_bytes(8, "little") + raw[place + 8:])
    refused(source, says=("pytorch_model.bin", "another size than announced"))


def test_a_reader_who_stops_reading_is_no_error_to_tell():
    """As ``| head -1`` does; rich ends the program then."""
    read, write = os.pipe()
    with subprocess.Popen([sys.executable, "-m", "convert.gptj", "--rules"], stdout=write, stderr=subprocess.PIPE,
                          text=True) as process:
        os.close(read)
        os.close(write)
        _, told = process.communicate(timeout=60)
    assert (process.returncode, told) == (2, "")
