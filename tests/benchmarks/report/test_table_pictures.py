import html
import itertools
import math
import re
import struct
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest
from tests.support.paths import GOLDEN

from dsc_split.benchmarks.report._table_pictures import (
    _spread,
    choice_names,
    draw_latency,
    draw_map,
    draw_plots,
    draw_terms,
)
from dsc_split.errors import UsageError
from dsc_split.lookup_table import Choice, LookupTable, State


def golden() -> LookupTable:
    return LookupTable.load(GOLDEN)


def svg_texts(path: Path) -> str:
    """Return the texts of a picture: matplotlib writes each as a comment beside its outlines."""
    picture = path.read_text()
    assert ET.fromstring(picture).tag == "{http://www.w3.org/2000/svg}svg"
    return "\n".join(html.unescape(text).strip() for text in re.findall("<!--(.*?)-->", picture, re.DOTALL))


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def test_all_pictures_are_pngs_of_a_readable_size(tmp_path: Path) -> None:
    paths = draw_plots(golden(), tmp_path / "deep" / "plots", batch=4, rate_mb_s=12.0)

    assert [path.name for path in paths] == [
        "best_choice.png",
        "latency_batch4.png",
        "terms_batch4_rate12.png",
    ]
    for path in paths:
        width, height = png_size(path)
        assert width == 1260
        assert 300 < height < 1500
        assert path.stat().st_size > 10_000
    assert sorted(path.name for path in (tmp_path / "deep" / "plots").iterdir()) == sorted(p.name for p in paths)


def test_the_map_names_axes_choices_link_and_emulation(tmp_path: Path) -> None:
    texts = svg_texts(draw_map(golden(), tmp_path / "map.svg"))

    for text in (
        "Best choice by batch size and data rate",
        "EMULATED: device slowdown 6",
        "link: paper",
        "batch size",
        "data rate in MB/s",
        "full-offload",
        "features.4.0",
        "no-offload",
        "128",
    ):
        assert text in texts


def test_every_segment_of_the_map_that_is_wide_enough_is_labelled(tmp_path: Path) -> None:
    texts = svg_texts(draw_map(golden(), tmp_path / "map.svg")).splitlines()

    # one label for each batch size in which the choice is the best over a wide range, and one in the legend
    assert texts.count("no-offload") == 2 + 1
    assert texts.count("full-offload") == 3 + 1
    assert texts.count("features.4.0") == 3 + 1


def test_a_segment_that_is_too_narrow_for_its_name_has_no_label(tmp_path: Path) -> None:
    first = golden().batches[0]
    below = (20.0, 20.5, None)
    segments = tuple(replace(item, below_rate_mb_s=rate) for item, rate in zip(first.segments, below, strict=True))
    table = replace(golden(), batches=(replace(first, segments=segments),))
    texts = svg_texts(draw_map(table, tmp_path / "map.svg")).splitlines()

    assert (texts.count("no-offload"), texts.count("features.4.0"), texts.count("features.")) == (2, 1, 0)


def test_pictures_of_a_batch_that_was_not_measured_say_whose_times_they_show(tmp_path: Path) -> None:
    latency = svg_texts(draw_latency(golden(), tmp_path / "latency.svg", batch=3)).splitlines()
    terms = svg_texts(draw_terms(golden(), tmp_path / "terms.svg", batch=3, rate_mb_s=8.0)).splitlines()

    assert "Latency against data rate, batch 3 (times of batch 4)" in latency
    assert "Where the time goes, batch 3 (times of batch 4) at 8 MB/s" in terms


def test_nothing_is_called_emulated_that_was_measured(tmp_path: Path) -> None:
    assert "EMULATED" not in svg_texts(draw_map(replace(golden(), emulated=None), tmp_path / "map.svg"))


def test_the_latency_picture_names_every_choice_and_every_switch_rate(tmp_path: Path) -> None:
    texts = svg_texts(draw_latency(golden(), tmp_path / "latency.svg", batch=1)).splitlines()

    assert {"4.69", "25", "full-offload", "features.4.0", "no-offload"} <= set(texts)
    assert "latency T in ms" in texts


def test_the_picture_of_terms_marks_the_best_and_leaves_out_terms_that_are_0(tmp_path: Path) -> None:
    texts = svg_texts(draw_terms(golden(), tmp_path / "terms.svg", batch=1, rate_mb_s=8.0)).splitlines()

    assert [text for text in texts if "best" in text] == ["46.75 ms  best"]
    assert {"head", "uplink", "tail"} <= set(texts)
    assert not {"downlink", "server queue", "network, fixed"} & set(texts)


def test_long_names_are_shortened_and_told_apart() -> None:
    table = golden()
    start, end = "encoder.layers.first.", ".activation.output"
    choices = [Choice(id=i, kind="split", name=f"{start}{'x' * 20}{i}{end}") for i in (1, 2)]
    names = choice_names(replace(table, choices=(table.choices[0], *choices)))

    assert names[0] == "full-offload"
    assert names[1] != names[2]
    assert all(len(name) < 40 for name in names.values())


def test_many_choices_are_drawn_with_full_and_no_offload_among_the_bars(tmp_path: Path) -> None:
    table = golden()
    rows = table.batches[0].rows
    choices = [Choice(id=i, kind="split", name=f"blocks.{i}") for i in range(1, 31)]
    many = replace(
        table,
        choices=(table.choices[0], *choices, Choice(id=31, kind="no-offload", name="no-offload")),
        batches=(
            replace(
                table.batches[0],
                rows=(
                    rows[0],
                    *(
                        replace(rows[1], choice=i, head_ms=10.0 + i, uplink_bytes=160000 - 5000 * i)
                        for i in range(1, 31)
                    ),
                    replace(rows[2], choice=31, head_ms=500.0),
                ),
            ),
        ),
    )
    many = replace(many, batches=(replace(many.batches[0], segments=many.switch_rates(State(batch=1))),))
    texts = svg_texts(draw_terms(many, tmp_path / "terms.svg", batch=1, rate_mb_s=4.0))

    assert "(14 of 32 choices)" in texts
    assert "no-offload" in texts
    assert "full-offload" in texts
    assert len(draw_plots(many, tmp_path)) == 3


def test_labels_that_are_too_close_are_moved_apart_in_order() -> None:
    places = _spread([0.1, 0.5, 0.51, 0.52, 0.9], 0.1)

    assert places == pytest.approx([0.1, 0.41, 0.51, 0.61, 0.9])
    assert _spread([], 0.1) == []
    assert min(b - a for a, b in itertools.pairwise(places)) >= 0.1 - 1e-9


@pytest.mark.parametrize("name", ["map.jpg", "map"])
def test_an_unknown_kind_of_picture_is_a_usage_error_and_writes_nothing(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"\.png or \.svg was expected"):
        draw_map(golden(), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_batch_or_rate_out_of_range_is_a_usage_error_and_writes_nothing(tmp_path: Path) -> None:
    for batch, rate in ((9, 1.0), (1, math.nan), (8, 0.0)):
        with pytest.raises(UsageError):
            draw_plots(golden(), tmp_path / "plots", batch=batch, rate_mb_s=rate)
    assert not (tmp_path / "plots").exists()
