"""Whether engines load on this machine, and whether times that were taken elsewhere hold here."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
from tests.support.full_bundles import list_file
from tests.support.own_backend import OwnBackend

from dsc_split._support.strict_json import write_json
from dsc_split.bundle import Bundle
from dsc_split.engines import build_engines, fit_here, get_backend, table_here
from dsc_split.errors import UsageError
from dsc_split.lookup_table import BatchTable, Choice, Link, LookupTable, Row, Side, State
from dsc_split.packing import Trust, pack_bundle

SERVER = {"library": "s", "host": "cloud"}


def make_table(
    bundle: Bundle, device: Mapping[str, Any] | None, target: str = "tensorrt:cuda", *, name: str = "table.json"
) -> None:
    """Write a table of the tiny bundle whose device was timed on a machine with such a fingerprint."""
    sides = [
        Side(target=text, fingerprint=64 * "0", run_fingerprint=fingerprint)
        for text, fingerprint in ((target, device), ("onnxruntime:cpu", SERVER))
    ]
    names = ("full-offload", "a", "no-offload")
    kinds = ("full-offload", "split", "no-offload")
    unknown: dict[str, Any] = {f"{part}_{key}_ms": None for part in ("head", "tail") for key in ("ci", "p95")}
    rows = [
        Row(choice=i, head_ms=float(i), tail_ms=float(2 - i), uplink_bytes=100 * (2 - i), downlink_bytes=0, **unknown)
        for i in range(3)
    ]
    batch = BatchTable(batch=1, rows=tuple(rows), segments=())
    table = LookupTable(
        pair_id=bundle.manifest.pair_id,
        precision="fp32",
        emulated=None,
        device=sides[0],
        server=sides[1],
        link=Link(),
        choices=tuple(
            Choice(id=i, kind=kind, name=text) for i, (kind, text) in enumerate(zip(kinds, names, strict=True))
        ),
        batches=(batch,),
    )
    table = replace(table, batches=(replace(batch, segments=table.switch_rates(State(batch=1))),))
    (bundle.path / "tables").mkdir(exist_ok=True)
    write_json(bundle.path / name, table.to_json())


def elsewhere(**changes: Any) -> dict[str, Any]:
    return {**OwnBackend().run_fingerprint(), "host": "another", **changes}


def valid(table: LookupTable) -> list[bool]:
    """Say of full offload, split and no offload whether their times hold."""
    return [row.timing_valid for row in table.batches[0].rows]


@pytest.fixture
def built(bundle: Bundle) -> Bundle:
    """The tiny bundle with engines for the device."""
    build_engines(bundle, "device", OwnBackend())
    return Bundle.open(bundle.path)


def test_on_another_machine_of_the_same_kind_engines_and_times_hold(built: Bundle) -> None:
    make_table(built, elsewhere())

    fit = fit_here(built, "device", OwnBackend())

    assert (fit.loadable, fit.timing_valid, fit.reasons, dict(fit.changed)) == (True, True, (), {})
    assert fit.rebuild is None
    assert fit.retime is None
    assert valid(table_here(built, "device", OwnBackend())) == [True] * 3


@pytest.mark.parametrize(
    ("changes", "key", "values"),
    [
        ({"power_mode": "15W"}, "power_mode", ("15W", "25W")),
        ({"gpu": {"name": "Orin", "driver": "570"}}, "gpu.driver", ("570", "580")),
    ],
)
def test_engines_that_load_but_were_timed_otherwise_have_their_rows_marked(
    built: Bundle, changes: dict[str, Any], key: str, values: tuple[Any, Any]
) -> None:
    make_table(built, elsewhere(**changes))

    fit = fit_here(built, "device", OwnBackend())
    table = table_here(built, "device", OwnBackend())

    assert (fit.loadable, fit.timing_valid) == (True, False)
    assert dict(fit.changed) == {key: values}
    assert fit.reasons == (f"{key} is {values[1]!r} here; it was {values[0]!r} when it was timed.",)
    assert fit.rebuild is None
    assert fit.retime == f"dsc-split bench {built.path} --side device --stale"
    assert valid(table) == [True, False, False]  # full offload takes no time on the device
    assert valid(built.table()) == [True] * 3
    assert table.pick(1, 1.0).choice == built.table().pick(1, 1.0).choice


def test_on_the_server_no_offload_keeps_its_times(built: Bundle) -> None:
    make_table(built, elsewhere())

    assert valid(table_here(built, "server", "onnxruntime:cpu")) == [False, False, True]


def test_engines_of_another_version_are_not_loadable_and_the_command_rebuilds_them(built: Bundle) -> None:
    make_table(built, elsewhere())

    fit = fit_here(built, "device", OwnBackend(version="2"))

    assert (fit.loadable, fit.timing_valid) == (False, False)
    assert dict(fit.changed) == {"version": ("1", "2")}
    assert "built for version '1'; found version '2'" in fit.reasons[0]
    assert fit.rebuild == f"dsc-split build {built.path} --side device --target tensorrt:cuda --batches 1,4"
    assert str(fit.retime).endswith("--stale")


def test_of_several_tables_the_one_that_was_timed_here_is_given_and_the_one_in_use_judged(built: Bundle) -> None:
    make_table(built, elsewhere(power_mode="15W"))
    make_table(built, elsewhere(power_mode="MAXN"), name="tables/b.json")
    make_table(built, elsewhere(), name="tables/c.json")
    make_table(built, elsewhere(), "onnxruntime:cpu", name="tables/d.json")
    (built.path / "tables/e.json").write_text("{")

    assert not fit_here(built, "device", OwnBackend()).timing_valid
    assert fit_here(built, "device", OwnBackend(power="15W")).timing_valid
    table = table_here(built, "device", OwnBackend())
    assert valid(table) == [True] * 3
    assert table.device.run_fingerprint == elsewhere()
    stale = table_here(built, "device", OwnBackend(power="50W"))
    assert valid(stale) == [True, False, False]
    assert (stale.device.run_fingerprint or {})["power_mode"] == "15W"  # the one that was asked for last


def test_a_table_that_does_not_say_where_it_was_timed_does_not_hold(built: Bundle) -> None:
    make_table(built, None)

    fit = fit_here(built, "device", OwnBackend())

    assert (fit.loadable, fit.timing_valid) == (True, False)
    assert "does not say" in fit.reasons[0]
    assert valid(table_here(built, "device", OwnBackend())) == [True, False, False]


def test_without_a_table_the_command_makes_one(built: Bundle) -> None:
    fit = fit_here(built, "device", OwnBackend())

    assert (fit.loadable, fit.timing_valid) == (True, False)
    assert fit.retime == f"dsc-split bench {built.path}"
    with pytest.raises(UsageError, match="has no table with times of 'tensorrt:cuda' on side 'device'"):
        table_here(built, "device", OwnBackend())


def test_tables_of_other_pairs_are_passed_over(built: Bundle) -> None:
    make_table(built, elsewhere())
    with built.edit() as draft:
        draft.change(pair_id="sha256:" + 64 * "1")

    with pytest.raises(UsageError, match="has no table"):
        table_here(built, "device", OwnBackend())


def test_a_packed_bundle_says_the_same(built: Bundle) -> None:
    for path in ("samples/model.npz", "samples/a.npz"):
        list_file(built, path, (built.path / path).read_bytes(), "sample")
    with built.edit() as draft:
        draft.change(pair_id=built.compute_pair_id())
    make_table(built, elsewhere(power_mode="15W"))
    path = pack_bundle(built, built.path.parent / "b.dscb").path

    packed = Bundle.open(path, trust=Trust(allow_unsigned=True))
    fit = fit_here(packed, "device", OwnBackend())

    assert (fit.loadable, fit.timing_valid, dict(fit.changed)) == (True, False, {"power_mode": ("15W", "25W")})
    assert valid(table_here(packed, "device", OwnBackend())) == [True, False, False]
    refused = fit_here(Bundle.open(path), "device", OwnBackend())
    assert (refused.loadable, refused.rebuild) == (False, None)
    assert "--trust PUBLIC_KEY" in refused.reasons[0]


def test_a_changed_power_mode_is_seen_on_a_real_back_end_and_said_by_the_command(
    bundle: Bundle, dsc: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = "onnxruntime:cpu,threads=1"
    build_engines(bundle, "device", target)
    make_table(bundle, get_backend(target).run_fingerprint(), target)
    before = dsc("check", bundle.path, "--side", "device")
    monkeypatch.setattr("dsc_split.engines._fingerprint.power_mode", lambda: "MODE_15W")
    after = dsc("check", bundle.path, "--side", "device")

    assert "engines for this machine: yes" in before.stdout
    assert "times taken on a machine like this: yes" in before.stdout
    assert "time again" not in before.stdout
    assert after.exit_code == 0
    assert "times taken on a machine like this: no" in after.stdout
    text = " ".join(after.stdout.split())
    assert "power_mode is 'MODE_15W' here; it was None when it was timed." in text
    assert "--side device --stale" in text
    document = json.loads(dsc("check", bundle.path, "--side", "device", "--json").stdout)["fit"]
    assert document["changed"] == {"power_mode": [None, "MODE_15W"]}


def test_a_target_whose_library_is_missing_is_not_loadable(built: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)
    make_table(built, elsewhere())

    fit = fit_here(built, "device")

    assert (fit.loadable, fit.timing_valid, fit.rebuild, fit.retime) == (False, False, None, None)
    assert "tensorrt" in fit.reasons[0]
    assert valid(table_here(built, "device")) == [True, False, False]
