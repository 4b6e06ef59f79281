"""Cells are known by what decides their result, and a run's folder holds whole files of one process at a time."""

import dataclasses
import subprocess
import sys

import pytest

from quail.experiments import cells
from quail.experiments.cells import Cell, Store, digest_of, digest_of_file, rounded

LEARN = Cell("learn", {"seed": 0, "learn": {"epochs": 3, "learning_rate": 1e-3}}, {"seed": 0})
START = Cell("start", {"regime": "16bit"}, {"seed": 0, "regime": "16bit"}, LEARN)


def test_a_key_depends_on_every_input_and_on_no_order():
    same = Cell("learn", {"learn": {"learning_rate": 0.001, "epochs": 3}, "seed": 0}, {"seed": 7})
    assert same.key == LEARN.key
    others = [
        dataclasses.replace(LEARN, inputs=LEARN.inputs | {"seed": 1}),
        dataclasses.replace(LEARN, inputs=LEARN.inputs | {"learn": {"epochs": 3, "learning_rate": 1.1e-3}}),
        dataclasses.replace(LEARN, stage="start"),
        dataclasses.replace(LEARN, parent=START),
    ]
    assert len({cell.key for cell in [LEARN, *others]}) == 5


def test_a_key_depends_on_the_cells_before_it():
    assert START.key != dataclasses.replace(START, parent=dataclasses.replace(LEARN, inputs={"seed": 1})).key


def test_a_key_depends_on_the_version_of_its_own_stage_and_of_those_before(monkeypatch):
    before = [Cell(c.stage, c.inputs, c.where, c.parent).key for c in (LEARN, START)]
    monkeypatch.setitem(cells.STAGE_VERSIONS, "start", 99)
    learn = Cell(LEARN.stage, LEARN.inputs, LEARN.where)
    start = Cell(START.stage, START.inputs, START.where, learn)
    assert learn.key == before[0] and start.key != before[1]
    monkeypatch.setitem(cells.STAGE_VERSIONS, "learn", 99)
    learn = Cell(LEARN.stage, LEARN.inputs, LEARN.where)
    assert learn.key != before[0] and Cell(START.stage, START.inputs, START.where, learn).key != start.key


def test_digests_are_known_ones(tmp_path):
    # printf '{"a":[1,null],"b":"ü"}' | sha256sum
    assert digest_of({"b": "ü", "a": [1, None]}) == digest_of_bytes('{"a":[1,null],"b":"ü"}'.encode())
    (tmp_path / "file").write_bytes(b"abc")
    assert digest_of_file(tmp_path / "file") == "ba7816bf8f01cfea414140de"  # FIPS 180-4's example "abc"


def digest_of_bytes(data):
    import hashlib

    return hashlib.sha256(data).hexdigest()[:24]


def test_no_number_without_json():
    with pytest.raises(ValueError):
        digest_of({"a": float("nan")})
    assert rounded({"a": [1.23456789, float("inf"), 3, True], "b": float("nan")}, 3) == {
        "a": [1.23, None, 3, True],
        "b": None,
    }


def test_what_is_written_is_read(tmp_path):
    store = Store(tmp_path / "run").open()
    assert store.read(START) is None
    store.write(START, {"a": 1}, 1.234, {})
    assert store.read(START)["outputs"] == {"a": 1} and store.read(LEARN) is None
    assert store.seconds("start") == [1.23] and store.seconds("learn") == []
    store.close()
    assert Store(tmp_path / "run").open().read(START)["parent"] == LEARN.key


def test_a_broken_cell_counts_as_none(tmp_path):
    store = Store(tmp_path).open()
    store.write(START, {"a": 1}, 1.0, {})
    path = next((tmp_path / "cells").glob("start-*"))
    path.write_text(path.read_text()[:20])
    assert store.read(START) is None and store.seconds("start") == []


def test_remains_of_a_killed_process_are_removed(tmp_path):
    Store(tmp_path).open().close()
    (tmp_path / "checkpoints" / "x.partial").mkdir()
    (tmp_path / "cells" / "learn-x.json.partial").write_text("{")
    (tmp_path / "RESULTS.json.partial").write_text("{")
    (tmp_path / "scratch" / "deep").mkdir(parents=True)
    Store(tmp_path).open().close()
    assert sorted(path.name for path in tmp_path.rglob("*")) == [".gitignore", "cells", "checkpoints", "lock"]


def test_a_folder_of_someone_elses_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="out: expected a new folder or one of .* run; got .* holds thesis.tex"):
        Store(tmp_path)
    with pytest.raises(ValueError, match="out: expected a new folder"):
        Store(tmp_path / "thesis.tex")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_one_process_at_a_time_and_a_killed_one_leaves_no_lock(tmp_path):
    hold = (
        "import sys, time; from quail.experiments.cells import Store; "
        f"store = Store({str(tmp_path)!r}).open(); print('held', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "held\n"
            with pytest.raises(ValueError, match=f"no other process works on; got .* held by process {process.pid}"):
                Store(tmp_path).open()
        finally:
            process.kill()
    Store(tmp_path).open().close()


def test_what_others_put_beside_a_run_does_not_stop_it(tmp_path):
    store = Store(tmp_path).open()
    store.write_text("run.json", "{}")
    store.close()
    (tmp_path / "report.html").write_text("")
    Store(tmp_path).open().close()
    assert (tmp_path / "report.html").exists()


def test_a_checkpoint_is_dropped_whole(tmp_path, monkeypatch):
    store = Store(tmp_path).open()
    store.checkpoint(LEARN).mkdir()
    (store.checkpoint(LEARN) / "config.json").write_text("{}")
    with monkeypatch.context() as killed:
        killed.setattr(cells.shutil, "rmtree", lambda *args, **options: None)
        store.drop_checkpoint(LEARN)
    assert not store.checkpoint(LEARN).exists()
    store.close()
    Store(tmp_path).open().close()
    assert not list((tmp_path / "checkpoints").iterdir())
