// From activations to layers' maps: sum_k w(k) A(k, p) for R weight vectors at once, each activation read once for all.
//
// Weights come from the matrices on the fly. Channels ("units" of a packet where a position's channels are neighbours)
// that no row gives a weight to are not read.
#pragma once

#include "device.cuh"

namespace mhex::cuda {

// What a block needs to know while it reads a piece of a layer, behind Share.
struct Reading {
  const void* data;  // where the first channel of the tile has position 0
  int64_t stride_c;
  int64_t stride_p;
  void* positive;  // the first target's map
  void* negative;
  int32_t positions;  // of the whole layer
  int32_t begin;
  int32_t end;
  int32_t targets;
  int32_t signs;
  int32_t at_list;
  int32_t at_partial;
  int32_t units;  // of the tile; a unit is a packet by row, a channel by plane
  int32_t count;  // of them that carry a weight
  bool add;       // whether earlier channels have been there
  bool rectify;   // whether ReLU(A_l) takes the place of A_l
};
static_assert(kAtTask + sizeof(Reading) <= kControlBytes, "the plan leaves too little room");

// What no value of A_l counts for less than.
template <typename Acc>
__device__ __forceinline__ Acc lowest_of(const Reading& reading) {
  return reading.rectify ? Acc(0) : minus_infinity<Acc>();
}

__device__ __forceinline__ Reading& reading_in(unsigned char* shared) {
  return *reinterpret_cast<Reading*>(shared + kAtTask);
}

template <typename Acc>
__device__ __forceinline__ void put(const Reading& reading, int row, int32_t position, Acc value) {
  const int target = reading.signs == 2 ? row >> 1 : row;
  if (target >= reading.targets) return;
  Acc* map = static_cast<Acc*>(reading.signs == 2 && (row & 1) != 0 ? reading.negative : reading.positive);
  Acc* to = map + (static_cast<int64_t>(target) * reading.positions + position);
  *to = reading.add ? *to + value : value;
}

template <typename Acc>
__device__ inline Acc weight_of(const Sharpness& rule, Acc entry, Acc sum, int sign) {
  const Acc size = sign == 0 ? entry : -entry;
  if (!(size > 0) && size == size) return 0;
  const Acc sharpness = size / (sum + static_cast<Acc>(1e-8));
  if (rule.soft) return entry * power(sharpness, static_cast<Acc>(rule.exponent));
  const Acc tau = static_cast<Acc>(sign == 0 ? rule.tau_pos : rule.tau_neg);
  return sharpness >= tau ? entry : size * Acc(0);  // of infinity, whose sharpness is not a number, that is none either
}

// Where the weight of a channel for a row lies. By row, a packet's weights are cut into quads, and one quad of all units
// follows the other, so that lanes on neighbouring units meet no bank conflict. By plane, a channel's rows are neighbours.
// Sizes are powers of two, given as their logarithms.
struct WeightOrder {
  bool by_row;
  int rows;
  int vector;  // channels of a unit
  int quad;    // of them read at once
  int32_t units;

  __device__ int32_t at(int32_t channel, int row) const {
    if (!by_row) return (channel << rows) + row;
    const int32_t unit = channel >> vector, inside = channel & ((1 << vector) - 1);
    const int32_t part = (row << (vector - quad)) + (inside >> quad);
    return ((part * units + unit) << quad) + (inside & ((1 << quad) - 1));
  }
};

template <typename Acc, int R>
__device__ __forceinline__ WeightOrder order_of(const LayerPlan& layer, int32_t channels) {
  constexpr int rows = R == 8 ? 3 : R == 4 ? 2 : R == 2 ? 1 : 0, widest = sizeof(Acc) == 8 ? 1 : 2;
  const int packet = layer.dtype == DType::float64 ? 1 : layer.dtype == DType::float32 ? 2 : 3;
  const int vector = layer.path == Path::row_vectors ? packet : 0;
  const bool by_row = layer.path == Path::row_vectors || layer.path == Path::rows;
  return {by_row, rows, vector, vector < widest ? vector : widest, channels >> vector};
}

// Weights of channels [begin, begin + size) of a layer, and the list of units that carry any.
template <typename Acc, int R>
__device__ __noinline__ void make_weights(const Plan& plan, const LayerPlan& layer, int32_t begin, int32_t size,
                                          unsigned char* shared) {
  Control& control = control_in(shared);
  Acc* values = reinterpret_cast<Acc*>(shared + kControlBytes);
  int32_t* list = reinterpret_cast<int32_t*>(shared + plan.at_list);
  const WeightOrder order = order_of<Acc, R>(layer, size);
  const int32_t units = order.units;
  const Acc* sums = static_cast<const Acc*>(layer.sums) + begin;
  const Acc* matrix = static_cast<const Acc*>(layer.matrix) + begin;
#pragma unroll 1
  for (int32_t k = threadIdx.x; k < size; k += kThreads) {
    const Acc sum_positive = sums[k], sum_negative = plan.signs == 2 ? sums[layer.channels + k] : Acc(0);
#pragma unroll 1
    for (int row = 0; row < R; ++row) {
      const int sign = plan.signs == 2 ? row & 1 : 0;
      const int64_t chosen = control.classes[row];
      Acc weight = 0;
      if (chosen >= 0) {
        weight =
            weight_of(plan.sharpness, matrix[chosen * layer.channels + k], sign == 0 ? sum_positive : sum_negative, sign);
      } else if (chosen == -1) {
        weight = quiet_nan<Acc>();
      }
      values[order.at(k, row)] = weight;
    }
  }
  __syncthreads();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int32_t count = 0;
#pragma unroll 1
  for (int32_t base = 0; base < units; base += kThreads) {
    const int32_t unit = base + static_cast<int32_t>(threadIdx.x);
    bool any = false;
    if (unit < units) {
#pragma unroll 1
      for (int i = 0; i < 1 << order.vector; ++i) {
        for (int row = 0; row < R; ++row) any |= values[order.at((unit << order.vector) + i, row)] != 0;
      }
    }
    const unsigned ballot = __ballot_sync(kAllLanes, any);
    if (lane == 0) control.counts[warp] = __popc(ballot);
    __syncthreads();
    int32_t place = count + __popc(ballot & ((1u << lane) - 1));
    for (int other = 0; other < kWarps; ++other) {
      if (other < warp) place += control.counts[other];
      count += control.counts[other];
    }
    if (any) list[place] = unit;
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    Reading& reading = reading_in(shared);
    reading.units = units;
    reading.count = count;
  }
}

// The sums of four values per lane over groups of `lanes` neighbouring lanes. Value i ends up in those lanes of the group
// whose upper two lane bits are i. Pairs are folded into one before they travel, which halves the shuffles.
template <typename Acc>
__device__ __forceinline__ Acc fold(const Acc (&value)[4], int lane, int lanes) {
  const int half = lanes / 2, quarter = lanes / 4;
  const bool upper = (lane & half) != 0, odd = (lane & quarter) != 0;
  const Acc first = (upper ? value[2] : value[0]) + __shfl_xor_sync(kAllLanes, upper ? value[0] : value[2], half);
  const Acc second = (upper ? value[3] : value[1]) + __shfl_xor_sync(kAllLanes, upper ? value[1] : value[3], half);
  Acc sum = (odd ? second : first) + __shfl_xor_sync(kAllLanes, odd ? first : second, quarter);
  for (int step = quarter / 2; step >= 1; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  return sum;
}

// A position's channels are neighbours: groups of 4 to 32 lanes share a position and walk its packets; every lane has four
// positions in flight.
template <typename Acc, int R, typename T, int V>
__device__ __noinline__ void sum_rows() {
  MHEX_SHARED(shared);
  constexpr int quad = Quad<Acc, V>::size, quads = V / quad;
  const Reading& reading = reading_in(shared);
  const Acc* weights = reinterpret_cast<const Acc*>(shared + kControlBytes);
  const int32_t* list = reinterpret_cast<const int32_t*>(shared + reading.at_list);
  const int32_t count = reading.count, units = reading.units, end = reading.end;
  const Acc lowest = lowest_of<Acc>(reading);
  int lanes = 32;
  while (lanes > 4 && (count + lanes - 1) / lanes * lanes * 4 > count * 5) lanes /= 2;
  const int lane = threadIdx.x % 32, inside = lane % lanes, beside = lane / lanes, across = 32 / lanes;
  const int32_t start = reading.begin + static_cast<int32_t>(threadIdx.x / 32) * 4 * across;
#pragma unroll 1
  for (int32_t base = start; base < end; base += kWarps * 4 * across) {
    const T* from[4];
    Acc sum[R][4] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t position = min(base + i * across + beside, end - 1);
      from[i] = static_cast<const T*>(reading.data) + position * reading.stride_p;
    }
#pragma unroll 1
    for (int32_t j = inside; j < count; j += lanes) {
      const int32_t unit = list[j];
      Packet<T, V> packet[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) packet[i] = load<T, V>(from[i] + unit * V);
#pragma unroll
      for (int part = 0; part < quads; ++part) {
        Quad<Acc, V> value[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) value[i] = not_below<Acc, V>(widen<Acc>(packet[i], part), lowest);
#pragma unroll
        for (int row = 0; row < R; ++row) {
          const Acc* at = weights + ((row * quads + part) * units + unit) * quad;
          Quad<Acc, V> weight;
          if constexpr (quad * sizeof(Acc) == 16) {
            const uint4 bits = *reinterpret_cast<const uint4*>(at);
            memcpy(&weight, &bits, sizeof(weight));
          } else {
            weight.value[0] = at[0];
          }
#pragma unroll
          for (int i = 0; i < 4; ++i) {
#pragma unroll
            for (int q = 0; q < quad; ++q) sum[row][i] = fused(value[i].value[q], weight.value[q], sum[row][i]);
          }
        }
      }
    }
    const int quarter = lanes / 4;
    const int32_t position = base + inside / quarter * across + beside;
#pragma unroll
    for (int row = 0; row < R; ++row) {
      const Acc total = fold(sum[row], lane, lanes);
      if (inside % quarter == 0 && position < end) put(reading, row, position, total);
    }
  }
}

// A channel's positions are neighbours: each thread walks some of the channels at a packet of positions, four channels in
// flight; threads at the same positions add up in shared memory.
template <typename Acc, int R, typename T, int V>
__device__ __noinline__ void sum_planes() {
  MHEX_SHARED(shared);
  constexpr int quad = Quad<Acc, V>::size;
  const Reading& reading = reading_in(shared);
  const Acc* weights = reinterpret_cast<const Acc*>(shared + kControlBytes);
  const int32_t* list = reinterpret_cast<const int32_t*>(shared + reading.at_list);
  Acc* partial = reinterpret_cast<Acc*>(shared + reading.at_partial);
  const int32_t count = reading.count, begin = reading.begin, end = reading.end, columns = (end - begin + V - 1) / V;
  const Acc lowest = lowest_of<Acc>(reading);
  // As many columns at once as leave the fewest threads idle; of two such numbers the larger, which adds up less.
  int32_t width = kThreads, waste = (columns + width - 1) / width * width;
  for (int32_t other = kThreads / 2; other >= 8; other /= 2) {
    const int32_t padded = (columns + other - 1) / other * other;
    if (padded * 8 < waste * 7) {
      width = other;
      waste = padded;
    }
  }
  const int32_t slices = kThreads / width, slice = threadIdx.x / width, column = threadIdx.x % width;
#pragma unroll 1
  for (int32_t from = 0; from < columns; from += width) {
    const int64_t place = begin + static_cast<int64_t>(min(from + column, columns - 1)) * V;
    const T* at = static_cast<const T*>(reading.data) + place * reading.stride_p;
    Acc sum[R][V] = {};
#pragma unroll 1
    for (int32_t j = slice; j < count; j += 4 * slices) {
      Packet<T, V> packet[4];
      int32_t channel[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (j + i * slices >= count) continue;
        channel[i] = list[j + i * slices];
        packet[i] = load<T, V>(at + channel[i] * reading.stride_c);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (j + i * slices >= count) continue;
        Acc weight[R];
#pragma unroll
        for (int row = 0; row < R; ++row) weight[row] = weights[channel[i] * R + row];
#pragma unroll
        for (int part = 0; part < V / quad; ++part) {
          const Quad<Acc, V> value = not_below<Acc, V>(widen<Acc>(packet[i], part), lowest);
#pragma unroll
          for (int row = 0; row < R; ++row) {
#pragma unroll
            for (int q = 0; q < quad; ++q) {
              sum[row][part * quad + q] = fused(value.value[q], weight[row], sum[row][part * quad + q]);
            }
          }
        }
      }
    }
#pragma unroll
    for (int row = 0; row < R; ++row) {
      __syncthreads();
#pragma unroll
      for (int v = 0; v < V; ++v) partial[(slice * V + v) * width + column] = sum[row][v];
      __syncthreads();
      for (int32_t i = threadIdx.x; i < width * V; i += kThreads) {
        Acc total = 0;
        for (int32_t s = 0; s < slices; ++s) total += partial[(s * V + i % V) * width + i / V];
        const int32_t position = begin + from * V + i;
        if (position < end) put(reading, row, position, total);
      }
    }
  }
}

template <typename Acc, int R, typename T>
__device__ __forceinline__ void sum_typed(Path path) {
  constexpr int vector = 16 / sizeof(T);
  switch (path) {
    case Path::row_vectors:
      return sum_rows<Acc, R, T, vector>();
    case Path::rows:
      return sum_rows<Acc, R, T, 1>();
    case Path::plane_vectors:
      return sum_planes<Acc, R, T, vector>();
    case Path::planes:
      return sum_planes<Acc, R, T, 1>();
  }
}

// Some positions of one layer for the targets of this block.
template <typename Acc, int R>
__device__ __forceinline__ void sum_piece(const Plan& plan, const LayerPlan& layer, Range piece, unsigned char* shared) {
  int32_t channel = 0;
#pragma unroll 1
  do {
    const int32_t size = min(plan.tile, layer.channels - channel);
    __syncthreads();  // whoever used the last weights is done
    if (threadIdx.x == 0) {
      Reading& reading = reading_in(shared);
      const Share& share = share_in(shared);
      const int bytes = layer.dtype == DType::float64 ? 8 : layer.dtype == DType::float32 ? 4 : 2;
      reading.data =
          static_cast<const char*>(layer.activation) + (share.sample * layer.stride_b + channel * layer.stride_c) * bytes;
      reading.stride_c = layer.stride_c;
      reading.stride_p = layer.stride_p;
      reading.positive = static_cast<Acc*>(layer.positive) + share.map * layer.positions;
      reading.negative = plan.signs == 2 ? static_cast<Acc*>(layer.negative) + share.map * layer.positions : nullptr;
      reading.positions = layer.positions;
      reading.begin = piece.begin;
      reading.end = piece.end;
      reading.targets = share.targets;
      reading.signs = plan.signs;
      reading.at_list = plan.at_list;
      reading.at_partial = plan.at_partial;
      reading.add = channel > 0;
      reading.rectify = plan.rectify;
    }
    make_weights<Acc, R>(plan, layer, channel, size, shared);
    __syncthreads();
    if constexpr (sizeof(Acc) == 8) {
      sum_typed<Acc, R, double>(layer.path);
    } else {
      switch (layer.dtype) {
        case DType::float32:
          sum_typed<Acc, R, float>(layer.path);
          break;
        case DType::float16:
          sum_typed<Acc, R, Float16>(layer.path);
          break;
        case DType::bfloat16:
          sum_typed<Acc, R, BFloat16>(layer.path);
          break;
        case DType::float64:
          break;
      }
    }
    channel += size;
  } while (channel < layer.channels);
}

}  // namespace mhex::cuda
