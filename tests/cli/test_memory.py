import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from msgspec.structs import replace
from tests.support.fake_executor import FakeExecutor
from tests.support.manifests import document_of, write_document
from tests.support.tiny_bundles import tiny_bundle

from dsc_split.benchmarks import BenchSettings, bench_bundle, write_table
from dsc_split.benchmarks.memory._measure import measure_memory
from dsc_split.benchmarks.memory._reports import MemoryReport, save_memory
from dsc_split.bundle import Bundle


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle, timed at batches 1 and 2, with the memory of both sides."""
    bundle = tiny_bundle(tmp_path_factory.mktemp("memory") / "bundle")
    bench_bundle(bundle, batches=[1, 2], settings=BenchSettings(precision_goal=1e6), executor=FakeExecutor())
    write_table(bundle)
    for side in ("device", "server"):
        found = measure_memory(bundle, side)
        # So small an engine is within what the measurement is off by: numbers that leave no doubt take their place.
        engines = [
            replace(engine, resident_bytes=20_000_000 if engine.choice == "a" else 30_000_000)
            for engine in found.engines
        ]
        sets = [replace(item, resident_bytes=45_000_000) for item in found.sets]
        save_memory(bundle, replace(found, engines=tuple(engines), sets=tuple(sets)))
    return bundle.path


@pytest.fixture
def bundle(measured: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(measured, tmp_path / "bundle"))


def report(bundle: Path, side: str) -> MemoryReport:
    (path,) = (bundle / "memory").glob(f"{side}-*.json")
    return MemoryReport.parse(path.read_bytes(), path.name)


def kept_bytes(bundle: Path, side: str, *choices: str) -> int:
    return report(bundle, side).hold(choices).memory_bytes or 0


@pytest.mark.slow
def test_memory_prints_engines_and_sets_as_plain_lines(bundle: Path) -> None:
    command = [sys.executable, "-m", "dsc_split.cli", "memory", str(bundle), "--choices", "a,no-offload"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)

    lines = done.stdout.splitlines()
    assert lines[0].startswith("device  onnxruntime:cpu [")
    assert lines[2].split() == ["choice", "batch", "MB", "load", "ms", "first", "run", "ms", "source"]
    for line, name in zip(lines[3:5], ("no-offload", "a"), strict=True):
        assert re.fullmatch(rf"{name} +2 +[0-9.]+ +[0-9.]+ +[0-9.]+ +measured", line)
    assert lines[6].split() == ["together", "MB", "source"]
    assert re.fullmatch(r"all 2 +[0-9.]+ +measured", lines[7])
    assert "\x1b" not in done.stdout
    assert done.stderr == "memory device (4 steps): whole model\n"


@pytest.mark.slow
def test_memory_in_json_is_what_the_bundle_keeps(bundle: Path, dsc: Callable[..., Any]) -> None:
    done = dsc("memory", bundle, "--side", "server", "--batch", 4, "--json")

    document = json.loads(done.stdout)
    assert done.exit_code == 0
    assert document == json.loads(json.dumps(report(bundle, "server").to_json()))
    assert [(item["choice"], item["batch"]) for item in document["engines"]] == [("full-offload", 4), ("a", 4)]


def test_a_budget_below_all_writes_the_table_of_what_is_kept(bundle: Path, dsc: Callable[..., Any]) -> None:
    budget = kept_bytes(bundle, "device", "no-offload", "a") - 1
    done = dsc("table", bundle, "--memory-budget", f"{budget}B")

    table = Bundle.open(bundle).table()
    residency = json.loads((bundle / "table.json").read_text())["residency"]
    assert done.exit_code == 0
    assert [choice.name for choice in table.choices] == ["full-offload", "no-offload"]
    assert (residency["kept"], residency["left_out"]) == (["full-offload", "no-offload"], ["a"])
    assert residency["budget_bytes"] == {"device": budget}
    assert residency["memory_bytes"] == {"device": kept_bytes(bundle, "device", "no-offload")}
    assert "\nLeft out: a\nLost: " in done.stdout
    assert done.stdout.endswith("No other set that fits loses less.\n")
    assert re.search(r"Memory of the device: [0-9.]+ MB of [0-9.]+ MB\n", done.stdout)


def test_the_table_without_the_option_has_all_choices_again(bundle: Path, dsc: Callable[..., Any]) -> None:
    before = (bundle / "table.json").read_bytes()
    budget = kept_bytes(bundle, "device", "no-offload")
    dsc("table", bundle, "--memory-budget", f"{budget}B")
    others = [path.read_bytes() for path in (bundle / "tables").iterdir()]
    between = (bundle / "table.json").read_bytes()
    dsc("table", bundle)

    assert others == [before]  # what is in tables/ has all choices all the while
    assert between != before
    assert (bundle / "table.json").read_bytes() == before


def test_the_table_of_what_is_kept_is_one_that_every_reader_takes(
    bundle: Path, root: Path, dsc: Callable[..., Any]
) -> None:
    budget = f"device={kept_bytes(bundle, 'device', 'a')}B,server={kept_bytes(bundle, 'server', 'a')}"
    done = dsc("table", bundle, "--memory-budget", f"{budget}B", "--json")

    document = json.loads(done.stdout)
    schema = json.loads((root / "src/dsc_split/schemas/table-1.schema.json").read_text())
    jsonschema.validate(document, schema)
    assert document == json.loads((bundle / "table.json").read_text())
    assert "Lost: " in done.stderr
    assert dsc("table", bundle, "--check").exit_code == 0


def test_a_budget_for_all_keeps_all_and_says_so(bundle: Path, dsc: Callable[..., Any]) -> None:
    done = dsc("table", bundle, "--memory-budget", "device=8GB,server=8GB")

    assert len(Bundle.open(bundle).table().choices) == 3
    assert done.stdout.endswith("Every choice fits, and is kept.\n")


def test_a_sealed_bundle_is_opened_before_its_table_is_written(bundle: Path, dsc: Callable[..., Any]) -> None:
    opened = Bundle.open(bundle)
    write_document(opened, {**document_of(opened), "sealed": True})

    assert dsc("table", bundle, "--memory-budget", "1GB").exit_code == 0
    assert Bundle.open(bundle).manifest.sealed is False


@pytest.mark.parametrize(
    ("budget", "exit_code", "says"),
    [
        ("device=1B,server=1B", 2, "not even one choice fits into the memory budget"),
        ("both=1MB", 2, "'both' in 'both=1MB' is no side: device=500MB,server=4GB was expected"),
        ("1MB,device=2MB", 2, "'device' in '1MB,device=2MB' stands twice"),
        ("1.5 apples", 2, "'1.5 apples' is no size"),
        ("0B", 2, "out of range"),
        ("device=", 2, "'' is no size"),
    ],
)
def test_bad_budgets_are_refused(bundle: Path, dsc: Callable[..., Any], budget: str, exit_code: int, says: str) -> None:
    done = dsc("table", bundle, "--memory-budget", budget)

    assert (done.exit_code, done.stdout) == (exit_code, "")
    assert says in " ".join(done.stderr.split())


def test_missing_numbers_are_an_error_with_the_command(bundle: Path, dsc: Callable[..., Any]) -> None:
    shutil.rmtree(bundle / "memory")
    done = dsc("table", bundle, "--memory-budget", "1GB")

    assert (done.exit_code, done.stdout) == (2, "")
    assert "dsc-split memory BUNDLE --side device --target onnxruntime:cpu --batch 2" in done.stderr


def test_damaged_numbers_are_refused(bundle: Path, dsc: Callable[..., Any]) -> None:
    (path,) = (bundle / "memory").glob("device-*.json")
    path.write_bytes(path.read_bytes().replace(b'"batch":2', b'"batch":4', 1))
    done = dsc("table", bundle, "--memory-budget", "1GB")

    assert (done.exit_code, done.stdout) == (6, "")
    assert "changed or cut short" in done.stderr


@pytest.mark.parametrize("option", [["--check"], []])
def test_a_budget_needs_a_bundle(bundle: Path, dsc: Callable[..., Any], option: list[str]) -> None:
    done = dsc("table", bundle / "table.json", "--memory-budget", "1GB", *option)

    assert (done.exit_code, done.stdout) == (2, "")
    assert ("--check reads" if option else "is no bundle") in done.stderr


@pytest.mark.parametrize(
    ("arguments", "exit_code", "says"),
    [
        (["--side", "both"], 2, "side is 'both'"),
        (["--batch", "65"], 2, "batch 65 is larger than 64"),
        (["--choices", "a,b"], 2, "choice 'b' has no engine on side 'device'; that has 'no-offload', 'a'"),
        (["--target", "tensorrt-rtx:sm1"], 2, "sm1"),
    ],
)
def test_bad_questions_are_refused(
    bundle: Path, dsc: Callable[..., Any], arguments: list[str], exit_code: int, says: str
) -> None:
    done = dsc("memory", bundle, *arguments)

    assert (done.exit_code, done.stdout) == (exit_code, "")
    assert says in done.stderr
