// The GPU's side of the operators: what cuda/ops.cpp calls after it has checked the tensors.
//
// Every function only puts work on a stream; none waits for it, so all of them can be captured in a graph. A target outside
// [0, K) cannot be found out without waiting: its map becomes NaN, and nothing is read out of bounds.
#pragma once

#include <cstddef>

#include "../../params.h"

namespace mhex::cuda {

// Where work goes. `scratch` is as large as the matching function below says and aligned to 256 bytes; the call leaves
// nothing in it that another one needs.
struct Queue {
  int device;
  void* stream;  // cudaStream_t
  void* scratch;
};

// Null, or what went wrong.
using Failure = const char*;

struct Scratch {
  size_t bytes;
  Failure failure;
};

Scratch saliency_scratch(const Problem& problem, const Output& output, int device);
Scratch combine_scratch(const Problem& problem, const SignedMaps& maps, const Output& output, int device);
Scratch token_scratch(const Problem& problem, const bool* mask, int device);

// As in kernels/cpu/saliency.h. signed_maps needs no scratch.
Failure saliency_maps(const Problem& problem, const Output& output, const Queue& queue);
Failure signed_maps(const Problem& problem, const SignedMaps& maps, const Queue& queue);
Failure combine_maps(const Problem& problem, const SignedMaps& maps, const Output& output, const Queue& queue);
Failure token_saliency(const Problem& problem, const bool* mask, void* scores, const Queue& queue);

}  // namespace mhex::cuda
