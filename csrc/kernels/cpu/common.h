// What the parts of the driver share.
#pragma once

#include <cstdint>

#include "../../params.h"
#include "leaves.h"

namespace mhex::cpu {

// A processor's cache line in elements of the narrowest accumulator: two threads never write the same one.
constexpr int64_t kLine = 16;

template <typename Acc>
const Leaves<Acc>& leaves();
template <>
inline const Leaves<float>& leaves<float>() {
  return instruction_set().single;
}
template <>
inline const Leaves<double>& leaves<double>() {
  return instruction_set().twice;
}

template <typename Function>
void parallel(const Threads& threads, int64_t count, Function& function) {
  if (count <= 0) return;
  if (count == 1 || threads.count <= 1) {
    function(int64_t{0}, count);
    return;
  }
  threads.parallel_for(
      count, [](int64_t begin, int64_t end, void* self) { (*static_cast<Function*>(self))(begin, end); }, &function);
}

inline int64_t positions_of(const Layer& layer) { return static_cast<int64_t>(layer.height) * layer.width; }

inline int64_t ceil_div(int64_t count, int64_t size) { return (count + size - 1) / size; }

inline bool enough_for_all(int64_t tasks, const Threads& threads) {
  return tasks % threads.count == 0 || tasks >= 8 * threads.count;
}

}  // namespace mhex::cpu
