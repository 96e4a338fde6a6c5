// The kernels' own sources, compiled for the processor, and the fibres that play their threads. See shim/cuda_runtime.h.
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "../../../csrc/kernels/cuda/plan.cu"
#include "../../../csrc/kernels/cuda/saliency.cu"

namespace emulation {
namespace {

constexpr int kThreads = mhex::cuda::kThreads, kWarps = kThreads / 32;
constexpr size_t kStack = 256 * 1024, kGuard = 256;
constexpr unsigned char kGuardByte = 0xa5;

struct Settings {
  int multiprocessors = 4;
  int major = 9;
  int cooperative = 1;
  int shared_limit = 200 * 1024;
  unsigned seed = 0;
} settings;

struct Count {
  int alone, clusters, cooperative;
} launches;

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "cuda emulation: %s\n", what);
  std::abort();
}

// Threads that wait for each other. Nobody can be two rounds ahead, so two sets of values are enough.
struct Barrier {
  unsigned expected = 0, arrived = 0, round = 0;
  uint64_t values[2][32] = {};
};

struct Block {
  unsigned index;
  std::vector<unsigned char> memory;
  unsigned char* shared;
  Barrier all;
  Barrier warps[kWarps];
  Barrier* cluster;
};

struct Fibre {
  Block* block;
  unsigned thread;
  bool started, done;
  jmp_buf place;
  ucontext_t context;
};

Fibre* current;
jmp_buf scheduler;
const std::function<void()>* body;
unsigned long progress;

// Stacks are kept from launch to launch.
std::vector<std::unique_ptr<unsigned char[]>> stacks;

void yield() {
  if (_setjmp(current->place) == 0) _longjmp(scheduler, 1);
}

void enter() {
  (*body)();
  current->done = true;
  ++progress;
  _longjmp(scheduler, 1);
}

void wait(Barrier& barrier) {
  const unsigned round = barrier.round;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.round;
    ++progress;
    return;
  }
  while (barrier.round == round) yield();
}

void resume(Fibre& fibre, unsigned char* stack) {
  current = &fibre;
  if (_setjmp(scheduler) != 0) return;
  if (fibre.started) _longjmp(fibre.place, 1);
  fibre.started = true;
  getcontext(&fibre.context);
  fibre.context.uc_stack.ss_sp = stack;
  fibre.context.uc_stack.ss_size = kStack;
  fibre.context.uc_link = nullptr;
  makecontext(&fibre.context, enter, 0);
  setcontext(&fibre.context);
}

// Blocks that take turns until all of them are done.
void run(const std::vector<unsigned>& indices, unsigned cluster, size_t shared_bytes, std::mt19937& random) {
  std::vector<Block> blocks(indices.size());
  std::vector<Barrier> clusters(indices.size() / cluster);
  std::vector<Fibre> fibres(blocks.size() * kThreads);
  for (size_t b = 0; b < blocks.size(); ++b) {
    Block& block = blocks[b];
    block.index = indices[b];
    block.memory.assign(shared_bytes + 2 * kGuard + 16, kGuardByte);
    const uintptr_t start = reinterpret_cast<uintptr_t>(block.memory.data()) + kGuard;
    block.shared = reinterpret_cast<unsigned char*>((start + 15) / 16 * 16);
    std::memset(block.shared, 0xff, shared_bytes);
    block.all.expected = kThreads;
    for (Barrier& warp : block.warps) warp.expected = 32;
    block.cluster = &clusters[b / cluster];
    block.cluster->expected = cluster * kThreads;
    for (int t = 0; t < kThreads; ++t) {
      Fibre& fibre = fibres[b * kThreads + t];
      fibre.block = &block;
      fibre.thread = t;
      fibre.started = fibre.done = false;
    }
  }
  while (stacks.size() < fibres.size()) stacks.emplace_back(new unsigned char[kStack]);
  std::vector<size_t> order(fibres.size());
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random);
  for (bool left = true; left;) {
    left = false;
    const unsigned long before = progress;
    for (const size_t i : order) {
      if (fibres[i].done) continue;
      left = true;
      resume(fibres[i], stacks[i].get());
    }
    if (left && progress == before) fail("threads wait for each other for ever");
  }
  for (const Block& block : blocks) {
    for (const unsigned char* at = block.memory.data(); at < block.memory.data() + block.memory.size(); ++at) {
      if (at == block.shared) at += shared_bytes;
      if (*at != kGuardByte) fail("something was written beside shared memory");
    }
  }
}

}  // namespace

Index thread_index() { return {current->thread}; }
Index block_index() { return {current->block->index}; }
unsigned char* shared_memory() { return current->block->shared; }
void wait_for_block() { wait(current->block->all); }
void wait_for_cluster() { wait(*current->block->cluster); }
void pause() { yield(); }

uint64_t exchange(uint64_t value, unsigned from) {
  Barrier& warp = current->block->warps[current->thread / 32];
  uint64_t* values = warp.values[warp.round % 2];
  values[current->thread % 32] = value;
  wait(warp);
  return values[from];
}

unsigned vote(bool value) {
  Barrier& warp = current->block->warps[current->thread / 32];
  uint64_t* values = warp.values[warp.round % 2];
  values[current->thread % 32] = value;
  wait(warp);
  unsigned ballot = 0;
  for (int lane = 0; lane < 32; ++lane) ballot |= static_cast<unsigned>(values[lane]) << lane;
  return ballot;
}

void check_alignment(const void* address, size_t size) {
  if (reinterpret_cast<uintptr_t>(address) % size != 0) fail("a vector is not aligned");
}

void launch(unsigned blocks, unsigned cluster, bool cooperative, size_t shared_bytes, const std::function<void()>& thread) {
  if (blocks % cluster != 0) fail("the grid is no multiple of the cluster");
  if (cooperative && blocks > 2u * settings.multiprocessors) fail("a cooperative grid does not fit");
  if (shared_bytes > static_cast<size_t>(settings.shared_limit)) fail("too much shared memory");
  ++(cooperative ? launches.cooperative : cluster > 1 ? launches.clusters : launches.alone);
  body = &thread;
  std::mt19937 random(settings.seed);
  const unsigned together = cooperative ? blocks : cluster;
  std::vector<unsigned> groups(blocks / together);
  std::iota(groups.begin(), groups.end(), 0);
  std::shuffle(groups.begin(), groups.end(), random);
  for (const unsigned group : groups) {
    std::vector<unsigned> indices(together);
    std::iota(indices.begin(), indices.end(), group * together);
    run(indices, cluster, shared_bytes, random);
  }
}

}  // namespace emulation

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const auto& settings = emulation::settings;
  *value = attribute == cudaDevAttrMultiProcessorCount      ? settings.multiprocessors
           : attribute == cudaDevAttrComputeCapabilityMajor ? settings.major
           : attribute == cudaDevAttrCooperativeLaunch      ? settings.cooperative
                                                            : settings.shared_limit;
  return cudaSuccess;
}

// ------------------------------------------------------------------------------------------------------- for the tests

namespace {

// Scratch that starts as NaN, with a guard behind it.
template <typename Call>
const char* with_scratch(const mhex::cuda::Scratch& scratch, Call call) {
  if (scratch.failure != nullptr) return scratch.failure;
  const size_t bytes = scratch.bytes;
  unsigned char* memory = static_cast<unsigned char*>(std::aligned_alloc(256, (bytes + 511) / 256 * 256));
  std::memset(memory, 0xff, bytes);
  std::memset(memory + bytes, emulation::kGuardByte, 256);
  const char* failure = call(mhex::cuda::Queue{0, nullptr, memory});
  for (int i = 0; i < 256; ++i) {
    if (memory[bytes + i] != emulation::kGuardByte) emulation::fail("something was written behind scratch");
  }
  std::free(memory);
  return failure;
}

}  // namespace

extern "C" {

void emulation_set(int multiprocessors, int major, int cooperative, int shared_limit, unsigned seed) {
  emulation::settings = {multiprocessors, major, cooperative, shared_limit, seed};
  emulation::launches = {};
}

int emulation_launches(int kind) {
  return kind == 0 ? emulation::launches.alone : kind == 1 ? emulation::launches.clusters : emulation::launches.cooperative;
}

size_t emulation_problem_bytes() { return sizeof(mhex::Problem); }

const char* emulated_saliency_maps(const mhex::Problem* problem, const mhex::Output* output) {
  return with_scratch(mhex::cuda::saliency_scratch(*problem, *output, 0),
                      [&](const auto& queue) { return mhex::cuda::saliency_maps(*problem, *output, queue); });
}

const char* emulated_signed_maps(const mhex::Problem* problem, const mhex::SignedMaps* maps) {
  return mhex::cuda::signed_maps(*problem, *maps, {0, nullptr, nullptr});
}

const char* emulated_combine_maps(const mhex::Problem* problem, const mhex::SignedMaps* maps, const mhex::Output* output) {
  return with_scratch(mhex::cuda::combine_scratch(*problem, *maps, *output, 0),
                      [&](const auto& queue) { return mhex::cuda::combine_maps(*problem, *maps, *output, queue); });
}

const char* emulated_token_saliency(const mhex::Problem* problem, const bool* mask, void* scores) {
  return with_scratch(mhex::cuda::token_scratch(*problem, mask, 0),
                      [&](const auto& queue) { return mhex::cuda::token_saliency(*problem, mask, scores, queue); });
}
}
