// From the layers' own maps to one map: add up, stretch, bring to [0, 1].
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "common.h"

namespace mhex::cpu {

// Layers of one size are added up before they are stretched.
struct Group {
  int32_t height;
  int32_t width;
  int64_t offset;  // of its sum in the scratch of one map
};

template <typename Acc>
struct StretchedAxis {
  std::vector<int32_t> begin;
  std::vector<int32_t> cell;
  std::vector<Acc> fraction;

  // torch's bilinear rule with align_corners=False: output x looks at (x + 1/2) * cells / size - 1/2.
  StretchedAxis(int32_t cells, int32_t size) : begin(cells + 1), cell(size), fraction(size + kPadding, Acc(0)) {
    const double step = static_cast<double>(cells) / size;
    int32_t next = 0;
    for (int32_t x = 0; x < size; ++x) {
      const double place = std::max((x + 0.5) * step - 0.5, 0.0);
      cell[x] = std::min(static_cast<int32_t>(place), cells - 1);
      fraction[x] = static_cast<Acc>(place - cell[x]);
      while (next <= cell[x]) begin[next++] = x;
    }
    while (next <= cells) begin[next++] = size;
  }

  Axis<Acc> view() const { return {begin.data(), fraction.data(), static_cast<int32_t>(begin.size()) - 1}; }
};

template <typename Acc>
struct Range {
  Acc low;
  Acc high;
};

// What one thread keeps from map to map.
template <typename Acc>
struct Workspace {
  std::vector<Acc> rows;                  // of each group two stretched rows
  std::vector<int32_t> held;              // which of the layer's rows each of them is
  std::vector<BlendSource<Acc>> sources;  // of each group
  std::vector<char> begun;                // whether a group has a sum yet
};

template <typename Acc>
class Combination {
 public:
  Combination(const Problem& problem, const Output& output) : problem_(problem), output_(output) {
    for (int32_t l = 0; l < problem.layers; ++l) {
      const Layer& layer = problem.layer[l];
      size_t g = 0;
      while (g < groups_.size() && (groups_[g].height != layer.height || groups_[g].width != layer.width)) ++g;
      if (g == groups_.size()) {
        groups_.push_back({layer.height, layer.width, total_});
        total_ += ceil_div(positions_of(layer), kLine) * kLine;
        rows_.emplace_back(layer.height, output.height);
        columns_.emplace_back(layer.width, output.width);
      }
      group_of_.push_back(g);
    }
  }

  // Elements of scratch for the sums of one map.
  int64_t scratch() const { return total_; }

  // The sums of the groups. Returns a range that rounding alone may leave in a constant map, or NaN if a value is not
  // finite.
  Acc merge(const Acc* const* positive, const Acc* const* negative, Acc* sums, Workspace<Acc>& work) const {
    work.begun.assign(groups_.size(), 0);
    Acc size = 0;
    bool finite = true;
    for (int32_t l = 0; l < problem_.layers; ++l) {
      const Layer& layer = problem_.layer[l];
      const size_t g = group_of_[l];
      const auto weight = static_cast<Acc>(layer.weight), beta = static_cast<Acc>(problem_.beta);
      const Extent<Acc> extent =
          leaves<Acc>().merge(sums + groups_[g].offset, positive[l], negative == nullptr ? nullptr : negative[l], weight,
                              beta, !work.begun[g], positions_of(layer));
      work.begun[g] = 1;
      size += std::abs(weight) * (extent.positive + beta * extent.negative);
      finite = finite && extent.finite;
    }
    if (!finite) return std::numeric_limits<Acc>::quiet_NaN();
    return 16 * std::numeric_limits<Acc>::epsilon() * size;
  }

  // Rows [begin, end) of one output map, from the sums of its groups.
  Range<Acc> resize(const Acc* sums, int32_t begin, int32_t end, Acc* map, Workspace<Acc>& work) const {
    const size_t pitch = ceil_div(output_.width + kPadding, kLine) * kLine;
    work.rows.resize(groups_.size() * 2 * pitch);
    work.sources.resize(groups_.size());
    work.held.assign(groups_.size() * 2, -1);
    Extremes<Acc> extremes;
    std::fill_n(extremes.low, kPadding, std::numeric_limits<Acc>::max());
    std::fill_n(extremes.high, kPadding, std::numeric_limits<Acc>::lowest());
    const auto& leaf = leaves<Acc>();
    for (int32_t y = begin; y < end; ++y) {
      for (size_t g = 0; g < groups_.size(); ++g) {
        const int32_t above = rows_[g].cell[y], below = std::min(above + 1, groups_[g].height - 1);
        const auto row = [&](int32_t index) -> const Acc* {
          const size_t slot = g * 2 + (index & 1);
          Acc* place = work.rows.data() + slot * pitch;
          if (work.held[slot] != index) {
            leaf.stretch(sums + groups_[g].offset + static_cast<int64_t>(index) * groups_[g].width, columns_[g].view(),
                         place);
            work.held[slot] = index;
          }
          return place;
        };
        work.sources[g] = {row(above), row(below), rows_[g].fraction[y]};
      }
      leaf.blend(work.sources.data(), static_cast<int32_t>(groups_.size()), map + static_cast<int64_t>(y) * output_.width,
                 output_.width, extremes);
    }
    return {*std::min_element(extremes.low, extremes.low + kPadding),
            *std::max_element(extremes.high, extremes.high + kPadding)};
  }

  // Brings `count` values of a map to [0, 1], given the extremes of the whole map.
  void normalize(Acc* values, int64_t count, Range<Acc> range, Acc constant) const {
    const Acc spread = range.high - range.low;
    if (constant != constant) {  // what plain arithmetic makes of a map with NaN or infinity in it
      std::fill(values, values + count, std::numeric_limits<Acc>::quiet_NaN());
      return;
    }
    if (!(spread > constant)) {
      std::fill(values, values + count, Acc(0));
      return;
    }
    Acc factor = 1 / spread;
    // Rounded up, so that the largest value comes out as 1 and not just below it.
    for (int i = 0; i < 4 && spread * factor < 1; ++i) {
      factor = std::nextafter(factor, std::numeric_limits<Acc>::infinity());
    }
    // A spread so small or so large that one over it is no number to multiply with.
    if (!(spread * factor >= 1 && factor <= std::numeric_limits<Acc>::max())) {
      for (int64_t i = 0; i < count; ++i) values[i] = (values[i] - range.low) / spread;
      return;
    }
    leaves<Acc>().scale(values, count, range.low, factor);
  }

  int64_t pixels() const { return static_cast<int64_t>(output_.height) * output_.width; }
  Acc* map(int64_t index) const { return static_cast<Acc*>(output_.saliency) + index * pixels(); }

  // One whole map.
  void finish(const Acc* const* positive, const Acc* const* negative, Acc* sums, int64_t index, Workspace<Acc>& work) const {
    const Acc constant = merge(positive, negative, sums, work);
    const Range<Acc> range = resize(sums, 0, output_.height, map(index), work);
    if (output_.normalize) normalize(map(index), pixels(), range, constant);
  }

  // Few maps, many threads: each map is cut into bands of rows. `merged` says where a map's sums lie.
  template <typename Sums>
  void finish_in_bands(int64_t maps, const Threads& threads, const std::vector<Acc>& constants, Sums sums_of) const {
    const int64_t bands = std::clamp<int64_t>(ceil_div(2 * threads.count, std::max<int64_t>(maps, 1)), 1, output_.height);
    std::vector<Range<Acc>> ranges(maps * bands);
    const auto rows = [&](int64_t band) { return static_cast<int32_t>(band * output_.height / bands); };
    auto draw = [&](int64_t begin, int64_t end) {
      Workspace<Acc> work;
      for (int64_t item = begin; item < end; ++item) {
        const int64_t band = item % bands;
        ranges[item] = resize(sums_of(item / bands), rows(band), rows(band + 1), map(item / bands), work);
      }
    };
    parallel(threads, maps * bands, draw);
    if (!output_.normalize) return;
    auto stretch_values = [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t index = item / bands, band = item % bands;
        Range<Acc> range = ranges[index * bands];
        for (int64_t other = 1; other < bands; ++other) {
          range.low = std::min(range.low, ranges[index * bands + other].low);
          range.high = std::max(range.high, ranges[index * bands + other].high);
        }
        normalize(map(index) + static_cast<int64_t>(rows(band)) * output_.width,
                  static_cast<int64_t>(rows(band + 1) - rows(band)) * output_.width, range, constants[index]);
      }
    };
    parallel(threads, maps * bands, stretch_values);
  }

 private:
  const Problem& problem_;
  const Output output_;
  std::vector<Group> groups_;
  std::vector<size_t> group_of_;
  std::vector<StretchedAxis<Acc>> rows_;
  std::vector<StretchedAxis<Acc>> columns_;
  int64_t total_ = 0;
};

}  // namespace mhex::cpu
