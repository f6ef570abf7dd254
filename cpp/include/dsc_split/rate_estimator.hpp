// SPDX-License-Identifier: Apache-2.0
/// How fast the uplink is, from what requests and probes took.
///
/// Standard library only, C++17. Nothing allocates, throws, or reads a clock; the same calls give the same bits as
/// `dsc_split.serving.RateEstimator` in Python. An estimator serves one link and is not safe to share between threads.
/// Time is any clock that does not go back, in seconds; a moment before the last one counts as the last one. A call
/// that gives an error has changed nothing.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <optional>

#include "dsc_split/arithmetic.hpp"
#include "dsc_split/lookup_table.hpp"
#include "dsc_split/result.hpp"

namespace dsc_split {
inline namespace v0 {

/// The longest duration in milliseconds that is believed: eleven days.
inline constexpr double max_duration_ms = 1e9;

/// How the rate is estimated.
struct EstimatorParameters {
  /// Seconds after which a sample counts half: long enough to smooth noise, short enough to follow a cell.
  double half_life_s = 1.0;
  /// Samples with fewer bytes count only if they took `min_transfer_ms`: below, latency looks like rate.
  std::int64_t min_bytes = 131072;
  /// Milliseconds that a small sample must have taken; shorter differences are the timer's and the scheduler's.
  double min_transfer_ms = 5.0;
  /// Seconds without a transfer after which TCP opens its window anew (Linux: one retransmission timeout, 0.2 s at
  /// least). Infinite where `net.ipv4.tcp_slow_start_after_idle` is 0 and the connection is kept.
  double idle_restart_s = 0.2;
  /// What TCP sends in the first round trip: 10 segments of 1448 bytes (RFC 6928).
  std::int64_t initial_window_bytes = 14480;
  /// Standard deviations beyond which a sample is a surprise: one in 370 of normal noise, two in a row hardly.
  double surprise_sigmas = 3.0;
  /// Least relative change of 1/rate that is a surprise: smaller ones the mean follows soon enough.
  double surprise_change = 0.3;
  /// Seconds without a sample after which the next one starts afresh: by then a mobile link is another one.
  double stale_after_s = 30.0;
};

namespace detail {

/// Gives 2^-x, the part that is left after so many half-lives, from 0: within 2 units in the last place, exact at whole
/// numbers. Libraries' own functions differ in their last bits, so only operations that IEEE 754 fixes are used.
inline double decay(double half_lives) noexcept {
  constexpr double coefficients[] = {
      1.0, -0.6931471805599453, 0.24022650695910072, -0.05550410866482158,
      0.009618129107628477, -0.0013333558146428443, 0.0001540353039338161, -1.5252733804059841e-05,
      1.321548679014431e-06, -1.01780860092397e-07, 7.054911620801123e-09, -4.4455382718708116e-10,
      2.5678435993488206e-11, -1.3691488853904128e-12,
  };
  constexpr std::size_t last = sizeof coefficients / sizeof coefficients[0] - 1;
  if (half_lives >= 1100.0) return 0.0;
  const double whole = std::floor(half_lives + 0.5);
  const double part = half_lives - whole;
  double value = coefficients[last];
  for (std::size_t i = last; i-- > 0;) value = rounded(value * part) + coefficients[i];
  return std::ldexp(value, -static_cast<int>(whole));
}

constexpr bool is_within(double value, double least, double most) noexcept { return value >= least && value <= most; }
constexpr bool is_within(std::int64_t value, std::int64_t least, std::int64_t most) noexcept {
  return value >= least && value <= most;
}
constexpr bool is_duration(double value_ms) noexcept { return is_within(value_ms, 0.0, max_duration_ms); }
constexpr bool is_duration(const std::optional<double>& value_ms) noexcept {
  return !value_ms || is_duration(*value_ms);
}

}  // namespace detail

/// Says whether every parameter is in range. An estimator with others answers everything with the error.
[[nodiscard]] constexpr Errc check(const EstimatorParameters& own) noexcept {
  const bool good = detail::is_within(own.half_life_s, 1e-3, 1e9) && detail::is_within(own.min_bytes, 0, max_bytes) &&
                    detail::is_duration(own.min_transfer_ms) && own.idle_restart_s >= 0.0 &&
                    detail::is_within(own.initial_window_bytes, 1, max_bytes) && own.surprise_sigmas >= 0.0 &&
                    own.surprise_change >= 0.0 && own.stale_after_s >= 0.0;
  return good ? Errc::ok : Errc::bad_number;
}

/// What became of a sample.
enum class Sample : std::uint8_t {
  taken,           ///< Part of the mean now.
  too_small,       ///< Ignored: too few bytes in too short a time.
  window_limited,  ///< Ignored: TCP was opening its window, and the link may be as fast as the estimate says.
  surprise,        ///< Part of the mean now; if the next one is as far off on the same side, the link has changed.
  reset,           ///< The mean was made anew: from two surprises, or from this one after a long time.
};

/// Gives the word for what became of a sample.
[[nodiscard]] constexpr const char* to_string(Sample sample) noexcept {
  switch (sample) {
    case Sample::taken: return "taken";
    case Sample::too_small: return "too-small";
    case Sample::window_limited: return "window-limited";
    case Sample::surprise: return "surprise";
    case Sample::reset: return "reset";
  }
  return "unknown";
}

/// What is known about the uplink at one moment.
struct RateEstimate {
  double rate_mb_s = 0.0;           ///< Data rate in MB/s (10^6 bytes): the inverse of `seconds_per_mb`.
  double seconds_per_mb = 0.0;      ///< Mean of 1/rate in seconds per MB.
  double deviation_s_per_mb = 0.0;  ///< Standard deviation of the samples about it; 0 after one sample.
  double age_s = infinity;          ///< Seconds since the last sample; infinite for the rate given at the start.
  bool stale = true;                ///< Whether the next sample starts afresh, because of age or of `restart`.
};

/// The mean of 1/rate of one link: exponentially weighted over time, each sample by its bytes.
///
/// T is a straight line in the inverse of the rate, so the mean of T needs the mean of 1/rate and nothing else.
class RateEstimator {
 public:
  /// Starts without samples; `initial_rate_mb_s` (1e-9 to 1e9) is gone by until the first one.
  explicit RateEstimator(const EstimatorParameters& parameters = {},
                         std::optional<double> initial_rate_mb_s = std::nullopt) noexcept
      : parameters_(parameters), error_(check(parameters)) {
    if (!initial_rate_mb_s) return;
    if (detail::is_within(*initial_rate_mb_s, least_, most_)) {
      mean_ = 1.0 / *initial_rate_mb_s;
    } else {
      error_ = Errc::bad_number;
    }
  }

  [[nodiscard]] const EstimatorParameters& parameters() const noexcept { return parameters_; }

  /// Whether parameters and rate are in range.
  [[nodiscard]] Errc error() const noexcept { return error_; }

  /// Takes in what one transfer took.
  ///
  /// `time_s`: when it ended. `transfer_ms`: what the bytes took, without round trip, server and fixed costs.
  /// `rtt_ms`: round-trip time, to tell whether TCP was still opening its window; without one it is not told.
  /// `window_limited`: whether the caller knows that it was, from `TCP_INFO`. Errors: bad_number.
  [[nodiscard]] Result<Sample> add(double time_s, std::int64_t size_bytes, double transfer_ms,
                                   std::optional<double> rtt_ms = std::nullopt, bool window_limited = false) noexcept {
    if (error_ != Errc::ok) return Error{error_};
    if (!detail::is_finite(time_s) || !detail::is_within(size_bytes, 0, max_bytes) ||
        !detail::is_duration(transfer_ms) || transfer_ms == 0.0 || !detail::is_duration(rtt_ms)) {
      return Error{Errc::bad_number};
    }
    now_s_ = std::max(now_s_, time_s);
    const double idle_s = now_s_ - heard_s_ - transfer_ms / 1000.0;
    heard_s_ = now_s_;
    if (size_bytes == 0 || (size_bytes < parameters_.min_bytes && transfer_ms < parameters_.min_transfer_ms)) {
      return Sample::too_small;
    }
    const double size_mb = static_cast<double>(size_bytes) / 1e6;
    double sample = seconds_per_mb(transfer_ms, size_mb);
    if (!mean_ || is_stale(now_s_)) {
      const bool first = taken_s_ == -infinity;
      start(sample, size_mb);
      return first ? Sample::taken : Sample::reset;
    }
    if (sample >= *mean_) {
      if (window_limited) return Sample::window_limited;
      const double rtt = rtt_ms.value_or(0.0);
      if (idle_s > parameters_.idle_restart_s && opening_ms(size_bytes, sample, rtt) >= 0.5 * transfer_ms) {
        sample = seconds_per_mb(transfer_ms - opening_ms(size_bytes, *mean_, rtt), size_mb);
        if (sample <= *mean_) return Sample::window_limited;
      }
    }

    const std::optional<Surprise> before = surprise_;
    surprise_.reset();
    if (before) {
      const int far = distance(sample, size_mb, before->mean_s_per_mb, before->variance);
      if (far != 0 && (far > 0) == (before->seconds_per_mb > before->mean_s_per_mb)) {
        start(before->seconds_per_mb, before->size_mb);
        fold(sample, size_mb);
        return Sample::reset;
      }
    } else if (distance(sample, size_mb, *mean_, variance_) != 0) {
      surprise_ = Surprise{sample, size_mb, *mean_, variance_};
    }
    fold(sample, size_mb);
    return surprise_ ? Sample::surprise : Sample::taken;
  }

  /// Lets the next sample start afresh: the link is another one now, or was gone.
  void restart() noexcept { afresh_ = true; }

  /// Gives what is known at `time_s`; none before the first sample where no rate was given, or where `time_s` is no
  /// moment.
  [[nodiscard]] std::optional<RateEstimate> estimate(double time_s) const noexcept {
    if (error_ != Errc::ok || !mean_ || !detail::is_finite(time_s)) return std::nullopt;
    const double now_s = std::max(now_s_, time_s);
    return RateEstimate{1.0 / *mean_, *mean_, std::sqrt(variance_), now_s - taken_s_, is_stale(now_s)};
  }

 private:
  /// A sample that did not fit, and what it did not fit to.
  struct Surprise {
    double seconds_per_mb;
    double size_mb;
    double mean_s_per_mb;
    double variance;
  };

  // Rates outside 1e-9 to 1e9 MB/s are taken for these.
  static constexpr double least_ = 1e-9;
  static constexpr double most_ = 1e9;

  static double seconds_per_mb(double transfer_ms, double size_mb) noexcept {
    return std::min(std::max(transfer_ms / 1000.0 / size_mb, least_), most_);
  }

  bool is_stale(double now_s) const noexcept { return afresh_ || now_s - taken_s_ > parameters_.stale_after_s; }

  void start(double sample, double size_mb) noexcept {
    mean_ = sample;
    variance_ = 0.0;
    size_mb_ = size_mb;
    taken_s_ = now_s_;
    surprise_.reset();
    afresh_ = false;
  }

  void fold(double sample, double size_mb) noexcept {
    const double left_mb = detail::rounded(size_mb_ * detail::decay((now_s_ - taken_s_) / parameters_.half_life_s));
    size_mb_ = left_mb + size_mb;
    const double share = size_mb / size_mb_;
    const double change = sample - *mean_;
    const double step = detail::rounded(share * change);
    // Where the two are far apart, rounding could leave the range between them, and even reach 0.
    mean_ = std::min(std::max(*mean_ + step, std::min(*mean_, sample)), std::max(*mean_, sample));
    variance_ = detail::rounded((1.0 - share) * (variance_ + detail::rounded(step * change)));
    taken_s_ = now_s_;
  }

  /// Says whether a sample is a surprise: -1 for a faster link, 1 for a slower one, 0 for none.
  int distance(double sample, double size_mb, double mean, double variance) const noexcept {
    const double limit = std::max({parameters_.surprise_sigmas * std::sqrt(variance),
                                   parameters_.surprise_change * mean, parameters_.min_transfer_ms / 1000.0 / size_mb});
    const double change = sample - mean;
    return change > limit ? 1 : change < -limit ? -1 : 0;
  }

  /// Gives how many milliseconds of a transfer go by at a rate while TCP opens its window.
  ///
  /// The window doubles every round trip, and waits for the acknowledgements as long as it is smaller than what the
  /// link carries in a round trip.
  double opening_ms(std::int64_t size_bytes, double seconds_per_mb, double rtt_ms) const noexcept {
    std::int64_t window = parameters_.initial_window_bytes;
    std::int64_t sent = 0;
    int rounds = 0;
    while (sent + window < size_bytes && static_cast<double>(window) * seconds_per_mb < 1000.0 * rtt_ms) {
      sent += window;
      window *= 2;
      ++rounds;
    }
    return detail::rounded(rounds * rtt_ms);
  }

  EstimatorParameters parameters_;
  Errc error_;
  double now_s_ = 0.0;
  double heard_s_ = -infinity;  // end of the last transfer, whatever it was
  double taken_s_ = -infinity;  // when the estimate last changed
  double size_mb_ = 0.0;        // weight of the mean, at taken_s_
  std::optional<double> mean_ = {};
  double variance_ = 0.0;
  std::optional<Surprise> surprise_ = {};
  bool afresh_ = true;
};

}  // namespace v0
}  // namespace dsc_split
