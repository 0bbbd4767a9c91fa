"""One byte changed, or the end cut off: never a traceback, never a fault of ours, never a wrong result unnoticed."""

import json
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

fuzz = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture,
                                                                      HealthCheck.too_slow])
places = st.floats(0, 1, exclude_max=True)


@pytest.fixture
def tiny(torch_model, tmp_path):
    """A GPT-J so small that most of its bytes are headers, with its weights in the file that ``save`` makes."""
    def make(save):
        model = torch_model("GPTJModel", n_layer=1, n_embd=4, n_head=1, rotary_dim=2, n_inner=5, vocab_size=6)
        model.config.save_pretrained(tmp_path / "source")
        save(model, tmp_path / "source")
        return next(file for file in (tmp_path / "source").iterdir() if file.name != "config.json")
    return make


def zipped(model, directory):
    torch.save(model.state_dict(), directory / "pytorch_model.bin")


def older_than_zip(model, directory):
    torch.save(model.state_dict(), directory / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def safetensors(model, directory):
    model.save_pretrained(directory)


def pdparams(model, directory):
    """No source that a user has, but read by the same code when a result is verified."""
    import paddle
    paddle.save({name: paddle.to_tensor(value.numpy()) for name, value in model.state_dict().items()},
                str(directory / "model_state.pdparams"))


def data_regions(file):
    """Where a changed byte is a changed weight, which no reader can tell."""
    if file.suffix == ".safetensors":
        raw = file.read_bytes()
        return [range(8 + int.from_bytes(raw[:8], "little"), len(raw))]
    with zipfile.ZipFile(file) as archive:
        raw = file.read_bytes()
        starts = {entry: entry.header_offset + 30 + int.from_bytes(raw[entry.header_offset + 26:][:2], "little")
                  + int.from_bytes(raw[entry.header_offset + 28:][:2], "little") for entry in archive.infolist()}
        return [range(start, start + entry.file_size) for entry, start in starts.items() if "/data/" in entry.filename]


@pytest.mark.parametrize("save", [safetensors, zipped])
def test_one_byte_changed(save, tiny, convert):
    file = tiny(save)
    clean, regions = file.read_bytes(), data_regions(file)
    right = convert(file.parent).weights
    headers = [position for position in range(len(clean)) if not any(position in region for region in regions)]

    @fuzz
    @given(st.one_of(st.sampled_from(headers), st.integers(0, len(clean) - 1)), st.integers(1, 255))
    def check(position, change):
        file.write_bytes(clean[:position] + bytes([clean[position] ^ change]) + clean[position + 1:])
        run = convert(file.parent, "--overwrite")
        assert_refused_or(run, lambda: run.weights == right or any(position in region for region in regions))
    check()


@pytest.mark.parametrize("save", [older_than_zip, pdparams])
def test_one_byte_changed_where_nothing_guards_the_header(save, tiny, convert):
    file = tiny(save)
    clean = file.read_bytes()

    @fuzz
    @given(places, st.integers(0, 255))
    def check(place, byte):
        position = int(place * len(clean))
        file.write_bytes(clean[:position] + bytes([byte]) + clean[position + 1:])
        assert_refused_or(convert(file.parent, "--overwrite"), lambda: True)
    check()


@pytest.mark.parametrize("save", [safetensors, zipped, older_than_zip, pdparams])
def test_the_end_cut_off(save, tiny, convert):
    file = tiny(save)
    clean = file.read_bytes()

    @settings(fuzz, max_examples=25)
    @given(places)
    def check(place):
        file.write_bytes(clean[:int(place * len(clean))])
        assert_refused_or(convert(file.parent), lambda: False)
    check()


@settings(fuzz, max_examples=40)
@given(place=places, byte=st.integers(0, 255))
def test_one_byte_of_the_config_changed(place, byte, checkpoint, convert):
    source = checkpoint("GPTJModel")
    clean = (source / "config.json").read_bytes()
    position = int(place * len(clean))
    (source / "config.json").write_bytes(clean[:position] + bytes([byte]) + clean[position + 1:])
    assert_refused_or(convert(source, "--overwrite", family="gptj"), lambda: True)


json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                           lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner))


@fuzz
@given(value=json_values, entry=st.sampled_from(["shape", "dtype", "data_offsets", None]))
def test_any_json_in_a_header(value, entry, checkpoint, convert):
    source = checkpoint("GPTJModel")
    raw = (source / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    if entry is None:
        header["wte.weight"] = value
    else:
        header["wte.weight"][entry] = value
    text = json.dumps(header).encode()
    (source / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + raw[end:])
    assert_refused_or(convert(source), lambda: False)


@fuzz
@given(value=json_values, key=st.sampled_from(["n_layer", "n_embd", "n_positions", "architectures", "model_type",
                                               "vocab_size", "n_inner", "eos_token_id", "id2label", "dtype"]))
def test_any_json_in_a_config(value, key, checkpoint, convert):
    source = checkpoint("GPTJModel")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {key: value}))
    assert_refused_or(convert(source, "--overwrite", family="gptj"), lambda: True)


def assert_refused_or(run, allowed):
    """Exit code 2 with a sentence, or a result that is ``allowed``."""
    assert run.code in (0, 2), run.stderr
    if run.code == 0:
        assert allowed()
        load_file(run.output / "model.safetensors")
    else:
        assert run.stderr.startswith("error: ") and run.stderr.count("\n") == 1, run.stderr
