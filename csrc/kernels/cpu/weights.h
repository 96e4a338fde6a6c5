// From equivalent matrices to the channels that count, for each class or each wanted (sample, target).
#pragma once

#include <cmath>
#include <cstdint>
#include <memory>
#include <vector>

#include "common.h"

namespace mhex::cpu {

// The channels of one layer that one class reads: those with positive weight, then those with negative weight, each padded
// to a multiple of kTogether.
template <typename Acc>
struct Reads {
  const int32_t* channels;
  const Acc* weights;
  int32_t positive;
  int32_t all;
};

template <typename Acc>
class Weights {
 public:
  // `negative`: whether negative evidence is wanted at all.
  Weights(const Problem& problem, bool negative, const Threads& threads)
      : problem_(problem),
        negative_(negative),
        by_class_(problem.target == nullptr || problem.classes <= problem.batch * problem.targets),
        rows_(by_class_ ? problem.classes : problem.batch * problem.targets),
        offsets_(problem.layers + 1, 0) {
    // A weight that is not a number counts with both signs, so a channel may stand there twice.
    for (int32_t l = 0; l < problem.layers; ++l) offsets_[l + 1] = offsets_[l] + 2 * (problem.layer[l].channels + kTogether);
    channels_.reset(new int32_t[rows_ * width()]);
    weights_.reset(new Acc[rows_ * width()]);
    counts_.reset(new int32_t[rows_ * problem.layers * 2]);
    // Waking threads takes longer than a small table.
    const Threads used = {threads.parallel_for, rows_ * width() < kSmall ? 1 : threads.count};
    auto fill_rows = [this](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) fill(row);
    };
    parallel(used, rows_, fill_rows);
  }

  Reads<Acc> at(int64_t sample, int64_t target, int32_t layer) const {
    const int64_t row = by_class_ ? class_of(sample, target) : sample * problem_.targets + target;
    const int64_t start = row * width() + offsets_[layer];
    const int32_t* counts = &counts_[(row * problem_.layers + layer) * 2];
    return {&channels_[start], &weights_[start], counts[0], counts[1]};
  }

 private:
  static constexpr int64_t kSmall = 1 << 16;

  int64_t width() const { return offsets_.back(); }

  int64_t class_of(int64_t sample, int64_t target) const {
    return problem_.target == nullptr ? target : problem_.target[sample * problem_.targets + target];
  }

  void fill(int64_t row) {
    const int64_t chosen = by_class_ ? row : problem_.target[row];
    for (int32_t l = 0; l < problem_.layers; ++l) {
      const Layer& layer = problem_.layer[l];
      const Acc* matrix = static_cast<const Acc*>(layer.matrix) + chosen * layer.channels;
      const Acc* sums = static_cast<const Acc*>(layer.sums);
      const int64_t start = row * width() + offsets_[l];
      int32_t count = 0;
      for (int sign = 0; sign < 2; ++sign) {
        if (sign == 1 && !negative_) break;
        const Acc tau = static_cast<Acc>(sign == 0 ? problem_.sharpness.tau_pos : problem_.sharpness.tau_neg);
        for (int32_t k = 0; k < layer.channels; ++k) {
          const Acc size = sign == 0 ? matrix[k] : -matrix[k];
          if (!(size > 0) && size == size) continue;
          const Acc sharpness = size / (sums[sign * layer.channels + k] + static_cast<Acc>(1e-8));
          Acc weight = matrix[k];
          if (problem_.sharpness.soft) {
            weight *= std::pow(sharpness, static_cast<Acc>(problem_.sharpness.exponent));
          } else if (!(sharpness >= tau)) {
            weight = size * 0;  // of infinity, whose sharpness is not a number, that is none either
          }
          if (weight == 0) continue;
          channels_[start + count] = k;
          weights_[start + count] = weight;
          ++count;
        }
        // Whole groups: the last channel again, with weight zero, costs less than a branch for each remainder.
        const int32_t begin = sign == 0 ? 0 : counts_[(row * problem_.layers + l) * 2];
        for (; (count - begin) % kTogether != 0; ++count) {
          channels_[start + count] = channels_[start + count - 1];
          weights_[start + count] = 0;
        }
        counts_[(row * problem_.layers + l) * 2 + sign] = count;
      }
      if (!negative_) counts_[(row * problem_.layers + l) * 2 + 1] = count;
    }
  }

  const Problem& problem_;
  const bool negative_;
  const bool by_class_;
  const int64_t rows_;
  std::vector<int64_t> offsets_;
  std::unique_ptr<int32_t[]> channels_;
  std::unique_ptr<Acc[]> weights_;
  std::unique_ptr<int32_t[]> counts_;
};

}  // namespace mhex::cpu
