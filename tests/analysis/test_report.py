"""The report page and its command, on whole runs and on scraps of runs."""

import argparse
import html.parser
import re

import pytest
from synthetic_run import SyntheticRun, write_run

from moejax.analysis.history import build_history
from moejax.analysis.html import render_page
from moejax.analysis.report import write_report
from moejax.commands import report
from moejax.errors import UserError

ALL = {"loss.png", "throughput.png", "optimizer.png", "expert_load.png", "router.png"}
DENSE = {"loss.png", "throughput.png", "optimizer.png"}


class Page(html.parser.HTMLParser):
    """Collects the tags, the attributes that load something, and the text of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.loads, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def pngs(folder) -> set[str]:
    found = set(folder.glob("*.png"))
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in found)
    return {path.name for path in found}


def test_whole_run(tmp_path):
    records = SyntheticRun(num_records=40).records()
    warning = {"event": "warning", "text": "layer 3: expert 5 has received no token <b>"}
    records.insert(20, {"kind": "event", "step": 200, "time": 1.7e9, "values": warning})
    path = write_report(write_run(tmp_path / "run", records))
    assert path == tmp_path / "run" / "report" / "index.html"
    assert pngs(path.parent) == ALL
    text = path.read_text()
    page = Page(text)
    assert "tiny <synthetic>" in page.text
    assert "layer 3: expert 5 has received no token <b>" in page.text
    assert "# <script>alert(1)</script>" in page.text  # shown as text ...
    assert "script" not in page.tags  # ... and not run
    assert "model.block.ffn.router.k = 4" in page.text
    assert "jax 0.10.2" in page.text
    figures = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", text))
    assert figures["Parameters"] == "10.35M"
    assert figures["Steps"] == "400"
    assert figures["Tokens, padding included"] == "819.2k"
    assert figures["gzip -9 on the same files"] == "1.930"
    assert figures["Experts"] == "16 in 4 layers, top-4"
    assert len(page.loads) == len(ALL)
    assert all(load.startswith("data:image/png;base64,") for load in page.loads)
    assert "url(" not in text
    assert "@import" not in text
    finished = records[-1]["values"]["eval/bits_per_byte"]
    assert figures["Held-out bits per byte"] == f"{finished:.3f}"


def test_values_that_are_not_finite(tmp_path):
    records = SyntheticRun(num_records=6).records()
    for record in records[1:]:
        for name in ("loss/lm", "bits_per_byte", "grad_norm", "tokens_per_second", "router/load"):
            if name in record["values"]:
                record["values"][name] = "nan"
    assert pngs(write_report(write_run(tmp_path, records)).parent) >= DENSE


def test_bare_records(tmp_path):
    """A train record with nothing but a loss, and no run record."""
    records = [{"kind": "train", "step": 1, "time": 0, "values": {"loss": 2.0}}]
    text = write_report(write_run(tmp_path, records)).read_text()
    assert "Unnamed run" in text


def test_versions_as_one_line():
    records = SyntheticRun(num_records=2, num_layers=0).records()
    records[0]["values"]["versions"] = "python 3.12, jax 0.12"
    text = render_page(build_history(records), pictures=[], config_text=None)
    assert "<pre>python 3.12\njax 0.12</pre>" in text


@pytest.mark.parametrize("records", [[], SyntheticRun().records()[:1]], ids=["empty", "run only"])
def test_nothing_to_report_yet(tmp_path, records):
    with pytest.raises(UserError, match="no training record yet"):
        write_report(write_run(tmp_path, records))


def test_not_a_run(tmp_path):
    with pytest.raises(UserError, match="no run directory"):
        write_report(tmp_path / "none")
    with pytest.raises(UserError, match=r"holds no metrics\.jsonl"):
        write_report(tmp_path)


def test_out_that_cannot_be_written(tmp_path):
    write_run(tmp_path, SyntheticRun(num_records=2).records())
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="name another folder with --out"):
        write_report(tmp_path, tmp_path / "file")


def test_command_reports_on_a_dense_run(tmp_path, capsys):
    run = write_run(tmp_path / "run", SyntheticRun(num_records=2, num_layers=0).records())
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    assert report.run(parser.parse_args([str(run), "--out", str(tmp_path / "out")])) == 0
    page = tmp_path / "out" / "index.html"
    assert capsys.readouterr().out.strip() == str(page)
    assert pngs(page.parent) == DENSE
    assert "none (dense model)" in page.read_text()
    assert report.EXAMPLE.startswith("moejax report ")
