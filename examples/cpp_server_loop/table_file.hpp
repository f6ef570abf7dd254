// SPDX-License-Identifier: Apache-2.0
/// A lookup table that is read again when its file changes, and when the process gets SIGHUP.
#pragma once

#include <csignal>
#include <pthread.h>

#include <atomic>
#include <cstdint>
#include <ctime>
#include <filesystem>
#include <iostream>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <utility>

#include "dsc_split/load.hpp"

/// Keeps the newest good table of a file. A thread of its own reads it, so requests never wait for a parser.
///
/// A request takes `current()` once and uses it to its end: whoever holds a table may use it, even if a newer one is
/// there by then. A file that is no table, or a table of other pairs than the engines that are loaded, changes
/// nothing; why is said on standard error.
class TableFile {
 public:
  using Table = std::shared_ptr<const dsc_split::LookupTable>;

  /// Reads the file and starts to watch it. Make it before any other thread, as SIGHUP gets blocked for them all.
  ///
  /// Throws std::runtime_error where there is no good table to start with.
  explicit TableFile(std::string path) : path_(std::move(path)) {
    sigemptyset(&hangup_);
    sigaddset(&hangup_, SIGHUP);
    pthread_sigmask(SIG_BLOCK, &hangup_, nullptr);
    seen_ = stamp();
    auto loaded = dsc_split::load(path_);
    if (!loaded) throw std::runtime_error(to_string(loaded.error()));
    table_ = std::make_shared<const dsc_split::LookupTable>(*std::move(loaded));
    watcher_ = std::thread([this] { watch(); });
  }

  ~TableFile() {
    stopping_ = true;
    pthread_kill(watcher_.native_handle(), SIGHUP);
    watcher_.join();
  }

  TableFile(const TableFile&) = delete;
  TableFile& operator=(const TableFile&) = delete;

  /// Gives the newest good table. Any thread may ask.
  [[nodiscard]] Table current() const {
    const std::lock_guard lock(mutex_);
    return table_;
  }

 private:
  /// What tells whether a file was replaced or written to.
  struct Stamp {
    std::filesystem::file_time_type written = {};
    std::uintmax_t size_bytes = 0;

    bool operator!=(const Stamp& other) const { return written != other.written || size_bytes != other.size_bytes; }
  };

  [[nodiscard]] Stamp stamp() const {
    std::error_code missing;  // a file that is not there has no stamp, and is read when it is back
    return {std::filesystem::last_write_time(path_, missing), std::filesystem::file_size(path_, missing)};
  }

  void watch() {
    const timespec interval{0, 500'000'000};
    while (!stopping_) {
      const bool asked = sigtimedwait(&hangup_, nullptr, &interval) == SIGHUP;
      if (stopping_) return;
      const Stamp now = stamp();  // taken before reading: what is written meanwhile is seen the next time
      if (!asked && !(now != seen_)) continue;
      seen_ = now;
      reload();
    }
  }

  void reload() {
    auto loaded = dsc_split::load(path_);
    if (!loaded) {
      std::cerr << "table kept: " << to_string(loaded.error()) << std::endl;
      return;
    }
    const auto next = std::make_shared<const dsc_split::LookupTable>(*std::move(loaded));
    if (next->view().pair_id != table_->view().pair_id) {
      std::cerr << "table kept: " << path_ << " is of other pairs than the engines; start again to change both"
                << std::endl;
      return;
    }
    const std::lock_guard lock(mutex_);
    table_ = next;
  }

  std::string path_;
  sigset_t hangup_ = {};
  Stamp seen_;  // of the watcher, once it runs
  mutable std::mutex mutex_;
  Table table_;  // written by the watcher alone
  std::atomic<bool> stopping_ = false;
  std::thread watcher_;
};
