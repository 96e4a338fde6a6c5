// What one launch is told: who reads which positions, how blocks that share a map meet, and where things lie in shared
// memory and in scratch. Made on the host (plan.cu), passed by value.
//
// Letters as in params.h. Further: R rows, the weight vectors one block applies at once (targets x signs); S splits, the
// blocks that share one sample and its targets ("unit" = those S blocks).
#pragma once

#include <cstddef>
#include <cstdint>

#include "../../params.h"
#include "saliency.h"

#if defined(__CUDACC__)
#define MHEX_BOTH __host__ __device__
#else
#define MHEX_BOTH
#endif

namespace mhex::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxRows = 8;
// Pieces of a layer begin at multiples of this many positions: whole 32-byte sectors, whichever the layout.
constexpr int kGrain = 16;
constexpr int kControlBytes = 512;  // of shared memory, for what blocks need to know
constexpr int kSlotBytes = 28;      // of Slot, one per group

enum class Task : int32_t { saliency, signed_maps, combine, tokens };

// How the blocks of a unit wait for each other's layers' maps.
//   alone    there is but one block
//   cluster  the hardware keeps a cluster's blocks resident together and has a barrier for them (sm_90 and newer)
//   grid     a cooperative launch keeps all blocks resident: they count arrivals in memory
//   last     nobody waits: whoever arrives last finishes the maps
enum class Meeting : int32_t { alone, cluster, grid, last };

// rows: a position's channels lie next to each other; planes: a channel's positions do. vector: 16 bytes per load.
enum class Path : int32_t { row_vectors, rows, plane_vectors, planes };

struct LayerPlan {
  const void* activation;
  int64_t stride_b;
  int64_t stride_c;
  int64_t stride_p;
  const void* matrix;
  const void* sums;
  void* positive;  // (samples, n, P) in the accumulation type
  void* negative;
  double weight;
  int64_t work;       // of the layers before this one, in bytes
  int64_t per_grain;  // work of kGrain positions
  int32_t channels;
  int32_t positions;
  DType dtype;
  Path path;
};

// Layers of one size; they are added up before they are stretched.
struct GroupPlan {
  int32_t height;
  int32_t width;
  int32_t first;
  int32_t layers;
};

struct Plan {
  int64_t first_sample;  // of this launch
  int64_t targets;       // n
  int64_t classes;       // K
  const int64_t* target;
  Sharpness sharpness;
  double beta;
  int64_t work;  // bytes of one sample

  void* saliency;  // (B, n, H, W), or (B, n, T) of tokens
  const bool* mask;
  uint32_t* arrivals;    // one per unit, zero before the launch
  void* exchange;        // per map, (2 + 2 L, S): extremes of a band and of its share of each layer's maps
  void* spilled;         // sums and places where shared memory does not hold them: so many bytes per block
  int64_t spilled_step;  // zero where it does

  Task task;
  Meeting meeting;
  int32_t splits;
  int32_t chunks;  // of targets
  int32_t targets_per_chunk;
  int32_t signs;  // 2 if negative evidence is wanted
  int32_t layers;
  int32_t groups;
  int32_t height;
  int32_t width;
  bool normalize;
  bool rectify;
  int32_t tile;       // channels whose weights are held at once
  int32_t band_rows;  // the most rows of the map that one block draws
  // Byte offsets in shared memory. First what turns activations into layers' maps, then what turns those into a map.
  int32_t at_list;
  int32_t at_partial;
  int32_t at_slots;
  int32_t at_collected;
  // These in `spilled`, if that is where they are.
  int32_t at_sums;
  int32_t at_columns;
  int32_t at_rows;

  LayerPlan layer[kMaxLayers];
  GroupPlan group[kMaxLayers];
};

// A launch, but for the kernel itself.
struct Launch {
  Plan plan;
  Failure failure;
  int32_t rows;     // R
  int64_t samples;  // per launch
  int64_t batch;
  int64_t shared_bytes;
  int64_t scratch_bytes;
  int64_t arrivals_bytes;
};

struct Machine {
  int32_t multiprocessors;
  int64_t shared_limit;  // bytes that one block may use
  bool clusters;
  bool cooperative;
};

struct Job {
  Task task;
  const Problem* problem;
  const SignedMaps* maps;  // of signed_maps and combine
  Output output;           // of saliency and combine
  const bool* mask;        // of tokens
  void* scores;            // of tokens
};

// How many blocks of a kernel one multiprocessor holds.
using Residents = int (*)(bool float64, int32_t rows, int64_t shared_bytes);

// `scratch` may be null to learn how much of it is needed.
void make_launch(const Job& job, const Machine& machine, Residents residents, void* scratch, Launch& launch);

// ----------------------------------------------------------------------------------- geometry, the same on host and device

// torch's bilinear rule with align_corners=False: output x looks at place (x + 1/2) * cells / size - 1/2. In whole numbers,
// so that host and device never disagree about a cell, and of 32 bits, as a 64-bit division costs several times as much:
// 2 * cells * size must fit.
template <typename Acc>
struct Place {
  Acc fraction;
  int32_t cell;
};

template <typename Acc>
MHEX_BOTH inline Place<Acc> place_of(int32_t x, int32_t cells, int32_t size) {
  const uint32_t twice = (2u * static_cast<uint32_t>(x) + 1u) * static_cast<uint32_t>(cells);
  if (twice <= static_cast<uint32_t>(size)) return {Acc(0), 0};
  const uint32_t numerator = twice - static_cast<uint32_t>(size), denominator = 2u * static_cast<uint32_t>(size);
  const uint32_t cell = numerator / denominator;
  return {static_cast<Acc>(numerator - cell * denominator) / static_cast<Acc>(denominator), static_cast<int32_t>(cell)};
}

struct Range {
  int32_t begin;
  int32_t end;
};

// Share `index` of `count` of [0, size), where size * count fits 32 bits.
MHEX_BOTH inline Range share_of(int32_t size, int32_t index, int32_t count) {
  const auto all = static_cast<uint32_t>(size), at = static_cast<uint32_t>(index), by = static_cast<uint32_t>(count);
  return {static_cast<int32_t>(all * at / by), static_cast<int32_t>(all * (at + 1u) / by)};
}

// The rows of a layer that band `index` of `count` loads: those it draws from, and its share of all of them, so that no row
// is left out where the extremes of the whole layer are looked for.
MHEX_BOTH inline Range source_rows(int32_t layer_height, int32_t height, int32_t index, int32_t count) {
  const Range share = share_of(layer_height, index, count), band = share_of(height, index, count);
  if (band.begin == band.end) return share;
  Range rows = {place_of<float>(band.begin, layer_height, height).cell,
                place_of<float>(band.end - 1, layer_height, height).cell + 2};
  if (rows.end > layer_height) rows.end = layer_height;
  if (share.begin < share.end) {
    if (share.begin < rows.begin) rows.begin = share.begin;
    if (share.end > rows.end) rows.end = share.end;
  }
  return rows;
}

// Where split `index` begins: a layer, and how many grains into it.
struct Cut {
  int32_t layer;
  int32_t grain;
};

MHEX_BOTH inline Cut cut_of(const Plan& plan, int32_t index) {
  if (index >= plan.splits) return {plan.layers, 0};
  // The remainder apart, as work * index may not fit 64 bits.
  const int64_t begin = plan.work / plan.splits * index + plan.work % plan.splits * index / plan.splits;
  int32_t l = 0;
  while (l + 1 < plan.layers && plan.layer[l + 1].work <= begin) ++l;
  return {l, static_cast<int32_t>((begin - plan.layer[l].work) / plan.layer[l].per_grain)};
}

}  // namespace mhex::cuda
