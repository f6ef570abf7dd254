import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.replays import timed

from dsc_split.benchmarks.replay import _scenario
from dsc_split.benchmarks.replay._scenario import PACKET_GOODPUT_BYTES, Scenario, read_scenario
from dsc_split.errors import DamagedError, DscError, UsageError


def written(folder: Path, text: str | bytes, name: str = "link.csv") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_csv_becomes_states_and_the_last_one_lasts_as_long_as_the_median(tmp_path: Path) -> None:
    scenario = read_scenario(written(tmp_path, "time_s,rate_mb_s\n0,1.5\n3,0\n5,inf\n9.5,2e1\n"))

    assert [(item.time_s, item.state.rate_mb_s) for item in scenario.states] == [
        (0.0, 1.5),
        (3.0, 0.0),
        (5.0, math.inf),
        (9.5, 20.0),
    ]
    assert scenario.end_s == 9.5 + 3.0
    assert scenario.name == "link.csv"


def test_columns_come_in_any_order_and_an_empty_field_takes_the_default(tmp_path: Path) -> None:
    text = (
        "\ufeffbatch , rtt_ms,rate_mb_s,queue_ms,time_s,server_load,downlink_rate_mb_s\r\n"
        "8,20,1,3,0,2.5,inf\r\n"
        "\r\n"
        ",,2,,1,,\r\n"
    )
    first, second = read_scenario(written(tmp_path, text), batch=4).states

    assert first == timed(0, 1, batch=8, rtt_ms=20, queue_ms=3, server_load=2.5, downlink_rate_mb_s=math.inf)
    assert second == timed(1, 2, batch=4)


def test_a_scenario_of_one_state_lasts_a_second(tmp_path: Path) -> None:
    assert read_scenario(written(tmp_path, "time_s,rate_mb_s\n7,1\n")).end_s == 8.0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "line 1: no states"),
        ("time_s,rate_mb_s\n", "line 1: no states"),
        ("time_s,rate_mb_s,speed,\n0,1,2,\n", "line 1: unknown columns 'speed', ''; known are 'time_s', "),
        ("time_s;rate_mb_s\n0;1\n", "line 1: unknown columns 'time_s;rate_mb_s'"),
        ("time_s;rate_mb_s\n0;1\n", "The first line names the columns, separated by commas."),
        ("0.0,8\n3,7\n", "The first line names the columns, separated by commas."),
        ("time_s,batch\n0,1\n", "line 1: the header lacks 'rate_mb_s'"),
        ("time_s,rate_mb_s,time_s\n0,1,2\n", "line 1: columns 'time_s' stand twice"),
        ("time_s,rate_mb_s\n0,1\n1\n", "line 3: 1 fields; 2 were expected"),
        ("time_s,rate_mb_s\n0,1\n1,nan\n", "line 3: rate_mb_s: got 'nan'; a number from 0, or inf, was expected"),
        ("time_s,rate_mb_s\n0,-1\n", "line 2: rate_mb_s: got '-1'"),
        ("time_s,rate_mb_s\n0,-inf\n", "line 2: rate_mb_s: got '-inf'"),
        ("time_s,rate_mb_s\n0,1e999\n", "line 2: rate_mb_s: got '1e999'"),
        ("time_s,rate_mb_s\n0,1_0\n", "line 2: rate_mb_s: got '1_0'"),
        ("time_s,rate_mb_s\n0,\u0661\n", "line 2: rate_mb_s: got "),
        ("time_s,rate_mb_s\n0,4MB\n", "line 2: rate_mb_s: got '4MB'"),
        ("time_s,rate_mb_s\n0,\n", "line 2: rate_mb_s is empty"),
        ("time_s,rate_mb_s\ninf,1\n", "line 2: time_s: got 'inf'; a number from 0 to 1e+09 was expected"),
        ("time_s,rate_mb_s\n1e10,1\n", "line 2: time_s: got '1e10'"),
        ("time_s,rate_mb_s\n0,1\n2,1\n1,1\n", "line 4: time_s 1 is not after 2, the one before; sort"),
        ("time_s,rate_mb_s\n0,1\n0,1\n", "line 3: time_s 0 is not after 0"),
        ("time_s,rate_mb_s,batch\n0,1,0\n", "line 2: batch: got '0'; a whole number from 1"),
        ("time_s,rate_mb_s,batch\n0,1,1.5\n", "line 2: batch: got '1.5'"),
        ("time_s,rate_mb_s,batch\n0,1,1048577\n", "line 2: batch: got '1048577'"),
        ("time_s,rate_mb_s,rtt_ms\n0,1,inf\n", "line 2: rtt_ms: got 'inf'; a number from 0 was expected"),
        ("time_s,rate_mb_s,server_load\n0,1,-2\n", "line 2: server_load: got '-2'"),
        ('time_s,rate_mb_s\n0,"1\n', "line 2: no CSV"),
        ("time_s,rate_mb_s\n0,1\n1," + "9" * 200_000 + "\n", "line 3: no CSV (field larger"),
        ("time_s,rate_mb_s\n0,1\n1," + "9" * 1000 + "\n", "line 3: rate_mb_s: got '9999"),
        (b"time_s,rate_mb_s\n0,1\n1,\xff\n", "line 3: not UTF-8 (invalid start byte at byte 23 of the file)"),
        ("5\nx\n", "line 2: got 'x'; one whole number, milliseconds, was expected"),
        ("5\n4\n", "line 2: 4 ms is before 5 ms"),
        ("5\n-6\n", "line 2: got '-6'"),
        ("0\n0\n", "the trace ends at 0 ms"),
        ("1\n9999999999999\n", "line 2: 9999999999999 ms is out of range"),
    ],
)
def test_a_damaged_file_is_refused_with_its_line(tmp_path: Path, text: str | bytes, says: str) -> None:
    with pytest.raises(DamagedError) as error_info:
        read_scenario(written(tmp_path, text))

    assert "link.csv" in str(error_info.value)
    assert says in str(error_info.value)


def test_files_that_are_too_large_or_not_there_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, "time_s,rate_mb_s\n0,1\n1,1\n")
    monkeypatch.setattr(_scenario, "MAX_STATES", 1)
    with pytest.raises(DamagedError, match="line 3: more than 1 states"):
        read_scenario(path)
    monkeypatch.setattr(_scenario, "MAX_SCENARIO_BYTES", 10)
    with pytest.raises(DamagedError, match="more than 10 bytes"):
        read_scenario(path)
    with pytest.raises(UsageError, match="there is no such file"):
        read_scenario(tmp_path / "nothing.csv")
    with pytest.raises(DamagedError, match="cannot be read"):
        read_scenario(tmp_path)


@given(st.binary(max_size=200) | st.text(alphabet="0123456789,.-einftmsrab_\n\r\"' ", max_size=200))
def test_no_bytes_do_anything_but_make_a_scenario_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes | str
) -> None:
    path = written(tmp_path_factory.getbasetemp(), data if isinstance(data, bytes) else f"time_s,rate_mb_s\n{data}")
    try:
        scenario = read_scenario(path)
    except DscError:
        return
    times_s = [state.time_s for state in scenario.states]
    assert times_s == sorted(times_s)
    assert scenario.end_s > times_s[-1]
    assert all(item.state.rate_mb_s >= 0.0 for item in scenario.states)


def test_a_packet_trace_is_counted_in_bins_and_gaps_are_outages(tmp_path: Path) -> None:
    # 4 opportunities in (0, 1] s, none in (1, 2] s, 2 in (2, 3] s; the half bin at the end is left out
    trace = written(tmp_path, "0\n1\n500\n1000\n2001\n3000\n3400\n3500\n", "cell.up")
    scenario = read_scenario(trace, batch=2)

    assert [(item.time_s, item.state.rate_mb_s) for item in scenario.states] == [
        (0.0, PACKET_GOODPUT_BYTES * 4 / 1e6),
        (1.0, 0.0),
        (2.0, PACKET_GOODPUT_BYTES * 2 / 1e6),
    ]
    assert {(item.state.batch, item.state.downlink_rate_mb_s) for item in scenario.states} == {(2, None)}
    assert scenario.end_s == 3.0


def test_a_trace_of_a_constant_rate_has_that_rate_at_any_bin(tmp_path: Path) -> None:
    trace = written(tmp_path, "".join(f"{ms}\n" for ms in range(1, 4001)))

    for bin_s in (0.1, 0.25, 1.0, 4.0, 60.0):
        rates = [item.state.rate_mb_s for item in read_scenario(trace, bin_s=bin_s).states]
        assert rates == pytest.approx([1.448] * len(rates))
        assert len(rates) == max(1, 4 / bin_s)


def test_a_shorter_downlink_trace_is_repeated(tmp_path: Path) -> None:
    up = written(tmp_path, "1000\n2000\n3000\n", "cell.up")
    down = written(tmp_path, "100\n200\n1000\n2000\n", "cell.down")
    states = read_scenario(up, downlink=down).states

    assert [item.state.downlink_rate_mb_s for item in states] == [0.004344, 0.001448, 0.004344]


def test_a_downlink_trace_goes_with_a_packet_trace_alone(tmp_path: Path) -> None:
    table = written(tmp_path, "time_s,rate_mb_s\n0,1\n")
    trace = written(tmp_path, "1000\n", "cell.up")

    with pytest.raises(UsageError, match="column 'downlink_rate_mb_s'"):
        read_scenario(table, downlink=trace)
    with pytest.raises(DamagedError, match="no packet trace"):
        read_scenario(trace, downlink=table)


def test_bins_and_batches_out_of_range_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = written(tmp_path, "1000\n")

    with pytest.raises(UsageError, match="batch 0 is out of range"):
        read_scenario(trace, batch=0)
    with pytest.raises(UsageError, match="bin of nan s is out of range"):
        read_scenario(trace, bin_s=math.nan)
    monkeypatch.setattr(_scenario, "MAX_STATES", 99)
    with pytest.raises(DamagedError, match=r"100 bins of 0\.01 s; at most 99 are read"):
        read_scenario(trace, bin_s=0.01)


def test_states_that_are_made_by_hand_are_checked() -> None:
    with pytest.raises(UsageError, match="has no states"):
        Scenario.of([])
    with pytest.raises(UsageError, match="not by ascending time"):
        Scenario.of([timed(1, 1), timed(1, 1)])
