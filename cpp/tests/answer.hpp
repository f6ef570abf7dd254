// SPDX-License-Identifier: Apache-2.0
/// Answers the questions of tests/support/vectors.py that come on standard input.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

#include "dsc_split/lookup_table.hpp"

namespace answer {

inline double number(const std::string& digits) {
  return dsc_split::detail::from_bits(std::strtoull(digits.c_str(), nullptr, 16));
}

inline std::optional<double> maybe(const std::string& digits) {
  if (digits == "-") return std::nullopt;
  return number(digits);
}

inline std::string digits(double value) {
  char text[17];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(dsc_split::detail::to_bits(value)));
  return text;
}

inline std::string answer(const dsc_split::TableView* tables, const std::string& line) {
  std::istringstream words(line);
  std::size_t table_number = 0;
  std::int64_t batch = 0;
  std::int32_t position = 0;
  std::string rate, downlink, rtt, load, queue, percentile, allowed;
  words >> table_number >> batch >> rate >> downlink >> rtt >> load >> queue >> percentile >> allowed >> position;
  const dsc_split::TableView& table = tables[table_number];
  dsc_split::Mask mask;
  dsc_split::State state;
  state.batch = batch;
  state.rate_mb_s = number(rate);
  state.downlink_rate_mb_s = maybe(downlink);
  state.rtt_ms = maybe(rtt);
  state.server_load = maybe(load).value_or(1.0);
  state.queue_ms = maybe(queue).value_or(0.0);
  if (percentile != "-") state.percentile = static_cast<dsc_split::Percentile>(std::atoi(percentile.c_str()));
  if (allowed != "-") {
    for (std::size_t i = 0; i < allowed.size(); ++i) mask[i] = allowed[i] == '1';
    state.allow = &mask;
  }

  std::ostringstream out;
  const auto plain = [&] {
    return downlink == "-" && rtt == "-" && load == "-" && queue == "-" && percentile == "-" && allowed == "-";
  };
  const auto pick = plain() ? table.pick(batch, state.rate_mb_s) : table.pick(state);
  const auto margin = table.margin(state);
  if (pick && margin) {
    out << pick->choice->id << ' ';
    if (margin->runner_up != nullptr) {
      out << margin->runner_up->id;
    } else {
      out << "None";
    }
    out << ' ' << digits(pick->latency_ms) << ' ' << digits(margin->runner_up_ms) << ' '
        << digits(margin->uncertainty_ms) << ' ' << pick->measured_batch << ' ' << (pick->timing_valid ? 1 : 0);
  } else {
    out << "error";
  }
  const auto latency = table.latency_ms(position, state);
  out << ' ' << (latency ? digits(*latency) : "error");
  std::vector<dsc_split::Segment> segments(table.choices.size);
  const auto count = table.switch_rates(state, segments.data(), segments.size());
  if (!count) out << " error";
  for (std::size_t i = 0; count && i < *count; ++i) {
    const dsc_split::Choice& choice = table.choices[static_cast<std::size_t>(segments[i].position)];
    out << ' ' << choice.id << ' ' << digits(segments[i].below_rate_mb_s);
  }
  return out.str();
}

/// Answers line by line until the input ends.
inline void answer_all(const dsc_split::TableView* tables) {
  for (std::string line; std::getline(std::cin, line);) std::cout << answer(tables, line) << '\n';
}

}  // namespace answer
