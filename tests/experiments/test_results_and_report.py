"""results.json holds what a reader needs to compare runs, and report.html shows the same numbers."""

import dataclasses
import html.parser
import json
import subprocess

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.report import format_figure, write_report
from experiments.results import read_results, versions, write_json, write_results


@dataclasses.dataclass(frozen=True)
class Train:
    seed: int = 17
    steps: int = 300


@dataclasses.dataclass(frozen=True)
class Config:
    train: Train = Train()
    source: str = "<stdlib>"
    layer_types: tuple[str, ...] = ("conv", "full_attention")


FIGURES = {
    "bits_per_byte": np.float32(1.4823719),
    "unigram_bits_per_byte": 4.6123,
    "bigram_bits_per_byte": 3.2718,
    "tokens_per_second": jnp.float32(24831.22),
    "tokens": 7_012_352,
    "hf_greedy_agrees": True,
    "model_flops_utilization": None,
    "router": {"dropped": 0, "load": [0.25, 0.75]},
    "samples": [{"prompt": "def <main>(", "text": "argv & 'more'"}],
    "parameter_audit": [
        {"group": "embeddings", "parameters": 67_108_864, "share": 0.18931},
        {"group": "operators", "parameters": 60_000_000, "share": 0.81069},
    ],
    "exports": [
        {"file": "hf/model.safetensors", "bytes": 18_923_221, "max_logit_difference": 3.2e-5, "greedy_agrees": True},
        {"file": "model.gguf", "bytes": 5_923_221, "max_logit_difference": None, "greedy_agrees": False, "note": "<b>"},
    ],
}


class Page(html.parser.HTMLParser):
    """What the page says: the figures, the tables' rows, the curves' names, all its text, and what it would load."""

    def __init__(self, page):
        super().__init__()
        self.figures, self.tables, self.text, self.addresses, self.curves = {}, {}, [], [], 0
        self._figure = self._table = None
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.addresses += [attributes[name] for name in ("src", "href", "srcset") if name in attributes]
        self.curves += attributes.get("class") == "curve"
        if "data-figure" in attributes:
            self._figure, self._table = attributes["data-figure"], None
        if "data-table" in attributes:
            self._figure, self._table = None, self.tables.setdefault(attributes["data-table"], [])
        if tag == "h2":
            self._figure = self._table = None
        if tag == "tr" and self._table is not None:
            self._table.append([])
        if tag == "data" and self._table is not None:
            self._table[-1].append(json.loads(attributes["value"]))
        elif tag == "data" and self._figure:
            self.figures[self._figure] = json.loads(attributes["value"])

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def workdir(tmp_path):
    invocation = {"config": "configs/pretrain.py:nano", "preset_values": {"train.steps": 900}}
    (tmp_path / "config.json").write_text(json.dumps({"experiment": "pretrain", "invocation": invocation}))
    with open(tmp_path / "metrics.jsonl", "w") as file:
        for step in range(2000):
            record = {"step": step, "time": 0.1 * step, "train/loss": 9 - step / 400, "train/learning_rate": 1e-3}
            record |= {"eval/loss": 9 - step / 500, "eval/bits_per_byte": 5 - step / 600} if step % 100 == 0 else {}
            file.write(json.dumps(record) + "\n")
        file.write('{"step": 1999, "train/loss": NaN}\n{"step": 2000, "train/lo')
    write_results(tmp_path, FIGURES, Config())
    return tmp_path


@pytest.fixture
def page(workdir):
    return Page((workdir / "report.html").read_text())


def test_results_hold_figures_config_seed_versions_and_device(workdir, capsys):
    results = read_results(workdir)
    assert results["bits_per_byte"] == float(np.float32(1.4823719))
    assert results["config"] == {
        "train": {"seed": 17, "steps": 300},
        "source": "<stdlib>",
        "layer_types": ["conv", "full_attention"],
    }
    assert results["seed"] == 17
    assert results["versions"]["numpy"] == np.__version__
    assert results["device"]["platform"] == "cpu" and results["device"]["count"] == 8


def test_the_printed_table_has_every_single_figure(tmp_path, capsys):
    write_results(tmp_path, {"bits_per_byte": 1.4823719, "note": "[red]x", "rows": [{"a": 1}]}, Config())
    printed = capsys.readouterr().out
    assert f"{tmp_path}/results.json\n" in printed
    assert "bits_per_byte" in printed and "1.482" in printed and "[red]x" in printed and "rows" not in printed


def test_the_commit_is_this_repositorys():
    commit = versions()["commit"]
    if commit is not None:
        head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        assert commit.removesuffix("+changes") == head


@pytest.mark.parametrize("value", [float("nan"), np.float32("inf"), [1.0, float("nan")]])
def test_a_figure_that_does_not_exist_is_refused(tmp_path, value):
    with pytest.raises(ValueError, match=r"the figure loss(\[1\])? is (nan|inf); give a finite number, or None"):
        write_results(tmp_path, {"loss": value}, Config())


def test_a_figure_of_another_kind_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"the figure best\.run is a set; give a number"):
        write_results(tmp_path, {"best": {"run": {1}}}, Config())


def test_a_figure_called_like_an_entry_is_refused(tmp_path):
    with pytest.raises(ValueError, match="figures may not be called device, seed: results.json has entries of that name"):
        write_results(tmp_path, {"seed": 1, "device": "tpu"}, Config())


def test_a_run_that_has_not_ended_has_no_results(tmp_path):
    with pytest.raises(FileNotFoundError, match="the run there has not ended; the same command resumes it"):
        read_results(tmp_path)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"new": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"old": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_every_single_number_of_the_page_is_the_results_and_none_is_missing(workdir, page):
    results = read_results(workdir)
    expected = {name: value for name, value in results.items() if isinstance(value, int | float) and name != "seed"}
    assert page.figures == {**expected, "router.dropped": 0}
    for name in ("parameter_audit", "exports"):
        rows = [[value for value in row.values() if isinstance(value, int | float)] for row in results[name]]
        assert page.tables[name][1:] == rows


def test_groups_within_a_row_are_columns(tmp_path):
    rows = [{"model": "nano", "groups": {"embeddings": 1_786_432, "norms": 2_624}}, {"model": "other", "groups": {"vision": 7}}]
    write_results(tmp_path, {"models": rows}, Config())
    page = Page((tmp_path / "report.html").read_text())
    assert page.tables["models"][1:] == [[1_786_432, 2_624], [7]]
    text = "".join(page.text)
    assert "groups.embeddings" in text and "groups.vision" in text and "{'" not in text


def test_shown_figures_are_the_exact_ones_rounded(page):
    text = "".join(page.text)
    for shown in ("1.482", "7,012,352", "24,831", "0.25, 0.75", "18.9 %", "18.9 MB", "3.2e-05", "yes", "no"):
        assert shown in text


def test_the_page_loads_nothing(workdir, page):
    assert page.addresses == []
    source = (workdir / "report.html").read_text()
    assert "<script" not in source and "url(" not in source and "@import" not in source and "http" not in source
    assert len(source) < 1_000_000


def test_text_is_escaped(workdir, page):
    source = (workdir / "report.html").read_text()
    assert "<main>(" not in source and "<stdlib>" not in source and "<td><b>" not in source
    assert "def <main>(" in "".join(page.text) and "<stdlib>" in "".join(page.text)


def test_changed_fields_stand_beside_the_presets(workdir):
    source = (workdir / "report.html").read_text()
    changed = [row for row in source.split("<tr") if row.startswith(' class="changed"')]
    assert "train.steps" in changed[0] and "300" in changed[0] and "900" in changed[0]
    assert not any("source" in row for row in changed)


def test_curves_survive_a_stopped_run(workdir, page):
    """A last line cut short and a loss that is no number are left out."""
    assert " nan" not in (workdir / "report.html").read_text()
    assert page.curves == 4  # loss has two
    assert any(text.startswith("eval, step 1900: 5.2") for text in page.text)


def test_a_resumed_runs_later_record_counts(tmp_path):
    records = [{"step": 0, "train/loss": 3.0}, {"step": 1, "train/loss": 77_777.0}, {"step": 1, "train/loss": 2.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    write_results(tmp_path, {}, Config())
    text = "".join(Page((tmp_path / "report.html").read_text()).text)
    assert "step 1: 2" in text and "77,777" not in text


def test_what_is_missing_is_left_out(tmp_path):
    write_results(tmp_path, {}, Config())
    text = "".join(Page((tmp_path / "report.html").read_text()).text)
    assert not any(title in text for title in ("Curves", "Samples", "audit")) and "Configuration" in text


def test_a_report_needs_results(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("value", "name", "shown"),
    [
        (1.23456, "", "1.235"),
        (24831.2, "", "24,831"),
        (3e-4, "", "0.0003"),
        (12345678, "", "12,345,678"),
        (0.18931, "share", "18.9 %"),
        (999, "bytes", "999"),
        (18_923_221, "hf.bytes", "18.9 MB"),
        (3_000_000_000_000, "file_bytes", "3.0 TB"),
        (False, "share", "no"),
        (None, "", "–"),
        ((1, "a"), "", "1, a"),
    ],
)
def test_figures_are_shown_as_people_read_them(value, name, shown):
    assert format_figure(value, name) == shown
