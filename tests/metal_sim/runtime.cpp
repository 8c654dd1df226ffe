// The simulated GPU: fibers, scheduler, barriers, simd exchange, shadow memory, C API.
// Compiled WITHOUT sanitizers; kernels are compiled with -fsanitize=thread in 'check' builds and
// their __tsan_* calls land in the hooks below (no TSan runtime involved).
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>
#include <xmmintrin.h>
#include <algorithm>
#include <chrono>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>
#include "msl/interface.h"
typedef unsigned int uint;
typedef unsigned long ulong;
typedef unsigned short ushort;
namespace msl {
struct KernelRec {
  Entry e;
  const Param* p;
  int n;
};
struct FCRec {
  void* addr;
  int size, kind;
  std::string name;
};
static std::map<std::string, KernelRec>& kernels() {
  static std::map<std::string, KernelRec> m;
  return m;
}
static std::map<int, FCRec>& fcs() {
  static std::map<int, FCRec> m;
  return m;
}
Reg::Reg(const char* name, Entry e, const Param* p, int n) { kernels()[name] = {e, p, n}; }
FCReg::FCReg(int idx, void* a, int s, int k, const char* n) { fcs()[idx] = {a, s, k, n}; }
}  // namespace msl
using namespace msl;
extern "C" void msl_switch(void** save, void* to);
#if defined(__x86_64__)
asm(R"(
.text
.globl msl_switch
.type msl_switch,@function
msl_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  popq %rcx
  jmpq *%rcx      # not ret: a mismatched return costs ~40 ns in the return-stack predictor
.size msl_switch,.-msl_switch
)");
#else
#error "add the aarch64 switch (x19-x30, d8-d15, sp)"
#endif
enum { READY, SIMD, BAR, DONE };
enum { OPT_CHECK_UNUSED = 1, OPT_RANDOM = 2, OPT_REVERSE = 4, OPT_PREEMPT = 8, OPT_ALLOW_DIVERGENT = 16, OPT_FLUSH = 32 };
struct Fiber {
  void* sp;
  int state;
  Post* post;
  uint bline;
  const char* bfile;
  int bflags;
};
struct Cell {
  uint wtid, wep, wsg, rtid, rep, rsg;
};
struct Region {
  uintptr_t a, b;
  std::string name;
  int kind; /*0 device,1 constant/ro,2 threadgroup*/
  bool out;
  uint startEp;
  ulong rd, wr;
};
struct Stats {
  ulong rd_dev, wr_dev, rd_tg, wr_tg, simd_ops, barriers, switches, threads, tg_bytes, unwritten, reports;
  double secs;
};
static const int MAXT = 1024;
static const size_t STK = 128 << 10;
static size_t ARENA = 0;  // bytes of the memory of the GPU
static const size_t PAGE = 4096;
static struct G {
  char* stacks;
  char* arena;
  size_t top;
  Cell* shadow;
  std::vector<uint32_t> page;
  std::vector<Region> regs;
  Fiber f[MAXT];
  void* mainsp;
  int cur;
  bool in;
  int nt;
  int nsg;
  int made;
  Entry entry;
  const Param* params;
  Ctx base;
  U3 tgpos, ngroups, gsize, tsz;
  uint tgIndex;
  uint tgdim[3];
  uint ep, epDev, epTg, dispatchEp;
  uint sgep[32];
  std::map<int, int> tgsite;
  std::vector<int> tgregs;
  size_t tgbytes;
  std::map<std::pair<uintptr_t, int>, int> seen;
  std::string report;
  int nrep;
  bool abort;
  Stats st;
  ulong rng;
  uint opt;
  char* rep_out;
  size_t rep_cap;
  long preempt;
} g;
static ulong rnd() {
  g.rng ^= g.rng << 13;
  g.rng ^= g.rng >> 7;
  g.rng ^= g.rng << 17;
  return g.rng;
}
extern "C" char __ehdr_start, _end;
static void report(uintptr_t key, int kind, const char* fmt, ...) {
  int& n = g.seen[{key, kind}];
  g.st.reports++;
  if (n++ || g.nrep >= 40) return;
  g.nrep++;
  char b[1024];
  va_list ap;
  va_start(ap, fmt);
  vsnprintf(b, sizeof b, fmt, ap);
  va_end(ap);
  g.report += b;
  g.report += "\n";
}
static void to_main() { msl_switch(&g.f[g.cur].sp, g.mainsp); }
static void fatal() {
  g.abort = true;
  to_main();
  __builtin_trap();
}
static void fiber_main();
static void new_fiber(int i) {
  char* top = g.stacks + (i + 1) * STK - (i % 64) * 1088;  // colouring: stacks must not share one cache set
  void** sp = (void**)((uintptr_t)top & ~15ul);
  *--sp = 0;
  *--sp = (void*)fiber_main;
  for (int k = 0; k < 6; k++) *--sp = 0;
  g.f[i].sp = sp;
}
static U3 u3(uint x, uint y, uint z) { return {x, y, z, 0}; }
static void fiber_main() {
  for (;;) {
    int i = g.cur;
    Ctx c = g.base;
    uint X = g.tgdim[0], Y = g.tgdim[1];
    uint x = i % X, y = i / X % Y, z = i / (X * Y);
    c.val[1] = u3(g.tgpos.x * g.tsz.x + x, g.tgpos.y * g.tsz.y + y, g.tgpos.z * g.tsz.z + z);
    c.val[2] = g.gsize;
    c.val[3] = u3(x, y, z);
    c.val[4] = u3(g.tgdim[0], g.tgdim[1], g.tgdim[2]);
    c.val[5] = g.tgpos;
    c.val[6] = g.ngroups;
    c.val[7] = u3(i, 0, 0);
    c.val[8] = u3(i / 32, 0, 0);
    c.val[9] = u3(i % 32, 0, 0);
    c.val[10] = u3((g.nt + 31) / 32, 0, 0);
    c.val[11] = u3(32, 0, 0);
    c.val[12] = u3(i % 4, 0, 0);
    c.val[13] = u3(i / 4, 0, 0);
    g.entry(c, g.params);
    g.f[i].state = DONE;
    to_main();
  }
}
extern "C" void msl_rt_simd(Post* p) {
  Fiber& f = g.f[g.cur];
  f.post = p;
  f.state = SIMD;
  to_main();
}
extern "C" void msl_rt_barrier(int fl, uint line, const char* file) {
  Fiber& f = g.f[g.cur];
  f.state = BAR;
  f.bflags = fl;
  f.bline = line;
  f.bfile = file;
  to_main();
}
extern "C" int msl_rt_lane() { return g.cur & 31; }
static int add_region(size_t n, const char* name, int kind, bool out) {
  g.top = (g.top + PAGE - 1) / PAGE * PAGE + PAGE;  // one guard page before
  size_t off = g.top;
  g.top += n + PAGE;
  if (g.top > ARENA) {
    fprintf(stderr, "metalsim: arena full\n");
    abort();
  }
  g.regs.push_back({(uintptr_t)g.arena + off, (uintptr_t)g.arena + off + n, name, kind, out, g.ep, 0, 0});
  if (g.page.size() < ARENA / PAGE) g.page.resize(ARENA / PAGE, 0);
  for (size_t p = off / PAGE; p <= (off + n + PAGE - 1) / PAGE; p++) g.page[p] = g.regs.size();
  g.page[off / PAGE - 1] = g.regs.size();
  return g.regs.size() - 1;
}
extern "C" void* msl_rt_tg(int site, size_t n, size_t, const char* name) {
  auto it = g.tgsite.find(site);
  if (it == g.tgsite.end()) {
    int r = add_region(n, name, 2, false);
    it = g.tgsite.emplace(site, r).first;
    g.tgregs.push_back(r);
    g.tgbytes += n;
    memset((void*)g.regs[r].a, 0xFF, n);
    if (g.tgbytes > 32768) report(site, 90, "threadgroup memory %zu bytes > 32768", g.tgbytes);
  }
  return (void*)g.regs[it->second].a;
}
// ---- memory hooks -------------------------------------------------------------------------
static const char* kindname(int w) { return w ? "write" : "read"; }
static void bad(uintptr_t ra, int kind, uintptr_t a, int n, bool w, const char* what, Region* r) {
  uintptr_t rel = ra - (uintptr_t)&__ehdr_start - 1;
  report(ra, kind, "@%lx %s: %s of %d bytes at %s%+ld (size %ld) thread %d of threadgroup (%u,%u,%u)", (ulong)rel, what,
         kindname(w), n, r ? r->name.c_str() : "?", r ? (long)(a - r->a) : (long)a, r ? (long)(r->b - r->a) : 0L, g.cur,
         g.tgpos.x, g.tgpos.y, g.tgpos.z);
}
static inline bool ordered(uint tid, uint ep, uint sg, uint mytid, uint base, uint dispatchEp, int kind, int mysg) {
  if (kind == 0 && tid / MAXT != mytid / MAXT) return ep < dispatchEp;  // other threadgroup: only a dispatch boundary orders
  if (ep < base) return true;
  int psg = (tid % MAXT) / 32;
  return psg == mysg && sg < g.sgep[mysg];
}
static void access(uintptr_t a, int n, bool w, uintptr_t ra, bool atomic = false) {
  if (a - (uintptr_t)g.stacks < MAXT * STK || !g.in) return;
  uintptr_t off = a - (uintptr_t)g.arena;
  if (off >= ARENA) {
    if (a >= (uintptr_t)&__ehdr_start && a < (uintptr_t)&_end) return;
    bad(ra, 1, a, n, w, "WILD POINTER", nullptr);
    fatal();
  }
  uint ri = g.page[off / PAGE];
  if (!ri) {
    bad(ra, 1, a, n, w, "WILD POINTER", nullptr);
    fatal();
  }
  Region& r = g.regs[ri - 1];
  if (a < r.a || a + n > r.b) {
    bad(ra, 2, a, n, w, "OUT OF BOUNDS", &r);
    if (w) fatal();
    return;
  }
  (w ? r.wr : r.rd) += n;
  if (r.kind == 1) {
    if (w) bad(ra, 3, a, n, w, "WRITE TO CONST BUFFER", &r);
    return;
  }
  uint mytid = g.tgIndex * MAXT + g.cur, mysg = g.cur / 32;
  uint base = r.kind == 2 ? g.epTg : g.epDev;
  Cell* c = g.shadow + off;
  for (int k = 0; k < n; k++, c++) {
    if (c->wep > 0 && c->wtid != mytid && c->wep >= std::min(base, g.dispatchEp) && !atomic &&
        !ordered(c->wtid, c->wep, c->wsg, mytid, base, g.dispatchEp, r.kind, mysg)) {
      bad(ra, 4, a, n, w, w ? "RACE write-after-write" : "RACE read-after-write", &r);
      report(ra, 5, "    previous write by thread %u of threadgroup #%u", c->wtid % MAXT, c->wtid / MAXT);
    }
    if (w) {
      if (c->rep > 0 && c->rtid != mytid && !atomic) {
        bool race;
        if (c->rtid == 0xFFFFFFFFu)
          race = c->rep >= base;
        else
          race = !ordered(c->rtid, c->rep, c->rsg, mytid, base, g.dispatchEp, r.kind, mysg);
        if (race) bad(ra, 6, a, n, w, "RACE write-after-read", &r);
      }
      c->wtid = mytid;
      c->wep = g.ep;
      c->wsg = g.sgep[mysg];
    } else {
      if (c->wep < r.startEp || (r.kind == 0 && r.out && c->wep < g.dispatchEp))
        if (r.kind == 2 || r.out) bad(ra, 7, a, n, w, "READ OF UNINITIALISED MEMORY", &r);
      if (c->rep == g.ep && c->rtid != mytid && c->rtid / 32 != mytid / 32)
        c->rtid = 0xFFFFFFFFu;
      else if (!(c->rep == g.ep && c->rtid == 0xFFFFFFFFu)) {
        c->rtid = mytid;
        c->rsg = g.sgep[mysg];
      }
      c->rep = g.ep;
    }
  }
  if ((g.opt & OPT_PREEMPT) && --g.preempt <= 0) {
    g.preempt = 1 + rnd() % 61;
    g.st.switches++;
    to_main();
  }
}
#define RA (uintptr_t)__builtin_return_address(0)
#define HOOK(n)                                                                             \
  extern "C" void __tsan_read##n(void* p) { access((uintptr_t)p, n, false, RA); }           \
  extern "C" void __tsan_write##n(void* p) { access((uintptr_t)p, n, true, RA); }           \
  extern "C" void __tsan_unaligned_read##n(void* p) { access((uintptr_t)p, n, false, RA); } \
  extern "C" void __tsan_unaligned_write##n(void* p) { access((uintptr_t)p, n, true, RA); } \
  extern "C" void __tsan_read_write##n(void* p) {                                           \
    access((uintptr_t)p, n, false, RA);                                                     \
    access((uintptr_t)p, n, true, RA);                                                      \
  }                                                                                         \
  extern "C" void __tsan_unaligned_read_write##n(void* p) {                                 \
    access((uintptr_t)p, n, false, RA);                                                     \
    access((uintptr_t)p, n, true, RA);                                                      \
  }                                                                                         \
  extern "C" void __tsan_volatile_read##n(void* p) { access((uintptr_t)p, n, false, RA); }  \
  extern "C" void __tsan_volatile_write##n(void* p) { access((uintptr_t)p, n, true, RA); }
HOOK(1) HOOK(2) HOOK(4) HOOK(8) HOOK(16) extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_vptr_update(void**, void*) {}
extern "C" void __tsan_vptr_read(void**) {}
static void range(uintptr_t a, size_t n, bool w, uintptr_t ra) {
  for (size_t k = 0; k < n; k += 16) access(a + k, (int)std::min<size_t>(16, n - k), w, ra);
}
extern "C" void* __tsan_memcpy(void* d, const void* s, size_t n) {
  range((uintptr_t)s, n, false, RA);
  range((uintptr_t)d, n, true, RA);
  return memcpy(d, s, n);
}
extern "C" void* __tsan_memmove(void* d, const void* s, size_t n) {
  range((uintptr_t)s, n, false, RA);
  range((uintptr_t)d, n, true, RA);
  return memmove(d, s, n);
}
extern "C" void* __tsan_memset(void* d, int v, size_t n) {
  range((uintptr_t)d, n, true, RA);
  return memset(d, v, n);
}
extern "C" void msl_rt_atomic(void* p, int n) { access((uintptr_t)p, n, true, RA, true); }
// ---- UBSan handlers (subset): report and go on ------------------------------------------------
struct SrcLoc {
  const char* file;
  uint line, col;
};
static void ub(SrcLoc* l, const char* what, bool fat) {
  report((uintptr_t)l, 20, "%s:%u:%u UB: %s thread %d of threadgroup (%u,%u,%u)", l->file, l->line, l->col, what, g.cur,
         g.tgpos.x, g.tgpos.y, g.tgpos.z);
  if (fat) fatal();
}
#define UB(n, what, fat)                                                   \
  extern "C" void __ubsan_handle_##n(SrcLoc* d, ...) { ub(d, what, fat); } \
  extern "C" void __ubsan_handle_##n##_abort(SrcLoc* d, ...) { ub(d, what, fat); }
// clang-format off
UB(out_of_bounds, "array index out of bounds", true)
UB(divrem_overflow, "integer division by zero / overflow", true)
UB(shift_out_of_bounds, "shift amount out of range", false)
UB(float_cast_overflow, "float to integer conversion out of range", false)
UB(add_overflow, "signed add overflow", false)
UB(sub_overflow, "signed sub overflow", false)
UB(mul_overflow, "signed mul overflow", false) UB(negate_overflow, "negate overflow", false)
    UB(load_invalid_value, "invalid bool/enum value", false)
        UB(builtin_unreachable, "unreachable", true) extern "C" void __ubsan_handle_type_mismatch_v1(SrcLoc* d, uintptr_t p) {
  // clang-format on
  struct TM {
    SrcLoc l;
    void* t;
    unsigned char logal;
    unsigned char kind;
  };
  TM* t = (TM*)d;
  ulong al = 1ul << t->logal;
  if (p < 4096)
    ub(d, "null pointer (unbound buffer?)", true);
  else if (p & (al - 1))
    ub(d, "misaligned access", false);
}
extern "C" void __ubsan_handle_type_mismatch_v1_abort(SrcLoc* d, uintptr_t p) { __ubsan_handle_type_mismatch_v1(d, p); }
// ---- scheduler ------------------------------------------------------------------------------
static void resolve(int sg) {
  int lo = sg * 32, hi = std::min(g.nt, lo + 32);
  uint live = 0, wait = 0;
  for (int i = lo; i < hi; i++) {
    if (g.f[i].state != DONE) live |= 1u << (i - lo);
    if (g.f[i].state == SIMD) wait |= 1u << (i - lo);
  }
  uint todo = wait;
  while (todo) {
    int l0 = __builtin_ctz(todo);
    Post* a = g.f[lo + l0].post;
    uint m = 0;
    Post* ps[32] = {};
    for (int l = l0; l < 32; l++)
      if (todo >> l & 1) {
        Post* b = g.f[lo + l].post;
        if (b->fn == a->fn && b->line == a->line && b->name == a->name && !strcmp(b->file, a->file)) {
          m |= 1u << l;
          ps[l] = b;
        }
      }
    todo &= ~m;
    uint full = hi - lo == 32 ? 0xFFFFFFFFu : (1u << (hi - lo)) - 1;
    if (m != full && !(g.opt & OPT_ALLOW_DIVERGENT)) {
      report((uintptr_t)a->line * 131 + (m == live ? 0 : 1), 10,
             "%s:%u DIVERGENT %s: lanes %08x of %08x reach it%s (simdgroup %d of threadgroup "
             "(%u,%u,%u))",
             a->file, a->line, a->name, m, full,
             m == live           ? ", the others returned"
             : todo || m != wait ? ", others are at another simd op"
                                 : ", others wait at a threadgroup_barrier or diverged",
             sg, g.tgpos.x, g.tgpos.y, g.tgpos.z);
    }
    if (a->fn) {
      g.st.simd_ops++;
      a->fn(ps, m);
    } else
      g.sgep[sg]++;
    for (int l = 0; l < 32; l++)
      if (m >> l & 1) g.f[lo + l].state = READY;
  }
}
static bool run_group() {
  int nt = g.nt;
  g.nsg = (nt + 31) / 32;
  g.epDev = g.epTg = ++g.ep;
  for (int i = 0; i < nt; i++) g.f[i].state = READY;
  for (int r : g.tgregs) {
    Region& R = g.regs[r];
    R.startEp = g.ep;
    memset((void*)R.a, 0xFF, R.b - R.a);
  }
  int order[32], lanes[32];
  for (;;) {
    for (int i = 0; i < g.nsg; i++) order[i] = (g.opt & OPT_REVERSE) ? g.nsg - 1 - i : i;
    if (g.opt & OPT_RANDOM)
      for (int i = g.nsg - 1; i > 0; i--) std::swap(order[i], order[rnd() % (i + 1)]);
    bool again = true;
    while (again) {
      again = false;
      for (int o = 0; o < g.nsg; o++) {
        int sg = order[o], lo = sg * 32, n = std::min(32, nt - lo);
        for (;;) {
          for (int i = 0; i < n; i++) lanes[i] = (g.opt & OPT_REVERSE) ? n - 1 - i : i;
          if (g.opt & OPT_RANDOM)
            for (int i = n - 1; i > 0; i--) std::swap(lanes[i], lanes[rnd() % (i + 1)]);
          for (int i = 0; i < n; i++) {
            Fiber& f = g.f[lo + lanes[i]];
            if (f.state == READY) {
              g.cur = lo + lanes[i];
              g.st.switches++;
              g.in = true;
              msl_switch(&g.mainsp, f.sp);
              g.in = false;
              if (g.abort) return false;
            }
          }
          bool ready = false, simd = false;
          for (int i = 0; i < n; i++) {
            int s = g.f[lo + i].state;
            ready |= s == READY;
            simd |= s == SIMD;
          }
          if (!ready && simd) {
            resolve(sg);
            ready = true;
          }
          if (!ready) break;
          if (g.opt & (OPT_RANDOM | OPT_PREEMPT)) {
            again = true;
            if (rnd() & 1) break;
          }  // let another simdgroup overtake
        }
      }
    }
    int nb = 0, nd = 0;
    Fiber* b0 = nullptr;
    int flags = 0;
    for (int i = 0; i < nt; i++) {
      Fiber& f = g.f[i];
      if (f.state == BAR) {
        nb++;
        flags |= f.bflags;
        if (!b0)
          b0 = &f;
        else if (f.bline != b0->bline && !(g.opt & OPT_ALLOW_DIVERGENT))
          report(f.bline, 11, "%s:%u DIVERGENT BARRIER: other threads wait at line %u", f.bfile, f.bline, b0->bline);
      } else if (f.state == DONE)
        nd++;
    }
    if (!nb) return true;
    if (nd && !(g.opt & OPT_ALLOW_DIVERGENT))
      report(b0->bline, 12,
             "%s:%u DIVERGENT BARRIER: %d of %d threads have returned without reaching it "
             "(threadgroup (%u,%u,%u))",
             b0->bfile, b0->bline, nd, nt, g.tgpos.x, g.tgpos.y, g.tgpos.z);
    g.st.barriers++;
    g.ep++;
    if (flags & 1) g.epDev = g.ep;
    if (flags & 2) g.epTg = g.ep;
    for (int i = 0; i < nt; i++)
      if (g.f[i].state == BAR) g.f[i].state = READY;
  }
}
// ---- C API ------------------------------------------------------------------------------------
static ulong buf_rd[32],
    buf_wr[32];  // bytes moved per buffer index by the last dispatch (check builds)
extern "C" {
void msl_buffer_bytes(ulong* rd, ulong* wr) {
  memcpy(rd, buf_rd, sizeof buf_rd);
  memcpy(wr, buf_wr, sizeof buf_wr);
}
int msl_count() { return kernels().size(); }
const char* msl_name(int i) {
  auto it = kernels().begin();
  std::advance(it, i);
  return it->first.c_str();
}
int msl_params(const char* k, int* out, int cap) {
  auto it = kernels().find(k);
  if (it == kernels().end()) return -1;
  int n = 0;
  for (int i = 0; i < it->second.n && n + 3 <= cap; i++) {
    auto& p = it->second.p[i];
    out[n++] = p.kind;
    out[n++] = p.index;
    out[n++] = p.ro | (p.cond ? 2 : 0);
  }
  return n / 3;
}
int msl_set_fc(int idx, double v) {
  auto it = fcs().find(idx);
  if (it == fcs().end()) return -1;
  FCRec& f = it->second;
  if (f.kind == 1) {
    if (f.size == 4)
      *(float*)f.addr = v;
    else
      return -2;
  } else {
    long x = (long)v;
    memcpy(f.addr, &x, f.size);
  }
  return 0;
}
}
// Memory that costs nothing until it is written.
static char* reserve(size_t n) {
  void* p = mmap(0, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) {
    fprintf(stderr, "metalsim: no room for %zu bytes\n", n);
    abort();
  }
  return (char*)p;
}
// A buffer of gigabytes is memory that nobody has touched but for some pages: a test of far offsets. Only those are copied.
static void copy_in(char* to, const char* from, size_t n) {
  if (n < 1ul << 30) {
    memcpy(to, from, n);
    return;
  }
  madvise(to, (n + PAGE - 1) / PAGE * PAGE, MADV_DONTNEED);
  const size_t system_page = (size_t)sysconf(_SC_PAGESIZE);
  const int map = open("/proc/self/pagemap", O_RDONLY);  // eight bytes a page; the highest bits: in memory, swapped out
  std::vector<ulong> pages(1 << 16);
  const uintptr_t begin = (uintptr_t)from, end = begin + n;
  uintptr_t at = begin / system_page * system_page;
  while (at < end) {
    const size_t wanted = std::min(pages.size(), (end - at + system_page - 1) / system_page);
    if (map < 0 || pread(map, pages.data(), wanted * 8, at / system_page * 8) != (ssize_t)(wanted * 8)) {
      fprintf(stderr, "metalsim: cannot read /proc/self/pagemap\n");
      abort();
    }
    for (size_t i = 0; i < wanted; i++, at += system_page) {
      if (!(pages[i] >> 62)) continue;
      const uintptr_t first = std::max(at, begin), last = std::min(at + system_page, end);
      memcpy(to + (first - begin), (const void*)first, last - first);
    }
  }
  close(map);
}
extern "C" {
struct BufArg {
  int index;
  int out;
  void* p;
  ulong n;
};
int msl_dispatch(const char* kname, const BufArg* bufs, int nbuf, const uint* tgmem, const uint* grid, const uint* tg,
                 ulong seed, uint opt, Stats* st, char* rep, size_t cap) {
  auto it = kernels().find(kname);
  if (it == kernels().end()) {
    snprintf(rep, cap, "no kernel %s", kname);
    return -1;
  }
  if ((ulong)tg[0] * tg[1] * tg[2] > MAXT) {
    snprintf(rep, cap, "threadgroup of %lu threads > 1024", (ulong)tg[0] * tg[1] * tg[2]);
    return -2;
  }
  size_t need = 2ul << 30;
  for (int i = 0; i < nbuf; i++) need += bufs[i].n + 4 * PAGE;
  if (!g.arena) {
    g.stacks = (char*)mmap(0, MAXT * STK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    g.ep = 1;
  }
  if (need > ARENA) {
    if (g.arena) munmap(g.arena, ARENA), munmap(g.shadow, ARENA * sizeof(Cell));
    ARENA = need;
    g.arena = reserve(ARENA);
    g.shadow = (Cell*)reserve(ARENA * sizeof(Cell));
    g.page.resize(ARENA / PAGE + 1, 0);
  }
  auto t0 = std::chrono::steady_clock::now();
  for (size_t p = 0; p <= g.top / PAGE + 1 && p < g.page.size(); p++) g.page[p] = 0;
  g.top = 0;
  g.regs.clear();
  g.tgsite.clear();
  g.tgregs.clear();
  g.tgbytes = 0;
  g.seen.clear();
  g.report.clear();
  g.nrep = 0;
  g.abort = false;
  memset(&g.st, 0, sizeof g.st);
  g.rng = seed * 0x9E3779B97F4A7C15ul + 88172645463325252ul;
  g.opt = opt;
  g.preempt = 1;
  g.dispatchEp = ++g.ep;
  KernelRec& K = it->second;
  g.entry = K.e;
  g.params = K.p;
  memset(&g.base, 0, sizeof g.base);
  std::vector<int> rix(nbuf);
  for (int i = 0; i < nbuf; i++) {
    bool ro = true;
    for (int k = 0; k < K.n; k++)
      if (K.p[k].kind == 0 && K.p[k].index == bufs[i].index) ro = K.p[k].ro;
    rix[i] = add_region(bufs[i].n, ("buffer(" + std::to_string(bufs[i].index) + ")").c_str(), ro ? 1 : 0, bufs[i].out);
    Region& R = g.regs[rix[i]];
    if (bufs[i].out)
      memset((void*)R.a, 0xFF, bufs[i].n);
    else
      copy_in((char*)R.a, (const char*)bufs[i].p, bufs[i].n);
    g.base.buf[bufs[i].index] = (void*)R.a;
  }
  for (int i = 0; i < 32; i++)
    if (tgmem[i]) {
      int r = add_region(tgmem[i], ("threadgroup(" + std::to_string(i) + ")").c_str(), 2, false);
      g.tgregs.push_back(r);
      g.base.tg[i] = (void*)g.regs[r].a;
      g.tgbytes += tgmem[i];
    }
  for (int k = 0; k < K.n; k++)
    if (!(K.p[k].cond && !K.p[k].cond())) {
      if (K.p[k].kind == 0 && !g.base.buf[K.p[k].index])  // unbound: an empty region, so that only
                                                          // an access is an error (as on the GPU)
        g.base.buf[K.p[k].index] =
            (void*)g.regs[add_region(0, ("UNBOUND buffer(" + std::to_string(K.p[k].index) + ")").c_str(), 1, false)].a;
      if (K.p[k].kind == 1 && !g.base.tg[K.p[k].index]) report(k, 31, "threadgroup(%d) has no memory set", K.p[k].index);
    }
  g.base.absent = (void*)g.regs[add_region(0, "ABSENT argument (its function_constant is false)", 1, false)].a;
  uint ng[3], total[3];
  for (int d = 0; d < 3; d++) {
    ng[d] = grid[d];
    total[d] = grid[d] * tg[d];
  }
  g.ngroups = u3(ng[0], ng[1], ng[2]);
  g.gsize = u3(total[0], total[1], total[2]);
  g.tsz = u3(tg[0], tg[1], tg[2]);
  ulong N = (ulong)ng[0] * ng[1] * ng[2];
  std::vector<uint> perm(N);
  for (ulong i = 0; i < N; i++) perm[i] = (opt & OPT_REVERSE) ? N - 1 - i : i;
  if (opt & OPT_RANDOM)
    for (ulong i = N - 1; i > 0 && N; i--) std::swap(perm[i], perm[rnd() % (i + 1)]);
  for (int i = 0; i < (int)(tg[0] * tg[1] * tg[2]); i++) new_fiber(i);
  int rc = 0;
  // Fibers share the processor's state: subnormal floats are zero, as operands and as results.
  const uint control = _mm_getcsr();
  if (opt & OPT_FLUSH) _mm_setcsr(control | 0x8040);
  for (ulong k = 0; k < N && !rc; k++) {
    uint id = perm[k];
    g.tgIndex = id & 0x3FFFFF;
    g.tgpos = u3(id % ng[0], id / ng[0] % ng[1], id / (ng[0] * ng[1]));
    uint p[3] = {g.tgpos.x, g.tgpos.y, g.tgpos.z};
    for (int d = 0; d < 3; d++) g.tgdim[d] = std::min(tg[d], total[d] - p[d] * tg[d]);
    g.nt = g.tgdim[0] * g.tgdim[1] * g.tgdim[2];
    g.st.threads += g.nt;
    if (!run_group()) rc = 1;
  }
  _mm_setcsr(control);
  memset(buf_rd, 0, sizeof buf_rd);
  memset(buf_wr, 0, sizeof buf_wr);
  for (int i = 0; i < nbuf; i++) {
    Region& R = g.regs[rix[i]];
    buf_rd[bufs[i].index] = R.rd;
    buf_wr[bufs[i].index] = R.wr;
    if (R.kind == 0) {
      memcpy(bufs[i].p, (void*)R.a, bufs[i].n);
      if (bufs[i].out && R.wr) {
        ulong u = 0;
        Cell* c = g.shadow + (R.a - (uintptr_t)g.arena);
        for (ulong k = 0; k < bufs[i].n; k++) u += c[k].wep < g.dispatchEp;
        if (u) report(i, 40, "OUTPUT NOT COVERED: %lu of %lu bytes of %s never written", u, bufs[i].n, R.name.c_str());
        g.st.unwritten += u;
      }
    }
    g.st.rd_dev += R.rd;
    g.st.wr_dev += R.wr;
  }
  for (int r : g.tgregs) {
    g.st.rd_tg += g.regs[r].rd;
    g.st.wr_tg += g.regs[r].wr;
  }
  g.st.tg_bytes = g.tgbytes;
  g.st.secs = std::chrono::duration<double>(std::chrono::steady_clock::now() - t0).count();
  *st = g.st;
  snprintf(rep, cap, "%s", g.report.c_str());
  return rc;
}
}
// bfloat rounding (compiler-rt symbol; gcc 12's libgcc lacks it): round to nearest even
extern "C" __bf16 __truncsfbf2(float f) {
  uint u;
  memcpy(&u, &f, 4);
  ushort r = (u & 0x7fffffff) > 0x7f800000 ? ushort(u >> 16 | 64) : ushort((u + 0x7fff + (u >> 16 & 1)) >> 16);
  __bf16 b;
  memcpy(&b, &r, 2);
  return b;
}
extern "C" __bf16 __truncdfbf2(double d) { return __truncsfbf2((float)d); }
