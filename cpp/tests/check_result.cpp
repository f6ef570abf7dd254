// SPDX-License-Identifier: Apache-2.0
// A Result holds any value and any error, default constructors or not; prints the first thing that is wrong.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>

#include "dsc_split/result.hpp"

namespace {

using dsc_split::Errc;
using dsc_split::Error;
using dsc_split::Result;

#define EXPECT(...)                                            \
  do {                                                         \
    if (!(__VA_ARGS__)) {                                      \
      std::printf("line %d: %s\n", __LINE__, #__VA_ARGS__);    \
      std::exit(1);                                            \
    }                                                          \
  } while (false)

/// A value without a default constructor that is copied as bytes.
struct Rate {
  constexpr explicit Rate(double given) noexcept : mb_s(given) {}
  double mb_s;
};

/// A value without a default constructor that can be moved alone, and is counted while it lives.
class Engine {
 public:
  explicit Engine(int number) : number_(std::make_unique<int>(number)) { ++alive; }
  Engine(Engine&& other) noexcept : number_(std::move(other.number_)) { ++alive; }
  Engine& operator=(Engine&& other) noexcept = default;
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;
  ~Engine() { --alive; }

  [[nodiscard]] int number() const noexcept { return *number_; }

  static inline int alive = 0;

 private:
  std::unique_ptr<int> number_;
};

/// An error without a default constructor, with memory of its own.
struct Why {
  explicit Why(std::string given) : text(std::move(given)) {}
  std::string text;
};

constexpr Result<Rate> rate_of(double mb_s) noexcept {
  if (mb_s < 0.0) return Error{Errc::bad_number};
  return Rate(mb_s);
}

Result<Engine, Why> engine_of(int number) {
  if (number < 0) return Why("engine " + std::to_string(number) + " is none of the engines that were built");
  return Engine(number);
}

static_assert(!std::is_default_constructible_v<Rate> && !std::is_default_constructible_v<Result<Rate>>);
static_assert(rate_of(8.0) && rate_of(8.0).has_value() && rate_of(8.0)->mb_s == 8.0 && (*rate_of(8.0)).mb_s == 8.0);
static_assert(!rate_of(-1.0) && !rate_of(-1.0).has_value() && rate_of(-1.0).error().code == Errc::bad_number);
static_assert(rate_of(8.0).value_or(Rate(1.0)).mb_s == 8.0 && rate_of(-1.0).value_or(Rate(1.0)).mb_s == 1.0);
static_assert(std::is_trivially_copyable_v<Result<Rate>> && std::is_trivially_destructible_v<Result<double>>);
static_assert(std::is_copy_constructible_v<Result<std::string>> && std::is_copy_assignable_v<Result<std::string>>);
static_assert(std::is_move_constructible_v<Result<Engine, Why>> && !std::is_copy_constructible_v<Result<Engine, Why>>);
static_assert(!std::is_convertible_v<Result<double>, bool>, "a number is not taken for whether there is one");

void check_move_only() {
  EXPECT(engine_of(7).has_value() && engine_of(7)->number() == 7);
  Engine taken = *engine_of(3);
  EXPECT(taken.number() == 3 && Engine::alive == 1);
  EXPECT(engine_of(-1).value_or(Engine(5)).number() == 5);
  EXPECT(engine_of(2).value_or(Engine(5)).number() == 2);

  auto kept = engine_of(1);
  auto moved = std::move(kept);
  EXPECT(moved && moved->number() == 1);
  moved = engine_of(-4);
  EXPECT(!moved && moved.error().text == "engine -4 is none of the engines that were built");
  moved = engine_of(9);
  EXPECT(moved && moved->number() == 9);
}

void check_copies() {
  const std::string text(100, 'x');  // longer than what fits into the text itself
  Result<std::string> first(text);
  Result<std::string> second = first;
  EXPECT(*first == text && *second == text && first.value_or("none") == text);
  second = Error{Errc::no_space};
  EXPECT(!second && second.error().code == Errc::no_space && second.value_or("none") == "none" && *first == text);
  second = first;
  EXPECT(second && *second == text && second->size() == 100);
}

}  // namespace

int main() {
  check_move_only();
  EXPECT(Engine::alive == 0);
  check_copies();
  return 0;
}
