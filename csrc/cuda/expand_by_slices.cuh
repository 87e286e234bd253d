// A tile of an expansion of quantised rows for several tokens, on tensor cores.
//
// A warp takes slices of sixteen rows. Its lanes read packets, and shared memory passes the whole numbers on to the
// lanes that multiply them, so that all lines of a product are columns of one packet, which have one scale in each row.
// The whole numbers are exact in bfloat16. z times the scale becomes the sum of two bfloat16, worth 16 bits.
#pragma once

#include "expansion.cuh"

namespace {

constexpr int kSliceRows = 16, kSliceStep = kSliceRows * kWarps;

// What a warp passes on: packets, [packet of the tile, row], and their scales.
template <int kPackets>
struct Passed {
  uint4 numbers[kPackets][kSliceRows];
  float scales[kPackets][kSliceRows];
};

// The sums of each warp for eight tokens.
template <int kColumns>
struct SliceSums {
  float at[kWarps][kColumns][8];
};

// The weights of a packet as lines of a product: line group() of set s is column_of(s, 0), line group() + 8
// column_of(s, 1).
template <int kBits>
struct Lines {
  static constexpr int kSets = 8 / kBits;
  uint32_t a[kSets][4];

  // `words` hold the rows 2 member() and the next, and these plus 8: 16 bits of each.
  __device__ explicit Lines(const uint32_t* words) {
#pragma unroll
    for (int s = 0; s < kSets; s++)
#pragma unroll
      for (int i = 0; i < 4; i++) a[s][i] = numbers(words[i / 2], 2 * s + i % 2);
  }
  __device__ static int column_of(int set, int line) {
    return kBits == 8 ? 2 * group() + line : 2 * group() + set + line * int(rana::kNibbleBlock / 2);
  }

 private:
  // Returns whole number i of each half of a word as a pair of bfloat16.
  __device__ static uint32_t numbers(uint32_t word, int i) {
    if constexpr (kBits == 8) return upper_halves(whole_number<8>(word, i), whole_number<8>(word, i + 2));
    else return whole_numbers<4, bfloat16>(word >> 4 * i);
  }
};

template <int kTokens, class W>
struct Slices {
  static constexpr int kPackets = kMostColumns<W, kTokens> / kPacket<W>, kLoads = kPackets / 2;
  static constexpr int kSets = Lines<W::kBits>::kSets, kEights = kTokens / 8;
  static constexpr int kAhead = 2;   // slices that are read before they are needed
  using Values = float[kEights][4];  // z of a lane: token group() of each eight at the rows of row_of
  using Weights = typename W::Loaded[kLoads];

  const W& rows;
  int width, tokens;
  int64_t column;  // the first one of the tile
  float sums[kPackets][kEights][kSets][4] = {};

  // The rows of a slice whose products a lane adds.
  __device__ static int row_of(int i) { return 2 * member() + i % 2 + i / 2 * 8; }
  // The packets of a slice that a lane reads.
  __device__ static int row_read() { return lane() % kSliceRows; }
  __device__ static int packet_read(int load) { return lane() / kSliceRows + 2 * load; }

  // Reads z, which is 0 beyond the last row and token. Without branches many reads are in flight.
  template <class Z>
  __device__ void read_values(Values& values, const Z& z, int first) const {
    const int last = int(rows.rows) - 1;
#pragma unroll
    for (int eight = 0; eight < kEights; eight++) {
      if (8 * eight >= tokens) break;
      const int m = 8 * eight + group();
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int row = first + row_of(i);
        const float value = z.value(min(m, tokens - 1), min(row, last));
        values[eight][i] = m < tokens && row <= last ? value : 0.0f;
      }
    }
  }

  // Returns which rows of a slice some token keeps, as bits.
  __device__ unsigned wanted_rows(const Values& values) const {
    unsigned wanted = 0;
#pragma unroll
    for (int eight = 0; eight < kEights; eight++) {
      if (8 * eight >= tokens) break;
#pragma unroll
      for (int i = 0; i < 4; i++) wanted |= values[eight][i] != 0.0f ? 1u << (i % 2 + i / 2 * 8) : 0u;
    }
    return __reduce_or_sync(kAllLanes, wanted << 2 * member());
  }

  __device__ void read_weights(Weights& weights, unsigned wanted, int first) const {
#pragma unroll
    for (int i = 0; i < kLoads; i++) {
      const int64_t at = column + packet_read(i) * kPacket<W>;
      weights[i] = {};
      if (packet_read(i) < width && at < rows.columns && wanted >> row_read() & 1)
        weights[i] = W::stream(rows.at(first + row_read(), at), kPacket<W>);
    }
  }

  __device__ void pass_on(const Weights& weights, Passed<kPackets>& passed) const {
#pragma unroll
    for (int i = 0; i < kLoads; i++) {
      const auto& words = weights[i].words;
      passed.numbers[packet_read(i)][row_read()] = {words[0], words[1], words[2], words[3]};
      passed.scales[packet_read(i)][row_read()] = weights[i].scale();
    }
  }

  __device__ void multiply(const Passed<kPackets>& passed, const Values& values) {
#pragma unroll
    for (int pair = 0; pair < kLoads; pair++) {
      if (2 * pair >= width) break;
      uint32_t words[4];
      load_transposed(words, &passed.numbers[2 * pair + lane() / kSliceRows][row_read()]);
#pragma unroll
      for (int i = 0; i < 2; i++)
        add_packet(sums[2 * pair + i], Lines<W::kBits>(words + 2 * i), passed.scales[2 * pair + i], values);
    }
  }

  __device__ void add_packet(float (&sums)[kEights][kSets][4], const Lines<W::kBits>& lines,
                             const float (&scales)[kSliceRows], const Values& values) const {
#pragma unroll
    for (int eight = 0; eight < kEights; eight++) {
      if (8 * eight >= tokens) break;
      float z[4];
#pragma unroll
      for (int i = 0; i < 4; i++) z[i] = values[eight][i] * scales[row_of(i)];
#pragma unroll
      for (int part = 0; part < 2; part++) {
        const uint32_t b[2] = {split_off_pair(z[0], z[1]), split_off_pair(z[2], z[3])};
#pragma unroll
        for (int s = 0; s < kSets; s++) multiply_add<bfloat16>(sums[eight][s], lines.a[s], b);
      }
    }
  }

  // Adds up the sums of all warps, and calls done_with(m, n, sum).
  template <class Done>
  __device__ void add_warps(Done done_with) const {
    auto& shared = shared_as<SliceSums<kMostColumns<W, kTokens>>>();
#pragma unroll
    for (int eight = 0; eight < kEights; eight++) {
      if (8 * eight >= tokens) break;
      __syncthreads();  // all reads of what was there are over
#pragma unroll
      for (int p = 0; p < kPackets; p++)
#pragma unroll
        for (int i = 0; i < 4 * kSets; i++) {
          const int c = p * kPacket<W> + Lines<W::kBits>::column_of(i / 4, i % 4 / 2);
          shared.at[warp()][c][2 * member() + i % 2] = sums[p][eight][i / 4][i % 4];
        }
      __syncthreads();
      static_assert(kThreads == 8 * kMostColumns<W, kTokens>);
      const int m = 8 * eight + threadIdx.x % 8, c = threadIdx.x / 8;
      if (m >= tokens || c >= width * kPacket<W> || column + c >= rows.columns) continue;
      float sum = 0;
      for (int w = 0; w < kWarps; w++) sum += shared.at[w][c][threadIdx.x % 8];
      done_with(m, column + c, sum);
    }
  }
};

template <int kTokens, class Z, class W, class Done>
__device__ void expand_by_slices(const Expansion<Z, W>& e, int tile, Done done_with) {
  using S = Slices<kTokens, W>;
  S slices{e.rows, e.width, e.z.tokens, int64_t(tile) * e.width * kPacket<W>};
  auto& passed = shared_as<Passed<S::kPackets>[kWarps]>()[warp()];
  const int begin = kSliceRows * warp(), count = int(e.rows.rows);
  __syncthreads();  // all reads of what was in shared memory are over
  if (begin < count) {
    typename S::Values z[S::kAhead] = {}, next[S::kAhead] = {};
    typename S::Weights weights[S::kAhead];
#pragma unroll
    for (int i = 0; i < S::kAhead; i++) slices.read_values(z[i], e.z, begin + i * kSliceStep);
#pragma unroll
    for (int i = 0; i < S::kAhead; i++) {
      slices.read_weights(weights[i], slices.wanted_rows(z[i]), begin + i * kSliceStep);
      slices.read_values(next[i], e.z, begin + (S::kAhead + i) * kSliceStep);
    }
    for (int first = begin; first < count; first += S::kAhead * kSliceStep)
#pragma unroll
      for (int i = 0; i < S::kAhead; i++) {
        const int ahead = first + (S::kAhead + i) * kSliceStep;
        slices.pass_on(weights[i], passed);
        __syncwarp();
        slices.read_weights(weights[i], slices.wanted_rows(next[i]), ahead);
        slices.multiply(passed, z[i]);
        memcpy(z[i], next[i], sizeof z[i]);
        slices.read_values(next[i], e.z, ahead + S::kAhead * kSliceStep);
        __syncwarp();  // all lanes have read what was passed on
      }
  }
  slices.add_warps(done_with);
}

}  // namespace
