// 2^f for the vector kernels. Included inside the target pragma of each: internal linkage only.
#pragma once

namespace tqext::cpu {
namespace {

// 2^f for |f| <= 1/2, relative error 1e-7.
template <class V>
inline typename V::F exp2_polynomial(typename V::F f) {
  typename V::F y = V::set1(1.3276471781512866e-3f);
  y = V::fma(y, f, V::set1(9.67554133276717e-3f));
  y = V::fma(y, f, V::set1(5.55071327415071e-2f));
  y = V::fma(y, f, V::set1(2.40221197238820e-1f));
  y = V::fma(y, f, V::set1(6.93146967064360e-1f));
  return V::fma(y, f, V::set1(1.0000000716546738f));
}

}  // namespace
}  // namespace tqext::cpu
