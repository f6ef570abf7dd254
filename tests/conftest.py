"""What tests of several rooms share."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from tests.support.commands import Outcome
from tests.support.paths import ROOT

# How long an example takes is up to the machine and who else uses it.
hypothesis.settings.register_profile("shared-machine", deadline=None)
hypothesis.settings.load_profile("shared-machine")

ROOMS = ("benchmarks", "cli", "engines", "partitioner", "serving")


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def rooms() -> tuple[str, ...]:
    """The rooms that exist: top-level folders that become packages under ``dsc_split``."""
    return tuple(room for room in ROOMS if (ROOT / room).is_dir())


@pytest.fixture
def dsc(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Outcome]]:
    """Run ``dsc-split`` in this process: ``dsc("pick", bundle, "--batch", 8)``."""
    from dsc_split.cli import main as program

    monkeypatch.setattr(program, "_debug", False)
    loggers = (logging.getLogger(), logging.getLogger("dsc_split"))
    before = [(logger.handlers[:], logger.level) for logger in loggers]

    def run(*arguments: Any) -> Outcome:
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            program.main([os.fspath(item) if isinstance(item, Path) else str(item) for item in arguments])
        captured = capfd.readouterr()
        code = exit_info.value.code
        return Outcome(
            exit_code=code if isinstance(code, int) else int(code is not None),
            stdout=captured.out,
            stderr=captured.err,
        )

    yield run
    logging.captureWarnings(False)
    for logger, (handlers, level) in zip(loggers, before, strict=True):
        logger.handlers[:] = handlers
        logger.setLevel(level)
