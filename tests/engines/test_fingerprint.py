from __future__ import annotations

import json
import re

from dsc_split.engines import fingerprint_id, get_backend, target_id


def test_fingerprints_are_stable_and_plain_json() -> None:
    once, twice = (get_backend("onnxruntime:cpu,threads=1") for _ in range(2))

    assert once.run_fingerprint() == twice.run_fingerprint()
    assert once.build_fingerprint() == twice.build_fingerprint()
    assert json.loads(json.dumps(once.run_fingerprint())) == once.run_fingerprint()


def test_threads_and_emulation_change_the_run_but_not_the_build() -> None:
    texts = ["onnxruntime", "onnxruntime:cpu,threads=1", "onnxruntime:cpu,threads=1,slowdown=6"]
    backends = [get_backend(text) for text in texts]

    assert len({fingerprint_id(backend.run_fingerprint()) for backend in backends}) == 3
    assert len({fingerprint_id(backend.build_fingerprint()) for backend in backends}) == 1


def test_run_fingerprint_names_library_version_processor_and_host() -> None:
    import onnxruntime

    fingerprint = get_backend("onnxruntime").run_fingerprint()

    assert fingerprint["library"] == "onnxruntime"
    assert fingerprint["version"] == onnxruntime.__version__
    assert {"architecture", "processor", "hardware_threads", "host", "system"} <= set(fingerprint)


def test_fingerprint_id_is_the_head_of_the_sha256_of_canonical_json() -> None:
    assert fingerprint_id({"b": 1, "a": "x"}) == fingerprint_id({"a": "x", "b": 1}) == "cdab067e9f3b"


def test_target_id_is_safe_as_a_file_name() -> None:
    name = target_id({"library": "Tensor RT/RTX", "architecture": "../sm75", "version": "1"})

    assert re.fullmatch(r"tensor-rt-rtx-sm75-[0-9a-f]{12}", name)
