"""``dsc-split replay``."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsc_split.cli._options import number

if TYPE_CHECKING:
    from collections.abc import Collection

    from dsc_split.benchmarks.replay._device import PolicyUnderTest
    from dsc_split.lookup_table import LookupTable

__all__ = ["replay"]


def replay(
    source: Annotated[Path, typer.Argument(metavar="BUNDLE|table.json", help="A bundle, or a table.")],
    scenario: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help="A CSV with the columns time_s, rate_mb_s and any of downlink_rate_mb_s, batch, server_load, "
            "queue_ms, rtt_ms; or a packet-delivery trace of Mahimahi.",
        ),
    ],
    downlink: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The downlink's packet trace, beside one of the uplink."),
    ] = None,
    bin_s: Annotated[
        float,
        typer.Option("--bin", parser=number(at_least=0.001), metavar="S", help="Count a packet trace in such bins."),
    ] = 1.0,
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Batch size where the scenario has none.")] = 1,
    period: Annotated[
        float | None,
        typer.Option(
            parser=number(above=0),
            metavar="MS",
            help="Start a request every so often. Default: one request per state, as in Eq. 7.",
        ),
    ] = None,
    against: Annotated[
        str | None, typer.Option(metavar="CHOICE", help="Compare with this static choice. Default: with every one.")
    ] = None,
    deadline: Annotated[
        float | None,
        typer.Option(parser=number(above=0), metavar="MS", help="Count the requests that take longer."),
    ] = None,
    no_policy: Annotated[bool, typer.Option("--no-policy", help="Leave the switching policy out.")] = False,
    policy: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help='Parameters of the policy: a JSON object {"policy": {...}, "estimator": {...}} with names of '
            "PolicyParameters and EstimatorParameters.",
        ),
    ] = None,
    noise: Annotated[
        float,
        typer.Option(
            parser=number(at_least=0, at_most=3),
            metavar="X",
            help="What the policy measures is off by lognormal factors of mean 1; X: deviation of their logarithm.",
        ),
    ] = 0.0,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Seed of the noise.")] = 0,
    percentile: Annotated[
        int | None,
        typer.Option(
            metavar="50|95",
            help="Go by the medians of head and tail (50, the default) or by the sum of their 95th percentiles.",
        ),
    ] = None,
    no_full_offload: Annotated[
        bool, typer.Option("--no-full-offload", help="Leave out every choice that sends the inputs as they are.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    csv: Annotated[bool, typer.Option("--csv", help="Print every request as CSV.")] = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the picture, .png or .svg.")] = None,
) -> None:
    """Replay a varying link through a lookup table.

    Prints the latencies of the ideal choice, of every static one and of the switching policy. The ideal knows the state
    of every request. The policy only sees what a device would see: the times of its own finished requests and probes.
    """
    from dsc_split._support.progress import silent
    from dsc_split.benchmarks.replay._replay import replay as run
    from dsc_split.benchmarks.replay._scenario import read_scenario
    from dsc_split.benchmarks.report._replay_picture import check_picture, draw_replay
    from dsc_split.benchmarks.report._replay_text import render_replay, replay_csv, replay_json
    from dsc_split.bundles._tables import load_table
    from dsc_split.cli._console import err, out, print_json, progress
    from dsc_split.errors import UsageError

    if json and csv:
        raise UsageError("--json and --csv exclude each other: stdout takes one document.")
    if no_policy and policy is not None:
        raise UsageError("--policy and --no-policy exclude each other.")
    if plot is not None:
        check_picture(plot)
    table = load_table(source)
    allow = table.without_inputs_sent() if no_full_offload else None
    name = None if against is None else _static_name(table, against, allow)
    states = read_scenario(scenario, batch=batch, bin_s=bin_s, downlink=downlink)
    if not table.link.count_downlink and any(timed.state.downlink_rate_mb_s is not None for timed in states.states):
        err.print(
            "warning: the table's link does not count the way back; the downlink's rate changes nothing. To count it, "
            'put "count_downlink": true into a JSON file: dsc-split table BUNDLE --link FILE'
        )
    under_test = None if no_policy else _policy_under_test(table, policy, allow, percentile)
    with progress() if err.is_interactive else contextlib.nullcontext(silent) as listener:
        result = run(
            table,
            states,
            period_ms=period,
            allow=allow,
            percentile=percentile,
            policy=under_test,
            noise=noise,
            seed=seed,
            progress=listener,
        )
    if plot is not None:
        err.print(f"picture: {draw_replay(result, plot)}")
    if json:
        print_json(replay_json(result, deadline_ms=deadline, against=name))
    elif csv:
        out.file.write(replay_csv(result))
    else:
        out.print(render_replay(result, deadline_ms=deadline, against=name))


def _static_name(table: LookupTable, against: str, allow: Collection[int] | None) -> str:
    """Return the name of the static choice to compare with."""
    from dsc_split.errors import UsageError

    choice = table.choice(against)
    if allow is not None and choice.id not in allow:
        raise UsageError(f"--against {choice.name!r} sends the inputs, which --no-full-offload leaves out.")
    return choice.name


def _policy_under_test(
    table: LookupTable, path: Path | None, allow: Collection[int] | None, percentile: int | None
) -> PolicyUnderTest:
    """Make the policy from a file of parameters, for the allowed choices and the percentile of the replay."""
    from dsc_split.benchmarks.replay._device import PolicyUnderTest
    from dsc_split.errors import UsageError
    from dsc_split.serving import EstimatorParameters, Observation, PolicyParameters, RateEstimator, SwitchPolicy

    given = (
        {} if path is None else _read_parameters(path, {"policy": PolicyParameters, "estimator": EstimatorParameters})
    )
    if "percentile" in given.get("policy", {}):
        raise UsageError(f"policy {str(path)!r} gives 'percentile', which holds for every method; use --percentile.")
    of_policy = {**({} if percentile is None else {"percentile": percentile}), **given.get("policy", {})}
    estimator = RateEstimator(EstimatorParameters(**given.get("estimator", {})))
    switching = SwitchPolicy(table, parameters=PolicyParameters(**of_policy), estimator=estimator, allow=allow)
    return PolicyUnderTest(policy=switching, observation=Observation)


def _read_parameters(path: Path, records: dict[str, type[Any]]) -> dict[str, dict[str, Any]]:
    """Read the parameters of a policy.

    Raises:
        UsageError: There is no such file, it has another form, or it names unknown parameters.
    """
    import dataclasses

    from dsc_split._support.strict_json import read_json
    from dsc_split.errors import DamagedError, UsageError

    what = f"policy {str(path)!r}"
    if not path.is_file():
        raise UsageError(f"no {what}: there is no such file.")
    try:
        document = read_json(path, "policy", DamagedError)
    except DamagedError as e:
        raise UsageError(f"{what} cannot be used. {e}") from e
    for part, values in document.items():
        if part not in records or not isinstance(values, dict):
            raise UsageError(
                f"{what}: got {part!r}; objects by the names {', '.join(map(repr, records))} were expected."
            )
        known = [field.name for field in dataclasses.fields(records[part])]
        unknown = [key for key in values if key not in known]
        if unknown:
            raise UsageError(f"{what}: {part} has no parameter {unknown[0]!r}. It has {', '.join(known)}.")
        for key, value in values.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
                raise UsageError(f"{what}: {key} of {part} is {value!r}; a number or null was expected.")
    return document
