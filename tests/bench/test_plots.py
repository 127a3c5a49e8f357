"""What a picture shows, read back from the figure, and that the same rows give the same file."""

from dataclasses import replace

import pytest
from bench.made_up import SECONDS, ladder_rows, step_row

from stg_engine.bench import plots
from stg_engine.bench.cases import CASES
from stg_engine.presets import PRESETS

ROWS = ladder_rows()


def bars(axes):
    return {label.get_text(): bar.get_width() for label, bar in zip(axes.get_yticklabels(), axes.patches, strict=True)}


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_waterfall_parts_lossy_from_exact():
    exact, lossy = plots.waterfall(ROWS).axes
    assert bars(exact) == pytest.approx({name: s for name, s in SECONDS.items() if name != "float8-engine"})
    assert bars(lossy) == pytest.approx({"float8-engine": SECONDS["float8-engine"]})
    assert "LOSSY" in lossy.get_title("left")
    assert "LOSSY" not in exact.get_title("left")
    assert exact.get_xlim() == lossy.get_xlim()


def test_waterfall_says_speed_up_and_bound():
    exact, lossy = plots.waterfall(ROWS).axes
    assert texts(exact)[:4] == ["no STG", "1.00x", "0.96x", "1.11x"]
    assert texts(exact)[list(SECONDS).index("engine")] == "1.88x"
    assert texts(lossy) == ["2.22x\nc - p 31.0% off"]
    (dashed,) = (line for line in exact.lines if line.get_linestyle() == "--")
    assert dashed.get_xdata()[0] == pytest.approx(0.300 * 64 / 84)
    assert "batched-passes / 1.31, sharing alone" in exact.get_title("left")


def test_waterfall_compares_only_within_a_run():
    (axes,) = plots.waterfall([step_row("batched-passes"), step_row("engine", run="two")]).axes
    assert texts(axes) == ["1.00x", ""]
    assert list(bars(axes)) == ["batched-passes", "engine (other run)"]


def test_error_bars_are_the_quartiles():
    (axes,) = plots.waterfall([step_row("engine", low=0.15, high=0.2)]).axes
    (error,) = axes.collections
    ((start, end),) = (segment[:, 0] for segment in error.get_segments())
    assert (start, end) == pytest.approx((0.15, 0.2))


def test_memory_is_relative_to_batched_passes():
    exact, lossy = plots.memory(ROWS).axes
    assert bars(exact)["engine"] == 2.0
    assert texts(exact)[-1] == "0.67"
    assert bars(lossy) == {"float8-engine": 2.0}


def test_memory_needs_a_peak():
    with pytest.raises(ValueError, match="rows: none of them has GiB"):
        plots.memory([replace(row, peak_bytes=None) for row in ROWS])


def test_over_tokens_is_measured_over_ideal():
    small = step_row("engine", case="ltx-video-2b-small", tokens=512, seconds=0.4, ideal_seconds=0.1)
    (axes,) = plots.over_tokens([*ROWS, small]).axes
    handles, labels = axes.get_legend_handles_labels()
    points = dict(zip(labels, (handle.lines[0] for handle in handles), strict=True))
    assert set(points) == {"batched-passes", "compiled-passes", "engine-shared", "engine"}
    assert points["engine"].get_xdata().tolist() == [6144, 512]
    assert points["engine"].get_ydata() == pytest.approx([0.160 / 0.110, 4.0])


def panel(figure, name):
    return next(axes for axes in figure.axes if axes.get_title("left").startswith(f"{name},"))


def test_over_first_layer_draws_the_plans():
    residual, attention, published = panel(plots.over_first_layer([]), "ltx-video-2b").lines
    assert residual.get_ydata()[19] == pytest.approx(64 / 28)
    assert attention.get_ydata()[19] == pytest.approx(65 / 28)
    assert (published.get_xdata()[0], published.get_ydata()[0]) == (19, pytest.approx(64 / 28))
    hunyuan = panel(plots.over_first_layer([]), "hunyuan-video").lines[0]
    assert hunyuan.get_ydata()[2] == pytest.approx(1 + 57 / 60)


@pytest.mark.parametrize("suffix", ["", "-cpu"])
def test_over_first_layer_divides_by_the_efficiency(suffix):
    rows = [
        step_row(v, case=f"ltx-video-2b{suffix}", seconds=s)
        for v, s in (("engine-unshared", 83.0), ("engine-shared", 80.0))
    ]
    figure = plots.over_first_layer(rows)
    measured = panel(figure, "ltx-video-2b").lines[3]
    assert measured.get_ydata() == pytest.approx(64 / 28 * 80 / 64)
    assert len(panel(figure, "mochi").lines) == 3


@pytest.mark.parametrize("name", ["waterfall", "over-tokens"])
@pytest.mark.parametrize("suffix", plots.FORMATS)
def test_the_same_rows_give_the_same_file(name, suffix, tmp_path):
    files = [tmp_path / f"{i}{suffix}" for i in range(2)]
    for file in files:
        plots.write(ROWS, file, plots.PLOTS[name])
    assert files[0].read_bytes() == files[1].read_bytes()
    assert sorted(tmp_path.iterdir()) == files


def test_caption_says_where_and_when(tmp_path):
    figure = plots.waterfall([*ROWS, step_row("engine", commit="def5678")])
    caption = figure.get_supxlabel()
    assert all(text in caption for text in ("Made-up GPU", "bfloat16", "abc1234, def5678", "2026-01-01", "quartiles"))


def test_over_tokens_has_numbers_where_all_are_near_the_ideal():
    rows = [
        step_row(name, seconds=times, ideal_seconds=1.0) for name, times in (("engine", 1.6), ("engine-shared", 1.3))
    ]
    (axes,) = plots.over_tokens(rows).axes
    low, high = axes.get_ylim()
    assert sum(low <= tick <= high for tick in axes.get_yticks()) >= 3


def test_svg_names_its_rows(tmp_path):
    plots.write(ROWS, tmp_path / "a.svg")
    assert plots.digest(ROWS) in (tmp_path / "a.svg").read_text()
    assert plots.digest(ROWS) != plots.digest([*ROWS[:-1], replace(ROWS[-1], seconds=0.2)])


def test_another_suffix_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"plot='a.gif' is not allowed: .* one of .pdf, .png, .svg"):
        plots.write(ROWS, tmp_path / "a.gif")


def test_nothing_to_draw_leaves_no_file(tmp_path):
    with pytest.raises(ValueError, match="nothing to draw"):
        plots.write([], tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(RuntimeError, match=r"pip install .stg-engine\[bench\]"):
        plots.write(ROWS, tmp_path / "a.png")


@pytest.mark.parametrize(("case", "preset"), plots.MODELS.items())
def test_the_dot_is_the_layer_of_the_case(case, preset):
    (measured,), (published,) = CASES[case].config.skips, plots._step(PRESETS[preset]).skips
    assert (measured.layers, measured.mode) == (published.layers, published.mode)
