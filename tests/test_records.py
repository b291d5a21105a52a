"""Records of benchmarks: what they hold, and the pictures and pages that are made of them."""

import statistics
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from seqfuse.benchmarks import overview, plot, records
from seqfuse.benchmarks.records import Row

ROOT = Path(__file__).resolve().parent.parent
TEXT = "{http://www.w3.org/2000/svg}text"
ROWS = [
    Row("gru", "T4-B1-H8", "fwd+bwd", dtype, "seqfuse", asked="auto", backend="cpu", ratio=ratio, median_ms=1.0)
    for dtype, ratio in (("fp32", 2.0), ("fp32", 0.5), ("bf16", 3.0))
]


def write(path, rows):
    head = {
        "date": "2026-01-31T00:00:00",
        "machine": records.machine("cpu")
        | {"isa": "avx2", "build_mkl_is_narrow": False, "build_bf16_dots_are_slow": False},
    }
    records.write(path, head, rows)
    return records.read(path)


def test_geomeans():
    means = {m["dtype"]: m for m in records.geomeans(ROWS)}
    assert means["fp32"]["geomean"] == statistics.geometric_mean([2.0, 0.5]) and means["fp32"]["worst"] == 0.5
    assert means["bf16"]["cases"] == 1


def test_round_trip(tmp_path):
    assert write(tmp_path / "r.json", ROWS)["rows"] == ROWS


def test_commit_of_the_checkout():
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    assert len(records.commit()["commit"]) == 40


def test_plot(tmp_path, capsys):
    path = tmp_path / "r.json"
    write(path, ROWS)
    assert plot.main([str(path)]) == 0
    root = ElementTree.parse(tmp_path / "r.svg").getroot()
    texts = [t.text for t in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"gru", "T4-B1-H8", "3.00x", "fp32", "bf16"} <= set(texts)
    assert plot.main([str(path), "--mode", "fwd"]) == 2 and "no ratio" in capsys.readouterr().err


def test_not_a_record(tmp_path, capsys):
    (tmp_path / "x.json").write_text("[]")
    assert plot.main([str(tmp_path / "x.json")]) == 2 and "no benchmark record" in capsys.readouterr().err
    assert plot.main([str(tmp_path / "missing.json")]) == 2


def measured(case, ratio, op="gru", mode="fwd+bwd", asked="auto"):
    return Row(op, case, mode, "fp32", "seqfuse", asked=asked, backend="cpu", ratio=ratio, median_ms=1.0)


def record(date, isa, *rows):
    return {"date": date, "machine": {"isa": isa, "cpu": "a processor", "torch": "2.13.0"}, "rows": list(rows)}


def test_overview_takes_the_newest_record_of_each_case_and_what_auto_chose():
    older = record("2026-01-01", "avx2", measured("T4-B1-H8", 9.0), measured("T8-B1-H8", 2.0))
    newer = record("2026-02-01", "avx2", measured("T4-B1-H8", 8.0), measured("T4-B1-H8", 50.0, asked="cpu"))
    other = record("2026-01-15", "amx", measured("T4-B1-H8", 3.0), measured("T4-B1-H8", 5.0, mode="fwd"))
    wide = record("2026-01-15", "avx512_bf16", measured("T4-B1-H8", 4.0))
    wide["machine"]["build_mkl_is_narrow"] = True
    slow = record("2026-01-15", "avx512_bf16", measured("T4-B1-H8", 6.0))
    slow["machine"]["build_bf16_dots_are_slow"] = True
    assert overview.points([newer, older, other, wide, slow]) == {
        "gru": {"fp32": {"avx2": [8.0, 2.0], "amx": [3.0], "zen5": [4.0], "slow_dots": [6.0]}}
    }


@pytest.mark.parametrize(
    "op, case, kind",
    [
        ("attention", "window-B1-H4-T4096-D64", "window"),
        ("attention", "biases-B4-H8-T512-D64", "bias"),
        ("rnn_cell", "lstm-T100-B1-H256", "LSTMCell"),
        ("gru", "T64-B32-H512-lengths", "lengths"),
        ("layer_norm", "64x512-residual", "layer_norm, residual"),
    ],
)
def test_kinds_of_cases(op, case, kind):
    assert overview.kind_of(measured(case, 1.0, op)) == kind and kind in overview.KINDS


def test_overview_writes_picture_and_page(tmp_path, capsys):
    write(tmp_path / "cpu-x.json", [measured("T4-B1-H8", 2.0), measured("T8-B1-H8", 8.0)])
    assert overview.main([str(tmp_path), "-o", str(tmp_path)]) == 0
    root = ElementTree.parse(tmp_path / "performance.svg").getroot()
    assert {"GRU", "fp32", "1x", "8x"} <= {t.text for t in root.iter(TEXT)}
    titles = [t.text for t in root.iter("{http://www.w3.org/2000/svg}title")]
    assert titles == ["GRU, fp32, AVX2: 4.00x over 2 cases, 2.00x to 8.00x"]
    page = (tmp_path / "performance.md").read_text()
    assert "| GRU | fp32 |" in page and "| | | AVX2 |" in page and "4.00, 2.00" in page and "cpu-x.json" in page
    assert overview.main([str(tmp_path / "none"), "-o", str(tmp_path)]) == 2
    assert "no ratio" in capsys.readouterr().err


def test_the_legend_fits_the_picture():
    root = ElementTree.fromstring(overview.svg({"gru": {"fp32": {kind: [2.0] for kind in overview.MACHINES}}}))
    ends = {
        t.text: float(t.get("x")) + 7 * len(t.text) for t in root.iter(TEXT) if t.text in overview.MACHINES.values()
    }
    assert set(ends) == set(overview.MACHINES.values()) and max(ends.values()) <= overview.WIDTH


def test_the_page_in_docs_is_of_the_records_there_are(tmp_path):
    if not (ROOT / "docs").is_dir():
        pytest.skip("not a checkout")
    assert overview.main([str(ROOT / "benchmarks" / "records"), "-o", str(tmp_path)]) == 0
    for name in ("performance.svg", "performance.md"):
        assert (tmp_path / name).read_text() == (ROOT / "docs" / name).read_text(), "run seqfuse.benchmarks.overview"
