from __future__ import annotations

import numpy as np
import pytest

from dsc_split.bundle import Bundle, TensorInfo
from dsc_split.engines.side._inputs import engine_inputs, tile
from dsc_split.engines.side._sides import side_graphs
from dsc_split.errors import BundleError


def info(shape: tuple[int | str, ...], per_batch: int, constant: int = 0) -> TensorInfo:
    elements = (per_batch, constant)
    return TensorInfo(name="t", dtype="float32", shape=shape, elements_by_batch=elements, itemsize=4)


def test_samples_are_repeated_along_the_batch_axis() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)

    np.testing.assert_array_equal(tile(array, info(("batch", 3), 3), 5), array[[0, 1, 0, 1, 0]])
    np.testing.assert_array_equal(tile(array, info(("batch", 3), 3), 1), array[:1])


def test_the_batch_may_stand_on_any_axis_and_be_part_of_a_larger_one() -> None:
    array = np.arange(6, dtype=np.float32).reshape(3, 2)

    np.testing.assert_array_equal(tile(array, info((3, "batch"), 3), 3), array[:, [0, 1, 0]])
    assert tile(np.ones((8, 2), np.float32), info(("4*batch + 1", 2), 8, 2), 3).shape == (13, 2)


def test_a_tensor_without_a_batch_stays_as_it_is() -> None:
    array = np.arange(3, dtype=np.float32)

    np.testing.assert_array_equal(tile(array, info((3,), 0, 3), 64), array)


@pytest.mark.parametrize("array", [np.ones((2, 3)), np.ones((2, 3, 1), np.float32), np.ones((0, 3), np.float32)])
def test_a_sample_that_does_not_fit_is_refused(array: np.ndarray) -> None:
    with pytest.raises(BundleError, match="golden sample of 't'"):
        tile(array, info(("batch", 3), 3), 4)


def test_a_tail_is_fed_with_what_really_crosses_the_cut(bundle: Bundle) -> None:
    tail = side_graphs(bundle, "server")[1]
    golden = np.load(bundle.path / "samples/a.npz")["cut:a"]

    inputs = engine_inputs(bundle, tail, ["a"], 3)

    np.testing.assert_array_equal(inputs["a"], golden[[0, 1, 0]])


def test_without_golden_samples_inputs_are_made_up(bundle: Bundle) -> None:
    (bundle.path / "samples/a.npz").unlink()
    tail = side_graphs(bundle, "server")[1]

    assert engine_inputs(bundle, tail, ["a"], 3)["a"].shape == (3, 2, 8, 8)


def test_an_input_that_the_manifest_does_not_know_is_refused(bundle: Bundle) -> None:
    with pytest.raises(BundleError, match=r"takes \['z'\]"):
        engine_inputs(bundle, side_graphs(bundle, "device")[0], ["z"], 1)
