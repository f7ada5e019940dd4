// Packing and running a net, compiled once per instruction set.
//
// Lanes of a register hold LANES output rows, a *tile*. The weights of a tile are one stream, read from front to back for a block of batch
// rows; activations are row-major. Three forms of a linear layer:
//
//   packed   Per 8 groups of 4 inputs: LANES words of 8 nibbles (2 bits for the input that the first kept weight takes, 2 for the second),
//   then
//            per group the first and the second kept weights of all lanes. A group costs two picks and two multiply-adds per tile and batch
//            row, where a dense one costs four multiply-adds.
//   dense    Per input the weights of all lanes. Blocked and tuned as hard: what packed is measured against, and what unmasked layers use.
//   shared   The dense stream, once for all slots, and LANES words of 32 bits per 32 inputs for each slot. Slots are the inner loop, so
//   that the
//            weights of a tile come from the first-level cache for all but the first.
//
// From 14 batch rows of a slot on, a packed net runs in *panels*: batch rows in the lanes, from its first layer to its last. They read the
// same packed streams, and nothing is picked: a nibble is the address of an input. Where slots have fewer rows, those of all slots are one
// block to a layer in which slots do not differ, and from 14 of them on such a layer runs in panels by itself.
//
// Wide layers are cut along the inputs so that what all batch rows pass over stays in the first-level cache. However a layer is run, every
// output is the same sum in the same order: bias, then kept weights from the first input to the last.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#include "isa.h"
#include "simd.h"

namespace K24_ISA {

constexpr int64_t GROUPS = 8;        // groups per index word
constexpr int FEW_ROWS = 3;          // rows up to which more tiles at a time pay, and spreading activations does not
constexpr int64_t FAR = 768 * 1024;  // bytes of a net that a second-level cache of 1 MB does not hold from one run to the next
constexpr int64_t SPREAD_ROWS = 16, SPREAD_CUT = 32;  // rows and groups that are spread at a time: at most 32 KB
constexpr int64_t DENSE_CUT = 64;                     // inputs per pass of four dense tiles: 16 KB with AVX-512
constexpr int64_t PANEL_BYTES = 16384;                // of a panel per pass

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Memory that starts on a cache line.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  Buffer(Buffer&& other) noexcept : data_(other.data_), bytes_(other.bytes_) { other.data_ = nullptr, other.bytes_ = 0; }
  ~Buffer() { std::free(data_); }

  // Makes room, without keeping what was there.
  char* resize(int64_t bytes) {
    bytes = round_up(std::max<int64_t>(bytes, 64), 64);
    if (bytes > bytes_) {
      std::free(data_);
      data_ = static_cast<char*>(std::aligned_alloc(64, static_cast<size_t>(bytes)));
      bytes_ = data_ ? bytes : 0;
      if (!data_) throw std::bad_alloc();
    }
    return data_;
  }
  char* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  char* data_ = nullptr;
  int64_t bytes_ = 0;
};

// Packed values: two floats per lane and group, or two bfloat16 in one word.
struct Fp32Pairs {
  static constexpr int64_t BYTES = 2 * LANES * 4;
  static K24_INLINE void read(const char* p, F& first, F& second) {
    first = load(reinterpret_cast<const float*>(p));
    second = load(reinterpret_cast<const float*>(p) + LANES);
  }
  static K24_INLINE void quads(const char* p, int lane, F& first, F& second) {
    first = quad(reinterpret_cast<const float*>(p) + lane);
    second = quad(reinterpret_cast<const float*>(p) + LANES + lane);
  }
  static void write(char* p, int lane, float first, float second) {
    reinterpret_cast<float*>(p)[lane] = first;
    reinterpret_cast<float*>(p)[LANES + lane] = second;
  }
};

struct Bf16Pairs {
  static constexpr int64_t BYTES = LANES * 4;
  static K24_INLINE void read(const char* p, F& first, F& second) {
    const I pair = load(reinterpret_cast<const uint32_t*>(p));
    first = low_half(pair);
    second = high_half(pair);
  }
  static K24_INLINE void quads(const char* p, int lane, F& first, F& second) {
    const I pair = quad(reinterpret_cast<const uint32_t*>(p) + lane);
    first = low_half(pair);
    second = high_half(pair);
  }
  static uint32_t rounded(float v) {
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  }
  static void write(char* p, int lane, float first, float second) {
    reinterpret_cast<uint32_t*>(p)[lane] = rounded(first) | rounded(second) << 16;
  }
};

template <class Pairs>
constexpr int64_t packed_bytes(int64_t groups) {  // of one tile
  return ceil_div(groups, GROUPS) * LANES * 4 + groups * Pairs::BYTES;
}

enum class Form { PACKED_FP32, PACKED_BF16, DENSE, SHARED };

struct Layer {
  Form form;
  int32_t role;  // of k24_role
  bool relu;
  bool common;                      // slots do not differ
  int64_t in, out;                  // as stored
  int64_t padded_in;                // to whole groups: what is read of an activation row
  int64_t segment, padded_segment;  // output rows per gate of a GRU (all of them elsewhere), and padded to whole tiles
  int64_t tiles;
  int64_t weight_stride, mask_stride, bias_stride;  // bytes (floats for the bias) from one slot to the next; 0 where all share
  Buffer weights, masks, bias;

  int64_t padded_out() const { return tiles * LANES; }
  int64_t source_row(int64_t padded) const {  // -1 for padding
    const int64_t gate = padded / padded_segment, row = padded % padded_segment;
    return row < segment ? gate * segment + row : -1;
  }
};

// Packing ---------------------------------------------------------------------------------------------------------------------------

constexpr int FIRST[6] = {0, 0, 0, 1, 1, 2}, SECOND[6] = {1, 2, 3, 2, 3, 3};

template <class Pairs>
void pack_tile(char* to, const Layer& layer, const float* weight, const uint8_t* codes, int64_t tile) {
  const int64_t groups = layer.padded_in / 4;
  for (int64_t start = 0; start < groups; start += GROUPS) {
    const int64_t count = std::min(GROUPS, groups - start);
    uint32_t* words = reinterpret_cast<uint32_t*>(to);
    std::memset(words, 0, LANES * 4);
    to += LANES * 4;
    for (int64_t g = 0; g < count; ++g, to += Pairs::BYTES)
      for (int lane = 0; lane < LANES; ++lane) {
        const int64_t row = layer.source_row(tile * LANES + lane);
        float kept[2] = {0, 0};
        int from[2] = {0, 0};
        if (row >= 0) {
          const uint8_t code = codes[row * groups + start + g];
          const int chosen[2] = {FIRST[code], SECOND[code]};
          for (int k = 0; k < 2; ++k) {
            const int64_t column = (start + g) * 4 + chosen[k];
            if (column < layer.in) kept[k] = weight[row * layer.in + column], from[k] = chosen[k];
          }
        }
        words[lane] |= static_cast<uint32_t>(from[0] | from[1] << 2) << (4 * g);
        Pairs::write(to, lane, kept[0], kept[1]);
      }
  }
}

inline void pack_dense(float* to, const Layer& layer, const float* weight) {
  for (int64_t tile = 0; tile < layer.tiles; ++tile)
    for (int64_t column = 0; column < layer.in; ++column)
      for (int lane = 0; lane < LANES; ++lane) {
        const int64_t row = layer.source_row(tile * LANES + lane);
        *to++ = row < 0 ? 0.0f : weight[row * layer.in + column];
      }
}

inline void pack_bits(uint32_t* to, const Layer& layer, const uint8_t* codes) {
  const int64_t groups = layer.padded_in / 4, words = ceil_div(layer.in, 32);
  std::memset(to, 0, static_cast<size_t>(layer.tiles * words * LANES * 4));
  for (int64_t tile = 0; tile < layer.tiles; ++tile)
    for (int lane = 0; lane < LANES; ++lane) {
      const int64_t row = layer.source_row(tile * LANES + lane);
      if (row < 0) continue;
      for (int64_t g = 0; g < groups; ++g) {
        const uint8_t code = codes[row * groups + g];
        to[(tile * words + g / 8) * LANES + lane] |= (1u << FIRST[code] | 1u << SECOND[code]) << (4 * (g % 8));
      }
    }
}

inline void pack(Layer& layer, const k24_layer& from, int32_t layout, int32_t values) {
  layer.role = from.role;
  layer.relu = from.relu != 0;
  layer.common = is_common(from);
  layer.in = from.in, layer.out = from.out;
  layer.padded_in = round_up(from.in, 4);
  layer.segment = from.role == K24_LINEAR ? from.out : from.out / 3;
  layer.padded_segment = round_up(layer.segment, LANES);
  layer.tiles = from.out / layer.segment * layer.padded_segment / LANES;
  const int64_t size = from.out * from.in, groups = layer.padded_in / 4, codes = from.out * groups;

  layer.bias_stride = from.bias_slots > 1 ? layer.padded_out() : 0;
  float* bias = reinterpret_cast<float*>(layer.bias.resize(from.bias_slots * layer.padded_out() * 4));
  for (int64_t slot = 0; slot < from.bias_slots; ++slot)
    for (int64_t row = 0; row < layer.padded_out(); ++row) {
      const int64_t source = layer.source_row(row);
      *bias++ = source < 0 ? 0.0f : from.bias[slot * from.out + source];
    }

  if (from.codes && (layout == K24_PACKED || from.code_slots == 1)) {
    layer.form = values == K24_BF16 ? Form::PACKED_BF16 : Form::PACKED_FP32;
    const int64_t tile_bytes = values == K24_BF16 ? packed_bytes<Bf16Pairs>(groups) : packed_bytes<Fp32Pairs>(groups);
    const int64_t bytes = tile_bytes * layer.tiles;
    layer.weight_stride = from.code_slots > 1 ? bytes : 0;
    char* to = layer.weights.resize(bytes * from.code_slots);
    for (int64_t slot = 0; slot < from.code_slots; ++slot)
      for (int64_t tile = 0; tile < layer.tiles; ++tile, to += tile_bytes)
        if (values == K24_BF16)
          pack_tile<Bf16Pairs>(to, layer, from.weight, from.codes + slot * codes, tile);
        else
          pack_tile<Fp32Pairs>(to, layer, from.weight, from.codes + slot * codes, tile);
    return;
  }
  const int64_t bytes = layer.padded_out() * layer.in * 4;
  layer.form = from.codes ? Form::SHARED : Form::DENSE;
  layer.weight_stride = from.weight_slots > 1 ? bytes : 0;
  char* to = layer.weights.resize(bytes * from.weight_slots);
  for (int64_t slot = 0; slot < from.weight_slots; ++slot)
    pack_dense(reinterpret_cast<float*>(to + slot * bytes), layer, from.weight + slot * size);
  if (from.codes) {
    const int64_t mask_bytes = layer.tiles * ceil_div(layer.in, 32) * LANES * 4;
    layer.mask_stride = from.code_slots > 1 ? mask_bytes : 0;
    char* bits = layer.masks.resize(mask_bytes * from.code_slots);
    for (int64_t slot = 0; slot < from.code_slots; ++slot)
      pack_bits(reinterpret_cast<uint32_t*>(bits + slot * mask_bytes), layer, from.codes + slot * codes);
  }
}

// One linear layer ------------------------------------------------------------------------------------------------------------------

// What a pass over part of the inputs starts from and what it ends with.
struct Pass {
  bool first, relu;  // start from the bias instead of from y; end with ReLU
};

template <int T, int NB>
K24_INLINE void begin(F (&sum)[T][NB], const float* bias, const float* y, int64_t ldy, Pass pass) {
  for (int t = 0; t < T; ++t)
    for (int b = 0; b < NB; ++b) sum[t][b] = pass.first ? load(bias + t * LANES) : loadu(y + b * ldy + t * LANES);
}

template <int T, int NB>
K24_INLINE void finish(const F (&sum)[T][NB], float* y, int64_t ldy, Pass pass) {
  for (int t = 0; t < T; ++t)
    for (int b = 0; b < NB; ++b) storeu(y + b * ldy + t * LANES, pass.relu ? max(zero(), sum[t][b]) : sum[t][b]);
}

// T tiles, `tile_bytes` apart, times NB batch rows over `groups` groups.
//
// SPREAD: x holds each quad as a whole register already. Some machines repeat a quad while they load it, others need a shuffle for that,
// which is what picking is short of.
template <class Pairs, bool SPREAD, int T, int NB>
void packed_block(const char* w, int64_t tile_bytes, const float* x, int64_t ldx, const float* bias, float* y, int64_t ldy, int64_t groups,
                  Pass pass) {
  F sum[T][NB];
  begin<T, NB>(sum, bias, y, ldy, pass);
  I which[T];
  auto step = [&](const char* values) __attribute__((always_inline)) {
    F first[T], second[T];
    I other[T];
    for (int t = 0; t < T; ++t) {
      Pairs::read(values + t * tile_bytes, first[t], second[t]);
      // A pass takes a short piece of every tile's stream, too short for the hardware to foresee: fetch that of the next tiles.
      if constexpr (SPREAD)
        for (int64_t line = 0; line < Pairs::BYTES; line += 64) _mm_prefetch(values + (T + t) * tile_bytes + line, _MM_HINT_T0);
      other[t] = shift_right<2>(which[t]);
    }
    for (int b = 0; b < NB; ++b) {
      const F inputs = SPREAD ? load(x + b * ldx) : quad(x + b * ldx);
      for (int t = 0; t < T; ++t) {
        sum[t][b] = fma(first[t], pick(inputs, which[t]), sum[t][b]);
        sum[t][b] = fma(second[t], pick(inputs, other[t]), sum[t][b]);
      }
    }
    for (int t = 0; t < T; ++t) which[t] = shift_right<4>(which[t]);
    x += SPREAD ? LANES : 4;
  };
  for (; groups >= GROUPS; groups -= GROUPS) {
    for (int t = 0; t < T; ++t) which[t] = load(reinterpret_cast<const uint32_t*>(w + t * tile_bytes));
    w += LANES * 4;
#pragma GCC unroll 8
    for (int g = 0; g < GROUPS; ++g) step(w + g * Pairs::BYTES);
    w += GROUPS * Pairs::BYTES;
  }
  if (groups > 0) {
    for (int t = 0; t < T; ++t) which[t] = load(reinterpret_cast<const uint32_t*>(w + t * tile_bytes));
    w += LANES * 4;
    for (; groups > 0; --groups, w += Pairs::BYTES) step(w);
  }
  finish<T, NB>(sum, y, ldy, pass);
}

// The same stream with batch rows in the lanes: x and y are panels, [inputs][V registers] and [rows][V registers]. A weight is broadcast
// and its input is a memory operand at an offset that the nibble gives, so a kept weight costs V multiply-adds with their loads, and
// nothing is picked. R rows of a tile from lane `lane` on.
template <class Pairs, int V, int R>
void panel_block(const char* w, int lane, const float* x, const float* bias, float* y, int64_t groups, Pass pass) {
  constexpr int64_t WIDTH = V * LANES;
  F sum[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sum[r][v] = pass.first ? all(bias[r]) : load(y + r * WIDTH + v * LANES);
  const auto step = [&](F first, F second, const float* inputs, int r, uint64_t nibble) __attribute__((always_inline)) {
    const float *one = inputs + (nibble & 3) * WIDTH, *two = inputs + (nibble >> 2 & 3) * WIDTH;
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) sum[r][v] = fma(first, load(one + v * LANES), sum[r][v]);
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) sum[r][v] = fma(second, load(two + v * LANES), sum[r][v]);
  };
  const auto group = [&](int64_t g, const auto* word) __attribute__((always_inline)) {  // of those that share index words
    const float* inputs = x + g * 4 * WIDTH;
#pragma GCC unroll 16
    for (int r = 0; r < R; r += 4) {
      F first, second;
      Pairs::quads(w + g * Pairs::BYTES, lane + r, first, second);
      step(splat<0>(first), splat<0>(second), inputs, r, word[r] >> (4 * g));
      step(splat<1>(first), splat<1>(second), inputs, r + 1, word[r + 1] >> (4 * g));
      step(splat<2>(first), splat<2>(second), inputs, r + 2, word[r + 2] >> (4 * g));
      step(splat<3>(first), splat<3>(second), inputs, r + 3, word[r + 3] >> (4 * g));
    }
  };
  for (; groups >= GROUPS; groups -= GROUPS) {
    const uint32_t* words = reinterpret_cast<const uint32_t*>(w) + lane;
    uint64_t word[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) word[r] = words[r];
    w += LANES * 4;
#pragma GCC unroll 8
    for (int g = 0; g < GROUPS; ++g) group(g, word);
    w += GROUPS * Pairs::BYTES;
    x += GROUPS * 4 * WIDTH;
  }
  if (groups > 0) {
    const uint32_t* words = reinterpret_cast<const uint32_t*>(w) + lane;
    w += LANES * 4;
    for (int64_t g = 0; g < groups; ++g) group(g, words);
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(y + r * WIDTH + v * LANES, pass.relu ? max(zero(), sum[r][v]) : sum[r][v]);
}

// A packed layer on a panel of V registers of batch rows, all of one slot.
template <class Pairs, int V>
void panel_linear(const Layer& layer, int64_t slot, const float* x, float* y) {
  constexpr int R = PANEL_SUMS / V;
  constexpr int64_t WIDTH = V * LANES, CUT = PANEL_BYTES / (WIDTH * 16);  // groups per pass
  const int64_t groups = layer.padded_in / 4, tile_bytes = packed_bytes<Pairs>(groups);
  const char* w = layer.weights.data() + slot * layer.weight_stride;
  const float* bias = reinterpret_cast<const float*>(layer.bias.data()) + slot * layer.bias_stride;
  for (int64_t g = 0; g < groups; g += CUT) {
    const int64_t count = std::min(CUT, groups - g);
    const Pass pass{g == 0, layer.relu && g + count == groups};
    for (int64_t t = 0; t < layer.tiles; ++t)
      for (int lane = 0; lane < LANES; lane += R) {
        const int64_t row = t * LANES + lane;
        panel_block<Pairs, V, R>(w + t * tile_bytes + packed_bytes<Pairs>(g), lane, x + g * 4 * WIDTH, bias + row, y + row * WIDTH, count,
                                 pass);
      }
  }
}

// Rows [rows, width] into a panel [padded][lanes], zeros where there is nothing.
inline void to_panel(float* panel, int64_t lanes, int64_t padded, const float* from, int64_t width, int64_t rows) {
  for (int64_t b = 0; b < lanes; b += LANES) {
    const int64_t some = std::max<int64_t>(0, std::min<int64_t>(LANES, rows - b));
    for (int64_t k = 0; k < padded; k += LANES) {
      const int64_t wide = std::min<int64_t>(LANES, padded - k), real = std::max<int64_t>(0, std::min(wide, width - k));
      F block[LANES];
      for (int i = 0; i < LANES; ++i) block[i] = i < some ? load_some(from + (b + i) * width + k, real) : zero();
      transpose(block);
      for (int64_t i = 0; i < wide; ++i) store(panel + (k + i) * lanes + b, block[i]);
    }
  }
}

inline void from_panel(float* to, int64_t width, int64_t rows, const float* panel, int64_t lanes) {
  for (int64_t b = 0; b < rows; b += LANES) {
    const int64_t some = std::min<int64_t>(LANES, rows - b);
    for (int64_t k = 0; k < width; k += LANES) {
      const int64_t real = std::min<int64_t>(LANES, width - k);
      F block[LANES];
      for (int i = 0; i < LANES; ++i) block[i] = load(panel + (k + i) * lanes + b);  // a panel has whole tiles of rows
      transpose(block);
      for (int64_t i = 0; i < some; ++i) store_some(to + (b + i) * width + k, block[i], real);
    }
  }
}

// Calls f<V>(first row, rows) for panels of 32 rows where registers allow, then of 16; returns how many rows are left, too few for a panel.
template <class Function>
K24_INLINE int64_t by_panels(int64_t rows, Function f) {
  constexpr int64_t SMALL = 16, LARGE = 2 * LANES, EMPTY = SMALL - PANEL_ROWS;
  int64_t row = 0;
  while (rows - row >= PANEL_ROWS) {
    const int64_t left = rows - row, some = std::min<int64_t>(left >= LARGE - EMPTY ? LARGE : SMALL, left);
    if (some > SMALL || SMALL == LARGE)
      f(std::integral_constant<int, LARGE / LANES>{}, row, some);
    else
      f(std::integral_constant<int, SMALL / LANES>{}, row, some);
    row += some;
  }
  return rows - row;
}

// A packed layer on rows that came as rows and go on as rows: in panels as far as they fill some; returns how many rows are left.
template <class Pairs>
int64_t panels_linear(const Layer& layer, int64_t slot, const float* x, int64_t ldx, float* y, int64_t rows) {
  static thread_local Buffer inputs, outputs;
  return by_panels(rows, [&](auto v, int64_t row, int64_t some) {
    constexpr int64_t WIDTH = v() * LANES;
    float* from = reinterpret_cast<float*>(inputs.resize(layer.padded_in * WIDTH * 4));
    float* to = reinterpret_cast<float*>(outputs.resize(layer.padded_out() * WIDTH * 4));
    to_panel(from, WIDTH, layer.padded_in, x + row * ldx, ldx, some);
    panel_linear<Pairs, v()>(layer, slot, from, to);
    from_panel(y + row * layer.padded_out(), layer.padded_out(), some, to, WIDTH);
  });
}

// As packed_block over `inputs` inputs. MASKED: each weight counts where the slot's bit is set.
template <bool MASKED, int T, int NB>
void dense_block(const float* w, int64_t tile_floats, const uint32_t* bits, int64_t tile_words, const float* x, int64_t ldx,
                 const float* bias, float* y, int64_t ldy, int64_t inputs, Pass pass) {
  F sum[T][NB];
  begin<T, NB>(sum, bias, y, ldy, pass);
  I mask[T];
  auto step = [&](int64_t column, int bit) __attribute__((always_inline)) {
    F weight[T];
    for (int t = 0; t < T; ++t) {
      weight[t] = load(w + column * LANES + t * tile_floats);
      if constexpr (MASKED) weight[t] = keep(weight[t], mask[t], bit);
    }
    for (int b = 0; b < NB; ++b) {
      const F input = all(x[b * ldx + column]);
      for (int t = 0; t < T; ++t) sum[t][b] = fma(weight[t], input, sum[t][b]);
    }
  };
  int64_t column = 0;
  if constexpr (MASKED) {
    for (; column + 32 <= inputs; column += 32) {
      for (int t = 0; t < T; ++t) mask[t] = load(bits + column / 32 * LANES + t * tile_words);
#pragma GCC unroll 32
      for (int k = 0; k < 32; ++k) step(column + k, k);
    }
    if (column < inputs) {
      for (int t = 0; t < T; ++t) mask[t] = load(bits + column / 32 * LANES + t * tile_words);
      for (int k = 0; column < inputs; ++column, ++k) step(column, k);
    }
  } else {
    for (; column + 4 <= inputs; column += 4) {
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) step(column + k, 0);
    }
    for (; column < inputs; ++column) step(column, 0);
  }
  finish<T, NB>(sum, y, ldy, pass);
}

// Calls f<NB>(first row) for blocks of at most MOST rows, as even as can be.
template <int MOST, class Function>
K24_INLINE void by_rows(int64_t rows, Function f) {
  const int64_t blocks = ceil_div(rows, MOST);
  int64_t row = 0;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t count = (rows - row) / (blocks - block) + ((rows - row) % (blocks - block) != 0);
    switch (count) {
#define K24_CASE(NB)                                                     \
  case NB:                                                               \
    if constexpr (NB <= MOST) f(std::integral_constant<int, NB>{}, row); \
    break;
      K24_CASE(1)
      K24_CASE(2) K24_CASE(3) K24_CASE(4) K24_CASE(5) K24_CASE(6) K24_CASE(7) K24_CASE(8) K24_CASE(9) K24_CASE(10) K24_CASE(11) K24_CASE(12)
#undef K24_CASE
    }
    row += count;
  }
}

template <bool MASKED, int T, int MOST>
void dense_tiles(const Layer& layer, int64_t slot, int64_t t0, const float* x, int64_t ldx, float* y, int64_t ldy, int64_t rows) {
  const int64_t tile_floats = layer.in * LANES, tile_words = ceil_div(layer.in, 32) * LANES;
  const float* w = reinterpret_cast<const float*>(layer.weights.data() + slot * layer.weight_stride) + t0 * tile_floats;
  const uint32_t* bits =
      MASKED ? reinterpret_cast<const uint32_t*>(layer.masks.data() + slot * layer.mask_stride) + t0 * tile_words : nullptr;
  const float* bias = reinterpret_cast<const float*>(layer.bias.data()) + slot * layer.bias_stride + t0 * LANES;
  y += t0 * LANES;
  const int64_t cut = rows > MOST || MASKED ? DENSE_CUT : layer.in;
  for (int64_t k = 0; k < layer.in; k += cut) {
    const int64_t count = std::min(cut, layer.in - k);
    const Pass pass{k == 0, layer.relu && k + count == layer.in};
    by_rows<MOST>(rows, [&](auto nb, int64_t row) __attribute__((always_inline)) {
      dense_block<MASKED, T, nb()>(w + k * LANES, tile_floats, MASKED ? bits + k / 32 * LANES : nullptr, tile_words, x + row * ldx + k, ldx,
                                   bias, y + row * ldy, ldy, count, pass);
    });
  }
}

// Runs f<T>(first tile) over all tiles, MOST at a time, then half as many, down to one.
template <int MOST, class Function>
K24_INLINE void by_tiles(int64_t tiles, Function f, int64_t t = 0) {
  for (; t + MOST <= tiles; t += MOST) f(std::integral_constant<int, MOST>{}, t);
  if constexpr (MOST > 1) by_tiles<MOST / 2>(tiles, f, t);
}

template <class Pairs, bool SPREAD, int TILES, int ROWS>
void packed_pass(const Layer& layer, int64_t slot, int64_t g, int64_t count, const float* x, int64_t ldx, float* y, int64_t ldy,
                 int64_t rows) {
  const int64_t groups = layer.padded_in / 4, tile_bytes = packed_bytes<Pairs>(groups);
  const char* w = layer.weights.data() + slot * layer.weight_stride + packed_bytes<Pairs>(g);
  const float* bias = reinterpret_cast<const float*>(layer.bias.data()) + slot * layer.bias_stride;
  const Pass pass{g == 0, layer.relu && g + count == groups};
  by_tiles<TILES>(layer.tiles, [&](auto t, int64_t t0) __attribute__((always_inline)) {
    by_rows<ROWS>(rows, [&](auto nb, int64_t row) __attribute__((always_inline)) {
      packed_block<Pairs, SPREAD, t(), nb()>(w + t0 * tile_bytes, tile_bytes, x + row * ldx, ldx, bias + t0 * LANES,
                                             y + row * ldy + t0 * LANES, ldy, count, pass);
    });
  });
}

template <class Pairs>
void packed_linear(const Layer& layer, bool far, Rows s, const float* x, int64_t ldx, float* y, int64_t ldy) {
  if (const int64_t left = panels_linear<Pairs>(layer, s.slot, x, ldx, y, s.rows); left < s.rows) {
    if (left == 0) return;
    x += (s.rows - left) * ldx, y += (s.rows - left) * ldy, s.rows = left;
  }
  const int64_t groups = layer.padded_in / 4;
  if (s.rows <= FEW_ROWS) return packed_pass<Pairs, false, FEW_ROWS_TILES, FEW_ROWS>(layer, s.slot, 0, groups, x, ldx, y, ldy, s.rows);
  // What comes from beyond the second-level cache had better come in one stream per tile.
  if (far && s.rows < PACKED_ROWS)
    return packed_pass<Pairs, false, PACKED_TILES, PACKED_ROWS>(layer, s.slot, 0, groups, x, ldx, y, ldy, s.rows);
  alignas(64) static thread_local float spread[SPREAD_ROWS * SPREAD_CUT * LANES];
  for (int64_t row = 0; row < s.rows; row += SPREAD_ROWS) {
    const int64_t rows = std::min(SPREAD_ROWS, s.rows - row);
    for (int64_t g = 0; g < groups; g += SPREAD_CUT) {
      const int64_t count = std::min(SPREAD_CUT, groups - g);
      for (int64_t b = 0; b < rows; ++b)
        for (int64_t k = 0; k < count; ++k) store(spread + (b * count + k) * LANES, quad(x + (row + b) * ldx + (g + k) * 4));
      packed_pass<Pairs, true, PACKED_TILES, PACKED_ROWS>(layer, s.slot, g, count, spread, count * LANES, y + row * ldy, ldy, rows);
    }
  }
}

inline void linear(const Layer& layer, bool far, const Rows* segments, int64_t count, const float* x, int64_t ldx, float* y, int64_t ldy) {
  Rows all{0, segments[0].row, 0};
  if (layer.common && count > 1) {
    for (int64_t i = 0; i < count; ++i) all.rows += segments[i].rows;
    segments = &all, count = 1;
  }
  const auto each = [&](auto f) {
    for (int64_t i = 0; i < count; ++i) f(segments[i], x + segments[i].row * ldx, y + segments[i].row * ldy);
  };
  switch (layer.form) {
    case Form::PACKED_FP32:
      return each([&](const Rows& s, const float* xs, float* ys) { packed_linear<Fp32Pairs>(layer, far, s, xs, ldx, ys, ldy); });
    case Form::PACKED_BF16:
      return each([&](const Rows& s, const float* xs, float* ys) { packed_linear<Bf16Pairs>(layer, far, s, xs, ldx, ys, ldy); });
    case Form::DENSE:
      return each([&](const Rows& s, const float* xs, float* ys) {
        if (s.rows <= FEW_ROWS)
          by_tiles<FEW_ROWS_TILES>(
              layer.tiles, [&](auto t, int64_t t0) { dense_tiles<false, t(), FEW_ROWS>(layer, s.slot, t0, xs, ldx, ys, ldy, s.rows); });
        else
          by_tiles<DENSE_TILES>(
              layer.tiles, [&](auto t, int64_t t0) { dense_tiles<false, t(), DENSE_ROWS>(layer, s.slot, t0, xs, ldx, ys, ldy, s.rows); });
      });
    case Form::SHARED:
      by_tiles<DENSE_TILES>(layer.tiles, [&](auto t, int64_t t0) {
        each([&](const Rows& s, const float* xs, float* ys) {
          dense_tiles<true, t(), DENSE_ROWS>(layer, s.slot, t0, xs, ldx, ys, ldy, s.rows);
        });
      });
  }
}

// The whole net ---------------------------------------------------------------------------------------------------------------------

enum class Panels { NONE, FP32, BF16 };  // whether every layer is packed, and how

struct Net {
  int64_t slots;
  std::vector<Layer> layers;
  int64_t in, out, hidden, padded_hidden, widest;  // widest padded row between two layers
  bool far;                                        // too large for the second-level cache
  Panels panels;

  int64_t bytes() const {
    int64_t total = 0;
    for (const Layer& layer : layers) total += layer.weights.bytes() + layer.masks.bytes() + layer.bias.bytes();
    return total;
  }
};

inline void* create(int64_t slots, int64_t count, const k24_layer* from, int32_t layout, int32_t values) {
  Net* net = new Net{};
  try {
    net->slots = slots;
    net->layers.resize(static_cast<size_t>(count));
    net->in = from[0].in;
    net->panels = values == K24_BF16 ? Panels::BF16 : Panels::FP32;
    net->widest = round_up(net->in, 4);
    for (int64_t i = 0; i < count; ++i) {
      Layer& layer = net->layers[static_cast<size_t>(i)];
      pack(layer, from[i], layout, values);
      if (layer.form != Form::PACKED_FP32 && layer.form != Form::PACKED_BF16) net->panels = Panels::NONE;
      net->widest = std::max(net->widest, layer.padded_out());
      net->out = layer.out;
      if (from[i].role == K24_GRU_RECURRENT) {
        net->hidden = net->out = layer.segment;
        net->padded_hidden = layer.padded_segment;
      }
    }
    net->far = net->bytes() > FAR;
  } catch (...) {
    delete net;
    throw;
  }
  return net;
}

// Rows of width `width` into rows of width `padded`, zeros behind.
inline void pad_rows(float* to, int64_t padded, const float* from, int64_t width, int64_t rows) {
  for (int64_t row = 0; row < rows; ++row) {
    std::memcpy(to + row * padded, from + row * width, static_cast<size_t>(width) * 4);
    std::memset(to + row * padded + width, 0, static_cast<size_t>(padded - width) * 4);
  }
}

inline void cut_rows(float* to, int64_t width, const float* from, int64_t padded, int64_t rows) {
  for (int64_t row = 0; row < rows; ++row) std::memcpy(to + row * width, from + row * padded, static_cast<size_t>(width) * 4);
}

// h' = n + z (h - n), gates in the order r, z, n; rows of H padded to whole registers.
inline void gates(const float* gx, const float* gh, const float* h, float* next, int64_t padded, int64_t rows) {
  for (int64_t row = 0; row < rows; ++row, gx += 3 * padded, gh += 3 * padded, h += padded, next += padded)
    for (int64_t i = 0; i < padded; i += LANES) {
      const F r = sigmoid(add(loadu(gx + i), loadu(gh + i)));
      const F z = sigmoid(add(loadu(gx + padded + i), loadu(gh + padded + i)));
      const F n = tanh(fma(r, loadu(gh + 2 * padded + i), loadu(gx + 2 * padded + i)));
      storeu(next + i, fma(z, sub(loadu(h + i), n), n));
    }
}

struct Scratch {
  Buffer a, b, c, h, next;
};

// Runs at most V registers of rows of one slot, batch rows in the lanes from the first layer to the last.
template <class Pairs, int V>
void run_panel(const Net& net, int64_t slot, const float* x, const float* h, float* y, float* h_next, int64_t rows, Scratch& scratch,
               bool poison) {
  constexpr int64_t WIDTH = V * LANES;
  const auto room = [&](Buffer& buffer, int64_t height) {
    float* p = reinterpret_cast<float*>(buffer.resize(height * WIDTH * 4));
    if (poison) std::memset(p, 0xff, static_cast<size_t>(buffer.bytes()));
    return p;
  };
  float *here = room(scratch.a, net.widest), *there = room(scratch.b, net.widest);
  to_panel(there, WIDTH, net.layers[0].padded_in, x, net.in, rows);
  for (size_t i = 0; i < net.layers.size(); ++i) {
    const Layer& layer = net.layers[i];
    if (net.layers[i].role == K24_GRU_INPUT) {
      const int64_t padded = net.padded_hidden;
      float *gh = room(scratch.c, 3 * padded), *before = room(scratch.h, padded);
      to_panel(before, WIDTH, padded, h, net.hidden, rows);
      panel_linear<Pairs, V>(layer, slot, there, here);
      panel_linear<Pairs, V>(net.layers[++i], slot, before, gh);
      gates(here, gh, before, there, padded * WIDTH, 1);
      from_panel(h_next, net.hidden, rows, there, WIDTH);
      continue;
    }
    panel_linear<Pairs, V>(layer, slot, there, here);
    std::swap(here, there);
  }
  from_panel(y, net.out, rows, there, WIDTH);
}

// Rows of one slot in panels; returns how many are left.
template <class Pairs>
int64_t run_panels(const Net& net, int64_t slot, const float* x, const float* h, float* y, float* h_next, int64_t rows, Scratch& scratch,
                   bool poison) {
  return by_panels(rows, [&](auto v, int64_t row, int64_t some) {
    run_panel<Pairs, v()>(net, slot, x + row * net.in, h + row * net.hidden, y + row * net.out, h_next + row * net.hidden, some, scratch,
                          poison);
  });
}

// Runs rows that lie one after the other, cut into segments of one slot each.
inline void run_rows(const Net& net, const float* x, const float* h, float* y, float* h_next, int64_t rows, const Rows* parts,
                     int64_t n_parts, bool poison) {
  static thread_local Scratch scratch;
  Rows rest{};
  if (net.panels != Panels::NONE && n_parts == 1) {
    const int64_t slot = parts[0].slot;
    const int64_t left = net.panels == Panels::FP32 ? run_panels<Fp32Pairs>(net, slot, x, h, y, h_next, rows, scratch, poison)
                                                    : run_panels<Bf16Pairs>(net, slot, x, h, y, h_next, rows, scratch, poison);
    if (left == 0) return;
    const int64_t done = rows - left;
    x += done * net.in, h += done * net.hidden, y += done * net.out, h_next += done * net.hidden;
    rows = left;
    rest = {slot, 0, left};
    parts = &rest;
  }
  const auto room = [&](Buffer& buffer, int64_t width) {
    float* p = reinterpret_cast<float*>(buffer.resize(rows * width * 4));
    if (poison) std::memset(p, 0xff, static_cast<size_t>(buffer.bytes()));  // every float a NaN
    return p;
  };
  float *here = room(scratch.a, net.widest), *there = room(scratch.b, net.widest);
  const float* input = x;
  int64_t ldx = net.in;
  if (ldx % 4) {
    ldx = net.layers[0].padded_in;
    pad_rows(here, ldx, x, net.in, rows);
    input = here;
    std::swap(here, there);
  }
  for (size_t i = 0; i < net.layers.size(); ++i) {
    const Layer& layer = net.layers[i];
    const bool last = i + 1 == net.layers.size();
    if (net.layers[i].role == K24_GRU_INPUT) {
      const Layer& recurrent = net.layers[++i];
      const int64_t width = 3 * net.padded_hidden;
      const bool exact = net.hidden == net.padded_hidden, ends = i + 1 == net.layers.size();
      float* gh = room(scratch.c, width);
      const float* before = h;
      float* after = h_next;
      if (!exact) {
        float* padded = room(scratch.h, net.padded_hidden);
        pad_rows(padded, net.padded_hidden, h, net.hidden, rows);
        before = padded;
        after = room(scratch.next, net.padded_hidden);
      }
      linear(layer, net.far, parts, n_parts, input, ldx, here, width);
      linear(recurrent, net.far, parts, n_parts, before, net.padded_hidden, gh, width);
      gates(here, gh, before, after, net.padded_hidden, rows);
      if (!exact) cut_rows(h_next, net.hidden, after, net.padded_hidden, rows);
      if (ends) std::memcpy(y, h_next, static_cast<size_t>(rows * net.hidden) * 4);
      input = after, ldx = net.padded_hidden;
      continue;
    }
    const bool direct = last && layer.out == layer.padded_out();
    float* to = direct ? y : here;
    const int64_t ldy = layer.padded_out();
    linear(layer, net.far, parts, n_parts, input, ldx, to, ldy);
    if (last && !direct) cut_rows(y, layer.out, to, ldy, rows);
    input = to, ldx = ldy;
    std::swap(here, there);
  }
}

inline void run(const void* net, const float* x, const float* h, float* y, float* h_next, int64_t rows, const Rows* parts, int64_t n_parts,
                bool poison) {
  run_rows(*static_cast<const Net*>(net), x, h, y, h_next, rows, parts, n_parts, poison);
}

inline void destroy(void* net) { delete static_cast<Net*>(net); }

inline int64_t bytes(const void* net) { return static_cast<const Net*>(net)->bytes(); }

}  // namespace K24_ISA
