// Interface between translated kernels and the simulated GPU (runtime.cpp)
#pragma once
#include "msl/interface.h"
#include "msl/types.h"
namespace msl {
enum { MSL_BUF = 0, MSL_TG = 1, MSL_BUILTIN = 2 };
template <class T>
FCReg::FCReg(int idx, T* a, const char* n) : FCReg(idx, (void*)a, int(sizeof(T)), metal::is_floating_point_v<T> ? 1 : 0, n) {}
}  // namespace msl
using namespace msl;
#define msl_fcvar
extern "C" {
void msl_rt_barrier(int flags, uint line, const char* file);
void msl_rt_simd(msl::Post*);
void* msl_rt_tg(int site, size_t size, size_t align, const char* name);
int msl_rt_lane();
void msl_rt_atomic(void* p, int size);
extern int msl_sizes_sink;
}
namespace msl {
#define MSL_NOI __attribute__((disable_sanitizer_instrumentation))
template <class S>
inline S& tg_alloc(int site, const char* name) {
  return *(S*)msl_rt_tg(site, sizeof(S), alignof(S), name);
}
template <class A>
struct Get {
  static A get(Ctx& c, const Param& p) {
    const U3 v = c.val[p.index];
    if constexpr (comps<A>::n == 1)
      return A(v.x);
    else if constexpr (comps<A>::n == 2)
      return A(v.x, v.y);
    else
      return A(v.x, v.y, v.z);
  }
  static constexpr int size = 0;
};
template <class T>
struct Get<T*> {
  static T* get(Ctx& c, const Param& p) {
    if (p.cond && !p.cond()) return (T*)c.absent;
    return (T*)(p.kind == MSL_TG ? c.tg[p.index] : c.buf[p.index]);
  }
  static constexpr int size = 0;
};
template <class T>
struct Get<T&> {
  static T& get(Ctx& c, const Param& p) {
    T* q = Get<T*>::get(c, p);
    return *q;
  }
  static constexpr int size = sizeof(T);
};
template <int... I>
struct Seq {};
template <class F>
struct Bind;
template <class... A>
struct Bind<void (*)(A...)> {
  template <void (*fn)(A...)>
  MSL_NOI static void call(Ctx& c, const Param* p) {
    go<fn>(c, p, __make_integer_seq<ISeq, int, sizeof...(A)>());
  }
  template <class T, T... I>
  struct ISeq {};
  template <void (*fn)(A...), int... I>
  MSL_NOI static void go(Ctx& c, const Param* p, ISeq<int, I...>) {
    fn(Get<A>::get(c, p[I])...);
  }
};
}  // namespace msl
#include "msl/math.h"
#include "msl/simd.h"
