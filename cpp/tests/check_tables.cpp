// SPDX-License-Identifier: Apache-2.0
// With paths: loads each, and prints what the table is, or the error. Without: reads documents from standard input,
// each preceded by its length as a line, and prints a line for each: the error's code (0: none), line, and place.
#include <cstddef>
#include <iostream>
#include <string>
#include <utility>

#include "dsc_split/load.hpp"

namespace {

void print_table(const dsc_split::TableView& table) {
  std::cout << table.pair_id << ' ' << table.precision << ' ' << table.count << ' ' << table.device_target << ' '
            << table.device_fingerprint << ' ' << table.server_target << ' ' << table.server_fingerprint << ' '
            << (table.emulated ? "emulated" : "measured");
  for (const dsc_split::Choice& choice : table.choices) {
    std::cout << ' ' << choice.id << '=' << choice.name << (choice.sends_inputs() ? '*' : ' ');
  }
  for (const dsc_split::Batch& batch : table.batches) std::cout << ' ' << batch.batch << 'x' << batch.rows.size;
  std::cout << '\n';
}

void check_file(const std::string& path) {
  auto loaded = dsc_split::load(path);
  if (!loaded) {
    std::cout << to_string(loaded.error()) << '\n';
    return;
  }
  // What a table hands out stays where it is while the table moves.
  const auto pick = loaded->pick(1, 8.0);
  dsc_split::LookupTable moved = *std::move(loaded);
  dsc_split::LookupTable kept;
  kept = std::move(moved);
  print_table(kept.view());
  if (pick) std::cout << pick->choice->name << ' ' << pick->latency_ms << '\n';
}

void check_documents() {
  for (std::string length; std::getline(std::cin, length);) {
    std::string document(std::stoul(length), '\0');
    std::cin.read(document.data(), static_cast<std::streamsize>(document.size()));
    const auto table = dsc_split::parse(document.data(), document.size());
    const dsc_split::LoadError error = table ? dsc_split::LoadError{} : table.error();
    std::cout << static_cast<int>(error.code) << ' ' << error.line << ' ' << error.place << '\n';
  }
}

}  // namespace

int main(int count, char** arguments) {
  for (int i = 1; i < count; ++i) check_file(arguments[i]);
  if (count == 1) check_documents();
  return 0;
}
