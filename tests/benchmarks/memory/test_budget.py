import itertools
import math
import random
from collections.abc import Mapping

import numpy as np
import pytest
from tests.support.memory_reports import FULL, NONE, choices_of, engine, held, make_table, report, with_segments

from dsc_split.benchmarks.memory import _budget as _residency_budget
from dsc_split.benchmarks.memory._budget import keep_within
from dsc_split.benchmarks.memory._reports import MemoryReport
from dsc_split.errors import UsageError
from dsc_split.lookup_table import LookupTable, State


def random_case(seed: int, splits: int) -> tuple[LookupTable, dict[str, MemoryReport], dict[str, int]]:
    """Make a table, some rows of which are missing, memory of both sides, and a budget for one or both."""
    values = random.Random(seed)
    choices = choices_of(splits)
    times: dict[int, dict[str, tuple[float, float, int]]] = {}
    for batch in (1, 8)[: values.randint(1, 2)]:
        every = {FULL: (0.0, values.uniform(10, 20), values.randint(10**6, 10**7))}
        every |= {
            choice.name: (values.uniform(1, 60), values.uniform(1, 20), values.randint(10**3, 10**6))
            for choice in choices[1:-1]
        }
        every[NONE] = (values.uniform(60, 200), 0.0, 0)
        rows = {name: times_ms for name, times_ms in every.items() if values.random() < 0.8} or every
        times[batch] = rows
    memory = {}
    for side, absent in (("device", FULL), ("server", NONE)):
        sizes = {choice.name: values.randint(10, 1000) for choice in choices if choice.name != absent}
        together = held(max(max(sizes.values()), int(sum(sizes.values()) * values.uniform(0.6, 1.0))), *sizes)
        memory[side] = report(side, sizes, together)
    sides = values.choice([["device"], ["server"], ["device", "server"]])
    budget = {side: int(total(memory[side]) * values.uniform(0.1, 0.7)) for side in sides}
    return make_table(choices, times), memory, budget


def total(memory: MemoryReport) -> int:
    return sum(item.resident_bytes or 0 for item in memory.engines)


def brute_force(
    table: LookupTable, memory: Mapping[str, MemoryReport], budget: Mapping[str, int]
) -> tuple[int, float, int]:
    """Return states without an answer, mean loss in the others, and minus the choices of the best set, the slow way."""
    rated = {row.choice for item in table.batches for row in item.rows}
    names = [choice.name for choice in table.choices if choice.id in rated]
    losses: dict[str, list[float]] = {name: [] for name in names}
    for item in table.batches:
        there = {table.choices[row.choice].name for row in item.rows}
        for rate in np.geomspace(0.05, 1000.0, 200):
            times = {name: table.latency_ms(name, State(batch=item.batch, rate_mb_s=float(rate))) for name in there}
            for name in names:
                losses[name].append(times[name] / min(times.values()) - 1 if name in there else math.inf)

    def fits(kept: tuple[str, ...]) -> bool:
        for side, size_bytes in budget.items():
            absent = FULL if side == "device" else NONE
            alone = {item.choice: item.resident_bytes or 0 for item in memory[side].engines}
            together = memory[side].sets[0].resident_bytes or 0
            shared = min((sum(alone.values()) - together) // (len(alone) - 1), *alone.values())
            on_side = [name for name in kept if name != absent]
            taken = sum(alone[name] for name in on_side) - max(0, len(on_side) - 1) * shared
            if on_side and (together if len(on_side) == len(alone) else min(taken, together)) > size_bytes:
                return False
        return True

    sets = [kept for size in range(1, len(names) + 1) for kept in itertools.combinations(names, size) if fits(kept)]
    if NONE in names and fits((NONE,)):
        sets = [kept for kept in sets if NONE in kept]
    keys = []
    for kept in sets:
        best = [min(state) for state in zip(*(losses[name] for name in kept), strict=True)]
        answered = [loss for loss in best if loss < math.inf]
        keys.append((len(best) - len(answered), sum(answered) / len(answered), -len(kept)))
    return min(keys)


# ---- what to keep ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(60))
def test_what_is_kept_loses_as_little_as_the_best_of_all_sets(seed: int) -> None:
    table, memory, budget = random_case(seed, splits=4)
    unanswered, mean, choices = brute_force(table, memory, budget)

    kept, loss = keep_within(table, memory, budget)

    assert loss.exact
    assert -len(loss.kept) == choices
    assert bool(unanswered) == bool(loss.unanswered_batches) == (loss.mean_share == math.inf)
    if not unanswered:
        assert loss.mean_share == pytest.approx(mean, abs=1e-12)
    assert all((loss.memory[side].memory_bytes or 0) <= budget[side] for side in loss.memory)
    assert kept == LookupTable.from_json(kept.to_json())


def test_sets_that_are_found_step_by_step_fit_and_lose_hardly_more(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [random_case(seed, splits=6) for seed in range(40)]
    exact = [keep_within(*case)[1] for case in cases]
    monkeypatch.setattr(_residency_budget, "MAX_EXACT_CHOICES", 0)
    found = [keep_within(*case)[1] for case in cases]

    assert not any(loss.exact for loss in found if loss.left_out)
    assert all((NONE in one.kept) == (NONE in other.kept) for one, other in zip(found, exact, strict=True))
    for loss in found:
        assert all((loss.memory[side].memory_bytes or 0) <= loss.budget_bytes[side] for side in loss.memory)
    pairs = list(zip(found, exact, strict=True))
    finite = [(one.mean_share, other.mean_share) for one, other in pairs if other.mean_share < math.inf]
    assert all(one >= other - 1e-12 for one, other in finite)
    assert sum(one <= other + 1e-12 for one, other in finite) >= 0.9 * len(finite)


def test_many_choices_are_tried_step_by_step() -> None:
    table, memory, budget = random_case(1, splits=30)

    _, loss = keep_within(table, memory, budget)

    assert not loss.exact
    assert loss.left_out
    assert 0 <= loss.mean_share <= loss.worst_share < math.inf


SIMPLE = make_table(
    choices_of(2),
    {1: {FULL: (0.0, 5.0, 10**6), "s1": (5.0, 4.0, 10**5), "s2": (9.0, 3.0, 10**4), NONE: (40.0, 0.0, 0)}},
)
DEVICE = report("device", {"s1": 100, "s2": 150, NONE: 200})


@pytest.mark.parametrize(
    ("budget", "left_out"),
    [
        (450, ()),
        (449, ("s1",)),
        (350, ("s1",)),
        (349, ("s2",)),
        (300, ("s2",)),
        (299, ("s1", "s2")),
        (200, ("s1", "s2")),
    ],
)
def test_a_budget_counts_to_the_byte(budget: int, left_out: tuple[str, ...]) -> None:
    kept, loss = keep_within(SIMPLE, {"device": DEVICE}, {"device": budget})

    assert loss.left_out == left_out
    assert [choice.name for choice in kept.choices] == list(loss.kept)


def test_a_budget_for_everything_leaves_the_table_as_it_is() -> None:
    kept, loss = keep_within(SIMPLE, {"device": DEVICE}, {"device": 10**9})

    assert kept == SIMPLE
    assert (loss.left_out, loss.mean_share, loss.worst_share, loss.exact) == ((), 0.0, 0.0, True)


def test_no_offload_is_kept_wherever_it_fits_though_others_lose_less() -> None:
    _, loss = keep_within(SIMPLE, {"device": DEVICE}, {"device": 249})  # s1 or s2 would lose less than no offload

    assert loss.kept == (FULL, NONE)


def test_no_offload_is_left_out_where_it_does_not_fit() -> None:
    _, loss = keep_within(SIMPLE, {"device": DEVICE}, {"device": 199})

    assert loss.kept == (FULL, "s2")


def test_the_worst_state_is_the_one_that_loses_most() -> None:
    kept, loss = keep_within(SIMPLE, {"device": DEVICE}, {"device": 200})
    rates = [float(rate) for rate in np.geomspace(0.05, 1000.0, 200)]
    shares = [kept.pick(1, rate).latency_ms / SIMPLE.pick(1, rate).latency_ms - 1 for rate in rates]

    assert loss.worst_share == pytest.approx(max(shares))
    assert loss.worst_rate_mb_s == pytest.approx(rates[shares.index(max(shares))])
    assert loss.mean_share == pytest.approx(sum(shares) / 200)


def test_ids_and_names_stay_and_segments_are_made_anew() -> None:
    kept, _ = keep_within(SIMPLE, {"device": DEVICE}, {"device": 350})

    assert [(choice.id, choice.name) for choice in kept.choices] == [(0, FULL), (2, "s2"), (3, NONE)]
    assert kept == with_segments(kept)
    assert kept.batches[0].segments != SIMPLE.batches[0].segments


def test_both_sides_have_their_budget() -> None:
    server = report("server", {FULL: 300, "s1": 100, "s2": 50})

    _, loss = keep_within(SIMPLE, {"device": DEVICE, "server": server}, {"device": 400, "server": 150})

    assert set(loss.left_out) == {FULL, "s1"}
    assert {side: item.memory_bytes for side, item in loss.memory.items()} == {"device": 350, "server": 50}


def test_nothing_fits_is_an_error_that_says_how_much_would() -> None:
    server = report("server", {FULL: 300, "s1": 100, "s2": 50})

    with pytest.raises(UsageError, match=r"not even one choice fits.*'s1' takes 0.0 MB"):
        keep_within(SIMPLE, {"device": DEVICE, "server": server}, {"device": 99, "server": 49})


def test_missing_numbers_are_an_error_with_the_command() -> None:
    partial = report("device", {"s1": 100, NONE: 200})

    with pytest.raises(UsageError, match=r"'s2' on the device.*dsc-split memory BUNDLE --side device .* --batch 1$"):
        keep_within(SIMPLE, {"device": partial}, {"device": 1000})
    with pytest.raises(UsageError, match="'no-offload', 's1', 's2' on the device"):
        keep_within(SIMPLE, {"device": None}, {"device": 1000})


def test_numbers_of_a_smaller_batch_than_the_tables_are_refused() -> None:
    times = {batch: {FULL: (0.0, 5.0, 10**6), NONE: (40.0, 0.0, 0)} for batch in (1, 8)}
    table = make_table(choices_of(0), times)
    small = report("device", {}, engines=(engine(NONE, 100, batch=4),))

    with pytest.raises(UsageError, match=r"'no-offload' on the device is not known .* at batch 8"):
        keep_within(table, {"device": small}, {"device": 1000})


def test_a_batch_size_that_nothing_kept_can_run_is_no_longer_in_the_table() -> None:
    rows = {FULL: (0.0, 5.0, 10**6), NONE: (40.0, 0.0, 0)}
    table = make_table(choices_of(0), {1: rows, 8: {FULL: (0.0, 5.0, 10**6)}})
    memory = {"device": report("device", {NONE: 100}), "server": report("server", {FULL: 300})}

    kept, loss = keep_within(table, memory, {"device": 100, "server": 299})

    assert [item.batch for item in kept.batches] == [1]
    assert loss.unanswered_batches == (8,)
    assert loss.to_json()["loss"]["mean_share"] is None
