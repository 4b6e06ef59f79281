"""A run of cases: its document, saved and shown as it grows."""

import time
from datetime import datetime, timezone
from pathlib import Path

from . import results

OUT_OF_TIME = "--budget-s was up before it"


class Run:
    """The document of a run, saved and shown as it grows."""

    def __init__(self, document: dict, path: Path, began: float):
        self.document, self.path, self.began = document, path, began
        self.entries = {entry["name"]: entry for entry in document["cases"]}
        self.save()

    def save(self) -> None:
        self.document["wall_s"] = round(time.monotonic() - self.began, 1)
        results.save(self.document, self.path)

    def tests(self, summary: dict) -> None:
        self.document["tests"] = summary
        self.save()

    def hear(self, kind: str, case: str | None, value) -> None:
        if kind == "roof":
            self.document["roof"] = value
            dry = " (a dry run's: of the CPU, small)" if self.document["size"] == 0 else ""
            print(f"copy bandwidth{dry}: {value['copy_gb_s']:.1f} GB/s\n", flush=True)
        elif kind == "row":
            self.entries[case]["rows"].append(value)
        else:
            self._end(self.entries[case], *value)
        self.save()

    def _end(self, entry: dict, outcome: str, reason: str | None) -> None:
        told = {row["peer"] for row in entry["rows"]}
        if any(row["outcome"] in ("failed", "check failed") for row in entry["rows"]):
            outcome, reason = "failed", "see its rows"
        elif told and (missing := [peer for peer in entry["peers"] if peer not in told]):
            outcome, reason = "incomplete", f"the time was up before {', '.join(missing)}"
        elif outcome == "measured" and not told:
            outcome, reason = "skipped", OUT_OF_TIME
        entry |= {"outcome": outcome, "reason": reason}
        results.derive(entry, (self.document["roof"] or {}).get("copy_gb_s"))
        print(results.table(entry) + "\n", flush=True)

    def finish(self, outcome: str) -> None:
        for entry in self.entries.values():
            if entry["reason"] == results.NOT_REACHED:
                self._end(entry, "skipped", OUT_OF_TIME if outcome == "finished" else "the run was ended before it")
        self.document |= {"outcome": outcome, "finished": now()}
        self.save()

    def failed(self) -> bool:
        tests = self.document["tests"]
        tests_failed = tests is not None and tests["outcome"] in ("failed", "not run")
        return tests_failed or any(entry["outcome"] == "failed" for entry in self.entries.values())


def now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
