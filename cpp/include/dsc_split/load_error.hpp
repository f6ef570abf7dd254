// SPDX-License-Identifier: Apache-2.0
/// Why a file is no lookup table, and where: what `load` and `parse` give instead of a table.
#pragma once

#include <cstddef>
#include <string>

#include "dsc_split/arithmetic.hpp"  // says where C++17 is missing, before anything here does
#include "dsc_split/result.hpp"

namespace dsc_split {
inline namespace v0 {

/// Why a file is no lookup table, and where.
struct LoadError {
  Errc code = Errc::ok;
  std::size_t line = 0;      ///< Line in the file, from 1; 0 where it is not about a line.
  std::string file = {};     ///< The path given; empty where bytes were given.
  std::string place = {};    ///< Like `batches[0].rows[1].head_ms`; empty where it is not about a value.
  std::string message = {};  ///< What was got and what was expected.
};

/// Gives `file:line: place: message`, less what is not known.
[[nodiscard]] inline std::string to_string(const LoadError& error) {
  std::string text = error.file.empty() ? "lookup table" : error.file;
  if (error.line > 0) text += ":" + std::to_string(error.line);
  if (!error.place.empty()) text += ": " + error.place;
  return text + ": " + error.message;
}

}  // namespace v0
}  // namespace dsc_split
