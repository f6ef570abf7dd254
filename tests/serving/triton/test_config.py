"""What ``config.pbtxt`` says of a model."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from dsc_split.bundle import TensorInfo
from dsc_split.serving.triton._config import ModelConfig, describe_tensors, encode_config, stacks_samples, unservable


def info(name: str, *shape: int | str, dtype: str = "float32") -> TensorInfo:
    return TensorInfo(name=name, dtype=dtype, shape=shape, elements_by_batch=(1, 0), itemsize=4)


CONFIG = ModelConfig(
    name="net-0123456789ab-a-tail",
    backend="onnxruntime",
    max_batch=64,
    inputs=describe_tensors([info("a", "batch", 8, 4, 4), info("scale", "batch", dtype="float16")], stacked=True),
    outputs=describe_tensors([info("y", "batch", 0, dtype="int64")], stacked=True),
    instances=2,
    max_queue_delay_us=500,
    files={"": "model.onnx"},
    parameters={"dsc_split_choice": "a", "dsc_split_precision": "fp32"},
)

TEXT = """\
name: "net-0123456789ab-a-tail"
backend: "onnxruntime"
max_batch_size: 64
input {
  name: "a"
  data_type: TYPE_FP32
  dims: [ 8, 4, 4 ]
}
input {
  name: "scale"
  data_type: TYPE_FP16
  dims: [ 1 ]
  reshape { shape: [ ] }
}
output {
  name: "y"
  data_type: TYPE_INT64
  dims: [ -1 ]
}
default_model_filename: "model.onnx"
version_policy {
  specific { versions: [ 1 ] }
}
dynamic_batching {
  max_queue_delay_microseconds: 500
}
instance_group {
  count: 2
  kind: KIND_AUTO
}
parameters {
  key: "dsc_split_choice"
  value { string_value: "a" }
}
parameters {
  key: "dsc_split_precision"
  value { string_value: "fp32" }
}
"""


def changed(**changes: Any) -> str:
    return encode_config(dataclasses.replace(CONFIG, **changes)).decode("ascii")


def test_configuration_says_all_of_a_model() -> None:
    assert encode_config(CONFIG).decode() == TEXT


def test_plans_stand_under_their_compute_capability_and_there_is_no_default() -> None:
    text = changed(backend="tensorrt", files={"8.9": "model_cc89.plan", "8.6": "model_cc86.plan"})

    first, second = text.index('  key: "8.6"\n  value: "model_cc86.plan"\n'), text.index('  key: "8.9"\n')
    assert first < second
    assert text.count("cc_model_filenames {") == 2
    assert "default_model_filename" not in text
    assert "model.plan" not in text
    assert "kind: KIND_GPU" in text


@pytest.mark.parametrize("changes", [{"max_batch": 0}, {"max_queue_delay_us": None}])
def test_requests_are_joined_only_where_samples_are_stacked_and_it_is_wanted(changes: dict[str, Any]) -> None:
    assert "dynamic_batching" in TEXT
    assert "dynamic_batching" not in changed(**changes)


def test_odd_names_are_quoted() -> None:
    odd = 'a "quoted"\\back\nline\x00ü'

    text = changed(inputs=describe_tensors([info(odd, "batch", 3)], stacked=True))

    assert 'name: "a \\042quoted\\042\\134back\\012line\\000\\303\\274"' in text


@pytest.mark.parametrize(
    ("shapes", "fixed_batch", "expected"),
    [
        ([("batch", 3, 4), ("batch",)], None, True),
        ([("batch", 3), (5, "batch")], None, False),
        ([("2*batch", 3)], None, False),
        ([("batch", "batch")], None, False),
        ([("batch", 3), (3,)], None, False),
        ([("batch", 3), ()], None, False),
        ([("batch", 3), ("data_0",)], None, False),
        ([(1, 3)], 1, False),
    ],
)
def test_samples_are_stacked_where_the_batch_is_axis_0_of_all(
    shapes: list[tuple[int | str, ...]], fixed_batch: int | None, expected: bool
) -> None:
    assert stacks_samples([info("t", *shape) for shape in shapes], fixed_batch) is expected


def test_shapes_are_whole_where_samples_are_not_stacked() -> None:
    (tensor,) = describe_tensors([info("x", 5, "batch", 4)], stacked=False)

    assert tensor.shape == (5, -1, 4)
    assert tensor.dims == (5, -1, 4)
    assert not tensor.is_flat


@pytest.mark.parametrize(
    ("dtype", "datatype"), [("bool", "BOOL"), ("uint8", "UINT8"), ("bfloat16", "BF16"), ("string", "BYTES")]
)
def test_requests_name_types_as_the_protocol_does(dtype: str, datatype: str) -> None:
    (tensor,) = describe_tensors([info("t", "batch", 2, dtype=dtype)], stacked=True)

    assert tensor.datatype == datatype


def test_strings_have_another_name_in_the_configuration() -> None:
    text = changed(inputs=describe_tensors([info("t", "batch", 2, dtype="string")], stacked=True))

    assert "data_type: TYPE_STRING" in text


def test_tensors_that_triton_does_not_carry_are_named() -> None:
    assert "float8e4m3fn" in unservable([info("t", "batch", dtype="float8e4m3fn")], stacked=True)
    assert "'t' is a scalar" in unservable([info("t")], stacked=False)
    assert unservable([info("t", "batch"), info("u", "batch", 3)], stacked=True) == ""
