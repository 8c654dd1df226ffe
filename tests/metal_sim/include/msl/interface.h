// What translated kernels and the simulated GPU hand to each other, without MSL's types.
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
struct alignas(16) U3 {
  unsigned x, y, z, pad;
};
struct Ctx {
  void* buf[32];
  void* tg[32];
  U3 val[14];
  void* absent;
};
typedef void (*Entry)(Ctx&, const Param*);
struct Reg {
  Reg(const char* name, Entry e, const Param* p, int n);
};
struct FCReg {
  FCReg(int idx, void* addr, int size, int kind, const char* name);
  template <class T>
  FCReg(int idx, T* a, const char* n);
};
}  // namespace msl
