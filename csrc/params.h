// What the kernels are told: sizes, strides, pointers. No torch header here or in kernels/.
//
// Letters: B batch, n targets per sample, K classes, L layers, C_l channels, P_l = h_l * w_l positions of a layer,
// H x W output size. Tokens are positions of a layer with h_l = 1.
#pragma once

#include <cstdint>

namespace mhex {

constexpr int kMaxLayers = 128;

enum class DType : int32_t { float32, float16, bfloat16, float64 };

inline int64_t bytes_of(DType dtype) {
  switch (dtype) {
    case DType::float16:
    case DType::bfloat16:
      return 2;
    case DType::float32:
      return 4;
    case DType::float64:
      break;
  }
  return 8;
}

// A_l and M_l. Strides count elements; element (b, k, p) of A_l is at b * stride_b + k * stride_c + p * stride_p, so one
// stride must serve both spatial axes.
struct Layer {
  const void* activation;
  int64_t stride_b;
  int64_t stride_c;
  int64_t stride_p;
  const void* matrix;  // M_l, (K, C_l), contiguous, in the accumulation type
  const void* sums;    // (2, C_l): per channel, the sum over classes of max(M, 0) and of max(-M, 0)
  double weight;       // lambda_l
  int32_t channels;
  int32_t height;
  int32_t width;
  DType dtype;
};

// Which entries of M_l count, and how much. hard: those with a sharpness of at least tau. soft: all, times
// sharpness^exponent.
struct Sharpness {
  double tau_pos;
  double tau_neg;
  double exponent;
  bool soft;
};

struct Problem {
  int64_t batch;
  int64_t targets;        // n
  int64_t classes;        // K
  const int64_t* target;  // (B, n); null where n = K and every class is meant, in order
  Sharpness sharpness;
  double beta;
  int32_t layers;
  bool float64;  // accumulation type: double, else float
  bool rectify;  // whether ReLU(A_l) takes the place of A_l
  Layer layer[kMaxLayers];
};

// Where the layers' own maps go: (B, n, P_l) of each sign, in the accumulation type.
struct SignedMaps {
  void* positive[kMaxLayers];
  void* negative[kMaxLayers];
};

struct Output {
  void* saliency;  // (B, n, H, W) in the accumulation type
  int32_t height;
  int32_t width;
  bool normalize;  // whether each map is brought to [0, 1]
};

// Runs body(begin, end, context) over [0, count), cut into ranges as the host's thread pool likes.
using Body = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = void (*)(int64_t count, Body body, void* context);

struct Threads {
  ParallelFor parallel_for;
  int32_t count;
};

}  // namespace mhex
