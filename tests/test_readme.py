"""The generated parts of the docs are what the code and the CSV say today."""

import pytest

from benchmarks.readme import PAGES, generated


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_generated_parts_are_current(page):
    assert generated(page) == page.read_text(), "run `make readme`"
