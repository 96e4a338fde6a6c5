// Tensors, checked, as the plain structs that kernels take. Shared by cpu/ and cuda/.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

#include "params.h"

namespace mhex {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Holds the copies that a problem's pointers may point into, for as long as it lives.
struct Tensors {
  std::vector<Tensor> activations;
  std::vector<Tensor> matrices;
  std::vector<Tensor> sums;
  std::optional<Tensor> targets;
};

inline DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::Half:
      return DType::float16;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    case ScalarType::Double:
      return DType::float64;
    default:
      STD_TORCH_CHECK(false, "activations must be float32, float16, bfloat16 or float64");
      return DType::float32;
  }
}

inline bool same_device(const Tensor& tensor, const Tensor& like) {
  return tensor.is_cuda() == like.is_cuda() && tensor.get_device_index() == like.get_device_index();
}

// A size, counted as kernels count.
inline int32_t size_of(int64_t size, const char* name) {
  STD_TORCH_CHECK(size >= 0 && size <= std::numeric_limits<int32_t>::max(), name, " must lie in [0, 2^31 - 1], got ", size);
  return static_cast<int32_t>(size);
}

// (B, C, h, w) or (B, T, C) -> Layer. A layout in which neither the positions nor the channels of a sample lie at one stride
// is copied to a contiguous one first; contiguous and channels_last tensors, and slices of them by sample or channel, are
// not.
inline Layer layer_of(Tensor& activation, bool tokens) {
  STD_TORCH_CHECK(activation.dim() == (tokens ? 3 : 4), "activations must be ", tokens ? "(B, T, C)" : "(B, C, h, w)");
  const auto regular = [&] {
    if (tokens) return true;
    return activation.size(2) == 1 || activation.size(3) == 1 ||
           activation.stride(2) == activation.stride(3) * activation.size(3);
  };
  const auto dense = [&] {  // what kernels read along is contiguous: channels of a position, or positions of a channel
    const int64_t position = tokens ? activation.stride(1) : activation.stride(activation.size(3) > 1 ? 3 : 2);
    const int64_t positions = tokens ? activation.size(1) : activation.size(2) * activation.size(3);
    return activation.stride(tokens ? 2 : 1) == 1 || position == 1 || positions <= 1;
  };
  if (!regular() || !dense()) activation = torch::stable::contiguous(activation);
  Layer layer = {};
  layer.activation = activation.const_data_ptr();
  layer.stride_b = activation.stride(0);
  layer.stride_c = activation.stride(tokens ? 2 : 1);
  layer.stride_p = tokens ? activation.stride(1) : activation.stride(activation.size(3) > 1 ? 3 : 2);
  layer.channels = size_of(activation.size(tokens ? 2 : 1), "a layer's number of channels");
  layer.height = tokens ? 1 : size_of(activation.size(2), "a layer's height");
  layer.width = size_of(activation.size(tokens ? 1 : 3), tokens ? "the number of tokens" : "a layer's width");
  STD_TORCH_CHECK(tokens || (layer.height > 0 && layer.width > 0), "activations must have at least one position");
  layer.dtype = dtype_of(activation);
  return layer;
}

// Everything about a problem but the layers' weights and beta.
inline Problem problem_of(Tensors& tensors, const Sharpness& sharpness, bool tokens) {
  const size_t layers = tensors.activations.size();
  STD_TORCH_CHECK(layers > 0 && layers <= kMaxLayers, "there must be 1 to ", kMaxLayers, " layers, got ", layers);
  STD_TORCH_CHECK(tensors.matrices.size() == layers && tensors.sums.size() == layers,
                  "activations, matrices and sums must be of one length");
  const Tensor& first = tensors.activations[0];
  Problem problem = {};
  problem.sharpness = sharpness;
  problem.layers = static_cast<int32_t>(layers);
  problem.float64 = first.scalar_type() == ScalarType::Double;
  problem.batch = first.size(0);
  problem.classes = tensors.matrices[0].size(0);
  const ScalarType wide = problem.float64 ? ScalarType::Double : ScalarType::Float;
  for (size_t l = 0; l < layers; ++l) {
    Tensor& activation = tensors.activations[l];
    Layer layer = layer_of(activation, tokens);
    STD_TORCH_CHECK((layer.dtype == DType::float64) == problem.float64, "activations must be all float64 or none of them");
    STD_TORCH_CHECK(activation.size(0) == problem.batch, "activations must be of one batch size");
    STD_TORCH_CHECK(same_device(activation, first), "activations must be on one device");
    Tensor& matrix = tensors.matrices[l];
    STD_TORCH_CHECK(matrix.dim() == 2 && matrix.size(0) == problem.classes && matrix.size(1) == layer.channels &&
                        matrix.scalar_type() == wide && same_device(matrix, first),
                    "matrices must be (K, C), in the accumulation dtype, on the activations' device");
    Tensor& sums = tensors.sums[l];
    STD_TORCH_CHECK(sums.dim() == 2 && sums.size(0) == 2 && sums.size(1) == layer.channels && sums.scalar_type() == wide &&
                        same_device(sums, first),
                    "sums must be (2, C), in the accumulation dtype, on the activations' device");
    if (!matrix.is_contiguous()) matrix = torch::stable::contiguous(matrix);
    if (!sums.is_contiguous()) sums = torch::stable::contiguous(sums);
    layer.matrix = matrix.const_data_ptr();
    layer.sums = sums.const_data_ptr();
    layer.weight = 1;
    problem.layer[l] = layer;
  }
  problem.targets = problem.classes;
  if (tensors.targets.has_value()) {
    Tensor& targets = *tensors.targets;
    STD_TORCH_CHECK(targets.dim() == 2 && targets.size(0) == problem.batch && targets.scalar_type() == ScalarType::Long &&
                        same_device(targets, first),
                    "targets must be (B, n), int64, on the activations' device");
    if (!targets.is_contiguous()) targets = torch::stable::contiguous(targets);
    problem.target = static_cast<const int64_t*>(targets.const_data_ptr());
    problem.targets = targets.size(1);
  }
  return problem;
}

inline void set_weights(Problem& problem, const std::vector<double>& weights, double beta) {
  STD_TORCH_CHECK(weights.size() == static_cast<size_t>(problem.layers), "layer_weights must hold one number per layer");
  for (int32_t l = 0; l < problem.layers; ++l) problem.layer[l].weight = weights[l];
  problem.beta = beta;
}

// The layers' own maps (B, n, h, w) as a problem for combination.
inline Problem combination_of(std::vector<Tensor>& positive, std::vector<Tensor>& negative, SignedMaps& maps) {
  STD_TORCH_CHECK(!positive.empty() && positive.size() <= kMaxLayers && positive.size() == negative.size(),
                  "positive and negative must hold 1 to ", kMaxLayers, " maps each");
  Problem problem = {};
  problem.layers = static_cast<int32_t>(positive.size());
  problem.batch = positive[0].size(0);
  problem.targets = positive[0].size(1);
  problem.float64 = positive[0].scalar_type() == ScalarType::Double;
  const ScalarType wide = problem.float64 ? ScalarType::Double : ScalarType::Float;
  for (size_t l = 0; l < positive.size(); ++l) {
    for (Tensor* map : {&positive[l], &negative[l]}) {
      STD_TORCH_CHECK(map->dim() == 4 && map->size(0) == problem.batch && map->size(1) == problem.targets &&
                          map->size(2) == positive[l].size(2) && map->size(3) == positive[l].size(3) &&
                          map->scalar_type() == wide && same_device(*map, positive[0]),
                      "maps must be (B, n, h, w), of one dtype, on one device");
      if (!map->is_contiguous()) *map = torch::stable::contiguous(*map);
    }
    STD_TORCH_CHECK(positive[l].size(2) > 0 && positive[l].size(3) > 0, "maps must have at least one position");
    problem.layer[l].height = size_of(positive[l].size(2), "a map's height");
    problem.layer[l].width = size_of(positive[l].size(3), "a map's width");
    maps.positive[l] = const_cast<void*>(positive[l].const_data_ptr());
    maps.negative[l] = const_cast<void*>(negative[l].const_data_ptr());
  }
  return problem;
}

inline Tensor new_maps(const Tensor& like, bool float64, const std::vector<int64_t>& shape) {
  return torch::stable::new_empty(like, shape, float64 ? ScalarType::Double : ScalarType::Float);
}

// Room for B n maps of (H, W), which has been counted before memory is asked for.
inline Tensor new_output(const Tensor& like, const Problem& problem, int64_t height, int64_t width) {
  STD_TORCH_CHECK(size_of(height, "height") > 0 && size_of(width, "width") > 0, "maps must have at least one pixel");
  return new_maps(like, problem.float64, {problem.batch, problem.targets, height, width});
}

}  // namespace mhex
