"""The README's generated parts are what the code and the CSV say today."""

from benchmarks.readme import README, generated


def test_generated_parts_are_current():
    text = README.read_text()
    assert generated(text) == text, "run `make readme`"
