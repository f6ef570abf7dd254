"""The batch sizes that engines are built and timed for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dsc_split.errors import UsageError

if TYPE_CHECKING:
    from dsc_split.bundle import Bundle

__all__ = ["DEFAULT_BATCHES", "choose_batches"]

DEFAULT_BATCHES = (1, 2, 4, 8, 16, 32, 64)


def choose_batches(bundle: Bundle, batches: Sequence[int] | None) -> tuple[int, ...]:
    """Return the batch sizes to build for and to measure: ``batches``, or else the default ones that the model takes.

    Raises:
        UsageError: One is not a whole number from 1, or the model does not take it.
    """
    fixed = bundle.fixed_batch
    if batches is None:
        return (fixed,) if fixed else tuple(batch for batch in DEFAULT_BATCHES if batch <= bundle.max_batch)
    for batch in batches:
        if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
            raise UsageError(f"batch {batch!r} is no batch size; a whole number from 1 was expected.")
        if fixed is not None and batch != fixed:
            raise UsageError(f"batch {batch} cannot be had: the model takes batch {fixed} only.")
        if batch > bundle.max_batch:
            raise UsageError(
                f"batch {batch} is larger than {bundle.max_batch}, the largest proven for this bundle. "
                f"Export it again with --max-batch {batch}, or leave the batch out."
            )
    if not batches:
        raise UsageError("no batch size is given; at least one was expected.")
    return tuple(sorted(set(batches)))
