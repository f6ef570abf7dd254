from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dsc_split.bundle import TensorInfo
from dsc_split.bundles._samples import load_sample, make_inputs
from dsc_split.errors import ModelFileError, UsageError


def info(name: str, dtype: str, shape: tuple[int | str, ...], per_batch: int, constant: int = 0) -> TensorInfo:
    return TensorInfo(
        name=name,
        dtype=dtype,
        shape=shape,
        elements_by_batch=(per_batch, constant),
        itemsize=np.dtype(dtype).itemsize,
    )


def test_inputs_have_the_type_and_shape_of_the_specification() -> None:
    specs = [
        info("x", "float32", ("batch", 3, 4), 12),
        info("h", "float16", (2, "batch", 5), 10),
        info("windows", "float64", ("4*batch", 2), 8),
        info("fixed", "float32", (7,), 0, 7),
    ]
    inputs = make_inputs(specs, 3, seed=0)
    assert {name: (a.shape, a.dtype.name) for name, a in inputs.items()} == {
        "x": ((3, 3, 4), "float32"),
        "h": ((2, 3, 5), "float16"),
        "windows": ((12, 2), "float64"),
        "fixed": ((7,), "float32"),
    }
    assert abs(inputs["x"].std() - 1) < 0.5


def test_whole_numbers_stay_in_the_range_that_any_model_takes() -> None:
    specs = [
        info("tokens", "int64", ("batch", 1000), 1000),
        info("image", "uint8", ("batch", 1000), 1000),
        info("mask", "bool", ("batch", 1000), 1000),
    ]
    inputs = make_inputs(specs, 1, seed=0)
    assert set(np.unique(inputs["tokens"])) == {0, 1}
    assert inputs["image"].max() > 200
    assert set(np.unique(inputs["mask"])) == {False, True}


def test_the_seed_alone_decides_the_values() -> None:
    specs = [info("x", "float32", ("batch", 8), 8)]
    first, again, other = (make_inputs(specs, 2, seed)["x"] for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_sample_is_repeated_or_cut_along_the_batch_axis() -> None:
    specs = [info("x", "int64", (2, "batch"), 2), info("y", "float32", ("batch",), 1)]
    sample = {"x": np.array([[1, 2, 3], [4, 5, 6]], np.int32)}
    assert make_inputs(specs, 2, 0, sample)["x"].tolist() == [[1, 2], [4, 5]]
    assert make_inputs(specs, 5, 0, sample)["x"].tolist() == [[1, 2, 3, 1, 2], [4, 5, 6, 4, 5]]
    assert make_inputs(specs, 5, 0, sample)["x"].dtype == np.int64


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 3)), "float64; the input takes int64"),
        (np.zeros((3, 2), np.int64), r"shape \[3, 2\]; the input takes \[2, 'batch'\]"),
        (np.zeros(2, np.int64), r"shape \[2\]"),
        (np.zeros((2, 0), np.int64), r"shape \[2, 0\]"),
    ],
)
def test_a_sample_that_does_not_fit_is_refused(array: np.ndarray, message: str) -> None:
    with pytest.raises(ModelFileError, match=message):
        make_inputs([info("x", "int64", (2, "batch"), 2)], 1, 0, {"x": array})


def test_a_sample_for_no_input_is_refused_naming_the_inputs() -> None:
    with pytest.raises(UsageError, match="'z', and the model has no such input; its inputs are 'x'"):
        make_inputs([info("x", "float32", ("batch",), 1)], 1, 0, {"z": np.zeros(1)})


def test_two_free_dimensions_are_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"'x' has 2 free dimensions \(batch, time\)"):
        make_inputs([info("x", "float32", ("batch", "time"), 1)], 1, 0)


def test_a_sample_file_is_read_by_name(tmp_path: Path) -> None:
    path = tmp_path / "sample.npz"
    np.savez(path, x=np.arange(3), y=np.ones(2))
    assert {name: array.tolist() for name, array in load_sample(path).items()} == {"x": [0, 1, 2], "y": [1, 1]}


def test_a_sample_file_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "sample.npz"
    with pytest.raises(UsageError, match="no such sample file"):
        load_sample(path)
    for content in (b"", b"garbage", b"PK\x03\x04" + bytes(40)):
        path.write_bytes(content)
        with pytest.raises(ModelFileError, match=r"cannot be read as an \.npz file"):
            load_sample(path)
    with path.open("wb") as file:
        np.save(file, np.ones(3))
    with pytest.raises(ModelFileError, match="one unnamed array"):
        load_sample(path)


def test_a_sample_file_with_python_objects_is_not_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "sample.npz"
    np.savez(path, x=np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ModelFileError, match="plain arrays"):
        load_sample(path)
