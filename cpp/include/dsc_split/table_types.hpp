// SPDX-License-Identifier: Apache-2.0
/// What a lookup table is made of, what it is asked, and what it answers: plain records, standard library only.
#pragma once

#include <bitset>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <string_view>

#include "dsc_split/arithmetic.hpp"

namespace dsc_split {
inline namespace v0 {

/// Limits of the format, version 1.
inline constexpr std::size_t max_choices = 1000;
inline constexpr std::size_t max_batches = 4096;
inline constexpr std::int64_t max_batch = std::int64_t{1} << 20;
inline constexpr std::int64_t max_bytes = std::int64_t{1} << 42;

inline constexpr double infinity = std::numeric_limits<double>::infinity();

/// Stands for a time that the table does not know.
inline constexpr double unknown_ms = -1.0;

/// How a choice runs the model.
enum class Kind : std::uint8_t { full_offload, split, no_offload };

/// Which times the question is about: each side's median, or each side's 95th percentile.
///
/// The sum of two 95th percentiles is not the 95th percentile of the sum: it is a bound that at least 90 % of the
/// requests keep, however head and tail depend on each other.
enum class Percentile : std::uint8_t { median = 50, p95 = 95 };

/// One way to run the model.
struct Choice {
  std::int32_t id = 0;         ///< Number of the choice in the file; among equals the lower one wins.
  Kind kind = Kind::split;     ///< Full offload, a split, or no offload.
  bool passthrough = false;    ///< Whether the split sends an input of the model as it is.
  std::string_view name = {};  ///< The cut's name; for the other kinds `full-offload` and `no-offload`.

  /// Whether anything is sent: everything but no offload.
  [[nodiscard]] constexpr bool uses_server() const noexcept { return kind != Kind::no_offload; }
  /// Whether an input of the model leaves the device as it is.
  [[nodiscard]] constexpr bool sends_inputs() const noexcept { return kind == Kind::full_offload || passthrough; }
};

/// The cost of the network, apart from the data rate; the defaults are Eq. 4 of the paper.
struct Link {
  double c0_ms = 0.0;                                 ///< Milliseconds that every request costs.
  double c1_ms_per_mb = 0.0;                          ///< Milliseconds per MB (10^6 bytes), whatever the rate.
  double rtt_ms = 0.0;                                ///< Round-trip time in milliseconds.
  double round_trips = 1.0;                           ///< Round trips per request.
  bool count_downlink = false;                        ///< Whether the outputs' way back is counted.
  std::optional<double> downlink_rate_mb_s = {};      ///< MB/s; without one, the uplink's.
};

/// What one choice takes at one batch size.
struct Row {
  std::int32_t choice = 0;                ///< Position in `TableView::choices`.
  double head_ms = 0.0;                   ///< Median time on the device, for the whole batch.
  double tail_ms = 0.0;                   ///< Median time on the server, for the whole batch.
  double head_p95_ms = unknown_ms;        ///< 95th percentile on the device.
  double tail_p95_ms = unknown_ms;        ///< 95th percentile on the server.
  double head_half_ci_ms = 0.0;           ///< Half-width of the 95 % confidence interval of `head_ms`; 0: unknown.
  double tail_half_ci_ms = 0.0;           ///< Half-width of the 95 % confidence interval of `tail_ms`; 0: unknown.
  std::int64_t uplink_bytes = 0;          ///< Bytes up, for the whole batch.
  std::int64_t downlink_bytes = 0;        ///< Bytes back, for the whole batch.
  bool timing_valid = true;               ///< Whether the times were taken on what the table names.
  /// The nearest smaller measured batch size at which the choice has a row, or else the nearest larger, or else 0; and
  /// its bytes. Bytes at a batch size that was not measured are on the straight line through both.
  std::int64_t other_batch = 0;
  std::int64_t other_uplink_bytes = 0;    ///< Bytes up there.
  std::int64_t other_downlink_bytes = 0;  ///< Bytes back there.

  // Derived by `completed`.
  bool uses_server = false;   ///< Whether the choice sends anything.
  double uplink_mb = 0.0;     ///< MB up.
  double downlink_mb = 0.0;   ///< MB back; 0 unless the link counts them.
  double fixed_ms = 0.0;      ///< What no rate changes on the table's own link at load 1: tail and network.
};

/// A sequence that belongs to somebody else.
template <class T>
struct Array {
  const T* data = nullptr;
  std::size_t size = 0;

  [[nodiscard]] constexpr const T& operator[](std::size_t i) const noexcept { return data[i]; }
  [[nodiscard]] constexpr const T* begin() const noexcept { return data; }
  [[nodiscard]] constexpr const T* end() const noexcept { return data + size; }
};

/// A range of data rates, its ends included, in which one row is the best by more than rounding: on the table's own
/// link, at load 1, with an empty queue.
struct CertainRange {
  double from_mb_s = 0.0;
  double to_mb_s = 0.0;
  const Row* row = nullptr;
};

/// All rows of one measured batch size, by ascending choice.
struct Batch {
  std::int64_t batch = 0;
  Array<Row> rows = {};
  Array<CertainRange> certain = {};  ///< Ascending, from `find_certain`; MAY be empty: it makes looking up faster.
};

/// Choices that may be taken, by position in `TableView::choices`.
using Mask = std::bitset<max_choices>;

/// The question: what holds when a request starts.
struct State {
  std::int64_t batch = 0;                         ///< Batch size, from 1; it must be given.
  double rate_mb_s = 0.0;                         ///< Uplink in MB/s; 0: nothing can be sent; infinite: bytes are free.
  std::optional<double> downlink_rate_mb_s = {};  ///< Default: the link's, or else the uplink's.
  std::optional<double> rtt_ms = {};              ///< Default: the link's.
  double server_load = 1.0;                       ///< The tail's time now over its time when measured.
  double queue_ms = 0.0;                          ///< Wait before the tail starts.
  const Mask* allow = nullptr;                    ///< Choices that may be taken; default: all.
  Percentile percentile = Percentile::median;     ///< Rows without a 95th percentile are left out there.
};

/// The answer for one state.
struct Pick {
  const Choice* choice = nullptr;   ///< The fastest choice.
  std::int32_t position = -1;       ///< Its position in `TableView::choices`.
  double latency_ms = 0.0;          ///< Its T.
  std::int64_t measured_batch = 0;  ///< The batch size whose times were used.
  bool timing_valid = true;         ///< Whether its times were taken on what the table names.
};

/// How sure an answer is.
struct Margin {
  const Choice* runner_up = nullptr;  ///< The second fastest choice; null where nothing else can answer.
  double runner_up_ms = infinity;     ///< Its T; infinite without one.
  double margin_ms = infinity;        ///< How much slower it is; infinite without one.
  double uncertainty_ms = 0.0;        ///< Half-width of the 95 % confidence interval of the margin of the medians.

  /// Whether the margin is smaller than its uncertainty, so that either choice may be the faster one.
  [[nodiscard]] constexpr bool tie() const noexcept { return margin_ms == 0.0 || margin_ms < uncertainty_ms; }
};

/// The terms of T of one choice in one state.
struct Terms {
  double head_ms = 0.0;              ///< On the device.
  double uplink_ms = 0.0;            ///< The bytes on their way up.
  double network_ms = 0.0;           ///< Round trips, cost per request and per byte.
  double queue_ms = 0.0;             ///< Waiting on the server.
  double tail_ms = 0.0;              ///< On the server, at the load asked.
  double downlink_ms = 0.0;          ///< The outputs on their way back, where they are counted.
  double latency_ms = 0.0;           ///< T, evaluated in the order of the format; infinite where it cannot be sent.
  std::int64_t uplink_bytes = 0;     ///< Bytes up at the batch asked.
  std::int64_t downlink_bytes = 0;   ///< Bytes back at the batch asked, whether counted or not.
};

/// A range of data rates over which one choice is the best; it begins where the one before it ends.
struct Segment {
  std::int32_t position = -1;           ///< Position of the choice in `TableView::choices`.
  double below_rate_mb_s = infinity;    ///< Best below this rate, not at it; infinite at the last one.
};

}  // namespace v0
}  // namespace dsc_split
