// SPDX-License-Identifier: Apache-2.0
/// A JSON document that may be hostile, as a flat list of values that know their line and their place.
///
/// Parsed with nlohmann/json's event interface: nothing recurses, nothing throws, and what the table format refuses
/// (keys that stand twice, deep nesting, numbers beyond binary64) is refused while the document is read.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <limits>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "dsc_split/arithmetic.hpp"  // says where C++17 is missing, before anything here does
#include "dsc_split/load_error.hpp"
#include "dsc_split/result.hpp"

#define DSC_SPLIT_TEXT(number) #number
#define DSC_SPLIT_VERSION_TEXT(major, minor) DSC_SPLIT_TEXT(major) "." DSC_SPLIT_TEXT(minor)
static_assert(NLOHMANN_JSON_VERSION_MAJOR * 1000 + NLOHMANN_JSON_VERSION_MINOR >= 3011,
              "dsc_split/load.hpp needs nlohmann/json 3.11 or later; found " DSC_SPLIT_VERSION_TEXT(
                  NLOHMANN_JSON_VERSION_MAJOR, NLOHMANN_JSON_VERSION_MINOR));
#undef DSC_SPLIT_VERSION_TEXT
#undef DSC_SPLIT_TEXT

namespace dsc_split {
inline namespace v0 {
namespace detail {

inline constexpr std::size_t max_document_bytes = std::size_t{8} * 1024 * 1024;
inline constexpr std::size_t max_document_depth = 64;

/// Cuts a text to what fits into a message, and leaves nothing in it that is not printable ASCII.
inline std::string shown(std::string_view text, std::size_t longest = 60) {
  std::string result(text.substr(0, longest));
  for (char& letter : result) {
    if (letter < ' ' || letter > '~') letter = '?';
  }
  return text.size() > longest ? result + "..." : result;
}

enum class Type : std::uint8_t { null, boolean, whole, natural, real, text, list, object };

/// Bytes of `Document::texts`.
struct Span {
  std::uint32_t begin;
  std::uint32_t size;
};

/// One value. Those inside of it follow it.
struct Value {
  Type type = Type::null;
  std::uint32_t line = 0;
  std::uint32_t end = 0;  // position after the last value inside
  Span key = {0, 0};      // where it is in an object
  union {
    bool boolean;
    std::int64_t whole;     // a whole number below 2^63
    std::uint64_t natural;  // a whole number from 2^63
    double real;            // a number with a fraction or an exponent, or one beyond 2^64
    Span text;
  } as = {};
};

/// A position of a `Value`; `none` where there is no such value.
using At = std::uint32_t;
inline constexpr At none = std::numeric_limits<At>::max();

/// The bytes for the parser, which tell how far it has read.
class Input {
 public:
  using iterator_category = std::input_iterator_tag;
  using value_type = char;
  using difference_type = std::ptrdiff_t;
  using pointer = const char*;
  using reference = const char&;

  Input(const char* at, const char** read) noexcept : at_(at), read_(read) {}

  reference operator*() const noexcept { return *at_; }
  Input& operator++() noexcept {
    *read_ = ++at_;
    return *this;
  }
  bool operator==(const Input& other) const noexcept { return at_ == other.at_; }
  bool operator!=(const Input& other) const noexcept { return at_ != other.at_; }

 private:
  const char* at_;
  const char** read_;
};

/// The values of a document, the outermost first. Takes the parser's events.
class Document {
 public:
  /// Parses; false where `error()` says why not. The outermost value is an object then.
  bool parse(const char* data, std::size_t size) {
    counted_ = read_ = data;
    if (size > max_document_bytes) {
      return refuse(Errc::too_large, "more than " + std::to_string(max_document_bytes) + " bytes; no more are read");
    }
    line_ = 1;
    if (std::string_view(data, size).substr(0, 3) == "\xEF\xBB\xBF") {
      return refuse(Errc::not_json, "it begins with a byte order mark; write it without");
    }
    // The parser takes a zero byte for the end.
    if (const void* zero = size == 0 ? nullptr : std::memchr(data, 0, size)) {
      read_ = static_cast<const char*>(zero) + 1;
      return refuse(Errc::not_json, "a zero byte");
    }
    if (!nlohmann::json::sax_parse(Input(data, &read_), Input(data + size, &read_), this)) return false;
    if (values_[0].type != Type::object) return refuse(Errc::not_a_table, "got " + told(0) + "; expected an object");
    return true;
  }

  [[nodiscard]] const LoadError& error() const noexcept { return error_; }

  [[nodiscard]] const Value& operator[](At at) const noexcept { return values_[at]; }

  [[nodiscard]] std::string_view text(Span span) const noexcept { return {texts_.data() + span.begin, span.size}; }
  [[nodiscard]] std::string_view text(At at) const noexcept { return text(values_[at].as.text); }

  /// Finds a value by key in an object.
  [[nodiscard]] At find(At object, std::string_view key) const noexcept {
    for (At at = first(object); at != none; at = next(object, at)) {
      if (text(values_[at].key) == key) return at;
    }
    return none;
  }

  /// Gives the first value inside of a list or an object.
  [[nodiscard]] At first(At parent) const noexcept {
    return values_[parent].end > parent + 1 ? parent + 1 : none;
  }

  /// Gives the value after `at` in the list or object that holds it.
  [[nodiscard]] At next(At parent, At at) const noexcept {
    return values_[at].end < values_[parent].end ? values_[at].end : none;
  }

  /// Counts the values of a list or an object.
  [[nodiscard]] std::size_t size(At parent) const noexcept {
    std::size_t count = 0;
    for (At at = first(parent); at != none; at = next(parent, at)) ++count;
    return count;
  }

  /// Says where a value stands, like `batches[0].rows[1].head_ms`.
  [[nodiscard]] std::string place(At target) const {
    std::string place;
    At parent = 0;
    while (parent != target) {
      std::size_t index = 0;
      At at = first(parent);
      for (; values_[at].end <= target; at = next(parent, at)) ++index;
      if (values_[parent].type == Type::list) {
        place += "[" + std::to_string(index) + "]";
      } else {
        if (!place.empty()) place += ".";
        place += text(values_[at].key);
      }
      parent = at;
    }
    return place;
  }

  /// Says what stands there.
  [[nodiscard]] std::string told(At at) const {
    const Value& value = values_[at];
    switch (value.type) {
      case Type::null: return "null";
      case Type::boolean: return value.as.boolean ? "true" : "false";
      case Type::whole: return std::to_string(value.as.whole);
      case Type::natural: return std::to_string(value.as.natural);
      case Type::real: return nlohmann::json(value.as.real).dump();
      case Type::text: return "'" + shown(text(at)) + "'";
      case Type::list: return "a list of " + std::to_string(size(at)) + " items";
      case Type::object: return "an object of " + std::to_string(size(at)) + " keys";
    }
    return {};
  }

  // ---- the parser's events -----------------------------------------------------------------------------------

  bool null() {
    add(Type::null);
    return true;
  }
  bool boolean(bool value) {
    add(Type::boolean).as.boolean = value;
    return true;
  }
  bool number_integer(std::int64_t value) {
    add(Type::whole).as.whole = value;
    return true;
  }
  bool number_unsigned(std::uint64_t value) {
    if (value <= static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max())) {
      return number_integer(static_cast<std::int64_t>(value));
    }
    add(Type::natural).as.natural = value;
    return true;
  }
  bool number_float(double value, const std::string&) {
    add(Type::real).as.real = value;
    return true;
  }
  bool string(const std::string& value) {
    const Span span = keep(value);
    add(Type::text).as.text = span;
    return true;
  }
  bool binary(const nlohmann::json::binary_t&) { return refuse(Errc::not_json, "no JSON"); }
  bool start_object(std::size_t) { return start(Type::object); }
  bool start_array(std::size_t) { return start(Type::list); }
  bool key(const std::string& value) {
    key_ = keep(value);
    return true;
  }
  bool end_array() {
    end();
    return true;
  }
  bool end_object() {
    const At object = open_.back();
    end();
    keys_.clear();
    for (At at = first(object); at != none; at = next(object, at)) keys_.emplace_back(text(values_[at].key), at);
    std::sort(keys_.begin(), keys_.end());
    const auto same = [](const auto& a, const auto& b) { return a.first == b.first; };
    const auto twice = std::adjacent_find(keys_.begin(), keys_.end(), same);
    if (twice == keys_.end()) return true;
    refuse(Errc::duplicate_key, "key '" + shown(twice->first) + "' stands twice in one object");
    error_.line = values_[std::next(twice)->second].line;
    return false;
  }
  bool parse_error(std::size_t, const std::string&, const nlohmann::json::exception& why) {
    // "[json.exception.parse_error.101] parse error at line 1, column 2: syntax error ...": the line is ours.
    std::string_view message = why.what();
    message.remove_prefix(std::min(message.size(), message.find("] ") + 2));
    if (message.substr(0, 11) == "parse error") message.remove_prefix(std::min(message.size(), message.find(": ") + 2));
    return refuse(Errc::not_json, "no valid JSON: " + shown(message, 160));
  }

 private:
  /// Gives the line of what was read last. Behind a number the parser has read one byte more.
  std::size_t line() noexcept {
    if (read_ > counted_) {
      line_ += static_cast<std::size_t>(std::count(counted_, read_ - 1, '\n'));
      counted_ = read_ - 1;
    }
    return line_;
  }

  bool refuse(Errc code, std::string message) {
    error_.code = code;
    error_.line = line();
    error_.message = std::move(message);
    return false;
  }

  Span keep(std::string_view text) {
    const Span span{static_cast<std::uint32_t>(texts_.size()), static_cast<std::uint32_t>(text.size())};
    texts_ += text;
    return span;
  }

  Value& add(Type type) {
    Value value;
    value.type = type;
    value.line = static_cast<std::uint32_t>(line());
    value.end = static_cast<At>(values_.size() + 1);
    value.key = std::exchange(key_, Span{0, 0});
    values_.push_back(value);
    return values_.back();
  }

  bool start(Type type) {
    if (open_.size() == max_document_depth) {
      return refuse(Errc::too_deep,
                    "nested too deeply; at most " + std::to_string(max_document_depth) + " levels are read");
    }
    open_.push_back(static_cast<At>(values_.size()));
    add(type);
    return true;
  }

  void end() {
    values_[open_.back()].end = static_cast<At>(values_.size());
    open_.pop_back();
  }

  std::vector<Value> values_;
  std::string texts_;
  std::vector<At> open_;
  std::vector<std::pair<std::string_view, At>> keys_;  // scratch
  Span key_ = {0, 0};
  const char* read_ = nullptr;
  const char* counted_ = nullptr;
  std::size_t line_ = 0;
  LoadError error_;
};

}  // namespace detail
}  // namespace v0
}  // namespace dsc_split
