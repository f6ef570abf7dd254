// SPDX-License-Identifier: Apache-2.0
/// The split lookup table: for a batch size and a data rate, which choice is the fastest.
///
/// Standard library only, C++17. Looking up allocates nothing, throws nothing, and gives the same bits as
/// `dsc_split.LookupTable` in Python; docs/table-format.md says how every number is computed. A table comes from
/// `dsc_split/load.hpp` (a file, at run time) or from `dsc-split table --header` (a constant, at compile time).
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <string_view>

#include "dsc_split/arithmetic.hpp"
#include "dsc_split/result.hpp"
#include "dsc_split/table_types.hpp"

namespace dsc_split {
inline namespace v0 {

namespace detail {

/// A state with every default filled in.
struct Conditions {
  double rate_mb_s;
  double downlink_rate_mb_s;
  double rtt_ms;
  double server_load;
  double queue_ms;
  bool p95;
};

/// The bytes of a row at the batch size asked.
struct Payload {
  std::int64_t uplink_bytes;
  std::int64_t downlink_bytes;
  double uplink_mb;
  double downlink_mb;
};

constexpr bool is_rate(double value) noexcept { return value >= 0.0; }
constexpr bool is_finite(double value) noexcept { return value >= 0.0 && value < infinity; }

constexpr double squared(double value) noexcept { return rounded(value * value); }

constexpr double fixed_ms(const Link& link, double tail_ms, const Conditions& now, double megabytes) noexcept {
  return rounded(tail_ms * now.server_load) + now.queue_ms + rounded(now.rtt_ms * link.round_trips) + link.c0_ms +
         rounded(link.c1_ms_per_mb * megabytes);
}

/// T of a row that uses the server, from its part that no rate changes.
constexpr double sent_ms(double head_ms, double fixed, double up_mb, double down_mb, double rate_mb_s,
                         double back_mb_s) noexcept {
  if (rate_mb_s == 0.0 || (down_mb > 0.0 && back_mb_s == 0.0)) return infinity;
  const double back = down_mb > 0.0 ? down_mb / back_mb_s : 0.0;
  return head_ms + (fixed + rounded(1000.0 * (up_mb / rate_mb_s + back)));
}

/// Bytes are a straight line in the batch size, fixed by two measured ones, or in proportion to one.
constexpr std::int64_t bytes_at(std::int64_t batch, std::int64_t near_batch, std::int64_t near_bytes,
                                std::int64_t other_batch, std::int64_t other_bytes) noexcept {
  std::int64_t dividend = (near_bytes - other_bytes) * (near_batch - batch);
  std::int64_t divisor = near_batch - other_batch;
  std::int64_t step = dividend / divisor;
  if (dividend % divisor != 0 && (dividend < 0) != (divisor < 0)) --step;  // rounded down, not towards 0
  const std::int64_t bytes = near_bytes - step;
  return bytes < 0 ? 0 : bytes;
}

inline std::uint64_t to_bits(double value) noexcept {
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline double from_bits(std::uint64_t bits) noexcept {
  double value = 0.0;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace detail

/// Fills in what follows from a row's own terms, its choice and the table's link.
[[nodiscard]] constexpr Row completed(Row row, const Choice& choice, const Link& link) noexcept {
  row.uses_server = choice.uses_server();
  if (!row.uses_server) return row;
  row.uplink_mb = static_cast<double>(row.uplink_bytes) / 1e6;
  row.downlink_mb = link.count_downlink ? static_cast<double>(row.downlink_bytes) / 1e6 : 0.0;
  const detail::Conditions own{0.0, 0.0, link.rtt_ms, 1.0, 0.0, false};
  row.fixed_ms = detail::fixed_ms(link, row.tail_ms, own, row.uplink_mb + row.downlink_mb);
  return row;
}

/// Finds the data rates at which no rounding can change which row is the best, ascending; gives how many it wrote, at
/// most one per row.
///
/// T of a row is a + b / rate, rounded a few times. One row is the best for certain where its line is below every other
/// one by more than `slack` of both, which is far more than all that rounding does.
constexpr std::size_t find_certain(const Link& link, Array<Row> rows, CertainRange* ranges) noexcept {
  constexpr double slack = 1e-12;
  constexpr double most = 1e100;  // beyond 1 / most and most, numbers may underflow or overflow
  const auto intercept = [&](const Row& row) {
    const double back_mb_s = link.downlink_rate_mb_s ? *link.downlink_rate_mb_s : infinity;
    return row.uses_server ? row.head_ms + row.fixed_ms + 1000.0 * (row.downlink_mb / back_mb_s) : row.head_ms;
  };
  const auto slope = [&](const Row& row) {
    return 1000.0 * (row.uplink_mb + (link.downlink_rate_mb_s ? 0.0 : row.downlink_mb));
  };
  for (const Row& row : rows) {
    if (!(intercept(row) < most)) return 0;
  }
  std::size_t size = 0;
  for (const Row& row : rows) {
    double least = 1.0 / most;  // of 1 / rate
    double greatest = most;
    for (const Row& other : rows) {
      if (other.choice == row.choice) continue;
      const double a = intercept(row) * (1.0 + slack) - intercept(other) * (1.0 - slack);
      const double b = slope(row) * (1.0 + slack) - slope(other) * (1.0 - slack);
      if (b > 0.0) {
        greatest = -a / b < greatest ? -a / b : greatest;
      } else if (b < 0.0) {
        least = -a / b > least ? -a / b : least;
      } else if (a >= 0.0) {
        greatest = 0.0;
      }
    }
    if (!(least * (1.0 + slack) < greatest * (1.0 - slack))) continue;
    const CertainRange found{1.0 / greatest * (1.0 + slack), 1.0 / least * (1.0 - slack), &row};
    std::size_t at = size++;
    for (; at > 0 && ranges[at - 1].from_mb_s > found.from_mb_s; --at) ranges[at] = ranges[at - 1];
    ranges[at] = found;
  }
  // Ranges that never begin, so that most batch sizes have as many: how often a loop runs can be foretold then.
  for (; size % 8 != 0 && size < rows.size; ++size) ranges[size].from_mb_s = std::numeric_limits<double>::quiet_NaN();
  return size;
}

/// The certain ranges of one batch size as a constant.
template <std::size_t most_ranges>
struct CertainRanges {
  CertainRange data[most_ranges] = {};
  std::size_t size = 0;

  constexpr CertainRanges(const Link& link, Array<Row> rows) noexcept : size(find_certain(link, rows, data)) {}
};

/// A lookup table that belongs to somebody else: to a `LookupTable` that was loaded, or to a generated header.
///
/// Batch sizes are for the whole batch, rates in MB/s (1 MB = 10^6 bytes of payload), times in milliseconds. A batch
/// size that was not measured takes the times of the next larger measured one and its own bytes.
struct TableView {
  Array<Choice> choices = {};              ///< By ascending id.
  Array<Batch> batches = {};               ///< By ascending batch size.
  Link link = {};                          ///< Cost of the network.
  std::string_view pair_id = {};           ///< Identity of the pairs that were measured: `sha256:...`.
  std::string_view precision = {};         ///< `fp32` or `fp16`.
  std::string_view count = {};             ///< `bytes`, or `elements` where every element counts as one byte.
  std::string_view device_target = {};     ///< What the heads were measured on.
  std::string_view device_fingerprint = {};
  std::string_view server_target = {};     ///< What the tails were measured on.
  std::string_view server_fingerprint = {};
  bool emulated = false;                   ///< Whether some times were emulated.

  /// Gives the fastest choice on the table's own link, at load 1, with an empty queue.
  ///
  /// Errors: bad_number, bad_batch, batch_too_large, nothing_can_answer.
  [[nodiscard]] constexpr Result<Pick> pick(std::int64_t batch, double rate_mb_s) const noexcept {
    const std::size_t at = position_of(batch);
    if (at == batches.size || batches[at].batch != batch || !detail::is_rate(rate_mb_s)) {
      State state;
      state.batch = batch;
      state.rate_mb_s = rate_mb_s;
      return pick(state);
    }
    const Batch& measured = batches[at];
    std::size_t begun = 0;
    for (const CertainRange& range : measured.certain) begun += range.from_mb_s <= rate_mb_s ? 1 : 0;
    if (begun > 0 && rate_mb_s <= measured.certain[begun - 1].to_mb_s) {
      // What stays on the device adds zeros: no branch asks for it.
      const Row& row = *measured.certain[begun - 1].row;
      const double time_ms = detail::sent_ms(row.head_ms, row.fixed_ms, row.uplink_mb, row.downlink_mb, rate_mb_s,
                                             link.downlink_rate_mb_s ? *link.downlink_rate_mb_s : rate_mb_s);
      return Pick{&choices[index(row.choice)], row.choice, time_ms, batch, row.timing_valid};
    }
    Found found;
    for (const Row& row : measured.rows) found.take(row, own_ms(row, rate_mb_s), row.uplink_bytes);
    return pick_of(found, at);
  }

  /// Gives the fastest choice in one state: the least T, then the fewest bytes up, then the lowest id.
  ///
  /// Errors: bad_number, unknown_percentile, bad_batch, batch_too_large, nothing_allowed, nothing_can_answer.
  [[nodiscard]] constexpr Result<Pick> pick(const State& state) const noexcept {
    const Question question(*this, state);
    if (question.error != Errc::ok) return Error{question.error};
    return pick_of(best(question, question.now), question.at);
  }

  /// Says how much faster than the next choice the answer is, and how well that is known. Errors: as of `pick`.
  [[nodiscard]] Result<Margin> margin(const State& state) const noexcept {
    const Question question(*this, state);
    if (question.error != Errc::ok) return Error{question.error};
    const Found first = best(question, question.now);
    const Result<Pick> pick = pick_of(first, question.at);
    if (!pick) return pick.error();
    const Found second = best(question, question.now, first.row->choice);
    Margin margin;
    if (second.empty || second.latency_ms == infinity) return margin;
    margin.runner_up = &choices[index(second.row->choice)];
    margin.runner_up_ms = second.latency_ms;
    margin.margin_ms = second.latency_ms - first.latency_ms;
    margin.uncertainty_ms =
        std::sqrt(variance_ms2(*first.row, question.now) + variance_ms2(*second.row, question.now));
    return margin;
  }

  /// Gives T of one choice, by position; infinite where it cannot be sent. The state's mask does not count.
  ///
  /// Errors: as of `pick`, and unknown_choice; nothing_allowed where the choice has no row at this batch size.
  [[nodiscard]] constexpr Result<double> latency_ms(std::int32_t position, const State& state) const noexcept {
    const auto found = terms(position, state);
    if (!found) return found.error();
    return found->latency_ms;
  }

  /// Gives the terms of T of one choice, by position. Errors: as of `latency_ms`.
  [[nodiscard]] constexpr Result<Terms> terms(std::int32_t position, const State& state) const noexcept {
    if (position < 0 || index(position) >= choices.size) return Error{Errc::unknown_choice};
    const Question question(*this, state);
    if (question.error != Errc::ok) return Error{question.error};
    const detail::Conditions& now = question.now;
    const std::size_t found = row_of(question.at, position);
    if (found == batches[question.at].rows.size) return Error{Errc::nothing_allowed};
    const Row* row = &batches[question.at].rows[found];
    if (now.p95 && !has_p95(*row)) return Error{Errc::nothing_allowed};
    const detail::Payload sent = payload(question, *row);
    Terms terms;
    terms.head_ms = now.p95 ? row->head_p95_ms : row->head_ms;
    terms.latency_ms = time_ms(*row, sent, now);
    terms.uplink_bytes = sent.uplink_bytes;
    terms.downlink_bytes = sent.downlink_bytes;
    if (!row->uses_server) return terms;
    terms.uplink_ms = now.rate_mb_s > 0.0 ? 1000.0 * (sent.uplink_mb / now.rate_mb_s) : infinity;
    terms.network_ms = detail::rounded(now.rtt_ms * link.round_trips) + link.c0_ms +
                       detail::rounded(link.c1_ms_per_mb * (sent.uplink_mb + sent.downlink_mb));
    terms.queue_ms = now.queue_ms;
    terms.tail_ms = (now.p95 ? row->tail_p95_ms : row->tail_ms) * now.server_load;
    if (sent.downlink_mb > 0.0) {
      terms.downlink_ms =
          now.downlink_rate_mb_s > 0.0 ? 1000.0 * (sent.downlink_mb / now.downlink_rate_mb_s) : infinity;
    }
    return terms;
  }

  /// Writes the best choice over all data rates, ascending, to `segments`; gives how many there are.
  ///
  /// A boundary is the very number at which `pick` gives the next choice while the number just below it still gives
  /// the one before. The state's own rate does not count. As many segments as the table has choices are enough.
  /// Errors: as of `pick`, and no_space.
  [[nodiscard]] Result<std::size_t> switch_rates(State state, Segment* segments,
                                                 std::size_t capacity) const noexcept {
    state.rate_mb_s = infinity;
    const Question question(*this, state);
    if (question.error != Errc::ok) return Error{question.error};
    const Found last = best(question, question.now);
    if (last.empty) return Error{Errc::nothing_allowed};
    if (last.latency_ms == infinity) return Error{Errc::nothing_can_answer};
    Envelope envelope{*this, question, segments, capacity, 0, false};
    envelope.find();
    if (envelope.full) return Error{Errc::no_space};
    return envelope.size;
  }

  /// Finds a choice by name; -1 where there is none.
  [[nodiscard]] constexpr std::int32_t find(std::string_view name) const noexcept {
    for (std::size_t i = 0; i < choices.size; ++i) {
      if (choices[i].name == name) return static_cast<std::int32_t>(i);
    }
    return -1;
  }

  /// Masks out every choice that sends the model's inputs as they are.
  [[nodiscard]] Mask without_inputs_sent() const noexcept {
    Mask mask;
    for (std::size_t i = 0; i < choices.size; ++i) mask[i] = !choices[i].sends_inputs();
    return mask;
  }

 private:
  static constexpr std::size_t index(std::int32_t position) noexcept { return static_cast<std::size_t>(position); }

  static constexpr bool has_p95(const Row& row) noexcept { return row.head_p95_ms >= 0.0 && row.tail_p95_ms >= 0.0; }

  /// A state that was looked through.
  struct Question {
    constexpr Question(const TableView& table, const State& state) noexcept
        : batch(state.batch),
          allow(state.allow),
          now{state.rate_mb_s,
              state.downlink_rate_mb_s ? *state.downlink_rate_mb_s
              : table.link.downlink_rate_mb_s ? *table.link.downlink_rate_mb_s
                                              : state.rate_mb_s,
              state.rtt_ms ? *state.rtt_ms : table.link.rtt_ms,
              state.server_load,
              state.queue_ms,
              state.percentile == Percentile::p95},
          follows(!state.downlink_rate_mb_s && !table.link.downlink_rate_mb_s) {
      if (!detail::is_rate(now.rate_mb_s) || !detail::is_rate(now.downlink_rate_mb_s) ||
          !detail::is_finite(now.rtt_ms) || !detail::is_finite(now.server_load) || !detail::is_finite(now.queue_ms)) {
        error = Errc::bad_number;
      } else if (state.percentile != Percentile::median && state.percentile != Percentile::p95) {
        error = Errc::unknown_percentile;
      } else if (batch < 1) {
        error = Errc::bad_batch;
      } else {
        at = table.position_of(batch);
        if (at == table.batches.size) error = Errc::batch_too_large;
      }
      if (error == Errc::ok) measured = table.batches[at].batch == batch;
    }

    std::int64_t batch;
    const Mask* allow;
    detail::Conditions now;
    bool follows;           // whether the downlink's rate is the uplink's
    std::size_t at = 0;     // position of the measured batch size
    bool measured = false;  // whether it is the one asked
    Errc error = Errc::ok;
  };

  /// The best of the rows so far.
  struct Found {
    const Row* row = nullptr;
    bool empty = true;  // pointers into constants are not compared with null: sanitizers make that no constant
    double latency_ms = infinity;
    std::int64_t uplink_bytes = 0;

    /// Rows come by ascending id, so only fewer bytes win among equals.
    constexpr void take(const Row& other, double other_ms, std::int64_t other_bytes) noexcept {
      if (empty || other_ms < latency_ms || (other_ms == latency_ms && other_bytes < uplink_bytes)) {
        row = &other;
        empty = false;
        latency_ms = other_ms;
        uplink_bytes = other_bytes;
      }
    }
  };

  constexpr Result<Pick> pick_of(const Found& found, std::size_t at) const noexcept {
    if (found.empty) return Error{Errc::nothing_allowed};
    if (found.latency_ms == infinity) return Error{Errc::nothing_can_answer};
    const std::int32_t position = found.row->choice;
    return Pick{&choices[index(position)], position, found.latency_ms, batches[at].batch, found.row->timing_valid};
  }

  /// Gives the position of the first measured batch size that is not smaller; how many there are where none is.
  constexpr std::size_t position_of(std::int64_t batch) const noexcept {
    std::size_t begin = 0;
    for (std::size_t left = batches.size; left > 0;) {  // without branches that cannot be foretold
      const std::size_t half = (left + 1) / 2;
      begin += batches[begin + half - 1].batch < batch ? half : 0;
      left -= half;
    }
    return begin;
  }

  constexpr bool allowed(const Question& question, const Row& row) const noexcept {
    return (question.allow == nullptr || (*question.allow)[index(row.choice)]) && (!question.now.p95 || has_p95(row));
  }

  /// Finds the best row that is allowed, apart from one; null where there is none.
  constexpr Found best(const Question& question, const detail::Conditions& now,
                       std::int32_t apart_from = -1) const noexcept {
    Found found;
    for (const Row& row : batches[question.at].rows) {
      if (row.choice == apart_from || !allowed(question, row)) continue;
      const detail::Payload sent = payload(question, row);
      found.take(row, time_ms(row, sent, now), sent.uplink_bytes);
    }
    return found;
  }

  /// T of a row at its own batch size, on the table's own link, at load 1, with an empty queue.
  constexpr double own_ms(const Row& row, double rate_mb_s) const noexcept {
    if (!row.uses_server) return row.head_ms;
    const double back_mb_s = link.downlink_rate_mb_s ? *link.downlink_rate_mb_s : rate_mb_s;
    return detail::sent_ms(row.head_ms, row.fixed_ms, row.uplink_mb, row.downlink_mb, rate_mb_s, back_mb_s);
  }

  constexpr double time_ms(const Row& row, const detail::Payload& sent, const detail::Conditions& now) const noexcept {
    const double head_ms = now.p95 ? row.head_p95_ms : row.head_ms;
    if (!row.uses_server) return head_ms;
    const double tail_ms = now.p95 ? row.tail_p95_ms : row.tail_ms;
    const double fixed = detail::fixed_ms(link, tail_ms, now, sent.uplink_mb + sent.downlink_mb);
    return detail::sent_ms(head_ms, fixed, sent.uplink_mb, sent.downlink_mb, now.rate_mb_s, now.downlink_rate_mb_s);
  }

  static constexpr double variance_ms2(const Row& row, const detail::Conditions& now) noexcept {
    return detail::squared(row.head_half_ci_ms) + detail::squared(row.tail_half_ci_ms * now.server_load);
  }

  /// Gives the position of a choice's row at a measured batch size; how many rows there are where it has none.
  constexpr std::size_t row_of(std::size_t at, std::int32_t position) const noexcept {
    const Array<Row>& rows = batches[at].rows;
    std::size_t begin = 0;
    std::size_t end = rows.size;
    while (begin < end) {
      const std::size_t middle = begin + (end - begin) / 2;
      if (rows[middle].choice < position) {
        begin = middle + 1;
      } else {
        end = middle;
      }
    }
    return begin < rows.size && rows[begin].choice == position ? begin : rows.size;
  }

  /// Gives the bytes of a row at the batch size asked.
  constexpr detail::Payload payload(const Question& question, const Row& row) const noexcept {
    if (question.measured) return {row.uplink_bytes, row.downlink_bytes, row.uplink_mb, row.downlink_mb};
    const std::int64_t near_batch = batches[question.at].batch;
    const std::int64_t up = detail::bytes_at(question.batch, near_batch, row.uplink_bytes, row.other_batch,
                                             row.other_uplink_bytes);
    const std::int64_t down = detail::bytes_at(question.batch, near_batch, row.downlink_bytes, row.other_batch,
                                               row.other_downlink_bytes);
    return {up, down, static_cast<double>(up) / 1e6,
            link.count_downlink ? static_cast<double>(down) / 1e6 : 0.0};
  }

  /// The lower envelope of the lines T over the inverse rate.
  struct Envelope {
    const TableView& table;
    const Question& question;
    Segment* segments;
    std::size_t capacity;
    std::size_t size;
    bool full;

    void find() noexcept {
      constexpr double tiny_mb_s = 1e-290;  // rates below this overflow
      double least_mb = infinity;
      for (const Row& row : table.batches[question.at].rows) {
        if (table.allowed(question, row)) least_mb = std::fmin(least_mb, slope_mb(row));
      }
      // At low rates the flattest line is the best; where rounding hides that, start lower still.
      double start = lowest_crossing() / 2.0;
      while (start > tiny_mb_s && slope_mb(*best_at(detail::to_bits(start))) > least_mb) start /= 1024.0;
      const std::uint64_t low = start > 0.0 ? detail::to_bits(start) : 1;
      const std::uint64_t high = detail::to_bits(std::numeric_limits<double>::max());
      const Row* last = best_at(high);
      bisect(low, best_at(low), high, last);
      add(last, infinity);
    }

   private:
    detail::Conditions at_rate(double rate_mb_s) const noexcept {
      detail::Conditions now = question.now;
      now.rate_mb_s = rate_mb_s;
      if (question.follows) now.downlink_rate_mb_s = rate_mb_s;
      return now;
    }

    const Row* best_at(std::uint64_t rate_bits) const noexcept {
      return table.best(question, at_rate(detail::from_bits(rate_bits))).row;
    }

    double slope_mb(const Row& row) const noexcept {
      const detail::Payload sent = table.payload(question, row);
      return question.follows ? sent.uplink_mb + sent.downlink_mb : sent.uplink_mb;
    }

    double intercept_ms(const Row& row) const noexcept {
      return table.time_ms(row, table.payload(question, row), at_rate(infinity));
    }

    /// Finds the lowest rate at which any two lines cross, at most 1 MB/s; below it nothing changes.
    double lowest_crossing() const noexcept {
      double lowest = 1.0;
      const Array<Row>& rows = table.batches[question.at].rows;
      for (std::size_t i = 0; i < rows.size; ++i) {
        if (!table.allowed(question, rows[i])) continue;
        const double slope = slope_mb(rows[i]);
        const double intercept = intercept_ms(rows[i]);
        for (std::size_t j = 0; j < i; ++j) {
          if (!table.allowed(question, rows[j])) continue;
          const double gain_ms = intercept_ms(rows[j]) - intercept;
          if (gain_ms == 0.0 || !std::isfinite(gain_ms)) continue;
          const double rate = 1000.0 * (slope - slope_mb(rows[j])) / gain_ms;
          if (0.0 < rate && rate < lowest) lowest = rate;
        }
      }
      return lowest;
    }

    void bisect(std::uint64_t low, const Row* low_best, std::uint64_t high, const Row* high_best) noexcept {
      while (low_best != high_best) {
        if (high - low == 1) return add(low_best, detail::from_bits(high));
        const std::uint64_t middle = low + (high - low) / 2;
        const Row* middle_best = best_at(middle);
        if (middle_best == high_best) {
          high = middle;
        } else {
          if (middle_best != low_best) bisect(low, low_best, middle, middle_best);
          low = middle;
          low_best = middle_best;
        }
      }
    }

    /// Where three lines meet within rounding, a choice may seem to come back; what lies between is no segment.
    void add(const Row* row, double below_rate_mb_s) noexcept {
      for (std::size_t i = 0; i < size; ++i) {
        if (segments[i].position == row->choice) size = i;
      }
      if (size == capacity) {
        full = true;
        return;
      }
      segments[size++] = Segment{row->choice, below_rate_mb_s};
    }
  };
};

}  // namespace v0
}  // namespace dsc_split
