// The kernels' cache on disk: what was written is read, what is damaged or absent is not, and a folder that cannot be used does
// no harm. Arguments: an empty folder, and a path below a file. Prints "ok".
#include "../../cuda/binary_cache.h"

#include <cstdio>

using tqext::cuda::BinaryCache;
namespace fs = std::filesystem;

namespace {

void expect(bool holds, const char* what) {
  if (holds) return;
  std::printf("not so: %s\n", what);
  std::exit(1);
}

void overwrite(const fs::path& file, const std::string& text) { std::ofstream(file, std::ios::binary) << text; }

}  // namespace

int main(int, char** arguments) {
  const fs::path folder = arguments[1];
  setenv("TQEXT_CACHE", folder.c_str(), 1);
  const std::string binary("a binary\0with a zero", 20);
  const BinaryCache cache("source and options");
  expect(cache.read().empty(), "nothing is there at first");
  cache.write(binary);
  expect(cache.read() == binary, "what was written is read");
  expect(BinaryCache("source and options").read() == binary, "by another process too");
  expect(BinaryCache("source and other options").read().empty(), "but not for another key");

  fs::path file;
  int n_files = 0;
  for (const auto& entry : fs::directory_iterator(folder / "kernels")) file = entry.path(), n_files++;
  expect(n_files == 1, "one file, and nothing beside it");
  std::ifstream in(file, std::ios::binary);
  const std::string whole((std::istreambuf_iterator<char>(in)), {});
  for (size_t n = 0; n < whole.size(); n++) {
    overwrite(file, whole.substr(0, n));
    expect(cache.read().empty(), "a file cut short is not read");
    std::string damaged = whole;
    damaged[n] ^= 1;
    overwrite(file, damaged);
    expect(cache.read().empty(), "a damaged file is not read");
  }
  cache.write(binary);
  expect(cache.read() == binary, "and is written again");

  setenv("TQEXT_CACHE", arguments[2], 1);
  const BinaryCache nowhere("source and options");
  nowhere.write(binary);
  expect(nowhere.read().empty(), "a folder that cannot be made does no harm");
  for (const char* name : {"TQEXT_CACHE", "XDG_CACHE_HOME", "HOME"}) unsetenv(name);
  const BinaryCache none("source and options");
  none.write(binary);
  expect(none.read().empty(), "nor does no folder");
  std::printf("ok\n");
}
