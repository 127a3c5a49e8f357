"""The generated parts of the docs are what the code and the CSV say today."""

import pytest

from benchmarks import plots, readme, record
from benchmarks.readme import PAGES, generated


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_generated_parts_are_current(page):
    assert generated(page) == page.read_text(), "run `make readme`"


def test_pictures_are_current():
    assert not plots.stale(record.read(record.STEPS, record.StepRow)), "run `make readme`"


def test_check_names_what_is_stale(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["readme", "--check"])
    assert readme.main() == 0
    monkeypatch.setattr(plots, "stale", lambda rows: ["steps.svg"])
    assert readme.main() == 1
    assert "steps.svg is not what" in capsys.readouterr().out
