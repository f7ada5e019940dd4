// What one instruction set offers; api.cpp chooses among them at run time.
#pragma once
#include "k24.h"

struct Rows {  // of one slot, one after the other
  int64_t slot, row, rows;
};

// Rows of a slot from which they run in panels, batch rows in the lanes: a panel of 16 with more than two empty lanes loses.
constexpr int64_t PANEL_ROWS = 14;

// Whether all slots use the same weights, bias and mask, so that their rows are one block.
inline bool is_common(const k24_layer& layer) {
  return layer.weight_slots == 1 && layer.bias_slots == 1 && (!layer.codes || layer.code_slots == 1);
}

struct Isa {
  void* (*create)(int64_t slots, int64_t n_layers, const k24_layer* layers, int32_t layout, int32_t values);  // may throw
  void (*destroy)(void* net);
  int64_t (*bytes)(const void* net);
  // Rows that lie one after the other, cut into parts of one slot each; may throw std::bad_alloc.
  void (*run)(const void* net, const float* x, const float* h, float* y, float* h_next, int64_t rows, const Rows* parts, int64_t n_parts,
              bool poison);
};

extern const Isa K24_ISA_AVX512, K24_ISA_AVX2;
