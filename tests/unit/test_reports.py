"""Reports as files."""

from __future__ import annotations

from pathlib import Path

import pytest

from truing.errors import InputError
from truing.reports import Measure, Report
from truing.tables import Table


def test_an_earlier_report_leaves_no_samples_behind(tmp_path: Path) -> None:
    measures = [Measure("gain", 0.25, 0.2, 0.3, 9)]
    with_samples = Report("gain", measures, Table("text", [{"text": "a"}]))
    with_samples.save(tmp_path)
    assert Report.load(tmp_path).samples is not None
    without = Report("gain", measures)
    without.save(tmp_path)
    assert Report.load(tmp_path).samples is None and Report.load(tmp_path).key == without.key
    assert not (tmp_path / "samples").exists()


def test_samples_of_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "photo.png").write_bytes(b"mine")
    report = Report("gain", [Measure("gain", 0.25, 0.2, 0.3, 9)])
    report.save(tmp_path)
    assert (tmp_path / "samples" / "photo.png").read_bytes() == b"mine"
    assert Report.load(tmp_path).samples is None


@pytest.mark.parametrize(
    ("name", "category", "said"),
    [
        ("violaton rate", "", "unknown measure 'violaton rate'. Did you mean 'violation rate'?"),
        ("violation rate", "breif", "unknown category 'breif'. Did you mean 'brief'?"),
        ("by rule", "", "none of that category (seen: ''). Give the category: brief"),
        ("margin", "brief", "none of that category (seen: 'brief'). Leave out the category"),
    ],
)
def test_a_measure_that_is_not_there(name: str, category: str, said: str) -> None:
    measures = [
        Measure(name="violation rate", value=0.5, lo=0.5, hi=0.5, n=2),
        Measure(name="violation rate", value=0.5, lo=0.5, hi=0.5, n=2, category="brief"),
        Measure(name="by rule", value=0.5, lo=0.5, hi=0.5, n=2, category="brief"),
        Measure(name="margin", value=0.5, lo=0.5, hi=0.5, n=2),
    ]
    with pytest.raises(InputError) as error:
        Report("after", measures).get(name, category)
    assert str(error.value).endswith(said)
