"""Two processes on one bundle: writers are refused by name, and readers see the old or the new one."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from tests.support.commands import Commands
from tests.support.fault_cases import (
    BENCH_OTHER,
    BENCH_SERVER,
    BUILD,
    EXPORT,
    EXPORT_ANEW,
    EXPORT_OTHER,
    MERGE,
    PACK,
    faults_of,
    litter_in,
    pairs_of,
)

from dsc_split._support.hashing import sha256_file
from dsc_split.bundle import Bundle
from dsc_split.errors import BundleError

BUSY = "is being written by another dsc-split"


def digests(folder: Path) -> dict[Path, str]:
    return {path: sha256_file(path) for path in folder.rglob("*") if path.is_file() and ".lock" not in path.name}


def test_writers_are_refused_by_name_while_another_one_writes(commands: Commands, work: Path) -> None:
    assert [commands(*arguments, folder=work).status for arguments in (EXPORT_OTHER, BENCH_OTHER, PACK)] == [0, 0, 0]
    before = digests(work)

    with Bundle.open(work / "bundle").lock():
        for arguments in (
            EXPORT_ANEW,
            ("cut", "bundle", "--cuts", "c"),
            BUILD,
            (*BENCH_SERVER, "--again"),
            MERGE,
            PACK,
            ("unpack", "bundle.dscb", "--output", "bundle"),
        ):
            run = commands(*arguments, folder=work)
            assert (run.status, f"{BUSY} (process {os.getpid()})" in run.output) == (1, True), run.output

    assert digests(work) == before
    assert litter_in(work) == []


def test_readers_wait_for_nobody(commands: Commands, work: Path) -> None:
    with Bundle.open(work / "bundle").lock():
        for arguments in (("verify", "bundle"), ("pick", "bundle", "--batch", 1, "--rate", 5)):
            run = commands(*arguments, folder=work)
            assert run.status == 0, run.output


def test_two_exports_at_once_leave_one_of_the_two(commands: Commands, work: Path) -> None:
    for _ in range(3):
        runs = commands.together([EXPORT, EXPORT_ANEW], folder=work)

        assert {run.status for run in runs} in ({0}, {0, 1})
        assert all(run.status == 0 or BUSY in run.output for run in runs)
        assert faults_of(work / "bundle") == []
        assert pairs_of(work / "bundle") in (["b"], ["c"])
        assert litter_in(work) == []


@pytest.mark.parametrize("command", [(*BENCH_SERVER, "--again"), ("cut", "bundle", "--cuts", "c"), PACK])
def test_of_two_commands_at_once_one_is_done_or_both_in_turn(
    commands: Commands, work: Path, command: tuple[str, ...]
) -> None:
    runs = commands.together([command, command], folder=work)

    assert min(run.status for run in runs) == 0
    assert all(run.status == 0 or BUSY in run.output for run in runs)
    assert all(faults_of(path) == [] for path in work.glob("bundle*"))
    assert litter_in(work) == []


def test_readers_never_mix_an_old_bundle_with_a_new_one(commands: Commands, work: Path) -> None:
    whole: list[list[str]] = []
    refused: list[str] = []
    ended = threading.Event()

    def read() -> None:
        while not ended.is_set():
            try:
                bundle = Bundle.open(work / "bundle")
                for path in bundle.manifest.files:
                    bundle.read(path)
                whole.append([split.name for split in bundle.splits])
            except BundleError as e:
                refused.append(str(e))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for arguments in (EXPORT_ANEW, EXPORT) * 3:
            assert commands(*arguments, folder=work).status == 0
    finally:
        ended.set()
        reader.join()

    assert {tuple(pairs) for pairs in whole} == {("b",), ("c",)}
    assert len(refused) < len(whole) / 10, refused[:3]
