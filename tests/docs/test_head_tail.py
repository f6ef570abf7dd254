"""The examples that run head and tail, in Python and in C++ with ONNX Runtime, on a network that has everything:
two inputs, one of them read by the tail too, and three outputs, one of them finished early."""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tests.support.cpp_compiler import build, run
from tests.support.cpp_onnxruntime import require_onnxruntime
from tests.support.paths import EXAMPLES

from dsc_split import Bundle, LookupTable
from dsc_split.lookup_table import BatchTable, Choice, Link, Row, Side, State
from dsc_split.partitioner import CutOptions, ExportOptions, SourceOptions, export_bundle

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def network() -> onnx.ModelProto:
    #        x -- h -+- early
    #                +- m --(+)-- s -- late -- index
    #    shift ------------- f
    values = np.random.default_rng(0)
    sizes = {"w1": (16, 8), "w2": (8, 4), "w3": (8, 2), "w4": (2, 4)}
    weights = [
        numpy_helper.from_array(values.standard_normal(size, dtype=np.float32), name) for name, size in sizes.items()
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h"]),
        helper.make_node("MatMul", ["h", "w2"], ["early"]),
        helper.make_node("MatMul", ["h", "w3"], ["m"]),
        helper.make_node("Cast", ["shift"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["m", "f"], ["s"]),
        helper.make_node("MatMul", ["s", "w4"], ["late"]),
        helper.make_node("ArgMax", ["late"], ["index"], axis=1),
    ]
    infos = {
        name: helper.make_tensor_value_info(name, dtype, ["batch", size])
        for name, dtype, size in [
            ("x", TensorProto.FLOAT, 16),
            ("shift", TensorProto.INT64, 1),
            ("early", TensorProto.FLOAT, 4),
            ("late", TensorProto.FLOAT, 4),
            ("index", TensorProto.INT64, 1),
        ]
    }
    graph = helper.make_graph(
        nodes, "net", [infos["x"], infos["shift"]], [infos["early"], infos["late"], infos["index"]], weights
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def table_of(bundle: Bundle) -> LookupTable:
    """Make a table in which the data rate decides: the deeper the cut, the longer the head."""
    names = ["full-offload", *(split.name for split in bundle.splits), "no-offload"]
    sizes_bytes = [bundle.input_bytes(1), *(split.size_bytes(1) for split in bundle.splits), 0]

    def row(position: int, batch: int) -> Row:
        return Row(
            choice=position,
            head_ms=0.001 * batch * position**2,
            head_ci_ms=None,
            head_p95_ms=None,
            tail_ms=0.0,
            tail_ci_ms=None,
            tail_p95_ms=None,
            uplink_bytes=sizes_bytes[position] * batch,
            downlink_bytes=0,
        )

    side = Side(target="onnxruntime:cpu", fingerprint=64 * "0")
    table = LookupTable(
        pair_id=bundle.manifest.pair_id,
        precision="fp32",
        emulated="all times are made up",
        device=side,
        server=side,
        link=Link(),
        choices=tuple(
            Choice(id=position, kind=name if name.endswith("-offload") else "split", name=name)
            for position, name in enumerate(names)
        ),
        batches=tuple(
            BatchTable(batch=batch, rows=tuple(row(position, batch) for position in range(len(names))), segments=())
            for batch in (1, 3)
        ),
    )
    return replace(
        table,
        batches=tuple(replace(item, segments=table.switch_rates(State(batch=item.batch))) for item in table.batches),
    )


@pytest.fixture(scope="module")
def whole_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("head_tail")
    onnx.save(network(), str(folder / "net.onnx"))
    options = ExportOptions(source=SourceOptions(max_batch=3), cut=CutOptions(cuts="all", max_tensors=2))
    bundle = export_bundle(str(folder / "net.onnx"), folder / "bundle", options)
    (bundle.path / "table.json").write_text(json.dumps(table_of(bundle).to_json()))
    return bundle.path


@pytest.fixture
def bundle(whole_bundle: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(whole_bundle, tmp_path / "bundle"))


@pytest.fixture(params=["python", pytest.param("c++", marks=pytest.mark.slow)])
def head_tail(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """One of the two programs."""
    if request.param == "c++":
        program = cpp_program()
        return lambda *arguments: run([str(program), *map(str, arguments)])

    def run_here(*arguments: object) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["run.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_info:
            runpy.run_path(str(EXAMPLES / "python_head_tail" / "run.py"), run_name="__main__")
        printed = capsys.readouterr()
        code = exit_info.value.code
        if isinstance(code, str):  # what the interpreter does with it
            return subprocess.CompletedProcess([], 1, printed.out, f"{printed.err}{code}\n")
        return subprocess.CompletedProcess([], int(code or 0), printed.out, printed.err)

    return run_here


def cpp_program() -> Path:
    root = require_onnxruntime()
    library = root / "lib" / "libonnxruntime.so"
    flags = ("-O0", "-isystem", str(root / "include"), f"-Wl,--no-as-needed,-rpath,{library.parent}", str(library))
    return build(EXAMPLES / "cpp_head_tail" / "head_tail.cpp", flags=flags, json=True)


def test_network_has_passthrough_inputs_and_early_outputs(whole_bundle: Path) -> None:
    splits = Bundle.open(whole_bundle).splits

    assert {split.passthrough for split in splits} == {(), ("shift",)}
    assert {split.early_outputs for split in splits} == {(), ("early",), ("early", "late")}


def test_every_choice_gives_what_the_whole_model_gives(head_tail: Run, whole_bundle: Path) -> None:
    table = Bundle.open(whole_bundle).table()

    for choice, row in zip(table.choices, table.batches[1].rows, strict=True):
        done = head_tail(whole_bundle, "--batch", 3, "--choice", choice.name)

        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.splitlines()[1].replace(",", "") == f"{choice.name}: {row.uplink_bytes} bytes sent"


def test_choice_is_the_one_that_the_table_picks(head_tail: Run, whole_bundle: Path) -> None:
    table = Bundle.open(whole_bundle).table()
    picked = set()

    for segment in table.switch_rates(State(batch=2)):
        rate_mb_s = min(segment.below_rate_mb_s or 1e6, 1e6) * 0.999
        pick = table.pick(2, rate_mb_s)
        picked.add(pick.choice.name)

        done = head_tail(whole_bundle, "--batch", 2, "--rate", repr(rate_mb_s))

        assert done.stdout.startswith(
            f"batch 2 at {rate_mb_s:g} MB/s: {pick.choice.name}, predicted {pick.latency_ms:.2f} ms\n"
        )
        assert done.returncode == 0, done.stdout + done.stderr

    assert len(picked) > 2


def test_tail_of_another_network_is_noticed(head_tail: Run, bundle: Path) -> None:
    opened = Bundle.open(bundle)
    split = next(split for split in opened.splits if split.early_outputs)
    tail = bundle / split.tail
    other = onnx.load(str(tail))
    [last] = [node for node in other.graph.node if node.output[0] == "late"]
    other.graph.node.insert(0, helper.make_node("Neg", [last.input[1]], ["negative"]))
    last.input[1] = "negative"
    onnx.save(other, str(tail))

    done = head_tail(bundle, "--choice", split.name)

    assert done.returncode == 1


def test_table_of_other_pairs_is_refused(head_tail: Run, bundle: Path) -> None:
    document = json.loads((bundle / "table.json").read_text())
    (bundle / "table.json").write_text(json.dumps({**document, "pair_id": "sha256:" + 64 * "0"}))

    done = head_tail(bundle)

    assert done.returncode == 1
    assert "of other pairs than the bundle has now" in done.stderr


def test_damaged_table_is_refused_with_the_place(head_tail: Run, bundle: Path) -> None:
    document = json.loads((bundle / "table.json").read_text())
    document["batches"][1]["rows"][0]["head_ms"] = -1
    (bundle / "table.json").write_text(json.dumps(document))

    done = head_tail(bundle)

    assert done.returncode == 1
    assert "batches[1].rows[0].head_ms" in done.stderr


@pytest.mark.parametrize("arguments", [["--batch", "0"], ["--batch", "9"], ["--rate", "nan"], ["--choice", "nothing"]])
def test_question_that_the_table_cannot_answer_is_refused(
    head_tail: Run, whole_bundle: Path, arguments: list[str]
) -> None:
    done = head_tail(whole_bundle, *arguments)

    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
