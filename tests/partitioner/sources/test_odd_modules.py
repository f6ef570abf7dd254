"""PyTorch modules that are not quite what an exporter wishes for: exported, or refused with the true reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.support.manifests import stated
from tests.support.paths import DATA

from dsc_split.bundle import Bundle
from dsc_split.errors import ExportError, UsageError
from dsc_split.partitioner import CutOptions, ExportOptions, SourceOptions, bundle_cuts, export_bundle
from dsc_split.partitioner.proof._proof import relative_error

NETS = DATA / "source_nets.py"


def export(function: str, tmp_path: Path) -> Bundle:
    options = ExportOptions(source=SourceOptions(max_batch=3), cut=CutOptions(cuts="all"))
    return export_bundle(f"{NETS}:{function}", tmp_path / "out", options)


def test_complex_numbers_are_pairs_of_real_ones_in_the_graph_and_agree_with_pytorch(tmp_path: Path) -> None:
    bundle = export("complex_input", tmp_path)

    assert bundle.inputs[0].shape == ("batch", 4, 2)
    assert stated(bundle.manifest.model.export_max_rel_error) < 1e-5


def test_module_with_a_random_op_is_exported_and_each_cut_says_why_it_is_refused(tmp_path: Path) -> None:
    bundle = export("restless", tmp_path)

    assert bundle.splits == ()
    assert any("answers differently each time" in note for note in stated(bundle.manifest.notes))
    assert bundle.manifest.model.export_max_rel_error is None
    assert all("answers differently each time" in cut.reason for cut in bundle_cuts(bundle).cuts)


def test_module_that_fails_at_a_batch_that_is_proven_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="'source_nets_switches_itself' does not run on inputs x"):
        export("switches_itself", tmp_path)


def test_a_torchscript_module_is_refused_with_what_to_return(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"TorchScript module.*Return the torch\.nn\.Module"):
        export("scripted", tmp_path)


def test_complex_numbers_differ_where_their_imaginary_parts_do() -> None:
    expected = np.array([1 + 2j, 3j])

    assert relative_error(expected, expected) == (0.0, 0.0)
    assert relative_error(expected.conj(), expected)[1] == 2.0
