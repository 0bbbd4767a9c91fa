"""Code that a checkpoint brings along is run by nobody who has not asked for it."""

import builtins
import json

import pytest

from align.pictures import load_processor
from align.texts import load_tokenizer
from convert.errors import BadInput


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """(directory, marker): a checkpoint whose own code leaves a marker; whoever asks the user is told yes."""
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    marker = tmp_path / "the-code-ran"
    directory = tmp_path / "trap"
    directory.mkdir()
    (directory / "vocab.json").write_text("{}")
    (directory / "trap.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Trap: pass\n")
    (directory / "config.json").write_text(json.dumps(
        {"model_type": "trap", "auto_map": {"AutoConfig": "trap.Trap", "AutoModel": "trap.Trap"}}))
    (directory / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "Trap", "auto_map": {"AutoTokenizer": ["trap.Trap", None]}}))
    (directory / "preprocessor_config.json").write_text(json.dumps({"auto_map": {"AutoImageProcessor": "trap.Trap"}}))
    return directory, marker


@pytest.mark.parametrize("name", ["AutoTokenizer", "AutoImageProcessor"])
def test_the_trap_works(trap, name):
    """transformers asks where it is told neither yes nor no, and runs the code on a y."""
    import transformers
    directory, marker = trap
    with pytest.raises(Exception):  # noqa: B017 (the trap is neither; it has run by then)
        getattr(transformers, name).from_pretrained(directory)
    assert marker.exists()


def test_a_tokenizer_of_the_checkpoints_own_is_not_run(trap):
    directory, marker = trap
    with pytest.raises(BadInput, match="tokenizer"):
        load_tokenizer(directory)
    assert not marker.exists()


def test_an_image_processor_of_the_checkpoints_own_is_not_run(trap):
    directory, marker = trap
    with pytest.raises(BadInput, match=r"preprocessor_config\.json"):
        load_processor(directory, 3)
    assert not marker.exists()
