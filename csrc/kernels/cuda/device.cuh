// What every part of the kernel leans on: loads, widening, and threads that talk to each other.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "plan.h"

// All shared memory is dynamic and cut up by the plan's offsets. tests/native/cuda_emulation brings its own.
#ifndef MHEX_SHARED
#define MHEX_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace mhex::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <typename Acc>
struct Limits;
template <>
struct Limits<float> {
  static constexpr float largest = 3.402823466e+38f;
  static constexpr float epsilon = 1.1920928955078125e-07f;
};
template <>
struct Limits<double> {
  static constexpr double largest = 1.7976931348623157e+308;
  static constexpr double epsilon = 2.220446049250313e-16;
};

// The start of shared memory, in every phase.
struct Control {
  int64_t classes[kMaxRows];  // of each row; -1 where the target is not a class, -2 where there is no such row
  int32_t counts[kWarps];
  int32_t flags[kWarps];
  double extremes[2 * kWarps];  // each warp's lowest, then highest value of a map, as Acc
};

// What a block is to do, behind Control. What lives long lies in shared memory rather than in registers: the loops over
// activations and pixels are functions of their own, and a register in use across such a call has to be saved for it.
struct Share {
  int64_t sample;
  int64_t map;        // the first target's, counted from the launch's first
  int64_t batch_map;  // counted from the batch's first
  int32_t unit;
  int32_t split;
  int32_t targets;
  Cut begin;
  Cut end;
  Range tokens;  // all, and those between the first and the last that the mask keeps
  Range wanted;
};

constexpr int kAtTask = sizeof(Control) + sizeof(Share);  // where Reading or Frame lies

__device__ __forceinline__ Control& control_in(unsigned char* shared) { return *reinterpret_cast<Control*>(shared); }
__device__ __forceinline__ Share& share_in(unsigned char* shared) {
  return *reinterpret_cast<Share*>(shared + sizeof(Control));
}

// --------------------------------------------------------------------------------------------------------------- loads

// V elements of type T as they lie in memory: 16 bytes, or one element.
template <typename T, int V>
struct Packet {
  uint32_t word[4];
};
template <typename T>
struct Packet<T, 1> {
  T value;
};

// Activations are read once, so they should not push anything out of the caches.
template <typename T, int V>
__device__ inline Packet<T, V> load(const T* from) {
  if constexpr (V == 1) {
    return {*from};
  } else {
    const uint4 bits = __ldcs(reinterpret_cast<const uint4*>(from));
    return {{bits.x, bits.y, bits.z, bits.w}};
  }
}

__device__ inline float widen(float value) { return value; }
__device__ inline double widen(double value) { return value; }
__device__ inline float widen(BFloat16 value) { return __uint_as_float(static_cast<uint32_t>(value.bits) << 16); }
__device__ inline float widen(Float16 value) { return __half2float(__ushort_as_half(value.bits)); }

// As many elements as 16 bytes of Acc hold: part `part` of a packet.
template <typename Acc, int V>
struct Quad {
  static constexpr int size = V < static_cast<int>(16 / sizeof(Acc)) ? V : static_cast<int>(16 / sizeof(Acc));
  Acc value[size];
};

template <typename Acc, typename T, int V>
__device__ inline Quad<Acc, V> widen(const Packet<T, V>& packet, int part) {
  if constexpr (V == 1) {
    return {{static_cast<Acc>(widen(packet.value))}};
  } else if constexpr (sizeof(T) == 8) {
    return {{__hiloint2double(packet.word[1], packet.word[0]), __hiloint2double(packet.word[3], packet.word[2])}};
  } else if constexpr (sizeof(T) == 4) {
    return {{__uint_as_float(packet.word[0]), __uint_as_float(packet.word[1]), __uint_as_float(packet.word[2]),
             __uint_as_float(packet.word[3])}};
  } else {
    Quad<Acc, V> quad;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t word = packet.word[part * 2 + i / 2];
      quad.value[i] = widen(T{static_cast<uint16_t>(i % 2 == 0 ? word & 0xffffu : word >> 16)});
    }
    return quad;
  }
}

// The same, with what is below `lowest` brought up to it; NaN stays NaN.
template <typename Acc, int V>
__device__ inline Quad<Acc, V> not_below(Quad<Acc, V> quad, Acc lowest) {
#pragma unroll
  for (int i = 0; i < Quad<Acc, V>::size; ++i) quad.value[i] = quad.value[i] < lowest ? lowest : quad.value[i];
  return quad;
}

// --------------------------------------------------------------------------------------------------------- arithmetic

__device__ inline float fused(float a, float b, float c) { return fmaf(a, b, c); }
__device__ inline double fused(double a, double b, double c) { return fma(a, b, c); }

// The larger of two sizes; NaN beats everything.
template <typename Acc>
__device__ inline Acc larger(Acc a, Acc b) {
  return b > a || b != b ? b : a;
}

template <typename Acc>
__device__ inline Acc power(Acc base, Acc exponent) {
  return pow(base, exponent);
}

template <typename Acc>
__device__ inline Acc quiet_nan() {
  return static_cast<Acc>(__uint_as_float(0x7fc00000u));
}

template <typename Acc>
__device__ inline Acc minus_infinity() {
  return static_cast<Acc>(__uint_as_float(0xff800000u));
}

// ------------------------------------------------------------------------------------------------------------- meeting

// All blocks of a unit have got here; what they wrote before can be read after. `round` counts meetings from 1.
__device__ inline void meet(const Plan& plan, int32_t unit, uint32_t round) {
  if (plan.meeting == Meeting::cluster) {
#if defined(MHEX_CLUSTER_BARRIER)
    MHEX_CLUSTER_BARRIER();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
#endif
    return;
  }
  if (plan.meeting != Meeting::grid) {
    __syncthreads();
    return;
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    uint32_t* arrivals = plan.arrivals + unit;
    atomicAdd(arrivals, 1u);
    const uint32_t expected = round * static_cast<uint32_t>(plan.splits);
    while (*static_cast<volatile uint32_t*>(arrivals) < expected) __nanosleep(64);
    __threadfence();
  }
  __syncthreads();
}

// Whether this block is the last of its unit to get here, and so may read what all of them wrote.
__device__ inline bool last_to_arrive(const Plan& plan, int32_t unit, Control& control) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    control.flags[0] = atomicAdd(plan.arrivals + unit, 1u) + 1 == static_cast<uint32_t>(plan.splits);
    __threadfence();
  }
  __syncthreads();
  return control.flags[0] != 0;
}

}  // namespace mhex::cuda
