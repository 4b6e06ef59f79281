"""An audit as a process: memory, interruptions, gates, pages, and what it does with files."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import llama

from quail import audit
from quail.auditing.audit import place
from quail.auditing.gates import parse_gate
from quail_kernels import fake_quant

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
GIB = 1 << 30


def quail(*arguments, **options):
    command = [sys.executable, "-m", "quail", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=600, **options)


def update(model, size, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    llama().save_pretrained(folder / "before")
    update(llama(), 1e-3).save_pretrained(folder / "after")
    return folder / "before", folder / "after"


@pytest.fixture(scope="module")
def on_grid(tmp_path_factory):
    """(BEFORE, which was shipped in NF4, AFTER an update that does not leave a bucket)."""
    folder = tmp_path_factory.mktemp("on_grid")
    model = llama().bfloat16()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter.copy_(fake_quant(parameter, "bnb-nf4"))
    model.save_pretrained(folder / "before")
    update(model, 1e-5).save_pretrained(folder / "after")
    return folder / "before", folder / "after"


def sparse(folder, tensors):
    """A safetensors file of zeros in bf16 that takes no room on the disk."""
    folder.mkdir()
    header, offset = {}, 0
    for name, shape in tensors.items():
        end = offset + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    return offset


def test_a_pair_of_20_gib_is_compared_in_less_than_one(tmp_path):
    # Most of it in tensors that no recipe quantizes, which take the least time; one matrix of half a gigabyte is
    # quantized, by a recipe that reads it twice.
    tensors = {f"model.embed_{i}.weight": [1 << 17, 1 << 13] for i in range(5)}
    tensors["model.layers.0.mlp.down_proj.weight"] = [1 << 14, 1 << 14]
    size = sum(sparse(tmp_path / side, tensors) for side in ("before", "after"))
    assert size > 20 * GIB
    code = (
        "import re, sys; from pathlib import Path; from quail import audit;"
        "report = audit(*sys.argv[1:], ['minmax-int4'], workers=2);"
        # The resource module would count the memory of the process that started this one.
        "peak = 1024 * int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]);"
        "print(peak, report.formats['minmax-int4'].figures.weights)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "before", tmp_path / "after"],
        capture_output=True, text=True, env=ENVIRONMENT, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    peak, weights = map(int, done.stdout.split())
    assert weights == 1 << 28
    assert peak < GIB, f"{peak / GIB:.2f} GiB"


def test_blocks_and_workers_do_not_show(checkpoints, monkeypatch):
    whole = audit(*checkpoints, workers=1)
    monkeypatch.setitem(audit.__globals__["_BLOCK_WEIGHTS"], "cpu", 1 << 9)
    in_blocks = audit(*checkpoints, workers=3)
    for a, b in zip(whole.tensors, in_blocks.tensors, strict=True):
        assert (a.name, a.figures.same_code, a.figures.zero_groups) == (
            b.name,
            b.figures.same_code,
            b.figures.zero_groups,
        )
        assert a.figures.on_grid_share == b.figures.on_grid_share
        assert a.figures.update_norm == pytest.approx(b.figures.update_norm, rel=1e-6)
        assert a.figures.delivered_share == pytest.approx(b.figures.delivered_share, rel=1e-6)
    assert audit(*checkpoints, workers=2) == audit(*checkpoints, workers=3)


def test_layers_modules_and_cells_add_up_to_the_total(checkpoints):
    report = audit(*checkpoints, ["bnb-nf4", "minmax-int4"])
    for format, total in report.formats.items():
        for rows in (report.layers, report.modules, report.cells, report.tensors):
            of_format = [row for row in rows if row.format == format]
            assert sum(row.tensors for row in of_format) == total.tensors == 14
            assert sum(row.figures.weights for row in of_format) == total.figures.weights
            assert sum(row.figures.changed for row in of_format) == total.figures.changed
    assert [row.name for row in report.layers if row.format == "bnb-nf4"] == ["model.layers.0", "model.layers.1"]
    assert {row.name for row in report.modules} >= {"self_attn.q_proj", "mlp.down_proj"}


@pytest.mark.parametrize(
    ("name", "layer", "module"),
    [
        ("model.layers.11.self_attn.q_proj.weight", "model.layers.11", "self_attn.q_proj"),
        ("h.0.mlp.c_fc.weight", "h.0", "mlp.c_fc"),
        ("model.layers.3.mlp.experts.17.up_proj.weight", "model.layers.3", "mlp.experts.*.up_proj"),
        ("bert2.pooler.dense.weight", "", "bert2.pooler.dense"),
        ("0.weight", "", "0"),
    ],
)
def test_a_weight_has_its_place(name, layer, module):
    assert place(name) == (layer, module)


def test_an_update_inside_its_buckets_is_lost_and_said_to_be(on_grid):
    report = audit(*on_grid, ["bnb-nf4"])
    row = report.formats["bnb-nf4"]
    assert row.shipped_in == "this recipe"
    assert row.figures.delivered_share == row.figures.delivered_norm == 0
    assert row.figures.delivered_cosine is None
    assert row.lost_layers == ("model.layers.0", "model.layers.1") and row.lost_tensors == 14
    first = next(line for line in report.to_markdown().splitlines() if line.startswith("| bnb-nf4"))
    assert first.split("|")[2].strip() == "lost" and "<td>lost</td>" in report.to_html()
    assert "lost the update altogether" in report.verdict
    assert "Of the update 0 % arrives" in report.verdict


def test_a_large_update_is_delivered(checkpoints, tmp_path):
    update(llama(), 1.0).save_pretrained(tmp_path)
    figures = audit(checkpoints[0], tmp_path, ["bnb-nf4"]).formats["bnb-nf4"].figures
    assert figures.delivered_share == pytest.approx(1, abs=0.02)
    assert figures.delivered_cosine > 0.98
    assert figures.step_share_p50 == 2


def test_gates_decide_the_exit_code(on_grid, checkpoints):
    lost = quail(
        "audit", *on_grid, "--formats", "bnb-nf4", "--fail-if", "delivered_share<0.5", "--fail-if", "changed>0"
    )
    assert lost.returncode == 1
    assert lost.stderr.splitlines() == ["quail: gate failed: bnb-nf4: delivered_share 0 < 0.5"]
    assert "Audit in 4 bits" in lost.stdout
    fine = quail("audit", *checkpoints, "--formats", "bnb-nf4", "--fail-if", "bnb-nf4:lost_layers>0")
    assert (fine.returncode, fine.stderr) == (0, "")


def test_a_figure_that_is_undefined_fails_its_gate(checkpoints):
    report = audit(checkpoints[0], checkpoints[0], ["bnb-nf4", "minmax-int4"])
    gate = parse_gate("minmax-int4 : delivered_cosine >= 0.9", ("bnb-nf4", "minmax-int4"))
    assert [line.split(",")[0] for line in gate.failures(report)] == ["minmax-int4: delivered_cosine is undefined"]
    assert parse_gate("changed>0", ("bnb-nf4",)).failures(report) == []


@pytest.mark.parametrize(
    ("condition", "got"),
    [
        ("delivered_cosine", "'delivered_cosine'"),
        ("changed=0", "'changed=0'"),
        ("changed>many", "'changed>many'"),
        ("changed>nan", "'changed>nan'"),
        ("overlap>0.5", "'overlap'"),
        ("bnb-fp4:changed>0", "'bnb-fp4'"),
        ("", "''"),
    ],
)
def test_a_gate_that_says_nothing_is_refused_before_anything_is_read(tmp_path, condition, got):
    done = quail("audit", tmp_path / "no", tmp_path / "no", "--formats", "bnb-nf4", "--fail-if", condition)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "fail-if: expected" in done.stderr
    assert done.stderr.rstrip().endswith(f"got {got}")


class Page(HTMLParser):
    """Tags with their attributes, what is open, and the text of cells."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.cells = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "td":
            self.cells.append(data)


def test_the_page_needs_nothing_beside_it(checkpoints, tmp_path):
    done = quail("audit", *checkpoints, "--formats", "bnb-nf4,ct-int4-sym", "--html", tmp_path / "audit.html")
    assert (done.returncode, done.stderr) == (0, "")
    text = (tmp_path / "audit.html").read_text()
    page = Page(text)
    assert page.open == []
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in page.tags}
    assert not [attributes for _, attributes in page.tags if {"src", "href"} & attributes.keys()]
    assert "url(" not in text and "http" not in text
    titles = [attributes["title"] for tag, attributes in page.tags if tag == "td" and "title" in attributes]
    # 14 tensors in NF4; the two whose rows are a multiple of 128 in int4.
    assert len(titles) == 16
    assert any(title.startswith("model.layers.1.mlp.down_proj\n8192 weights") for title in titles)


def test_names_cannot_put_markup_into_the_page(tmp_path):
    name = "model.layers.0.<script>alert(1)</script>.weight"
    save_file({name: torch.randn(64, 64)}, tmp_path / "model.safetensors")
    text = audit(tmp_path, tmp_path, ["bnb-nf4"]).to_html()
    assert "<script" not in text and "&lt;script&gt;" in text


@pytest.mark.parametrize("option", ["--json", "--html"])
def test_a_report_is_never_overwritten_and_that_is_said_at_once(tmp_path, option):
    (tmp_path / "there").write_text("mine")
    done = quail("audit", tmp_path / "no", tmp_path / "no", option, tmp_path / "there")
    assert done.returncode == 2 and "already exists" in done.stderr
    assert (tmp_path / "there").read_text() == "mine"


def test_an_interrupted_audit_leaves_no_report_and_goes_on(tmp_path):
    model = llama(num_key_value_heads=4)
    for side, size in (("before", 0), ("after", 1e-3)):
        tensors = {}
        for i in range(24):
            name = f"model.layers.{i}.mlp.down_proj.weight"
            generator = torch.Generator().manual_seed(i)
            w = torch.randn(2048, 1024, generator=generator)
            tensors[name] = (w + size * torch.randn(w.shape, generator=generator)).bfloat16()
        (tmp_path / side).mkdir()
        save_file(tensors, tmp_path / side / "model.safetensors")
    del model
    sides = tmp_path / "before", tmp_path / "after"
    command = [sys.executable, "-m", "quail", "audit", *sides, "--json", tmp_path / "audit.json"]
    command += ["--resume", tmp_path / "done"]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "done").exists() or len((tmp_path / "done").read_bytes().splitlines()) < 4:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == "" and err.count("\n") == 1 and "interrupted" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["after", "before", "done"]
    lines = (tmp_path / "done").read_bytes().splitlines()
    assert 4 <= len(lines) < 25

    # A line that was cut short counts for nothing.
    (tmp_path / "done").write_bytes(b"\n".join(lines) + b'\n{"name": "model.la')
    other = quail("audit", *sides, "--formats", "bnb-nf4", "--resume", tmp_path / "done")
    assert other.returncode == 2 and "with these checkpoints and arguments" in other.stderr
    seen = []
    first = json.loads(lines[1])["name"]
    report = audit(*sides, resume=tmp_path / "done")
    assert not (tmp_path / "done").exists()
    assert report == audit(*sides)
    assert first in {row.name for row in report.tensors} and not seen


def test_what_is_done_is_not_done_again(checkpoints, tmp_path, monkeypatch):
    run = audit.__globals__["_Run"]
    compare, names = run._compare, []

    def stop_after_five(self, pair):
        if len(names) == 5:
            raise KeyboardInterrupt
        names.append(pair.name)
        return compare(self, pair)

    monkeypatch.setattr(run, "_compare", stop_after_five)
    with pytest.raises(KeyboardInterrupt):
        audit(*checkpoints, workers=1, resume=tmp_path / "done")
    done, names = list(names), []
    monkeypatch.setattr(run, "_compare", lambda self, pair: (names.append(pair.name), compare(self, pair))[1])
    report = audit(*checkpoints, workers=1, resume=tmp_path / "done")
    assert len(done) == 5 and len(names) == 9 and not {*done} & {*names}
    monkeypatch.undo()
    assert report == audit(*checkpoints)


@pytest.mark.parametrize("text", ["not json\n", "mine", '{"audit": {}}\n', "[]\n", '{"audit"'])
def test_a_file_that_is_no_such_record_is_left_alone(checkpoints, tmp_path, text):
    (tmp_path / "done").write_text(text)
    with pytest.raises(ValueError, match="^resume: expected .*; got "):
        audit(*checkpoints, resume=tmp_path / "done")
    assert (tmp_path / "done").read_text() == text


def test_a_checkpoint_that_changed_is_no_longer_the_one_that_was_audited(checkpoints, tmp_path):
    update(llama(), 1e-3).save_pretrained(tmp_path / "after")
    sides = checkpoints[0], tmp_path / "after"
    journal = tmp_path / "done"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quail.auditing.journal.Journal.remove", lambda self: None)
        audit(*sides, resume=journal)
    os.utime(tmp_path / "after" / "model.safetensors")
    with pytest.raises(ValueError, match="with these checkpoints and arguments"):
        audit(*sides, resume=journal)


def test_a_file_that_shrinks_while_it_is_read_is_one_line(checkpoints, tmp_path, monkeypatch):
    update(llama(), 1e-3).save_pretrained(tmp_path)
    matching = audit.__globals__["_match"]

    def shrink(*arguments):
        os.truncate(tmp_path / "model.safetensors", 1 << 16)
        return matching(*arguments)

    monkeypatch.setitem(audit.__globals__, "_match", shrink)
    with pytest.raises(ValueError, match=r"^model\.safetensors: expected .* whole; got a file that became shorter$"):
        audit(checkpoints[0], tmp_path)


def test_requests_that_cannot_be_met_are_one_line(checkpoints):
    for options, got in ((dict(device="cuda:99"), "cuda:99"), (dict(device="meta"), "meta"), (dict(workers=0), "0")):
        with pytest.raises(ValueError, match=f"expected .* got .*{re.escape(got)}"):
            audit(*checkpoints, **options)


def test_the_library_call_is_one_import_away():
    code = "import sys, quail; assert 'torch' not in sys.modules; from quail import AuditReport, audit; print(audit)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.stdout.startswith("<function audit"), done.stderr
