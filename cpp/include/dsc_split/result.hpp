// SPDX-License-Identifier: Apache-2.0
/// A value or the reason why there is none; no exceptions.
#pragma once

#include <cassert>
#include <type_traits>
#include <utility>
#include <variant>

#define DSC_SPLIT_VERSION_MAJOR 0
#define DSC_SPLIT_VERSION_MINOR 1
#define DSC_SPLIT_VERSION_PATCH 0

namespace dsc_split {
inline namespace v0 {

/// What went wrong. Values are never reused.
enum class Errc {
  ok = 0,
  // Asking a table.
  bad_number = 1,          ///< A rate, time or load is NaN, negative, or infinite where it must be finite.
  bad_batch = 2,           ///< A batch size below 1.
  batch_too_large = 3,     ///< A batch size larger than every measured one.
  unknown_choice = 4,      ///< A position that the table does not have.
  unknown_percentile = 5,  ///< Neither the median nor the 95th percentile.
  nothing_allowed = 6,     ///< No choice that is allowed has a row at this batch size.
  nothing_can_answer = 7,  ///< Nothing can be sent, and nothing that is allowed runs on the device alone.
  no_space = 8,            ///< The caller's buffer is too small.
  // Reading a table.
  cannot_read = 20,          ///< The file cannot be opened or read.
  too_large = 21,            ///< More bytes than a table may have.
  not_json = 22,             ///< No JSON, or no UTF-8.
  too_deep = 23,             ///< Nested more deeply than a table may be.
  duplicate_key = 24,        ///< A key that stands twice in one object.
  not_a_table = 25,          ///< The format is another one.
  newer_version = 26,        ///< The table is of a version that this reader does not know.
  unknown_requirement = 27,  ///< The table requires something that this reader does not know.
  bad_value = 28,            ///< A key is missing, of the wrong type or out of range.
  contradiction = 29,        ///< The segments are not those of the rows.
};

/// Says in words what a code means.
[[nodiscard]] constexpr const char* to_string(Errc code) noexcept {
  switch (code) {
    case Errc::ok: return "no error";
    case Errc::bad_number: return "a rate, time or load is NaN, negative, or infinite where it must be finite";
    case Errc::bad_batch: return "the batch size is below 1";
    case Errc::batch_too_large: return "the batch size is larger than every measured one";
    case Errc::unknown_choice: return "the table has no such choice";
    case Errc::unknown_percentile: return "the table has the median and the 95th percentile alone";
    case Errc::nothing_allowed: return "no choice that is allowed has a row at this batch size";
    case Errc::nothing_can_answer: return "nothing can be sent, and nothing that is allowed runs on the device alone";
    case Errc::no_space: return "the buffer is too small";
    case Errc::cannot_read: return "the file cannot be read";
    case Errc::too_large: return "the file is larger than a table may be";
    case Errc::not_json: return "the file is no JSON in UTF-8";
    case Errc::too_deep: return "the file is nested too deeply";
    case Errc::duplicate_key: return "a key stands twice in one object";
    case Errc::not_a_table: return "the file is no lookup table";
    case Errc::newer_version: return "the table is of a newer version";
    case Errc::unknown_requirement: return "the table requires something unknown";
    case Errc::bad_value: return "a value is missing, of the wrong type or out of range";
    case Errc::contradiction: return "the segments contradict the rows";
  }
  return "unknown error";
}

/// Why there is no value.
struct Error {
  Errc code = Errc::ok;
};

/// Says in words what went wrong.
[[nodiscard]] constexpr const char* to_string(Error error) noexcept { return to_string(error.code); }

namespace detail {

/// A value or an error of any types.
template <class T, class E, bool = std::is_trivially_copyable_v<T>&& std::is_trivially_copyable_v<E>>
class Either {
 public:
  explicit Either(T value) noexcept : held_(std::in_place_index<0>, std::move(value)) {}
  explicit Either(E error) noexcept : held_(std::in_place_index<1>, std::move(error)) {}

  [[nodiscard]] bool has_value() const noexcept { return held_.index() == 0; }
  [[nodiscard]] const T& value() const noexcept { return *std::get_if<0>(&held_); }
  [[nodiscard]] T& value() noexcept { return *std::get_if<0>(&held_); }
  [[nodiscard]] const E& error() const noexcept { return *std::get_if<1>(&held_); }

 private:
  std::variant<T, E> held_;
};

/// A value or an error of types that are copied as bytes: it is copied so, too, and may be a constant.
template <class T, class E>
class Either<T, E, true> {
 public:
  constexpr explicit Either(T value) noexcept : value_(std::move(value)), has_value_(true) {}
  constexpr explicit Either(E error) noexcept : error_(std::move(error)), has_value_(false) {}

  [[nodiscard]] constexpr bool has_value() const noexcept { return has_value_; }
  [[nodiscard]] constexpr const T& value() const noexcept { return value_; }
  [[nodiscard]] constexpr T& value() noexcept { return value_; }
  [[nodiscard]] constexpr const E& error() const noexcept { return error_; }

 private:
  union {
    T value_;
    E error_;
  };
  bool has_value_;
};

}  // namespace detail

/// A value, or an error. Look at it as a condition before the value or the error is taken: to take what is not there is
/// undefined (and an `assert`). Neither type needs a default constructor.
template <class T, class E = Error>
class [[nodiscard]] Result {
  static_assert(!std::is_same_v<T, E>, "a value and an error of one type cannot be told apart");

 public:
  constexpr Result(T value) noexcept : held_(std::move(value)) {}
  constexpr Result(E error) noexcept : held_(std::move(error)) {}

  [[nodiscard]] constexpr bool has_value() const noexcept { return held_.has_value(); }
  [[nodiscard]] constexpr explicit operator bool() const noexcept { return held_.has_value(); }

  [[nodiscard]] constexpr const T& operator*() const& noexcept { return assert(has_value()), held_.value(); }
  [[nodiscard]] constexpr T&& operator*() && noexcept { return assert(has_value()), std::move(held_.value()); }
  [[nodiscard]] constexpr const T* operator->() const noexcept { return assert(has_value()), &held_.value(); }
  [[nodiscard]] constexpr const E& error() const noexcept { return assert(!has_value()), held_.error(); }

  /// Gives the value, or `fallback` where there is none.
  template <class U>
  [[nodiscard]] constexpr T value_or(U&& fallback) const& noexcept {
    return has_value() ? held_.value() : static_cast<T>(std::forward<U>(fallback));
  }
  template <class U>
  [[nodiscard]] constexpr T value_or(U&& fallback) && noexcept {
    return has_value() ? std::move(held_.value()) : static_cast<T>(std::forward<U>(fallback));
  }

 private:
  detail::Either<T, E> held_;
};

}  // namespace v0
}  // namespace dsc_split
