// SPDX-License-Identifier: Apache-2.0
/// Loads a lookup table from `table.json`: docs/table-format.md, version 1.
///
/// Needs nlohmann/json 3.11 or later. Refuses what the Python reader refuses, at the same place. Loading throws
/// nothing of its own, but allocates; looking up, in `dsc_split/lookup_table.hpp`, does not.
#pragma once

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <forward_list>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "dsc_split/detail/document.hpp"
#include "dsc_split/load_error.hpp"
#include "dsc_split/lookup_table.hpp"

namespace dsc_split {
inline namespace v0 {

namespace detail {
class TableReader;
}

/// A lookup table that was loaded. It answers as a `TableView` does.
///
/// What it hands out (views, the choices of a `Pick`) holds as long as the table; moving the table does not move it.
class LookupTable : private TableView {
 public:
  LookupTable() noexcept = default;
  LookupTable(LookupTable&& other) noexcept
      : TableView(std::exchange(other.base(), TableView{})),
        choices_(std::move(other.choices_)),
        rows_(std::move(other.rows_)),
        batches_(std::move(other.batches_)),
        certain_(std::move(other.certain_)),
        texts_(std::move(other.texts_)) {}
  LookupTable& operator=(LookupTable&& other) noexcept {
    base() = std::exchange(other.base(), TableView{});
    choices_ = std::move(other.choices_);
    rows_ = std::move(other.rows_);
    batches_ = std::move(other.batches_);
    certain_ = std::move(other.certain_);
    texts_ = std::move(other.texts_);
    return *this;
  }
  LookupTable(const LookupTable&) = delete;
  LookupTable& operator=(const LookupTable&) = delete;
  ~LookupTable() = default;

  /// The table's content.
  [[nodiscard]] const TableView& view() const noexcept { return *this; }

  using TableView::find;
  using TableView::latency_ms;
  using TableView::margin;
  using TableView::pick;
  using TableView::switch_rates;
  using TableView::terms;
  using TableView::without_inputs_sent;

 private:
  friend class detail::TableReader;

  TableView& base() noexcept { return *this; }

  std::vector<Choice> choices_;
  std::vector<Row> rows_;
  std::vector<Batch> batches_;
  std::vector<CertainRange> certain_;
  std::forward_list<std::string> texts_;  // texts do not move
};

namespace detail {

/// Reads a table from a document, in the order of the Python reader. The first error stands; what is read after
/// it means nothing.
class TableReader {
 public:
  explicit TableReader(const Document& document) noexcept : document_(document) {}

  bool read(LookupTable& table) {
    read_head();
    read_choices(table);
    read_batches(table);
    read_rest(table);
    for (std::size_t i = 0; ok() && i < table.batches_.size(); ++i) check_segments(table, i);
    return ok();
  }

  [[nodiscard]] const LoadError& error() const noexcept { return error_; }

 private:
  struct ReadSegment {
    At at;
    std::int32_t position;
    double below_rate_mb_s;
  };
  struct ReadBatch {
    std::size_t row_count;
    std::vector<ReadSegment> segments;
  };

  static constexpr At root = 0;
  static constexpr std::int64_t max_version = std::int64_t{1} << 53;
  static constexpr std::int64_t max_id = std::numeric_limits<std::int32_t>::max();
  static constexpr double tolerance = 1.0 + 1e-9;  // switch rates of another writer may differ by rounding

  // ---- the parts ---------------------------------------------------------------------------------------------

  void read_head() {
    constexpr std::string_view format = "dsc-split/table";
    const At given = document_.find(root, "format");
    if (given == none) return missing(Errc::not_a_table, root, "format");
    if (document_[given].type != Type::text || document_.text(given) != format) {
      return refuse(Errc::not_a_table, given,
                    "got " + document_.told(given) + "; expected '" + std::string(format) + "'");
    }
    const std::int64_t version = integer(root, "version", 1, max_version);
    if (ok() && version > 1) {
      return refuse(Errc::newer_version, document_.find(root, "version"),
                    "the table is of version " + std::to_string(version) +
                        "; this dsc-split reads up to 1. Update dsc-split");
    }
    const At requirements = items(root, "requires", 0, unlimited);
    const At feature = ok() ? document_.first(requirements) : none;
    if (feature == none) return;
    if (document_[feature].type != Type::text) return wrong(feature, "a text");
    refuse(Errc::unknown_requirement, feature,
           "the table requires " + document_.told(feature) + ", which this dsc-split does not know. Update dsc-split");
  }

  void read_choices(LookupTable& table) {
    const At list = items(root, "choices", 1, max_choices);
    if (!ok()) return;
    std::vector<At> ids;
    for (At at = document_.first(list); at != none; at = document_.next(list, at)) {
      read_choice(table, at);
      if (!ok()) return;
      ids.push_back(document_.find(at, "id"));
    }
    ascending(ids);
  }

  void read_choice(LookupTable& table, At at) {
    expect_object(at);
    const std::string_view kind = text(at, "kind");
    if (!ok()) return;
    Choice choice;
    if (kind == "full-offload") {
      choice.kind = Kind::full_offload;
    } else if (kind == "no-offload") {
      choice.kind = Kind::no_offload;
    } else if (kind != "split") {
      return wrong(document_.find(at, "kind"), "one of 'full-offload', 'split', 'no-offload'");
    }
    if (const At passthrough = document_.find(at, "passthrough"); passthrough != none) {
      choice.passthrough = flag(at, "passthrough");
    }
    choice.id = static_cast<std::int32_t>(integer(at, "id", 0, max_id));
    const std::string_view name = text(at, "name");
    if (!ok()) return;
    const bool kinds_name = name == "full-offload" || name == "split" || name == "no-offload";
    if ((choice.kind != Kind::split || kinds_name) && name != kind) {
      return wrong(document_.find(at, "name"),
                   choice.kind == Kind::split ? "a cut's name" : "the name '" + std::string(kind) + "'");
    }
    if (table.find(name) >= 0) return wrong(document_.find(at, "name"), "a name that no other choice has");
    choice.name = keep(table, name);
    table.choices_.push_back(choice);
    table.choices = {table.choices_.data(), table.choices_.size()};
  }

  void read_batches(LookupTable& table) {
    const At list = items(root, "batches", 1, max_batches);
    if (!ok()) return;
    std::vector<At> sizes;
    for (At at = document_.first(list); at != none; at = document_.next(list, at)) {
      read_batch(table, at);
      if (!ok()) return;
      sizes.push_back(document_.find(at, "batch"));
    }
    ascending(sizes);
  }

  void read_batch(LookupTable& table, At at) {
    expect_object(at);
    const At list = items(at, "rows", 1, table.choices_.size());
    if (!ok()) return;
    ReadBatch read{0, {}};
    std::vector<At> choices;
    for (At row = document_.first(list); row != none; row = document_.next(list, row)) {
      read_row(table, row);
      if (!ok()) return;
      choices.push_back(document_.find(row, "choice"));
      ++read.row_count;
    }
    ascending(choices);
    Batch batch;
    batch.batch = integer(at, "batch", 1, max_batch);
    read.segments = read_segments(table, at);
    table.batches_.push_back(batch);
    read_.push_back(std::move(read));
  }

  void read_row(LookupTable& table, At at) {
    expect_object(at);
    Row row;
    row.timing_valid = flag(at, "timing_valid");
    row.choice = known_choice(table, at);
    row.head_ms = number(at, "head_ms");
    row.head_half_ci_ms = half_width(at, "head_ci_ms");
    row.head_p95_ms = number_or_null(at, "head_p95_ms").value_or(unknown_ms);
    row.tail_ms = number(at, "tail_ms");
    row.tail_half_ci_ms = half_width(at, "tail_ci_ms");
    row.tail_p95_ms = number_or_null(at, "tail_p95_ms").value_or(unknown_ms);
    row.uplink_bytes = integer(at, "uplink_bytes", 0, max_bytes);
    row.downlink_bytes = integer(at, "downlink_bytes", 0, max_bytes);
    if (!ok()) return;
    if (!table.choices_[static_cast<std::size_t>(row.choice)].uses_server()) {
      const char* expected = "0, because 'no-offload' uses no server";
      if (row.tail_ms != 0.0) return wrong(document_.find(at, "tail_ms"), expected);
      if (row.uplink_bytes != 0) return wrong(document_.find(at, "uplink_bytes"), expected);
      if (row.downlink_bytes != 0) return wrong(document_.find(at, "downlink_bytes"), expected);
    }
    table.rows_.push_back(row);
  }

  std::vector<ReadSegment> read_segments(const LookupTable& table, At batch) {
    std::vector<ReadSegment> segments;
    const At list = items(batch, "segments", 1, table.choices_.size());
    if (!ok()) return segments;
    std::vector<bool> seen(table.choices_.size());
    double previous = 0.0;
    for (At at = document_.first(list); at != none; at = document_.next(list, at)) {
      expect_object(at);
      const bool last = document_.next(list, at) == none;
      const At end = value(at, "below_rate_mb_s");
      if (!ok()) break;
      if ((document_[end].type == Type::null) != last) {
        wrong(end, "a rate; null stands at the last segment, and only there");
        break;
      }
      const double below_rate_mb_s = last ? infinity : number(at, "below_rate_mb_s");
      if (ok() && below_rate_mb_s <= previous) wrong(end, "a rate above the one before");
      previous = below_rate_mb_s;
      const std::int32_t position = known_choice(table, at);
      if (!ok()) break;
      if (seen[static_cast<std::size_t>(position)]) {
        wrong(document_.find(at, "choice"), "a choice that no other segment has");
        break;
      }
      seen[static_cast<std::size_t>(position)] = true;
      segments.push_back({at, position, below_rate_mb_s});
    }
    return segments;
  }

  void read_rest(LookupTable& table) {
    if (!ok()) return;
    table.count = "bytes";
    if (const At count = document_.find(root, "count"); count != none) {
      const std::string_view given = text(root, "count");
      if (ok() && given != "bytes" && given != "elements") wrong(count, "'bytes' or 'elements'");
      if (given == "elements") table.count = "elements";
    }
    const At emulated = value(root, "emulated");
    if (!ok()) return;
    const Value& what = document_[emulated];
    table.emulated = what.type != Type::null;
    const bool said = (what.type == Type::text && what.as.text.size > 0) ||
                      (what.type == Type::object && document_.first(emulated) != none);
    if (table.emulated && !said) return wrong(emulated, "null, or what was emulated as a text or an object");
    table.pair_id = keep(table, text(root, "pair_id"));
    table.precision = keep(table, text(root, "precision"));
    const At device = object(root, "device");
    table.device_target = keep(table, text(device, "target"));
    table.device_fingerprint = keep(table, text(device, "fingerprint"));
    const At server = object(root, "server");
    table.server_target = keep(table, text(server, "target"));
    table.server_fingerprint = keep(table, text(server, "fingerprint"));
    table.link = read_link();
    if (ok()) connect(table);
  }

  Link read_link() {
    const At at = object(root, "link");
    Link link;
    link.downlink_rate_mb_s = number_or_null(at, "downlink_rate_mb_s");
    if (ok() && link.downlink_rate_mb_s == 0.0) {
      wrong(document_.find(at, "downlink_rate_mb_s"), "a number above 0, or null for the uplink's rate");
    }
    link.count_downlink = flag(at, "count_downlink");
    link.c0_ms = number(at, "c0_ms");
    link.c1_ms_per_mb = number(at, "c1_ms_per_mb");
    link.rtt_ms = number(at, "rtt_ms");
    link.round_trips = number(at, "round_trips");
    static_cast<void>(text(at, "source"));
    return link;
  }

  /// Fills in what follows from the rows, and where each batch's rows are.
  void connect(LookupTable& table) {
    for (Row& row : table.rows_) {
      row = completed(row, table.choices_[static_cast<std::size_t>(row.choice)], table.link);
    }
    table.certain_.resize(table.rows_.size());
    const Row* rows = table.rows_.data();
    CertainRange* ranges = table.certain_.data();
    for (std::size_t i = 0; i < table.batches_.size(); ++i) {
      Batch& batch = table.batches_[i];
      batch.rows = {rows, read_[i].row_count};
      batch.certain = {ranges, find_certain(table.link, batch.rows, ranges)};
      rows += batch.rows.size;
      ranges += batch.certain.size;
    }
    table.batches = {table.batches_.data(), table.batches_.size()};
    find_others(table);
  }

  /// Tells every row of the nearest other batch size at which its choice has one.
  static void find_others(LookupTable& table) {
    struct Seen {
      std::int64_t batch = 0;
      Row* row = nullptr;
    };
    const auto tell = [](Row& row, const Seen& other) {
      row.other_batch = other.batch;
      row.other_uplink_bytes = other.row->uplink_bytes;
      row.other_downlink_bytes = other.row->downlink_bytes;
    };
    std::vector<Seen> last(table.choices_.size());
    Row* row = table.rows_.data();
    for (const Batch& batch : table.batches_) {
      for (std::size_t i = 0; i < batch.rows.size; ++i, ++row) {
        Seen& before = last[static_cast<std::size_t>(row->choice)];
        const Seen now{batch.batch, row};
        if (before.row != nullptr) {
          tell(*row, before);
          if (before.row->other_batch == 0) tell(*before.row, now);
        }
        before = now;
      }
    }
  }

  /// Refuses segments that the rows contradict by more than rounding.
  ///
  /// A choice's distance from the lower envelope is a convex function of the inverse rate, so it is the best within
  /// a segment if it is at both ends.
  void check_segments(const LookupTable& table, std::size_t i) {
    const Array<Row>& rows = table.batches_[i].rows;
    double least_mb = infinity;
    for (const Row& row : rows) least_mb = std::min(least_mb, slope_mb(table.link, row));
    double start = 0.0;
    for (const ReadSegment& segment : read_[i].segments) {
      const Row* own = nullptr;
      for (const Row& row : rows) {
        if (row.choice == segment.position) own = &row;
      }
      const std::string name = "choice " + std::to_string(id(table, segment.position));
      if (own == nullptr) return contradicted(segment, name + " has no row");
      if (start == 0.0 && slope_mb(table.link, *own) > least_mb * tolerance) {
        return contradicted(segment, name + " sends more than another, so it is not the best at the lowest rates");
      }
      const double end = std::min(segment.below_rate_mb_s, std::numeric_limits<double>::max());
      for (const double rate_mb_s : {start, end}) {
        if (rate_mb_s == 0.0) continue;
        const Row* faster = find_faster(table.link, rows, *own, rate_mb_s);
        if (faster == nullptr) continue;
        return contradicted(segment, "at " + nlohmann::json(rate_mb_s).dump() + " MB/s choice " +
                                         std::to_string(id(table, faster->choice)) + " is faster than " + name);
      }
      start = end;
    }
  }

  static std::int32_t id(const LookupTable& table, std::int32_t position) noexcept {
    return table.choices_[static_cast<std::size_t>(position)].id;
  }

  static double slope_mb(const Link& link, const Row& row) noexcept {
    return link.downlink_rate_mb_s ? row.uplink_mb : row.uplink_mb + row.downlink_mb;
  }

  /// Finds the fastest row at a rate where that is not `own`, by more than rounding; null otherwise.
  static const Row* find_faster(const Link& link, const Array<Row>& rows, const Row& own, double rate_mb_s) noexcept {
    const Row* best = &own;
    double least_ms = own_link_ms(link, own, rate_mb_s);
    for (const Row& row : rows) {
      const double time_ms = own_link_ms(link, row, rate_mb_s);
      if (time_ms < least_ms) {
        best = &row;
        least_ms = time_ms;
      }
    }
    return own_link_ms(link, own, rate_mb_s) <= least_ms * tolerance ? nullptr : best;
  }

  static double own_link_ms(const Link& link, const Row& row, double rate_mb_s) noexcept {
    if (!row.uses_server) return row.head_ms;
    const double back_mb_s = link.downlink_rate_mb_s.value_or(rate_mb_s);
    return sent_ms(row.head_ms, row.fixed_ms, row.uplink_mb, row.downlink_mb, rate_mb_s, back_mb_s);
  }

  void contradicted(const ReadSegment& segment, const std::string& why) {
    refuse(Errc::contradiction, segment.at, "contradicts the rows: " + why);
  }

  // ---- single values -----------------------------------------------------------------------------------------

  At value(At parent, std::string_view key) {
    const At at = ok() ? document_.find(parent, key) : none;
    if (ok() && at == none) missing(Errc::bad_value, parent, key);
    return at;
  }

  double number(At parent, std::string_view key) { return number_at(value(parent, key)); }

  double number_at(At at) {
    if (!ok()) return 0.0;
    const Value& given = document_[at];
    double result = -1.0;
    if (given.type == Type::whole) result = static_cast<double>(given.as.whole);
    if (given.type == Type::natural) result = static_cast<double>(given.as.natural);
    if (given.type == Type::real) result = given.as.real;
    if (!(result >= 0.0)) wrong(at, "a number from 0");
    return std::fabs(result);  // -0.0 reads as 0.0
  }

  std::optional<double> number_or_null(At parent, std::string_view key) {
    const At at = value(parent, key);
    if (!ok() || document_[at].type == Type::null) return std::nullopt;
    return number_at(at);
  }

  std::int64_t integer(At parent, std::string_view key, std::int64_t least, std::int64_t most) {
    const At at = value(parent, key);
    if (!ok()) return least;
    const Value& given = document_[at];
    if (given.type == Type::whole && least <= given.as.whole && given.as.whole <= most) return given.as.whole;
    wrong(at, "a whole number from " + std::to_string(least) + " to " + std::to_string(most));
    return least;
  }

  bool flag(At parent, std::string_view key) {
    const At at = value(parent, key);
    if (!ok()) return false;
    if (document_[at].type == Type::boolean) return document_[at].as.boolean;
    wrong(at, "true or false");
    return false;
  }

  std::string_view text(At parent, std::string_view key) {
    const At at = value(parent, key);
    if (!ok()) return {};
    if (document_[at].type != Type::text || document_[at].as.text.size == 0) {
      wrong(at, "a text");
      return {};
    }
    return document_.text(at);
  }

  At object(At parent, std::string_view key) {
    const At at = value(parent, key);
    if (ok()) expect_object(at);
    return at;
  }

  void expect_object(At at) {
    if (document_[at].type != Type::object) wrong(at, "an object");
  }

  static constexpr std::size_t unlimited = std::numeric_limits<std::size_t>::max();

  At items(At parent, std::string_view key, std::size_t least, std::size_t most) {
    const At at = value(parent, key);
    if (!ok()) return at;
    if (document_[at].type != Type::list) {
      wrong(at, "a list");
    } else if (document_.size(at) < least) {
      wrong(at, "at least one item");
    } else if (document_.size(at) > most) {
      wrong(at, "at most " + std::to_string(most));
    }
    return at;
  }

  std::int32_t known_choice(const LookupTable& table, At parent) {
    const std::int64_t id = integer(parent, "choice", 0, max_id);
    if (!ok()) return 0;
    const auto found = std::lower_bound(table.choices_.begin(), table.choices_.end(), id,
                                        [](const Choice& choice, std::int64_t asked) { return choice.id < asked; });
    if (found == table.choices_.end() || found->id != id) {
      wrong(document_.find(parent, "choice"), "the id of one of the choices");
      return 0;
    }
    return static_cast<std::int32_t>(found - table.choices_.begin());
  }

  double half_width(At parent, std::string_view key) {
    const At at = value(parent, key);
    if (!ok() || document_[at].type == Type::null) return 0.0;
    if (document_[at].type != Type::list || document_.size(at) != 2) {
      wrong(at, "null or [low, high]");
      return 0.0;
    }
    const double low = number_at(document_.first(at));
    const double high = number_at(document_.next(at, document_.first(at)));
    if (ok() && low > high) wrong(at, "the lower end first");
    return (high - low) / 2.0;
  }

  /// Expects whole numbers, each above the one before.
  void ascending(const std::vector<At>& numbers) {
    for (std::size_t i = 1; ok() && i < numbers.size(); ++i) {
      const std::int64_t before = document_[numbers[i - 1]].as.whole;
      const std::int64_t after = document_[numbers[i]].as.whole;
      if (after == before) wrong(numbers[i], "a number that does not stand twice");
      if (after < before) {
        wrong(numbers[i], "a number above " + std::to_string(before) + ", the one before: they are sorted");
      }
    }
  }

  static std::string_view keep(LookupTable& table, std::string_view text) {
    return table.texts_.emplace_front(text);
  }

  // ---- errors ------------------------------------------------------------------------------------------------

  [[nodiscard]] bool ok() const noexcept { return error_.code == Errc::ok; }

  void wrong(At at, std::string_view expected) {
    refuse(Errc::bad_value, at, "got " + document_.told(at) + "; expected " + std::string(expected));
  }

  void missing(Errc code, At parent, std::string_view key) {
    refuse(code, parent, "the key is missing");
    if (!error_.place.empty()) error_.place += ".";
    error_.place += key;
  }

  void refuse(Errc code, At at, std::string message) {
    error_ = {code, document_[at].line, {}, document_.place(at), std::move(message)};
  }

  const Document& document_;
  std::vector<ReadBatch> read_;
  LoadError error_;
};

struct CloseFile {
  void operator()(std::FILE* file) const noexcept { static_cast<void>(std::fclose(file)); }
};

/// Reads a file, or as much of it as tells that it is too large. Gives an `errno`, or 0.
inline int read_file(const std::string& path, std::string& data) {
  constexpr std::size_t block_bytes = std::size_t{64} * 1024;
  const std::unique_ptr<std::FILE, CloseFile> file(std::fopen(path.c_str(), "rb"));
  if (file == nullptr) return errno;
  while (data.size() <= max_document_bytes) {
    const std::size_t before = data.size();
    data.resize(before + block_bytes);
    const std::size_t taken = std::fread(&data[before], 1, block_bytes, file.get());
    data.resize(before + taken);
    if (taken < block_bytes) return std::ferror(file.get()) != 0 ? errno : 0;
  }
  return 0;
}

}  // namespace detail

/// Reads a table from the bytes of `table.json`.
///
/// Errors: too_large, not_json, too_deep, duplicate_key, not_a_table, newer_version, unknown_requirement, bad_value,
/// contradiction.
[[nodiscard]] inline Result<LookupTable, LoadError> parse(const char* data, std::size_t size_bytes) {
  detail::Document document;
  if (!document.parse(data, size_bytes)) return document.error();
  detail::TableReader reader(document);
  LookupTable table;
  if (!reader.read(table)) return reader.error();
  return Result<LookupTable, LoadError>(std::move(table));
}

/// Reads a table from a file; pipes are files, too. Errors: as of `parse`, and cannot_read.
[[nodiscard]] inline Result<LookupTable, LoadError> load(const std::string& path) {
  std::string data;
  if (const int problem = detail::read_file(path, data)) {
    return LoadError{Errc::cannot_read, 0, path, {}, "cannot be read: " + std::generic_category().message(problem)};
  }
  auto table = parse(data.data(), data.size());
  if (table) return table;
  LoadError error = table.error();
  error.file = path;
  return error;
}

}  // namespace v0
}  // namespace dsc_split
