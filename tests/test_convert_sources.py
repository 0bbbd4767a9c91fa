"""Whatever way torch has of laying a state dict on disk, the target bytes are the same."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file


def in_one_safetensors(model, directory):
    model.save_pretrained(directory)


def in_safetensors_shards(model, directory):
    model.save_pretrained(directory, max_shard_size="8KB")
    assert len(list(directory.glob("model-*-of-*.safetensors"))) > 2


def in_one_bin(model, directory):
    model.save_pretrained(directory, safe_serialization=False)
    assert (directory / "pytorch_model.bin").read_bytes()[:2] == b"PK"


def in_bin_shards(model, directory):
    model.save_pretrained(directory, safe_serialization=False, max_shard_size="8KB")
    assert len(list(directory.glob("pytorch_model-*-of-*.bin"))) > 2


def saved(model, directory, state, **options):
    model.config.save_pretrained(directory)
    torch.save(state, directory / "pytorch_model.bin", **options)


def in_a_bin_older_than_zip(model, directory):
    saved(model, directory, model.state_dict(), _use_new_zipfile_serialization=False)


def in_a_trainers_bin(model, directory):
    saved(model, directory, {"state_dict": {name: torch.nn.Parameter(value) for name, value in
                                            model.state_dict().items()}})


def in_a_checkpoint_of_a_training(model, directory):
    """As nanoGPT keeps it: the weights under "model", beside the optimizer's state and the number of the step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    saved(model, directory, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "iter_num": 1,
                             "config": {"compile": True, "lr": 1e-3, "name": None}})


def in_columns(model, directory):
    """Every matrix transposed in storage, so that its strides are not those of C order."""
    state = {name: value.t().contiguous().t() if value.ndim == 2 else value
             for name, value in model.state_dict().items()}
    assert any(not value.is_contiguous() for value in state.values())
    saved(model, directory, state)


def in_one_storage(model, directory, **options):
    """All tensors views of one storage, with a gap in front of each."""
    state = model.state_dict()
    pool = torch.full((sum(value.numel() + 3 for value in state.values()),), float("nan"))
    position = 0
    for name, value in state.items():
        view = pool[position + 3: position + 3 + value.numel()].view(value.shape)
        state[name] = view.copy_(value)
        position += 3 + value.numel()
    saved(model, directory, state, **options)


def in_one_storage_older_than_zip(model, directory):
    in_one_storage(model, directory, _use_new_zipfile_serialization=False)


def in_slices(model, directory):
    """Every second element of a storage twice as large."""
    state = {name: torch.stack([value, value + 1], -1)[..., 0] for name, value in model.state_dict().items()}
    saved(model, directory, state, _use_new_zipfile_serialization=False)


WAYS = [in_one_safetensors, in_safetensors_shards, in_one_bin, in_bin_shards, in_a_bin_older_than_zip,
        in_a_trainers_bin, in_a_checkpoint_of_a_training, in_columns, in_one_storage, in_one_storage_older_than_zip,
        in_slices]


@pytest.mark.parametrize("more", ["state_dict", "ema"])
def test_of_two_sets_of_weights_none_is_guessed(more, torch_model, tmp_path, convert):
    model = torch_model("GPTJForCausalLM")
    tensors = model.state_dict()
    saved(model, tmp_path, {"model": tensors, more: tensors if more == "state_dict" else torch.ones(3)})
    run = convert(tmp_path)
    assert run.code == 2 and not run.output.exists()
    assert "holds weights under" in run.stderr and "model" in run.stderr and more in run.stderr


@pytest.fixture
def sources(torch_model, tmp_path):
    def make(head):
        directories = [tmp_path / way.__name__ for way in WAYS]
        for way, directory in zip(WAYS, directories, strict=True):
            directory.mkdir()
            way(torch_model(head), directory)
        return directories
    return make


@pytest.mark.parametrize("head", ["GPTJForCausalLM", "BertForPreTraining"])
def test_every_way_gives_the_same_bytes(head, sources, convert):
    runs = {source.name: convert(source, output=f"out/{source.name}") for source in sources(head)}
    assert {name: run.stderr for name, run in runs.items() if run.code} == {}
    assert len({run.weights for run in runs.values()}) == 1
    assert len({run.report["target_digest"] for run in runs.values()}) == 1


def test_neither_torch_nor_paddle_is_imported(sources, workdir):
    """In a process of its own, because this one has them all."""
    program = """
import sys
from convert.cli import main
from convert.gptj import FAMILY
for source in sys.argv[1:]:
    for form in ("safetensors", "pdparams"):
        name = source.rsplit("/", 1)[-1]
        assert main(FAMILY, ["--source", source, "--format", form, "--output", f"out/{form}-{name}"]) == 0
print(sorted({"torch", "paddle", "transformers", "paddlenlp", "safetensors"} & sys.modules.keys()))
"""
    arguments = [sys.executable, "-c", program, *map(str, sources("GPTJForCausalLM"))]
    result = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_help_imports_no_numpy():
    program = """
import sys
from convert.cli import main
from convert.gptj import FAMILY
try:
    main(FAMILY, ["--help"])
finally:
    print(sorted({"numpy", "torch", "paddle", "rich", "huggingface_hub"} & sys.modules.keys()))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_one_file_with_its_config_beside_it(name, checkpoint, torch_model, convert):
    source = checkpoint()
    torch.save(torch_model("GPTJForCausalLM").state_dict(), source / "pytorch_model.bin")
    run = convert(source / name, output="out/file")
    assert run.code == 0, run.stderr
    assert run.weights == convert(source, output="out/directory").weights


def test_safetensors_come_before_bin(checkpoint, convert):
    source = checkpoint()
    (source / "pytorch_model.bin").write_bytes(b"nonsense")
    assert convert(source).code == 0


@pytest.mark.parametrize("head,listed", [("GPTJForCausalLM", "GPTJModel"), ("GPTJModel", "GPTJForCausalLM"),
                                         ("BertModel", "BertForMaskedLM"), ("BertForPreTraining", None)])
def test_the_tensors_are_believed_where_the_config_names_another_head(head, listed, checkpoint, convert):
    source = checkpoint(head)
    config = json.loads((source / "config.json").read_text())
    config["architectures"] = listed and [listed]
    (source / "config.json").write_text(json.dumps(config))
    run = convert(source)
    assert run.code == 0, run.stderr
    assert run.config["architectures"] == [head] and run.report["head"] == head
    assert any(head in note for note in run.report["notes"])


def test_a_base_model_saved_with_the_prefix_of_its_heads(checkpoint, torch_model, convert):
    source, state = checkpoint("GPTJModel"), torch_model("GPTJModel").state_dict()
    plain = convert(source, output="out/plain")
    save_file({f"transformer.{name}": value for name, value in state.items()}, source / "model.safetensors")
    prefixed = convert(source, output="out/prefixed")
    assert prefixed.code == 0, prefixed.stderr
    assert prefixed.weights == plain.weights


def test_tied_copies_are_compared_piece_by_piece_in_whatever_order_they_lie(torch_model, tmp_path, convert,
                                                                            monkeypatch):
    monkeypatch.setattr("convert.stream.CHUNK", 64)
    model = torch_model("BertForPreTraining")
    state = dict(model.state_dict())
    embedding = state["bert.embeddings.word_embeddings.weight"]
    state["bert.embeddings.word_embeddings.weight"] = embedding.t().contiguous().t()
    state["cls.predictions.decoder.weight"] = embedding.clone()
    saved(model, tmp_path / "source", state)
    run = convert(tmp_path / "source")
    assert run.code == 0, run.stderr
