"""``--dataset``: files of the user's own."""

import csv
import json

import datasets
import pytest
from align_fixtures import Workshop, all_aligned

ROWS = [{"text": f"row {number}, with a comma", "label": number % 2, "next": f"the next of {number}", "follows": True,
         "question": "which row?", "answer": f"row {number}", "names": ["row"]} for number in range(5)]
HEADS = ("GPTJForCausalLM", "BertForSequenceClassification", "BertForQuestionAnswering", "BertForTokenClassification",
         "BertForPreTraining", "BertModel")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    workshop = Workshop(tmp_path_factory.mktemp("datasets"))
    for head in HEADS:
        workshop.make(head, tokenizer=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", workshop.root / "cache")
        yield workshop


def write(workshop, name, rows):
    file = workshop.root / name
    if file.suffix == ".jsonl":
        file.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    else:
        with file.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, rows[0], delimiter="\t" if file.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return str(file)


def metric(workshop, head, rows, *flags, name="rows.jsonl"):
    return workshop.align("metric", head, "--dataset", write(workshop, name, rows), *flags)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.tsv"])
@pytest.mark.parametrize("head", HEADS[:3])
def test_a_local_file(workshop, head, name):
    outcome = metric(workshop, head, ROWS, name=name)
    assert all_aligned({"metric": outcome})
    assert any(f"5 rows of {workshop.root / name}" in note for note in outcome.report["notes"])


@pytest.mark.parametrize("head", HEADS)
def test_the_file_is_what_is_evaluated_whatever_its_format(workshop, head):
    one, two = metric(workshop, head, ROWS), metric(workshop, head, ROWS[:2])
    assert one.report["inputs_digest"] != two.report["inputs_digest"]
    assert one.code == two.code == 0


def test_a_csv_and_a_jsonl_of_the_same_rows_are_the_same_inputs(workshop):
    outcomes = [metric(workshop, "GPTJForCausalLM", ROWS, name=name) for name in ("a.jsonl", "a.csv", "a.tsv")]
    assert len({outcome.report["inputs_digest"] for outcome in outcomes}) == 1


def test_columns_of_other_names_are_renamed(workshop):
    theirs = [{"sentence": row["text"], "stars": row["label"]} for row in ROWS]
    ours, named = (metric(workshop, "BertForSequenceClassification", rows, *flags) for rows, flags in (
        (ROWS, ()), (theirs, ("--columns", "text=sentence,label=stars"))))
    assert named.code == 0
    assert named.report["inputs_digest"] == ours.report["inputs_digest"]


def test_limit_takes_the_first_rows_and_batches_do_not_matter(workshop):
    limited = metric(workshop, "BertForSequenceClassification", ROWS, "--limit", "3", "--batch-size", "2")
    assert limited.report["values"] == metric(workshop, "BertForSequenceClassification", ROWS[:3]).report["values"]


def test_rows_without_a_token_are_left_out_and_counted(workshop):
    outcome = metric(workshop, "GPTJForCausalLM", [*ROWS, {**ROWS[0], "text": ""}])
    assert outcome.code == 0
    assert "1 rows without a single token were left out." in outcome.report["notes"]


@pytest.mark.parametrize("answer", ["not in the text", ""])
def test_a_question_without_an_answer_is_never_matched(workshop, answer):
    outcome = metric(workshop, "BertForQuestionAnswering", [{**row, "answer": answer} for row in ROWS])
    assert outcome.report["values"] == {name: {"reference": 0.0, "candidate": 0.0} for name in ("exact_match", "f1")}


@pytest.mark.parametrize("head, spoilt, told", [
    ("GPTJForCausalLM", {"text": None}, "row 4 of the data set has text = None; a text is needed"),
    ("GPTJForCausalLM", {"text": 5}, "a text is needed"),
    ("BertForSequenceClassification", {"label": "good"}, "label = 'good'; a whole number is needed"),
    ("BertForSequenceClassification", {"label": None}, "a whole number is needed"),
    ("BertForQuestionAnswering", {"answer": None}, "a text is needed"),
    ("BertForTokenClassification", {"names": "row"}, "a list is needed"),
    ("BertForPreTraining", {"follows": "yes"}, "true or false is needed"),
    ("BertForPreTraining", {"next": None}, "a text is needed"),
])
def test_a_row_of_another_kind_is_named(workshop, head, spoilt, told):
    outcome = metric(workshop, head, [*(ROWS[:4] if None in spoilt.values() else []), {**ROWS[4], **spoilt}])
    assert outcome.code == 2 and told in outcome.stderr and outcome.report == {}


@pytest.mark.parametrize("head, rows, told", [
    ("BertForSequenceClassification", [{"text": "x"}], "the column label is needed; the set has text"),
    ("BertForPreTraining", [{"text": "x"}], "the columns next, follows are needed; the set has text. If it has what is "
     "meant under another name: --columns next=NAME,follows=NAME"),
    ("BertModel", ROWS[:1], "nothing to score"),
    ("GPTJForCausalLM", [{"text": "x"}], "nothing to score"),
    ("GPTJForCausalLM", [{"text": ""}], "nothing to score"),
    ("BertForQuestionAnswering", [{**ROWS[0], "text": ""}], "no token for an answer to lie in"),
])
def test_a_set_with_nothing_to_score_is_refused(workshop, head, rows, told):
    outcome = metric(workshop, head, rows)
    assert outcome.code == 2 and told in outcome.stderr and outcome.report == {}


def test_a_file_that_is_no_data_is_refused(workshop):
    (workshop.root / "broken.jsonl").write_text("{")
    outcome = workshop.align("metric", "BertModel", "--dataset", str(workshop.root / "broken.jsonl"))
    assert outcome.code == 2 and "cannot be loaded" in outcome.stderr and "DatasetGeneration" not in outcome.stderr
    (workshop.root / "empty.txt").touch()
    outcome = workshop.align("metric", "BertModel", "--dataset", str(workshop.root / "empty.txt"))
    assert outcome.code == 2 and "is empty. Give a file with at least one row" in outcome.stderr
    (workshop.root / "notes.md").write_text("text")
    outcome = workshop.align("metric", "BertModel", "--dataset", str(workshop.root / "notes.md"))
    assert outcome.code == 2 and "is a file of no kind that is read" in outcome.stderr and ".jsonl" in outcome.stderr
