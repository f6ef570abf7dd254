"""A disk that fills up under a command: the error says so, and what was there is there, with nothing beside it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.commands import Commands
from tests.support.fault_cases import CASES, Case, faults_of, litter_in, prepare, restore

DISK_BYTES = 16 * 2**20
PAGES = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512)
"""Free pages; a command that succeeds with so many is not tried with more."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, in memory."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root may mount a file system")
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(place)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def leave_free(disk: Path, pages: int) -> None:
    """Fill a disk up to some pages."""
    state = os.statvfs(disk)
    with (disk / "filler").open("wb") as filler:
        filler.write(bytes((state.f_bavail - pages) * state.f_frsize))


def wrong_in(work: Path, before: Path, case: Case) -> list[str]:
    return [*faults_of(work / "bundle"), *case.wrong(work, before), *(f"{left} is left" for left in litter_in(work))]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_full_disk_is_named_and_leaves_the_old_bundle(
    commands: Commands, base: Path, tmp_path: Path, disk: Path, name: str
) -> None:
    case = CASES[name]
    before = prepare(commands, base, tmp_path / "before", case)
    failed_with = []
    for pages in PAGES:
        (disk / "filler").unlink(missing_ok=True)
        work = restore(before, disk / "work")
        leave_free(disk, pages)
        run = commands(*case.command, folder=work)
        assert wrong_in(work, before, case) == [], f"{pages} free pages: {run.output}"
        if run.status == 0:
            break
        assert (run.status, "No space left on device" in run.output) == (1, True), f"{pages} free pages: {run.output}"
        failed_with.append(pages)
    assert run.status == 0, "it failed on a disk with enough space"
    assert len(failed_with) >= 3, f"it failed with {failed_with} free pages alone"


@pytest.mark.parametrize("name", ["export", "pack"])
def test_file_that_must_not_grow_is_named_and_leaves_the_old_bundle(
    commands: Commands, base: Path, tmp_path: Path, name: str
) -> None:
    case = CASES[name]
    before = prepare(commands, base, tmp_path / "before", case)
    work = restore(before, tmp_path / "work")

    run = commands(*case.command, folder=work, largest_file_bytes=4000)

    assert run.status == 1
    assert "File too large" in run.output
    assert wrong_in(work, before, case) == []
