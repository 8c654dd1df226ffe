// Lloyd-Max codebooks of one coordinate of a random unit vector in dim dimensions (a Beta law), dim = 32, 64 ... 512.
// levels: positive half in units of top / 127, rounded to int8; top: the outermost centroid times sqrt(dim).
// tests/test_format.py recomputes both.
#pragma once

#include <cmath>

#include "format.h"

namespace tqext {

struct Codebook {
  int bits, n_levels;
  int8_t levels[kMaxKeyLevels];  // ascending, outermost +-127
  float scale;                   // centroid = levels[code] / 127 * scale, for unit vectors
};

struct CodebookHalf {
  float top;
  int8_t levels[kMaxKeyLevels / 2];
};

constexpr CodebookHalf kCodebookTwoBits[kMaxDim / kUnit] = {
    {1.48955953f, {38, 127}},  // 32
    {1.49997480f, {38, 127}},  // 64
    {1.50345285f, {38, 127}},  // 96
    {1.50519298f, {38, 127}},  // 128
    {1.50623740f, {38, 127}},  // 160
    {1.50693383f, {38, 127}},  // 192
    {1.50743134f, {38, 127}},  // 224
    {1.50780451f, {38, 127}},  // 256
    {1.50809478f, {38, 127}},  // 288
    {1.50832701f, {38, 127}},  // 320
    {1.50851702f, {38, 127}},  // 352
    {1.50867538f, {38, 127}},  // 384
    {1.50880937f, {38, 127}},  // 416
    {1.50892422f, {38, 127}},  // 448
    {1.50902377f, {38, 127}},  // 480
    {1.50911087f, {38, 127}},  // 512
};

constexpr CodebookHalf kCodebookThreeBits[kMaxDim / kUnit] = {
    {2.07192606f, {15, 46, 81, 127}},  // 32
    {2.11131145f, {15, 45, 80, 127}},  // 64
    {2.12471615f, {15, 45, 80, 127}},  // 96
    {2.13147084f, {15, 45, 80, 127}},  // 128
    {2.13554048f, {15, 45, 80, 127}},  // 160
    {2.13826059f, {15, 45, 80, 127}},  // 192
    {2.14020697f, {15, 45, 79, 127}},  // 224
    {2.14166864f, {15, 45, 79, 127}},  // 256
    {2.14280662f, {15, 45, 79, 127}},  // 288
    {2.14371770f, {15, 45, 79, 127}},  // 320
    {2.14446360f, {15, 45, 79, 127}},  // 352
    {2.14508550f, {14, 45, 79, 127}},  // 384
    {2.14561196f, {14, 45, 79, 127}},  // 416
    {2.14606337f, {14, 45, 79, 127}},  // 448
    {2.14645472f, {14, 45, 79, 127}},  // 480
    {2.14679724f, {14, 45, 79, 127}},  // 512
};

constexpr CodebookHalf kCodebookFourBits[kMaxDim / kUnit] = {
    {2.56497722f, {6, 19, 32, 46, 61, 77, 98, 127}},  // 32
    {2.64637049f, {6, 18, 31, 45, 59, 76, 97, 127}},  // 64
    {2.67456014f, {6, 18, 31, 44, 59, 76, 97, 127}},  // 96
    {2.68885926f, {6, 18, 31, 44, 59, 76, 97, 127}},  // 128
    {2.69750486f, {6, 18, 31, 44, 59, 76, 97, 127}},  // 160
    {2.70329632f, {6, 18, 31, 44, 59, 76, 96, 127}},  // 192
    {2.70744672f, {6, 18, 31, 44, 59, 76, 96, 127}},  // 224
    {2.71056700f, {6, 18, 31, 44, 59, 75, 96, 127}},  // 256
    {2.71299832f, {6, 18, 31, 44, 59, 75, 96, 127}},  // 288
    {2.71494618f, {6, 18, 31, 44, 59, 75, 96, 127}},  // 320
    {2.71654174f, {6, 18, 31, 44, 59, 75, 96, 127}},  // 352
    {2.71787265f, {6, 18, 31, 44, 59, 75, 96, 127}},  // 384
    {2.71899971f, {6, 18, 31, 44, 59, 75, 96, 127}},  // 416
    {2.71996643f, {6, 18, 31, 44, 59, 75, 96, 127}},  // 448
    {2.72080474f, {6, 18, 31, 44, 59, 75, 96, 127}},  // 480
    {2.72153865f, {6, 18, 31, 44, 59, 75, 96, 127}},  // 512
};

// dim: padded head dimension; bits: 2, 3 or 4.
inline Codebook codebook(int bits, int dim) {
  const CodebookHalf* table = bits == 2 ? kCodebookTwoBits : bits == 3 ? kCodebookThreeBits : kCodebookFourBits;
  const CodebookHalf& half = table[dim / kUnit - 1];
  Codebook book{bits, 1 << bits, {}, half.top / std::sqrt(float(dim))};
  for (int i = 0; i < book.n_levels / 2; i++) {
    book.levels[book.n_levels / 2 + i] = half.levels[i];
    book.levels[book.n_levels / 2 - 1 - i] = -half.levels[i];
  }
  return book;
}

}  // namespace tqext
