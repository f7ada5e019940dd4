// The C interface of the CPU kernels: plain pointers and integers, so that any language can call them.
#pragma once
#include <stdint.h>

#ifdef _WIN32
#define K24_API __declspec(dllexport)
#else
#define K24_API __attribute__((visibility("default")))
#endif

// Goes up with every change of this file that a caller must know of.
#define K24_VERSION 1

#ifdef __cplusplus
extern "C" {
#endif

K24_API int32_t k24_version(void);

// One linear layer, as it is stored. All arrays are row-major and are read at creation only.
typedef struct {
  const float* weight;                           // [weight_slots, out, in]
  const uint8_t* codes;                          // [code_slots, out, ceil(in / 4)], each 0..5; null for a dense layer
  const float* bias;                             // [bias_slots, out]
  int64_t weight_slots, code_slots, bias_slots;  // 1 where all slots share, else the net's number of slots
  int64_t out, in;
  int32_t relu;
  int32_t role;  // see k24_role
} k24_layer;

enum k24_role { K24_LINEAR = 0, K24_GRU_INPUT = 1, K24_GRU_RECURRENT = 2 };  // an input is followed by its recurrent layer; one pair at most
enum k24_layout {
  K24_PACKED = 0,  // the kept weights of each slot, packed: fastest nearly always, half a dense weight per slot
  K24_SHARED = 1   // one dense weight and a bit per weight and slot: smallest
};
enum k24_values { K24_FP32 = 0, K24_BF16 = 1 };  // how packed weights are held; products and sums are float32
enum k24_isa { K24_NONE = 0, K24_AVX2 = 1, K24_AVX512 = 2 };

typedef struct k24_net k24_net;

// The widest instruction set of this machine that there is a kernel for.
K24_API int32_t k24_best_isa(void);

// Packs a net. Null if the instruction set is missing, if sizes, roles or codes are not as said above, or if memory runs out.
K24_API k24_net* k24_create(int32_t isa, int64_t slots, int64_t n_layers, const k24_layer* layers, int32_t layout, int32_t values);
K24_API void k24_free(k24_net* net);

// Bytes of weights, biases and masks that the net holds.
K24_API int64_t k24_bytes(const k24_net* net);

// Runs the whole net once on `rows` rows: x [rows, in], h [rows, hidden] -> y [rows, out], h_next [rows, hidden].
//   row_slots == null: rows / slots rows of slot 0, then as many of slot 1, and so on.
//   row_slots [rows]: the slot of each row; negative, or too large, for a row whose results are zero.
// h and h_next may be the same memory, and are not touched without a GRU. Returns 0, or -1 if memory ran out
// or rows are no multiple of slots.
K24_API int32_t k24_run(const k24_net* net, const float* x, const float* h, float* y, float* h_next, int64_t rows, const int64_t* row_slots,
                        int32_t threads);

// Tests only: fill scratch memory with NaN before every run.
K24_API void k24_poison(int32_t on);

#ifdef __cplusplus
}
#endif
