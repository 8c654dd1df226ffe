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

  int made = 0;
  auto make = [&] { return made++, std::string("made anew"); };
  expect(cache.read_or_make([](const std::string&) { return true; }, make) == binary && made == 0, "a kept binary is taken");
  expect(cache.read_or_make([](const std::string&) { return false; }, make) == "made anew" && made == 1,
         "one that the driver refuses is made anew");
  expect(cache.read() == "made anew", "and the new one is kept");
  expect(BinaryCache("another key").read_or_make([](const std::string&) { return true; }, make) == "made anew" && made == 2,
         "an absent one is made");
  cache.write(binary);

  for (const fs::path& path : {folder / "kernels", file}) {
    const auto before = fs::status(path).permissions();
    expect((before & (fs::perms::group_write | fs::perms::others_write)) == fs::perms::none, "only the owner may write");
    for (auto perms : {fs::perms::group_write, fs::perms::others_write}) {
      fs::permissions(path, before | perms);
      expect(cache.read().empty(), "what others can write is not read");
    }
    fs::permissions(path, before);
    expect(cache.read() == binary, "what they cannot is read again");
  }
  fs::permissions(folder / "kernels", fs::perms::all);
  cache.write("planted");
  fs::permissions(folder / "kernels", fs::perms::owner_all);
  expect(cache.read() == binary, "nor is such a folder written to");
  if (geteuid() == 0) {
    for (const fs::path& path : {folder / "kernels", file}) {
      expect(chown(path.c_str(), 12345, 12345) == 0, "the owner changes");
      expect(cache.read().empty(), "another user's is not read");
      expect(chown(path.c_str(), 0, 0) == 0, "the owner changes back");
    }
  }

  const fs::path old = folder / "kernels" / "0123.part-abcdef", fresh = folder / "kernels" / "0123.part-ghijkl";
  overwrite(old, "half"), overwrite(fresh, "half");
  fs::last_write_time(old, fs::file_time_type::clock::now() - std::chrono::hours(2));
  cache.write(binary);
  expect(!fs::exists(old) && fs::exists(fresh), "what a killed process left is removed, what is being written is not");

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
