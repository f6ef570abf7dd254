// SPDX-License-Identifier: Apache-2.0
// Fuzz target: whatever the bytes, `parse` refuses them or gives a table whose answers are right.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <vector>

#include "dsc_split/load.hpp"

namespace {

void expect(bool holds) {
  if (!holds) std::abort();
}

/// A pick is the least T of all rows that are allowed, and ties go to fewer bytes, then to the lower id.
void check_pick(const dsc_split::TableView& table, const dsc_split::State& state) {
  const auto pick = table.pick(state);
  if (!pick) {
    expect(pick.error().code == dsc_split::Errc::nothing_allowed ||
           pick.error().code == dsc_split::Errc::nothing_can_answer);
  } else {
    expect(std::isfinite(pick->latency_ms) && pick->latency_ms >= 0.0);
    const auto margin = table.margin(state);
    expect(margin && margin->margin_ms >= 0.0 && margin->uncertainty_ms >= 0.0);
  }
  for (std::size_t i = 0; i < table.choices.size; ++i) {
    const auto position = static_cast<std::int32_t>(i);
    const auto terms = table.terms(position, state);
    if (!terms || (state.allow != nullptr && !(*state.allow)[i])) continue;
    expect(terms->latency_ms >= 0.0 && terms->uplink_bytes >= 0 && terms->downlink_bytes >= 0);
    if (!pick) {
      expect(terms->latency_ms == dsc_split::infinity);
      continue;
    }
    expect(terms->latency_ms >= pick->latency_ms);
    if (terms->latency_ms > pick->latency_ms || position == pick->position) continue;
    const auto picked = table.terms(pick->position, state);
    expect(static_cast<bool>(picked));
    expect(terms->uplink_bytes > picked->uplink_bytes ||
           (terms->uplink_bytes == picked->uplink_bytes && position > pick->position));
  }
}

/// Switch rates ascend, and end without an end.
void check_switch_rates(const dsc_split::TableView& table, const dsc_split::State& state) {
  std::vector<dsc_split::Segment> segments(table.choices.size);
  const auto count = table.switch_rates(state, segments.data(), segments.size());
  if (!count) {
    expect(count.error().code == dsc_split::Errc::nothing_allowed ||
           count.error().code == dsc_split::Errc::nothing_can_answer);
    return;
  }
  expect(*count >= 1 && *count <= segments.size());
  double previous_mb_s = 0.0;
  for (std::size_t i = 0; i < *count; ++i) {
    expect(segments[i].below_rate_mb_s > previous_mb_s);
    previous_mb_s = segments[i].below_rate_mb_s;
  }
  expect(previous_mb_s == dsc_split::infinity);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const auto loaded = dsc_split::parse(reinterpret_cast<const char*>(data), size);
  if (!loaded) {
    expect(loaded.error().code != dsc_split::Errc::ok && !loaded.error().message.empty());
    return 0;
  }
  const dsc_split::TableView& table = loaded->view();
  const dsc_split::Mask private_inputs = table.without_inputs_sent();
  const std::int64_t largest = table.batches[table.batches.size - 1].batch;
  for (const std::int64_t batch : {std::int64_t{1}, largest / 2 + 1, largest}) {
    for (const double rate_mb_s : {0.0, 5e-324, 1e-3, 7.5, 1e300, dsc_split::infinity}) {
      dsc_split::State state;
      state.batch = batch;
      state.rate_mb_s = rate_mb_s;
      check_pick(table, state);
      state.allow = &private_inputs;
      state.percentile = dsc_split::Percentile::p95;
      check_pick(table, state);
      state.downlink_rate_mb_s = rate_mb_s / 4.0;
      state.rtt_ms = 20.0;
      state.server_load = 1.5;
      state.queue_ms = 3.0;
      check_pick(table, state);
    }
    dsc_split::State state;
    state.batch = batch;
    check_switch_rates(table, state);
    state.allow = &private_inputs;
    state.server_load = 2.0;
    check_switch_rates(table, state);
  }
  expect(table.pick(largest + 1, 1.0).error().code == dsc_split::Errc::batch_too_large);
  return 0;
}
