"""What a real Triton answers that serves an exported model repository as it is."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from tests.support.paths import ROOT
from tests.support.triton_networks import LEFT, sequence, two_branches
from tests.support.triton_plans import record_plans
from tests.support.triton_server import DATA, READY_S, Triton, require_triton, running, serve

from dsc_split.bundle import Bundle, TensorInfo
from dsc_split.partitioner import CutOptions, ExportOptions, export_bundle
from dsc_split.serving import TritonModel, TritonResult, export_triton, triton_model_name

pytestmark = pytest.mark.slow

BATCHES = (1, 3, 8)
TOGETHER = 12
ABSENT = "two-branches-0123456789ab-full"

Arrays = dict[str, "np.ndarray[Any, Any]"]


@dataclass(frozen=True, kw_only=True)
class Question:
    """One request, and what ONNX Runtime answers it."""

    bundle: Bundle
    model: TritonModel
    batch: int
    inputs: Arrays
    expected: Arrays


@dataclass(frozen=True, kw_only=True)
class Told:
    """What the server answered."""

    questions: list[Question]
    outputs: Arrays
    answers: dict[str, Any]
    results: list[TritonResult]
    together: Arrays
    shown: str
    """What the client of docs/triton.md printed."""


@pytest.fixture(scope="module")
def program() -> Path:
    return require_triton()


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[Bundle]:
    folder = tmp_path_factory.mktemp("bundles")
    cuts = {
        two_branches(folder / "two-branches.onnx"): "scale+a-2,scale+left______0+right,sum+s",
        two_branches(folder / "two-branches-new.onnx", seed=1): "sum+s",
        sequence(folder / "sequence.onnx"): "a",
    }
    return [
        export_bundle(str(source), folder / source.stem, ExportOptions(cut=CutOptions(cuts=names, max_tensors=3)))
        for source, names in cuts.items()
    ]


@pytest.fixture(scope="module")
def told(program: Path, bundles: list[Bundle], tmp_path_factory: pytest.TempPathFactory) -> Told:
    """Serve all bundles out of one repository, and ask every model at every batch size."""
    folder = tmp_path_factory.mktemp("served")
    results = [export_triton(bundle, folder / "models", max_queue_delay_us=50_000) for bundle in bundles]
    (folder / "models" / "notes.txt").write_text("files at the top are not for Triton")
    questions = [
        ask
        for bundle, result in zip(bundles, results, strict=True)
        for model in result.models
        for batch in BATCHES
        for ask in [make_question(bundle, model, batch)]
    ]
    together = next(ask for ask in questions if ask.batch == 1)
    write_questions(folder, questions, together)
    with serve(program, folder / "models", folder) as triton:
        run_client(triton, folder, str(DATA / "ask.py"), triton.address, str(folder))
        shutil.copy(results[0].index, folder / "models.json")
        shown = run_client(triton, folder, "-c", client_of_the_page().replace("localhost:8001", triton.address))
    outputs = dict(np.load(folder / "outputs.npz"))
    answers = json.loads((folder / "answers.json").read_text())
    return Told(
        questions=questions,
        outputs=outputs,
        answers=answers,
        results=results,
        together=together.expected,
        shown=shown,
    )


def run_client(triton: Triton, folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [triton.python, *arguments], cwd=folder, capture_output=True, text=True, timeout=READY_S, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def client_of_the_page() -> str:
    (code,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "triton.md").read_text(), re.MULTILINE | re.DOTALL)
    return str(code)


def make_question(bundle: Bundle, model: TritonModel, batch: int) -> Question:
    """Make inputs of a tail as its head does, and the outputs as ONNX Runtime does from the bundle's own files."""
    values = np.random.default_rng(batch)
    given: Arrays = {info.name: random_of(info, batch, values) for info in bundle.inputs}
    if model.choice == "full-offload":
        return Question(
            bundle=bundle, model=model, batch=batch, inputs=given, expected=run(bundle, bundle.model_path, given)
        )
    (split,) = [split for split in bundle.splits if split.name == model.choice]
    crossing = {**given, **run(bundle, bundle.file(split.head), given)}
    inputs = {info.name: crossing[info.name] for info in split.tensors}
    return Question(
        bundle=bundle, model=model, batch=batch, inputs=inputs, expected=run(bundle, bundle.file(split.tail), inputs)
    )


def random_of(info: TensorInfo, batch: int, values: np.random.Generator) -> np.ndarray[Any, Any]:
    return values.standard_normal(info.shape_at(batch), dtype=np.float32)


def run(bundle: Bundle, graph: Path, given: Arrays) -> Arrays:
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_outputs()]
    feeds = {item.name: given[item.name] for item in session.get_inputs()}
    return dict(zip(names, session.run(names, feeds), strict=True))


def write_questions(folder: Path, questions: list[Question], together: Question) -> None:
    arrays: Arrays = {}

    def request(ask: Question, model: str) -> dict[str, Any]:
        inputs = []
        for item in ask.model.inputs:
            key = f"array{len(arrays)}"
            arrays[key] = ask.inputs[item["name"]].reshape(on_the_wire(item["shape"], ask.batch))
            inputs.append({"name": item["name"], "datatype": item["datatype"], "key": key})
        return {"model": model, "inputs": inputs, "outputs": [item["name"] for item in ask.model.outputs]}

    document = {
        "requests": [*(request(ask, ask.model.name) for ask in questions), request(together, ABSENT)],
        "together": {**request(together, together.model.name), "count": TOGETHER},
        "absent": [ABSENT],
        "configs": [str(path) for path in sorted((folder / "models").glob("*/config.pbtxt"))],
    }
    (folder / "questions.json").write_text(json.dumps(document))
    np.savez(folder / "inputs.npz", **arrays)  # type: ignore[arg-type]  # stub flaw


def on_the_wire(shape: list[int | str], batch: int) -> tuple[int, ...]:
    return tuple(batch if dim in ("batch", -1) else int(dim) for dim in shape)


def test_every_model_answers_as_onnx_runtime_does(told: Told) -> None:
    assert len(told.questions) == (4 + 2 + 2) * len(BATCHES)
    for number, ask in enumerate(told.questions):
        assert {item["name"] for item in ask.model.outputs} == set(ask.expected)
        for item in ask.model.outputs:
            found, expected = told.outputs[f"{number}:{item['name']}"], ask.expected[item["name"]]
            what = f"{ask.model.name}, batch {ask.batch}, {item['name']}"
            assert found.dtype == expected.dtype, what
            assert found.shape == on_the_wire(item["shape"], ask.batch), what
            np.testing.assert_allclose(found.reshape(expected.shape), expected, rtol=1e-5, atol=1e-6, err_msg=what)


def test_tails_have_inputs_of_every_kind(told: Told) -> None:
    models = [model for result in told.results for model in result.models]

    assert any(model.passthrough and model.choice != "full-offload" for model in models)
    assert any(len(model.inputs) == 3 for model in models)
    assert any(model.early_outputs == ("early",) for model in models)
    assert any(item["name"] == LEFT for model in models for item in model.inputs)
    assert any("1/weights.data" in model.files for model in models)
    assert {model.max_batch for model in told.results[2].models} == {0}


def test_requests_that_come_together_are_joined(told: Told) -> None:
    assert told.answers["inferences"] == TOGETHER
    assert told.answers["executions"] < TOGETHER

    (first, *_) = told.together.values()
    for number in range(TOGETHER):
        np.testing.assert_allclose(told.outputs[f"together:{number}"], first, rtol=1e-5, atol=1e-6)


def test_two_exports_of_one_model_are_served_side_by_side(told: Told, bundles: list[Bundle]) -> None:
    old, new = (triton_model_name(bundle, "full-offload") for bundle in bundles[:2])
    pairs = {name: config["parameters"]["dsc_split_pair_id"] for name, config in told.answers["served_configs"].items()}

    assert pairs[old]["string_value"] == bundles[0].manifest.pair_id
    assert pairs[new]["string_value"] == bundles[1].manifest.pair_id
    assert old != new


def test_models_of_a_pair_that_is_not_served_are_not_found(told: Told) -> None:
    ((status, message),) = told.answers["errors"].values()

    assert status == "StatusCode.NOT_FOUND"
    assert ABSENT in message


def test_client_of_the_page_gets_an_answer(told: Told) -> None:
    assert told.shown == "{'early': (8, 4), 'final': (8, 32), 'label': (8, 1)}\n"


def test_protobuf_reads_the_configuration_that_was_written(told: Told) -> None:
    written = {config["name"]: config for config in told.answers["written_configs"].values()}

    assert set(written) == {model.name for result in told.results for model in result.models}
    for result in told.results:
        for model in result.models:
            config = written[model.name]
            assert [item["name"] for item in config["input"]] == [item["name"] for item in model.inputs]
            assert [item["name"] for item in config["output"]] == [item["name"] for item in model.outputs]
            assert config.get("max_batch_size", 0) == model.max_batch
            assert config["parameters"]["dsc_split_choice"] == {"string_value": model.choice}
            assert config["version_policy"] == {"specific": {"versions": ["1"]}}
            assert told.answers["served_configs"][model.name]["version_policy"] == {"specific": {"versions": ["1"]}}


def test_server_without_tensorrt_refuses_plans(program: Path, bundles: list[Bundle], tmp_path: Path) -> None:
    bundle = record_plans(bundles[2], {"8.6": "10.16.0.72"})
    export_triton(bundle, tmp_path / "models", target="tensorrt")

    with running(program, tmp_path / "models", tmp_path) as (process, _, log):
        assert process.wait(READY_S) != 0

    assert "unable to find backend library for backend 'tensorrt'" in log.read_text(errors="replace")
