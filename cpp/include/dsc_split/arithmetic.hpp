// SPDX-License-Identifier: Apache-2.0
/// Binary64 arithmetic that gives the same bits with every compiler and every optimisation that keeps IEEE 754.
///
/// Compilers may fuse a product and a sum into one operation that rounds once (`-ffp-contract=fast`, the default of
/// g++). The table's numbers are defined with each operation rounded, so every product that is added to something
/// goes through `rounded`. Options that change the meaning of arithmetic itself are refused.
#pragma once

#if __cplusplus < 201703L && (!defined(_MSVC_LANG) || _MSVC_LANG < 201703L)
#error "dsc_split needs C++17: compile with -std=c++17 (/std:c++17) or later."
#endif

#include <cfloat>

#if defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__) || \
    defined(__ASSOCIATIVE_MATH__) || defined(__RECIPROCAL_MATH__) || defined(_M_FP_FAST)
#error "dsc_split: -ffast-math and its parts (/fp:fast) change which choice the table gives; compile without them."
#endif
#if FLT_EVAL_METHOD < 0 || FLT_EVAL_METHOD == 2
#error "dsc_split: double must be evaluated as binary64; on 32-bit x86 compile with -msse2 -mfpmath=sse."
#endif

namespace dsc_split {
inline namespace v0 {
namespace detail {

static_assert(DBL_MANT_DIG == 53 && DBL_MAX_EXP == 1024, "double must be IEEE 754 binary64");

/// Keeps the optimiser from seeing where a number comes from.
inline double opaque(double value) noexcept {
#if defined(__GNUC__) && (defined(__x86_64__) || defined(__i386__))
  __asm__("" : "+x"(value));
#elif defined(__GNUC__) && (defined(__aarch64__) || (defined(__arm__) && !defined(__SOFTFP__)))
  __asm__("" : "+w"(value));
#elif defined(__GNUC__) && defined(__riscv_flen) && __riscv_flen >= 64
  __asm__("" : "+f"(value));
#elif defined(__GNUC__)
  __asm__("" : "+m"(value));
#else
  volatile double stored = value;
  value = stored;
#endif
  return value;
}

/// Rounds a product before it is added to something: it is never fused. At compile time it is rounded anyway.
constexpr double rounded(double product) noexcept {
  return __builtin_is_constant_evaluated() ? product : opaque(product);
}

}  // namespace detail
}  // namespace v0
}  // namespace dsc_split
