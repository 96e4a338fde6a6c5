#ifndef USE_CUDA
#define USE_CUDA  // shim.h declares what it has for CUDA only then
#endif
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>

#include "../kernels/cuda/saliency.h"
#include "../problem.h"

namespace mhex {
namespace {

// Work on the stream that torch uses now, on the tensors' device. Scratch goes back to torch's allocator when the call
// returns, as any temporary tensor does: whoever gets it next on this stream runs after the kernel.
class Stream {
 public:
  explicit Stream(const Tensor& like) : like_(like), device_(like.get_device_index()) {}

  int device() const { return device_; }

  cuda::Queue queue(const cuda::Scratch& scratch) {
    check(scratch.failure);
    const auto bytes = static_cast<int64_t>(scratch.bytes);
    if (bytes > 0) scratch_ = torch::stable::new_empty(like_, {bytes}, ScalarType::Byte);
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    return {device_, stream, bytes > 0 ? scratch_->mutable_data_ptr() : nullptr};
  }

  static void check(cuda::Failure failure) {
    STD_TORCH_CHECK(failure == nullptr, "mhex: a CUDA kernel could not be launched: ", failure == nullptr ? "" : failure);
  }

 private:
  const Tensor& like_;
  const int32_t device_;
  std::optional<Tensor> scratch_;
};

bool empty(const Problem& problem) { return problem.batch == 0 || problem.targets == 0; }

Tensor saliency_maps(std::vector<Tensor> activations, std::vector<Tensor> matrices, std::vector<Tensor> sums,
                     std::optional<Tensor> targets, double tau_pos, double tau_neg, bool soft, double exponent, double beta,
                     std::vector<double> layer_weights, int64_t height, int64_t width, bool normalize) {
  Tensors tensors = {std::move(activations), std::move(matrices), std::move(sums), std::move(targets)};
  Problem problem = problem_of(tensors, {tau_pos, tau_neg, exponent, soft}, false);
  set_weights(problem, layer_weights, beta);
  Tensor maps = new_maps(tensors.activations[0], problem.float64, {problem.batch, problem.targets, height, width});
  if (empty(problem)) return maps;
  const Output output = {maps.mutable_data_ptr(), static_cast<int32_t>(height), static_cast<int32_t>(width), normalize};
  Stream stream(maps);
  stream.check(cuda::saliency_maps(problem, output, stream.queue(cuda::saliency_scratch(problem, output, stream.device()))));
  return maps;
}

std::vector<Tensor> signed_maps(std::vector<Tensor> activations, std::vector<Tensor> matrices, std::vector<Tensor> sums,
                                std::optional<Tensor> targets, double tau_pos, double tau_neg, bool soft, double exponent) {
  Tensors tensors = {std::move(activations), std::move(matrices), std::move(sums), std::move(targets)};
  const Problem problem = problem_of(tensors, {tau_pos, tau_neg, exponent, soft}, false);
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
  if (empty(problem)) return result;
  Stream stream(result[0]);
  stream.check(cuda::signed_maps(problem, maps, stream.queue({})));
  return result;
}

Tensor combine_maps(std::vector<Tensor> positive, std::vector<Tensor> negative, double beta,
                    std::vector<double> layer_weights, int64_t height, int64_t width, bool normalize) {
  SignedMaps maps = {};
  Problem problem = combination_of(positive, negative, maps);
  set_weights(problem, layer_weights, beta);
  Tensor result = new_maps(positive[0], problem.float64, {problem.batch, problem.targets, height, width});
  if (empty(problem)) return result;
  const Output output = {result.mutable_data_ptr(), static_cast<int32_t>(height), static_cast<int32_t>(width), normalize};
  Stream stream(result);
  stream.check(cuda::combine_maps(problem, maps, output,
                                  stream.queue(cuda::combine_scratch(problem, maps, output, stream.device()))));
  return result;
}

Tensor token_saliency(std::vector<Tensor> activations, std::vector<Tensor> matrices, std::vector<Tensor> sums,
                      std::optional<Tensor> targets, std::optional<Tensor> mask, double tau_pos, double tau_neg, bool soft,
                      double exponent, double beta, std::vector<double> layer_weights) {
  Tensors tensors = {std::move(activations), std::move(matrices), std::move(sums), std::move(targets)};
  Problem problem = problem_of(tensors, {tau_pos, tau_neg, exponent, soft}, true);
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
  if (empty(problem) || tokens == 0) return scores;
  Stream stream(scores);
  stream.check(cuda::token_saliency(problem, wanted, scores.mutable_data_ptr(),
                                    stream.queue(cuda::token_scratch(problem, wanted, stream.device()))));
  return scores;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mhex, CUDA, library) {
  library.impl("saliency_maps", TORCH_BOX(&saliency_maps));
  library.impl("signed_maps", TORCH_BOX(&signed_maps));
  library.impl("combine_maps", TORCH_BOX(&combine_maps));
  library.impl("token_saliency", TORCH_BOX(&token_saliency));
}

}  // namespace mhex
