"""One record asks every question to a table, and an answer tells which one it was."""

import dataclasses
import pickle
from functools import partial
from typing import Any

import pytest
from tests.support.paths import GOLDEN

from dsc_split.errors import UsageError
from dsc_split.lookup_table import LookupTable, State

EVERYTHING: dict[str, Any] = {
    "downlink_rate_mb_s": 40.0,
    "rtt_ms": 20.0,
    "server_load": 1.5,
    "queue_ms": 3.0,
    "allow": ["features.4.0", "no-offload"],
    "percentile": 95,
}


@pytest.mark.parametrize("given", [{}, EVERYTHING, *({key: value} for key, value in EVERYTHING.items())], ids=str)
def test_a_state_is_answered_as_its_fields_are(given: dict[str, Any]) -> None:
    table = LookupTable.load(GOLDEN)
    state = State(batch=1, rate_mb_s=8.0, **given)

    for pick in (table.pick(state), table.pick(1, 8.0, **given)):
        assert (pick.state, pick.batch, pick.rate_mb_s) == (state, 1, 8.0)
        assert pick.ranking == table.ranking(state)
        assert pick.segments == table.switch_rates(state)
        assert pick.latency_ms == table.latency_ms(pick.choice.id, state)
        assert pick.to_json() == table.pick(state).to_json()


def test_a_field_changes_the_answer() -> None:
    table = LookupTable.load(GOLDEN)
    plain = State(batch=1, rate_mb_s=8.0)

    for name in ("rtt_ms", "server_load", "queue_ms", "allow", "percentile"):
        changed = dataclasses.replace(plain, **{name: EVERYTHING[name]})
        assert table.ranking(changed) != table.ranking(plain), name


def test_the_mask_of_a_state_says_nothing_about_one_choice_and_its_rate_nothing_about_the_switch_rates() -> None:
    table = LookupTable.load(GOLDEN)
    masked = State(batch=1, rate_mb_s=8.0, allow=["no-offload"])

    assert table.latency_ms("full-offload", masked) == table.latency_ms("full-offload", State(batch=1, rate_mb_s=8.0))
    assert table.switch_rates(State(batch=1)) == table.switch_rates(State(batch=1, rate_mb_s=8.0))


def test_without_a_rate_nothing_can_be_sent() -> None:
    table = LookupTable.load(GOLDEN)

    assert table.pick(State(batch=1)) == table.pick(1, 0.0)
    assert table.pick(State(batch=1)).choice.name == "no-offload"


def test_a_state_keeps_its_mask_whatever_becomes_of_the_list_and_can_be_collected_and_stored() -> None:
    allowed = ["no-offload"]
    state = State(batch=1, rate_mb_s=8.0, allow=allowed)
    allowed.append("full-offload")

    assert state.allow == ("no-offload",)
    assert len({state, State(batch=1, rate_mb_s=8.0, allow=("no-offload",)), State(batch=1)}) == 2
    assert pickle.loads(pickle.dumps(state)) == state


@pytest.mark.parametrize(("allow", "says"), [("no-offload", r"Write \['no-offload'\]"), (3, "by name or id; got 3")])
def test_a_mask_that_is_no_collection_is_refused(allow: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        State(batch=1, allow=allow)


def test_a_state_beside_other_arguments_is_refused() -> None:
    table, state = LookupTable.load(GOLDEN), State(batch=1, rate_mb_s=8.0)
    ask: Any = table.pick

    for arguments, given in (((state, 8.0), {}), ((state,), {"rtt_ms": 20.0}), ((state,), {"allow": ["no-offload"]})):
        with pytest.raises(UsageError, match="takes a State, or batch size, data rate and more; got both"):
            ask(*arguments, **given)


def test_a_batch_size_without_a_rate_is_refused() -> None:
    table = LookupTable.load(GOLDEN)
    ask: Any = table.pick

    for _ in range(2):  # once the lines of the batch size are known, too
        with pytest.raises(UsageError, match="data rate None is no number; MB/s from 0 were expected"):
            ask(1)
        table.pick(1, 8.0)


@pytest.mark.parametrize("rate", ["8", True], ids=repr)
def test_a_rate_that_only_looks_like_a_number_is_refused(rate: Any) -> None:
    table = LookupTable.load(GOLDEN)
    table.pick(1, 8.0)

    with pytest.raises(UsageError, match="is no number; MB/s from 0 were expected"):
        table.pick(1, rate)
    with pytest.raises(UsageError, match="is no number; MB/s from 0 were expected"):
        table.pick(State(batch=1, rate_mb_s=rate))


@pytest.mark.parametrize("wrong", [8, {"batch": 8}, None])
def test_what_is_no_state_is_refused_with_an_example(wrong: Any) -> None:
    table = LookupTable.load(GOLDEN)

    for ask in (table.ranking, table.switch_rates, partial(table.latency_ms, 0)):
        with pytest.raises(UsageError, match=r"a State was expected: State\(batch=8"):
            ask(wrong)
