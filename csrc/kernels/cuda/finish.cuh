// From layers' maps to one map: layers of one size are added up in shared memory, stretched, and brought to [0, 1].
//
// A block draws a band of the map's rows. Where that is not the whole map, blocks tell each other the extremes they found.
#pragma once

#include "device.cuh"

namespace mhex::cuda {

// Where one group's sums and places lie, as element counts from the start of the memory that holds them. Cell (r, c) of the
// layer is at sums + r * pitch + c. Each row repeats its last value, so that stretching never needs to ask whether there is
// a cell to the right.
struct Slot {
  int32_t sums;
  int32_t pitch;
  int32_t last;     // row of the layer
  int32_t columns;  // a place for each column of the map, rounded up to 4
  int32_t lines;    // and for each row of the band
  int32_t first;    // row held
  int32_t rows;     // held
};
static_assert(sizeof(Slot) == kSlotBytes, "the plan leaves room for another size");

// How values become saliency: min((value - low) * factor * boost, ceiling), which also says "as it is", "zero" and "NaN".
template <typename Acc>
struct Scale {
  Acc low;
  Acc factor;
  Acc boost;  // 1, but for ranges so small that their inverse is infinite
  Acc ceiling;
};

// What a block needs to know while it draws, behind Share.
struct Frame {
  unsigned char* spilled;  // sums and places, where shared memory does not hold them
  Range band;
  int32_t at_slots;
  int32_t groups;
  int32_t width;
  int32_t unused;
  double scale[4];  // Scale<Acc>
};
static_assert(kAtTask + sizeof(Frame) <= kControlBytes, "the plan leaves too little room");

__device__ __forceinline__ Frame& frame_in(unsigned char* shared) { return *reinterpret_cast<Frame*>(shared + kAtTask); }

template <bool Spilled>
__device__ __forceinline__ unsigned char* board_of(unsigned char* shared) {
  return Spilled ? frame_in(shared).spilled : shared;
}

constexpr int kTileColumns = 4;
template <typename Acc>
constexpr int kTileRows = 16 / static_cast<int>(sizeof(Acc));

// What is the same for every map of a block: where sums go, and which cells each pixel lies between.
template <typename Acc, bool Spilled>
__device__ __noinline__ void set_board(const Plan& plan, unsigned char* shared, int32_t index, int32_t bands) {
  const Range band = share_of(plan.height, index, bands);
  __syncthreads();
  if (threadIdx.x == 0) {
    Frame& frame = frame_in(shared);
    frame.spilled = static_cast<unsigned char*>(plan.spilled) + blockIdx.x * plan.spilled_step;
    frame.band = band;
    frame.at_slots = plan.at_slots;
    frame.groups = plan.groups;
    frame.width = plan.width;
  }
  const int32_t width = (plan.width + kTileColumns - 1) / kTileColumns * kTileColumns, height = band.end - band.begin;
  Slot* slots = reinterpret_cast<Slot*>(shared + plan.at_slots);
#pragma unroll 1
  for (int32_t g = threadIdx.x; g < plan.groups; g += kThreads) {
    int32_t offset = plan.at_sums / static_cast<int32_t>(sizeof(Acc)), pitch = 0;
    Range source = {};
#pragma unroll 1
    for (int32_t other = 0; other <= g; ++other) {
      offset += (source.end - source.begin) * pitch;
      source = source_rows(plan.group[other].height, plan.height, index, bands);
      pitch = plan.group[other].width + 1;
    }
    Slot& slot = slots[g];
    slot.sums = offset - source.begin * pitch;
    slot.pitch = pitch;
    slot.last = plan.group[g].height - 1;
    slot.columns = plan.at_columns / static_cast<int32_t>(sizeof(Place<Acc>)) + g * width;
    slot.lines = plan.at_rows / static_cast<int32_t>(sizeof(Place<Acc>)) + g * plan.band_rows;
    slot.first = source.begin;
    slot.rows = source.end - source.begin;
  }
  __syncthreads();
  Place<Acc>* places = reinterpret_cast<Place<Acc>*>(board_of<Spilled>(shared));
#pragma unroll 1
  for (int32_t g = 0; g < plan.groups; ++g) {
#pragma unroll 1
    for (int32_t x = threadIdx.x; x < width; x += kThreads) {
      places[slots[g].columns + x] = place_of<Acc>(min(x, plan.width - 1), plan.group[g].width, plan.width);
    }
#pragma unroll 1
    for (int32_t y = threadIdx.x; y < height; y += kThreads) {
      places[slots[g].lines + y] = place_of<Acc>(band.begin + y, plan.group[g].height, plan.height);
    }
  }
}

// Values come from other blocks through the second-level cache; the first-level one may hold older ones.
template <typename Acc>
__device__ inline Acc fetch(const void* base, int64_t index) {
  return __ldcg(static_cast<const Acc*>(base) + index);
}

// sum_l lambda_l (P + beta N) of each group, for the rows this block draws from, and the largest |P| and |N| of each layer.
template <typename Acc, bool Spilled>
__device__ __noinline__ void merge(const Plan& plan, unsigned char* shared, int64_t map) {
  constexpr int kBatch = 2;  // layers whose values are in flight together
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Acc beta = static_cast<Acc>(plan.beta);
  Acc* board = reinterpret_cast<Acc*>(board_of<Spilled>(shared));
  const Slot* slots = reinterpret_cast<const Slot*>(shared + plan.at_slots);
  __syncthreads();  // nobody draws from the last map any more
#pragma unroll 1
  for (int32_t g = 0; g < plan.groups; ++g) {
    const GroupPlan& group = plan.group[g];
    const Slot& slot = slots[g];
    const int32_t width = group.width, count = slot.rows * width;
    Acc* sums = board + (slot.sums + slot.first * slot.pitch);
    const int64_t start = (map * group.height + slot.first) * width;
#pragma unroll 1
    for (int32_t l = 0; l < group.layers; l += kBatch) {
      Acc most_positive[kBatch] = {}, most_negative[kBatch] = {};
#pragma unroll 1
      for (int32_t i = threadIdx.x; i < count; i += kThreads) {
        const int32_t row = static_cast<uint32_t>(i) / static_cast<uint32_t>(width), column = i - row * width;
        Acc* to = sums + row * slot.pitch + column;
        Acc positive[kBatch], negative[kBatch] = {};
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          if (l + j >= group.layers) continue;
          const LayerPlan& layer = plan.layer[group.first + l + j];
          positive[j] = fetch<Acc>(layer.positive, start + i);
          if (plan.signs == 2) negative[j] = fetch<Acc>(layer.negative, start + i);
        }
        Acc total = l == 0 ? Acc(0) : *to;
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          if (l + j >= group.layers) continue;
          const Acc weight = static_cast<Acc>(plan.layer[group.first + l + j].weight);
          most_positive[j] = larger(most_positive[j], abs(positive[j]));
          Acc value = positive[j];
          if (plan.signs == 2) {
            most_negative[j] = larger(most_negative[j], abs(negative[j]));
            value = fused(beta, negative[j], value);
          }
          total = l + j == 0 ? weight * value : fused(weight, value, total);
        }
        *to = total;
        if (column == width - 1) to[1] = total;
      }
      if (!plan.normalize) continue;
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        if (l + j >= group.layers) continue;
        Acc* extents = reinterpret_cast<Acc*>(shared + kControlBytes) + (warp * plan.layers + group.first + l + j) * 2;
        for (int step = 16; step >= 1; step /= 2) {
          most_positive[j] = larger(most_positive[j], __shfl_xor_sync(kAllLanes, most_positive[j], step));
          if (plan.signs == 2) {
            most_negative[j] = larger(most_negative[j], __shfl_xor_sync(kAllLanes, most_negative[j], step));
          }
        }
        if (lane == 0) {
          extents[0] = most_positive[j];
          extents[1] = most_negative[j];
        }
      }
    }
  }
  __syncthreads();
}

// Four pixels of one source row, stretched along x.
template <typename Acc>
__device__ __forceinline__ void stretch(const Acc* row, const Place<Acc> (&places)[kTileColumns], Acc (&to)[kTileColumns]) {
#pragma unroll
  for (int q = 0; q < kTileColumns; ++q) {
    const Acc here = row[places[q].cell], next = row[places[q].cell + 1];
    to[q] = fused(places[q].fraction, next - here, here);
  }
}

template <typename Acc>
__device__ __forceinline__ Acc scaled(Acc value, const Scale<Acc>& scale) {
  const Acc result = (value - scale.low) * scale.factor * scale.boost;
  return result > scale.ceiling ? scale.ceiling : result;
}

template <typename Acc>
__device__ __forceinline__ void store_four(Acc* to, const Acc (&value)[4]) {
  if constexpr (sizeof(Acc) == 4) {
    __stcs(reinterpret_cast<float4*>(to), make_float4(value[0], value[1], value[2], value[3]));
  } else {
    __stcs(reinterpret_cast<double2*>(to), make_double2(value[0], value[1]));
    __stcs(reinterpret_cast<double2*>(to) + 1, make_double2(value[2], value[3]));
  }
}

// The band's pixels: looked at for their extremes (`map` is null), or written. Done twice rather than kept: a map is larger
// than the layers' maps it comes from, and this is bounded by what can be written. Fused operations are spelled out, so that
// both times give the same bits. The map's extremes go to Control, warp by warp.
template <typename Acc, bool Spilled>
__device__ __noinline__ void sweep(Acc* map) {
  MHEX_SHARED(shared);
  constexpr int rows = kTileRows<Acc>;
  const Frame& frame = frame_in(shared);
  const int32_t across = (frame.width + kTileColumns - 1) / kTileColumns;
  const int32_t last = frame.band.end - frame.band.begin - 1, tiles = across * ((last + rows) / rows);
  Acc low = Limits<Acc>::largest, high = -Limits<Acc>::largest;
#pragma unroll 1
  for (int32_t tile = threadIdx.x; tile < tiles; tile += kThreads) {
    const int32_t row = static_cast<uint32_t>(tile) / static_cast<uint32_t>(across);
    const int32_t x = (tile - row * across) * kTileColumns, y = row * rows;
    Acc sum[rows][kTileColumns] = {};
    const Slot* slot = reinterpret_cast<const Slot*>(shared + frame.at_slots);
#pragma unroll 1
    for (const Slot* end = slot + frame.groups; slot != end; ++slot) {
      const unsigned char* board = board_of<Spilled>(shared);
      const Acc* sums = reinterpret_cast<const Acc*>(board) + slot->sums;
      const Place<Acc>* lines = reinterpret_cast<const Place<Acc>*>(board) + slot->lines;
      Place<Acc> places[kTileColumns];
#pragma unroll
      for (int q = 0; q < kTileColumns; ++q) {
        places[q] = reinterpret_cast<const Place<Acc>*>(board)[slot->columns + x + q];
      }
      int32_t held = -2;
      Acc above[kTileColumns], below[kTileColumns];
#pragma unroll
      for (int j = 0; j < rows; ++j) {
        const Place<Acc> place = lines[min(y + j, last)];
        if (place.cell != held) {
          if (place.cell == held + 1) {
#pragma unroll
            for (int q = 0; q < kTileColumns; ++q) above[q] = below[q];
          } else {
            stretch(sums + place.cell * slot->pitch, places, above);
          }
          stretch(sums + min(place.cell + 1, slot->last) * slot->pitch, places, below);
          held = place.cell;
        }
#pragma unroll
        for (int q = 0; q < kTileColumns; ++q) sum[j][q] += fused(place.fraction, below[q] - above[q], above[q]);
      }
    }
    // Rows and columns beyond the edge repeat those at it.
    if (map == nullptr) {
#pragma unroll
      for (int j = 0; j < rows; ++j) {
#pragma unroll
        for (int q = 0; q < kTileColumns; ++q) {
          low = sum[j][q] < low ? sum[j][q] : low;
          high = sum[j][q] > high ? sum[j][q] : high;
        }
      }
      continue;
    }
    const Scale<Acc> scale = *reinterpret_cast<const Scale<Acc>*>(frame.scale);
    const int32_t width = frame.width;
    Acc* to = map + static_cast<int64_t>(frame.band.begin + y) * width + x;
#pragma unroll
    for (int j = 0; j < rows; ++j) {
      if (y + j > last) break;
      Acc value[kTileColumns];
#pragma unroll
      for (int q = 0; q < kTileColumns; ++q) value[q] = scaled(sum[j][q], scale);
      if (width % 4 == 0) {
        store_four(to, value);
      } else {
#pragma unroll
        for (int q = 0; q < kTileColumns; ++q) {
          if (x + q < width) to[q] = value[q];
        }
      }
      to += width;
    }
  }
  if (map != nullptr) return;
  for (int step = 16; step >= 1; step /= 2) {
    const Acc other_low = __shfl_xor_sync(kAllLanes, low, step), other_high = __shfl_xor_sync(kAllLanes, high, step);
    low = other_low < low ? other_low : low;
    high = other_high > high ? other_high : high;
  }
  Acc* extremes = reinterpret_cast<Acc*>(control_in(shared).extremes);
  if (threadIdx.x % 32 == 0) {
    extremes[threadIdx.x / 32] = low;
    extremes[kWarps + threadIdx.x / 32] = high;
  }
}

// What this block found: the map's low and high, then what the layers' extents come to.
template <typename Acc>
__device__ __forceinline__ void collect_own(const Plan& plan, unsigned char* shared) {
  const Acc* extremes = reinterpret_cast<const Acc*>(control_in(shared).extremes);
  const Acc* extents = reinterpret_cast<const Acc*>(shared + kControlBytes);
  Acc* collected = reinterpret_cast<Acc*>(shared + plan.at_collected);
  __syncthreads();
#pragma unroll 1
  for (int32_t i = threadIdx.x; i < 2 + 2 * plan.layers; i += kThreads) {
    Acc value = i < 2 ? extremes[i * kWarps] : Acc(0);
#pragma unroll 1
    for (int other = 0; other < kWarps; ++other) {
      if (i >= 2) {
        value = larger(value, extents[other * 2 * plan.layers + i - 2]);
      } else {
        const Acc found = extremes[i * kWarps + other];
        value = (i == 0 ? found < value : found > value) ? found : value;
      }
    }
    collected[i] = value;
  }
  __syncthreads();
}

// What all blocks of the unit found, from (2 + 2 L, S).
template <typename Acc>
__device__ __forceinline__ void collect_all(const Plan& plan, unsigned char* shared, const Acc* exchange) {
  Acc* collected = reinterpret_cast<Acc*>(shared + plan.at_collected);
  __syncthreads();  // nobody reads the last map's any more
#pragma unroll 1
  for (int32_t i = static_cast<int32_t>(threadIdx.x / 32); i < 2 + 2 * plan.layers; i += kWarps) {
    Acc value = i == 0 ? Limits<Acc>::largest : i == 1 ? -Limits<Acc>::largest : Acc(0);
    const auto take = [&](Acc other) {
      value = i == 0 ? (other < value ? other : value) : i == 1 ? (other > value ? other : value) : larger(value, other);
    };
    for (int32_t s = threadIdx.x % 32; s < plan.splits; s += 32) {
      take(fetch<Acc>(exchange, static_cast<int64_t>(i) * plan.splits + s));
    }
    for (int step = 16; step >= 1; step /= 2) take(__shfl_xor_sync(kAllLanes, value, step));
    if (threadIdx.x % 32 == 0) collected[i] = value;
  }
  __syncthreads();
}

// From the extremes of the whole map to what its values become.
template <typename Acc>
__device__ __forceinline__ Scale<Acc> scale_of(const Plan& plan, const Acc* collected) {
  Acc size = 0;
  bool finite = true;
#pragma unroll 1
  for (int32_t l = 0; l < plan.layers; ++l) {
    const Acc positive = collected[2 + 2 * l], negative = collected[3 + 2 * l];
    finite = finite && positive <= Limits<Acc>::largest && negative <= Limits<Acc>::largest;
    size += abs(static_cast<Acc>(plan.layer[l].weight)) * (positive + static_cast<Acc>(plan.beta) * negative);
  }
  const Acc low = collected[0], spread = collected[1] - low;
  if (!finite) return {low, quiet_nan<Acc>(), 1, 1};  // as plain arithmetic has it for a map with NaN or infinity in it
  // A range that rounding alone may leave in a constant map counts as none.
  if (!(spread > 16 * Limits<Acc>::epsilon * size)) return {low, 0, 1, 1};
  const Acc boost = Acc(1) / spread <= Limits<Acc>::largest ? Acc(1) : Acc(1.8446744073709552e19);
  Acc factor = Acc(1) / (spread * boost);
  // Rounded up, so that the largest value comes out as 1 and not just below it.
  while (spread * factor * boost < Acc(1)) factor *= Acc(1) + Limits<Acc>::epsilon;
  return {low, factor, boost, 1};
}

template <typename Acc>
__device__ __forceinline__ void set_scale(const Plan& plan, unsigned char* shared) {
  if (threadIdx.x == 0) {
    Frame& frame = frame_in(shared);
    Scale<Acc> scale = {0, 1, 1, quiet_nan<Acc>()};  // as it is: nothing is larger than NaN
    if (plan.normalize) scale = scale_of(plan, reinterpret_cast<const Acc*>(shared + plan.at_collected));
    *reinterpret_cast<Scale<Acc>*>(frame.scale) = scale;
  }
  __syncthreads();
}

// Every map of this block's targets, or this block's bands of them.
template <typename Acc, bool Spilled>
__device__ __forceinline__ void draw(const Plan& plan, unsigned char* shared) {
  const Share& share = share_in(shared);
  const bool shares = plan.meeting == Meeting::cluster || plan.meeting == Meeting::grid;
  set_board<Acc, Spilled>(plan, shared, shares ? share.split : 0, shares ? plan.splits : 1);
  const auto map_of = [&](int32_t t) {
    return static_cast<Acc*>(plan.saliency) + (share.batch_map + t) * plan.height * plan.width;
  };
  const auto exchange_of = [&](int32_t t) {
    return static_cast<Acc*>(plan.exchange) + (share.map + t) * (2 + 2 * plan.layers) * plan.splits;
  };
  // Where others must be asked for their extremes, all maps are looked at before any is written: one meeting for all.
  const bool asks = plan.normalize && shares;
#pragma unroll 1
  for (int32_t t = 0; t < share.targets; ++t) {
    merge<Acc, Spilled>(plan, shared, share.map + t);
    if (plan.normalize) {
      sweep<Acc, Spilled>(nullptr);
      collect_own<Acc>(plan, shared);
    }
    if (asks) {
      const Acc* collected = reinterpret_cast<const Acc*>(shared + plan.at_collected);
#pragma unroll 1
      for (int32_t i = threadIdx.x; i < 2 + 2 * plan.layers; i += kThreads) {
        exchange_of(t)[i * plan.splits + share.split] = collected[i];
      }
    } else {
      set_scale<Acc>(plan, shared);
      sweep<Acc, Spilled>(map_of(t));
    }
  }
  if (!asks) return;
  meet(plan, share.unit, plan.task == Task::combine ? 1 : 2);
#pragma unroll 1
  for (int32_t t = 0; t < share.targets; ++t) {
    if (share.targets > 1) merge<Acc, Spilled>(plan, shared, share.map + t);
    collect_all<Acc>(plan, shared, exchange_of(t));
    set_scale<Acc>(plan, shared);
    sweep<Acc, Spilled>(map_of(t));
  }
}

}  // namespace mhex::cuda
