// SPDX-License-Identifier: Apache-2.0
/// When to switch: which choice runs the next request, from what the last ones took.
///
/// Standard library only, C++17. Nothing allocates, throws, or reads a clock; the same calls give the same bits as
/// `dsc_split.serving.SwitchPolicy` in Python. docs/policy.md says how it decides. A policy serves one link and is not
/// safe to share between threads. Time is any clock that does not go back, in seconds; a moment before the last one
/// counts as the last one. A call that gives an error has changed nothing.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <optional>

#include "dsc_split/arithmetic.hpp"
#include "dsc_split/lookup_table.hpp"
#include "dsc_split/rate_estimator.hpp"
#include "dsc_split/result.hpp"

namespace dsc_split {
inline namespace v0 {

/// When to switch, and how to stay informed.
struct PolicyParameters {
  /// Part of the present choice's T that the best one must gain: less is noise, and would switch at every request.
  double hysteresis = 0.05;
  /// Milliseconds that the best choice must gain beyond that: what a switch costs where engines have to be loaded.
  double switch_cost_ms = 0.0;
  /// Requests that a choice is kept at least while the batch size stays: no switch there and back at once.
  std::int64_t dwell_requests = 2;
  /// Size of a probe: as much as makes a sample at any rate. 0: no probes; then the policy never learns that the link
  /// came back.
  std::int64_t probe_bytes = 131072;
  /// A probe that could not tell the rate is doubled up to this: on long links TCP opens its window slowly.
  std::int64_t max_probe_bytes = 1048576;
  /// Seconds without a sample after which a probe is due: longer on the wrong choice costs more than a few probes.
  double probe_interval_s = 2.0;
  /// The interval doubles with every probe that brings nothing new, up to these seconds.
  double max_probe_interval_s = 10.0;
  /// Seconds after which a probe that was not reported has failed; until then no other one is due.
  double probe_timeout_s = 5.0;
  /// A request that takes so many times what was predicted, and longer than the device alone, has missed its deadline.
  /// By then another run on the device costs no more than waiting already has.
  double deadline_factor = 3.0;
  /// The deadline in milliseconds instead, above 0; none: the factor, which holds too where the prediction is later
  /// than the deadline.
  std::optional<double> deadline_ms = {};
  /// Seconds after a failure until the server is probed again.
  double retry_s = 1.0;
  /// These seconds double with every further failure, up to this, until a request is answered in time.
  double max_retry_s = 30.0;
  /// Weight of the newest report in load and queue, the first one too: three requests make two thirds.
  double server_weight = 0.3;
  /// Seconds after which half of the load and queue is forgotten while the server is not used: to try it again.
  double server_half_life_s = 30.0;
  /// Which times are compared.
  Percentile percentile = Percentile::median;
};

/// Says whether every parameter is in range. A policy with others answers everything with the error.
[[nodiscard]] constexpr Errc check(const PolicyParameters& own) noexcept {
  constexpr std::int64_t most_requests = std::int64_t{1} << 30;
  const bool good =
      detail::is_within(own.hysteresis, 0.0, 1.0) && detail::is_duration(own.switch_cost_ms) &&
      detail::is_within(own.dwell_requests, 0, most_requests) && detail::is_within(own.probe_bytes, 0, max_bytes) &&
      detail::is_within(own.max_probe_bytes, 0, max_bytes) &&
      own.probe_interval_s >= 0.0 && own.max_probe_interval_s >= 0.0 &&
      detail::is_within(own.probe_timeout_s, 1e-3, 1e9) && detail::is_within(own.deadline_factor, 1.0, 1e6) &&
      detail::is_duration(own.deadline_ms) && own.deadline_ms != 0.0 && detail::is_within(own.retry_s, 0.0, 1e9) &&
      detail::is_within(own.max_retry_s, 0.0, 1e9) && detail::is_within(own.server_weight, 0.0, 1.0) &&
      detail::is_within(own.server_half_life_s, 1e-3, 1e9);
  if (!good) return Errc::bad_number;
  const bool known = own.percentile == Percentile::median || own.percentile == Percentile::p95;
  return known ? Errc::ok : Errc::unknown_percentile;
}

/// Why a choice was taken.
enum class Reason : std::uint8_t {
  best,          ///< The fastest that is allowed.
  hysteresis,    ///< Another one is faster, but by too little.
  dwell,         ///< Another one is faster, but the last switch was just now.
  unknown_rate,  ///< Nothing was measured yet.
  server_down,   ///< The device alone, until a probe of the server succeeds.
};

/// Gives the word for a reason.
[[nodiscard]] constexpr const char* to_string(Reason reason) noexcept {
  switch (reason) {
    case Reason::best: return "best";
    case Reason::hysteresis: return "hysteresis";
    case Reason::dwell: return "dwell";
    case Reason::unknown_rate: return "unknown-rate";
    case Reason::server_down: return "server-down";
  }
  return "unknown";
}

/// What to do with one request.
struct Decision {
  const Choice* choice = nullptr;  ///< The choice that runs it.
  std::int32_t position = -1;      ///< Its position in `TableView::choices`.
  Reason reason = Reason::best;    ///< Why it was taken.
  double predicted_ms = 0.0;       ///< T; infinite where something is sent at a rate that is not known.
  /// Milliseconds from the start of the request after which to stop waiting, call `failed` and run the batch on the
  /// device; infinite where there is nothing to fall back on.
  double timeout_ms = infinity;
  /// Where not 0: send so many bytes to the server beside the request, and report what came of it.
  std::int64_t probe_bytes = 0;
};

/// What one request took.
struct Observation {
  double time_s = 0.0;         ///< When the answer was there, by the clock that decisions are asked with.
  std::int32_t position = -1;  ///< The choice that ran it, by position in `TableView::choices`.
  std::int64_t batch = 0;      ///< Its batch size.
  double latency_ms = 0.0;     ///< From its start to its answer.
  double head_ms = 0.0;        ///< Of these, on the device.
  /// The call to the server; default: the rest of `latency_ms`. 0 for no offload.
  std::optional<double> rpc_ms = {};
  /// On the server, queue and tail, as it reported; default: as the policy expects.
  std::optional<double> server_ms = {};
  /// Of these, in the queue; default: not known apart.
  std::optional<double> queue_ms = {};
  /// Round-trip time, from `TCP_INFO` for one; default: the last one, or the table's.
  std::optional<double> rtt_ms = {};
  /// Whether TCP was still opening its window, or the application was late with the bytes.
  bool window_limited = false;
};

/// Decides which choice runs each request over one link.
class SwitchPolicy {
 public:
  /// Starts knowing nothing but the table, which must outlive the policy. The estimator is fed by this policy alone;
  /// `allow` is copied: the choices that may be taken, default all.
  explicit SwitchPolicy(const TableView& table, const PolicyParameters& parameters = {},
                        const RateEstimator& estimator = RateEstimator{}, const Mask* allow = nullptr) noexcept
      : table_(table),
        parameters_(parameters),
        estimator_(estimator),
        error_(check(parameters)),
        probe_bytes_(parameters.probe_bytes),
        retry_s_(parameters.retry_s) {
    if (error_ == Errc::ok) error_ = estimator.error();
    if (allow != nullptr) allow_ = *allow;
  }

  [[nodiscard]] const TableView& table() const noexcept { return table_; }
  [[nodiscard]] const PolicyParameters& parameters() const noexcept { return parameters_; }
  [[nodiscard]] const RateEstimator& estimator() const noexcept { return estimator_; }

  /// Whether the parameters of policy and estimator are in range.
  [[nodiscard]] Errc error() const noexcept { return error_; }

  /// Gives what the tails are thought to take, as a ratio to when they were measured.
  [[nodiscard]] double server_load(double time_s) const noexcept { return server(std::max(now_s_, time_s)).load; }

  /// Gives how long a request is thought to wait on the server.
  [[nodiscard]] double queue_ms(double time_s) const noexcept { return server(std::max(now_s_, time_s)).queue_ms; }

  /// Decides what to do with a request that is there now.
  ///
  /// Errors: bad_number, bad_batch, batch_too_large, nothing_allowed, nothing_can_answer.
  [[nodiscard]] Result<Decision> decide(double time_s, std::int64_t batch) noexcept {
    if (error_ != Errc::ok) return Error{error_};
    if (!detail::is_finite(time_s)) return Error{Errc::bad_number};
    const double now_s = std::max(now_s_, time_s);
    const std::optional<RateEstimate> estimate = estimator_.estimate(now_s);
    const State state = state_at(now_s, batch, estimate ? estimate->rate_mb_s : unknown_rate_mb_s_);
    const auto pick = table_.pick(state);
    if (!pick) return pick.error();
    const Candidate best{pick->position, pick->latency_ms};
    const Around around = look_around(state);

    now_s_ = now_s;
    if (probe_sent_s_ && now_s - *probe_sent_s_ >= parameters_.probe_timeout_s) {
      fail_probe(*probe_sent_s_ + parameters_.probe_timeout_s, *probe_sent_s_);
    }
    if (down_ && parameters_.probe_bytes == 0 && now_s >= retry_at_s_) come_back();
    const Chosen chosen = choose(best, around.local, state, estimate.has_value());
    const bool keep = chosen.reason == Reason::best || chosen.reason == Reason::hysteresis ||
                      chosen.reason == Reason::dwell;
    held_requests_ = keep && chosen.candidate.position == present_ ? held_requests_ + 1 : 1;
    present_ = keep ? chosen.candidate.position : -1;
    batch_ = batch;

    Decision decision;
    decision.position = chosen.candidate.position;
    decision.choice = &table_.choices[static_cast<std::size_t>(decision.position)];
    decision.reason = chosen.reason;
    const bool sends = decision.choice->uses_server();
    decision.predicted_ms = chosen.candidate.latency_ms;
    if (sends && !estimate) decision.predicted_ms = infinity;
    if (sends && around.local) decision.timeout_ms = timeout_ms(decision.predicted_ms, around.local->latency_ms);
    if (parameters_.probe_bytes > 0 && around.reachable) {
      const auto terms = table_.terms(decision.position, state);
      decision.probe_bytes = probe(terms ? terms->uplink_bytes : 0);
    }
    return decision;
  }

  /// Learns from a request that was answered, in time or late.
  ///
  /// Errors: bad_number, unknown_choice, bad_batch, batch_too_large; nothing_allowed where the choice has no row.
  [[nodiscard]] Errc observe(const Observation& seen) noexcept {
    if (error_ != Errc::ok) return error_;
    if (!detail::is_finite(seen.time_s) || !detail::is_duration(seen.latency_ms) ||
        !detail::is_duration(seen.head_ms) || !detail::is_duration(seen.rpc_ms) ||
        !detail::is_duration(seen.server_ms) || !detail::is_duration(seen.queue_ms) ||
        !detail::is_duration(seen.rtt_ms) ||
        (seen.queue_ms && !(seen.server_ms && *seen.queue_ms <= *seen.server_ms))) {
      return Errc::bad_number;
    }
    const double now_s = std::max(now_s_, seen.time_s);
    const std::optional<double> rtt_ms = seen.rtt_ms ? seen.rtt_ms : rtt_ms_;
    State state;
    state.batch = seen.batch;
    state.rate_mb_s = infinity;
    state.rtt_ms = rtt_ms;
    const auto terms = table_.terms(seen.position, state);
    if (!terms) return terms.error().code;
    if (!table_.choices[static_cast<std::size_t>(seen.position)].uses_server()) {
      now_s_ = now_s;
      return Errc::ok;
    }
    const double call_ms = seen.rpc_ms ? *seen.rpc_ms : seen.latency_ms - seen.head_ms;
    if (!(call_ms > 0.0)) return Errc::bad_number;
    const double patience = patience_ms(now_s, seen);

    now_s_ = now_s;
    rtt_ms_ = rtt_ms;
    const Server expected = server(now_s);
    double server_ms = detail::rounded(terms->tail_ms * expected.load) + expected.queue_ms;
    if (seen.server_ms) {
      server_ms = *seen.server_ms;
      learn(terms->tail_ms, server_ms, seen.queue_ms, patience);
    }
    if (seen.latency_ms > patience) {
      fail(now_s, seen.time_s - seen.latency_ms / 1000.0);
      return Errc::ok;
    }
    if (down_) come_back();
    retry_s_ = parameters_.retry_s;
    return take(*terms, call_ms, server_ms, seen.window_limited);
  }

  /// Learns that a request was given up: a missed deadline, a refused connection, `UNAVAILABLE`.
  ///
  /// `started_s`: when it was started; one from before the server came back says nothing. Default: since then. Errors:
  /// bad_number; unknown_choice where the table has none at `position`, or one that does not use the server.
  [[nodiscard]] Errc failed(double time_s, std::int32_t position,
                            std::optional<double> started_s = std::nullopt) noexcept {
    if (error_ != Errc::ok) return error_;
    if (!detail::is_finite(time_s) || (started_s && !detail::is_finite(*started_s))) return Errc::bad_number;
    if (position < 0 || static_cast<std::size_t>(position) >= table_.choices.size ||
        !table_.choices[static_cast<std::size_t>(position)].uses_server()) {
      return Errc::unknown_choice;
    }
    now_s_ = std::max(now_s_, time_s);
    fail(now_s_, started_s.value_or(now_s_));
    return Errc::ok;
  }

  /// Learns from a probe that the server answered; arguments and result as of `RateEstimator::add`. Where no probe is
  /// out, it is a sample of the rate and nothing else. Where the round trip that was taken off leaves nothing, the
  /// transfer is taken to have lasted a nanosecond.
  [[nodiscard]] Result<Sample> probed(double time_s, std::int64_t size_bytes, double transfer_ms,
                                      std::optional<double> rtt_ms = std::nullopt,
                                      bool window_limited = false) noexcept {
    if (error_ != Errc::ok) return Error{error_};
    if (!detail::is_finite(time_s) || !detail::is_duration(rtt_ms) ||
        !detail::is_within(transfer_ms, -max_duration_ms, max_duration_ms)) {
      return Error{Errc::bad_number};
    }
    const double now_s = std::max(now_s_, time_s);
    const std::optional<double> rtt = rtt_ms ? rtt_ms : rtt_ms_;
    const auto sample = estimator_.add(now_s, size_bytes, std::max(transfer_ms, least_transfer_ms_),
                                       std::min(rtt.value_or(table_.link.rtt_ms), max_duration_ms), window_limited);
    if (!sample) return sample;
    now_s_ = now_s;
    if (!probe_sent_s_) return sample;
    probe_sent_s_.reset();
    rtt_ms_ = rtt;
    if (*sample == Sample::too_small || *sample == Sample::window_limited) {
      probe_bytes_ = std::min(2 * probe_bytes_, std::max(parameters_.max_probe_bytes, probe_bytes_));
    }
    if (down_) {
      come_back();
    } else if (*sample == Sample::surprise || *sample == Sample::reset) {
      probe_doublings_ = 0;
    } else if (probe_interval_s() < parameters_.max_probe_interval_s) {
      probe_doublings_ = std::min(probe_doublings_ + 1, most_doublings_);
    }
    return sample;
  }

  /// Forgets what is known about the way to the server: the device has joined another network.
  ///
  /// Until the first sample the old rate goes on deciding; a probe is due with the next decision.
  void restart() noexcept {
    estimator_.restart();
    rtt_ms_.reset();
    news_s_ = -infinity;
    probe_doublings_ = 0;
    probe_sent_s_.reset();
    retry_at_s_ = 0.0;
    retry_s_ = parameters_.retry_s;
  }

  /// Learns that a probe was not answered; where none is out, nothing. Errors: bad_number.
  [[nodiscard]] Errc probe_failed(double time_s) noexcept {
    if (error_ != Errc::ok) return error_;
    if (!detail::is_finite(time_s)) return Errc::bad_number;
    now_s_ = std::max(now_s_, time_s);
    if (probe_sent_s_) fail_probe(now_s_, *probe_sent_s_);
    return Errc::ok;
  }

 private:
  /// A choice that may be taken, and its T.
  struct Candidate {
    std::int32_t position;
    double latency_ms;
  };

  struct Chosen {
    Candidate candidate;
    Reason reason;
  };

  /// What else is allowed at a batch size: the device alone, and whether anything uses the server.
  struct Around {
    std::optional<Candidate> local = {};
    bool reachable = false;
  };

  struct Server {
    double load;
    double queue_ms;
  };

  // Stands for a rate that is not known, where something has to be sent all the same: the fewest bytes win.
  static constexpr double unknown_rate_mb_s_ = 1e-6;
  // Part of a call that is taken for the transfer at least, where server and fixed costs seem to have filled it.
  static constexpr double least_transfer_ = 0.01;
  static constexpr double least_transfer_ms_ = 1e-6;
  static constexpr double most_load_ = 1e6;
  static constexpr int most_doublings_ = 30;

  // ---- deciding ----

  State state_at(double now_s, std::int64_t batch, double rate_mb_s) const noexcept {
    const Server now = server(now_s);
    State state;
    state.batch = batch;
    state.rate_mb_s = rate_mb_s;
    state.rtt_ms = rtt_ms_;
    state.server_load = now.load;
    state.queue_ms = now.queue_ms;
    state.allow = allow_ ? &*allow_ : nullptr;
    state.percentile = parameters_.percentile;
    return state;
  }

  bool is_allowed(std::int32_t position) const noexcept {
    return !allow_ || (*allow_)[static_cast<std::size_t>(position)];
  }

  Around look_around(const State& state) const noexcept {
    Around around;
    for (std::size_t i = 0; i < table_.choices.size; ++i) {
      const auto position = static_cast<std::int32_t>(i);
      const bool sends = table_.choices[i].uses_server();
      if (!is_allowed(position) || (sends && around.reachable)) continue;
      const auto time = table_.latency_ms(position, state);
      if (!time) continue;
      if (sends) {
        around.reachable = true;
      } else if (!around.local || *time < around.local->latency_ms) {
        around.local = Candidate{position, *time};
      }
    }
    return around;
  }

  Chosen choose(const Candidate& best, const std::optional<Candidate>& local, const State& state,
                bool known) const noexcept {
    if (down_ && local) return {*local, Reason::server_down};
    if (!known) return {local ? *local : best, Reason::unknown_rate};
    if (present_ < 0 || present_ == best.position || !is_allowed(present_)) return {best, Reason::best};
    const auto time = table_.latency_ms(present_, state);
    if (!time) return {best, Reason::best};
    const Candidate present{present_, *time};
    const double gain_below_ms =
        detail::rounded(present.latency_ms * (1.0 - parameters_.hysteresis)) - parameters_.switch_cost_ms;
    if (!(best.latency_ms < gain_below_ms)) return {present, Reason::hysteresis};
    if (state.batch == batch_ && held_requests_ < parameters_.dwell_requests && present.latency_ms < infinity) {
      return {present, Reason::dwell};
    }
    return {best, Reason::best};
  }

  double timeout_ms(double predicted_ms, double local_ms) const noexcept {
    if (parameters_.deadline_ms && predicted_ms <= *parameters_.deadline_ms) return *parameters_.deadline_ms;
    return std::max(parameters_.deadline_factor * predicted_ms, local_ms);
  }

  // ---- probing ----

  /// Gives the size of the probe that is due now; 0 where none is.
  std::int64_t probe(std::int64_t uplink_bytes) noexcept {
    bool due = false;
    if (down_) {
      due = now_s_ >= retry_at_s_;
    } else if (uplink_bytes >= estimator_.parameters().min_bytes) {
      probe_doublings_ = 0;
    } else {
      due = now_s_ - news_s_ >= probe_interval_s();
    }
    if (!due || probe_sent_s_) return 0;
    news_s_ = now_s_;
    probe_sent_s_ = now_s_;
    return probe_bytes_;
  }

  double probe_interval_s() const noexcept {
    return std::min(std::ldexp(parameters_.probe_interval_s, probe_doublings_),
                    std::max(parameters_.probe_interval_s, parameters_.max_probe_interval_s));
  }

  // ---- learning ----

  /// Gives load and queue; what is not seen again is forgotten.
  Server server(double now_s) const noexcept {
    const double left = detail::decay((now_s - reported_s_) / parameters_.server_half_life_s);
    return {1.0 + detail::rounded((load_ - 1.0) * left), detail::rounded(queue_ms_ * left)};
  }

  /// Takes in what the server reported, of tail and queue `most_ms` each. Time in the queue adds to any tail; the rest
  /// is in proportion to it.
  void learn(double tail_ms, double server_ms, std::optional<double> queue_ms, double most_ms) noexcept {
    const Server expected = server(now_s_);
    load_ = expected.load;
    queue_ms_ = expected.queue_ms;
    reported_s_ = now_s_;
    if (!queue_ms) {
      queue_ms = std::max(0.0, server_ms - detail::rounded(tail_ms * load_));
    } else if (tail_ms > 0.0) {
      const double seen = std::min(std::min(server_ms - *queue_ms, most_ms) / tail_ms, most_load_);
      load_ += detail::rounded(parameters_.server_weight * (seen - load_));
    }
    queue_ms_ += detail::rounded(parameters_.server_weight * (std::min(*queue_ms, most_ms) - queue_ms_));
  }

  /// Gives the estimator what of a call was the transfer.
  Errc take(const Terms& terms, double call_ms, double server_ms, bool window_limited) noexcept {
    std::int64_t size_bytes = std::min(terms.uplink_bytes, max_bytes);
    if (table_.link.count_downlink && !table_.link.downlink_rate_mb_s) {
      size_bytes = std::min(size_bytes + std::min(terms.downlink_bytes, max_bytes), max_bytes);
    }
    double transfer_ms = call_ms - server_ms - terms.network_ms - detail::rounded(terms.downlink_ms);
    transfer_ms = std::max({transfer_ms, least_transfer_ * call_ms, least_transfer_ms_});
    const double rtt_ms = std::min(rtt_ms_.value_or(table_.link.rtt_ms), max_duration_ms);
    const auto sample = estimator_.add(now_s_, size_bytes, transfer_ms, rtt_ms, window_limited);
    if (!sample) return sample.error().code;
    if (*sample == Sample::taken || *sample == Sample::surprise || *sample == Sample::reset) news_s_ = now_s_;
    return Errc::ok;
  }

  /// Gives how long a request would be waited for now; infinite where there is nothing to fall back on.
  double patience_ms(double now_s, const Observation& seen) const noexcept {
    const std::optional<RateEstimate> estimate = estimator_.estimate(now_s);
    if (!estimate || !is_allowed(seen.position)) return infinity;
    const State state = state_at(now_s, seen.batch, estimate->rate_mb_s);
    const std::optional<Candidate> local = look_around(state).local;
    const auto time = table_.latency_ms(seen.position, state);
    return local && time ? timeout_ms(*time, local->latency_ms) : infinity;
  }

  // ---- failing and coming back ----

  /// Leaves the server alone; what was sent before it came back says nothing about it.
  void fail(double time_s, double started_s) noexcept {
    if (down_ || started_s < back_s_) return;
    down_ = true;
    probe_bytes_ = parameters_.probe_bytes;
    estimator_.restart();
    wait(time_s);
  }

  void fail_probe(double time_s, double sent_s) noexcept {
    probe_sent_s_.reset();
    if (down_) {
      wait(time_s);
    } else {
      fail(time_s, sent_s);
    }
  }

  /// Puts off the next try, and the one after it for twice as long.
  void wait(double time_s) noexcept {
    retry_at_s_ = time_s + retry_s_;
    retry_s_ = std::min(2.0 * retry_s_, parameters_.max_retry_s);
  }

  void come_back() noexcept {
    down_ = false;
    back_s_ = now_s_;
    probe_doublings_ = 0;
  }

  TableView table_;
  PolicyParameters parameters_;
  RateEstimator estimator_;
  std::optional<Mask> allow_ = {};
  Errc error_;

  double now_s_ = 0.0;
  std::int32_t present_ = -1;  // position of the choice that is kept; -1 while something else decides
  std::int64_t held_requests_ = 0;
  std::int64_t batch_ = 0;  // of the last decision

  std::optional<double> rtt_ms_ = {};
  double load_ = 1.0;
  double queue_ms_ = 0.0;
  double reported_s_ = -infinity;  // when the server last said what it took

  double news_s_ = -infinity;  // when something was last sent that tells the rate
  int probe_doublings_ = 0;
  std::int64_t probe_bytes_;
  std::optional<double> probe_sent_s_ = {};  // of the probe that is out

  bool down_ = false;
  double retry_s_;  // how long the next failure keeps from the server
  double retry_at_s_ = 0.0;
  double back_s_ = -infinity;  // when the server last came back
};

}  // namespace v0
}  // namespace dsc_split
