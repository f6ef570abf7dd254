"""What docs/shipping.md shows works, up to a server that serves the tails."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from tests.support.readme_commands import scripts
from tests.support.triton_server import require_triton, serve

from dsc_split.bundle import Bundle
from dsc_split.engines import SideEngines

CLIENT = """
import sys
import numpy as np
import tritonclient.grpc as triton
address, inputs, outputs = sys.argv[1:]
client, answers = triton.InferenceServerClient(address), {}
for key, array in np.load(inputs).items():
    model, name = key.split(":")
    value = triton.InferInput(name, array.shape, "FP32")
    value.set_data_from_numpy(array)
    answers[model] = client.infer(model, [value]).as_numpy("output")
np.savez(outputs, **answers)
"""


def run(command: list[str], folder: Path) -> str:
    """Run a command as a reader of the page would; gives what it prints."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_the_whole_way_of_the_page_ends_with_a_server_that_answers_what_the_device_sends(
    root: Path, tmp_path: Path
) -> None:
    page = root / "docs" / "shipping.md"
    commands = "".join(script for script, _ in scripts(page))
    commands = commands.replace("--time-limit 1", "--time-limit 0.2").replace(
        "--precision-goal 0.1", "--precision-goal 9"
    )

    printed = run(["bash", "-euo", "pipefail", "-c", commands], tmp_path)

    assert "signed by fleet.pub" in printed
    assert not list((tmp_path / "device/m/onnx").glob("*.tail.onnx"))
    assert not list((tmp_path / "server/m/onnx").glob("*.head.onnx"))
    (program,) = re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert "['x']" in run([sys.executable, "-c", program], tmp_path)

    tritonserver = require_triton()
    device = SideEngines(Bundle.open(tmp_path / "device/m"), "device")
    whole, *heads = device.graphs
    image = np.random.default_rng(0).standard_normal((2, 3, 224, 224), dtype=np.float32)
    with closing(device.load(whole, 2)) as engine:
        (expected,) = engine.run({"x": image}).values()
    (index,) = (tmp_path / "server/models").glob("*.json")
    models = {model["choice"]: model["name"] for model in json.loads(index.read_text())["models"]}
    assert models.keys() == {"full-offload", *(head.split.name for head in heads if head.split)}
    sent = {f"{models['full-offload']}:x": image}
    for head in heads:
        assert head.split is not None
        with closing(device.load(head, 2)) as engine:
            ((name, tensor),) = engine.run({"x": image}).items()
        sent[f"{models[head.split.name]}:{name}"] = tensor
    (tmp_path / "triton").mkdir()
    np.savez(tmp_path / "sent.npz", **sent)  # type: ignore[arg-type]  # names are free
    with serve(tritonserver, tmp_path / "server/models", tmp_path / "triton") as server:
        run([str(server.python), "-c", CLIENT, server.address, "sent.npz", "answers.npz"], tmp_path)
    with np.load(tmp_path / "answers.npz") as answers:
        assert set(answers.files) == set(models.values())
        for name in answers.files:
            np.testing.assert_allclose(answers[name], expected, rtol=1e-4, atol=1e-5 * float(np.abs(expected).max()))
