// The C interface: chooses the instruction set, cuts rows into tasks, and hands these to threads.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif
#ifndef _WIN32
#include <pthread.h>
#endif

#include "isa.h"

struct k24_net {
  const Isa* isa;
  void* impl;
  int64_t slots, in, out, hidden, macs;  // macs: multiply-adds of one row
  bool shared;                           // a layer has one dense weight and a mask per slot
  int64_t common;                        // layers in which slots do not differ
  int64_t layers;
};

namespace {

std::atomic<bool> poison{false};

// The threads of a process do not follow into a fork of it, and OpenMP would wait for them for ever: a child runs on one.
std::atomic<bool> forked{false};
#ifndef _WIN32
const int watching = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

constexpr int64_t CHUNK = 128;            // batch rows that go through the net together: weights are read once for all of them
constexpr int64_t MIXED_CHUNK = 512;      // where rows of several slots go together
constexpr int64_t THREAD_MACS = 400'000;  // less work than this per thread does not pay for waking it

const Isa* isa_of(int32_t isa) {
#if defined(__x86_64__) || defined(_M_X64)
  if (isa == K24_AVX512 && k24_best_isa() >= K24_AVX512) return &K24_ISA_AVX512;
  if (isa == K24_AVX2 && k24_best_isa() >= K24_AVX2) return &K24_ISA_AVX2;
#endif
  (void)isa;
  return nullptr;
}

// Rows sorted by slot, so that each slot's rows lie together.
struct Sorted {
  std::vector<int64_t> order, starts;  // order[i]: which row comes at place i; starts[a]: first place of slot a

  Sorted(const int64_t* row_slots, int64_t rows, int64_t slots) : starts(static_cast<size_t>(slots) + 1, 0) {
    for (int64_t i = 0; i < rows; ++i)
      if (row_slots[i] >= 0 && row_slots[i] < slots) ++starts[static_cast<size_t>(row_slots[i]) + 1];
    for (size_t a = 1; a < starts.size(); ++a) starts[a] += starts[a - 1];
    order.resize(static_cast<size_t>(starts.back()));
    std::vector<int64_t> next(starts.begin(), starts.end() - 1);
    for (int64_t i = 0; i < rows; ++i)
      if (row_slots[i] >= 0 && row_slots[i] < slots) order[static_cast<size_t>(next[static_cast<size_t>(row_slots[i])]++)] = i;
  }
};

struct Task {
  int64_t row, rows;
  std::vector<Rows> parts;
};

// Cuts the rows of all slots into tasks of at most `chunk` rows; without `mix` a task stays within one slot.
std::vector<Task> tasks_of(const int64_t* starts, int64_t slots, int64_t chunk, bool mix) {
  std::vector<Task> tasks;
  for (int64_t a = 0; a < slots; ++a)
    for (int64_t row = starts[a]; row < starts[a + 1];) {
      if (!mix || tasks.empty() || tasks.back().rows >= chunk) tasks.push_back({row, 0, {}});
      Task& task = tasks.back();
      const int64_t rows = std::min(chunk - task.rows, starts[a + 1] - row);
      task.parts.push_back({a, row - task.row, rows});
      task.rows += rows;
      row += rows;
    }
  return tasks;
}

// Rows of different slots go through the net together where a layer does not tell them apart, unless each slot has enough of its own to
// fill panels from the first layer to the last.
bool mixes(const k24_net& net, int64_t slots, int64_t rows) {
  return slots > 1 && (net.shared || (net.common && rows < slots * PANEL_ROWS));
}

void run_sorted(const k24_net& net, const float* x, const float* h, float* y, float* h_next, const int64_t* starts, int64_t slots,
                int32_t threads) {
  const int64_t rows = starts[slots];
  const int64_t whole[2] = {0, rows};
  if (net.common == net.layers) starts = whole, slots = 1;  // nothing tells slots apart
  if (forked) threads = 1;
  threads = static_cast<int32_t>(std::max<int64_t>(1, std::min<int64_t>(threads, rows * net.macs / THREAD_MACS)));
  const bool mix = mixes(net, slots, rows);
  int64_t chunk = mix ? MIXED_CHUNK : CHUNK;
  if (threads > 1) chunk = std::min(chunk, std::max<int64_t>(16, rows / (threads * 4) / 16 * 16));
  const auto run = [&](int64_t row, int64_t count, const Rows* parts, size_t n) {
    net.isa->run(net.impl, x + row * net.in, h + row * net.hidden, y + row * net.out, h_next + row * net.hidden, count, parts,
                 static_cast<int64_t>(n), poison);
  };
  // The common cases, without allocating anything.
  constexpr int64_t FEW = 64;
  if (threads == 1 && !mix) {
    for (int64_t a = 0; a < slots; ++a)
      for (int64_t row = starts[a]; row < starts[a + 1]; row += chunk) {
        const Rows part{a, 0, std::min(chunk, starts[a + 1] - row)};
        run(row, part.rows, &part, 1);
      }
    return;
  }
  if (threads == 1 && slots <= FEW && rows <= chunk) {
    Rows parts[FEW];
    size_t n = 0;
    for (int64_t a = 0; a < slots; ++a)
      if (starts[a + 1] > starts[a]) parts[n++] = {a, starts[a], starts[a + 1] - starts[a]};
    if (n) run(0, rows, parts, n);
    return;
  }
  const std::vector<Task> tasks = tasks_of(starts, slots, chunk, mix);
  std::atomic<bool> failed{false};  // an exception must not leave a parallel region
  const int64_t n = static_cast<int64_t>(tasks.size());
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
#endif
  for (int64_t i = 0; i < n; ++i) {
    const Task& task = tasks[static_cast<size_t>(i)];
    try {
      run(task.row, task.rows, task.parts.data(), task.parts.size());
    } catch (...) {
      failed = true;
    }
  }
  if (failed) throw std::bad_alloc();
}

void run_mixed(const k24_net& net, const float* x, const float* h, float* y, float* h_next, int64_t rows, const int64_t* row_slots,
               int32_t threads) {
  const Sorted sorted(row_slots, rows, net.slots);
  const int64_t live = sorted.starts.back();
  std::vector<float> buffer(static_cast<size_t>(live * (net.in + net.out + 2 * net.hidden)));
  float *xs = buffer.data(), *ys = xs + live * net.in, *hs = ys + live * net.out, *after = hs + live * net.hidden;
  const auto copy = [](float* to, const float* from, int64_t width) { std::memcpy(to, from, static_cast<size_t>(width) * sizeof(float)); };
  for (int64_t i = 0; i < live; ++i) {
    const int64_t row = sorted.order[static_cast<size_t>(i)];
    copy(xs + i * net.in, x + row * net.in, net.in);
    if (net.hidden) copy(hs + i * net.hidden, h + row * net.hidden, net.hidden);
  }
  if (live) run_sorted(net, xs, hs, ys, after, sorted.starts.data(), net.slots, threads);
  if (live < rows) {
    std::memset(y, 0, static_cast<size_t>(rows * net.out) * sizeof(float));
    if (net.hidden) std::memset(h_next, 0, static_cast<size_t>(rows * net.hidden) * sizeof(float));
  }
  for (int64_t i = 0; i < live; ++i) {
    const int64_t row = sorted.order[static_cast<size_t>(i)];
    copy(y + row * net.out, ys + i * net.out, net.out);
    if (net.hidden) copy(h_next + row * net.hidden, after + i * net.hidden, net.hidden);
  }
}

// Whether sizes fit each other and codes are codes: from here on they are indices.
bool sound(int64_t slots, int64_t n_layers, const k24_layer* layers) {
  if (slots < 1 || n_layers < 1) return false;
  int grus = 0;
  for (int64_t i = 0; i < n_layers; ++i) {
    const k24_layer& layer = layers[i];
    const auto fits = [&](int64_t n) { return n == 1 || n == slots; };
    if (layer.out < 1 || layer.in < 1 || !fits(layer.weight_slots) || !fits(layer.bias_slots)) return false;
    const bool first = layer.role == K24_GRU_INPUT, second = layer.role == K24_GRU_RECURRENT;
    if (!first && !second && layer.role != K24_LINEAR) return false;
    if (first && ++grus > 1) return false;  // a net has one state
    if (first && (i + 1 == n_layers || layers[i + 1].role != K24_GRU_RECURRENT || layers[i + 1].out != layer.out)) return false;
    if (second && (i == 0 || layers[i - 1].role != K24_GRU_INPUT || layer.out != 3 * layer.in)) return false;
    if (i > 0 && !second) {  // takes what the layer before it gives
      const k24_layer& before = layers[i - 1];
      if (layer.in != (before.role == K24_LINEAR ? before.out : before.in)) return false;
    }
    if (!layer.codes) continue;
    if (layer.weight_slots != 1 || !fits(layer.code_slots)) return false;
    const uint8_t* end = layer.codes + layer.code_slots * layer.out * ((layer.in + 3) / 4);
    if (std::any_of(layer.codes, end, [](uint8_t code) { return code > 5; })) return false;
  }
  return true;
}

}  // namespace

int32_t k24_version(void) { return K24_VERSION; }

int32_t k24_best_isa(void) {
#if defined(__x86_64__) || defined(_M_X64)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return K24_AVX512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return K24_AVX2;
#endif
  return K24_NONE;
}

k24_net* k24_create(int32_t isa, int64_t slots, int64_t n_layers, const k24_layer* layers, int32_t layout, int32_t values) {
  const Isa* chosen = isa_of(isa);
  if (!chosen || !sound(slots, n_layers, layers)) return nullptr;
  k24_net* net = nullptr;
  try {
    net = new k24_net{};
    net->isa = chosen;
    net->slots = slots;
    net->in = layers[0].in;
    net->layers = n_layers;
    for (int64_t i = 0; i < n_layers; ++i) {
      net->macs += layers[i].in * layers[i].out;
      net->out = layers[i].role == K24_LINEAR ? layers[i].out : layers[i].out / 3;
      if (layers[i].role == K24_GRU_RECURRENT) net->hidden = layers[i].in;
      net->shared |= layout == K24_SHARED && layers[i].code_slots > 1;
      net->common += is_common(layers[i]);
    }
    net->impl = chosen->create(slots, n_layers, layers, layout, values);
    return net;
  } catch (...) {
    delete net;
    return nullptr;
  }
}

void k24_free(k24_net* net) {
  if (net) net->isa->destroy(net->impl);
  delete net;
}

int64_t k24_bytes(const k24_net* net) { return net->isa->bytes(net->impl); }

int32_t k24_run(const k24_net* net, const float* x, const float* h, float* y, float* h_next, int64_t rows, const int64_t* row_slots,
                int32_t threads) {
  try {
    if (row_slots) {
      run_mixed(*net, x, h, y, h_next, rows, row_slots, threads);
      return 0;
    }
    if (rows % net->slots) return -1;
    // Few slots need no memory of the heap.
    int64_t few[65];
    std::vector<int64_t> many;
    int64_t* starts = few;
    if (net->slots >= 65) many.resize(static_cast<size_t>(net->slots) + 1), starts = many.data();
    for (int64_t a = 0; a <= net->slots; ++a) starts[a] = a * (rows / net->slots);
    run_sorted(*net, x, h, y, h_next, starts, net->slots, threads);
    return 0;
  } catch (...) {
    return -1;
  }
}

void k24_poison(int32_t on) { poison = on != 0; }
