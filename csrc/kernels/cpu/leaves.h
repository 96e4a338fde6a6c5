// The inner loops, once per instruction set. The driver (saliency.cpp) picks a table at run time.
#pragma once

#include <cstdint>

#include "../../params.h"

namespace mhex::cpu {

// How one axis of a layer is stretched to the output. Output x lies between source cells i and i + 1, at `fraction[x]`;
// all x of cell i are [begin[i], begin[i + 1]). Both arrays are padded so that a whole vector may be read at any x.
template <typename Acc>
struct Axis {
  const int32_t* begin;  // (cells + 1)
  const Acc* fraction;   // (size + padding)
  int32_t cells;
};

// One source of a blended output row: row0 + fraction * (row1 - row0).
template <typename Acc>
struct BlendSource {
  const Acc* row0;
  const Acc* row1;
  Acc fraction;
};

constexpr int32_t kTogether = 4;  // channels of a list come in groups of this many
constexpr int64_t kPadding = 16;  // elements behind rows and fractions that a vector may touch; lanes of the widest one

// The smallest and largest values so far, lane by lane.
template <typename Acc>
struct Extremes {
  Acc low[kPadding];
  Acc high[kPadding];
};

// The largest |value| of each sign's map, and whether every value is finite.
template <typename Acc>
struct Extent {
  Acc positive;
  Acc negative;
  bool finite;
};

template <typename Acc>
struct Leaves {
  // Of each function that reads A there are two: the second reads ReLU(A) in its place.

  // out[i] = sum_j weights[j] * A[channels[j] * stride + i]. Channels that are not listed are not read; `count` is a
  // multiple of kTogether.
  void (*planes[2])(const void* base, DType dtype, int64_t stride, const int32_t* channels, const Acc* weights,
                    int32_t count, Acc* out, int64_t positions);

  // positive[p] = sum_k weights_positive[k] * A[p * stride + k], the same for negative unless it is null.
  void (*dots[2])(const void* base, DType dtype, int64_t stride, const Acc* weights_positive, const Acc* weights_negative,
                  int32_t channels, Acc* positive, Acc* negative, int64_t positions);

  // The same sum over the listed channels alone, for lists so short that most of A is better not touched.
  void (*picks[2])(const void* base, DType dtype, int64_t stride, const int32_t* channels, const Acc* weights, int32_t count,
                   Acc* out, int64_t positions);

  // total[p] = (first ? 0 : total[p]) + weight * (positive[p] + beta * negative[p]); negative may be null.
  Extent<Acc> (*merge)(Acc* total, const Acc* positive, const Acc* negative, Acc weight, Acc beta, bool first,
                       int64_t positions);

  // One row of a layer stretched along x. `out` is padded like the axis.
  void (*stretch)(const Acc* row, const Axis<Acc>& axis, Acc* out);

  // out[x] = sum over sources; the extremes are kept up to date.
  void (*blend)(const BlendSource<Acc>* sources, int32_t count, Acc* out, int32_t width, Extremes<Acc>& extremes);

  // values = min((values - low) * factor, 1).
  void (*scale)(Acc* values, int64_t count, Acc low, Acc factor);
};

struct InstructionSet {
  const char* name;
  Leaves<float> single;
  Leaves<double> twice;
};

// The widest set that this processor runs; the environment variable MHEX_CPU ("baseline", "avx2", "avx512") may ask for a
// narrower one.
const InstructionSet& instruction_set();

}  // namespace mhex::cpu
