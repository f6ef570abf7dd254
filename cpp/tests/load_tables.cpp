// SPDX-License-Identifier: Apache-2.0
/// All that the tests ask of the loader, in one program: nlohmann/json is what takes long to compile.
///
///     load_tables show PATH...     load each, and print what the table is, or the error
///     load_tables answer PATH...   answer questions about the tables: see answer.hpp
///     load_tables check            read documents from standard input, each preceded by its length as a line, and print
///                                  a line for each: the error's code (0: none), line, and place
#include <cstddef>
#include <iostream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "answer.hpp"
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

void show_file(const std::string& path) {
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

int answer_questions(int count, char** paths) {
  std::vector<dsc_split::LookupTable> tables;
  std::vector<dsc_split::TableView> views;
  for (int i = 0; i < count; ++i) {
    auto table = dsc_split::load(paths[i]);
    if (!table) {
      std::cerr << paths[i] << ": " << to_string(table.error()) << '\n';
      return 1;
    }
    tables.push_back(*std::move(table));
    views.push_back(tables.back().view());
  }
  answer::answer_all(views.data());
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  const std::string_view task = count > 1 ? arguments[1] : "";
  if (task == "answer") return answer_questions(count - 2, arguments + 2);
  if (task == "show") {
    for (int i = 2; i < count; ++i) show_file(arguments[i]);
  } else if (task == "check") {
    check_documents();
  } else {
    return 2;
  }
  return 0;
}
