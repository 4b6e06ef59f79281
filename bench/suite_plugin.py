"""The pytest plugin of ``bench.suite``: runs one part of the tests and writes each outcome as it comes.

``--rows FILE`` takes JSON lines: the tests of this part, then each test's start and outcome. Tests that have an
outcome there already are left out, so that a run that was brought down goes on behind the test that did it.
``--part I/N`` is every N-th test from the I-th on.
"""

import json

import pytest

# After these the device answers nothing more in this process.
_FATAL = ("CUDA error", "device-side assert", "HIP error", "AcceleratorError")


def pytest_addoption(parser):
    group = parser.getgroup("quail bench")
    group.addoption("--rows", required=True)
    group.addoption("--part", default="0/1")


def pytest_configure(config):
    config.pluginmanager.register(_Rows(config.getoption("rows"), config.getoption("part")), "quail-bench-rows")


class _Rows:
    def __init__(self, path: str, part: str):
        self.index, self.parts = map(int, part.split("/"))
        self.file = open(path, "a+", encoding="utf-8")
        self.file.seek(0)
        self.done = {row["test"] for row in map(json.loads, self.file) if "outcome" in row}

    def write(self, **row) -> None:
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config, items):
        mine = items[self.index :: self.parts]
        self.write(collected=[item.nodeid for item in mine])
        items[:] = [item for item in mine if item.nodeid not in self.done]

    def pytest_collectreport(self, report):
        if report.failed:
            self.write(test=report.nodeid, outcome="failed", seconds=0.0, reason=_last_line(report))

    def pytest_runtest_logstart(self, nodeid):
        self.write(test=nodeid, started=True)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        if report.when == "call" or not report.passed and report.when == "setup":
            reason = None
            if report.skipped and isinstance(report.longrepr, tuple):
                reason = report.longrepr[2]
            elif not report.passed:
                reason = _last_line(report)
            self.write(test=item.nodeid, outcome=report.outcome, seconds=round(call.duration, 3), reason=reason)
            if report.failed and any(word in report.longreprtext for word in _FATAL):
                item.session.shouldstop = "the device no longer answers"
        return report


def _last_line(report) -> str:
    """What pytest's own summary says of a failure."""
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash else report.longreprtext
    return " ".join(text.split())[:300]
