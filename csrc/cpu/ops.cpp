#include <torch/csrc/stable/library.h>

#include "../kernels/cpu/saliency.h"
#include "../problem.h"

namespace mhex {
namespace {

void parallel_for(int64_t count, Body body, void* context) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { body(begin, end, context); });
}

Threads threads() { return {parallel_for, static_cast<int32_t>(torch::stable::get_num_threads())}; }

void check_targets(const Problem& problem) {
  if (problem.target == nullptr) return;
  for (int64_t i = 0; i < problem.batch * problem.targets; ++i) {
    STD_TORCH_CHECK(problem.target[i] >= 0 && problem.target[i] < problem.classes, "targets must lie in [0, ",
                    problem.classes - 1, "], got ", problem.target[i]);
  }
}

bool empty(const Problem& problem) { return problem.batch == 0 || problem.targets == 0; }

Tensor saliency_maps(std::vector<Tensor> activations, std::vector<Tensor> matrices, std::vector<Tensor> sums,
                     std::optional<Tensor> targets, double tau_pos, double tau_neg, bool soft, double exponent, double beta,
                     std::vector<double> layer_weights, int64_t height, int64_t width, bool normalize) {
  Tensors tensors = {std::move(activations), std::move(matrices), std::move(sums), std::move(targets)};
  Problem problem = problem_of(tensors, {tau_pos, tau_neg, exponent, soft}, false);
  set_weights(problem, layer_weights, beta);
  check_targets(problem);
  Tensor maps = new_maps(tensors.activations[0], problem.float64, {problem.batch, problem.targets, height, width});
  if (empty(problem)) return maps;
  cpu::saliency_maps(
      problem, {maps.mutable_data_ptr(), static_cast<int32_t>(height), static_cast<int32_t>(width), normalize}, threads());
  return maps;
}

std::vector<Tensor> signed_maps(std::vector<Tensor> activations, std::vector<Tensor> matrices, std::vector<Tensor> sums,
                                std::optional<Tensor> targets, double tau_pos, double tau_neg, bool soft, double exponent) {
  Tensors tensors = {std::move(activations), std::move(matrices), std::move(sums), std::move(targets)};
  const Problem problem = problem_of(tensors, {tau_pos, tau_neg, exponent, soft}, false);
  check_targets(problem);
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
  if (!empty(problem)) cpu::signed_maps(problem, maps, threads());
  return result;
}

Tensor combine_maps(std::vector<Tensor> positive, std::vector<Tensor> negative, double beta,
                    std::vector<double> layer_weights, int64_t height, int64_t width, bool normalize) {
  SignedMaps maps = {};
  Problem problem = combination_of(positive, negative, maps);
  set_weights(problem, layer_weights, beta);
  Tensor result = new_maps(positive[0], problem.float64, {problem.batch, problem.targets, height, width});
  if (empty(problem)) return result;
  cpu::combine_maps(problem, maps,
                    {result.mutable_data_ptr(), static_cast<int32_t>(height), static_cast<int32_t>(width), normalize},
                    threads());
  return result;
}

Tensor token_saliency(std::vector<Tensor> activations, std::vector<Tensor> matrices, std::vector<Tensor> sums,
                      std::optional<Tensor> targets, std::optional<Tensor> mask, double tau_pos, double tau_neg, bool soft,
                      double exponent, double beta, std::vector<double> layer_weights) {
  Tensors tensors = {std::move(activations), std::move(matrices), std::move(sums), std::move(targets)};
  Problem problem = problem_of(tensors, {tau_pos, tau_neg, exponent, soft}, true);
  set_weights(problem, layer_weights, beta);
  check_targets(problem);
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
  Tensor scores = new_maps(tensors.activations[0], problem.float64, {problem.batch, problem.targets, tokens});
  if (empty(problem) || tokens == 0) return scores;
  cpu::token_saliency(problem, mask.has_value() ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr,
                      scores.mutable_data_ptr(), threads());
  return scores;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mhex, CPU, library) {
  library.impl("saliency_maps", TORCH_BOX(&saliency_maps));
  library.impl("signed_maps", TORCH_BOX(&signed_maps));
  library.impl("combine_maps", TORCH_BOX(&combine_maps));
  library.impl("token_saliency", TORCH_BOX(&token_saliency));
}

}  // namespace mhex
