// The host's part: how a problem is cut into blocks, and where everything lies.
#include <algorithm>

#include "plan.h"

namespace mhex::cuda {
namespace {

// A block should have this much to read, or the meeting costs more than the company brings.
constexpr int64_t kBytesPerSplit = 4096;
constexpr int64_t kPixelsPerSplit = 2048;
// The largest portable cluster; on a full machine also what several blocks per multiprocessor balance well with.
constexpr int32_t kClusterSize = 8;
constexpr int32_t kBlocksPerMultiprocessor = 2;
constexpr int64_t kMaxSplits = 1024;  // that share drawing
constexpr int64_t kWeightBytes = 20 * 1024;
constexpr int64_t kSharedBudget = 96 * 1024;  // leaves room for two blocks
// Layers' maps beyond this are made and used up slice by slice of the batch, a launch each.
constexpr int64_t kScratchBudget = int64_t{1} << 30;

int64_t ceil_div(int64_t count, int64_t size) { return (count + size - 1) / size; }
int64_t round_up(int64_t count, int64_t size) { return ceil_div(count, size) * size; }

Path path_of(const Layer& layer, int64_t positions, int64_t batch) {
  const int64_t bytes = bytes_of(layer.dtype), vector = 16 / bytes;
  const auto aligned = [&](int64_t stride, int64_t count) { return count <= 1 || stride % vector == 0; };
  const bool base = reinterpret_cast<uintptr_t>(layer.activation) % 16 == 0 && aligned(layer.stride_b, batch);
  if (layer.stride_c == 1 && !(layer.channels == 1 && layer.stride_p == 1)) {
    return base && layer.channels % vector == 0 && aligned(layer.stride_p, positions) ? Path::row_vectors : Path::rows;
  }
  return base && layer.stride_p == 1 && positions % vector == 0 && aligned(layer.stride_c, layer.channels)
             ? Path::plane_vectors
             : Path::planes;
}

// Hands out scratch. Its addresses are meaningless while the base is null.
class Shelf {
 public:
  explicit Shelf(void* base) : base_(reinterpret_cast<uintptr_t>(base)) {}
  void* take(int64_t bytes) {
    const uintptr_t place = base_ + used_;
    used_ += round_up(bytes, 256);
    return reinterpret_cast<void*>(place);
  }
  int64_t used() const { return used_; }

 private:
  const uintptr_t base_;
  int64_t used_ = 0;
};

class Planner {
 public:
  Planner(const Job& job, const Machine& machine, Residents residents, void* scratch, Launch& launch)
      : job_(job),
        problem_(*job.problem),
        machine_(machine),
        residents_(residents),
        scratch_(scratch),
        launch_(launch),
        plan_(launch.plan) {}

  void make() {
    plan_.task = job_.task;
    plan_.targets = problem_.targets;
    plan_.classes = problem_.classes;
    plan_.target = problem_.target;
    plan_.sharpness = problem_.sharpness;
    plan_.beta = problem_.beta;
    plan_.layers = problem_.layers;
    plan_.signs = job_.task == Task::signed_maps || problem_.beta != 0 ? 2 : 1;
    plan_.height = job_.output.height;
    plan_.width = job_.output.width;
    plan_.normalize = job_.output.normalize;
    plan_.rectify = problem_.rectify;
    plan_.saliency = job_.task == Task::tokens ? job_.scores : job_.output.saliency;
    plan_.mask = job_.mask;
    launch_.batch = problem_.batch;
    set_layers();
    if (launch_.failure != nullptr) return;
    set_rows();
    set_samples();
    set_splits();
    set_scratch();
  }

 private:
  // Place and shares are computed in 32 bits.
  static bool fits(int64_t cells, int64_t size) {
    return 2 * cells * size <= INT32_MAX && std::max(cells, size) * (kMaxSplits + 1) <= INT32_MAX;
  }
  int64_t wide() const { return problem_.float64 ? 8 : 4; }
  bool draws() const { return job_.task == Task::saliency || job_.task == Task::combine; }
  bool reads() const { return job_.task != Task::combine; }
  bool keeps_maps() const { return job_.task == Task::saliency || job_.task == Task::tokens; }
  int64_t units() const { return launch_.samples * plan_.chunks; }

  // In order of size, so that layers of one size are neighbours.
  void set_layers() {
    int64_t work = 0;
    bool taken[kMaxLayers] = {};
    for (int32_t from = 0, next = 0; from < problem_.layers; ++from) {
      if (taken[from]) continue;
      GroupPlan& group = plan_.group[plan_.groups++];
      group = {problem_.layer[from].height, problem_.layer[from].width, next, 0};
      for (int32_t l = from; l < problem_.layers; ++l) {
        const Layer& layer = problem_.layer[l];
        if (taken[l] || layer.height != group.height || layer.width != group.width) continue;
        taken[l] = true;
        ++group.layers;
        LayerPlan& to = plan_.layer[next++];
        const int64_t positions = static_cast<int64_t>(layer.height) * layer.width;
        if (positions > INT32_MAX - kGrain) launch_.failure = "a layer has too many positions";
        if (draws() && (positions == 0 || !fits(layer.height, plan_.height) || !fits(layer.width, plan_.width))) {
          launch_.failure = "a layer or the map is empty or too large";
        }
        to.activation = layer.activation;
        to.stride_b = layer.stride_b;
        to.stride_c = layer.stride_c;
        to.stride_p = layer.stride_p;
        to.matrix = layer.matrix;
        to.sums = layer.sums;
        to.positive = job_.maps == nullptr ? nullptr : job_.maps->positive[l];
        to.negative = job_.maps == nullptr ? nullptr : job_.maps->negative[l];
        to.weight = layer.weight;
        to.channels = layer.channels;
        to.positions = static_cast<int32_t>(positions);
        to.dtype = layer.dtype;
        to.work = work;
        if (!reads()) continue;
        to.path = path_of(layer, positions, problem_.batch);
        to.per_grain = kGrain * (layer.channels * bytes_of(layer.dtype) + wide());
        work += to.per_grain * ceil_div(positions, kGrain);
        channels_ = std::max<int64_t>(channels_, layer.channels);
        positions_ += positions;
        const int64_t vector = to.path == Path::plane_vectors ? 16 / bytes_of(layer.dtype) : 1;
        if (to.path == Path::planes || to.path == Path::plane_vectors) {
          partial_ = std::max(partial_, kThreads * vector * wide());
        }
      }
    }
    plan_.work = work;
  }

  void set_rows() {
    const int64_t most = problem_.float64 ? 2 : kMaxRows, least = problem_.float64 ? 2 : 1;
    int64_t rows = least;
    while (rows < most && rows < problem_.targets * plan_.signs) rows *= 2;
    if (!reads()) rows = least;
    launch_.rows = static_cast<int32_t>(rows);
    plan_.targets_per_chunk = static_cast<int32_t>(reads() ? rows / plan_.signs : 1);
    plan_.chunks = static_cast<int32_t>(ceil_div(problem_.targets, plan_.targets_per_chunk));
    if (!reads()) return;
    const int64_t fitting = kWeightBytes / (rows * wide() + 4) / 64 * 64;
    plan_.tile = static_cast<int32_t>(std::max<int64_t>(std::min(fitting, round_up(channels_, 8)), 8));
  }

  void set_samples() {
    launch_.samples = problem_.batch;
    if (job_.task != Task::saliency && job_.task != Task::tokens) return;
    const int64_t each = problem_.targets * positions_ * plan_.signs * wide();
    launch_.samples = std::clamp<int64_t>(kScratchBudget / std::max<int64_t>(each, 1), 1, problem_.batch);
  }

  void set_splits() {
    const int64_t by_bytes = std::max<int64_t>(plan_.work / kBytesPerSplit, 1);
    const int64_t by_pixels = draws() ? int64_t{plan_.height} * plan_.width / kPixelsPerSplit : 0;
    const int64_t slots = int64_t{machine_.multiprocessors} * kBlocksPerMultiprocessor;
    if (!draws()) {  // nobody waits for anybody
      int64_t most = by_bytes;
      if (job_.task == Task::tokens) most = std::min(most, ceil_div(plan_.layer[0].positions, kGrain));
      split(Meeting::alone, std::clamp<int64_t>(ceil_div(4 * slots, units()), std::min<int64_t>(kClusterSize, most), most));
      return;
    }
    const int64_t most = std::min<int64_t>(std::max(by_bytes, by_pixels), kMaxSplits);
    if (most == 1) return split(Meeting::alone, 1);
    if (machine_.clusters && units() * kClusterSize >= slots) {
      int64_t size = kClusterSize;
      while (size > most) size /= 2;
      return split(size == 1 ? Meeting::alone : Meeting::cluster, size);
    }
    int64_t splits = std::min(slots / units(), most);
    while (machine_.cooperative && splits > 1) {
      split(Meeting::grid, splits);
      const int64_t resident = residents_(problem_.float64, launch_.rows, launch_.shared_bytes);
      const int64_t fitting = resident * machine_.multiprocessors / units();
      if (fitting >= splits) return;
      splits = fitting;  // fewer splits may need more shared memory each, so look again
    }
    if (!reads()) return split(Meeting::alone, 1);
    splits = std::clamp<int64_t>(ceil_div(4 * slots, units()), 1, std::min<int64_t>(by_bytes, 64));
    split(splits == 1 ? Meeting::alone : Meeting::last, splits);
  }

  // How many bands a map is drawn in.
  int32_t bands() const { return plan_.meeting == Meeting::cluster || plan_.meeting == Meeting::grid ? plan_.splits : 1; }

  void split(Meeting meeting, int64_t splits) {
    plan_.meeting = meeting;
    plan_.splits = static_cast<int32_t>(splits);
    int64_t reading = 0;
    if (reads()) {
      const int64_t weights = round_up(plan_.tile * launch_.rows * wide(), 16);
      plan_.at_list = static_cast<int32_t>(kControlBytes + weights);
      plan_.at_partial = plan_.at_list + static_cast<int32_t>(round_up(4 * plan_.tile, 16));
      reading = plan_.at_partial + partial_;
    }
    int64_t drawing = kControlBytes;
    if (draws()) drawing = set_drawing();
    launch_.shared_bytes = std::max(reading, drawing);
  }

  int64_t set_drawing() {
    int64_t sums = 0;
    plan_.band_rows = 0;
    for (int32_t band = 0; band < bands(); ++band) {
      const Range rows = share_of(plan_.height, band, bands());
      plan_.band_rows = std::max(plan_.band_rows, rows.end - rows.begin);
      int64_t all = 0;
      for (int32_t g = 0; g < plan_.groups; ++g) {
        const Range source = source_rows(plan_.group[g].height, plan_.height, band, bands());
        all += (int64_t{plan_.group[g].width} + 1) * (source.end - source.begin);
      }
      sums = std::max(sums, all);
    }
    // The warps' extremes lie at the start; what they come to lies behind them.
    int64_t end = kControlBytes + kWarps * 2 * plan_.layers * wide();
    const auto take = [&](int64_t bytes) {
      const int64_t place = end;
      end = round_up(end + bytes, 16);
      return static_cast<int32_t>(place);
    };
    plan_.at_collected = take((2 + 2 * plan_.layers) * wide());
    plan_.at_slots = take(plan_.groups * kSlotBytes);
    const int64_t place = 2 * wide(), before = end;
    plan_.spilled_step = 0;
    const auto take_board = [&] {
      plan_.at_sums = take(sums * wide());
      plan_.at_columns = take(round_up(plan_.width, 4) * plan_.groups * place);
      plan_.at_rows = take(int64_t{plan_.band_rows} * plan_.groups * place);
      if (end > INT32_MAX) launch_.failure = "the layers are too large to be added up";
    };
    take_board();
    if (end <= std::min(kSharedBudget, machine_.shared_limit)) return end;
    end = 0;
    take_board();
    plan_.spilled_step = round_up(end, 256);
    return before;
  }

  void set_scratch() {
    if (units() * plan_.splits > INT32_MAX) launch_.failure = "there are too many maps for one launch";
    Shelf shelf(scratch_);
    const int64_t blocks = units() * plan_.splits, maps = launch_.samples * problem_.targets;
    if (plan_.meeting == Meeting::grid || plan_.meeting == Meeting::last) {
      launch_.arrivals_bytes = units() * 4;
      plan_.arrivals = static_cast<uint32_t*>(shelf.take(launch_.arrivals_bytes));
    }
    if (draws() && bands() > 1 && plan_.normalize) {
      plan_.exchange = shelf.take(maps * (2 + 2 * plan_.layers) * plan_.splits * wide());
    }
    if (draws() && plan_.spilled_step > 0) plan_.spilled = shelf.take(blocks * plan_.spilled_step);
    if (keeps_maps()) {
      for (int32_t l = 0; l < plan_.layers; ++l) {
        LayerPlan& layer = plan_.layer[l];
        layer.positive = shelf.take(maps * layer.positions * wide());
        if (plan_.signs == 2) layer.negative = shelf.take(maps * layer.positions * wide());
      }
    }
    launch_.scratch_bytes = shelf.used();
  }

  const Job& job_;
  const Problem& problem_;
  const Machine& machine_;
  const Residents residents_;
  void* const scratch_;
  Launch& launch_;
  Plan& plan_;
  int64_t channels_ = 0;   // of the widest layer
  int64_t positions_ = 0;  // of all layers
  int64_t partial_ = 0;    // bytes of shared memory in which planes are added up
};

}  // namespace

void make_launch(const Job& job, const Machine& machine, Residents residents, void* scratch, Launch& launch) {
  launch = {};
  Planner(job, machine, residents, scratch, launch).make();
}

}  // namespace mhex::cuda
