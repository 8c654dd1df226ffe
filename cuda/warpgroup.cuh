// What the attention of many query rows needs of the hardware: barriers between warps, loads of matrices from shared memory,
// products of whole warpgroups (compute capability 9.0, where WGMMA is set).
#pragma once

#include "device.cuh"

namespace tqext::cuda {

// ---- Barriers in shared memory, of any compute capability from 8.0 on ----

TQ_DEVICE void slot_barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
TQ_DEVICE void slot_barrier_arrive(uint32_t barrier) {
  asm volatile(
      "{\n"
      ".reg .b64 state;\n"
      "mbarrier.arrive.shared.b64 state, [%0];\n"
      "}" ::"r"(barrier)
      : "memory");
}
// Until the phase of this parity is over; the phase before the first counts as over.
TQ_DEVICE void slot_barrier_wait(uint32_t barrier, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
  barrier_wait(barrier, parity);
#else
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.test_wait.parity.shared.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
#endif
}
// Orders this thread's stores to shared memory before what the tensor cores of a warpgroup read there.
TQ_DEVICE void operand_fence() {
#if WGMMA
  copy_engine_fence();
#endif
}

// ---- Shared memory ----

TQ_DEVICE void store_shared(uint32_t address, const uint4& x) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}
TQ_DEVICE uint4 load_shared(uint32_t address) {
  uint4 x;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(address)
               : "memory");
  return x;
}
TQ_DEVICE void store_shared_half(uint32_t address, uint16_t x) {
  asm volatile("st.shared.b16 [%0], %1;" ::"r"(address), "h"(x) : "memory");
}
TQ_DEVICE void store_shared_word(uint32_t address, uint32_t x) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}
TQ_DEVICE void store_shared_float(uint32_t address, float x) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(x) : "memory");
}
TQ_DEVICE float2 load_shared_pair(uint32_t address) {
  float2 x;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(address) : "memory");
  return x;
}
TQ_DEVICE void load_matrices_shared(uint32_t (&x)[4], uint32_t address) { load_matrices(x[0], x[1], x[2], x[3], address); }
TQ_DEVICE void load_matrices_transposed(uint32_t (&x)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address)
               : "memory");
}

// ---- Arithmetic on pairs of halves ----

TQ_DEVICE uint32_t add_halves(uint32_t a, uint32_t b) {
  uint32_t y;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}
// a * b + c, rounded once.
TQ_DEVICE uint32_t multiply_add_halves(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t y;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(c));
  return y;
}

#if WGMMA
// ---- Products of 64 rows, 16 of each warp, by a warpgroup ----

template <int kRegisters>
TQ_DEVICE void set_registers_up() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
TQ_DEVICE void set_registers_down() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Before the first product that reads registers written by other instructions.
TQ_DEVICE void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
TQ_DEVICE void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
TQ_DEVICE void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps the compiler from moving uses of accumulators over a wait.
template <int n>
TQ_DEVICE void hold(float (&x)[n][4]) {
#pragma unroll
  for (int i = 0; i < n; i++) asm volatile("" : "+f"(x[i][0]), "+f"(x[i][1]), "+f"(x[i][2]), "+f"(x[i][3])::"memory");
}
// The same of operands in registers.
template <int n>
TQ_DEVICE void hold(uint32_t (&x)[n][4]) {
#pragma unroll
  for (int i = 0; i < n; i++) asm volatile("" : "+r"(x[i][0]), "+r"(x[i][1]), "+r"(x[i][2]), "+r"(x[i][3])::"memory");
}

// An operand in shared memory: rows of 128 bytes, swizzled, eight of them after 1024 bytes.
TQ_DEVICE uint64_t operand(uint32_t address) {
  constexpr uint64_t kEight = 1024 >> 4, kSwizzle128 = 1;
  return uint64_t((address & 0x3ffff) >> 4) | kEight << 16 | kEight << 32 | kSwizzle128 << 62;
}
// The same of a place, an address / 16, in one addition: the upper word is a constant. kApart: bytes between halves of 64
// columns, where it has two.
template <int kApart = 1024>
TQ_DEVICE uint64_t operand_at(uint32_t place) {
  constexpr uint32_t kEight = 1024 >> 4, kSwizzle128 = 1;
  return uint64_t(kEight | kSwizzle128 << 30) << 32 | (place + (uint32_t(kApart >> 4) << 16));
}

#define TQ_FOUR(x, i) "+f"(x[i][0]), "+f"(x[i][1]), "+f"(x[i][2]), "+f"(x[i][3])
#define TQ_SIXTEEN(x, i) TQ_FOUR(x, i), TQ_FOUR(x, i + 1), TQ_FOUR(x, i + 2), TQ_FOUR(x, i + 3)
#define TQ_REGISTERS_16 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}"
#define TQ_REGISTERS_32                                                                                                 \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30," \
  "%31}"

#define TQ_REGISTERS_64                                                                                                 \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30," \
  "%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,"    \
  "%59,%60,%61,%62,%63}"

// c[kAt ...] += 64 x 16 (registers) times 16 x 128 at b (a place), its halves kApart bytes apart.
template <int kAt, int kApart, int n>
TQ_DEVICE void multiply_group_128(float (&c)[n][4], const uint32_t (&a)[4], uint32_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 " TQ_REGISTERS_64 ", {%64,%65,%66,%67}, %68, 1, 1, 1, 1;"
               : TQ_SIXTEEN(c, kAt), TQ_SIXTEEN(c, kAt + 4), TQ_SIXTEEN(c, kAt + 8), TQ_SIXTEEN(c, kAt + 12)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(operand_at<kApart>(b)));
}
// The same times 16 x 64 or 16 x 32. kColumns: b's rows are its columns (keys), else its 16 (values).
template <int kAt, bool kColumns, int n>
TQ_DEVICE void multiply_group_64(float (&c)[n][4], const uint32_t (&a)[4], uint64_t b, bool add) {
  asm volatile(
      "{\n"
      ".reg .pred add;\n"
      "setp.ne.b32 add, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 " TQ_REGISTERS_32
      ", {%32,%33,%34,%35}, %36, add, 1, 1, %38;\n"
      "}"
      : TQ_SIXTEEN(c, kAt), TQ_SIXTEEN(c, kAt + 4)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)), "n"(kColumns ? 0 : 1));
}
template <int kAt, bool kColumns, int n>
TQ_DEVICE void multiply_group_32(float (&c)[n][4], const uint32_t (&a)[4], uint64_t b, bool add) {
  asm volatile(
      "{\n"
      ".reg .pred add;\n"
      "setp.ne.b32 add, %21, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 " TQ_REGISTERS_16
      ", {%16,%17,%18,%19}, %20, add, 1, 1, %22;\n"
      "}"
      : TQ_SIXTEEN(c, kAt)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)), "n"(kColumns ? 0 : 1));
}
// The same with both operands in shared memory, their rows the product's rows and columns.
template <int n>
TQ_DEVICE void multiply_group_shared(float (&c)[n][4], uint64_t a, uint64_t b, bool add) {
  asm volatile(
      "{\n"
      ".reg .pred add;\n"
      "setp.ne.b32 add, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 " TQ_REGISTERS_32
      ", %32, %33, add, 1, 1, 0, 0;\n"
      "}"
      : TQ_SIXTEEN(c, 0), TQ_SIXTEEN(c, 4)
      : "l"(a), "l"(b), "r"(int(add)));
}
#undef TQ_FOUR
#undef TQ_SIXTEEN
#undef TQ_REGISTERS_16
#undef TQ_REGISTERS_32
#undef TQ_REGISTERS_64
#endif

}  // namespace tqext::cuda
