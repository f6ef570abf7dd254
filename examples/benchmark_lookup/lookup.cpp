// SPDX-License-Identifier: Apache-2.0
// Times lookups in a table: `lookup TABLE [ROUNDS]` prints a name and the median nanoseconds of one call, line by line.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "dsc_split/load.hpp"

namespace {

constexpr std::size_t state_count = 16384;  // so many that no branch predictor learns them by heart

/// Keeps the optimiser from dropping what nobody reads.
template <class T>
void keep(const T& value) {
  __asm__ volatile("" : : "r"(&value) : "memory");
}

template <class Body>
double median_ns(std::size_t rounds, std::size_t calls, Body body) {
  std::vector<double> times_ns;
  for (std::size_t round = 0; round < rounds; ++round) {
    const auto start = std::chrono::steady_clock::now();
    body();
    const std::chrono::duration<double, std::nano> taken = std::chrono::steady_clock::now() - start;
    times_ns.push_back(taken.count() / static_cast<double>(calls));
  }
  std::nth_element(times_ns.begin(), times_ns.begin() + static_cast<std::ptrdiff_t>(rounds / 2), times_ns.end());
  return times_ns[rounds / 2];
}

/// Makes random states at batch sizes that were measured, or at the ones below them.
std::vector<dsc_split::State> make_states(const dsc_split::TableView& table, bool measured, std::mt19937_64& random) {
  std::lognormal_distribution<double> rate_mb_s(2.0, 1.5);
  std::uniform_real_distribution<double> share(0.0, 1.0);
  std::uniform_int_distribution<std::size_t> any(0, table.batches.size - 1);
  std::vector<dsc_split::State> states(state_count);
  for (dsc_split::State& state : states) {
    do {
      state.batch = table.batches[any(random)].batch - (measured ? 0 : 1);
    } while (!measured && state.batch <= 1);
    state.rate_mb_s = rate_mb_s(random);
    if (!measured) continue;
    state.downlink_rate_mb_s = rate_mb_s(random);
    state.rtt_ms = 50.0 * share(random);
    state.server_load = 1.0 + share(random);
    state.queue_ms = 10.0 * share(random);
  }
  return states;
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 2) {
    std::fprintf(stderr, "usage: lookup TABLE [ROUNDS]\n");
    return 2;
  }
  const std::string path = arguments[1];
  const std::size_t rounds = count > 2 ? std::strtoul(arguments[2], nullptr, 10) : 101;
  const auto loaded = dsc_split::load(path);
  if (!loaded) {
    std::fprintf(stderr, "%s: %s\n", path.c_str(), loaded.error().message.c_str());
    return 1;
  }
  const dsc_split::TableView& table = loaded->view();
  std::mt19937_64 random(1);
  const std::vector<dsc_split::State> measured = make_states(table, true, random);
  const std::vector<dsc_split::State> between = make_states(table, false, random);
  std::vector<dsc_split::Mask> masks(64);
  for (dsc_split::Mask& mask : masks) {
    for (std::size_t i = 0; i < table.choices.size; ++i) mask[i] = i + 1 == table.choices.size || random() % 2 == 0;
  }

  const auto own = [&](const std::vector<dsc_split::State>& states) {
    return median_ns(rounds, state_count, [&] {
      for (const dsc_split::State& state : states) keep(table.pick(state.batch, state.rate_mb_s)->position);
    });
  };
  std::printf("own %.2f\n", own(measured));
  std::printf("between %.2f\n", own(between));
  std::printf("state %.2f\n", median_ns(rounds, state_count, [&] {
                for (const dsc_split::State& state : measured) keep(table.pick(state)->position);
              }));
  std::printf("mask %.2f\n", median_ns(rounds, state_count, [&] {
                std::size_t next = 0;
                for (const dsc_split::State& asked : measured) {
                  dsc_split::State state;
                  state.batch = asked.batch;
                  state.rate_mb_s = asked.rate_mb_s;
                  state.allow = &masks[next++ % masks.size()];
                  keep(table.pick(state)->position);
                }
              }));
  std::vector<dsc_split::Segment> segments(table.choices.size);
  std::printf("switch_rates %.2f\n", median_ns(std::min<std::size_t>(rounds, 11), table.batches.size, [&] {
                for (const dsc_split::Batch& batch : table.batches) {
                  keep(table.switch_rates({batch.batch}, segments.data(), segments.size()));
                }
              }));
  std::printf("load %.2f\n", median_ns(rounds, 1, [&] { keep(dsc_split::load(path)); }));
  return 0;
}
