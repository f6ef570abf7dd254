"""Stands for Triton's ONNX Runtime back-end, which the wheel does not have; on the processor."""

import json
import os
import sys
from pathlib import Path

sys.path[:0] = [os.environ["PYTHONPATH"]]  # the interpreter inside Triton does not look there by itself

import numpy  # noqa: E402
import onnxruntime  # noqa: E402
import triton_python_backend_utils as pb_utils  # noqa: E402


class TritonPythonModel:
    """What Triton's Python back-end calls."""

    def initialize(self, args):
        config = json.loads(args["model_config"])
        path = Path(args["model_repository"], args["model_version"], config["default_model_filename"])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.inputs = [item["name"] for item in config["input"]]
        self.outputs = [item["name"] for item in config["output"]]
        self.stacked = config["max_batch_size"] > 0

    def execute(self, requests):
        """Run requests that Triton joined as one batch, as its own back-end does."""
        if not self.stacked:
            return [self._answer(self._run(self._feeds(request))) for request in requests]
        feeds = [self._feeds(request) for request in requests]
        sizes = [len(next(iter(each.values()))) for each in feeds]
        joined = self._run({name: numpy.concatenate([each[name] for each in feeds]) for name in self.inputs})
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        return [
            self._answer([value[end - size : end] for value in joined]) for size, end in zip(sizes, ends, strict=True)
        ]

    def _feeds(self, request):
        return {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self.inputs}

    def _run(self, feeds):
        return self.session.run(self.outputs, feeds)

    def _answer(self, values):
        tensors = [pb_utils.Tensor(name, value) for name, value in zip(self.outputs, values, strict=True)]
        return pb_utils.InferenceResponse(tensors)
