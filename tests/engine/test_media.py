"""stg_engine.media: what is written opens again with the right sizes, and nothing half-written is left behind."""

import json

import numpy as np
import pytest
from PIL import Image

from stg_engine import media


def clip(frames: int = 9, height: int = 32, width: int = 64) -> np.ndarray:
    """uint8 [F, H, W, 3]: a white column on black that moves 4 pixels per frame."""
    video = np.zeros((frames, height, width, 3), np.uint8)
    for i in range(frames):
        video[i, :, 4 * i : 4 * i + 8] = 255
    return video


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(paths, force=False, parts=3, then=lambda: None):
    """Write "new" to the first `parts` of the temporary files, then call `then`."""
    with media.all_or_nothing(paths, force=force) as temporary:
        assert {part.parent for part in temporary} == {path.parent for path in paths}
        for part in temporary[:parts]:
            part.write_text("new")
        then()


def throw(error):
    raise error


def test_mp4_holds_every_frame_enlarged_by_an_integer(tmp_path):
    import av

    size = media.write_mp4(tmp_path / "a.mp4", clip(), fps=12)
    assert size == (256, 512)
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == 12
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert decoded.shape == (9, 256, 512, 3)
    shrunk = decoded[:, 4::8, 4::8].astype(int)
    # The codec is lossy and halves the chroma: 6 of 255. A lost or swapped frame gives over 30.
    assert np.abs(shrunk - clip().astype(int)).mean() < 6


def test_mp4_refuses_odd_sizes(tmp_path):
    with pytest.raises(ValueError, match="even height and width, got 257x300"):
        media.write_mp4(tmp_path / "a.mp4", np.zeros((2, 257, 300, 3), np.uint8), fps=12)


@pytest.mark.parametrize(("side", "factor"), [(1, 256), (64, 4), (255, 2), (256, 1), (480, 1)])
def test_upscale_factor(side, factor):
    assert media.upscale_factor(side, 2 * side) == factor


def test_to_uint8_rounds_and_clips():
    frames = np.array([-0.1, 0.0, 0.5, 1.2, 127.4 / 255, 127.6 / 255]).reshape(2, 1, 1, 3)
    assert media.to_uint8(frames).ravel().tolist() == [0, 0, 128, 255, 127, 128]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_to_uint8_refuses_what_is_not_a_number(bad):
    frames = np.zeros((4, 2, 2, 3), np.float32)
    frames[2, 1, 0, 1] = bad
    with pytest.raises(FloatingPointError, match=r"1 of 4 frames \(first: frame 2\)"):
        media.to_uint8(frames)


def test_to_uint8_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"\[F, H, W, 3\], got \[2, 3, 4, 4\]"):
        media.to_uint8(np.zeros((2, 3, 4, 4)))


def test_contact_sheet_size_and_content():
    rows = [("one", clip()), ("two\nlines", 255 - clip())]
    sheet = media.contact_sheet(rows, title="a title")
    cell_w, cell_h = 256, 128  # 32 x 64 enlarged by 4
    grid_w = 9 * cell_w + 8 * 2
    assert sheet.width - grid_w > 2 * 8  # margins and the label column
    pixels = np.asarray(sheet)
    left = sheet.width - 8 - grid_w
    bottom = sheet.height - 8
    last = pixels[bottom - cell_h : bottom, left + 8 * (cell_w + 2) : left + 8 * (cell_w + 2) + cell_w]
    assert np.array_equal(last[::4, ::4], 255 - clip()[8])
    first = pixels[bottom - 2 * cell_h - 2 : bottom - cell_h - 2, left : left + cell_w]
    assert np.array_equal(first[::4, ::4], clip()[0])
    assert (pixels[:, : left - 8] < 128).any()  # a label is drawn


def test_contact_sheet_of_a_long_large_clip_stays_small():
    sheet = media.contact_sheet([("", np.zeros((161, 480, 704, 3), np.uint8))])
    assert sheet.width == 9 * round(704 * 128 / 480) + 8 * 2 + 2 * 8
    assert sheet.height < 200


def test_contact_sheet_of_one_frame():
    assert media.contact_sheet([("x", clip(frames=1))]).height > 128


def test_output_paths(tmp_path):
    assert [p.name for p in media.output_paths(tmp_path / "a.b.mp4")] == ["a.b.mp4", "a.b.png", "a.b.json"]
    for wrong in ("clip", "clip.avi", ".mp4", "clip.mp4.gz"):
        with pytest.raises(ValueError, match=r"ends in \.mp4"):
            media.output_paths(wrong)


def test_all_or_nothing_writes_all(tmp_path):
    paths = media.output_paths(tmp_path / "c.mp4")
    write(paths)
    assert names(tmp_path) == ["c.json", "c.mp4", "c.png"]
    paths[0].write_text("old")
    write(paths, force=True)
    assert names(tmp_path) == ["c.json", "c.mp4", "c.png"]
    assert {path.read_text() for path in paths} == {"new"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
@pytest.mark.parametrize("force", [False, True])
def test_all_or_nothing_leaves_nothing_when_interrupted(tmp_path, error, force):
    paths = media.output_paths(tmp_path / "c.mp4")
    if force:
        paths[1].write_text("old")
    with pytest.raises(error):
        write(paths, force=force, parts=2, then=lambda: throw(error()))
    assert names(tmp_path) == (["c.png"] if force else [])


def test_all_or_nothing_restores_replaced_files_when_a_rename_fails(tmp_path):
    paths = media.output_paths(tmp_path / "c.mp4")
    for path in paths:
        path.write_text("old")
    with pytest.raises(FileNotFoundError):
        write(paths, force=True, parts=2)  # the third is missing, so the third rename fails
    assert {path.read_text() for path in paths} == {"old"}
    assert names(tmp_path) == ["c.json", "c.mp4", "c.png"]


@pytest.mark.parametrize("taken", [0, 1, 2])
def test_a_taken_name_is_refused_before_the_block_runs(tmp_path, taken):
    paths = media.output_paths(tmp_path / "c.mp4")
    paths[taken].write_text("mine")
    with pytest.raises(ValueError, match="--force"):
        write(paths, then=lambda: pytest.fail("the block ran"))
    assert names(tmp_path) == [paths[taken].name]
    assert paths[taken].read_text() == "mine"


def test_a_name_taken_meanwhile_is_not_overwritten(tmp_path):
    paths = media.output_paths(tmp_path / "c.mp4")
    with pytest.raises(ValueError, match="--force"):
        write(paths, then=lambda: paths[2].write_text("somebody else's"))
    assert names(tmp_path) == ["c.json"]
    assert paths[2].read_text() == "somebody else's"


def test_a_dangling_link_counts_as_taken(tmp_path):
    (tmp_path / "c.mp4").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="exists"):
        media.check_writable(media.output_paths(tmp_path / "c.mp4"), force=False)


def test_missing_folder(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        media.check_writable(media.output_paths(tmp_path / "no" / "c.mp4"), force=True)


def test_json_refuses_nan(tmp_path):
    media.write_json(tmp_path / "a.json", {"prompt": "ein Fuß", "x": [1, 2.5]})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"prompt": "ein Fuß", "x": [1, 2.5]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        media.write_json(tmp_path / "b.json", {"x": float("nan")})


def test_png_is_saved_under_a_name_without_its_suffix(tmp_path):
    media.contact_sheet([("x", clip())]).save(tmp_path / ".x.png.1.part", format="PNG")
    with Image.open(tmp_path / ".x.png.1.part") as image:
        assert image.format == "PNG"
