"""The page and the Markdown: complete, escaped, alone, and readable on a telephone."""

import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest

from quail.reporting import markdown, page, read_run

VOID = {"meta", "wbr", "br", "hr"}
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


class Page(HTMLParser):
    """What is open at the end, every tag with its attributes, and the cells of tables by row."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.rows, self.text = [], [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data):
        self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def row(self, first, number=0):
        return [row[1:] for row in self.rows if row[0] == first][number]


@pytest.fixture
def wide(make_results, tmp_path):
    """Every kind of cell: names that would be markup, a missing one, one without an estimate, a stop not reached."""
    names = ("GA+GDR", "<b>&\"'|x", "NPO+KLR hinge calibrated log_probs")
    quantizers = ("none", "bnb-nf4", "bnb-fp4", "rtn:ct-int4-sym@64", "rtn:gptq-int4-asym@128", "bnb-int8")
    made = make_results(methods=names, quantizers=quantizers, regimes=("16bit", "grid:bnb-nf4"), seeds=(0, 1))
    for regime in made.content["regimes"]:
        for seed in (0, 1):
            for quantizer in quantizers:
                said = {"texts": {"forget": [f"<i>{quantizer}</i> {i}" for i in range(20)]}}
                made.row(None, quantizer, 20, seed=seed, regime=regime, **said)
                made.row(names[0], quantizer, 1 + 6 * (quantizer != "none"), seed=seed, regime=regime, **said)
                if quantizer != "bnb-fp4":
                    made.row(names[1], quantizer, 2, 9, seed=seed, regime=regime, **said)
                training = {"steps": 60, "reached": False, "validation": 0.9}
                made.row(names[2], quantizer, 20, seed=seed, regime=regime, training=training, **said)
            for name in names:
                made.audit(name, seed=seed, regime=regime, delivered_cosine=0.3)
    for row in list(made.results["rows"]):
        made.results["rows"].append({key: row[key] for key in row if key != "examples"} | {"half": "validation"})
    return made


@pytest.fixture
def run(wide, tmp_path):
    return read_run(wide.write(tmp_path))


def test_the_page_is_whole_and_needs_nothing_beside_it(run):
    found = Page(page(run))
    assert found.open == []
    assert not {"script", "link", "img", "iframe", "object", "embed"} & {tag for tag, _ in found.tags}
    assert not [a for _, a in found.tags if {"src", "href", "xlink:href", "srcset", "action"} & a.keys()]
    assert not re.search(r"https?:|url\(|@import", page(run))


def test_every_method_and_quantizer_is_named_in_every_regime(run, wide):
    found = Page(page(run))
    for number, name in enumerate(wide.content["methods"], 1):
        dagger = "\u2020" if number == 3 else ""
        assert sum(row[0] == f"{number} {name}{dagger}" for row in found.rows) >= 2 * len(run.regimes)
    for quantizer in run.quantizers[1:]:
        assert sum(quantizer in row for row in found.rows) >= 2 * len(run.regimes)
        assert found.text.count(f"Full precision to {quantizer}") == len(run.regimes)
    assert found.text.count("Shipped in 16 bits") >= 1 and found.text.count("Shipped in bnb-nf4") >= 1


def test_names_and_texts_cannot_put_markup_into_the_page(run):
    text = page(run)
    assert "<b>&" not in text and "<i>bnb" not in text and "&lt;i&gt;bnb-nf4&lt;/i&gt;" in text
    assert not [attributes for tag, attributes in Page(text).tags if tag in ("b", "i")]


def test_a_missing_cell_is_marked_and_is_no_number(run):
    found = Page(page(run))
    name = "2 <b>&\"'|x"
    scores = next(row[1:] for row in found.rows if row[0] == name and "0.10 / 0.90" in row)
    assert scores == ["0.10 / 0.90", "0.10 / 0.90", "missing", *["0.10 / 0.90"] * 3]
    recoveries = next(row[1:] for row in found.rows if row[0] == name and "not judged: bnb-fp4: missing" in row)
    assert recoveries[1] == "missing" and recoveries[0].replace("\u00a0", " ") == "0.0 % (0.0 to 0.0)"
    text = markdown(run)
    rows = [line for line in text.splitlines() if line.startswith("| &lt;b>&\"'/x") and "0.10" in line]
    of_regime = "".join(rows[: len(rows) // 2])  # six precisions are more than one table holds
    assert of_regime.count("missing") == 1 and of_regime.count("0.10 / 0.90") == 5


def by_regime(text):
    """The parts of the page or the Markdown by the title of the regime."""
    parts = re.split(r"<h2>" if "<html" in text else r"\n## ", text)
    return {title: part for part in parts if (title := re.split(r"[<\n]", part)[0]).startswith("Shipped")}


def test_a_method_without_a_score_in_a_regime_has_no_row_there(make_results, tmp_path):
    """A everywhere; B only in the first regime, in full precision; C nowhere; the start alone in the third regime."""
    regimes = ("16bit", "grid:bnb-nf4", "grid:bnb-fp4", "grid:mxfp4")
    made = make_results(methods=("A", "BB", "CCC"), regimes=regimes, quantizers=("none", "bnb-nf4"))
    said = {"texts": {"forget": ["so"] * 20}}
    for regime in regimes[:3]:
        for quantizer in ("none", "bnb-nf4"):
            made.row(None, quantizer, 20, regime=regime, **said)
            if regime != "grid:bnb-fp4":
                made.row("A", quantizer, 0, regime=regime, **said)
    made.row("BB", "none", 0)
    run = read_run(made.write(tmp_path))
    plain, html = by_regime(markdown(run)), by_regime(page(run))
    titles = ["Shipped in 16 bits", "Shipped in bnb-nf4", "Shipped in bnb-fp4", "Shipped in mxfp4"]
    assert list(plain) == list(html) == titles
    first, second, third, fourth = plain.values()
    assert len(re.findall(r"^\| BB ", first, re.M)) == 2 and first.count("missing") == 4  # two cells, bullet, its why
    assert "- Not judged, as a 4-bit cell is missing or has no estimate: BB (bnb-nf4: missing)." in first
    assert len(re.findall(r"^\| A ", second, re.M)) == 2
    assert not re.search("BB|missing|Not judged", second)
    assert re.findall(r"^\| (.*?) +\|", third, re.M) == ["method", "start, nothing forgotten"]
    for part in (third, fourth):
        assert "- No method was run in this regime yet." in part
        assert not re.search("Recovery|Not judged|No method kept|missing", part)
    assert "|" not in fourth
    for title, part in html.items():
        names = {row[0].partition(" ")[2] for row in Page(f"<h2>{part}").rows if row[0][0].isdigit()}
        shown = {titles[0]: {"A", "BB"}, titles[1]: {"A"}}
        assert names == shown.get(title, set())
        for what in ("<svg", "Recovery of", "before and after"):
            assert (what in part) == (title in shown)
        assert ("BB" in part) == (title == titles[0])
        assert ("start, nothing forgotten" in part) == (title != titles[3])
    assert 'class="missing"' in html[titles[0]] and 'class="missing"' not in html[titles[1]]
    for text in (markdown(run), page(run)):
        told = " ".join(text.split())
        assert (
            "Not run: 2 of 4 regimes (Shipped in bnb-fp4, Shipped in mxfp4); 1 of 3 methods (CCC); of the rest" in told
        )
        assert "of the rest BB in Shipped in bnb-nf4; 1 of 2 scores of BB in Shipped in 16 bits." in told


def test_no_estimate_says_why_below_the_table(run):
    text, plain = page(run), markdown(run)
    reason = "NPO+KLR hinge calibrated log_probs at bnb-nf4: less than 0.01 was forgotten"
    assert f"<li>{reason}" in text and reason in plain
    assert text.count("no estimate <sup>1</sup>") >= 1 and "no estimate [1]" in plain
    assert "\u2020 ended by steps before the stop rule was met: exact of at most 0.1 on the validation half" in text


def test_figures_are_those_of_the_run(small, tmp_path):
    run = read_run(small.write(tmp_path))
    found, plain = Page(page(run)), markdown(run)
    assert found.row("start, nothing forgotten") == ["1.00 / 1.00", "0.80 / 1.00"]
    assert found.row("1 A") == ["0.10 / 1.00", "0.45 / 1.00"]
    recovery = run.regimes[0].methods[0].deployments["bnb-nf4"].recovery
    interval = f"50 % ({100 * recovery.low:.0f} to {100 * recovery.high:.0f})"
    assert [row for row in found.rows if row[0] == "1 A" and row[1].replace("\u00a0", " ") == interval]
    assert interval in plain and "0.45 / 1.00" in plain
    assert "over examples only: one seed, 0" in plain and "over examples only: one seed, 0" in found.text
    assert "Came back, recovery of 5 % or more somewhere: A (50 % at bnb-nf4)." in found.text
    assert "The validation half decided when training stopped" in found.text


def test_an_interval_without_width_is_not_taken_for_certainty(small, tmp_path):
    text = markdown(read_run(small.write(tmp_path)))
    assert "0.0 % (0.0 to 0.0)" in text and "up to 15 % of others might" in " ".join(text.split())


def test_sections_without_figures_are_left_out(small, tmp_path):
    text = page(read_run(small.write(tmp_path)))
    for title in ("Buckets:", "Examples,", "What foretold", "layer by layer"):
        assert title not in text
    assert "What was run" in text


def test_what_was_run_is_told(run):
    found = Page(page(run))
    for text in ("a processor", "torch 2.13", "learning_rate 1e-05", "8 of 9 done", "the report half: 20 forget"):
        assert text in found.text


def test_the_audit_shows_buckets_and_layers(run):
    found = Page(page(run))
    cells = next(row for row in found.rows if row[0] == "1 GA+GDR" and "99.00 %" in row)
    assert cells[1:4] == ["1 %", "2 %", "99.00 %"] and "-10.0 dB" in cells
    assert [row for row in found.rows if row == ["1 GA+GDR", "50", "50"]]  # codes changed, of the flip law's


def test_marks_lie_where_the_figures_say(small, tmp_path):
    """The x of a mark is linear in the forget metric: start at 0.8 and A at 0.45, B at 0.1."""
    text = page(read_run(small.write(tmp_path)))
    drawings = [ElementTree.fromstring(each) for each in re.findall(r"<svg viewBox.*?</svg>", text, re.S)]
    scatter = next(each for each in drawings if "against the retain set" in each.get("aria-label", ""))
    ticks = {
        float(t.text): float(t.get("x"))
        for t in scatter.iter("text")
        if t.get("text-anchor") == "middle" and t.text[0].isdigit()
    }
    unit = ticks[1.0] - ticks[0.0]
    marks = {}
    for group in scatter.iter("g"):
        name = group.find("title").text.partition(":")[0]
        marks[name] = [e for e in group if e.tag in ("circle", "rect", "path") and "way" not in e.get("class")]
    ring, dot = marks["2 B"]
    for mark in (ring, dot):
        assert float(mark.get("cx")) == pytest.approx(ticks[0.0] + 0.1 * unit, abs=0.1)
    triangle = marks["1 A"][-1]
    assert "back" in triangle.get("class")
    x, _ = map(float, re.match(r"M([\d.]+) ([\d.]+)l", triangle.get("d")).groups())
    assert x == pytest.approx(ticks[0.0] + 0.45 * unit, abs=0.1)
    square = marks["start, nothing forgotten"][-1]
    assert float(square.get("x")) + 3.5 == pytest.approx(ticks[0.0] + 0.8 * unit, abs=0.1)
    assert len(marks["1 A"]) == 3  # a ring, the head of an arrow and a triangle; B's did not move


def test_a_whisker_spans_the_interval(small, tmp_path):
    run = read_run(small.write(tmp_path))
    drawing = next(
        ElementTree.fromstring(each)
        for each in re.findall(r"<svg viewBox.*?</svg>", page(run), re.S)
        if "with intervals" in each
    )
    ticks = {
        t.text: float(t.get("x"))
        for t in drawing.iter("text")
        if t.text in ("0 %", "100 %") and t.get("text-anchor") == "middle"
    }
    group = next(each for each in drawing.iter("g") if each.find("title").text.startswith("A at bnb-nf4: 50 %"))
    ends = map(float, re.match(r"M([\d.]+) [\d.]+H([\d.]+)", group.find("path").get("d")).groups())
    recovery = run.regimes[0].methods[0].deployments["bnb-nf4"].recovery
    unit = ticks["100 %"] - ticks["0 %"]
    for end, share in zip(ends, (recovery.low, recovery.high), strict=True):
        assert end == pytest.approx(ticks["0 %"] + share * unit, abs=0.1)


def test_the_markdown_fits_100_columns_and_its_tables_are_tables(run):
    lines = markdown(run).splitlines()
    assert max(map(len, lines)) <= 100
    tables, columns = 0, None
    for line in lines:
        bars = line.count("|") if line.startswith("|") else None
        if bars and columns is None:
            tables += 1
        assert bars is None or columns in (None, bars), line
        columns = bars
    assert tables >= 6  # six precisions are more than one table holds
    for quantizer in run.quantizers[1:]:
        assert sum(f"`{quantizer}`" in line for line in lines) == 2 * len(run.regimes)


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_lays_it_out_without_scrolling_sideways(run, tmp_path, width):
    """In a frame, as a headless window is no narrower than 500."""
    tell = (
        "<script>parent.postMessage([innerWidth, document.documentElement.scrollWidth].join(' '), '*')</script></body>"
    )
    text = page(run).replace("<details>", "<details open>").replace("</body>", tell)
    (tmp_path / "page.html").write_text(text, encoding="utf-8")
    hear = "<script>onmessage = event => { document.title = event.data }</script>"
    frame = f'<iframe src="page.html" style="border: 0; width: {width}px; height: 900px"></iframe>'
    (tmp_path / "frame.html").write_text(f"<!doctype html><title>none</title>{hear}{frame}", encoding="utf-8")
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    command = [CHROMIUM, *quiet, f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--dump-dom"]
    done = subprocess.run([*command, (tmp_path / "frame.html").as_uri()], capture_output=True, text=True, timeout=120)
    inner, needed = map(int, re.search(r"<title>(\d+) (\d+)</title>", done.stdout).groups())
    assert inner == width and needed <= width


def quail(*args):
    command = [sys.executable, "-m", "quail", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=180)


def test_the_command_writes_both_and_never_over_a_file(small, tmp_path):
    small.write(tmp_path)
    html, plain = tmp_path / "page.html", tmp_path / "table.md"
    done = quail("report", tmp_path, "--html", html, "--markdown", plain)
    assert done.returncode == 0, done.stderr
    run = read_run(tmp_path)
    assert html.read_text() == page(run) and plain.read_text() == markdown(run) == done.stdout
    again = quail("report", tmp_path / "RESULTS.json", "--html", html)
    assert again.returncode == 2 and "already exists" in again.stderr and again.stderr.count("\n") == 1


def test_the_command_says_in_one_line_what_it_cannot_read(tmp_path):
    done = quail("report", tmp_path / "nothing")
    assert done.returncode == 2 and done.stderr.startswith("quail: run: expected") and done.stderr.count("\n") == 1
