"""Let the table pick where to split, run head and tail as device and server would, and compare with the whole model."""

from __future__ import annotations

import argparse
import io
import sys

import numpy as np

from dsc_split import Bundle
from dsc_split.bundle import TensorInfo
from dsc_split.engines import EngineLike, SideEngines, get_backend
from dsc_split.errors import DscError

Arrays = dict[str, np.ndarray]

TOLERANCE = {"fp32": 1e-5, "fp16": 2e-3}
"""Largest difference from the whole model, relative to its largest output."""


def load_engines(bundle: Bundle, choice: str, batch: int) -> tuple[EngineLike | None, EngineLike | None]:
    """Load what a choice runs: on the device, and on the server."""

    def load(side: str, kind: str, split: str | None) -> EngineLike:
        engines = SideEngines(bundle, side)
        found = (item for item in engines.graphs if (item.kind, item.split and item.split.name) == (kind, split))
        return engines.load(next(found), batch)

    if choice == "full-offload":
        return None, load("server", "model", None)
    if choice == "no-offload":
        return load("device", "model", None), None
    return load("device", "head", choice), load("server", "tail", choice)


def run_choice(device: EngineLike | None, server: EngineLike | None, inputs: Arrays) -> tuple[Arrays, int]:
    """Run one request through both sides.

    Returns:
        What the model gives, by name, and how many bytes were sent.
    """
    outputs: Arrays = {}
    if device is not None:  # a head gives what crosses the cut, and outputs of the model that are finished early
        outputs = device.run({spec.name: inputs[spec.name] for spec in device.inputs})
    if server is None:
        return outputs, 0
    known = inputs | outputs  # a tail may read inputs of the model, too
    message = {spec.name: known[spec.name] for spec in server.inputs}
    outputs |= server.run(over_the_wire(message))
    return outputs, sum(array.nbytes for array in message.values())


def over_the_wire(message: Arrays) -> Arrays:
    """Stand in for the network: arrays to bytes, and back."""
    wire = io.BytesIO()
    np.savez(wire, **message)  # type: ignore[arg-type]  # names are free
    with np.load(io.BytesIO(wire.getvalue()), allow_pickle=False) as received:
        return {name: received[name] for name in received.files}


def make_input(info: TensorInfo, batch: int, seed: int = 0) -> np.ndarray:
    """Make up an input: normal numbers for floats, 0 and 1 for the rest."""
    generator = np.random.default_rng(seed)
    shape = info.shape_at(batch)
    values = generator.standard_normal(shape) if "float" in info.dtype else generator.integers(0, 2, shape)
    return values.astype(info.dtype)


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference over the largest expected magnitude; infinite where shapes or NaN differ."""
    a, b = found.astype(np.float64), expected.astype(np.float64)
    if a.shape != b.shape or not np.array_equal(np.isnan(a), np.isnan(b)):
        return float("inf")
    if np.array_equal(a, b, equal_nan=True):
        return 0.0
    return float(np.nanmax(np.abs(a - b)) / np.nanmax(np.abs(b)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rate", type=float, default=4.0, help="data rate in MB/s")
    parser.add_argument("--choice", help="run this one, whatever the table picks")
    options = parser.parse_args()

    bundle = Bundle.open(options.bundle)
    table = Bundle.open(options.bundle).table()
    pick = table.pick(options.batch, options.rate)
    print(f"batch {options.batch} at {options.rate:g} MB/s: {pick.choice.name}, predicted {pick.latency_ms:.2f} ms")
    choice = table.choice(options.choice or pick.choice.name).name

    device, server = load_engines(bundle, choice, options.batch)
    inputs = {info.name: make_input(info, options.batch) for info in bundle.inputs}
    outputs, sent_bytes = run_choice(device, server, inputs)
    print(f"{choice}: {sent_bytes:,} bytes sent")

    whole = get_backend("onnxruntime:cpu").load(bundle.model_path).run(inputs)
    worst = max(relative_error(outputs[name], whole[name]) for name in whole)
    tolerance = TOLERANCE[bundle.manifest.precision]
    print(f"largest difference from the whole model: {worst:.2g} of the largest output; up to {tolerance:g} is right")
    return 0 if worst <= tolerance else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except DscError as e:
        sys.exit(f"error: {e}")
