// Included once per instruction set, inside its namespace, with MHEX_VECTOR_BYTES defined. Nothing here may instantiate a
// template of the standard library: the linker could keep the copy compiled for the newer processor.

// A vector of Acc, as wide as the instruction set has it unless said otherwise; GCC and Clang do arithmetic on it lane by
// lane.
template <typename Acc, int Bytes = MHEX_VECTOR_BYTES>
struct Wide {
  typedef Acc type __attribute__((vector_size(Bytes)));
  static constexpr int64_t lanes = Bytes / sizeof(Acc);
};

template <typename Acc, int Bytes = MHEX_VECTOR_BYTES>
using Vector = typename Wide<Acc, Bytes>::type;

// The narrowest vector there is, for layers of a few positions.
constexpr int kNarrow = 16;

template <typename Acc>
static inline Vector<Acc> spread(Acc value) {
  return Vector<Acc>{} + value;
}

template <typename Acc, int Bytes = MHEX_VECTOR_BYTES>
static inline void store(Acc* to, Vector<Acc, Bytes> value) {
  __builtin_memcpy(to, &value, sizeof(value));
}

// ------------------------------------------------------------------------------------------------ loads, widened to Acc

static inline float widen(float value) { return value; }
static inline double widen(double value) { return value; }
static inline float widen(BFloat16 value) {
  uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  __builtin_memcpy(&result, &bits, sizeof(result));
  return result;
}
static inline float widen(Float16 value) {
#ifdef MHEX_HAS_F16C
  return _cvtsh_ss(value.bits);
#else
  return float16_to_float(value.bits);
#endif
}

template <int Bytes = MHEX_VECTOR_BYTES>
static inline Vector<float, Bytes> load(const float* from) {
  Vector<float, Bytes> value;
  __builtin_memcpy(&value, from, sizeof(value));
  return value;
}

template <int Bytes = MHEX_VECTOR_BYTES>
static inline Vector<double, Bytes> load(const double* from) {
  Vector<double, Bytes> value;
  __builtin_memcpy(&value, from, sizeof(value));
  return value;
}

template <int Bytes = MHEX_VECTOR_BYTES>
static inline Vector<float, Bytes> load(const BFloat16* from) {
  using Halves = Vector<uint16_t, Bytes / 2>;
  using Words = Vector<uint32_t, Bytes>;
  Halves halves;
  __builtin_memcpy(&halves, from, sizeof(halves));
  Words words = __builtin_convertvector(halves, Words) << 16;
  Vector<float, Bytes> value;
  __builtin_memcpy(&value, &words, sizeof(value));
  return value;
}

template <int Bytes = MHEX_VECTOR_BYTES>
static inline Vector<float, Bytes> load(const Float16* from) {
  Vector<float, Bytes> value;
#if defined(MHEX_HAS_F16C) && MHEX_VECTOR_BYTES == 64
  if constexpr (Bytes == 64) {
    __m512 wide = _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    __builtin_memcpy(&value, &wide, sizeof(value));
    return value;
  }
#endif
#if defined(MHEX_HAS_F16C)
  if constexpr (Bytes == 32) {
    __m256 wide = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    __builtin_memcpy(&value, &wide, sizeof(value));
    return value;
  }
  if constexpr (Bytes == 16) {
    __m128 wide = _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
    __builtin_memcpy(&value, &wide, sizeof(value));
    return value;
  }
#endif
  for (int64_t lane = 0; lane < Wide<float, Bytes>::lanes; ++lane) value[lane] = widen(from[lane]);
  return value;
}

// A value of A_l, or a vector of them, as saliency reads it: as it is or, rectified, cut off at zero. NaN stays NaN.
template <bool Rectify, typename Value>
static inline Value seen(Value value) {
  if constexpr (Rectify) {
    return value < Value{} ? Value{} : value;
  } else {
    return value;
  }
}

// ------------------------------------------------------------------------------------------------------------ reductions

// Lane i gets lane i + Distance, around the end.
template <typename Acc, int Distance>
static inline Vector<Acc> rotate(Vector<Acc> value) {
  constexpr int lanes = Wide<Acc>::lanes;
#if defined(__GNUC__) && !defined(__clang__)
  typedef typename LaneIndex<sizeof(Acc)>::type Index;
  typedef Index Indices __attribute__((vector_size(MHEX_VECTOR_BYTES)));
  Indices from;
  for (int lane = 0; lane < lanes; ++lane) from[lane] = (lane + Distance) % lanes;
  return __builtin_shuffle(value, from);
#else
  Vector<Acc> result;
  for (int lane = 0; lane < lanes; ++lane) result[lane] = value[(lane + Distance) % lanes];
  return result;
#endif
}

template <typename Acc, int Distance = Wide<Acc>::lanes / 2>
static inline Acc sum_lanes(Vector<Acc> value) {
  if constexpr (Distance == 0) {
    return value[0];
  } else {
    return sum_lanes<Acc, Distance / 2>(value + rotate<Acc, Distance>(value));
  }
}

template <typename Acc, int Distance = Wide<Acc>::lanes / 2>
static inline Acc max_lanes(Vector<Acc> value) {
  if constexpr (Distance == 0) {
    return value[0];
  } else {
    const Vector<Acc> other = rotate<Acc, Distance>(value);
    return max_lanes<Acc, Distance / 2>(value > other ? value : other);
  }
}

// Folds two vectors into one: in each block of `Block` lanes the first half holds the sums of the block's halves in `a`, the
// second half those in `b`.
template <typename Acc, int Block>
static inline Vector<Acc> fold(Vector<Acc> a, Vector<Acc> b) {
#if defined(__GNUC__) && !defined(__clang__)
  typedef typename LaneIndex<sizeof(Acc)>::type Index;
  typedef Index Indices __attribute__((vector_size(MHEX_VECTOR_BYTES)));
  constexpr int lanes = Wide<Acc>::lanes;
  Indices low;
  for (int lane = 0; lane < lanes; ++lane) {
    const int start = lane / Block * Block, offset = lane % Block;
    low[lane] = offset < Block / 2 ? start + offset : lanes + start + offset - Block / 2;
  }
  return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, low + Block / 2);
#else
  Vector<Acc> result;
  for (int lane = 0; lane < Wide<Acc>::lanes; ++lane) {
    const int start = lane / Block * Block, offset = lane % Block;
    const Vector<Acc>& from = offset < Block / 2 ? a : b;
    const int place = start + offset % (Block / 2);
    result[lane] = from[place] + from[place + Block / 2];
  }
  return result;
#endif
}

// As many vectors as each has lanes -> the vector of their sums, in order.
template <typename Acc, int Block = Wide<Acc>::lanes>
static inline Vector<Acc> sums_of(Vector<Acc>* vectors) {
  if constexpr (Block == 1) {
    return vectors[0];
  } else {
#pragma GCC unroll 8
    for (int i = 0; i < Block / 2; ++i) vectors[i] = fold<Acc, Block>(vectors[i], vectors[i + Block / 2]);
    return sums_of<Acc, Block / 2>(vectors);
  }
}

// ----------------------------------------------------------------------------------------------------- planes (channels)

// `Group` channels at once: out is read and written once for all of them, and each is a stream of its own.
template <bool Rectify, typename T, typename Acc, int Group, int Bytes>
static inline void add_vectors(const T* const* plane, const Acc* weight, bool first, Acc* out, int64_t positions) {
  constexpr int64_t lanes = Wide<Acc, Bytes>::lanes;
  const auto sum_at = [&](int64_t i) {
    Vector<Acc, Bytes> sum = seen<Rectify>(load<Bytes>(plane[0] + i)) * weight[0];
#pragma GCC unroll 8
    for (int j = 1; j < Group; ++j) sum += seen<Rectify>(load<Bytes>(plane[j] + i)) * weight[j];
    return sum;
  };
  // The last vector overlaps the one before it, so its old values are taken before anything is written.
  const int64_t end = positions - lanes;
  Vector<Acc, Bytes> last = {};
  if (!first) last = load<Bytes>(out + end);
  for (int64_t i = 0; i < end; i += lanes) {
    Vector<Acc, Bytes> sum = sum_at(i);
    if (!first) sum += load<Bytes>(out + i);
    store<Acc, Bytes>(out + i, sum);
  }
  store<Acc, Bytes>(out + end, sum_at(end) + last);
}

template <bool Rectify, typename T, typename Acc, int Group>
static inline void add_planes(const T* base, int64_t stride, const int32_t* channels, const Acc* weights, bool first,
                              Acc* out, int64_t positions) {
  const T* plane[Group];
  Acc weight[Group];
  for (int j = 0; j < Group; ++j) {
    plane[j] = base + channels[j] * stride;
    weight[j] = weights[j];
  }
  if (positions >= Wide<Acc>::lanes) {
    add_vectors<Rectify, T, Acc, Group, MHEX_VECTOR_BYTES>(plane, weight, first, out, positions);
  } else if (positions >= Wide<Acc, kNarrow>::lanes) {
    add_vectors<Rectify, T, Acc, Group, kNarrow>(plane, weight, first, out, positions);
  } else {
    for (int64_t i = 0; i < positions; ++i) {
      Acc sum = seen<Rectify>(widen(plane[0][i])) * weight[0];
      for (int j = 1; j < Group; ++j) sum += seen<Rectify>(widen(plane[j][i])) * weight[j];
      out[i] = first ? sum : out[i] + sum;
    }
  }
}

template <bool Rectify, typename T, typename Acc>
static void planes_of(const T* base, int64_t stride, const int32_t* channels, const Acc* weights, int32_t count, Acc* out,
                      int64_t positions) {
  int32_t j = 0;
  for (; j + 8 <= count; j += 8) {
    add_planes<Rectify, T, Acc, 8>(base, stride, channels + j, weights + j, j == 0, out, positions);
  }
  if (j < count) {
    add_planes<Rectify, T, Acc, kTogether>(base, stride, channels + j, weights + j, j == 0, out, positions);
  }
  if (count == 0) {
    for (int64_t i = 0; i < positions; ++i) out[i] = 0;
  }
}

// --------------------------------------------------------------------------------------------------- dots (channels last)

// The sum over whole vectors of channels, before its lanes are added up. Two chains, since one alone waits for each
// addition.
template <bool Rectify, typename T, typename Acc>
static inline Vector<Acc> dot_lanes(const T* values, const Acc* weights, int32_t whole) {
  constexpr int32_t lanes = Wide<Acc>::lanes;
  Vector<Acc> sums[2] = {};
  int32_t k = 0;
  for (; k + 2 * lanes <= whole; k += 2 * lanes) {
    sums[0] += seen<Rectify>(load(values + k)) * load(weights + k);
    sums[1] += seen<Rectify>(load(values + k + lanes)) * load(weights + k + lanes);
  }
  if (k < whole) sums[0] += seen<Rectify>(load(values + k)) * load(weights + k);
  return sums[0] + sums[1];
}

// The channels behind the last whole vector. Never inlined: in each place a compiler might fuse other multiplications and
// additions, and round otherwise.
template <bool Rectify, typename T, typename Acc>
__attribute__((noinline)) static Acc add_rest(const T* values, const Acc* weights, int32_t begin, int32_t end, Acc total) {
  for (int32_t k = begin; k < end; ++k) total += seen<Rectify>(widen(values[k])) * weights[k];
  return total;
}

// One position. The same additions in the same order as in dots_block: in a constant image every position must come out
// alike, to the bit.
template <bool Rectify, typename T, typename Acc>
static inline void dot_one(const T* row, const Acc* weights, int32_t channels, Acc* out) {
  const int32_t whole = channels / Wide<Acc>::lanes * Wide<Acc>::lanes;
  const Acc total = sum_lanes<Acc>(dot_lanes<Rectify>(row, weights, whole));
  *out = whole < channels ? add_rest<Rectify>(row, weights, whole, channels, total) : total;
}

// As many sums at once as a vector has lanes: that many positions, or half as many for both signs.
template <bool Rectify, typename T, typename Acc, bool Both>
static inline void dots_block(const T* base, int64_t stride, const Acc* weights_positive, const Acc* weights_negative,
                              int32_t channels, Acc* positive, Acc* negative) {
  constexpr int64_t lanes = Wide<Acc>::lanes;
  constexpr int rows = Both ? lanes / 2 : lanes;
  Vector<Acc> sums[lanes];
  const int32_t whole = channels / lanes * lanes;
  // Row by row, as memory lies: sixteen streams at once would be more than is fetched ahead.
#pragma GCC unroll 16
  for (int row = 0; row < rows; ++row) {
    sums[row] = dot_lanes<Rectify>(base + row * stride, weights_positive, whole);
    if constexpr (Both) sums[rows + row] = dot_lanes<Rectify>(base + row * stride, weights_negative, whole);
  }
  Acc totals[lanes];
  store<Acc>(totals, sums_of<Acc>(sums));
  if (whole < channels) {
    for (int row = 0; row < rows; ++row) {
      const T* values = base + row * stride;
      totals[row] = add_rest<Rectify>(values, weights_positive, whole, channels, totals[row]);
      if constexpr (Both)
        totals[rows + row] = add_rest<Rectify>(values, weights_negative, whole, channels, totals[rows + row]);
    }
  }
  __builtin_memcpy(positive, totals, rows * sizeof(Acc));
  if constexpr (Both) __builtin_memcpy(negative, totals + rows, rows * sizeof(Acc));
}

template <bool Rectify, typename T, typename Acc, bool Both>
static void dots_of(const T* base, int64_t stride, const Acc* weights_positive, const Acc* weights_negative,
                    int32_t channels, Acc* positive, Acc* negative, int64_t positions) {
  constexpr int64_t rows = Both ? Wide<Acc>::lanes / 2 : Wide<Acc>::lanes;
  int64_t p = 0;
  for (; p + rows <= positions; p += rows) {
    dots_block<Rectify, T, Acc, Both>(base + p * stride, stride, weights_positive, weights_negative, channels, positive + p,
                                      Both ? negative + p : nullptr);
  }
  for (; p < positions; ++p) {
    dot_one<Rectify>(base + p * stride, weights_positive, channels, positive + p);
    if constexpr (Both) dot_one<Rectify>(base + p * stride, weights_negative, channels, negative + p);
  }
}

template <bool Rectify, typename T, typename Acc>
static void picks_of(const T* base, int64_t stride, const int32_t* channels, const Acc* weights, int32_t count, Acc* out,
                     int64_t positions) {
  for (int64_t p = 0; p < positions; ++p) {
    const T* row = base + p * stride;
    Acc sums[4] = {};  // four chains: one alone waits for each addition
    int32_t j = 0;
    for (; j + 4 <= count; j += 4) {
      for (int i = 0; i < 4; ++i) sums[i] += seen<Rectify>(widen(row[channels[j + i]])) * weights[j + i];
    }
    for (; j < count; ++j) sums[0] += seen<Rectify>(widen(row[channels[j]])) * weights[j];
    out[p] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }
}

// ------------------------------------------------------------------------------------------------- from layers to the map

template <typename Acc>
static Extent<Acc> merge(Acc* total, const Acc* positive, const Acc* negative, Acc weight, Acc beta, bool first,
                         int64_t positions) {
  constexpr int64_t lanes = Wide<Acc>::lanes;
  const Acc largest = Limits<Acc>::largest;
  Vector<Acc> high_plus = {}, high_minus = {};
  Acc last_plus = 0, last_minus = 0;
  // A sum of zeros as long as every value is finite: 0 * inf and 0 * nan are nan.
  Vector<Acc> zeros = {};
  Acc last_zeros = 0;
  int64_t i = 0;
  for (; i + lanes <= positions; i += lanes) {
    Vector<Acc> value = load(positive + i);
    Vector<Acc> size = value < 0 ? -value : value;
    high_plus = size > high_plus ? size : high_plus;
    zeros += value * 0;
    if (negative != nullptr) {
      const Vector<Acc> other = load(negative + i);
      size = other < 0 ? -other : other;
      high_minus = size > high_minus ? size : high_minus;
      zeros += other * 0;
      value += beta * other;
    }
    value *= weight;
    if (!first) value += load(total + i);
    store<Acc>(total + i, value);
  }
  for (; i < positions; ++i) {
    Acc value = positive[i];
    Acc size = value < 0 ? -value : value;
    last_plus = size > last_plus ? size : last_plus;
    last_zeros += value * 0;
    if (negative != nullptr) {
      size = negative[i] < 0 ? -negative[i] : negative[i];
      last_minus = size > last_minus ? size : last_minus;
      last_zeros += negative[i] * 0;
      value += beta * negative[i];
    }
    value *= weight;
    total[i] = first ? value : total[i] + value;
  }
  const Acc wide_plus = max_lanes<Acc>(high_plus), wide_minus = max_lanes<Acc>(high_minus);
  Extent<Acc> extent;
  extent.positive = wide_plus > last_plus ? wide_plus : last_plus;
  extent.negative = wide_minus > last_minus ? wide_minus : last_minus;
  extent.finite = sum_lanes<Acc>(zeros) + last_zeros == 0 && extent.positive <= largest && extent.negative <= largest;
  return extent;
}

template <typename Acc>
static void stretch(const Acc* row, const Axis<Acc>& axis, Acc* out) {
  constexpr int64_t lanes = Wide<Acc>::lanes;
  for (int32_t cell = 0; cell < axis.cells; ++cell) {
    const Acc here = row[cell];
    const Acc step = (cell + 1 < axis.cells ? row[cell + 1] : here) - here;
    // The last vector of a cell runs over into the next one, which is written afterwards, or into the padding.
    for (int64_t x = axis.begin[cell]; x < axis.begin[cell + 1]; x += lanes) {
      store<Acc>(out + x, spread<Acc>(here) + load(axis.fraction + x) * step);
    }
  }
}

template <typename Acc>
static void blend(const BlendSource<Acc>* sources, int32_t count, Acc* out, int32_t width, Extremes<Acc>& extremes) {
  constexpr int64_t lanes = Wide<Acc>::lanes;
  if (width >= lanes) {
    Vector<Acc> low = load(extremes.low), high = load(extremes.high);
    const auto draw = [&](int64_t x) {
      Vector<Acc> sum = {};
      for (int32_t j = 0; j < count; ++j) {
        const Vector<Acc> above = load(sources[j].row0 + x);
        sum += above + (load(sources[j].row1 + x) - above) * sources[j].fraction;
      }
      low = sum < low ? sum : low;
      high = sum > high ? sum : high;
      store<Acc>(out + x, sum);
    };
    for (int64_t x = 0; x < width - lanes; x += lanes) draw(x);
    draw(width - lanes);  // may overlap the one before it: the same values
    store<Acc>(extremes.low, low);
    store<Acc>(extremes.high, high);
    return;
  }
  for (int32_t x = 0; x < width; ++x) {
    Acc sum = 0;
    for (int32_t j = 0; j < count; ++j) {
      const Acc above = sources[j].row0[x];
      sum += above + (sources[j].row1[x] - above) * sources[j].fraction;
    }
    out[x] = sum;
    extremes.low[0] = sum < extremes.low[0] ? sum : extremes.low[0];
    extremes.high[0] = sum > extremes.high[0] ? sum : extremes.high[0];
  }
}

template <typename Acc>
static void scale(Acc* values, int64_t count, Acc low, Acc factor) {
  constexpr int64_t lanes = Wide<Acc>::lanes;
  const Vector<Acc> one = spread<Acc>(1);
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    const Vector<Acc> value = (load(values + i) - low) * factor;
    store<Acc>(values + i, value < one ? value : one);
  }
  for (; i < count; ++i) {
    const Acc value = (values[i] - low) * factor;
    values[i] = value < 1 ? value : Acc(1);
  }
}

// ------------------------------------------------------------------------------------------------- by the dtype of A_l

template <bool Rectify>
static void planes_single(const void* base, DType dtype, int64_t stride, const int32_t* channels, const float* weights,
                          int32_t count, float* out, int64_t positions) {
  switch (dtype) {
    case DType::float32:
      return planes_of<Rectify>(static_cast<const float*>(base), stride, channels, weights, count, out, positions);
    case DType::float16:
      return planes_of<Rectify>(static_cast<const Float16*>(base), stride, channels, weights, count, out, positions);
    case DType::bfloat16:
      return planes_of<Rectify>(static_cast<const BFloat16*>(base), stride, channels, weights, count, out, positions);
    case DType::float64:
      return;
  }
}

template <bool Rectify>
static void planes_twice(const void* base, DType, int64_t stride, const int32_t* channels, const double* weights,
                         int32_t count, double* out, int64_t positions) {
  planes_of<Rectify>(static_cast<const double*>(base), stride, channels, weights, count, out, positions);
}

template <bool Rectify, typename T, typename Acc>
static void dots_by_sign(const void* base, int64_t stride, const Acc* weights_positive, const Acc* weights_negative,
                         int32_t channels, Acc* positive, Acc* negative, int64_t positions) {
  const T* typed = static_cast<const T*>(base);
  if (negative == nullptr) {
    dots_of<Rectify, T, Acc, false>(typed, stride, weights_positive, nullptr, channels, positive, nullptr, positions);
  } else {
    dots_of<Rectify, T, Acc, true>(typed, stride, weights_positive, weights_negative, channels, positive, negative,
                                   positions);
  }
}

template <bool Rectify>
static void dots_single(const void* base, DType dtype, int64_t stride, const float* weights_positive,
                        const float* weights_negative, int32_t channels, float* positive, float* negative,
                        int64_t positions) {
  switch (dtype) {
    case DType::float32:
      return dots_by_sign<Rectify, float>(base, stride, weights_positive, weights_negative, channels, positive, negative,
                                          positions);
    case DType::float16:
      return dots_by_sign<Rectify, Float16>(base, stride, weights_positive, weights_negative, channels, positive, negative,
                                            positions);
    case DType::bfloat16:
      return dots_by_sign<Rectify, BFloat16>(base, stride, weights_positive, weights_negative, channels, positive, negative,
                                             positions);
    case DType::float64:
      return;
  }
}

template <bool Rectify>
static void dots_twice(const void* base, DType, int64_t stride, const double* weights_positive,
                       const double* weights_negative, int32_t channels, double* positive, double* negative,
                       int64_t positions) {
  dots_by_sign<Rectify, double>(base, stride, weights_positive, weights_negative, channels, positive, negative, positions);
}

template <bool Rectify>
static void picks_single(const void* base, DType dtype, int64_t stride, const int32_t* channels, const float* weights,
                         int32_t count, float* out, int64_t positions) {
  switch (dtype) {
    case DType::float32:
      return picks_of<Rectify>(static_cast<const float*>(base), stride, channels, weights, count, out, positions);
    case DType::float16:
      return picks_of<Rectify>(static_cast<const Float16*>(base), stride, channels, weights, count, out, positions);
    case DType::bfloat16:
      return picks_of<Rectify>(static_cast<const BFloat16*>(base), stride, channels, weights, count, out, positions);
    case DType::float64:
      return;
  }
}

template <bool Rectify>
static void picks_twice(const void* base, DType, int64_t stride, const int32_t* channels, const double* weights,
                        int32_t count, double* out, int64_t positions) {
  picks_of<Rectify>(static_cast<const double*>(base), stride, channels, weights, count, out, positions);
}

static const InstructionSet set = {
    MHEX_SET_NAME,
    {{planes_single<false>, planes_single<true>},
     {dots_single<false>, dots_single<true>},
     {picks_single<false>, picks_single<true>},
     merge<float>,
     stretch<float>,
     blend<float>,
     scale<float>},
    {{planes_twice<false>, planes_twice<true>},
     {dots_twice<false>, dots_twice<true>},
     {picks_twice<false>, picks_twice<true>},
     merge<double>,
     stretch<double>,
     blend<double>,
     scale<double>},
};
