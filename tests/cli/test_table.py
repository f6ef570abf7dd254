import csv
import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.paths import DATA

from dsc_split.lookup_table import Link

TABLES = DATA / "tables"
GOLDEN = str(TABLES / "golden.json")


def dsc_split(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dsc_split.cli", *arguments], capture_output=True, text=True, timeout=120
    )


def test_table_prints_the_grid_of_the_rates_asked() -> None:
    done = dsc_split("table", GOLDEN, "--rates", "40,2")

    assert (done.returncode, done.stderr) == (0, "")
    assert "batch  2 " in done.stdout
    assert "    1  no-offload 72%" in done.stdout
    assert "emulated  device slowdown 6" in done.stdout


def test_table_prints_one_json_document_and_nothing_else() -> None:
    done = dsc_split("table", GOLDEN, "--json")

    assert json.loads(done.stdout) == json.loads(Path(GOLDEN).read_text())
    assert done.stderr == ""


def test_table_prints_csv() -> None:
    rows = list(csv.DictReader(io.StringIO(dsc_split("table", GOLDEN, "--csv").stdout)))

    assert [row["choice"] for row in rows if row["batch"] == "8"] == ["full-offload", "features.4.0"]


def test_table_draws_pictures_and_names_them_on_stderr(tmp_path: Path) -> None:
    done = dsc_split("table", GOLDEN, "--json", "--plots", str(tmp_path / "plots"), "--plot-batch", "1")

    assert done.returncode == 0
    assert len(done.stderr.splitlines()) == 3
    for line in done.stderr.splitlines():
        assert Path(line.removeprefix("picture: ")).is_file()
    json.loads(done.stdout)


@pytest.mark.parametrize(
    ("arguments", "exit_code", "says"),
    [
        (["table", GOLDEN, "--json", "--csv"], 2, "exclude each other"),
        (["table", GOLDEN, "--link", "link.json"], 2, "is no bundle"),
        (["table", "nowhere.json"], 2, "no such file or folder"),
        (["table", str(TABLES)], 2, "is no bundle"),
        (["table", str(TABLES / "hostile" / "nan.json")], 6, "NaN"),
        (["table", GOLDEN, "--plots", "plots", "--plot-batch", "9"], 2, "batch 9 is larger"),
        (["table", GOLDEN, "--rates", "1,nan"], 2, "nan"),
        (["table", GOLDEN, "--check", "--csv"], 2, "--check reads a table"),
        (["table", GOLDEN, "--check", "--link", "link.json"], 2, "--check reads a table"),
        (["table", "nowhere.json", "--check"], 2, "no such file or folder"),
        (["table", str(TABLES), "--check"], 2, "has no table.json"),
        (
            ["table", str(TABLES / "hostile" / "negative_time.json"), "--check", "--json"],
            6,
            "batches[0].rows[0].tail_ms: got -1.5; expected a number from 0",
        ),
        (["pick", GOLDEN, "--batch", "9", "--rate", "1"], 2, "batch 9 is larger"),
        (["pick", GOLDEN, "--batch", "1", "--rate", "-1"], 2, "'-1' is out of range: a number (at least 0)"),
        (["pick", GOLDEN, "--batch", "1", "--rate", "nan"], 2, "'nan' is out of range: a number (at least 0)"),
        (["pick", GOLDEN, "--batch", "1", "--rate", "4MB"], 2, "'4MB' is no number: a number (at least 0) was"),
        (["pick", GOLDEN, "--batch", "1", "--rate", "4", "--rtt", "5ms"], 2, "'5ms' is no number: a number"),
        (["pick", GOLDEN, "--batch", "1", "--rate", "4", "--queue", "inf"], 2, "'inf' is out of range"),
        (["pick", GOLDEN, "--batch", "1", "--rate", "4", "--server-load", "x"], 2, "'x' is no number"),
        (["pick", GOLDEN, "--batch", "1", "--rate", "4", "--downlink-rate", "-2"], 2, "'-2' is out of range"),
        (["pick", GOLDEN, "--batch", "8", "--rate", "0"], 2, "nothing can be sent"),
        (["pick", str(TABLES / "hostile" / "newer_version.json"), "--batch", "1", "--rate", "1"], 6, "version 2"),
    ],
)
def test_bad_input_exits_as_the_design_says(arguments: list[str], exit_code: int, says: str) -> None:
    done = dsc_split(*arguments)

    assert (done.returncode, done.stdout) == (exit_code, "")
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_pick_names_the_choice_on_the_first_line() -> None:
    done = dsc_split("pick", GOLDEN, "--batch", "1", "--rate", "8")

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[:2] == ["features.4.0", "batch 1 at 8 MB/s: 46.75 ms."]


def test_pick_in_json_answers_the_state_asked() -> None:
    state = ["--rtt", "20", "--server-load", "2", "--queue", "1"]
    done = dsc_split("pick", GOLDEN, "--batch", "1", "--rate", "40", *state, "--json")
    answer = json.loads(done.stdout)

    # full 15 + 20 + 1 + 2 * 10 = 56, local 60
    assert (answer["choice"], answer["latency_ms"], answer["runner_up"]) == ("full-offload", 56.0, "no-offload")
    assert [item["choice"] for item in answer["choices"]] == ["full-offload", "no-offload", "features.4.0"]


def test_pick_without_full_offload_keeps_the_inputs_on_the_device() -> None:
    done = dsc_split("pick", GOLDEN, "--batch", "1", "--rate", "inf", "--no-full-offload", "--json")

    assert [item["choice"] for item in json.loads(done.stdout)["choices"]] == ["features.4.0", "no-offload"]


def test_pick_warns_where_a_downlink_rate_changes_nothing() -> None:
    done = dsc_split("pick", GOLDEN, "--batch", "1", "--rate", "8", "--downlink-rate", "1")

    assert done.returncode == 0
    assert "--downlink-rate changes nothing" in done.stderr
    assert '"count_downlink": true' in done.stderr


def test_help_names_the_keys_of_a_link_and_what_a_downlink_rate_needs() -> None:
    text = dsc_split("table", "--help").stdout
    keys = {field.name for field in dataclasses.fields(Link)}

    assert {key for key in keys if key in text} == keys
    assert '"count_downlink": true' in " ".join(dsc_split("pick", "--help").stdout.split())


def test_table_check_says_what_a_table_is(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(Path(GOLDEN).read_text().replace('"timing_valid": true', '"timing_valid": false', 2))
    done = dsc_split("table", "--check", str(path))
    lines = done.stdout.splitlines()

    assert (done.returncode, done.stderr) == (0, "")
    assert lines[0] == f"{path}: ok"
    assert lines[1] == "8 rows: batches 1, 4, 8; choices full-offload, features.4.0, no-offload"
    assert lines[-2] == "emulated  device slowdown 6 (statistics multiplied by 6; raw samples are as measured)"
    assert lines[-1] == "timing    2 of 8 rows hold times of another machine: measure them again"


def test_table_check_in_json_says_what_a_table_is() -> None:
    answer = json.loads(dsc_split("table", GOLDEN, "--check", "--json").stdout)
    document = json.loads(Path(GOLDEN).read_text())

    assert (answer["ok"], answer["rows"], answer["rows_with_stale_timing"]) == (True, 8, 0)
    assert answer["batches"] == [1, 4, 8]
    for key in ("format", "version", "pair_id", "emulated", "device", "server", "link", "choices"):
        assert answer[key] == document[key]
