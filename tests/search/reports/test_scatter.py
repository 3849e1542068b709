"""Scatters of scores: what is drawn where, and that the file is whole."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from PIL import Image

from search.reports.scatter import Point, Scatter, draw_scatter, label_best, write_scatters

POINTS = [Point([0.1], [0.5]), Point([0.2, 0.4], [0.5, 0.7], "aspp"), Point([0.4], [0.9]), Point([0.5], [0.8])]


def test_dots_are_means_in_percent_and_known_cells_are_named() -> None:
    axes = Figure().add_subplot()
    draw_scatter(axes, Scatter(POINTS, "mIOU", "proxy", "end to end"))
    dots = sorted(np.asarray(line.get_xydata()).ravel().tolist() for line in axes.lines)
    np.testing.assert_allclose(dots, [(10, 50), (30, 60), (40, 90), (50, 80)], atol=1e-9)  # rounding of the percent
    assert [text.get_text() for text in axes.texts] == ["aspp"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("proxy, mIOU (%)", "end to end, mIOU (%)")
    # The ranks differ by one in the last two: 1 − 6·2 / (4·15).
    assert axes.get_title().startswith("ρ = 0.80 (")
    assert axes.get_title().endswith(", n = 4)")
    other = Figure().add_subplot()
    draw_scatter(other, Scatter(POINTS, "mIOU", "proxy", "end to end", title=""))
    assert other.get_title() == ""


def test_error_bars_are_one_standard_deviation_of_the_sample() -> None:
    axes = Figure().add_subplot()
    draw_scatter(axes, Scatter(POINTS, "mIOU", "proxy", "end to end"))
    bars = [bar.get_segments() for bar in axes.collections if isinstance(bar, LineCollection)]
    lengths = sorted(np.ptp(segments[0], axis=0).tolist() for segments in bars)
    twice_std = 2 * 100 * 0.2 / 2**0.5  # of two values 0.2 apart
    np.testing.assert_allclose(lengths, [(0, twice_std), (twice_std, 0)], atol=1e-9)  # rounding of the percent


def test_two_points_have_no_rank_correlation() -> None:
    axes = Figure().add_subplot()
    draw_scatter(axes, Scatter(POINTS[:2], "mIOU", "proxy", "end to end"))
    assert axes.get_title() == ""


def test_the_file_is_whole_and_alone_but_for_the_svg(tmp_path: Path) -> None:
    path = tmp_path / "new" / "scatter.png"
    write_scatters(path, [Scatter(POINTS, "mIOU", "proxy", "end to end")])
    assert sorted(file.name for file in path.parent.iterdir()) == ["scatter.png", "scatter.svg"]
    with Image.open(path) as picture:
        picture.verify()
    assert path.with_suffix(".svg").read_text(encoding="utf-8").rstrip().endswith("</svg>")


def test_dots_of_the_svg_say_whose_they_are(tmp_path: Path) -> None:
    named = [replace(point, name=name) for point, name in zip(POINTS, ("r6 & r12", "aspp", "pool", "1x1"), strict=True)]
    write_scatters(tmp_path / "s.png", [Scatter(named, "mIOU", "proxy", "end to end")] * 2)
    svg = ElementTree.parse(tmp_path / "s.svg")
    titles = [title.text for title in svg.iter("{http://www.w3.org/2000/svg}title")]
    expected = ["r6 & r12: 10.00 %, 50.00 %", "aspp: 30.00 %, 60.00 %", "pool: 40.00 %, 90.00 %", "1x1: 50.00 %, 80.00 %"]
    assert Counter(titles) == Counter(2 * expected)


def test_the_best_are_named_and_names_do_not_meet() -> None:
    axes = Figure().add_subplot()
    axes.set(xlim=(0, 100), ylim=(0, 100))
    label_best(axes, [(10, 20, "d"), (90, 90, "a"), (89, 89, "b"), (20, 80, "c")], count=3)
    assert [text.get_text() for text in axes.texts] == ["a", "c"]


def test_a_long_name_is_shortened_in_the_picture() -> None:
    axes = Figure().add_subplot()
    draw_scatter(axes, Scatter([Point([0.1], [0.2], "a" * 200)], "mIOU", "proxy", "end to end"))
    assert [len(text.get_text()) for text in axes.texts] == [28]


def test_four_scatters_take_two_rows(tmp_path: Path) -> None:
    sizes = []
    for count in (1, 4):
        write_scatters(tmp_path / "all.png", [Scatter(POINTS, "mIOU", "a", "b")] * count)
        with Image.open(tmp_path / "all.png") as picture:
            sizes.append(picture.size)
    assert sizes[1] == (3 * sizes[0][0], 2 * sizes[0][1])
