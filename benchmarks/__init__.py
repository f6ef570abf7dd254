"""Time the engines, make the table, and replay scenarios through it; a run that is killed goes on where it was.

::

    result = bench_bundle(Bundle.open("b4"), device="onnxruntime:cpu,threads=1,slowdown=6", batches=[1, 8])
    print(result.counts)
"""

from dsc_split.benchmarks._cells import Cell, CellStore, Question
from dsc_split.benchmarks._plan import BenchSettings
from dsc_split.benchmarks._replay import Replay, replay
from dsc_split.benchmarks._replay_device import PolicyUnderTest
from dsc_split.benchmarks._scenario import Scenario, State, read_scenario
from dsc_split.benchmarks._sweep import BenchResult, bench_bundle
from dsc_split.benchmarks._table import make_table, read_link, write_table

__all__ = [
    "BenchResult",
    "BenchSettings",
    "Cell",
    "CellStore",
    "PolicyUnderTest",
    "Question",
    "Replay",
    "Scenario",
    "State",
    "bench_bundle",
    "make_table",
    "read_link",
    "read_scenario",
    "replay",
    "write_table",
]
