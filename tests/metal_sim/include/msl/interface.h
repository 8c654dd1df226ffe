// What a translated kernel hands to the simulated GPU, without MSL's types.
#pragma once
namespace msl {
struct Post {
  void (*fn)(Post**, unsigned mask);
  const void* in;
  void* out;
  unsigned arg;
  unsigned line;
  const char* file;
  const char* name;
};
struct Param {
  int kind;
  int index;
  bool (*cond)();
  bool ro;
};
}  // namespace msl
