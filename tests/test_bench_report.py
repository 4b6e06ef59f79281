"""``python -m bench`` and ``python -m bench.audit``: what they write, and what is made of it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import audit as bench_audit
from bench import compare, readme
from bench.__main__ import main
from bench.chart import panels
from bench.measure import Meter

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1", **os.environ}


def run(module, *arguments):
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT, timeout=300)


def entry(op, model, megabytes, times, headline=True):
    rows = [
        {
            "peer": peer,
            "outcome": "measured",
            "reason": None,
            "p50_ms": ms,
            "gb_s": megabytes / ms,
            "percent_of_copy": 10 * megabytes / ms,
            "times_best": None,
            "peak_extra_bytes": 5e6,
        }
        for peer, ms in times.items()
    ]
    return {
        "name": f"{op} bnb-nf4 {model} bfloat16",
        "op": op,
        "variant": "bnb-nf4",
        "dtype": "bfloat16",
        "shape": [int(megabytes), 8],
        "headline": headline,
        "useful_bytes": megabytes * 1e6,
        "rows": rows,
    }


def document(times=(1.0, 2.0, 4.0), card=None):
    versions = {"torch": "2.13.0", "triton": "3.7.1", "numpy": None}
    return {
        "schema": 1,
        "started": "2026-11-24T20:00:00Z",
        "machine": {"card": card, "cpu": "A CPU", "cpu_cores": 2, "versions": versions},
        "roof": {"copy_gb_s": 10.0},
        "cases": [
            entry("fake_quant", "small", 1, {"quail": times[0], "eager": 3.0}, headline=False),
            entry("fake_quant", "large", 4, {"quail": times[1], "eager": 9.0}),
            entry("bucket_compare", "large", 8, {"quail": times[2]}),
        ],
    }


def write(path, content):
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "report.json"
    done = run("bench", "--report", "--size", "0.001", "--ops", "fake_quant", "--headlines", "--out", path)
    assert done.returncode == 0, done.stdout + done.stderr
    return path, done.stdout


def test_a_report_has_a_row_a_peer_its_roof_and_the_machine(reported):
    path, output = reported
    read = json.loads(path.read_text())
    assert read["outcome"] == "finished" and read["size"] == 0.001
    assert read["machine"]["device"] in ("cpu", "cuda") and read["roof"]["copy_gb_s"] > 0
    assert [case["op"] for case in read["cases"]] == ["fake_quant"] * 2
    for case in read["cases"]:
        assert case["headline"] and case["shape"] == [4, 14336]
        measured = [row for row in case["rows"] if row["outcome"] == "measured"]
        assert {"quail", "eager"} <= {row["peer"] for row in measured}
        for row in measured:
            assert row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] and row["gb_s"] > 0
            assert row["peak_extra_bytes"] >= 0 and row["max_error"] >= 0
    assert f"2 cases, {read['wall_s']} s: {path}" in output
    assert "no chart: chart: expected a run that measured an op at two sizes" in output


def test_a_report_is_not_overwritten(reported):
    path, _ = reported
    written = path.read_bytes()
    done = run("bench", "--report", "--out", path)
    assert done.returncode == 2 and "which is there" in done.stderr and len(done.stderr.splitlines()) == 1
    assert path.read_bytes() == written


@pytest.mark.parametrize(
    ("arguments", "got"),
    [
        (("--report", "--ops", "fake_quant,dream"), "dream"),
        (("--report", "--models", "square,dream"), "dream"),
        (("--report", "--size", "2"), "2"),
        (("--report", "--budget-s", "0"), "0"),
        (("--compare", "absent.json", "absent.json"), "absent.json"),
        (("--chart", "README.md"), "README.md"),
    ],
)
def test_what_cannot_be_done_is_one_line(arguments, got, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(list(arguments)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "expected" in error and got in error


def test_what_moved_by_more_than_the_threshold_is_shown_the_slowest_first():
    text = compare.compare(document(), document(times=(1.04, 1.0, 6.0)))
    assert "2 of 5 rows moved by more than 5 %." in text
    assert max(map(len, text.splitlines())) <= 80
    ratios = [float(line.split()[-1]) for line in text.splitlines() if line.startswith("  quail")]
    assert ratios == [1.5, 0.5]
    assert "0 of 5 rows moved" in compare.compare(document(), document())
    assert "two machines" in compare.compare(document(), document(card="A GPU"))
    assert "two machines" not in text


def test_rows_of_one_run_alone_are_named():
    fewer = document()
    del fewer["cases"][2]
    text = compare.compare(document(), fewer)
    assert "Measured in A only:\n  bucket_compare bnb-nf4 large bfloat16 8x8, quail" in text
    assert "Measured in B only" not in text


def test_a_chart_has_a_line_a_peer_where_there_are_two_sizes(tmp_path, capsys):
    found = panels(document())
    assert found == {"fake_quant bnb-nf4 bfloat16": {"quail": [(1, 1.0), (4, 2.0)], "eager": [(1, 1 / 3), (4, 4 / 9)]}}
    path = write(tmp_path / "a.json", document())
    assert main(["--chart", str(path)]) == 0
    first = (tmp_path / "a.svg").read_text()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    for text in ("fake_quant bnb-nf4 bfloat16", "quail", "eager", "copy of a large tensor", "A CPU, 2 cores"):
        assert text in re.sub(r"<!--|-->", "", first)
    assert main(["--chart", str(path)]) == 0
    assert (tmp_path / "a.svg").read_text() == first


def test_the_readme_takes_its_figures_from_a_file(tmp_path):
    page = tmp_path / "README.md"
    page.write_text(f"Before.\n{readme.BEGIN}\nold\n{readme.END}\nAfter.\n")
    readme.write(document(), tmp_path / "a.json", page)
    text = page.read_text()
    assert text.startswith("Before.\n") and text.endswith("After.\n") and "old" not in text
    assert "| fake_quant bnb-nf4, bfloat16 | 4 x 8 | 4 | quail | 2 | 2.0 | 20 |" in text
    assert "small" not in text and "A CPU, 2 cores (no GPU)" in text
    page.write_text("no marks")
    with pytest.raises(ValueError, match="expected .* once each"):
        readme.write(document(), tmp_path / "a.json", page)


def test_audits_have_a_table_of_their_own(tmp_path):
    assert readme.audits(tmp_path) == []
    row = {"model": "a-model", "layers": 2, "machine": {"cpu": "A CPU"}, "workers": 2}
    row |= {"formats": ["bnb-nf4", "bnb-fp4"]}
    row |= {"bytes": 3e9, "audit_s": 12.0, "audit_gb_s": 0.25, "times_bound": 0.9, "peak_resident_bytes": 4e8}
    write(tmp_path / "audit-a.json", row)
    write(tmp_path / "other.json", document())
    *_, last = readme.audits(tmp_path)
    assert last == "| a-model, 2 layers | A CPU, 2 workers | bnb-nf4, bnb-fp4 | 3.0 | 12 | 0.250 | 0.90 | 400 |"


def test_resident_memory_is_what_a_call_takes():
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux's /proc")
    meter = Meter(torch.device("cpu"), dry=True)
    size = 64 << 20
    assert size <= meter.peak_extra_bytes(lambda: torch.ones(size, dtype=torch.uint8)) < 2 * size
    assert meter.peak_extra_bytes(lambda: None) < 8 << 20


def test_an_audit_is_measured_beside_what_bounds_it(tmp_path, monkeypatch, capsys):
    tiny = bench_audit.models.Model("tiny", 64, 128, 256)
    monkeypatch.setitem(bench_audit._SIZES, "smollm2-135m", (tiny, 2))
    monkeypatch.setattr(bench_audit, "_POOL", 1 << 16)
    monkeypatch.setattr(bench_audit, "_SHARD_BYTES", 1 << 16)
    arguments = ["--model", "smollm2-135m", "--workers", "1", "--out", str(tmp_path / "a.json")]
    assert bench_audit.main(arguments) == 0
    row = json.loads((tmp_path / "a.json").read_text())
    assert row["weights_compared"] == 2 * (4 * 64 * 64 + 3 * 64 * 128)
    assert row["bytes"] > 4 * row["weights_compared"]
    assert min(row["read_s"], row["count_s"], row["audit_s"], row["peak_resident_bytes"]) > 0
    assert row["times_bound"] == pytest.approx(row["audit_s"] / (row["read_s"] + row["count_s"]))
    assert "of both together" in capsys.readouterr().out
    assert bench_audit.main(arguments) == 2
