"""Time the engines, make lookup tables, and replay scenarios. A run that was stopped continues where it was.

::

    result = bench_bundle(Bundle.open("b4"), device="onnxruntime:cpu,threads=1,slowdown=6", batches=[1, 8])
    print(result.counts)
"""

from dsc_split.benchmarks.cells._cells import Cell, CellStore, Question, Round
from dsc_split.benchmarks.memory._budget import Loss, keep_within
from dsc_split.benchmarks.memory._measure import measure_memory
from dsc_split.benchmarks.memory._reports import EngineMemory, MemoryReport, SetMemory
from dsc_split.benchmarks.merge._merge import MergeResult, merge_bundles
from dsc_split.benchmarks.replay._device import PolicyUnderTest
from dsc_split.benchmarks.replay._replay import Replay, replay
from dsc_split.benchmarks.replay._scenario import Scenario, TimedState, read_scenario
from dsc_split.benchmarks.sweep._sweep import BenchResult, bench_bundle
from dsc_split.benchmarks.sweep._tasks import BenchSettings
from dsc_split.benchmarks.sweep.executors._executor import Executor, Job, JobResult
from dsc_split.benchmarks.tables._compare import Comparison, compare_tables
from dsc_split.benchmarks.tables._table import make_table, read_link, save_table, write_table, write_tables

__all__ = [
    "BenchResult",
    "BenchSettings",
    "Cell",
    "CellStore",
    "Comparison",
    "EngineMemory",
    "Executor",
    "Job",
    "JobResult",
    "Loss",
    "MemoryReport",
    "MergeResult",
    "PolicyUnderTest",
    "Question",
    "Replay",
    "Round",
    "Scenario",
    "SetMemory",
    "TimedState",
    "bench_bundle",
    "compare_tables",
    "keep_within",
    "make_table",
    "measure_memory",
    "merge_bundles",
    "read_link",
    "read_scenario",
    "replay",
    "save_table",
    "write_table",
    "write_tables",
]
