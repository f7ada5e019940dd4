// What one instruction set offers; api.cpp chooses among them at run time.
#pragma once
#include "k24.h"

struct Rows {  // of one slot, one after the other
  int64_t slot, row, rows;
};

struct Isa {
  void* (*create)(int64_t slots, int64_t n_layers, const k24_layer* layers, int32_t layout, int32_t values);  // may throw
  void (*destroy)(void* net);
  int64_t (*bytes)(const void* net);
  // Rows that lie one after the other, cut into parts of one slot each; may throw std::bad_alloc.
  void (*run)(const void* net, const float* x, const float* h, float* y, float* h_next, int64_t rows, const Rows* parts, int64_t n_parts,
              bool poison);
};

extern const Isa K24_ISA_AVX512, K24_ISA_AVX2;
