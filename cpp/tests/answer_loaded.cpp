// SPDX-License-Identifier: Apache-2.0
/// Answers questions to tables that are loaded: answer_loaded TABLE.json...
#include "answer.hpp"
#include "dsc_split/load.hpp"

int main(int count, char** arguments) {
  std::vector<dsc_split::LookupTable> tables;
  std::vector<dsc_split::TableView> views;
  for (int i = 1; i < count; ++i) {
    auto table = dsc_split::load(arguments[i]);
    if (!table) {
      std::cerr << arguments[i] << ": " << to_string(table.error()) << '\n';
      return 1;
    }
    tables.push_back(*std::move(table));
    views.push_back(tables.back().view());
  }
  answer::answer_all(views.data());
}
