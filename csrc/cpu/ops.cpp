#include <torch/csrc/stable/library.h>

#include "../kernels/cpu/saliency.h"
#include "../operators.h"

namespace mhex {
namespace {

void parallel_for(int64_t count, Body body, void* context) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { body(begin, end, context); });
}

// On torch's own pool of threads.
struct Cpu {
  static constexpr bool kChecksTargets = true;

  static Threads threads() { return {parallel_for, static_cast<int32_t>(torch::stable::get_num_threads())}; }

  static void saliency_maps(const Problem& problem, const Output& output, const Tensor&) {
    cpu::saliency_maps(problem, output, threads());
  }
  static void signed_maps(const Problem& problem, const SignedMaps& maps, const Tensor&) {
    cpu::signed_maps(problem, maps, threads());
  }
  static void combine_maps(const Problem& problem, const SignedMaps& maps, const Output& output, const Tensor&) {
    cpu::combine_maps(problem, maps, output, threads());
  }
  static void token_saliency(const Problem& problem, const bool* mask, void* scores, const Tensor&) {
    cpu::token_saliency(problem, mask, scores, threads());
  }
};

using OnCpu = Operators<Cpu>;

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mhex, CPU, library) {
  library.impl("saliency_maps", TORCH_BOX(&OnCpu::saliency_maps));
  library.impl("signed_maps", TORCH_BOX(&OnCpu::signed_maps));
  library.impl("combine_maps", TORCH_BOX(&OnCpu::combine_maps));
  library.impl("token_saliency", TORCH_BOX(&OnCpu::token_saliency));
}

}  // namespace mhex
