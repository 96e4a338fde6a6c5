#ifndef USE_CUDA
#define USE_CUDA  // shim.h declares what it has for CUDA only then
#endif
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>

#include "../kernels/cuda/saliency.h"
#include "../operators.h"

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

// On torch's current stream; nothing waits, so nothing can look at the targets.
struct Cuda {
  static constexpr bool kChecksTargets = false;

  static void saliency_maps(const Problem& problem, const Output& output, const Tensor& like) {
    Stream stream(like);
    stream.check(
        cuda::saliency_maps(problem, output, stream.queue(cuda::saliency_scratch(problem, output, stream.device()))));
  }
  static void signed_maps(const Problem& problem, const SignedMaps& maps, const Tensor& like) {
    Stream stream(like);
    stream.check(cuda::signed_maps(problem, maps, stream.queue({})));
  }
  static void combine_maps(const Problem& problem, const SignedMaps& maps, const Output& output, const Tensor& like) {
    Stream stream(like);
    stream.check(cuda::combine_maps(problem, maps, output,
                                    stream.queue(cuda::combine_scratch(problem, maps, output, stream.device()))));
  }
  static void token_saliency(const Problem& problem, const bool* mask, void* scores, const Tensor& like) {
    Stream stream(like);
    stream.check(
        cuda::token_saliency(problem, mask, scores, stream.queue(cuda::token_scratch(problem, mask, stream.device()))));
  }
};

using OnCuda = Operators<Cuda>;

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mhex, CUDA, library) {
  library.impl("saliency_maps", TORCH_BOX(&OnCuda::saliency_maps));
  library.impl("signed_maps", TORCH_BOX(&OnCuda::signed_maps));
  library.impl("combine_maps", TORCH_BOX(&OnCuda::combine_maps));
  library.impl("token_saliency", TORCH_BOX(&OnCuda::token_saliency));
}

}  // namespace mhex
