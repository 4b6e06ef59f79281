"""The bench and its command, without a GPU: the dry run end to end, the file it leaves, and what happens when a case, a
test or the run itself comes to a bad end."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import gpu, machine, memory, overhead, results, suite, worker
from bench.case import Case, Check, measure_case, plain
from bench.cases import all_cases, linear_margin_hinge
from bench.measure import Meter, quantiles

ROOT = Path(__file__).resolve().parents[1]
# What a GPU image in use does not have.
NOT_THERE = ("bitsandbytes", "compressed_tensors", "gguf", "hypothesis", "liger_kernel", "peft")
NOT_THERE += ("torchao", "transformers")
CASES = {case.name: case for case in all_cases(size=0)}
HINGES = ("logit_margin_hinge", "linear_logit_margin_hinge")


def command(*args, **environment):
    env = {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1", **os.environ, **environment}
    return [sys.executable, "-m", "bench.gpu", *map(str, args)], {"cwd": ROOT, "env": env, "text": True}


def bench(*args, **environment):
    line, options = command(*args, **environment)
    return subprocess.run(line, capture_output=True, timeout=180, **options)


@pytest.fixture(scope="module")
def without_libraries(tmp_path_factory):
    """A PYTHONPATH that makes every process below it a machine without those libraries."""
    folder = tmp_path_factory.mktemp("path")
    (folder / "sitecustomize.py").write_text(
        f"""
from importlib.machinery import PathFinder
found = PathFinder.find_spec
PathFinder.find_spec = classmethod(
    lambda cls, name, *more: None if name.partition(".")[0] in {NOT_THERE} else found(name, *more)
)
"""
    )
    # A plugin of pytest that is installed here would import hypothesis.
    return {"PYTHONPATH": str(folder), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


@pytest.fixture(scope="module")
def dry(tmp_path_factory, without_libraries):
    path = tmp_path_factory.mktemp("bench") / "dry.json"
    began = time.monotonic()
    done = bench("--dry", "--out", path, "--budget-s", 120, **without_libraries)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(path.read_text()), done.stdout, time.monotonic() - began


def test_dry_run_without_the_other_libraries(dry):
    document, output, took = dry
    assert document["schema"] == 1 and document["dry"] is True and document["outcome"] == "finished"
    assert took < 120 and document["wall_s"] <= took
    assert document["machine"]["card"] is None and document["machine"]["device"] == "cpu"
    assert document["machine"]["versions"]["torch"] == torch.__version__
    assert "no figure below says anything about a GPU" in output
    tests = document["tests"]
    assert tests["outcome"] == "passed" and tests["failed"] == tests["skipped"] == tests["not_run"] == 0
    assert tests["passed"] > 200
    assert [entry["name"] for entry in document["cases"]] == list(CASES)


def test_rows_of_the_dry_run(dry):
    document, _, _ = dry
    for entry in document["cases"]:
        case = CASES[entry["name"]]
        assert entry["outcome"] == "measured" and entry["reason"] is None, entry
        assert [row["peer"] for row in entry["rows"]] == list(case.peers)
        by_peer = {row["peer"]: row for row in entry["rows"]}
        if case.op == "training_step":
            assert all(row["outcome"] == "absent" and "transformers" in row["reason"] for row in by_peer.values())
            continue
        for peer in ("bitsandbytes", "torchao", "liger"):
            if peer in by_peer:
                assert by_peer[peer]["outcome"] == "absent" and peer in by_peer.pop(peer)["reason"]
        for row in by_peer.values():
            assert row["outcome"] == "measured", row
            assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] < 60_000
            assert row["gb_s"] == pytest.approx(case.useful_bytes / row["p50_ms"] / 1e6)
            assert row["percent_of_copy"] == pytest.approx(100 * row["gb_s"] / document["roof"]["copy_gb_s"])
            assert 0 <= row["peak_extra_bytes"] < 1 << 30
            others = [other["p50_ms"] for other in by_peer.values() if other is not row]
            assert row["times_best"] == pytest.approx(row["p50_ms"] / min(others))
            if case.op not in HINGES and row["peer"] in ("quail", "eager"):
                assert row["max_error"] == row["differ_per_million"] == 0


def test_output_fits_a_terminal(dry):
    _, output, _ = dry
    tables = output[output.index("copy bandwidth") :].splitlines()[1:-1]
    assert len(tables) > 100 and max(map(len, tables)) <= 100


def test_no_gpu_is_one_line():
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    done = bench()
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line == "bench.gpu: expected a CUDA device, or --dry to see the command work on the CPU; found neither"


def test_what_is_refused(tmp_path, capsys):
    taken = tmp_path / "taken.json"
    taken.write_text("mine")
    for args, says in [
        (["--dry", "--out", str(taken)], f"--out: expected a path that is free, or --force; got {taken}"),
        (["--dry", "--out", str(results.FOLDER / "x.json")], "--out: expected a path outside bench/results"),
        (["--dry", "--budget-s", "0"], "--budget-s: expected seconds above 0; got 0.0"),
        (["--dry", "--out", str(taken / "below.json")], "--out: expected a path that can be written"),
    ]:
        assert gpu.main(args) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"bench.gpu: {says}")
    assert taken.read_text() == "mine" and list(tmp_path.iterdir()) == [taken]


def test_results_are_never_overwritten_silently(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    first = results.choose_path("card", "2030-01-02T03:04:05Z", force=False)
    assert first == tmp_path / "card.json"
    first.write_text("{}")
    second = results.choose_path("card", "2030-01-02T03:04:05Z", force=False)
    assert second == tmp_path / "card.20300102T030405Z.json"
    assert results.choose_path("card", "2030-01-02T03:04:05Z", force=True) == first
    second.write_text("{}")
    with pytest.raises(results.PathTaken):
        results.choose_path("card", "2030-01-02T03:04:05Z", force=False)


def test_a_budget_that_is_up_lists_what_it_did_not_reach(tmp_path):
    path = tmp_path / "short.json"
    path.write_text("old")
    done = bench("--dry", "--out", path, "--force", "--budget-s", 2)
    document = json.loads(path.read_text())
    assert document["outcome"] == "finished" and document["wall_s"] < 30
    # No test has run: that is not a success.
    assert document["tests"]["outcome"] in ("not run", "incomplete")
    assert done.returncode == (1 if document["tests"]["outcome"] == "not run" else 0)
    assert [entry["name"] for entry in document["cases"]] == list(CASES)
    assert all(entry["outcome"] == "skipped" and "--budget-s was up" in entry["reason"] for entry in document["cases"])


def test_ended_from_outside_it_keeps_what_it_has(tmp_path):
    path = tmp_path / "ended.json"
    line, options = command("--dry", "--out", path)
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options)
    try:
        limit = time.monotonic() + 90
        while time.monotonic() < limit:
            tests = json.loads(path.read_text())["tests"] if path.exists() else None
            if tests and tests["passed"]:
                break
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 143
    finally:
        process.kill()
    document = json.loads(path.read_text())
    assert document["outcome"] == "interrupted" and document["tests"]["passed"] > 0
    assert {entry["reason"] for entry in document["cases"]} == {"the run was ended before it"}
    assert list(tmp_path.iterdir()) == [path], "no half-written file stays"


def _twice(x):
    return 2 * x


def _case(name, peers):
    x = torch.arange(6.0)
    return Case(
        op=name,
        variant="",
        model="",
        shape=(6,),
        dtype=torch.float32,
        useful_bytes=48,
        working_bytes=0,
        inputs=lambda device: (x.to(device),),
        peers={peer: plain(function) for peer, function in peers.items()},
        expected=lambda inputs: 2 * inputs[0],
        check=lambda inputs, expected, answer, peer: Check(
            float((answer - expected).abs().max()), 0.0, torch.equal(answer, expected)
        ),
    )


def _raise(x):
    raise RuntimeError("the peer's own\nfault")


FAULTS = [
    _case(
        "faults",
        {
            "raises": _raise,
            "wrong": lambda x: x + 2,
            "quits": lambda x: os._exit(9),
            "hangs": lambda x: time.sleep(600),
            "right": _twice,
        },
    ),
    _case("sound", {"right": _twice}),
    _case("late", {"right": _twice, "hangs": lambda x: time.sleep(600)}),
]


def _work_on_faults(*args):
    """What the spawned process runs: the real work on cases that go wrong."""
    from bench import worker as inside

    inside.all_cases = lambda size: FAULTS
    torch.set_num_threads(1)
    _REAL_WORK(*args)


_REAL_WORK = worker._work


def test_a_peer_that_fails_hangs_or_dies_costs_one_row(monkeypatch):
    monkeypatch.setattr(worker, "_work", _work_on_faults)
    monkeypatch.setattr(worker, "_PEER_LIMIT_S", 20.0)
    heard = []
    worker.run(
        "cpu", True, [case.name for case in FAULTS[:2]], time.monotonic() + 300, lambda *event: heard.append(event)
    )
    roofs = [value for kind, _, value in heard if kind == "roof"]
    assert len(roofs) == 1 and roofs[0]["copy_gb_s"] > 0
    faults, sound = ([value for kind, case, value in heard if kind == "row" and case == c.name] for c in FAULTS[:2])
    assert {row["peer"]: (row["outcome"], row["reason"]) for row in faults} == {
        "raises": ("failed", "RuntimeError: the peer's own fault"),
        "wrong": ("check failed", "largest error 3, 0 of a million differ"),
        "quits": ("failed", "its process ended with exit status 9"),
        "hangs": ("failed", "took more than 20 s"),
        "right": ("measured", None),
    }
    assert not any("p50_ms" in row for row in faults if row["outcome"] != "measured"), "a wrong answer has no speed"
    assert [row["outcome"] for row in sound] == ["measured"]
    assert [value for kind, _, value in heard if kind == "end"] == [("measured", None)] * 2


def test_a_hang_ends_at_the_deadline(monkeypatch):
    monkeypatch.setattr(worker, "_work", _work_on_faults)
    heard, began = [], time.monotonic()
    worker.run("cpu", True, [FAULTS[2].name], began + 40, lambda *event: heard.append(event))
    assert time.monotonic() - began < 70
    assert [value["outcome"] for kind, _, value in heard if kind == "row"] == ["measured", "skipped"]
    assert heard[-1][2] == {"peer": "hangs", "outcome": "skipped", "reason": "the time was up while it ran"}


def _quit_at_once(*args):
    os._exit(5)


def test_no_process_at_all_fails_every_case(monkeypatch):
    monkeypatch.setattr(worker, "_work", _quit_at_once)
    heard = []
    worker.run("cpu", True, ["a", "b"], time.monotonic() + 60, lambda *event: heard.append(event))
    said = ("failed", "no process could measure it: its process ended with exit status 5")
    assert heard == [("end", "a", said), ("end", "b", said)]


PLANTED = """
import os, time, pytest
def test_passes(): pass
def test_fails(): assert 1 + 1 == 3, "sums"
def test_dies(): os._exit(7)
def test_skips(): pytest.skip("for a reason")
@pytest.fixture
def broken(): raise RuntimeError("in a fixture")
def test_of_fixture(broken): pass
def test_device_is_lost(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
def test_after_that(): assert os.environ["QUAIL_DRY_GPU"] == "1" and "TRITON_INTERPRET" not in os.environ
def test_hangs(): time.sleep(600)
def test_not_reached(): pass
"""


def test_suite_goes_on_behind_a_test_that_dies(tmp_path, monkeypatch):
    planted = tmp_path / "test_planted.py"
    planted.write_text(PLANTED)
    monkeypatch.setattr(suite, "TESTS", planted)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    reports = []
    summary = suite.run(tmp_path, True, time.monotonic() + 20, reports.append)
    assert reports[-1] == summary and len(reports) > 2
    failures = {row["test"].partition("::")[2]: row["reason"] for row in summary["failures"]}
    assert failures.keys() == {"test_fails", "test_dies", "test_of_fixture", "test_device_is_lost"}
    assert "sums" in failures["test_fails"] and "in a fixture" in failures["test_of_fixture"]
    assert failures["test_dies"] == "its process was brought down, exit status 7"
    assert [row["reason"] for row in summary["skips"]] == ["Skipped: for a reason"]
    assert summary["passed"] == 2 and summary["outcome"] == "failed"
    assert [test.partition("::")[2] for test in summary["tests_not_run"]] == ["test_hangs", "test_not_reached"]


@pytest.mark.parametrize(
    ("text", "outcome"), [("import nothing_of_this_name", "failed"), ("", "not run"), ("def test(): pass", "passed")]
)
def test_outcome_of_a_suite(tmp_path, monkeypatch, text, outcome):
    planted = tmp_path / "test_planted.py"
    planted.write_text(text)
    monkeypatch.setattr(suite, "TESTS", planted)
    summary = suite.run(tmp_path, True, time.monotonic() + 60, lambda summary: None)
    assert summary["outcome"] == outcome, summary


@pytest.mark.parametrize("name", [case.name for case in CASES.values() if case.headline])
def test_checks_reject_a_wrong_answer(name):
    case = CASES[name]
    inputs = case.inputs(torch.device("cpu"))
    expected = case.expected(inputs)
    answer = case.peers["quail"](inputs, "eager")()
    assert case.check(inputs, expected, answer, "quail").passed
    parts = list(answer) if isinstance(answer, tuple) else [answer]
    for place in range(len(parts)):
        wrong = [part.clone() for part in parts]
        flat = wrong[place].view(-1)
        # One weight, code or count; a logit's gradient may take the other branch once in ten thousand, not more.
        some = slice(None, None, 50) if case.op == "logit_margin_hinge" else slice(0, 1)
        flat[some] = flat[some] + torch.ones_like(flat[some])
        given = tuple(wrong) if isinstance(answer, tuple) else wrong[0]
        assert not case.check(inputs, expected, given, "quail").passed, place


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.op == "linear_logit_margin_hinge"])
@pytest.mark.parametrize("lost", ["hinge", "log_probs"])
def test_both_gradients_of_the_linear_hinge_are_checked(name, lost):
    """An answer whose gradient leaves out one of the two losses is not a right one."""
    case = CASES[name]
    inputs = case.inputs(torch.device("cpu"))
    expected = case.expected(inputs)
    values = case.peers["quail"](inputs, "eager")()[:2]
    quail = case.peers["quail"](inputs, "eager")
    (loss,), (norm,) = quail.args[:1], quail.keywords.values()

    def of_one(*args, **options):
        value, log_probs = loss(*args, **options)
        return (value.detach(), log_probs) if lost == "hinge" else (value, log_probs.detach())

    _, _, *grads = linear_margin_hinge._step(of_one, *inputs, norm=norm)
    assert not case.check(inputs, expected, (*values, *grads), "quail").passed


def test_cases_are_named_apart_and_full_size_differs_in_shape_only():
    full = all_cases(size=1)
    assert [case.name for case in full] == list(CASES) and len(CASES) == len(full)
    assert all(case.peers.keys() == CASES[case.name].peers.keys() for case in full)
    largest = max(full, key=lambda case: case.useful_bytes)
    assert largest.useful_bytes > 1e9 and all(case.working_bytes > case.useful_bytes for case in full)
    headlines = [case.headline for case in full]
    assert headlines == sorted(headlines, reverse=True) and {case.op for case in full if case.headline} == {
        case.op for case in full
    }


def test_a_case_without_time_says_nothing():
    (case,) = (case for case in CASES.values() if case.name.startswith("fake_quant bnb-nf4 Llama-3-8B bfloat16"))
    meter = Meter(torch.device("cpu"), dry=True)
    assert list(measure_case(case, meter, 0.01, lambda: True)) == []
    first = next(iter(case.peers))
    rest = list(
        measure_case(dataclasses.replace(case, peers=dict(list(case.peers.items())[:2])), meter, 0.01, bool, (first,))
    )
    assert [event for event, _ in rest] == ["peer", "row"] and rest[0][1] != first


def test_meter_asks_cuda_as_it_does_the_cpu(monkeypatch):
    """The branches for CUDA, with its functions replaced: what they return is what the meter gives."""
    clock = iter(range(10**6))

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = next(clock)

        def elapsed_time(self, end):
            assert calls[-1] == "synchronize", "times are read after a synchronisation"
            return float(end.at - self.at)

    calls = []
    held = iter([1000, 1000, 0])
    for name, function in {
        "Event": Event,
        "synchronize": lambda device: calls.append("synchronize"),
        "mem_get_info": lambda device: (2**26, 2**30),
        "memory_reserved": lambda device: 5000,
        "memory_allocated": lambda device: next(held, 0),
        "reset_peak_memory_stats": lambda device: calls.append("reset"),
        "max_memory_allocated": lambda device: 1700,
        "empty_cache": lambda: calls.append("empty"),
    }.items():
        monkeypatch.setattr(torch.cuda, name, function)
    meter = Meter(torch.device("cpu"), dry=True)
    meter._cuda = True
    assert meter.free_bytes() == 2**26 + 4000
    assert meter.peak_extra_bytes(lambda: calls.append("call")) == 700
    assert calls[-4:] == ["synchronize", "reset", "call", "synchronize"]
    calls.clear()
    times = meter.time(lambda: calls.append("call"), 0.05)
    assert times == {"p20_ms": 1.0, "p50_ms": 1.0, "p80_ms": 1.0, "runs": 50}
    assert calls == ["synchronize", *["call"] * 3, "synchronize", "synchronize", *["call"] * 50, "synchronize"]
    assert meter.roof(0.01)["copied_bytes"] == 2**22
    meter.release()
    assert calls[-1] == "empty"


def test_every_name_of_torch_cuda_is_there():
    sources = [*(ROOT / "bench").rglob("*.py"), ROOT / "tests" / "kernels" / "test_cuda.py"]
    names = {name for path in sources for name in re.findall(r"torch\.cuda\.(\w+)", path.read_text(encoding="utf-8"))}
    assert len(names) > 10 and all(hasattr(torch.cuda, name) for name in names)


def test_quantiles_are_of_the_runs():
    assert quantiles([5.0, 1.0, 3.0, 2.0, 4.0, 6.0]) == {"p20_ms": 2.0, "p50_ms": 3.0, "p80_ms": 5.0, "runs": 6}
    assert quantiles([7.0]) == {"p20_ms": 7.0, "p50_ms": 7.0, "p80_ms": 7.0, "runs": 1}


def test_what_follows_from_the_medians():
    entry = {
        "useful_bytes": 2_000_000,
        "rows": [
            {"peer": "a", "outcome": "measured", "p50_ms": 1.0},
            {"peer": "b", "outcome": "absent"},
            {"peer": "c", "outcome": "measured", "p50_ms": 4.0},
        ],
    }
    results.derive(entry, copy_gb_s=4.0)
    a, absent, c = entry["rows"]
    assert (a["gb_s"], a["percent_of_copy"], a["times_best"]) == (2.0, 50.0, 0.25)
    assert c["times_best"] == 4.0 and "gb_s" not in absent
    alone = {"useful_bytes": 8, "rows": [{"peer": "a", "outcome": "measured", "p50_ms": 1.0}]}
    results.derive(alone, None)
    assert alone["rows"][0]["times_best"] is None and alone["rows"][0]["percent_of_copy"] is None


def test_a_run_that_ends_while_it_writes_leaves_the_state_before(tmp_path):
    path = tmp_path / "deep" / "file.json"
    results.save({"a": 1}, path)
    with pytest.raises(TypeError):
        results.save({"a": object()}, path)
    assert json.loads(path.read_text()) == {"a": 1} and list(path.parent.iterdir()) == [path]


def test_names_of_cards_and_what_nvidia_smi_says():
    assert machine.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert machine.slug("  AMD Instinct(TM) MI300X / OAM ") == "amd-instinct-tm-mi300x-oam"
    line = "550.1, 1980, 2619, 345, 2619, 700.00, 31, Enabled, Disabled, Enabled"
    said = machine.parse_smi(line)
    assert (
        said["driver_version"] == "550.1" and said["clocks.max.sm"] == "1980" and said["mig.mode.current"] == "Disabled"
    )
    assert machine.parse_smi(None) is None and machine.parse_smi("No devices were found") is None


def test_facts_of_a_card(monkeypatch):
    card = SimpleNamespace(
        name="NVIDIA H100 80GB HBM3",
        major=9,
        minor=0,
        total_memory=8 * 10**10,
        multi_processor_count=132,
        L2_cache_size=5 * 10**7,
        uuid="0123",
    )
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(machine, "_output", lambda command: asked.append(command))
    facts = machine.describe(torch.device("cuda:0"))
    assert (facts["card"], facts["capability"], facts["multiprocessors"]) == ("NVIDIA H100 80GB HBM3", "9.0", 132)
    assert facts["nvidia_smi"] is None, "nothing answered"
    assert [command[-1] for command in asked if command[0] == "nvidia-smi"] == [
        "--id=GPU-0123",
        "--format=csv,noheader,nounits",
    ]
    json.dumps(facts)


def test_memory_of_a_small_step(tmp_path, capsys):
    path = tmp_path / "memory.json"
    size = ["--tokens", "512", "--vocabulary", "16032", "--hidden", "64", "--dtype", "bfloat16"]
    assert memory.main([*size, "--norm", "per_logit", "linf", "--space", "logits", "--out", str(path)]) == 0
    document, output = json.loads(path.read_text()), capsys.readouterr().out
    assert document["outcome"] == "finished" and document["machine"]["cpu"] and document["finished"]
    assert [(row["norm"], row["tokens"], row["outcome"]) for row in document["rows"]] == [
        ("per_logit", 512, "measured"),
        ("linf", 512, "measured"),
    ]
    assert max(map(len, output.splitlines()[2:])) <= 80
    for row in document["rows"]:
        eager, quail = row["eager"], row["quail"]
        assert eager["gradient_bytes"] == quail["gradient_bytes"] == 2 * 64 * (512 + 16032)
        assert row["input_bytes"] == 4 * 64 * (512 + 16032)
        logits = 512 * 16032 * 2
        assert eager["step_bytes"] >= eager["forward_bytes"] > 2 * logits, "logits of both models, and their difference"
        assert 0 < quail["forward_bytes"] <= quail["step_bytes"] < eager["step_bytes"]
        assert row["share"] == quail["step_bytes"] / eager["step_bytes"]
        assert 0 < row["least_share"] == eager["gradient_bytes"] / eager["step_bytes"] < row["share"]


def test_memory_row_judges_both_paths():
    eager = {"forward_bytes": 700, "step_bytes": 1000, "gradient_bytes": 100, "loss": 0.5}
    quail = {"forward_bytes": 90, "step_bytes": 185, "gradient_bytes": 100, "loss": 0.5005}
    row = memory.judge({"eager": eager, "quail": quail})
    assert (row["outcome"], row["share"], row["share_without_gradients"]) == ("measured", 0.185, 0.1), (
        "before the gradients 90, after 85"
    )
    assert row["least_share"] == 0.1
    apart = memory.judge({"eager": eager, "quail": quail | {"loss": 0.6}})
    assert (apart["outcome"], apart["reason"]) == ("failed", "losses differ: 0.5 and 0.6")
    assert memory.judge({"eager": eager, "quail": quail | {"loss": float("nan")}})["outcome"] == "failed"
    ended = memory.judge({"eager": {"failed": "exit status -9: no output"}, "quail": quail})
    assert (ended["outcome"], ended["reason"]) == ("failed", "eager: exit status -9: no output")
    assert len(memory.table(ended | {"norm": "linf", "space": "log_probs", "tokens": 4096})) <= 80


def test_memory_says_what_a_step_said_last():
    step = memory.Step("quail", "l2", "logits", "bfloat16", tokens=0, vocabulary=16, hidden=-1)
    assert re.fullmatch(r"exit status 1: RuntimeError: .+", memory._measure_apart(step)["failed"])


def test_what_would_not_fit_runs_on_fewer_tokens(monkeypatch):
    monkeypatch.setattr(memory, "_measure_apart", lambda step: {"failed": str(step.tokens)})
    options = SimpleNamespace(
        tokens=4096, vocabulary=128256, hidden=2048, dtype=["bfloat16", "float32"], norm=["linf"], space=["logits"]
    )
    assert [row["tokens"] for row in memory._rows(options, 14 * 10**9)] == [4096, 2048]
    assert [row["tokens"] for row in memory._rows(options, 10**12)] == [4096, 4096]
    assert [row["tokens"] for row in memory._rows(options, 1)] == [1, 1]


def test_what_memory_refuses(tmp_path, capsys):
    taken = tmp_path / "taken.json"
    taken.write_text("mine")
    for args, says in [
        (["--tokens", "0"], "--tokens: expected a number above 0; got 0"),
        (["--out", str(taken)], f"--out: expected a path that is free, or --force; got {taken}, which is there"),
    ]:
        assert memory.main(args) == 2
        assert capsys.readouterr().err == f"bench.memory: {says}\n"
    assert taken.read_text() == "mine"


def test_overhead_on_the_cpu(tmp_path, capsys):
    path = tmp_path / "overhead.json"
    assert overhead.main(["--runs", "20", "--device", "cpu", "--out", str(path)]) == 0
    output, rows = capsys.readouterr().out, json.loads(path.read_text())["rows"]
    assert {name.partition(",")[0] for name in rows} == {"fake_quant", "bucket_compare", "logit_margin_hinge"}
    assert max(map(len, output.splitlines())) <= 80
    for name, row in rows.items():
        assert name in output and list(row) == list(overhead.LAYERS)
        assert all(0 < row[layer]["p20_us"] <= row[layer]["p50_us"] <= row[layer]["p80_us"] for layer in row)
        assert "added_us" not in row["bare"] and row["op"]["added_us"] > -1e6


def test_overhead_takes_turns_and_waits_before_each_call(monkeypatch):
    monkeypatch.setattr(overhead, "_WARM_UP", 1)
    clock, order = iter(range(0, 10**9, 1000)), []
    monkeypatch.setattr(overhead.time, "perf_counter_ns", lambda: next(clock))
    layers = {layer: lambda layer=layer: order.append(layer) or next(clock) for layer in overhead.LAYERS}
    layers["bare"] = lambda: order.append("bare")
    row = overhead.measure(layers, 3, lambda: order.append("wait"))
    assert order == ["wait", "bare", "wait", "op", "wait", "public"] * 4
    assert row["bare"] == {"p20_us": 1.0, "p50_us": 1.0, "p80_us": 1.0} and row["op"]["added_us"] == 1.0


def test_the_layers_of_an_op_are_one_op():
    for name, layers in overhead.calls(torch.device("cpu")):
        answers = [layers[layer]() for layer in overhead.LAYERS]
        if name.startswith("fake_quant"):
            assert torch.equal(answers[0], answers[1]) and torch.equal(answers[1], answers[2])
            assert answers[2].requires_grad == name.endswith("graph")
        elif name == "bucket_compare":
            assert torch.equal(answers[0][0], answers[1][0]) and torch.equal(
                answers[2].code_distance, answers[0][0][4:]
            )
        else:
            assert torch.equal(answers[0][0], answers[1][0]) and torch.equal(answers[2], answers[0][0].sum() / 4)
            assert answers[2].requires_grad == name.endswith("graph")


def test_overhead_without_a_device(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert overhead.main(["--device", "cuda"]) == 2
    assert capsys.readouterr().err == "bench.overhead: --device: expected cpu, as there is no CUDA device; got cuda\n"


def test_pytest_bench_uses_the_same_cases(tmp_path):
    pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed: it runs the timings")
    line = [sys.executable, "-m", "pytest", "bench", "-q", "-k", "SmolLM2-135M and quail", "-p", "no:cacheprovider"]
    written = tmp_path / "benchmark.json"
    line.append(f"--benchmark-json={written}")
    # Inside a process of pytest-xdist, pytest-benchmark would time nothing.
    outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(line, cwd=ROOT, env=outside, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout[-2000:]
    measured = json.loads(written.read_text())["benchmarks"]
    assert {row["group"] for row in measured} == {name for name in CASES if "SmolLM2-135M" in name}
    assert all(row["extra_info"]["useful_bytes"] == CASES[row["group"]].useful_bytes for row in measured)
