#include "saliency.h"

#include <algorithm>
#include <vector>

#include "combination.h"
#include "common.h"
#include "weights.h"

namespace mhex::cpu {
namespace {

// Targets of one sample that share a pass over its activations while those lie in the cache.
constexpr int64_t kTargetsPerTask = 16;
// Positions summed at once: their accumulator stays in the first-level cache.
constexpr int64_t kPlaneTile = 4096;
// Positions of a channels-last layer that several targets visit together.
constexpr int64_t kRowTile = 32;

// ------------------------------------------------------------------------------------------- activations to layers' maps

// The maps of one layer at positions [begin, end) for targets [first, last) of one sample. `positive` and `negative` point
// at where position `begin` of target `first` goes; the next target's lies `step` elements on. `negative` may be null.
template <typename Acc>
class LayerMaps {
 public:
  LayerMaps(const Problem& problem, const Weights<Acc>& weights) : problem_(problem), weights_(weights) {}

  void operator()(int32_t index, int64_t sample, int64_t first, int64_t last, int64_t begin, int64_t end, Acc* positive,
                  Acc* negative, int64_t step) {
    const Layer& layer = problem_.layer[index];
    const char* base = static_cast<const char*>(layer.activation) + (sample * layer.stride_b) * bytes_of(layer.dtype);
    const bool rows = layer.stride_c == 1 && (layer.channels > 1 || layer.stride_p != 1);
    const int64_t tile = rows ? (last - first > 1 ? kRowTile : end - begin) : kPlaneTile;
    for (int64_t from = begin; from < end; from += tile) {
      const int64_t to = std::min(end, from + tile);
      const char* data = base + from * layer.stride_p * bytes_of(layer.dtype);
      for (int64_t target = first; target < last; ++target) {
        const Reads<Acc> reads = weights_.at(sample, target, index);
        Acc* plus = positive + (target - first) * step + (from - begin);
        Acc* minus = negative == nullptr ? nullptr : negative + (target - first) * step + (from - begin);
        if (rows) {
          along_rows(layer, data, reads, plus, minus, to - from);
        } else {
          along_planes(layer, data, reads, plus, minus, to - from);
        }
      }
    }
  }

 private:
  void along_planes(const Layer& layer, const char* data, const Reads<Acc>& reads, Acc* plus, Acc* minus, int64_t count) {
    const auto& leaf = leaves<Acc>();
    leaf.planes[problem_.rectify](data, layer.dtype, layer.stride_c, reads.channels, reads.weights, reads.positive, plus,
                                  count);
    if (minus != nullptr) {
      leaf.planes[problem_.rectify](data, layer.dtype, layer.stride_c, reads.channels + reads.positive,
                                    reads.weights + reads.positive, reads.all - reads.positive, minus, count);
    }
  }

  void along_rows(const Layer& layer, const char* data, const Reads<Acc>& reads, Acc* plus, Acc* minus, int64_t count) {
    const auto& leaf = leaves<Acc>();
    // Picking an element costs about as much as a vector of them; spreading the weights out costs a pass of its own. The
    // whole layer decides, so that all of its positions are summed in one order.
    const int64_t positions = positions_of(layer);
    if (positions * reads.all < reads.all + (positions + 2) * layer.channels / 12) {
      leaf.picks[problem_.rectify](data, layer.dtype, layer.stride_p, reads.channels, reads.weights, reads.positive, plus,
                                   count);
      if (minus != nullptr) {
        leaf.picks[problem_.rectify](data, layer.dtype, layer.stride_p, reads.channels + reads.positive,
                                     reads.weights + reads.positive, reads.all - reads.positive, minus, count);
      }
      return;
    }
    dense_.assign(2 * layer.channels, Acc(0));
    for (int32_t j = 0; j < reads.all; ++j) {
      dense_[reads.channels[j] + (j < reads.positive ? 0 : layer.channels)] += reads.weights[j];
    }
    leaf.dots[problem_.rectify](data, layer.dtype, layer.stride_p, dense_.data(), dense_.data() + layer.channels,
                                layer.channels, plus, minus, count);
  }

  const Problem& problem_;
  const Weights<Acc>& weights_;
  std::vector<Acc> dense_;
};

// A piece of work of about the same size as any other: some positions of one layer for some targets of one sample.
struct Piece {
  int64_t sample;
  int64_t first;
  int64_t last;
  int32_t layer;
  int64_t begin;
  int64_t end;
};

std::vector<Piece> pieces_of(const Problem& problem, const Threads& threads) {
  const int64_t samples = problem.batch * ceil_div(problem.targets, kTargetsPerTask);
  int64_t work = 0;
  for (int32_t l = 0; l < problem.layers; ++l) work += positions_of(problem.layer[l]) * problem.layer[l].channels;
  const int64_t share = std::max<int64_t>(work * samples / (4 * threads.count), 4096);
  std::vector<Piece> pieces;
  for (int64_t b = 0; b < problem.batch; ++b) {
    for (int64_t first = 0; first < problem.targets; first += kTargetsPerTask) {
      const int64_t last = std::min(problem.targets, first + kTargetsPerTask);
      for (int32_t l = 0; l < problem.layers; ++l) {
        const int64_t positions = positions_of(problem.layer[l]);
        const int64_t size =
            ceil_div(std::max<int64_t>(share / std::max(problem.layer[l].channels, 1), 1), 4 * kLine) * 4 * kLine;
        for (int64_t p = 0; p < positions;) {
          // No crumbs: a few positions alone would be summed by another loop, which may round otherwise.
          const int64_t end = positions - p < size + 4 * kLine ? positions : p + size;
          pieces.push_back({b, first, last, l, p, end});
          p = end;
        }
      }
    }
  }
  return pieces;
}

template <typename Acc>
void fill_signed_maps(const Problem& problem, const SignedMaps& maps, const Threads& threads) {
  const bool negative = maps.negative[0] != nullptr;
  const Weights<Acc> weights(problem, negative, threads);
  const std::vector<Piece> pieces = pieces_of(problem, threads);
  auto body = [&](int64_t begin, int64_t end) {
    LayerMaps<Acc> layer_maps(problem, weights);
    for (int64_t item = begin; item < end; ++item) {
      const Piece& piece = pieces[item];
      const int64_t positions = positions_of(problem.layer[piece.layer]);
      const int64_t start = (piece.sample * problem.targets + piece.first) * positions + piece.begin;
      layer_maps(piece.layer, piece.sample, piece.first, piece.last, piece.begin, piece.end,
                 static_cast<Acc*>(maps.positive[piece.layer]) + start,
                 negative ? static_cast<Acc*>(maps.negative[piece.layer]) + start : nullptr, positions);
    }
  };
  parallel(threads, static_cast<int64_t>(pieces.size()), body);
}

template <typename Acc>
void combine(const Problem& problem, const SignedMaps& maps, const Output& output, const Threads& threads) {
  const Combination<Acc> combination(problem, output);
  const int64_t count = problem.batch * problem.targets;
  const bool negative = maps.negative[0] != nullptr && problem.beta != 0;
  const auto layers_at = [&](int64_t index, const Acc** positive, const Acc** minus) {
    for (int32_t l = 0; l < problem.layers; ++l) {
      const int64_t start = index * positions_of(problem.layer[l]);
      positive[l] = static_cast<const Acc*>(maps.positive[l]) + start;
      if (negative) minus[l] = static_cast<const Acc*>(maps.negative[l]) + start;
    }
  };
  if (enough_for_all(count, threads)) {
    auto body = [&](int64_t begin, int64_t end) {
      std::vector<Acc> sums(combination.scratch());
      Workspace<Acc> work;
      const Acc *positive[kMaxLayers], *minus[kMaxLayers];
      for (int64_t index = begin; index < end; ++index) {
        layers_at(index, positive, minus);
        combination.finish(positive, negative ? minus : nullptr, sums.data(), index, work);
      }
    };
    parallel(threads, count, body);
    return;
  }
  std::vector<Acc> sums(count * combination.scratch()), constants(count);
  Workspace<Acc> work;
  for (int64_t index = 0; index < count; ++index) {
    const Acc *positive[kMaxLayers], *minus[kMaxLayers];
    layers_at(index, positive, minus);
    constants[index] =
        combination.merge(positive, negative ? minus : nullptr, sums.data() + index * combination.scratch(), work);
  }
  combination.finish_in_bands(count, threads, constants,
                              [&](int64_t index) { return sums.data() + index * combination.scratch(); });
}

template <typename Acc>
void aggregate(const Problem& problem, const Output& output, const Threads& threads) {
  const bool negative = problem.beta != 0;
  const int64_t chunks = ceil_div(problem.targets, kTargetsPerTask);
  std::vector<int64_t> offsets(problem.layers + 1, 0);
  for (int32_t l = 0; l < problem.layers; ++l) {
    offsets[l + 1] = offsets[l] + ceil_div(positions_of(problem.layer[l]), kLine) * kLine;
  }
  const int64_t pitch = offsets[problem.layers];

  if (!enough_for_all(problem.batch * chunks, threads)) {
    const int64_t maps_count = problem.batch * problem.targets;
    std::vector<Acc> storage((negative ? 2 : 1) * maps_count * pitch);
    SignedMaps maps = {};
    for (int32_t l = 0; l < problem.layers; ++l) {
      maps.positive[l] = storage.data() + maps_count * offsets[l];
      maps.negative[l] = negative ? storage.data() + maps_count * (pitch + offsets[l]) : nullptr;
    }
    fill_signed_maps<Acc>(problem, maps, threads);
    combine<Acc>(problem, maps, output, threads);
    return;
  }

  const Weights<Acc> weights(problem, negative, threads);
  const Combination<Acc> combination(problem, output);
  auto body = [&](int64_t begin, int64_t end) {
    LayerMaps<Acc> layer_maps(problem, weights);
    const int64_t most = std::min(problem.targets, kTargetsPerTask);
    std::vector<Acc> storage((negative ? 2 : 1) * most * pitch + combination.scratch());
    Workspace<Acc> work;
    Acc* sums = storage.data();
    Acc* plus = sums + combination.scratch();
    Acc* minus = negative ? plus + most * pitch : nullptr;
    const Acc *positive[kMaxLayers], *opposed[kMaxLayers];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t sample = task / chunks, first = task % chunks * kTargetsPerTask;
      const int64_t last = std::min(problem.targets, first + kTargetsPerTask);
      for (int32_t l = 0; l < problem.layers; ++l) {
        layer_maps(l, sample, first, last, 0, positions_of(problem.layer[l]), plus + offsets[l],
                   negative ? minus + offsets[l] : nullptr, pitch);
      }
      for (int64_t target = first; target < last; ++target) {
        for (int32_t l = 0; l < problem.layers; ++l) {
          positive[l] = plus + (target - first) * pitch + offsets[l];
          if (negative) opposed[l] = minus + (target - first) * pitch + offsets[l];
        }
        combination.finish(positive, negative ? opposed : nullptr, sums, sample * problem.targets + target, work);
      }
    }
  };
  parallel(threads, problem.batch * chunks, body);
}

template <typename Acc>
void score_tokens(const Problem& problem, const bool* mask, Acc* scores, const Threads& threads) {
  const bool negative = problem.beta != 0;
  const Weights<Acc> weights(problem, negative, threads);
  const int64_t tokens = positions_of(problem.layer[0]);
  constexpr int64_t kTokenTile = 64;
  const int64_t tiles = ceil_div(tokens, kTokenTile), chunks = ceil_div(problem.targets, kTargetsPerTask);
  auto body = [&](int64_t begin, int64_t end) {
    LayerMaps<Acc> layer_maps(problem, weights);
    const int64_t most = std::min(problem.targets, kTargetsPerTask);
    std::vector<Acc> storage(2 * most * kTokenTile);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t tile = task % tiles, chunk = task / tiles % chunks, sample = task / tiles / chunks;
      const int64_t first = chunk * kTargetsPerTask, last = std::min(problem.targets, first + kTargetsPerTask);
      const int64_t from = tile * kTokenTile, to = std::min(tokens, from + kTokenTile);
      const bool* wanted = mask == nullptr ? nullptr : mask + sample * tokens;
      for (int64_t target = first; target < last; ++target) {
        Acc* line = scores + (sample * problem.targets + target) * tokens;
        std::fill(line + from, line + to, Acc(0));
      }
      // Runs of tokens that carry a score; the others are not read.
      for (int64_t run = from; run < to;) {
        if (wanted != nullptr && !wanted[run]) {
          ++run;
          continue;
        }
        int64_t stop = run + 1;
        while (stop < to && (wanted == nullptr || wanted[stop])) ++stop;
        for (int32_t l = 0; l < problem.layers; ++l) {
          Acc* plus = storage.data();
          Acc* minus = negative ? plus + most * kTokenTile : nullptr;
          layer_maps(l, sample, first, last, run, stop, plus, minus, kTokenTile);
          for (int64_t target = first; target < last; ++target) {
            Acc* line = scores + (sample * problem.targets + target) * tokens;
            leaves<Acc>().merge(
                line + run, plus + (target - first) * kTokenTile, negative ? minus + (target - first) * kTokenTile : nullptr,
                static_cast<Acc>(problem.layer[l].weight), static_cast<Acc>(problem.beta), l == 0, stop - run);
          }
        }
        run = stop;
      }
    }
  };
  parallel(threads, problem.batch * chunks * tiles, body);
}

}  // namespace

void signed_maps(const Problem& problem, const SignedMaps& maps, const Threads& threads) {
  problem.float64 ? fill_signed_maps<double>(problem, maps, threads) : fill_signed_maps<float>(problem, maps, threads);
}

void combine_maps(const Problem& problem, const SignedMaps& maps, const Output& output, const Threads& threads) {
  problem.float64 ? combine<double>(problem, maps, output, threads) : combine<float>(problem, maps, output, threads);
}

void saliency_maps(const Problem& problem, const Output& output, const Threads& threads) {
  problem.float64 ? aggregate<double>(problem, output, threads) : aggregate<float>(problem, output, threads);
}

void token_saliency(const Problem& problem, const bool* mask, void* scores, const Threads& threads) {
  problem.float64 ? score_tokens<double>(problem, mask, static_cast<double*>(scores), threads)
                  : score_tokens<float>(problem, mask, static_cast<float*>(scores), threads);
}

const char* instruction_set_name() { return instruction_set().name; }

}  // namespace mhex::cpu
