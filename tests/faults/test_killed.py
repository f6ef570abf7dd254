"""``kill -9`` at random moments: the bundle is the old or the new one, and the next run of the command finishes it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tests.support.commands import Commands
from tests.support.fault_cases import CASES, Case, faults_of, litter_in, prepare, restore

MOMENTS = 50
FINISHED_EVERY = 10
"""After so many moments the command is run again, to its end."""


def kill_at_random_moments(commands: Commands, base: Path, tmp_path: Path, case: Case, moments: int) -> None:
    """Kill a command before a random step of what it does to the file system, or at a random time, in turns."""
    before = prepare(commands, base, tmp_path / "before", case)
    for _ in range(2):  # the first one fills the cache of engines
        whole = commands(*case.command, folder=restore(before, tmp_path / "work"))
        assert whole.status == 0, whole.output
    chance, killed = random.Random(0), 0
    wrong: list[str] = []
    for moment in range(moments):
        work = restore(before, tmp_path / "work")
        fate: dict[str, float] = {"kill_at_step": chance.randint(1, whole.steps)}
        if moment % 2:
            fate = {"kill_after_s": chance.uniform(0, whole.duration_s)}
        killed += commands(*case.command, folder=work, **fate).status == -9
        wrong += [f"{fate}: {fault}" for fault in (*faults_of(work / "bundle"), *case.wrong(work, before))]
        if moment % FINISHED_EVERY == 0:
            finished = commands(*case.command, folder=work)
            assert finished.status == 0, finished.output
            wrong += [f"{fate}, then to its end: {left} is left" for left in litter_in(work)]
    assert wrong == []
    assert killed >= moments * 0.7, f"{killed} of {moments} were killed before their end"


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_killed_at_fifty_moments_the_bundle_is_the_old_or_the_new_one(
    commands: Commands, base: Path, tmp_path: Path, name: str
) -> None:
    kill_at_random_moments(commands, base, tmp_path, CASES[name], MOMENTS)


def test_killed_export_leaves_the_old_or_the_new_bundle(commands: Commands, base: Path, tmp_path: Path) -> None:
    kill_at_random_moments(commands, base, tmp_path, CASES["export"], 4)
