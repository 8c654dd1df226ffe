// Products of many rows of x with 1-bit weights (format.h) by fp16 tensor cores, in two launches.
//
// A weight is its group's scale, an fp16 number, with the sign bit of the weight: the operand in registers. Two bits of a word,
// 16 apart, become two of them by one shift and one three-input logic operation; nothing is rounded, and the products of all
// groups meet in one fp32 sum.
//
// A lane of a product multiplies four of 16 columns. It takes whole words of the weights, so the columns are in another order:
// q1_gemm_prepare writes x in that order, as fp16 tiles that q1_gemm copies as they lie, swizzled as the tensor cores want
// them. bf16 rows are scaled by a power of two, which the result is multiplied with.
//
// q1_gemm: four warpgroups and a warp that copies. p.shares warpgroups share 64 rows of the weight: each takes every
// p.shares-th span of four groups. A block stays on its multiprocessor and takes tile after tile: the copies of the next are
// under way while results are written.
//
// Compile-time: OPERATION (params.h), TYPE; of the product: COLUMNS (rows of x in a tile), WGMMA (and copies by the copy
// engine).
#include "device.cuh"
#include "warpgroup.cuh"

namespace tqext::cuda {
namespace {

constexpr int kType = TYPE;
constexpr int kSpan = kGemmSpan;         // groups
constexpr int kRowBytes = 2 * kQ1Group;  // of a row of x in a stage: two runs of 64 columns
constexpr int kSteps = kQ1Group / 16;    // products of a stage

}  // namespace

#if OPERATION == 4
// A block per row; rows and spans that fill up the last tile are zero.
extern "C" __global__ void __launch_bounds__(kGemmPrepareThreads) q1_gemm_prepare(const __grid_constant__ Q1GemmParams p) {
  const int input = blockIdx.x, tile = input / p.columns, row = input % p.columns, n_columns = p.n_groups * kQ1Group;
  const bool there = input < p.n_inputs;
  const int64_t first = int64_t(input) * p.x_stride[0];
  float up = 1;
  if constexpr (kType == kTypeBFloat16) {
    __shared__ float tops[kGemmPrepareThreads / 32];
    float top = 0;
    if (there) {
      for (int c = threadIdx.x; c < n_columns; c += kGemmPrepareThreads) {
        top = max_nan(top, fabsf(load_element<kType>(p.x, first + c * p.x_stride[1])));
      }
    }
#pragma unroll
    for (int o = 1; o < 32; o <<= 1) top = max_nan(top, __shfl_xor_sync(kAllLanes, top, o));
    if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = top;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kGemmPrepareThreads / 32; i++) top = max_nan(top, tops[i]);
    // Eight significant bits are exact down to 2^-31 of the row's largest.
    const int exponent = min(max(int(__float_as_uint(top) >> 23) - 126, -100), 128);  // top < 2^exponent
    up = power_of_two(15 - exponent);
    if (threadIdx.x == 0 && blockIdx.y == 0) p.factors[input] = power_of_two(exponent - 15);
  }
  const int stage_bytes = p.columns * kRowBytes, n_units = p.n_spans * kSpan * 16;
  char* to = static_cast<char*>(p.prepared) + int64_t(tile) * p.n_spans * kSpan * stage_bytes;
  for (int unit = blockIdx.y * kGemmPrepareThreads + threadIdx.x; unit < n_units; unit += gridDim.y * kGemmPrepareThreads) {
    // Stage i of a span holds word i of the span's groups. Bits b and b + 16 of group j are the two columns of lane j.
    const int stage = unit / 16, span = stage / kSpan, i = stage % kSpan, b = unit % 16;
    uint32_t pairs[kSpan];
#pragma unroll
    for (int j = 0; j < kSpan; j++) {
      const int group = kSpan * span + j;
      float x[2] = {};
      if (there && group < p.n_groups) {
#pragma unroll
        for (int c = 0; c < 2; c++) {
          x[c] = load_element<kType>(p.x, first + int64_t(kQ1Group * group + 32 * i + b + 16 * c) * p.x_stride[1]) * up;
        }
      }
      pairs[j] = pack_halves(x[0], x[1]);
    }
    const int run = b / 8, column = b % 8;
    *reinterpret_cast<uint4*>(to + int64_t(stage) * stage_bytes + (run * p.columns + row) * 128 + ((column ^ (row & 7)) << 4)) =
        make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
  }
}
#endif

#if OPERATION == 5
namespace {

constexpr int kColumns = COLUMNS, kTiles = kColumns / 8;
constexpr bool kGroups = WGMMA;
constexpr int kStageBytes = kColumns * kRowBytes;
// Steps whose factors are held in registers at a time.
constexpr int kBatch = !kGroups ? 1 : kColumns > 64 ? 2 : 4;
// Producers give registers to the warpgroups that multiply: five warps of one scheduler would have 96 each.
constexpr int kProducerRegisters = 32, kConsumerRegisters = 112, kEntryRegisters = 96;
static_assert(kProducerRegisters + kGemmGroups * kConsumerRegisters <= (kGemmGroups + 1) * kEntryRegisters,
              "a block has no more than at its entry: who asks for more waits forever");

// What a thread multiplies a span with: rows g and g + 8 of its warp, group j.
struct Weights {
  uint4 words[2];
  uint32_t scales[2];  // the scale, twice

  TQ_DEVICE void load(const Q1GemmParams& p, int row, int group) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int64_t from = min(row + 8 * r, p.n_rows - 1);
      const bool there = group < p.n_groups;
      words[r] =
          there ? __ldg(reinterpret_cast<const uint4*>(p.weight + from * p.weight_stride) + group) : make_uint4(0, 0, 0, 0);
      const uint32_t scale = there ? __ldg(p.scales + from * p.scale_stride + group) : 0;
      scales[r] = scale * 0x10001u;
    }
  }
  // Factors of one step: a set bit is the scale, the others minus the scale.
  TQ_DEVICE void decode(uint32_t (&a)[4], int i, int step) const {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const uint32_t word = ~(i == 0 ? words[r].x : i == 1 ? words[r].y : i == 2 ? words[r].z : words[r].w);
      a[r] = (word << (15 - 2 * step) & 0x80008000u) ^ scales[r];
      a[2 + r] = (word << (14 - 2 * step) & 0x80008000u) ^ scales[r];
    }
  }
};

#if WGMMA
#define TQ_FOUR(i) "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])
#define TQ_SIXTEEN(i) TQ_FOUR(i), TQ_FOUR(i + 1), TQ_FOUR(i + 2), TQ_FOUR(i + 3)
#define TQ_OPERANDS "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)
// c += 64 x 16 (registers) times 16 x kColumns.
TQ_DEVICE void multiply_group(float (&c)[kTiles][4], const uint32_t (&a)[4], uint64_t b) {
#if COLUMNS == 16
  asm volatile("wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {%0,%1,%2,%3,%4,%5,%6,%7}, {%8,%9,%10,%11}, %12, 1, 1, 1, 0;"
               : TQ_FOUR(0), TQ_FOUR(1)
               : TQ_OPERANDS);
#elif COLUMNS == 32
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, "
      "{%16,%17,%18,%19}, %20, 1, 1, 1, 0;"
      : TQ_SIXTEEN(0)
      : TQ_OPERANDS);
#elif COLUMNS == 64
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
      "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, {%32,%33,%34,%35}, %36, 1, 1, 1, 0;"
      : TQ_SIXTEEN(0), TQ_SIXTEEN(4)
      : TQ_OPERANDS);
#elif COLUMNS == 96
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n96k16.f32.f16.f16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
      "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,"
      "%44,%45,%46,%47}, {%48,%49,%50,%51}, %52, 1, 1, 1, 0;"
      : TQ_SIXTEEN(0), TQ_SIXTEEN(4), TQ_SIXTEEN(8)
      : TQ_OPERANDS);
#else
  static_assert(kColumns == 128, "the sizes of products");
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
      "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,"
      "%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, {%64,%65,%66,%67}, %68, 1, 1, 1, 0;"
      : TQ_SIXTEEN(0), TQ_SIXTEEN(4), TQ_SIXTEEN(8), TQ_SIXTEEN(12)
      : TQ_OPERANDS);
#endif
}
#undef TQ_FOUR
#undef TQ_SIXTEEN
#undef TQ_OPERANDS
#endif

// One step: 16 columns of the stage at this address.
TQ_DEVICE void multiply_step(float (&c)[kTiles][4], const uint32_t (&a)[4], uint32_t stage, int step, int lane) {
  const uint32_t run = stage + step / 4 * kColumns * 128;
#if WGMMA
  multiply_group(c, a, operand(run + step % 4 * 32));
#else
  const int row = lane % 8 + lane / 16 * 8, column = step % 4 * 2 + lane / 8 % 2;
  const uint32_t from = run + row * 128 + ((column ^ (row & 7)) << 4);
#pragma unroll
  for (int i = 0; i < kTiles; i += 2) {
    uint32_t b[4];
    load_matrices_shared(b, from + i * 8 * 128);
    multiply_half(c[i], a[0], a[1], a[2], a[3], b[0], b[1]);
    multiply_half(c[i + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
  }
#endif
}

// The factors of a batch stay where they are until its products are done.
TQ_DEVICE void hold_factors(uint32_t (&a)[kBatch][4]) {
#pragma unroll
  for (int i = 0; i < kBatch; i++) {
    asm volatile("" : "+r"(a[i][0]), "+r"(a[i][1]), "+r"(a[i][2]), "+r"(a[i][3])::"memory");
  }
}

// A place in the ring of stages.
struct Cursor {
  int stage, parity = 0;
  TQ_DEVICE void advance(int by, int n_stages) {
    stage += by;
    if (stage >= n_stages) stage -= n_stages, parity ^= 1;
  }
};

// A warp has read a stage. Matrices that it loads itself may still be under way when it says so, and the copy engine does not
// wait for them: it wrote over what was not read yet (H200). So it copies for warpgroups alone, whose products have ended here;
// elsewhere `cp.async` does.
TQ_DEVICE void give_back(uint32_t emptied, int lane) {
  __syncwarp();
  if (lane == 0) slot_barrier_arrive(emptied);
}

TQ_DEVICE void copy_arrive(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}

TQ_DEVICE void consume(const Q1GemmParams& p, char* shared, uint32_t ring, const Q1GemmLayout& layout, int tid, int warp,
                       int lane) {
  const uint32_t filled = ring + layout.barrier_at, emptied = filled + 8 * p.n_stages;
  const int row_blocks = kGemmGroups / p.shares;  // of 64 rows, in a tile
  const int n_tiles = p.row_tiles * p.column_tiles, n_rounds = p.n_spans / p.shares;
  const int g = lane >> 2, j = lane & 3, group_warp = warp & 3, group_thread = tid & 127;
  const int row_block = (warp >> 2) % row_blocks, share = (warp >> 2) / row_blocks;
  const int row_in_tile = 64 * row_block + 16 * group_warp + g;
  Cursor cursor{share};
  Weights next;
  int tile = blockIdx.x;
  if (tile < n_tiles) next.load(p, tile % p.row_tiles * 64 * row_blocks + row_in_tile, share * kSpan + j);
  uint32_t a[2][kBatch][4] = {};

#pragma unroll 1
  for (; tile < n_tiles; tile += gridDim.x) {
    float sum[kTiles][4];
#pragma unroll
    for (int i = 0; i < kTiles; i++) {
#pragma unroll
      for (int k = 0; k < 4; k++) sum[i][k] = 0;
    }
    const int row0 = tile % p.row_tiles * 64 * row_blocks;
    int used = -1;  // the stage that products in flight may read
#pragma unroll 1
    for (int round = 0; round < n_rounds; round++) {
      const Weights weights = next;
      if (round + 1 < n_rounds) {
        next.load(p, row0 + row_in_tile, ((round + 1) * p.shares + share) * kSpan + j);
      } else if (tile + gridDim.x < n_tiles) {
        next.load(p, int(tile + gridDim.x) % p.row_tiles * 64 * row_blocks + row_in_tile, share * kSpan + j);
      }
#pragma unroll
      for (int i = 0; i < kSpan; i++) {
        slot_barrier_wait(filled + 8 * cursor.stage, cursor.parity);
        const uint32_t stage = ring + cursor.stage * kStageBytes;
#pragma unroll
        for (int batch = 0; batch < kSteps / kBatch; batch++) {
          uint32_t (&mine)[kBatch][4] = a[batch & 1];
#pragma unroll
          for (int s = 0; s < kBatch; s++) weights.decode(mine[s], i, batch * kBatch + s);
#if WGMMA
          products_begin();
#endif
#pragma unroll
          for (int s = 0; s < kBatch; s++) multiply_step(sum, mine[s], stage, batch * kBatch + s, lane);
#if WGMMA
          products_commit();
          products_wait<1>();
          hold_factors(a[(batch & 1) ^ 1]);
#endif
          if (kGroups && batch == 0 && used >= 0) give_back(emptied + 8 * used, lane);
        }
        if constexpr (!kGroups) give_back(emptied + 8 * cursor.stage, lane);
        used = cursor.stage;
        cursor.advance(p.shares, p.n_stages);
      }
    }
#if WGMMA
    products_wait<0>();
    hold(sum);
    if (used >= 0) give_back(emptied + 8 * used, lane);
#endif

    // Add up the shares.
    if (p.shares > 1) {
      constexpr int kPart = kTiles < Q1GemmLayout::kPartialColumns / 8 ? kTiles : Q1GemmLayout::kPartialColumns / 8;
      float4* partial = reinterpret_cast<float4*>(shared + layout.partial_at);  // [share - 1][row block][part][thread]
#pragma unroll
      for (int first = 0; first < kTiles; first += kPart) {
        if (share > 0) {
          float4* to = partial + ((share - 1) * row_blocks + row_block) * (kPart * 128) + group_thread;
#pragma unroll
          for (int i = 0; i < kPart && first + i < kTiles; i++) {
            const float (&y)[4] = sum[first + i];
            to[128 * i] = make_float4(y[0], y[1], y[2], y[3]);
          }
        }
        barrier_of_threads(1 + row_block, 128 * p.shares);
        if (share == 0) {
          for (int s = 1; s < p.shares; s++) {
            const float4* from = partial + ((s - 1) * row_blocks + row_block) * (kPart * 128) + group_thread;
#pragma unroll
            for (int i = 0; i < kPart && first + i < kTiles; i++) {
              const float4 y = from[128 * i];
              float (&z)[4] = sum[first + i];
              z[0] += y.x, z[1] += y.y, z[2] += y.z, z[3] += y.w;
            }
          }
        }
        // Before the others write the next part.
        barrier_of_threads(1 + row_block, 128 * p.shares);
      }
      if (share > 0) continue;
    }

    // Through shared memory to rows of the output: 64 numbers of a row of x side by side.
    const int input0 = tile / p.row_tiles * kColumns;
    const uint32_t result = ring + layout.result_at + row_block * kColumns * kGemmResultRow;
    barrier_of_threads(5 + row_block, 128);  // the tile before has been read
#pragma unroll
    for (int i = 0; i < kTiles; i += 2) {
      uint32_t y[4];
#pragma unroll
      for (int k = 0; k < 2; k++) {
        float2 factor = make_float2(1.0f, 1.0f);
        if constexpr (kType == kTypeBFloat16) {
          factor = *reinterpret_cast<const float2*>(p.factors + input0 + 8 * (i + k) + 2 * j);
        }
        y[2 * k] = pack_16bit<kType>(sum[i + k][0] * factor.x, sum[i + k][1] * factor.y);
        y[2 * k + 1] = pack_16bit<kType>(sum[i + k][2] * factor.x, sum[i + k][3] * factor.y);
      }
#if __CUDA_ARCH__ >= 900
      const int column = 8 * i + lane / 16 * 8 + lane % 8, row = 16 * group_warp + lane / 8 % 2 * 8;
      asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                       result + column * kGemmResultRow + 2 * row),
                   "r"(y[0]), "r"(y[1]), "r"(y[2]), "r"(y[3])
                   : "memory");
#else
#pragma unroll
      for (int k = 0; k < 4; k++) {
        const uint32_t to = result + (8 * (i + k / 2) + 2 * j) * kGemmResultRow + 2 * (16 * group_warp + k % 2 * 8 + g);
        store_shared_half(to, uint16_t(y[k]));
        store_shared_half(to + kGemmResultRow, uint16_t(y[k] >> 16));
      }
#endif
    }
    barrier_of_threads(5 + row_block, 128);
    const int part = group_thread % 8, row = row0 + 64 * row_block + 8 * part;
    const char* results = shared + layout.result_at + row_block * kColumns * kGemmResultRow;
    for (int column = group_thread / 8; column < kColumns; column += 16) {
      if (input0 + column >= p.n_inputs || row >= p.n_rows) break;
      const uint4 y = *reinterpret_cast<const uint4*>(results + column * kGemmResultRow + 16 * part);
      uint16_t* to = static_cast<uint16_t*>(p.out) + int64_t(input0 + column) * p.n_rows + row;
      if (p.n_rows % 8 == 0) {
        *reinterpret_cast<uint4*>(to) = y;
      } else {
        const uint32_t pairs[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
        for (int k = 0; k < 8; k++) {
          if (row + k < p.n_rows) to[k] = uint16_t(pairs[k / 2] >> 16 * (k % 2));
        }
      }
    }
  }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kGemmThreads, 1) q1_gemm(const __grid_constant__ Q1GemmParams p) {
  extern __shared__ __align__(1024) char dynamic[];
  const uint32_t start = shared_address(dynamic), ring = (start + 1023) & ~1023u;
  char* shared = dynamic + (ring - start);
  const Q1GemmLayout layout(kColumns, p.shares, p.n_stages);
  const uint32_t filled = ring + layout.barrier_at, emptied = filled + 8 * p.n_stages;
  const int tid = threadIdx.x, lane = tid & 31;
  const int warp = __shfl_sync(kAllLanes, tid >> 5, 0);
  const int row_blocks = kGemmGroups / p.shares;  // of 64 rows, in a tile
  if (tid < p.n_stages) {
    slot_barrier_init(filled + 8 * tid, kGroups ? 1 : 32);
    slot_barrier_init(emptied + 8 * tid, 4 * row_blocks);
#if __CUDA_ARCH__ >= 900
    copy_engine_fence();
#endif
  }
  __syncthreads();
  const int n_tiles = p.row_tiles * p.column_tiles, n_rounds = p.n_spans / p.shares;

  if (warp >= 4 * kGemmGroups) {
#if WGMMA
    set_registers_down<kProducerRegisters>();
#endif
    if (warp > 4 * kGemmGroups) return;
    Cursor to{0};
    for (int tile = blockIdx.x; tile < n_tiles; tile += gridDim.x) {
      const char* tile_from =
          static_cast<const char*>(p.prepared) + int64_t(tile / p.row_tiles) * p.n_spans * kSpan * kStageBytes;
      for (int round = 0; round < n_rounds; round++) {
        for (int k = 0; k < kSpan * p.shares; k++) {
          const int span = round * p.shares + k % p.shares, i = k / p.shares;
          const char* from = tile_from + int64_t(span * kSpan + i) * kStageBytes;
          slot_barrier_wait(emptied + 8 * to.stage, to.parity ^ 1);
          const uint32_t at = ring + to.stage * kStageBytes, barrier = filled + 8 * to.stage;
#if WGMMA
          if (lane == 0) {
            barrier_expect(barrier, kStageBytes);
            copy_bulk(at, from, kStageBytes, barrier);
          }
          __syncwarp();
#else
#pragma unroll 4
          for (int b = 16 * lane; b < kStageBytes; b += 512) copy_async(at + b, from + b);
          copy_arrive(barrier);
#endif
          to.advance(1, p.n_stages);
        }
      }
    }
  } else {
#if WGMMA
    set_registers_up<kConsumerRegisters>();
#endif
    consume(p, shared, ring, layout, tid, warp, lane);
  }
#if !WGMMA
  copy_async_wait<0>();
#endif
}

#endif

}  // namespace tqext::cuda
