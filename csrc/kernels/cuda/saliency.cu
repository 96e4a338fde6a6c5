// The kernel, and the launches. One launch takes a batch from activations to finished maps: its blocks first make layers'
// maps (evidence.cuh), meet, and draw (finish.cuh).
#include <algorithm>

#include "evidence.cuh"
#include "finish.cuh"

namespace mhex::cuda {
namespace {

// The layers' maps that this block itself made of its tokens -> scores.
template <typename Acc>
__device__ __noinline__ void score(const Plan& plan, unsigned char* shared) {
  const Share& share = share_in(shared);
  const int32_t tokens = plan.layer[0].positions;
  const Acc beta = static_cast<Acc>(plan.beta);
  for (int32_t t = 0; t < share.targets; ++t) {
    const int64_t from = (share.map + t) * tokens;
    Acc* to = static_cast<Acc*>(plan.saliency) + (share.batch_map + t) * tokens;
    for (int32_t p = share.tokens.begin + static_cast<int32_t>(threadIdx.x); p < share.tokens.end; p += kThreads) {
      Acc total = 0;
      if (plan.mask == nullptr || plan.mask[share.sample * tokens + p]) {
        for (int32_t l = 0; l < plan.layers; ++l) {
          const LayerPlan& layer = plan.layer[l];
          Acc value = fetch<Acc>(layer.positive, from + p);
          if (plan.signs == 2) value = fused(beta, fetch<Acc>(layer.negative, from + p), value);
          total = fused(static_cast<Acc>(layer.weight), value, total);
        }
      }
      to[p] = total;
    }
  }
}

// From the first to the last token in [begin, end) that the mask keeps; padding at either end is not read.
__device__ inline Range kept(const Plan& plan, int64_t sample, Range range, Control& control) {
  if (plan.mask == nullptr) return range;
  const bool* mask = plan.mask + sample * plan.layer[0].positions;
  int32_t begin = range.end, last = range.begin - 1;
  for (int32_t p = range.begin + static_cast<int32_t>(threadIdx.x); p < range.end; p += kThreads) {
    if (!mask[p]) continue;
    begin = min(begin, p);
    last = max(last, p);
  }
  for (int step = 16; step >= 1; step /= 2) {
    begin = min(begin, __shfl_xor_sync(kAllLanes, begin, step));
    last = max(last, __shfl_xor_sync(kAllLanes, last, step));
  }
  if (threadIdx.x % 32 == 0) {
    control.counts[threadIdx.x / 32] = begin;
    control.flags[threadIdx.x / 32] = last;
  }
  __syncthreads();
  for (int other = 0; other < kWarps; ++other) {
    begin = min(begin, control.counts[other]);
    last = max(last, control.flags[other]);
  }
  // Whole grains, which keeps loads aligned.
  return {begin / kGrain * kGrain, min(range.end, (last / kGrain + 1) * kGrain)};
}

// What this block is to do.
template <int R>
__device__ __noinline__ void set_share(const Plan& plan, unsigned char* shared) {
  Share& share = share_in(shared);
  const uint32_t unit = blockIdx.x / static_cast<uint32_t>(plan.splits), chunks = static_cast<uint32_t>(plan.chunks);
  const int32_t split = static_cast<int32_t>(blockIdx.x - unit * static_cast<uint32_t>(plan.splits));
  const int64_t sample = plan.first_sample + unit / chunks;
  const int64_t first = static_cast<int64_t>(unit % chunks) * plan.targets_per_chunk;
  const int32_t targets = static_cast<int32_t>(min(static_cast<int64_t>(plan.targets_per_chunk), plan.targets - first));
  Range tokens = {}, wanted = {};
  if (plan.task == Task::tokens) {
    const int64_t positions = plan.layer[0].positions, grains = (positions + kGrain - 1) / kGrain;
    tokens.begin = static_cast<int32_t>(grains * split / plan.splits * kGrain);
    tokens.end = static_cast<int32_t>(min(grains * (split + 1) / plan.splits * kGrain, positions));
    wanted = kept(plan, sample, tokens, control_in(shared));
  }
  if (plan.task != Task::combine && threadIdx.x < R) {
    const int32_t target = static_cast<int32_t>(threadIdx.x) / plan.signs;
    int64_t chosen = -2;
    if (target < targets) {
      chosen = plan.target == nullptr ? first + target : plan.target[sample * plan.targets + first + target];
      if (chosen < 0 || chosen >= plan.classes) chosen = -1;
    }
    control_in(shared).classes[threadIdx.x] = chosen;
  }
  if (threadIdx.x == 0) {
    share.sample = sample;
    share.map = (sample - plan.first_sample) * plan.targets + first;
    share.batch_map = sample * plan.targets + first;
    share.unit = static_cast<int32_t>(unit);
    share.split = split;
    share.targets = targets;
    share.tokens = tokens;
    share.wanted = wanted;
    if (plan.task == Task::saliency || plan.task == Task::signed_maps) {
      share.begin = cut_of(plan, split);
      share.end = cut_of(plan, split + 1);
    } else {
      share.begin = {0, 0};
      share.end = {plan.layers - 1, 0};
    }
  }
  __syncthreads();
}

// The positions of a layer that this block reads.
__device__ __forceinline__ Range piece_of(const Plan& plan, const Share& share, int32_t l) {
  if (plan.task == Task::tokens) return share.wanted;
  Range piece = {l == share.begin.layer ? share.begin.grain * kGrain : 0, plan.layer[l].positions};
  if (l == share.end.layer) piece.end = min(piece.end, share.end.grain * kGrain);
  return piece;
}

template <typename Acc, int R>
constexpr int kBlocks = sizeof(Acc) == 8 || R == 8 ? 2
                        : R == 4                   ? 3
                                                   : 4;  // per multiprocessor, which caps registers

template <typename Acc, int R>
__global__ void __launch_bounds__(kThreads, (kBlocks<Acc, R>)) saliency_kernel(const __grid_constant__ Plan plan) {
  MHEX_SHARED(shared);
  set_share<R>(plan, shared);
  if (plan.task != Task::combine) {
#pragma unroll 1
    for (int32_t l = share_in(shared).begin.layer; l <= share_in(shared).end.layer && l < plan.layers; ++l) {
      const Range piece = piece_of(plan, share_in(shared), l);
      if (piece.begin < piece.end) sum_piece<Acc, R>(plan, plan.layer[l], piece, shared);
    }
    if (plan.task == Task::signed_maps) return;
    if (plan.task == Task::tokens) {
      __syncthreads();
      score<Acc>(plan, shared);
      return;
    }
    if (plan.meeting == Meeting::last) {
      if (!last_to_arrive(plan, share_in(shared).unit, control_in(shared))) return;
    } else {
      meet(plan, share_in(shared).unit, 1);
    }
  }
  if (plan.spilled_step == 0) {  // apart, so that the compiler knows which memory it reads
    draw<Acc, false>(plan, shared);
  } else {
    draw<Acc, true>(plan, shared);
  }
}

// -------------------------------------------------------------------------------------------------------------- launches

using Kernel = void (*)(const Plan);

Kernel kernel_of(bool float64, int32_t rows) {
  if (float64) return saliency_kernel<double, 2>;
  switch (rows) {
    case 1:
      return saliency_kernel<float, 1>;
    case 2:
      return saliency_kernel<float, 2>;
    case 4:
      return saliency_kernel<float, 4>;
    default:
      return saliency_kernel<float, 8>;
  }
}

Failure text_of(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

cudaError_t allow_shared(Kernel kernel, int64_t bytes) {
  constexpr int64_t kWithoutAsking = 48 * 1024;
  if (bytes <= kWithoutAsking) return cudaSuccess;
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(bytes));
}

int resident_blocks(bool float64, int32_t rows, int64_t shared_bytes) {
  const Kernel kernel = kernel_of(float64, rows);
  int blocks = 0;
  if (allow_shared(kernel, shared_bytes) != cudaSuccess ||
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, static_cast<size_t>(shared_bytes)) !=
          cudaSuccess) {
    return 0;
  }
  return blocks;
}

// Makes a device current for as long as it lives.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    error_ = cudaGetDevice(&before_);
    if (error_ == cudaSuccess && before_ != device) {
      error_ = cudaSetDevice(device);
      changed_ = error_ == cudaSuccess;
    }
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  cudaError_t error() const { return error_; }

 private:
  int before_ = 0;
  bool changed_ = false;
  cudaError_t error_;
};

cudaError_t look_at(int device, Machine& machine) {
  int major = 0, cooperative = 0, shared = 0;
  const cudaDeviceAttr wanted[] = {cudaDevAttrMultiProcessorCount, cudaDevAttrComputeCapabilityMajor,
                                   cudaDevAttrCooperativeLaunch, cudaDevAttrMaxSharedMemoryPerBlockOptin};
  int* const to[] = {&machine.multiprocessors, &major, &cooperative, &shared};
  for (int i = 0; i < 4; ++i) {
    const cudaError_t error = cudaDeviceGetAttribute(to[i], wanted[i], device);
    if (error != cudaSuccess) return error;
  }
  // What was compiled for older machines has no barrier for clusters, even where the driver translates it for a newer one.
  cudaFuncAttributes compiled = {};
  const cudaError_t error = cudaFuncGetAttributes(&compiled, kernel_of(false, 1));
  if (error != cudaSuccess) return error;
  machine.clusters = major >= 9 && compiled.ptxVersion >= 90;
  machine.cooperative = cooperative != 0;
  machine.shared_limit = shared;
  return cudaSuccess;
}

Scratch scratch_of(const Job& job, int device) {
  const OnDevice on_device(device);
  Machine machine = {};
  cudaError_t error = on_device.error();
  if (error == cudaSuccess) error = look_at(device, machine);
  if (error != cudaSuccess) return {0, text_of(error)};
  Launch launch;
  make_launch(job, machine, resident_blocks, nullptr, launch);
  return {static_cast<size_t>(launch.scratch_bytes), launch.failure};
}

cudaError_t start(const Launch& launch, Kernel kernel, int64_t samples, cudaStream_t stream) {
  const Plan& plan = launch.plan;
  if (launch.arrivals_bytes > 0) {
    const cudaError_t error = cudaMemsetAsync(plan.arrivals, 0, static_cast<size_t>(launch.arrivals_bytes), stream);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attribute = {};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(samples * plan.chunks * plan.splits));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(launch.shared_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  if (plan.meeting == Meeting::cluster) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(plan.splits);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.numAttrs = 1;
  } else if (plan.meeting == Meeting::grid) {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
    config.numAttrs = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, plan);
}

Failure run(const Job& job, const Queue& queue) {
  const OnDevice on_device(queue.device);
  Machine machine = {};
  cudaError_t error = on_device.error();
  if (error == cudaSuccess) error = look_at(queue.device, machine);
  if (error != cudaSuccess) return text_of(error);
  Launch launch;
  make_launch(job, machine, resident_blocks, queue.scratch, launch);
  if (launch.failure != nullptr) return launch.failure;
  const Kernel kernel = kernel_of(job.problem->float64, launch.rows);
  error = allow_shared(kernel, launch.shared_bytes);
  for (int64_t sample = 0; sample < launch.batch && error == cudaSuccess; sample += launch.samples) {
    launch.plan.first_sample = sample;
    error = start(launch, kernel, std::min(launch.samples, launch.batch - sample), static_cast<cudaStream_t>(queue.stream));
  }
  return text_of(error);
}

Job saliency_job(const Problem& problem, const Output& output) {
  return {Task::saliency, &problem, nullptr, output, nullptr, nullptr};
}

Job combine_job(const Problem& problem, const SignedMaps& maps, const Output& output) {
  return {Task::combine, &problem, &maps, output, nullptr, nullptr};
}

Job token_job(const Problem& problem, const bool* mask, void* scores) {
  return {Task::tokens, &problem, nullptr, {}, mask, scores};
}

}  // namespace

Scratch saliency_scratch(const Problem& problem, const Output& output, int device) {
  return scratch_of(saliency_job(problem, output), device);
}

Scratch combine_scratch(const Problem& problem, const SignedMaps& maps, const Output& output, int device) {
  return scratch_of(combine_job(problem, maps, output), device);
}

Scratch token_scratch(const Problem& problem, const bool* mask, int device) {
  return scratch_of(token_job(problem, mask, nullptr), device);
}

Failure saliency_maps(const Problem& problem, const Output& output, const Queue& queue) {
  return run(saliency_job(problem, output), queue);
}

Failure signed_maps(const Problem& problem, const SignedMaps& maps, const Queue& queue) {
  return run({Task::signed_maps, &problem, &maps, {}, nullptr, nullptr}, queue);
}

Failure combine_maps(const Problem& problem, const SignedMaps& maps, const Output& output, const Queue& queue) {
  return run(combine_job(problem, maps, output), queue);
}

Failure token_saliency(const Problem& problem, const bool* mask, void* scores, const Queue& queue) {
  return run(token_job(problem, mask, scores), queue);
}

}  // namespace mhex::cuda
