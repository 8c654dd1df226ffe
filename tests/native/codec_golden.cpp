// Encodes the tokens that test_isa.py writes to standard input and prints the bytes as hexadecimal: the golden file without
// MLX or Python, so that it also runs cross-compiled under an emulator. One token a line:
//   keys HEAD_DIM BITS MEAN BALANCE QJL x... [mean...] [balance...]   ->  codes norm [signs residual_norm]
//   values HEAD_DIM BITS x...                    ->  codes params    (coded by groups)
//   lloyd HEAD_DIM BITS x...                     ->  codes norm
// with x and mean integers in units of 1 / 32. The first line names the instruction set in use.
#include <cstdio>
#include <iostream>
#include <string>

#include "codebook.h"
#include "cpu/codec.h"
#include "cpu/isa.h"

using namespace tqext;
using namespace tqext::cpu;

namespace {

void add(float* x, int n, float sign) {
  for (int d = 0; d < n; d++) {
    int value;
    std::cin >> value;
    x[d] += sign * float(value) / 32;
  }
}

void print(const uint32_t* words, int n) {
  for (int i = 0; i < n; i++) std::printf("%08x", words[i]);
  std::printf(" ");
}
void print(const uint16_t* halves, int n) {
  for (int i = 0; i < n; i++) std::printf("%04x", halves[i]);
  std::printf(" ");
}

}  // namespace

int main() {
  std::printf("%s\n", isa_name(active_isa()));
  std::string kind;
  while (std::cin >> kind) {
    int head_dim, bits, mean = 0, balance = 0, qjl = 0;
    std::cin >> head_dim >> bits;
    if (kind == "keys") std::cin >> mean >> balance >> qjl;
    float x[kMaxDim] = {}, levels[kMaxDim];
    add(x, head_dim, 1);
    if (mean) add(x, head_dim, -1);
    for (int d = 0; balance && d < head_dim; d++) {
      float factor;
      std::cin >> factor;
      x[d] *= factor;
    }
    const int dim = padded_dim(head_dim);
    rotate_row(x, dim, TQ_ROTATION_SEED, false);
    uint32_t words[kMaxDim / 8];
    uint16_t halves[2 * kMaxDim / kGroup];
    if (kind == "keys") {
      encode_key(x, dim, codebook(bits, dim), words, halves, levels);
      print(words, code_words(dim, bits));
      print(halves, 1);
      if (qjl) {
        const float norm = half_to_float(halves[0]);
        for (int d = 0; d < dim; d++) x[d] -= norm * levels[d] / float(kCodebookTop);
        encode_residual(x, dim, words, halves);
        print(words, sign_words(dim));
        print(halves, 1);
      }
    } else {
      const ValueCoding coding = kind == "lloyd" ? kValueLloyd : kValueGroups;
      if (coding == kValueLloyd) {
        encode_value_lloyd(x, dim, codebook(bits, dim), words, halves);
      } else {
        encode_value_groups(x, dim, bits, words, halves);
      }
      print(words, code_words(dim, bits));
      print(halves, value_params(dim, coding));
    }
    std::printf("\n");
  }
}
