// SPDX-License-Identifier: Apache-2.0
/// Answers requests over a link whose data rate changes, and switches with the lookup table.
///
/// The table, its reloading and the policy are as a server has them. Device, network and server are pretended: a
/// request takes what the table says of the link's rate at that moment, give or take a tenth.

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <iostream>
#include <map>
#include <optional>
#include <random>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>

#include "dsc_split/policy.hpp"
#include "link.hpp"
#include "table_file.hpp"

namespace {

struct Options {
  std::string table = {};
  std::string rates = {};  // empty: a walk that is made up
  std::int64_t batch = 1;
  double period_ms = 100.0;  // between requests
  bool real_time = false;
};

/// A probe that is under way.
struct Probe {
  double end_s;
  std::int64_t size_bytes;
  double transfer_ms;
  bool answered;
};

/// What became of the requests.
struct Tally {
  struct OfChoice {
    std::int64_t requests = 0;  // that the policy gave to it
    double total_ms = 0.0;      // if it had got all of them
  };

  std::map<std::string, OfChoice> choices = {};
  std::int64_t requests = 0;
  std::int64_t switches = 0;
  std::int64_t missed = 0;   // deadlines
  std::int64_t refused = 0;  // nothing could answer
  double total_ms = 0.0;
  double ideal_ms = 0.0;
};

class Loop {
 public:
  Loop(const Options& options, const TableFile& file)
      : options_(options),
        file_(file),
        link_(options.rates.empty() ? Link::walk() : Link::read(options.rates)),
        table_(file.current()),
        policy_(table_->view()) {}

  Tally run() {
    const auto start = std::chrono::steady_clock::now();
    double time_s = 0.0;
    while (time_s < link_.duration_s()) {
      if (options_.real_time) std::this_thread::sleep_until(start + std::chrono::duration<double>(time_s));
      take_newest_table(time_s);
      const double latency_ms = answer(time_s);
      time_s += std::max(options_.period_ms, latency_ms) / 1000.0;
    }
    return tally_;
  }

 private:
  void take_newest_table(double time_s) {
    const TableFile::Table newest = file_.current();
    if (newest == table_) return;
    // The rate is the link's, so what is known about it outlives the table.
    policy_ = dsc_split::SwitchPolicy(newest->view(), policy_.parameters(), policy_.estimator());
    table_ = newest;
    std::printf("%7.1f s  table read again\n", time_s);
  }

  /// Answers one request; gives how long it took in milliseconds.
  double answer(double time_s) {
    report_probe(time_s);
    const auto decided = policy_.decide(time_s, options_.batch);
    if (!decided) {
      if (tally_.refused++ == 0) std::cerr << "request refused: " << to_string(decided.error()) << std::endl;
      return 0.0;
    }
    const double rate_mb_s = link_.rate_mb_s(time_s) * noise_(random_);
    print_switch(time_s, *decided);
    const double latency_ms = run_choice(time_s, rate_mb_s, *decided);
    if (decided->probe_bytes > 0 && !probe_) send_probe(time_s, rate_mb_s, decided->probe_bytes);
    count(latency_ms, rate_mb_s, *decided);
    return latency_ms < dsc_split::infinity ? latency_ms : 0.0;
  }

  /// Here the head would run, what crosses the cut be sent, and the answer of the tail come back.
  double run_choice(double time_s, double rate_mb_s, const dsc_split::Decision& decided) {
    const dsc_split::Terms terms = terms_of(decided.position, rate_mb_s);
    if (terms.latency_ms > decided.timeout_ms) {
      ++tally_.missed;
      check(policy_.failed(time_s + decided.timeout_ms / 1000.0, decided.position));
      return decided.timeout_ms + alone_ms();
    }
    if (terms.latency_ms == dsc_split::infinity) return terms.latency_ms;  // nothing to fall back on
    dsc_split::Observation seen;
    seen.time_s = time_s + terms.latency_ms / 1000.0;
    seen.position = decided.position;
    seen.batch = options_.batch;
    seen.latency_ms = terms.latency_ms;
    seen.head_ms = terms.head_ms;
    if (decided.choice->uses_server()) seen.server_ms = terms.queue_ms + terms.tail_ms;
    check(policy_.observe(seen));
    return terms.latency_ms;
  }

  void send_probe(double time_s, double rate_mb_s, std::int64_t size_bytes) {
    constexpr double limit_ms = 1000.0;
    const double transfer_ms = rate_mb_s > 0.0 ? static_cast<double>(size_bytes) / 1000.0 / rate_mb_s : limit_ms;
    const bool answered = transfer_ms < limit_ms;
    probe_ = Probe{time_s + (answered ? transfer_ms : limit_ms) / 1000.0, size_bytes, transfer_ms, answered};
  }

  void report_probe(double time_s) {
    if (!probe_ || probe_->end_s > time_s) return;
    if (probe_->answered) {
      const auto sample = policy_.probed(probe_->end_s, probe_->size_bytes, probe_->transfer_ms);
      check(sample ? dsc_split::Errc::ok : sample.error().code);
    } else {
      check(policy_.probe_failed(probe_->end_s));
    }
    probe_.reset();
  }

  void print_switch(double time_s, const dsc_split::Decision& decided) {
    const std::string name(decided.choice->name);
    if (name == present_) return;
    if (!present_.empty()) ++tally_.switches;
    present_ = name;
    const auto estimate = policy_.estimator().estimate(time_s);
    std::printf("%7.1f s  link %6.2f MB/s, estimate %6.2f: %s, %.1f ms (%s)\n", time_s, link_.rate_mb_s(time_s),
                estimate ? estimate->rate_mb_s : 0.0, name.c_str(), decided.predicted_ms, to_string(decided.reason));
  }

  void count(double latency_ms, double rate_mb_s, const dsc_split::Decision& decided) {
    ++tally_.requests;
    tally_.total_ms += latency_ms;
    const auto ideal = table_->pick(options_.batch, rate_mb_s);
    tally_.ideal_ms += ideal ? ideal->latency_ms : dsc_split::infinity;
    ++tally_.choices[std::string(decided.choice->name)].requests;
    for (std::size_t i = 0; i < table_->view().choices.size; ++i) {
      const double always_ms = terms_of(static_cast<std::int32_t>(i), rate_mb_s).latency_ms;
      tally_.choices[std::string(table_->view().choices[i].name)].total_ms += always_ms;
    }
  }

  /// Gives the terms of a choice at a data rate; an infinite time where it has none.
  [[nodiscard]] dsc_split::Terms terms_of(std::int32_t position, double rate_mb_s) const {
    dsc_split::State state;
    state.batch = options_.batch;
    state.rate_mb_s = rate_mb_s;
    const auto found = table_->terms(position, state);
    if (found) return *found;
    dsc_split::Terms none;
    none.latency_ms = dsc_split::infinity;
    return none;
  }

  /// Gives the time of the device alone.
  [[nodiscard]] double alone_ms() const {
    const std::int32_t position = table_->find("no-offload");
    return position < 0 ? dsc_split::infinity : terms_of(position, 0.0).latency_ms;
  }

  static void check(dsc_split::Errc code) {
    if (code != dsc_split::Errc::ok) throw std::runtime_error(to_string(code));
  }

  Options options_;
  const TableFile& file_;
  Link link_;
  TableFile::Table table_;  // the one that the policy looks into
  dsc_split::SwitchPolicy policy_;
  std::optional<Probe> probe_ = {};
  std::string present_ = {};
  Tally tally_ = {};
  std::mt19937 random_ = {};
  std::uniform_real_distribution<double> noise_{0.9, 1.1};
};

void print(const Tally& tally) {
  const auto requests = static_cast<double>(tally.requests);
  std::printf("\nrequests %lld, switches %lld, missed deadlines %lld, refused %lld\n",
              static_cast<long long>(tally.requests), static_cast<long long>(tally.switches),
              static_cast<long long>(tally.missed), static_cast<long long>(tally.refused));
  if (tally.requests == 0) return;
  std::printf("%7.1f ms on average with the policy\n", tally.total_ms / requests);
  std::printf("%7.1f ms with the best choice at every request, the rate known\n", tally.ideal_ms / requests);
  for (const auto& [name, choice] : tally.choices) {
    std::printf("%7.1f ms with %s alone; the policy gave it %.0f %% of the requests\n", choice.total_ms / requests, name.c_str(),
                100.0 * static_cast<double>(choice.requests) / requests);
  }
}

std::optional<Options> read_options(int count, char** arguments) {
  Options options;
  for (int i = 1; i < count; ++i) {
    const std::string_view name = arguments[i];
    if (name == "--real-time") {
      options.real_time = true;
      continue;
    }
    if (name.substr(0, 2) != "--") {
      if (!options.table.empty()) return std::nullopt;
      options.table = name;
      continue;
    }
    if (++i == count) return std::nullopt;
    char* end = arguments[i];
    if (name == "--batch") {
      options.batch = std::strtoll(arguments[i], &end, 10);
    } else if (name == "--period") {
      options.period_ms = std::strtod(arguments[i], &end);
    } else if (name == "--rates") {
      options.rates = arguments[i];
      continue;
    }
    if (end == arguments[i] || *end != '\0') return std::nullopt;
  }
  const bool good = !options.table.empty() && options.period_ms > 0.0;
  return good ? std::optional(options) : std::nullopt;
}

}  // namespace

int main(int count, char** arguments) {
  std::setvbuf(stdout, nullptr, _IOLBF, BUFSIZ);  // a switch is seen when it happens
  auto options = read_options(count, arguments);
  if (!options) {
    std::cerr << "usage: server_loop TABLE|BUNDLE [--rates FILE.csv] [--batch N] [--period MS] [--real-time]\n";
    return 2;
  }
  if (std::filesystem::is_directory(options->table)) options->table += "/table.json";
  try {
    const TableFile file(options->table);
    print(Loop(*options, file).run());
    return EXIT_SUCCESS;
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << '\n';
    return EXIT_FAILURE;
  }
}
