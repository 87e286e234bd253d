// Tensor cores: products of 16 × 16 weights with 8 tokens, and float32 values as sums of bfloat16 values.
#pragma once

#include "storage.cuh"

namespace {

// With several tokens, tensor cores multiply B: products of 16-bit values are exact in float32.
template <class W, int kTokens>
constexpr bool kProjectedByMma = W::kInPackets && kTokens > 1 && sizeof(typename W::Element) == 2;
// They multiply a quantised B for one token too, because with whole numbers of 16 bits they save most of the work.
template <class W, int kTokens>
constexpr bool kProjectedByPackets = W::kQuantized && (kTokens > 1 || sizeof(typename W::Element) == 2);
// The kept values are float32, with 24 bits. Three bfloat16 hold them; float16 has too few exponents.
template <class W, int kTokens>
constexpr bool kExpandedByMma = kTokens > 1 && std::is_same_v<W, Plain<bfloat16>>;

// The place of a lane in such a product: lane 4 group() + member().
__device__ inline int group() { return lane() / 4; }
__device__ inline int member() { return lane() % 4; }

// c += a b for 16 lines of weights (rows, or columns) and 8 tokens, summed over 16 products. Each lane holds
//   a[0], a[1]  lines group() and group() + 8: products 2 member() and the next, as one word
//   a[2], a[3]  the same lines: products 2 member() + 8 and the next
//   b[0], b[1]  token group(): the same products
//   c[0], c[1]  line group(), tokens 2 member() and the next; c[2], c[3]: line group() + 8
// The numbering of the products is free, as long as a and b agree.
template <class T>
__device__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef __CUDACC__
  if constexpr (std::is_same_v<T, bfloat16>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else  // the tests run the kernels on the host
  shim::multiply_add<T>(c, a, b);
#endif
}

// So many bfloat16 add up to a float32 exactly.
constexpr int kParts = 3;

// The b of a lane for sixteen rows and all tokens: one b for each part of the values.
template <int kTokens>
struct Factors {
  uint32_t b[kTokens / 8][kParts][2];
};

// Returns the upper half of `value`, a bfloat16, and subtracts it from `value`. After kParts calls nothing is left. A
// value that is not finite is returned by the first call alone.
__device__ inline uint16_t split_off(float& value) {
  const uint32_t bits = __float_as_uint(value);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  const uint32_t upper = value != value ? 0x7fc00000u : bits & 0xffff0000u;
  value = finite ? value - __uint_as_float(upper) : 0.0f;
  return uint16_t(upper >> 16);
}

// Returns the upper halves of two floats, a pair of bfloat16, the first one below.
__device__ inline uint32_t upper_halves(float a, float b) {
  return __byte_perm(__float_as_uint(a), __float_as_uint(b), 0x7632);
}

// Returns the upper halves and subtracts them. What is left of a value that is not finite is NaN.
__device__ inline uint32_t split_off_pair(float& a, float& b) {
  const uint32_t pair = upper_halves(a, b);
  a -= __uint_as_float(pair << 16), b -= __uint_as_float(pair & 0xffff0000u);
  return pair;
}

// Returns a + b for pairs of values of 16 bits. The sums of the kernels are exact.
template <class T>
__device__ uint32_t add_pairs(uint32_t a, uint32_t b) {
#ifdef __CUDACC__
  uint32_t sum;
  if constexpr (std::is_same_v<T, bfloat16>)
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(0x3f803f80u), "r"(b));
  else asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
  return sum;
#else
  return shim::add_pairs<T>(a, b);
#endif
}

// Reads four matrices of 8 x 8 values of 16 bits from shared memory. Lane 8 i + r gives the address of row r of matrix
// i. Word i of a lane is, of matrix i, column group() of the rows 2 member() and the next.
__device__ inline void load_transposed(uint32_t (&words)[4], const void* row) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(uint32_t(__cvta_generic_to_shared(row)))
               : "memory");
#else
  shim::load_transposed(words, row);
#endif
}

}  // namespace
