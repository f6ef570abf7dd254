import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from tests.support.manifests import edited, targets_of

from dsc_split.benchmarks import Cell, CellStore, Question, make_table, read_link, write_table, write_tables
from dsc_split.benchmarks.cells._cells import CellEnvironment, CellSettings, Round, Statistics
from dsc_split.bundle import Bundle
from dsc_split.bundles._manifest import encode_document
from dsc_split.errors import TableError, UsageError
from dsc_split.lookup_table import Link, LookupTable, State

DEVICE = "onnxruntime:cpu,threads=1,slowdown=6"
SERVER = "onnxruntime:cpu"


def tensor(
    name: str, per_batch: int, *, constant: int = 0, itemsize: int = 4, passthrough: bool = False
) -> dict[str, Any]:
    return {
        "name": name,
        "dtype": "float32",
        "shape": ["batch", per_batch],
        "elements_by_batch": [per_batch, constant],
        "itemsize": itemsize,
        "passthrough": passthrough,
    }


def split(name: str, tensors: list[dict[str, Any]], early: tuple[str, ...] = ()) -> dict[str, Any]:
    paths = {part: f"onnx/{name}.{part}.onnx" for part in ("head", "tail")}
    return {"name": name, "tensors": tensors, "early_outputs": list(early), **paths}


def bundle_with(folder: Path, **changes: Any) -> Bundle:
    """A model ``x, mask -> y, early`` with the splits ``a`` (small) and ``b`` (has an early output)."""
    splits = changes.pop("splits", [split("a", [tensor("a", 50)]), split("b", [tensor("b", 10)], ("early",))])
    paths = ["onnx/model.onnx", *(item[part] for item in splits for part in ("head", "tail"))]
    document = {
        "format": "dsc-split/bundle",
        "version": 2,
        "revision": 1,
        "sealed": False,
        "side": None,
        "left_out": {},
        "pair_id": "sha256:1234",
        "precision": "fp32",
        "model": {"path": "onnx/model.onnx", "weights": {"path": "onnx/weights.data"}},
        "batch": {"fixed": None, "max": 64},
        "inputs": [tensor("x", 200, itemsize=1), tensor("mask", 0, constant=8)],
        "outputs": [tensor("y", 5), tensor("early", 3)],
        "full_offload": True,
        "input_bytes_stated": None,
        "splits": splits,
        "failed_splits": [],
        "targets": {
            "device": [{"target": DEVICE, "fingerprint": {}, "id": "ort-cpu-aaaaaaaaaaaa"}],
            "server": [{"target": SERVER, "fingerprint": {}, "id": "ort-cpu-bbbbbbbbbbbb"}],
        },
        "files": {
            path: {"sha256": f"{i:064x}", "size": 1, "role": "graph"}
            for i, path in enumerate([*paths, "onnx/weights.data"])
        },
        **changes,
    }
    folder.mkdir(exist_ok=True)
    (folder / "manifest.json").write_bytes(encode_document(document))
    return Bundle.open(folder)


def cell(
    bundle: Bundle,
    graph: str,
    batch: int,
    median_ms: float,
    *,
    target: str,
    fingerprint: str = "f" * 64,
    status: str = "ok",
    period_ms: float | None = None,
    day: int = 1,
) -> Cell:
    statistics = Statistics(
        n=10,
        median=median_ms,
        p90=median_ms * 1.1,
        p95=median_ms * 1.2,
        p99=median_ms * 1.3,
        mean=median_ms,
        std=0.1,
        ci=(median_ms - 0.5, median_ms + 0.5),
        first_after_pause=None,
    )
    slow = "slowdown" in target
    return Cell(
        question=Question(
            graph_digest=bundle.graph_digest(graph),
            fingerprint=fingerprint,
            batch=batch,
            period_ms=period_ms,
        ),
        graph=graph,
        target=target,
        run_fingerprint={"host": "box"},
        emulated={"slowdown": 6.0, "how": "statistics multiplied by 6"} if slow else None,
        status=status,
        reason="as told",
        latency_ms=statistics if status in ("ok", "unstable") else None,
        rounds=(
            Round(started=f"2026-01-{day:02d}T00:00:00.000+00:00", samples_ms=(median_ms,), first_after_pause_ms=()),
        ),
        settings=CellSettings(memory_limit_bytes=1),
        environment=CellEnvironment(),
    )


def all_cells(bundle: Bundle, batches: tuple[int, ...] = (1, 2), **options: Any) -> list[Cell]:
    """Whole model 60 ms on the device and 10 on the server, heads 10 and 20, tails 8 and 6; times the batch."""
    cells = []
    for batch in batches:
        for graph, target, median_ms in (
            ("onnx/model.onnx", DEVICE, 60.0),
            ("onnx/a.head.onnx", DEVICE, 10.0),
            ("onnx/b.head.onnx", DEVICE, 20.0),
            ("onnx/model.onnx", SERVER, 10.0),
            ("onnx/a.tail.onnx", SERVER, 8.0),
            ("onnx/b.tail.onnx", SERVER, 6.0),
        ):
            fingerprint = ("d" if target == DEVICE else "e") * 64
            options = {"fingerprint": fingerprint, **options}
            cells.append(
                cell(
                    bundle,
                    graph,
                    batch,
                    median_ms * batch,
                    target=target,
                    **{**options, "fingerprint": fingerprint},
                )
            )
    return cells


def made(bundle: Bundle, cells: list[Cell], **options: Any) -> LookupTable:
    return make_table(bundle, cells, device=DEVICE, server=SERVER, **options)


def sizes(table: LookupTable, batch: int) -> dict[str, tuple[int, int]]:
    terms = table.ranking(State(batch=batch, rate_mb_s=1.0))
    return {item.choice.name: (item.uplink_bytes, item.downlink_bytes) for item in terms}


def test_a_table_holds_every_choice_with_its_terms_and_bytes(tmp_path: Path) -> None:
    bundle = bundle_with(tmp_path / "b")
    table = made(bundle, all_cells(bundle))

    assert [(choice.id, choice.name) for choice in table.choices] == [
        (0, "full-offload"),
        (1, "a"),
        (2, "b"),
        (3, "no-offload"),
    ]
    times = [(row.choice, row.head_ms, row.tail_ms) for row in table.batches[1].rows]
    assert times == [(0, 0.0, 20.0), (1, 20.0, 16.0), (2, 40.0, 12.0), (3, 120.0, 0.0)]
    row = table.batches[1].rows[1]
    assert (row.head_ci_ms, row.head_p95_ms) == ((19.5, 20.5), 24.0)
    assert (row.tail_ci_ms, row.tail_p95_ms) == ((15.5, 16.5), 19.2)
    assert table.batches[1].rows[0].head_ci_ms == (0.0, 0.0)
    assert sizes(table, 2) == {
        "full-offload": (200 * 2 + 8 * 4, (5 + 3) * 2 * 4),
        "a": (50 * 2 * 4, (5 + 3) * 2 * 4),
        "b": (10 * 2 * 4, 5 * 2 * 4),
        "no-offload": (0, 0),
    }


def test_a_batch_in_between_gets_exact_bytes_though_an_input_has_no_batch_axis(tmp_path: Path) -> None:
    bundle = bundle_with(tmp_path / "b")
    table = made(bundle, all_cells(bundle, (1, 4)))

    assert sizes(table, 3)["full-offload"][0] == bundle.input_bytes(3) == 632


def test_counting_elements_takes_one_byte_each_and_says_so(tmp_path: Path) -> None:
    bundle = bundle_with(tmp_path / "b", input_bytes_stated=77)
    table = made(bundle, all_cells(bundle), count="elements")

    assert sizes(table, 2) == {
        "full-offload": (408, 16),
        "a": (100, 16),
        "b": (20, 10),
        "no-offload": (0, 0),
    }
    assert table.to_json()["count"] == "elements"
    assert table.link.source == "paper, one byte per element"


def test_stated_input_bytes_are_what_full_offload_sends(tmp_path: Path) -> None:
    bundle = bundle_with(tmp_path / "b", input_bytes_stated=77)

    assert sizes(made(bundle, all_cells(bundle)), 2)["full-offload"] == (154, 64)


def test_where_inputs_must_not_be_sent_full_offload_and_passthrough_splits_are_left_out(
    tmp_path: Path,
) -> None:
    splits = [split("a", [tensor("a", 50)]), split("b", [tensor("b", 1), tensor("x", 2, passthrough=True)])]
    bundle = bundle_with(tmp_path / "b", splits=splits, full_offload=False)
    table = made(bundle, all_cells(bundle))

    assert [(choice.id, choice.name) for choice in table.choices] == [(1, "a"), (3, "no-offload")]
    allowed = made(bundle_with(tmp_path / "c", splits=splits), all_cells(bundle))
    assert [choice.name for choice in allowed.choices if choice.sends_inputs] == ["full-offload", "b"]


def test_a_bundle_without_splits_has_full_and_no_offload(tmp_path: Path) -> None:
    bundle = bundle_with(tmp_path / "b", splits=[])
    cells = [
        cell(bundle, "onnx/model.onnx", 1, 60.0, target=DEVICE),
        cell(bundle, "onnx/model.onnx", 1, 10.0, target=SERVER),
    ]

    assert [choice.name for choice in made(bundle, cells).choices] == ["full-offload", "no-offload"]


def test_without_splits_and_full_offload_the_server_needs_no_cells(tmp_path: Path) -> None:
    bundle = bundle_with(tmp_path / "b", splits=[], full_offload=False)
    table = made(bundle, [cell(bundle, "onnx/model.onnx", 1, 60.0, target=DEVICE)])

    assert table.pick(1, 1.0).choice.name == "no-offload"
    assert LookupTable.from_json(table.to_json()) == table


def test_one_target_for_both_sides_shares_the_cell_of_the_whole_model(tmp_path: Path) -> None:
    bundle = bundle_with(tmp_path / "b", splits=[])
    table = make_table(bundle, [cell(bundle, "onnx/model.onnx", 1, 10.0, target=SERVER)], device=SERVER, server=SERVER)

    assert [(row.head_ms, row.tail_ms) for row in table.batches[0].rows] == [(0.0, 10.0), (10.0, 0.0)]
    assert table.emulated is None


def test_a_row_whose_cell_failed_or_is_missing_is_left_out_and_so_is_a_batch_without_rows(
    tmp_path: Path,
) -> None:
    bundle = bundle_with(tmp_path / "b")
    cells = all_cells(bundle)
    cells += [cell(bundle, "onnx/model.onnx", 4, 1.0, target=DEVICE, fingerprint="d" * 64, status="failed")]
    cells = [item for item in cells if not (item.graph == "onnx/a.tail.onnx" and item.batch == 2)]
    cells += [cell(bundle, "onnx/a.tail.onnx", 2, 1.0, target=SERVER, fingerprint="e" * 64, status="out-of-memory")]
    table = made(bundle, cells)

    assert [(item.batch, [row.choice for row in item.rows]) for item in table.batches] == [
        (1, [0, 1, 2, 3]),
        (2, [0, 2, 3]),
    ]


def test_unstable_cells_count(tmp_path: Path) -> None:
    bundle = bundle_with(tmp_path / "b")

    assert made(bundle, all_cells(bundle, status="unstable")).pick(1, 1e6).choice.name == "full-offload"


def test_no_usable_row_is_an_error_that_says_what_the_cells_are(tmp_path: Path) -> None:
    bundle = bundle_with(tmp_path / "b")
    cells = all_cells(bundle, (64,), status="out-of-memory")

    with pytest.raises(UsageError, match=r"6 cells out-of-memory.*--batches 1"):
        made(bundle, cells)


def test_a_side_without_cells_is_an_error_with_the_command(tmp_path: Path) -> None:
    bundle = bundle_with(tmp_path / "b")
    cells = all_cells(bundle)

    with pytest.raises(UsageError, match=r"no measurements of its device side.*bench .*--side device"):
        made(bundle, [])
    with pytest.raises(UsageError, match=r"server side on 'onnxruntime:cpu'.*--side server"):
        made(bundle, [item for item in cells if item.target == DEVICE])


def test_cells_of_another_graph_are_passed_over(tmp_path: Path) -> None:
    bundle = bundle_with(tmp_path / "b")
    cells = all_cells(bundle)
    with edited(bundle) as document:
        document["files"]["onnx/weights.data"]["sha256"] = "9" * 64

    with pytest.raises(UsageError, match="no measurements"):
        made(bundle, cells)


def test_a_batch_that_was_not_measured_for_every_choice_is_left_out_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = bundle_with(tmp_path / "b")
    heads = [item for item in all_cells(bundle) if item.batch == 1 or item.target == DEVICE]
    with caplog.at_level(logging.WARNING):
        table = made(bundle, heads)

    assert [item.batch for item in table.batches] == [1]
    assert "batch 2 (at 2: full-offload, a, b)" in caplog.text
    assert f"dsc-split bench {bundle.path} --batches 2" in caplog.text


def test_no_batch_that_is_complete_is_an_error_that_says_what_to_time(tmp_path: Path) -> None:
    bundle = bundle_with(tmp_path / "b")
    cells = [item for item in all_cells(bundle) if item.graph != "onnx/a.head.onnx"]

    with pytest.raises(UsageError, match=r"no batch size is complete.*at 1: a\).*--batches 1,2"):
        made(bundle, cells)


@pytest.mark.parametrize(("status", "loud"), [("out-of-memory", False), ("failed", True)])
def test_a_choice_that_ran_out_of_memory_or_failed_has_no_row(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, status: str, loud: bool
) -> None:
    bundle = bundle_with(tmp_path / "b")
    cells = [
        dataclasses.replace(item, status=status, latency_ms=None)
        if item.batch == 2 and item.graph == "onnx/a.tail.onnx"
        else item
        for item in all_cells(bundle)
    ]
    with caplog.at_level(logging.WARNING):
        table = made(bundle, cells)

    assert [row.choice for row in table.batches[1].rows] == [0, 2, 3]
    assert ("batch 2: a failed, and is not in the table" in caplog.text) is loud


def test_fingerprints_are_never_mixed_and_the_newest_is_taken_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = bundle_with(tmp_path / "b")
    cells = all_cells(bundle)
    device_graphs = ("onnx/a.head.onnx", "onnx/b.head.onnx", "onnx/model.onnx")
    newer = [cell(bundle, graph, 1, 3.0, target=DEVICE, fingerprint="c" * 64, day=2) for graph in device_graphs]
    with caplog.at_level(logging.WARNING):
        table = made(bundle, [*newer, *cells])

    assert table.device.fingerprint == "c" * 64
    assert [item.batch for item in table.batches] == [1]
    assert [(row.choice, row.head_ms) for row in table.batches[0].rows] == [(0, 0.0), (1, 3.0), (2, 3.0), (3, 3.0)]
    assert "2 run fingerprints" in caplog.text


def test_paced_cells_are_taken_only_where_there_are_no_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bundle = bundle_with(tmp_path / "b")
    device_graphs = ("onnx/a.head.onnx", "onnx/b.head.onnx", "onnx/model.onnx")
    paced = [
        cell(bundle, graph, 1, 70.0, target=DEVICE, fingerprint="d" * 64, period_ms=33.0, day=9)
        for graph in device_graphs
    ]
    plain = all_cells(bundle)

    assert made(bundle, paced + plain).latency_ms("no-offload", State(batch=1, rate_mb_s=1.0)) == 60.0
    device = [item for item in plain if item.target == SERVER] + paced
    with caplog.at_level(logging.WARNING):
        assert made(bundle, device).latency_ms("no-offload", State(batch=1, rate_mb_s=1.0)) == 70.0
    assert "period of 33 ms" in caplog.text


def test_emulation_is_in_the_table_by_side(tmp_path: Path) -> None:
    bundle = bundle_with(tmp_path / "b")

    assert made(bundle, all_cells(bundle)).emulated == {
        "device": {"target": DEVICE, "slowdown": 6.0, "how": "statistics multiplied by 6"}
    }


def test_the_segments_in_the_table_are_those_of_its_link(tmp_path: Path) -> None:
    bundle = bundle_with(tmp_path / "b")
    table = made(bundle, all_cells(bundle), link=Link(rtt_ms=1000.0))

    assert [segment.choice for segment in table.batches[0].segments] == [3]
    assert LookupTable.from_json(json.loads(json.dumps(table.to_json()))) == table


def test_writing_makes_a_file_named_by_both_fingerprints_and_table_json(tmp_path: Path) -> None:
    bundle = bundle_with(tmp_path / "b")
    store = CellStore(bundle)
    for item in all_cells(bundle):
        store.put(item)
    table = write_table(bundle)

    name = "ort-cpu-aaaaaaaaaaaa-dddddddddddd--ort-cpu-bbbbbbbbbbbb-eeeeeeeeeeee.json"
    assert [path.name for path in (bundle.path / "tables").iterdir()] == [name]
    written = (bundle.path / "tables" / name).read_bytes()
    assert written == (bundle.path / "table.json").read_bytes()
    assert Bundle.open(bundle.path).table() == table
    assert write_table(bundle, device="onnxruntime:cpu,slowdown=6,threads=1").device == table.device
    with pytest.raises(UsageError, match="no measurements"):
        write_table(bundle, server="onnxruntime:cpu,threads=3")
    with pytest.raises(UsageError, match="count is 'bits'"):
        write_table(bundle, count="bits")
    assert (bundle.path / "table.json").read_bytes() == written


def test_every_pair_of_fingerprints_that_was_timed_whole_gets_a_table(tmp_path: Path) -> None:
    bundle = bundle_with(tmp_path / "b")
    store = CellStore(bundle)
    for item in all_cells(bundle):
        store.put(item)
    device_graphs = ("onnx/a.head.onnx", "onnx/b.head.onnx", "onnx/model.onnx")
    for fingerprint, day, graphs in (("a", 2, device_graphs), ("c", 3, device_graphs[:2])):
        for graph in graphs:
            store.put(cell(bundle, graph, 1, 3.0, target=DEVICE, fingerprint=fingerprint * 64, day=day))

    written = write_tables(bundle)

    assert [path.name for path in written] == [
        f"ort-cpu-aaaaaaaaaaaa-{12 * digit}--ort-cpu-bbbbbbbbbbbb-eeeeeeeeeeee.json" for digit in "ad"
    ]
    assert Bundle.open(bundle.path).table().device.fingerprint == 64 * "a"
    write_table(bundle, device=6 * "d", link=Link(rtt_ms=5.0))
    times = {path: path.stat().st_mtime_ns for path in (bundle.path / "tables").iterdir()}
    assert LookupTable.load(write_tables(bundle)[0]).device.fingerprint == 64 * "a"  # the newest of the kind asked for
    assert {LookupTable.load(path).link.rtt_ms for path in written} == {5.0}
    assert {path for path, time in times.items() if path.stat().st_mtime_ns == time} == {written[1]}


def test_a_table_says_what_it_was_measured_under(tmp_path: Path) -> None:
    bundle = bundle_with(tmp_path / "b")
    table = made(bundle, all_cells(bundle))

    assert (table.device.run_fingerprint, table.server.run_fingerprint) == ({"host": "box"}, {"host": "box"})


def test_a_table_has_one_file_though_its_target_is_built_anew(tmp_path: Path) -> None:
    bundle = bundle_with(tmp_path / "b")
    store = CellStore(bundle)
    for item in all_cells(bundle):
        store.put(item)
    write_table(bundle)
    with edited(bundle) as document:
        targets_of(document, "device")[0]["id"] = "ort-cpu-cccccccccccc"

    write_table(bundle)

    (path,) = (bundle.path / "tables").iterdir()
    assert path.name.startswith("ort-cpu-cccccccccccc-dddddddddddd--")


def test_digits_that_several_fingerprints_begin_with_are_refused_with_all_of_them(tmp_path: Path) -> None:
    bundle = bundle_with(tmp_path / "b")
    cells = all_cells(bundle)
    twins = [
        dataclasses.replace(item, question=dataclasses.replace(item.question, fingerprint=6 * "d" + 58 * "0"))
        for item in cells
        if item.target == DEVICE
    ]

    with pytest.raises(UsageError, match=r"begins several .*dddddd000000 .*on box.*dddddddddddd"):
        make_table(bundle, cells + twins, device="dddddd", server=SERVER)
    assert make_table(bundle, cells + twins, device="dddddd0", server=SERVER).device.fingerprint == 6 * "d" + 58 * "0"


def test_making_the_table_anew_keeps_link_and_count(tmp_path: Path) -> None:
    bundle = bundle_with(tmp_path / "b")
    store = CellStore(bundle)
    for item in all_cells(bundle):
        store.put(item)
    link = Link(rtt_ms=20.0, c0_ms=1.0, source="measured")

    asked = write_table(bundle, link=link, count="elements")

    assert asked.link.source == "measured, one byte per element"
    assert write_table(bundle) == asked
    assert write_table(bundle, count="bytes").link == link
    assert write_table(bundle, link="paper").link == Link()
    (bundle.path / "table.json").write_text("{")
    assert (write_table(bundle).link, write_table(bundle).count) == (Link(), "bytes")


def test_a_bundle_that_was_never_timed_says_how(tmp_path: Path) -> None:
    bundle = bundle_with(tmp_path / "b", targets={"device": [], "server": []})

    with pytest.raises(UsageError, match=r"no target for its device side.*dsc-split bench"):
        write_table(bundle)
    assert not (bundle.path / "table.json").exists()


def test_a_link_file_fills_up_with_the_paper_and_is_named(tmp_path: Path) -> None:
    path = tmp_path / "wifi.json"
    path.write_text('{"rtt_ms": 4, "count_downlink": true}')

    assert read_link(path) == Link(rtt_ms=4.0, count_downlink=True, source="wifi.json")
    assert read_link("paper") == Link()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"rtt_ms": -1}', "rtt_ms: got -1"),
        ('{"rtt_ms": NaN}', "NaN is no JSON number"),
        ('{"count_downlink": 1}', "count_downlink: got 1; expected true or false"),
        ('{"downlink_rate_mb_s": 0}', "downlink_rate_mb_s: got 0"),
        (
            '{"rtt_ms": 4, "rtt": 4, "color": 1}',
            r"unknown keys: 'rtt', 'color'. Known keys: c0_ms, c1_ms_per_mb, rtt_ms, round_trips, count_downlink, "
            r"downlink_rate_mb_s, source\.",
        ),
        ("[]", "a JSON list"),
        ("", "no valid JSON"),
    ],
)
def test_a_link_file_that_is_no_link_is_a_usage_error(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "link.json"
    path.write_text(text)

    with pytest.raises(UsageError, match=says):
        read_link(path)


def test_a_missing_link_file_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="no such file"):
        read_link("nowhere.json")


def test_a_table_made_by_hand_is_still_checked_when_read(tmp_path: Path) -> None:
    bundle = bundle_with(tmp_path / "b")
    document: dict[str, Any] = made(bundle, all_cells(bundle)).to_json()
    document["batches"][0]["segments"] = [{"choice": 3, "below_rate_mb_s": None}]

    with pytest.raises(TableError, match="contradicts the rows"):
        LookupTable.from_json(document)
