"""The page of a run: what it says, in which order, and that nothing in a report can break out of it."""

import copy
import json
import re
from html.parser import HTMLParser

import pytest
from conftest import call

import align.page
from align.page import main, number, write_page
from convert.errors import BadInput

HOSTILE = "</code><script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)>$\\frac{<blink>&\"'"
VOID = {"meta", "link", "col", "wbr", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Tags with attributes and places, text by enclosing tags, and what was left open."""

    def __init__(self, text):
        super().__init__()
        self.source, self.tags, self.texts, self.open, self.badly_nested = text, [], [], [], []
        self.lines = [0, *(found.end() for found in re.finditer("\n", text))]
        self.feed(text)
        self.close()
        self.text = " ".join("".join(found for _, found in self.texts).split())

    def handle_starttag(self, tag, attrs):
        line, column = self.getpos()
        self.tags.append((tag, dict(attrs), self.lines[line - 1] + column))
        if tag not in VOID:
            self.open.append(tag)
        if tag not in ("wbr", "code"):
            self.texts.append(((), " "))

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open[-1:] = [] if tag not in VOID else self.open[-1:]

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.badly_nested.append((tag, self.getpos()))

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append((tuple(self.open), data))

    def names(self):
        return {tag for tag, _, _ in self.tags}

    def first(self, tag):
        return next(place for found, _, place in self.tags if found == tag)

    def rows(self):
        """The text of every table row's cells."""
        found = []
        for row in re.findall(r"<tr.*?</tr>", self.source, re.DOTALL):
            cells = re.findall(r"<t[dh].*?</t[dh]>", row, re.DOTALL)
            found.append([" ".join(Page(cell).text.split()) for cell in cells])
        return found


def tensor(name, error=1e-7, allowed=1e-6, passed=True, isolated=None, **more):
    measures = {"max_abs": error, "mean_abs": error, "rel_l2": error, "cosine": 1.0}
    alone = None if isolated is None else {**measures, "rel_l2": isolated}
    return {"name": name, "shape": [2, 3], "dtype": "float32", **measures, "isolated": alone, "allowed": allowed,
            "floor": None, "judgements": [], "passed": passed, "failure": None if passed else f"{name}: fails", **more}


def judged(name, error=2e-7, passed=True, isolated=1e-7, ratio=1.0, limit=6.0):
    tests = [{"kind": kind, "test": "total", "ratio": found, "limit": limit, "passed": passed or kind == "isolated"}
             for kind, found in (("propagated", ratio), ("isolated", 0.5))]
    return tensor(name, error, 1e-6, passed, isolated, floor=1.5e-7, judgements=tests)


def stage(name, *tensors, **more):
    failing = [found["name"] for found in tensors if not found["passed"]]
    return {"schema": "paddle-parity/1", "run": "r", "family": "bert", "head": "BertModel", "stage": name,
            "target": "models", "verdict": "diverged" if failing else "aligned",
            "first_divergence": failing[0] if failing else None, "tensors": list(tensors), "values": {},
            "reference": {"framework": "torch", "version": "2.9", "weights_digest": "aa11"},
            "candidate": {"framework": "paddle", "version": "3.3", "weights_digest": "bb22"},
            "failures": [found["failure"] for found in tensors if found["failure"]],
            "inputs_digest": f"inputs-of-{name}", "notes": [], "seconds": 1.5, "peak_rss_bytes": 2_000_000, **more}


def move(target, shape, transposed=False, rule="keep", source=None, filling=None):
    return {"source": None if rule == "buffer" else source or target, "target": target, "rule": rule, "shape": shape,
            "dtype": "float32", "transposed": transposed, "filling": filling}


def conversion(*moves, **more):
    return {"schema": "paddle-parity/1", "run": "r", "family": "bert", "head": "BertModel", "stage": "convert",
            "source": "some/source", "path": "some/source", "revision": None, "output": "out/r", "dtype": "keep",
            "format": "safetensors", "files": ["model.safetensors"], "tensors": list(moves), "dropped": [],
            "verified": True, "bytes": 1234, "source_digest": "aa11", "target_digest": "cc33", "seconds": 0.5,
            "peak_rss_bytes": 3_000_000, "versions": {"numpy": "1.26.4"}, "notes": [],
            "finished": "2026-01-01T00:00:00+00:00", **more}


def forward(*failing):
    names = ("bert.embeddings", *(f"bert.encoder.layers.{layer}" for layer in range(4)), "logits")
    return stage("forward", *(judged(name, 1e-2 if name in failing else 2e-7, name not in failing) for name in names))


def complete():
    return {
        "convert": conversion(
            move("embeddings.weight", [9, 4]),
            *(move(f"layers.{layer}.q.weight", [4, 4], True, "linear") for layer in range(3)),
            move("layers.0.causal", [1, 1], rule="buffer", filling="lower triangle of ones"),
            dropped=[{"source": "position_ids", "why": "counted by Paddle itself"}]),
        "weights": stage("weights", tensor("embeddings.weight", 0.0, 0.0)),
        "forward": forward(),
        "metric": stage("metric", tensor("predictions", 0.0, 0.0),
                        values={"accuracy": {"reference": 0.75, "candidate": 0.75}}),
        "loss": stage("loss", tensor("loss.plain", 2e-8)),
    }


@pytest.fixture(scope="module", autouse=True)
def charts_once():
    """Every chart is drawn for real, equal ones once."""
    drawn, draw = {}, align.page._charts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(align.page, "_charts", lambda found: drawn.get(key := repr(found.depth))
                      or drawn.setdefault(key, draw(found)))
        yield


@pytest.fixture
def page(tmp_path):
    """``page(reports)``: the page made of ``<stage>.json`` files; a text is written as it is."""
    def make(reports, directory=tmp_path / "reports" / "r"):
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in reports.items():
            text = content if isinstance(content, str) else json.dumps(content)
            (directory / f"{name}.json").write_text(text, "utf-8")
        written = write_page(directory)
        assert written == directory / "index.html"
        return Page(written.read_text("utf-8"))
    return make


def word(page):
    return next(text for tags, text in page.texts if tags[-1:] == ("strong",))


def test_every_stage_is_a_row_with_its_verdict_in_the_guides_order(page):
    made = page(complete())
    rows = [row for row in made.rows() if len(row) == 5][1:6]
    assert [row[0] for row in rows] == ["convert", "weights", "forward", "metric", "loss"]
    assert [row[1] for row in rows] == ["bit-exact", *["aligned"] * 4]
    assert [row[4] for row in rows] == ["0.5 s", *["1.5 s"] * 4]
    assert word(made) == "Aligned" and "Not run" not in made.text
    assert not made.badly_nested and not made.open


def test_later_and_unknown_stages_are_shown_too(page):
    reports = {**complete(), "backward": stage("backward", tensor("gradient")), "zebra": stage("zebra", tensor("z"))}
    rows = [row[0] for row in page(reports).rows() if len(row) == 5]
    assert rows[1:8] == ["convert", "weights", "forward", "metric", "loss", "backward", "zebra"]


def test_the_page_needs_no_network_and_no_other_file(page):
    made = page({**complete(), "forward": forward("bert.encoder.layers.2")})
    assert "http://" not in made.source and "https://" not in made.source and "url(http" not in made.source
    assert "@import" not in made.source
    assert not made.names() & {"script", "iframe", "object", "embed", "base"}
    for tag, attributes, _ in made.tags:
        for name in ("src", "href", "xlink:href", "srcset", "action", "poster"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes)
        assert not [name for name in attributes if name.startswith("on")]
    for reference in re.findall(r"url\(([^)]*)\)", made.source):
        assert reference.startswith("#")


def test_ids_are_unique_and_links_lead_somewhere(page):
    made = page({**complete(), "forward": forward("logits")})
    ids = [attributes["id"] for _, attributes, _ in made.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = {attributes["href"][1:] for _, attributes, _ in made.tags if attributes.get("href", "").startswith("#")}
    links |= set(re.findall(r"url\(#([^)]*)\)", made.source))
    assert links and links <= set(ids)


def hostile(value):
    """Every string of ``value`` that is not a word of the interface, replaced."""
    if isinstance(value, dict):
        return {name: found if name in ("schema", "verdict") else hostile(found) for name, found in value.items()}
    if isinstance(value, list):
        return [hostile(found) for found in value]
    return HOSTILE if isinstance(value, str) else value


def test_hostile_strings_stay_text(page):
    reports = complete()
    reports["forward"] = {**forward("logits"), "notes": ["n"], "named": "n", "diagnosis": {
        "sentence": "s", "kind": "k", "subject": "s", "before": 1.0, "after": 0.5,
        "sublayers": [{"name": "q", "rel_l2": 1.0, "allowed": 0.1, "passed": False}]}}
    benign = page(reports)
    made = page({name: hostile(copy.deepcopy(content)) for name, content in reports.items()})
    assert not made.names() & {"script", "img", "blink"}
    assert made.names() <= benign.names() | {"wbr"}
    assert not [name for _, attributes, _ in made.tags for name in attributes if name.startswith("on")]
    assert not made.badly_nested and not made.open
    assert "<script>alert(1)</script>" in made.text


def test_a_hostile_name_without_spaces_reaches_the_chart_as_text(page):
    name = "</text><script>alert(1)</script>$x_{--><!--"
    made = page({"forward": stage("forward", judged("a.b"), judged(name), judged("\u202e\x00\ud800\u4e2d"))})
    assert "svg" in made.names() and "script" not in made.names() and not made.badly_nested
    assert any("script" in text for tags, text in made.texts if tags[-1:] == ("text",))


def test_a_diverged_run_names_its_first_divergence_before_any_table(page):
    made = page({**complete(), "forward": forward("bert.encoder.layers.2", "bert.encoder.layers.3")})
    assert word(made) == "Diverged"
    head = Page(made.source[: made.first("table")]).text
    assert "First divergence: bert.encoder.layers.2, in the forward stage" in head
    assert "bert.encoder.layers.2: fails" in head
    assert "diverged" in next(text for tags, text in made.texts if tags[-1:] == ("title",))


def test_the_earliest_stage_says_what_diverged_first(page):
    weights = stage("weights", tensor("q.weight", 1.0, 0.0, False))
    made = page({**complete(), "weights": weights, "forward": forward("logits")})
    assert "First divergence: q.weight, in the weights stage" in made.text
    assert "Stages that diverge: weights, forward. Stages that agree: metric, loss." in made.text


def test_a_stage_that_diverges_by_its_weights_alone_is_diverged(page):
    reports = {**complete(), "loss": {**complete()["loss"], "verdict": "diverged", "first_divergence": "q.weight"}}
    assert word(page(reports)) == "Diverged"


def names_of(page, stage_name):
    """The names of a stage's tensor tables, from top to bottom."""
    start = re.search(rf"<h3[^>]*>{stage_name} ", page.source).start()
    end = page.source.find("<h3", start + 1)
    part = page.source[start: end if end > 0 else None]
    return ["".join(re.findall(r"[^<>]+(?=<|$)", re.sub(r"<[^>]*>", "", cell)))
            for cell in re.findall(r'<td class="name"><code>(.*?)</code>', part)]


def test_tensors_are_listed_worst_first(page):
    tensors = [tensor("fine", 1e-8), tensor("broken", 5e-6, passed=False), tensor("tight", 9e-7),
               tensor("equal", 0.0, 0.0), tensor("shattered", 1.0, passed=False),
               {**tensor("incomparable", None, passed=False), "cosine": None}]
    made = page({"forward": stage("forward", *tensors)})
    assert names_of(made, "forward") == ["incomparable", "shattered", "broken", "tight", "fine", "equal"]


def test_a_ratio_near_its_limit_counts_for_the_order_and_an_infinite_one_leads(page):
    tensors = [judged("calm", ratio=1.0), judged("near", ratio=5.9), judged("endless", passed=False, ratio=None),
               judged("over", passed=False, ratio=60.0)]
    made = page({"forward": stage("forward", *tensors)})
    assert names_of(made, "forward") == ["endless", "over", "near", "calm"]
    assert any("∞ / 6" in cell for row in made.rows() for cell in row)


def test_only_what_fails_is_unfolded(page):
    made = page({**complete(), "forward": forward("logits")})
    opened = [attributes for tag, attributes, _ in made.tags if tag == "details" and "open" in attributes]
    assert len(opened) == 1
    assert "1 tensor fails" in made.text and "5 tensors agree" in made.text


def test_the_chart_has_a_place_for_every_module_and_marks_the_failing(page):
    made = page({"forward": forward("bert.encoder.layers.2")})
    labels = [text for tags, text in made.texts if tags[-1:] == ("text",)]
    for name in ("embeddings", "layers.0", "layers.1", "layers.2", "layers.3", "logits"):
        assert labels.count(name) == 2, "once in the wide chart, once in the narrow one"
    styles = {text: attributes["style"] for (tag, attributes, _), text in
              zip([found for found in made.tags if found[0] == "text"], labels, strict=True)}
    assert "var(--bad)" in styles["layers.2"] and "var(--bad)" not in styles["layers.1"]
    assert "prefers-color-scheme: dark" in made.source and not re.search(r"#01010[0-9]", made.source)


@pytest.mark.parametrize("tensors", [
    [judged("a", 0.0, isolated=0.0), judged("b", 0.0, isolated=0.0)],
    [judged("a"), {**judged("b", None, False, None), "cosine": None}, judged("c", 1e300, False)],
    [tensor("a", isolated=1e-7), tensor("b", isolated=2e-7)],
    [{**judged("a"), "allowed": 0.0, "floor": 0.0}, judged("b", 5e-324)],
    [judged(f"h.{layer}") for layer in range(70)],
], ids=["all equal", "not comparable and huge", "no floor", "exact and denormal", "70 blocks"])
def test_charts_of_strange_figures(page, tensors):
    made = page({"forward": stage("forward", *tensors)})
    assert "svg" in made.names() and not made.badly_nested
    coordinates = " ".join(attributes.get("d") or "" for tag, attributes, _ in made.tags if tag == "path")
    assert "nan" not in coordinates and "inf" not in coordinates


def test_an_error_that_comes_from_before_is_told_from_ones_own(page):
    own = {**judged("own", 1e-2, False, isolated=1e-2)}
    own["judgements"][1]["passed"] = False
    made = page({"forward": stage("forward", own, judged("behind", 1e-2, False, isolated=1e-7))})
    verdicts = {row[1].split()[0]: row[-1] for row in made.rows() if len(row) > 8 and row[0].isdecimal()}
    assert verdicts == {"own": "fails", "behind": "fails inherited"}


def test_the_diagnosis_and_its_figures(page):
    found = {"sentence": "q is transposed.", "kind": "transposed", "subject": "q.weight", "before": 3.14e-2,
             "after": 4.2e-7, "sublayers": [{"name": "logits.q", "rel_l2": 3.14e-2, "allowed": 2e-6, "passed": False},
                                            {"name": "logits.k", "rel_l2": 1e-7, "allowed": 2e-6, "passed": True},
                                            {"name": "bert.k", "rel_l2": 1e-7, "allowed": 2e-6, "passed": True}]}
    made = page({"forward": {**forward("logits"), "diagnosis": found}})
    head = Page(made.source[: made.first("table")]).text
    assert "q is transposed." in head
    assert "error as it is 3.1e-2" in made.text and "error once undone 4.2e-7" in made.text
    assert ["logits.q", "3.1e-2", "–", "2.0e-6", "fails"] in made.rows()
    assert ["logits.k", "1.0e-7", "–", "2.0e-6", "ok"] in made.rows()
    assert "bert.k" not in made.text


@pytest.mark.parametrize("found", [{"sentence": "No explanation fits."}, {"kind": "scale", "sublayers": []},
                                   {"before": "much", "after": None, "sublayers": [3, {"name": "q"}]}])
def test_a_diagnosis_may_lack_any_of_its_parts(page, found):
    made = page({"forward": {**forward("logits"), "diagnosis": found}})
    assert "Why it diverged" in made.text and not made.badly_nested


def test_sublayers_and_the_named_one_without_a_diagnosis(page):
    layers = [judged("logits.q"), judged("logits.k", 1e-2, False)]
    made = page({"forward": {**forward("logits"), "named": "logits.decoder", "sublayers": layers}})
    assert "logits.decoder" in Page(made.source[: made.first("table")]).text
    assert ["logits.q", "2.0e-7", "1.5e-7", "1.0e-6", "ok"] in made.rows()


@pytest.mark.parametrize("layers", [[], [judged("logits.q")]])
def test_without_a_divergence_there_is_nothing_to_explain(page, layers):
    made = page({**complete(), "forward": {**forward(), "named": None, "sublayers": layers}})
    assert "Why it diverged" not in made.text


def test_the_plan(page):
    rows = page(complete()).rows()
    assert ["layers.{i}.q.weight", "same name", "yes", "[4, 4]", "float32", "0–2"] in rows
    assert ["embeddings.weight", "[9, 4]", "–"] in rows, "two dimensions, not transposed"
    assert not [row for row in rows if row[0] == "layers.{i}.q.weight" and len(row) == 3]
    assert ["layers.{i}.causal", "[1, 1]", "lower triangle of ones", "0"] in rows
    assert ["position_ids", "counted by Paddle itself"] in rows
    assert ["layers.2.q.weight", "layers.2.q.weight", "linear", "yes", "[4, 4]"] in rows


def test_layers_that_move_elsewhere_are_not_folded_into_one_row(page):
    moves = [move(f"layers.{layer}.w", [4], source=f"layers.{1 - layer}.w") for layer in range(2)]
    rows = page({"convert": conversion(*moves), "forward": forward()}).rows()
    assert ["layers.1.w", "layers.0.w", "–", "[4]", "float32", "–"] in rows
    assert ["layers.0.w", "layers.1.w", "–", "[4]", "float32", "–"] in rows


def test_provenance(page):
    text = page(complete()).text
    for fact in ("some/source", "aa11", "cc33", "bb22", "torch 2.9", "paddle 3.3", "inputs-of-forward", "2 MB", "3 MB",
                 "1,234 bytes", "numpy 1.26.4"):
        assert fact in text, fact


def test_what_was_not_run_is_said(page):
    made = page({"convert": conversion(), "forward": forward()})
    assert word(made) != "Aligned" and "Not run: weights, metric, loss." in made.text


@pytest.mark.parametrize(("reports", "says"), [
    ({"convert": conversion()}, "no stage has compared it"),
    ({"forward": "{", "weights": complete()["weights"]}, "forward.json cannot be read"),
    ({"forward": {**forward(), "schema": "paddle-parity/0"}, "loss": complete()["loss"]}, "not a report of schema"),
    ({"forward": {**forward(), "verdict": "fine"}}, "forward.json has no verdict"),
    ({"forward": {**forward(), "tensors": []}}, "forward.json says aligned"),
    ({"forward": {**forward("logits"), "verdict": "aligned"}}, "forward.json says aligned"),
    ({"weights": stage("weights", tensor("w", 0.0, 0.0), candidate={"weights_digest": "other"}), "forward": forward()},
     "did not see the same Paddle weights"),
    ({"convert": conversion(source_digest="other"), "forward": forward()}, "did not see the same source"),
])
def test_what_is_no_evidence_is_no_verdict(page, reports, says):
    made = page(reports)
    assert word(made) in ("No verdict", "Converted, not yet compared")
    assert says in made.text


def test_a_conversion_that_was_not_read_back_says_so(page):
    made = page({**complete(), "convert": conversion(verified=False)})
    assert "not verified" in made.text and "bit-exact" not in made.text


def test_parts_that_are_absent_or_of_a_wrong_type(page):
    bare = {"schema": "paddle-parity/1", "stage": "forward", "verdict": "diverged"}
    tensors = ["x", {"rel_l2": "large", "isolated": 3, "judgements": {}, "shape": None}]
    odd = {**bare, "stage": "loss", "tensors": tensors, "values": {"loss": 3}, "failures": "no", "notes": {},
           "reference": [], "candidate": None, "seconds": "long", "peak_rss_bytes": 10**400, "diagnosis": ["x"],
           "sublayers": 3, "inputs_digest": 7}
    made = page({"forward": bare, "loss": odd, "convert": {"schema": "paddle-parity/1", "tensors": [{}, 3], "notes": 3,
                                                           "dropped": [{}], "versions": []}})
    assert word(made) == "Diverged" and not made.badly_nested


def test_nan_and_infinity_in_a_report_are_no_figures(page):
    text = json.dumps(stage("forward", judged("a", float("nan"), False), judged("b", float("inf"), False), judged("c")))
    made = page({"forward": text})
    assert "nan" not in made.text.split() and word(made) == "Diverged"


def test_the_page_of_another_target_shows_its_own_stages_and_its_runs_plan(page, tmp_path):
    directory = tmp_path / "reports" / "r" / "paddlenlp"
    page(complete())
    made = page({"loss": stage("loss", tensor("loss.padded", 0.2, passed=False), target="paddlenlp")}, directory)
    assert [row[0] for row in made.rows() if len(row) == 5][1:3] == ["convert", "loss"]
    assert word(made) == "Diverged" and "paddlenlp" in made.text and "layers.{i}.q.weight" in made.text


def test_a_directory_without_reports_is_refused(tmp_path):
    with pytest.raises(BadInput, match="no stage's report"):
        write_page(tmp_path)
    (tmp_path / "forward.json").write_text("[1", "utf-8")
    with pytest.raises(BadInput, match=r"forward\.json cannot be read"):
        write_page(tmp_path)
    assert not (tmp_path / "index.html").exists()


def test_the_command_takes_the_latest_conversion_and_prints_the_path(page, tmp_path):
    page(complete())
    reports = tmp_path / "reports"
    (reports / "r" / "index.html").unlink()
    page({"convert": {**conversion(), "run": "older", "finished": "2020-01-01T00:00:00+00:00"}}, reports / "older")
    code, out, _ = call(main, ["--reports", str(reports)])
    assert (code, out.strip()) == (0, str(reports / "r" / "index.html"))
    assert (reports / "r" / "index.html").is_file()


@pytest.mark.parametrize("flags", [["--run", "absent"], ["--run", "r", "--target", "paddlenlp"]])
def test_the_command_refuses_what_is_not_there(page, tmp_path, flags):
    page(complete())
    code, out, err = call(main, [*flags, "--reports", str(tmp_path / "reports")])
    assert code == 2 and not out and err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.parametrize(("value", "written"), [(0.0, "0"), (1.44e-6, "1.4e-6"), (0.25, "2.5e-1"), (123.0, "1.2e2"),
                                                (9.99e-8, "1.0e-7"), (None, "–")])
def test_figures_look_the_same_everywhere(value, written):
    assert number(value) == written
