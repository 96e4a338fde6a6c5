// The CPU's side of the operators: what cpu/ops.cpp calls after it has checked the tensors.
#pragma once

#include "../../params.h"

namespace mhex::cpu {

// Each layer's own maps, of each sign.
void signed_maps(const Problem& problem, const SignedMaps& maps, const Threads& threads);

// (P, N) of each layer -> one map per sample and target. Only batch, targets, layers and of each layer weight, height and
// width are read from `problem`.
void combine_maps(const Problem& problem, const SignedMaps& maps, const Output& output, const Threads& threads);

// Both at once; the layers' own maps never leave the cache.
void saliency_maps(const Problem& problem, const Output& output, const Threads& threads);

// sum_l lambda_l (P + beta N) at the layers' own positions, which all layers share. `mask` (B, T) may be null; what it
// leaves out is not computed and scores 0.
void token_saliency(const Problem& problem, const bool* mask, void* scores, const Threads& threads);

// The instruction set in use.
const char* instruction_set_name();

}  // namespace mhex::cpu
