import csv
import io
import json
import math
import os
import random
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.support.commands import Outcome
from tests.support.paths import GOLDEN

Dsc = Callable[..., Outcome]


def wandering(folder: Path, states: int = 400) -> Path:
    """Write a link that wanders over the table's switch rates, steps down, and is gone for a while."""
    chance = random.Random(5)
    log_rate, lines = 0.0, ["time_s,rate_mb_s"]
    for i in range(states):
        log_rate = 0.95 * log_rate + 0.2 * chance.gauss(0.0, 1.0)
        rate = 0.0 if 200 <= i < 220 else (20.0 if i < 120 else 5.0) * math.exp(log_rate)
        lines.append(f"{i},{rate:.6g}")
    path = folder / "link.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_policy_stays_near_the_ideal_and_far_from_the_static_choices(dsc: Dsc, tmp_path: Path) -> None:
    done = dsc("replay", GOLDEN, "--scenario", wandering(tmp_path), "--period", 500, "--noise", 0.1, "--json")
    document = json.loads(done.stdout)
    methods = {item["method"]: item for item in document["methods"]}

    assert (done.exit_code, done.stderr) == (0, "")
    assert document["requests"] == 800
    assert methods["policy"]["over_ideal"]["of_mean"] < 0.10
    assert document["gain"]["policy"]["no-offload"] > 0.1
    assert 0.0 < methods["delayed"]["over_ideal"]["of_mean"] < methods["policy"]["over_ideal"]["of_mean"]
    assert 0 < methods["policy"]["switches"] < methods["ideal"]["switches"]
    assert methods["full-offload"]["never"] == 40
    assert methods["policy"]["never"] == 0
    assert sum(methods["policy"]["shares"].values()) == pytest.approx(1.0)


def test_the_same_seed_gives_the_same_answer(dsc: Dsc, tmp_path: Path) -> None:
    path = wandering(tmp_path, 100)
    first, again, other = (
        dsc("replay", GOLDEN, "--scenario", path, "--noise", 0.3, "--seed", seed, "--json").stdout for seed in (1, 1, 2)
    )

    assert first == again
    assert json.loads(first)["methods"] != json.loads(other)["methods"]


def test_the_text_in_a_pipe_is_plain_and_leads_with_the_gain(dsc: Dsc, tmp_path: Path) -> None:
    done = dsc("replay", GOLDEN, "--scenario", wandering(tmp_path, 100), "--against", "no-offload", "--deadline", 50)

    assert done.exit_code == 0
    assert re.match(r"Gain over the static choice, no-offload: ideal [\d.]+ %, policy [\d.]+ %\.\n", done.stdout)
    assert "\x1b" not in done.stdout
    assert "> 50" in done.stdout


def test_the_csv_is_one_document_with_a_line_per_request(dsc: Dsc, tmp_path: Path) -> None:
    done = dsc("replay", GOLDEN, "--scenario", wandering(tmp_path, 50), "--csv", "--no-policy")
    rows = list(csv.DictReader(io.StringIO(done.stdout)))

    assert len(rows) == 50
    assert "policy_ms" not in rows[0]
    assert all(float(row["ideal_ms"]) <= float(row["static_no-offload_ms"]) for row in rows)


def test_a_packet_trace_with_its_downlink_is_replayed(dsc: Dsc, tmp_path: Path) -> None:
    (tmp_path / "cell.up").write_text("".join(f"{ms}\n" for ms in range(1, 3001)))
    (tmp_path / "cell.down").write_text("".join(f"{ms}\n" for ms in range(2, 3001, 2)))
    trace = ["--scenario", tmp_path / "cell.up", "--downlink", tmp_path / "cell.down", "--bin", 0.5]
    done = dsc("replay", GOLDEN, *trace, "--csv")
    rows = list(csv.DictReader(io.StringIO(done.stdout)))

    assert {(float(row["rate_mb_s"]), float(row["downlink_rate_mb_s"])) for row in rows} == {(1.448, 0.724)}
    assert len(rows) == 6
    assert "the downlink's rate changes nothing" in done.stderr


def test_parameters_of_the_policy_come_from_a_file(dsc: Dsc, tmp_path: Path) -> None:
    path = wandering(tmp_path, 120)
    (tmp_path / "policy.json").write_text('{"policy": {"probe_bytes": 0}, "estimator": {"half_life_s": 1}}')
    plain = json.loads(dsc("replay", GOLDEN, "--scenario", path, "--json").stdout)
    changed = json.loads(
        dsc("replay", GOLDEN, "--scenario", path, "--policy", tmp_path / "policy.json", "--json").stdout
    )

    # nothing is known at the start, so without probes it never leaves the device
    assert plain["methods"][1]["probes"] > 0
    assert changed["methods"][1]["probes"] == 0
    assert changed["methods"][1]["shares"] == {"no-offload": 1.0}


def test_a_mask_and_a_percentile_hold_for_the_policy_too(dsc: Dsc, tmp_path: Path) -> None:
    options = ["--no-full-offload", "--percentile", 95, "--json"]
    document = json.loads(dsc("replay", GOLDEN, "--scenario", wandering(tmp_path, 100), *options).stdout)
    methods = {item["method"]: item for item in document["methods"]}

    assert list(methods) == ["ideal", "policy", "delayed", "features.4.0", "no-offload"]
    assert methods["no-offload"]["p50_ms"] == 75.0
    assert "full-offload" not in methods["policy"]["shares"]


@pytest.mark.parametrize("policy", [[], ["--no-policy"]])
def test_the_picture_shows_rate_choice_and_latency(dsc: Dsc, tmp_path: Path, policy: list[str]) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "replay.svg"
    done = dsc("replay", GOLDEN, "--scenario", wandering(tmp_path), "--plot", picture, "--json", *policy)
    texts = re.findall("<!-- (.*?) -->", picture.read_text())

    assert done.stderr == f"picture: {picture}\n"
    assert ET.fromstring(picture.read_text()).tag.endswith("svg")
    for text in ("Replay of link.csv", "uplink in MB/s", "latency T in ms", "time in s", "ideal", "full-offload"):
        assert text in texts
    assert ("policy" in texts) == (not policy)
    assert "0 MB/s: drawn at the edge" in texts


def test_the_picture_of_a_link_that_nothing_can_use_is_drawn_all_the_same(dsc: Dsc, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "gone.csv").write_text("time_s,rate_mb_s,batch\n0,0,8\n1,0,8\n")
    done = dsc("replay", GOLDEN, "--scenario", tmp_path / "gone.csv", "--no-policy", "--plot", tmp_path / "gone.png")

    assert done.exit_code == 0
    assert "ideal  none 100.0 %" in done.stdout
    assert (tmp_path / "gone.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "exit_code", "says"),
    [
        (["--json", "--csv"], 2, "exclude each other"),
        (["--no-policy", "--policy", "policy.json"], 2, "exclude each other"),
        (["--policy", "nowhere.json"], 2, "no policy 'nowhere.json': there is no such file"),
        (["--against", "features.9"], 2, "unknown choice 'features.9'"),
        (["--against", "full-offload", "--no-full-offload"], 2, "which --no-full-offload leaves out"),
        (["--batch", "9"], 2, "the state at 0 s: batch 9 is larger than every measured one"),
        (["--period", "0"], 2, "'0' is out of range"),
        (["--period", "0.001"], 2, "at most 1000000 are replayed"),
        (["--period", "1e-320"], 2, "at most 1000000 are replayed"),
        (["--noise", "nan"], 2, "'nan' is out of range"),
        (["--percentile", "90"], 2, "90"),
    ],
)
def test_bad_options_exit_as_the_design_says(
    dsc: Dsc, tmp_path: Path, arguments: list[str], exit_code: int, says: str
) -> None:
    (tmp_path / "link.csv").write_text("time_s,rate_mb_s\n0,1\n5,2\n")
    done = dsc("replay", GOLDEN, "--scenario", tmp_path / "link.csv", *arguments)

    assert (done.exit_code, done.stdout) == (exit_code, "")
    assert says in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("picture", "says"),
    [
        ("replay.pdf", ".png or .svg was expected"),
        ("folder.png", "is a folder; a file was expected"),
        ("missing/replay.png", "cannot be written: No such file or directory"),
        ("link.csv/replay.png", "cannot be written: Not a directory"),
    ],
)
def test_a_picture_that_cannot_be_written_is_refused_before_anything_is_read(
    dsc: Dsc, tmp_path: Path, picture: str, says: str
) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "link.csv").write_text("time_s,rate_mb_s\n0,fast\n")
    (tmp_path / "folder.png").mkdir()
    done = dsc("replay", GOLDEN, "--scenario", tmp_path / "link.csv", "--plot", tmp_path / picture)

    assert (done.exit_code, done.stdout) == (2, "")
    assert says in done.stderr


def test_a_picture_in_a_folder_that_may_not_be_written_is_refused_before_anything_is_read(
    dsc: Dsc, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o500)
    if os.access(folder, os.W_OK):
        pytest.skip("this user may write everywhere")
    done = dsc("replay", GOLDEN, "--scenario", tmp_path / "nothing.csv", "--plot", folder / "replay.png")

    assert done.exit_code == 2
    assert "cannot be written: Permission denied" in done.stderr


def test_a_damaged_scenario_exits_as_a_damaged_file(dsc: Dsc, tmp_path: Path) -> None:
    (tmp_path / "link.csv").write_text("time_s,rate_mb_s\n0,1\n5,fast\n")
    done = dsc("replay", GOLDEN, "--scenario", tmp_path / "link.csv")

    assert (done.exit_code, done.stdout) == (6, "")
    assert "link.csv', line 3: rate_mb_s: got 'fast'" in done.stderr
    assert dsc("replay", GOLDEN, "--scenario", tmp_path / "nothing.csv").exit_code == 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[]", "cannot be used"),
        ("{", "cannot be used"),
        ('{"switching": {}}', "got 'switching'; objects by the names 'policy', 'estimator' were expected"),
        ('{"policy": 3}', "got 'policy'"),
        ('{"policy": {"patience": 3}}', "policy has no parameter 'patience'. It has hysteresis, "),
        ('{"policy": {"hysteresis": -1}}', "hysteresis"),
        ('{"policy": {"percentile": 50}}', "use --percentile"),
        ('{"estimator": {"half_life_s": "2"}}', "half_life_s of estimator is '2'; a number or null was expected"),
    ],
)
def test_bad_parameters_are_named(dsc: Dsc, tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "link.csv").write_text("time_s,rate_mb_s\n0,1\n")
    (tmp_path / "policy.json").write_text(text)
    done: Any = dsc("replay", GOLDEN, "--scenario", tmp_path / "link.csv", "--policy", tmp_path / "policy.json")

    assert (done.exit_code, done.stdout) == (2, "")
    assert says in done.stderr
