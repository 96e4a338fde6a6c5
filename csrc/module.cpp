// The Python module and the operators' schemas. One schema for all devices; kernels register themselves under it.
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/version.h>

#include "kernels/cpu/saliency.h"

STABLE_TORCH_LIBRARY(mhex, library) {
  library.def(
      "saliency_maps(Tensor[] activations, Tensor[] matrices, Tensor[] sums, Tensor? targets, float tau_pos, "
      "float tau_neg, bool soft, float exponent, bool rectify, float beta, float[] layer_weights, SymInt height, "
      "SymInt width, bool normalize) -> Tensor");
  library.def(
      "signed_maps(Tensor[] activations, Tensor[] matrices, Tensor[] sums, Tensor? targets, float tau_pos, "
      "float tau_neg, bool soft, float exponent, bool rectify) -> Tensor[]");
  library.def(
      "combine_maps(Tensor[] positive, Tensor[] negative, float beta, float[] layer_weights, SymInt height, "
      "SymInt width, bool normalize) -> Tensor");
  library.def(
      "token_saliency(Tensor[] activations, Tensor[] matrices, Tensor[] sums, Tensor? targets, Tensor? mask, "
      "float tau_pos, float tau_neg, bool soft, float exponent, float beta, float[] layer_weights) -> Tensor");
}

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled saliency operators; importing it registers them with torch as torch.ops.mhex.*.";
  module.def(
      "build_info",
      [] {
        pybind11::dict info;
        info["compiler"] = __VERSION__;
        info["torch"] = TORCH_VERSION;
        info["instruction_set"] = mhex::cpu::instruction_set_name();
        return info;
      },
      "What this was built with, and the instruction set that runs here.");
}
