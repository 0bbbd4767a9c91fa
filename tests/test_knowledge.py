"""What is known of a family is in its two files: nothing in what families share, nothing in another family's file."""

import ast
import re
from pathlib import Path

import pytest

import convert
from convert.__main__ import families, family_named

ROOT = Path(convert.__file__).parents[1]
EXEMPT = {
    "align/example.py": "makes the three runs of reports/example, which are of GPT-J and of GPT-2",
    "align/pipelines/mistakes.py": "what the tokenizers library calls its normalizer of lower case and accents",
    "align/faults": "the faults that are planted, family by family",
    "convert/remote": "a torch net for the checkpoints of ChatGLM's demo to bring along; data, found by its name",
    "convert/custom.py": "home-made GPT-2s are GPT-2s: their Paddle side is its net",
    "convert/demo.py": "transformers' names for kinds of tokenizers, which several families share",
}
EXAMPLES = re.compile(r"python -m convert\.\w+|convert/\w+\.py|--source out/\w+|[\w-]+/gpt-j-6b|\*/\w+/net\*|"
                      r"head=\"\w+\"")
"""In what is said to the user: a command, a file, a hub id, a pattern and an argument as examples."""


def words_of(name):
    """The words by which a family goes in code: its name, its model type, and what its classes begin with."""
    family = family_named(name)
    classes = {word for head in family.heads for word in (head.architecture, head.paddlenlp) if word}
    stems = {re.match(r"[A-Z][A-Za-z]*?\d?(?=For|LMHead|Model|Encoder|$)", word).group() for word in classes}
    others = [other for other in families() if other != name]
    return {word for word in {name, family.model_type or name, *stems}
            if not any(other.startswith(word.lower()) for other in others)}


def paths_of(name):
    """The last two words of the paths by which it calls its sublayers in torch."""
    family = family_named(name)
    inside = [path for parts in family.inside_of(family.demo).values() for path, _, _ in parts]
    found = {".".join(path.split(".")[-2:]) for path in inside if "." in path}
    return {path for path in found if not re.search(r"\d", path)}


def pattern_of(name):
    """Within words too, as in ``_gptj`` and ``BertLayer``, but not behind letters, as in RoBERTa and adopted; before
    lower-case letters, as in option, only a word of four letters or more.
    """
    return re.compile("|".join(
        rf"(?<![A-Za-z])(?i:{re.escape(word)})" + ("(?![a-z])" if len(word) < 4 else "") for word in words_of(name)))


WORDS = {name: pattern_of(name) for name in families()}
PATHS = {name: re.compile("|".join(rf"\b{re.escape(path)}\b" for path in paths_of(name)) or r"(?!)")
         for name in families()}
"""Two families may call a sublayer alike, but what they share may not call it so."""
SHARED = [file for package in ("align", "convert", "models") for file in sorted(ROOT.glob(f"{package}/**/*.py"))
          if not any(str(file.relative_to(ROOT)).startswith(prefix) for prefix in EXEMPT)
          and not (file.parent.name in ("convert", "models") and file.stem in families())]


def said_in(source):
    """(line, text) of every name and text of a program, but for what explains it to its readers."""
    tree = ast.parse(source)
    told = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        texts = [getattr(node, field) for field in ("id", "attr", "name", "module", "arg", "asname")
                 if isinstance(getattr(node, field, None), str)]
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in told:
            texts.append(EXAMPLES.sub("", node.value))
        yield from ((getattr(node, "lineno", 0), text) for text in texts)


def found_in(source, names, *patterns):
    return [f"line {line}: {text!r} is {name}'s" for line, text in said_in(source) for name in names
            for pattern in patterns if pattern[name].search(text)]


@pytest.mark.parametrize("file", SHARED, ids=lambda file: str(file.relative_to(ROOT)))
def test_what_families_share_names_none(file):
    assert found_in(file.read_text("utf-8"), families(), WORDS, PATHS) == []


@pytest.mark.parametrize("package", ["convert", "models"])
@pytest.mark.parametrize("name", families())
def test_a_familys_file_names_no_other(name, package):
    others = [other for other in families() if other != name]
    assert found_in((ROOT / package / f"{name}.py").read_text("utf-8"), others, WORDS) == []


@pytest.mark.parametrize("source", [
    "from convert.chatglm import MARKS", "from convert import t5", "UNSCALED = {'T5Attention'}",
    "x = type(module).__name__ == 'BloomGelu'", "def _gptj(mix): ...", "PLACEMENTS = {'BertLayer': ()}",
    "model.opt.decoder", "OPTForCausalLM", "x = 'opt.embeddings'",
    "x = {'attention.output.dense'}", "x = 'SelfAttention.o'", "x = 'attn.c_attn'", "{'GPT2Block': ()}",
    "run(resnet=1)"])
def test_they_would_be_found(source):
    assert found_in(source, families(), WORDS, PATHS)


@pytest.mark.parametrize("source", ["options.option", "adopted", "x = 'as RoBERTa counts'", "gpt", "x = 'out_proj'"])
def test_other_words_are_free(source):
    assert not found_in(source, families(), WORDS, PATHS)


def test_every_exemption_is_needed():
    for prefix in EXEMPT:
        files = [file for file in ROOT.glob("**/*.py") if str(file.relative_to(ROOT)).startswith(prefix)]
        assert any(found_in(file.read_text("utf-8"), families(), WORDS) for file in files), prefix
