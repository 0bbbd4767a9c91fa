"""``python -m align.survey`` on one case: its row, where the table goes, and what is refused."""

import pytest
from conftest import call

from align import survey
from convert.__main__ import family_named

CASE = next(survey.cases(["gptj"]))
README = f"before\n{survey.BEGIN}\nold table\n{survey.END}\nafter\n"
ROW = ["gptj", "`GPTJForCausalLM`", "", "ok", "ok", "ok", "**diverged**", "ok"]


def test_a_row_and_its_place_in_the_readme(workdir, monkeypatch):
    monkeypatch.setattr(survey, "cases", lambda names: iter([CASE] * (list(names) == ["gptj"])))
    readme = workdir / "README.md"
    readme.write_text(README, "utf-8")
    code, told, said = call(survey.main, ["--family", "gptj", "--readme", str(readme)])
    assert (code, said) == (0, "[1 of 1] GPTJForCausalLM: not right\n")
    titles, _, row, _, right = told.splitlines()[:5]
    assert titles.split(" | ")[3:8] == ["weights", "forward", "metric", "loss", "ours"]
    *cells, why = row.removeprefix("| ").removesuffix(" |").split(" | ")
    assert cells == ROW
    assert why.startswith("loss: ") and "divided by all positions" in why and "<br>" not in why
    assert right.startswith("0 of 1 are right in every stage.")
    assert readme.read_text("utf-8") == f"before\n{survey.BEGIN}\n{told.rstrip()}\n{survey.END}\nafter\n"


def test_every_head_that_paddlenlp_has_and_every_variant_is_a_case():
    family = family_named("bloom")
    found = [(case.head.architecture, case.variant) for case in survey.cases(["bloom"])]
    assert found == [(head.architecture, "") for head in family.heads if head.paddlenlp] + [
        (family.demo["architectures"][0], variant) for variant in family.variants]


@pytest.mark.parametrize("text", ["no markers\n", f"{survey.BEGIN}\n", f"{survey.END}\n",
                                  f"{survey.END}\n{survey.BEGIN}\n"])
def test_a_readme_without_markers_is_refused_before_anything_is_run(text, workdir, monkeypatch):
    monkeypatch.setattr(survey, "survey", lambda case: pytest.fail("a case was run"))
    readme = workdir / "README.md"
    readme.write_text(text, "utf-8")
    code, told, said = call(survey.main, ["--family", "gptj", "--readme", str(readme)])
    assert (code, told) == (2, "")
    assert said.startswith(f"error: {readme} has no <!-- paddlenlp -->") and said.count("\n") == 1
    assert readme.read_text("utf-8") == text


def test_a_readme_that_is_not_there_is_refused_before_anything_is_run(workdir, monkeypatch):
    monkeypatch.setattr(survey, "survey", lambda case: pytest.fail("a case was run"))
    code, told, said = call(survey.main, ["--family", "gptj", "--readme", "none.md"])
    assert (code, told) == (2, "") and said.startswith("error: --readme none.md does not exist.")
