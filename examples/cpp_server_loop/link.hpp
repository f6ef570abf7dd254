// SPDX-License-Identifier: Apache-2.0
/// A link whose data rate changes: read from a CSV file, or made up.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

class Link {
 public:
  /// Reads the columns `time_s` and `rate_mb_s`; a rate holds until the next row.
  static Link read(const std::string& path) {
    std::ifstream file(path);
    std::string line;
    if (!std::getline(file, line)) throw std::runtime_error("rates '" + path + "' cannot be read");
    const std::vector<std::string> header = cells(line);
    const auto column = [&](const char* name) {
      const auto found = std::find(header.begin(), header.end(), name);
      if (found == header.end()) throw std::runtime_error("rates '" + path + "' have no column " + name);
      return static_cast<std::size_t>(found - header.begin());
    };
    const std::size_t time_column = column("time_s");
    const std::size_t rate_column = column("rate_mb_s");
    Link link;
    for (std::size_t number = 2; std::getline(file, line); ++number) {
      const std::vector<std::string> row = cells(line);
      if (row.size() == 1 && row[0].empty()) continue;
      if (row.size() != header.size()) fail(path, number);
      const double time_s = positive(row[time_column], path, number);
      if (!link.steps_.empty() && time_s <= link.steps_.back().first) fail(path, number);
      link.steps_.emplace_back(time_s, positive(row[rate_column], path, number));
    }
    if (link.steps_.empty()) throw std::runtime_error("rates '" + path + "' have no rows");
    return link;
  }

  /// A walk of two minutes: three times through good and bad coverage, and once through a tunnel.
  static Link walk() {
    Link link;
    for (int second = 0; second <= 120; ++second) {
      const double decades = 0.6 + 1.1 * std::cos(second * 6.283185307179586 / 40.0);
      const bool tunnel = second >= 84 && second < 89;
      link.steps_.emplace_back(second, tunnel ? 0.0 : std::pow(10.0, decades));
    }
    return link;
  }

  [[nodiscard]] double duration_s() const { return steps_.back().first; }

  /// Gives the data rate in MB/s.
  [[nodiscard]] double rate_mb_s(double time_s) const {
    auto next = std::upper_bound(steps_.begin(), steps_.end(), time_s,
                                 [](double time, const auto& step) { return time < step.first; });
    return next == steps_.begin() ? next->second : std::prev(next)->second;
  }

 private:
  static std::vector<std::string> cells(std::string line) {
    line.erase(std::remove(line.begin(), line.end(), '\r'), line.end());
    std::istringstream stream(line);
    std::vector<std::string> result;
    while (std::getline(stream, line, ',')) result.push_back(line);
    if (result.empty()) result.emplace_back();
    return result;
  }

  static double positive(const std::string& cell, const std::string& path, std::size_t number) {
    char* end = nullptr;
    const double value = std::strtod(cell.c_str(), &end);
    if (end == cell.c_str() || *end != '\0' || !(value >= 0.0) || std::isinf(value)) fail(path, number);
    return value;
  }

  [[noreturn]] static void fail(const std::string& path, std::size_t number) {
    throw std::runtime_error("rates '" + path + "', line " + std::to_string(number) +
                             ": ascending times in s and rates in MB/s from 0 were expected");
  }

  std::vector<std::pair<double, double>> steps_;  // time in s, rate in MB/s
};
