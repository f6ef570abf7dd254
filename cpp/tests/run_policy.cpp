// SPDX-License-Identifier: Apache-2.0
// Plays the events of tests/support/policy_events.py that come on standard input, and prints an answer for each.
#include <cstdint>
#include <cstdlib>
#include <iostream>
#include <memory>
#include <new>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "answer.hpp"
#include "dsc_split/policy.hpp"

namespace {

long allocations = 0;

template <class Parameters, class Each>
void each_of_estimator(Parameters& own, Each each) {
  each(own.half_life_s);
  each(own.min_bytes);
  each(own.min_transfer_ms);
  each(own.idle_restart_s);
  each(own.initial_window_bytes);
  each(own.surprise_sigmas);
  each(own.surprise_change);
  each(own.stale_after_s);
}

template <class Parameters, class Each>
void each_of_policy(Parameters& own, Each each) {
  each(own.hysteresis);
  each(own.switch_cost_ms);
  each(own.dwell_requests);
  each(own.probe_bytes);
  each(own.max_probe_bytes);
  each(own.probe_interval_s);
  each(own.max_probe_interval_s);
  each(own.probe_timeout_s);
  each(own.deadline_factor);
  each(own.deadline_ms);
  each(own.retry_s);
  each(own.max_retry_s);
  each(own.server_weight);
  each(own.server_half_life_s);
  each(own.percentile);
}

std::string written(double value) { return answer::digits(value); }
std::string written(std::int64_t value) { return std::to_string(value); }
std::string written(const std::optional<double>& value) { return value ? answer::digits(*value) : "-"; }
std::string written(dsc_split::Percentile value) {
  return value == dsc_split::Percentile::median ? "-" : std::to_string(static_cast<int>(value));
}

/// Words of one line, by the type that is wanted.
class Words {
 public:
  explicit Words(const std::string& line) : in_(line) {}

  std::string text() {
    std::string word;
    in_ >> word;
    return word;
  }
  double number() { return answer::number(text()); }
  std::optional<double> maybe() { return answer::maybe(text()); }
  std::int64_t whole() { return std::strtoll(text().c_str(), nullptr, 10); }
  bool flag() { return text() == "1"; }

  void operator()(double& value) { value = number(); }
  void operator()(std::int64_t& value) { value = whole(); }
  void operator()(std::optional<double>& value) { value = maybe(); }
  void operator()(dsc_split::Percentile& value) {
    const std::string word = text();
    value = word == "-" ? dsc_split::Percentile::median : static_cast<dsc_split::Percentile>(std::atoi(word.c_str()));
  }

 private:
  std::istringstream in_;
};

/// A table that owns what its view shows.
struct Table {
  dsc_split::TableView view;
  std::vector<dsc_split::Choice> choices;
  std::vector<std::vector<dsc_split::Row>> rows;
  std::vector<dsc_split::Batch> batches;

  explicit Table(Words& words) {
    dsc_split::Link& link = view.link;
    link.c0_ms = words.number();
    link.c1_ms_per_mb = words.number();
    link.rtt_ms = words.number();
    link.round_trips = words.number();
    link.count_downlink = words.flag();
    link.downlink_rate_mb_s = words.maybe();
    choices.resize(static_cast<std::size_t>(words.whole()));
    for (dsc_split::Choice& choice : choices) {
      choice.id = static_cast<std::int32_t>(words.whole());
      choice.kind = words.flag() ? dsc_split::Kind::split : dsc_split::Kind::no_offload;
    }
    rows.resize(static_cast<std::size_t>(words.whole()));
    for (auto& some : rows) {
      dsc_split::Batch batch;
      batch.batch = words.whole();
      some.resize(static_cast<std::size_t>(words.whole()));
      for (dsc_split::Row& row : some) {
        row.choice = static_cast<std::int32_t>(words.whole());
        row.head_ms = words.number();
        row.tail_ms = words.number();
        row.head_p95_ms = words.maybe().value_or(dsc_split::unknown_ms);
        row.tail_p95_ms = words.maybe().value_or(dsc_split::unknown_ms);
        row.uplink_bytes = words.whole();
        row.downlink_bytes = words.whole();
        row = dsc_split::completed(row, choices[static_cast<std::size_t>(row.choice)], link);
      }
      batch.rows = {some.data(), some.size()};
      batches.push_back(batch);
    }
    for (std::size_t i = 0; i < rows.size(); ++i) {
      for (std::size_t j = i; j-- > 0;) tell_others(i, j);
      for (std::size_t j = i + 1; j < rows.size(); ++j) tell_others(i, j);
    }
    view.choices = {choices.data(), choices.size()};
    view.batches = {batches.data(), batches.size()};
  }

 private:
  /// Tells the rows at one batch size of those at another, where they know no nearer one.
  void tell_others(std::size_t at, std::size_t other_at) {
    for (dsc_split::Row& row : rows[at]) {
      for (const dsc_split::Row& other : rows[other_at]) {
        if (row.choice != other.choice || row.other_batch != 0) continue;
        row.other_batch = batches[other_at].batch;
        row.other_uplink_bytes = other.uplink_bytes;
        row.other_downlink_bytes = other.downlink_bytes;
      }
    }
  }
};

dsc_split::SwitchPolicy new_policy(Words& words, const dsc_split::TableView& table) {
  dsc_split::PolicyParameters policy;
  dsc_split::EstimatorParameters estimator;
  each_of_policy(policy, [&](auto& value) { words(value); });
  each_of_estimator(estimator, [&](auto& value) { words(value); });
  const std::optional<double> rate_mb_s = words.maybe();
  const std::string allowed = words.text();
  dsc_split::Mask mask;
  for (std::size_t i = 0; i < allowed.size(); ++i) mask[i] = allowed[i] == '1';
  return dsc_split::SwitchPolicy(table, policy, dsc_split::RateEstimator(estimator, rate_mb_s),
                                 allowed == "-" ? nullptr : &mask);
}

dsc_split::Observation observation(Words& words, double time_s) {
  dsc_split::Observation seen;
  seen.time_s = time_s;
  seen.position = static_cast<std::int32_t>(words.whole());
  seen.batch = words.whole();
  seen.latency_ms = words.number();
  seen.head_ms = words.number();
  seen.rpc_ms = words.maybe();
  seen.server_ms = words.maybe();
  seen.queue_ms = words.maybe();
  seen.rtt_ms = words.maybe();
  seen.window_limited = words.flag();
  return seen;
}

std::string ok_or_error(dsc_split::Errc code) { return code == dsc_split::Errc::ok ? "ok" : "error"; }
std::string sample_or_error(const dsc_split::Result<dsc_split::Sample>& sample) {
  return sample ? to_string(*sample) : "error";
}

/// Calls the policy, and sees that it took no memory.
template <class Call>
auto called(Call call) {
  const long before = allocations;
  auto result = call();
  if (allocations != before) {
    std::cerr << "the policy allocated memory\n";
    std::exit(1);
  }
  return result;
}

std::string played(dsc_split::SwitchPolicy& policy, const std::string& event, Words& words) {
  const double time_s = words.number();
  std::ostringstream out;
  if (event == "decide") {
    const std::int64_t batch = words.whole();
    const auto decision = called([&] { return policy.decide(time_s, batch); });
    if (decision) {
      out << decision->choice->id << ' ' << to_string(decision->reason) << ' ' << written(decision->predicted_ms) << ' '
          << written(decision->timeout_ms) << ' ' << decision->probe_bytes;
    } else {
      out << "error";
    }
  } else if (event == "observe") {
    const dsc_split::Observation seen = observation(words, time_s);
    out << ok_or_error(called([&] { return policy.observe(seen); }));
  } else if (event == "failed") {
    const auto position = static_cast<std::int32_t>(words.whole());
    const std::optional<double> started_s = words.maybe();
    out << ok_or_error(called([&] { return policy.failed(time_s, position, started_s); }));
  } else if (event == "probed") {
    const std::int64_t size_bytes = words.whole();
    const double transfer_ms = words.number();
    const std::optional<double> rtt_ms = words.maybe();
    const bool window_limited = words.flag();
    out << sample_or_error(
        called([&] { return policy.probed(time_s, size_bytes, transfer_ms, rtt_ms, window_limited); }));
  } else if (event == "restart") {
    policy.restart();
    out << "ok";
  } else {
    out << ok_or_error(called([&] { return policy.probe_failed(time_s); }));
  }
  const double at_s = time_s >= 0.0 && time_s < dsc_split::infinity ? time_s : 0.0;
  const auto estimate = policy.estimator().estimate(at_s);
  if (estimate) {
    out << ' ' << written(estimate->rate_mb_s) << ' ' << written(estimate->deviation_s_per_mb) << ' '
        << written(estimate->age_s) << ' ' << (estimate->stale ? 1 : 0);
  }
  out << ' ' << written(policy.server_load(at_s)) << ' ' << written(policy.queue_ms(at_s));
  return out.str();
}

}  // namespace

[[gnu::noinline]] void* operator new(std::size_t size) {
  ++allocations;
  if (void* memory = std::malloc(size)) return memory;
  std::abort();
}
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

int main() {
  std::unique_ptr<Table> table;
  std::optional<dsc_split::SwitchPolicy> policy;
  for (std::string line; std::getline(std::cin, line);) {
    Words words(line);
    const std::string event = words.text();
    if (event == "defaults") {
      const dsc_split::PolicyParameters of_policy;
      const dsc_split::EstimatorParameters of_estimator;
      each_of_policy(of_policy, [](const auto& value) { std::cout << written(value) << ' '; });
      each_of_estimator(of_estimator, [](const auto& value) { std::cout << written(value) << ' '; });
      std::cout << '\n';
    } else if (event == "table") {
      table = std::make_unique<Table>(words);
    } else if (event == "policy") {
      policy.emplace(new_policy(words, table->view));
    } else if (event == "decay") {
      std::cout << written(dsc_split::detail::decay(words.number())) << '\n';
    } else {
      std::cout << played(*policy, event, words) << '\n';
    }
  }
  return 0;
}
