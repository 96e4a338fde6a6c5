// The operators of csrc/module.cpp, once for all devices: tensors in, checked, and tensors out. A device says how they run.
#pragma once

#include <optional>
#include <utility>
#include <vector>

#include "problem.h"

namespace mhex {

// `Device` has `kChecksTargets` (whether target values can be looked at here) and, each given a tensor of the result to
// know where to run,
//   saliency_maps(problem, output, like), signed_maps(problem, maps, like), combine_maps(problem, maps, output, like),
//   token_saliency(problem, mask, scores, like).
template <typename Device>
struct Operators {
  static Tensor saliency_maps(std::vector<Tensor> activations, std::vector<Tensor> matrices, std::vector<Tensor> sums,
                              std::optional<Tensor> targets, double tau_pos, double tau_neg, bool soft, double exponent,
                              bool rectify, double beta, std::vector<double> layer_weights, int64_t height, int64_t width,
                              bool normalize) {
    Tensors tensors = {std::move(activations), std::move(matrices), std::move(sums), std::move(targets)};
    Problem problem = checked(tensors, {tau_pos, tau_neg, exponent, soft}, false);
    problem.rectify = rectify;
    set_weights(problem, layer_weights, beta);
    Tensor maps = new_output(tensors.activations[0], problem, height, width);
    if (!empty(problem)) Device::saliency_maps(problem, output_of(maps, height, width, normalize), maps);
    return maps;
  }

  static std::vector<Tensor> signed_maps(std::vector<Tensor> activations, std::vector<Tensor> matrices,
                                         std::vector<Tensor> sums, std::optional<Tensor> targets, double tau_pos,
                                         double tau_neg, bool soft, double exponent, bool rectify) {
    Tensors tensors = {std::move(activations), std::move(matrices), std::move(sums), std::move(targets)};
    Problem problem = checked(tensors, {tau_pos, tau_neg, exponent, soft}, false);
    problem.rectify = rectify;
    std::vector<Tensor> result;
    SignedMaps maps = {};
    for (int sign = 0; sign < 2; ++sign) {
      for (int32_t l = 0; l < problem.layers; ++l) {
        const Layer& layer = problem.layer[l];
        result.push_back(
            new_maps(tensors.activations[0], problem.float64, {problem.batch, problem.targets, layer.height, layer.width}));
        (sign == 0 ? maps.positive : maps.negative)[l] = result.back().mutable_data_ptr();
      }
    }
    if (!empty(problem)) Device::signed_maps(problem, maps, result[0]);
    return result;
  }

  static Tensor combine_maps(std::vector<Tensor> positive, std::vector<Tensor> negative, double beta,
                             std::vector<double> layer_weights, int64_t height, int64_t width, bool normalize) {
    SignedMaps maps = {};
    Problem problem = combination_of(positive, negative, maps);
    set_weights(problem, layer_weights, beta);
    Tensor result = new_output(positive[0], problem, height, width);
    if (!empty(problem)) Device::combine_maps(problem, maps, output_of(result, height, width, normalize), result);
    return result;
  }

  static Tensor token_saliency(std::vector<Tensor> activations, std::vector<Tensor> matrices, std::vector<Tensor> sums,
                               std::optional<Tensor> targets, std::optional<Tensor> mask, double tau_pos, double tau_neg,
                               bool soft, double exponent, double beta, std::vector<double> layer_weights) {
    Tensors tensors = {std::move(activations), std::move(matrices), std::move(sums), std::move(targets)};
    Problem problem = checked(tensors, {tau_pos, tau_neg, exponent, soft}, true);
    set_weights(problem, layer_weights, beta);
    const int64_t tokens = problem.layer[0].width;
    for (int32_t l = 0; l < problem.layers; ++l) {
      STD_TORCH_CHECK(problem.layer[l].width == tokens, "activations must be of one length");
    }
    if (mask.has_value()) {
      STD_TORCH_CHECK(mask->dim() == 2 && mask->size(0) == problem.batch && mask->size(1) == tokens &&
                          mask->scalar_type() == ScalarType::Bool && same_device(*mask, tensors.activations[0]),
                      "mask must be (B, T), bool, on the activations' device");
      if (!mask->is_contiguous()) mask = torch::stable::contiguous(*mask);
    }
    const bool* wanted = mask.has_value() ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr;
    Tensor scores = new_maps(tensors.activations[0], problem.float64, {problem.batch, problem.targets, tokens});
    if (!empty(problem) && tokens > 0) Device::token_saliency(problem, wanted, scores.mutable_data_ptr(), scores);
    return scores;
  }

 private:
  static Problem checked(Tensors& tensors, const Sharpness& sharpness, bool tokens) {
    const Problem problem = problem_of(tensors, sharpness, tokens);
    if (Device::kChecksTargets && problem.target != nullptr) {
      for (int64_t i = 0; i < problem.batch * problem.targets; ++i) {
        STD_TORCH_CHECK(problem.target[i] >= 0 && problem.target[i] < problem.classes, "targets must lie in [0, ",
                        problem.classes - 1, "], got ", problem.target[i]);
      }
    }
    return problem;
  }

  static bool empty(const Problem& problem) { return problem.batch == 0 || problem.targets == 0; }

  static Output output_of(Tensor& maps, int64_t height, int64_t width, bool normalize) {
    return {maps.mutable_data_ptr(), static_cast<int32_t>(height), static_cast<int32_t>(width), normalize};
  }
};

}  // namespace mhex
