"""`make claims`: what it trains, in which order, and the page that it writes. The claims are its own to prove."""

import json
import os
from pathlib import Path

import pytest

from seqfuse.benchmarks import claims, runs
from seqfuse.recipes import RECIPES


@pytest.fixture
def scripts(monkeypatch, tmp_path):
    """A line of Python for each run, which it executes (as `python -m timeit`) instead of training."""
    lines: dict[str, str] = {}

    def command(run, folder):
        return ["timeit", "-n1", "-r1", "-s", "import os, time", lines[run.name]]

    monkeypatch.setattr(runs, "command_of", command)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.chdir(tmp_path)
    return lines


def test_runs_are_trained_side_by_side_after_those_that_they_start_from(scripts, capsys):
    scripts["late"] = "open('late', 'w').write(open('early').read())  # start=RUNS/early/target"
    scripts["early"] = "time.sleep(0.3); open('early', 'w').write(os.environ['OMP_NUM_THREADS'])"
    every = [runs.Run(name, "gpt") for name in scripts]
    assert [runs.needs(run, list(scripts)) for run in every] == [["early"], []]
    runs.train_all(every, Path("runs"), jobs=2)
    assert Path("late").read_text() == "3"  # six cores for two runs
    assert "[2/2] late: 0.0 minutes" in capsys.readouterr().out


def test_a_run_that_fails_is_named_with_what_it_said(scripts):
    scripts["bad"] = "raise OSError('disk full')"
    scripts["needs_bad"] = "open('reached', 'w')  # start=RUNS/bad/target"
    with pytest.raises(SystemExit, match=r"bad was stopped or failed with exit status 1: see runs/bad\.txt"):
        runs.train_all([runs.Run(name, "gpt") for name in scripts], Path("runs"), jobs=2)
    assert "disk full" in Path("runs/bad.txt").read_text()
    assert not Path("reached").exists()


def test_alignment_starts_from_the_models_of_an_earlier_run():
    every = [run for claim in claims.CLAIMS for run in claim.runs]
    sources = {run.name: runs.needs(run, [other.name for other in every]) for run in every}
    assert sources["align-dpo"] == ["align-grpo"] and sources["ulmfit-2"] == ["ulmfit-0"]
    assert sum(map(len, sources.values())) == 4


def test_claims_name_recipes_and_settings_that_exist():
    for claim in claims.CLAIMS:
        for one in claim.runs:
            config = RECIPES[one.recipe].configure(one.settings)
            assert config.seed == one.settings.get("seed", 0)
            assert one.recipe in claims.command_of(one, claims.Path("runs"))


def test_the_page_of_claims(tmp_path):
    """Judged and written from results as runs leave them."""
    claim = next(c for c in claims.CLAIMS if c.name == "bottleneck")
    folders = {}
    for one, value in zip(claim.runs, (0.995, 0.4), strict=True):
        folders[one.name] = tmp_path / one.name
        folders[one.name].mkdir()
        metrics = {"loss": 1.0, "accuracy_at_4": 1.0, "accuracy_at_20": value}
        values = {"metrics": metrics, "steps": 5, "parameters": 1000, "seconds": 3.0}
        (folders[one.name] / "results.json").write_text(json.dumps(values))
    found = claim.judge(folders)
    assert [f.holds for f in found] == [True, True]
    page = claims.page([(claim, folders, found)])
    assert page.count("| yes |") == 2 and "0.995" in page and "--set attention=null` | 20" in page
    assert "accuracy by length" in claim.chart(folders)
    values["metrics"]["accuracy_at_20"] = 0.6
    (folders["bottleneck-fixed"] / "results.json").write_text(json.dumps(values))
    assert [f.holds for f in claim.judge(folders)] == [True, False]
