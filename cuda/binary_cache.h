// Compiled kernels on disk.
#pragma once

#include <unistd.h>

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
    std::ifstream in(file_, std::ios::binary);
    if (file_.empty() || !in) return {};
    const std::string all((std::istreambuf_iterator<char>(in)), {});
    if (all.size() <= kSumBytes) return {};
    const std::string binary = all.substr(kSumBytes);
    return all.compare(0, kSumBytes, checksum(binary)) == 0 ? binary : std::string();
  }

  void write(const std::string& binary) const {
    if (file_.empty()) return;
    std::error_code error;
    std::filesystem::create_directories(file_.parent_path(), error);
    // Other processes see all of the file or none.
    std::filesystem::path part = file_;
    part += "." + std::to_string(::getpid());
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

 private:
  static constexpr size_t kSumBytes = 16;
  static std::string checksum(const std::string& binary) {
    char text[kSumBytes + 1];
    std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(hash(binary, 0xcbf29ce484222325ull)));
    return text;
  }
  std::filesystem::path file_;
};

}  // namespace tqext::cuda
