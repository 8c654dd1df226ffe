// Compiled kernels on disk.
#pragma once

#include <sys/stat.h>
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

namespace tqext::cuda {

// FNV-1a, 64 bits.
inline uint64_t hash(const std::string& text, uint64_t state) {
  for (const unsigned char c : text) state = (state ^ c) * 0x100000001b3ull;
  return state;
}

// Compiling takes seconds for each process: binaries are kept, by the hash of everything that they depend on. A folder that
// cannot be used, or a file that is not whole, only costs the compilation. The folder is that of models.cache_dir.
// The binaries run in this process's context, and no checksum tells who wrote them: a folder or file that others could have
// written to is not used.
class BinaryCache {
 public:
  explicit BinaryCache(const std::string& key) {
    std::filesystem::path folder;
    if (const char* chosen = std::getenv("TQEXT_CACHE"); chosen && *chosen) {
      folder = std::filesystem::path(chosen) / "kernels";
    } else if (const char* cache = std::getenv("XDG_CACHE_HOME"); cache && *cache) {
      folder = std::filesystem::path(cache) / "tqext" / "kernels";
    } else if (const char* home = std::getenv("HOME"); home && *home) {
      folder = std::filesystem::path(home) / ".cache" / "tqext" / "kernels";
    }
    if (folder.empty()) return;
    char name[40];
    std::snprintf(name, sizeof name, "%016llx%016llx", static_cast<unsigned long long>(hash(key, 0xcbf29ce484222325ull)),
                  static_cast<unsigned long long>(hash(key, 0x9e3779b97f4a7c15ull)));
    file_ = folder / name;
  }

  // Empty: not there.
  std::string read() const {
    if (file_.empty() || !is_ours_alone(file_.parent_path()) || !is_ours_alone(file_)) return {};
    std::ifstream in(file_, std::ios::binary);
    if (!in) return {};
    const std::string all((std::istreambuf_iterator<char>(in)), {});
    if (all.size() <= kSumBytes) return {};
    const std::string binary = all.substr(kSumBytes);
    return all.compare(0, kSumBytes, checksum(binary)) == 0 ? binary : std::string();
  }

  void write(const std::string& binary) const {
    if (file_.empty()) return;
    std::error_code error;
    const std::filesystem::path folder = file_.parent_path();
    std::filesystem::create_directories(folder.parent_path(), error);
    ::mkdir(folder.c_str(), 0700);
    if (!is_ours_alone(folder)) return;
    remove_leftovers();
    // Other processes, on this host or another, see all of the file or none.
    std::string part = file_.string() + kPart + "XXXXXX";
    const int descriptor = ::mkstemp(part.data());
    if (descriptor < 0) return;
    ::close(descriptor);
    {
      std::ofstream out(part, std::ios::binary);
      out << checksum(binary) << binary;
      if (!out.flush()) {
        out.close();
        std::filesystem::remove(part, error);
        return;
      }
    }
    std::filesystem::rename(part, file_, error);
    if (error) std::filesystem::remove(part, error);
  }

  // The kept binary, if `accepts(binary)`; else what `make()` returns, which is kept from then on. A binary can be whole and
  // still be refused, by another driver than the one it was made with.
  template <class Accepts, class Make>
  std::string read_or_make(const Accepts& accepts, const Make& make) const {
    if (std::string kept = read(); !kept.empty() && accepts(kept)) return kept;
    const std::string binary = make();
    write(binary);
    return binary;
  }

 private:
  static constexpr size_t kSumBytes = 16;
  static constexpr const char* kPart = ".part-";

  // Owned by this user, and nobody else may write to it.
  static bool is_ours_alone(const std::filesystem::path& path) {
    struct stat about;
    return ::stat(path.c_str(), &about) == 0 && about.st_uid == ::geteuid() && (about.st_mode & (S_IWGRP | S_IWOTH)) == 0;
  }

  // Of processes that were killed while they wrote: a file takes milliseconds.
  void remove_leftovers() const {
    std::error_code error;
    const auto old = std::filesystem::file_time_type::clock::now() - std::chrono::hours(1);
    for (std::filesystem::directory_iterator i(file_.parent_path(), error), end; !error && i != end; i.increment(error)) {
      std::error_code ignored;
      const bool is_part = i->path().filename().string().find(kPart) != std::string::npos;
      if (is_part && i->last_write_time(ignored) < old && !ignored) std::filesystem::remove(i->path(), ignored);
    }
  }

  static std::string checksum(const std::string& binary) {
    char text[kSumBytes + 1];
    std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(hash(binary, 0xcbf29ce484222325ull)));
    return text;
  }
  std::filesystem::path file_;
};

}  // namespace tqext::cuda
