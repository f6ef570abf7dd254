"""Ask a Triton what it serves; runs where tritonclient is installed.

Usage: ask.py ADDRESS FOLDER. FOLDER/questions.json names models, inputs and outputs; FOLDER/inputs.npz has the arrays.
Writes FOLDER/outputs.npz and FOLDER/answers.json.
"""

import json
import sys
from pathlib import Path

import numpy as np
import tritonclient.grpc as triton
from google.protobuf import json_format, text_format
from tritonclient.grpc import model_config_pb2
from tritonclient.utils import InferenceServerException


def inputs_of(question, arrays):
    result = []
    for item in question["inputs"]:
        array = arrays[item["key"]]
        value = triton.InferInput(item["name"], array.shape, item["datatype"])
        value.set_data_from_numpy(array)
        result.append(value)
    return result


def parsed_config(path):
    config = text_format.Parse(Path(path).read_bytes(), model_config_pb2.ModelConfig())
    return json_format.MessageToDict(config, preserving_proto_field_name=True)


def main():
    address, folder = sys.argv[1], Path(sys.argv[2])
    questions = json.loads((folder / "questions.json").read_text())
    arrays = dict(np.load(folder / "inputs.npz"))
    client = triton.InferenceServerClient(address)
    outputs, errors = {}, {}
    for number, question in enumerate(questions["requests"]):
        try:
            answer = client.infer(question["model"], inputs_of(question, arrays))
        except InferenceServerException as e:
            errors[number] = [e.status(), e.message()]
            continue
        for name in question["outputs"]:
            outputs[f"{number}:{name}"] = answer.as_numpy(name)

    together = questions["together"]
    before = client.get_inference_statistics(together["model"]).model_stats[0]
    done = []
    for _ in range(together["count"]):
        client.async_infer(
            together["model"], inputs_of(together, arrays), callback=lambda result, error: done.append((result, error))
        )
    client.get_server_metadata()
    while len(done) < together["count"]:
        client.is_server_live()
    after = client.get_inference_statistics(together["model"]).model_stats[0]
    for number, (result, error) in enumerate(done):
        if error is not None:
            raise error
        outputs[f"together:{number}"] = result.as_numpy(together["outputs"][0])

    names = sorted({question["model"] for question in questions["requests"]} - set(questions["absent"]))
    configs = {name: client.get_model_config(name, as_json=True)["config"] for name in names}
    answers = {
        "errors": errors,
        "inferences": after.inference_count - before.inference_count,
        "executions": after.execution_count - before.execution_count,
        "served_configs": configs,
        "written_configs": {path: parsed_config(path) for path in questions["configs"]},
    }
    np.savez(folder / "outputs.npz", **outputs)
    (folder / "answers.json").write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
