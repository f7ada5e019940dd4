// Random nets through every kernel of this machine, compared with plain loops in double. Built with the sanitizers and run by
// tests/test_kernels_cpu.py.
//
// Arguments: how many nets, and the seed. Prints what went wrong and exits with 1, or prints how much was run.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "k24.h"

#if defined(__SANITIZE_ADDRESS__)
extern "C" size_t __sanitizer_get_current_allocated_bytes();  // its header does not come with every compiler
static size_t allocated() { return __sanitizer_get_current_allocated_bytes(); }
#else
static size_t allocated() { return 0; }
#endif

static std::mt19937_64 generator;
static int64_t below(int64_t n) { return static_cast<int64_t>(generator() % static_cast<uint64_t>(n)); }
static bool chance(int percent) { return below(100) < percent; }
template <class T, size_t N>
static T one_of(const T (&values)[N]) {
  return values[below(N)];
}

[[noreturn]] static void fail(const char* what, const char* where) {
  std::printf("%s: %s\n", what, where);
  std::exit(1);
}

// Exactly so many elements. On the heap the sanitizer watches both ends, but it does not see masked loads and stores; so elsewhere memory
// ends, or starts, where a page begins that must not be touched.
enum Fence { HEAP, END, START };
template <class T>
class Exact {
 public:
  Exact(int64_t count, Fence fence) : count_(count) {
    const size_t bytes = static_cast<size_t>(count) * sizeof(T);
    if (fence == HEAP) {
      data_ = static_cast<T*>(std::malloc(bytes));
      return;
    }
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), room = (bytes + page - 1) / page * page;
    mapped_ = room + 2 * page;
    base_ = static_cast<char*>(mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || (room && mprotect(base_ + page, room, PROT_READ | PROT_WRITE))) fail("no memory", "mmap");
    data_ = reinterpret_cast<T*>(base_ + page + (fence == END ? room - bytes : 0));
  }
  Exact(const Exact&) = delete;
  Exact& operator=(const Exact&) = delete;
  ~Exact() { mapped_ ? void(munmap(base_, mapped_)) : std::free(data_); }
  T* data() const { return data_; }
  T* begin() const { return data_; }
  T* end() const { return data_ + count_; }
  T& operator[](int64_t i) const { return data_[i]; }
  bool operator==(const Exact& other) const { return std::equal(begin(), end(), other.begin(), other.end()); }

 private:
  T* data_;
  int64_t count_;
  char* base_ = nullptr;
  size_t mapped_ = 0;
};

// Values that bfloat16 holds exactly, so that all forms have the same result.
static float coarse(double scale) {
  const float v = static_cast<float>((static_cast<double>(below(20001)) / 10000 - 1) * scale);
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  bits &= 0xffff0000u;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

struct Layer {
  Exact<float> weight, bias;
  Exact<uint8_t> codes;
  k24_layer raw;

  Layer(int64_t in, int64_t out, int64_t slots, int32_t role, bool masked, Fence fence)
      : Layer(in, out, masked || chance(30) ? 1 : slots, masked ? (chance(60) ? slots : 1) : 0, chance(50) ? slots : 1, role, fence) {}

  Layer(int64_t in, int64_t out, int64_t weight_slots, int64_t code_slots, int64_t bias_slots, int32_t role, Fence fence)
      : weight(weight_slots * out * in, fence), bias(bias_slots * out, fence), codes(code_slots * out * ((in + 3) / 4), fence) {
    for (float& w : weight) w = coarse(2 / std::sqrt(static_cast<double>(in)));
    for (float& b : bias) b = coarse(1);
    for (uint8_t& c : codes) c = static_cast<uint8_t>(below(6));
    raw = {weight.data(),
           code_slots ? codes.data() : nullptr,
           bias.data(),
           weight_slots,
           code_slots,
           bias_slots,
           out,
           in,
           role == K24_LINEAR && chance(50),
           role};
  }

  std::vector<double> operator()(int64_t slot, const std::vector<double>& x) const {
    static const int kept[6][2] = {{0, 1}, {0, 2}, {0, 3}, {1, 2}, {1, 3}, {2, 3}};
    const int64_t in = raw.in, out = raw.out, groups = (in + 3) / 4;
    const float *w = weight.data() + (raw.weight_slots > 1 ? slot : 0) * out * in, *b = bias.data() + (raw.bias_slots > 1 ? slot : 0) * out;
    const uint8_t* c = codes.data() + (raw.code_slots > 1 ? slot : 0) * out * groups;
    std::vector<double> y(static_cast<size_t>(out));
    for (int64_t o = 0; o < out; ++o) {
      double sum = b[o];
      for (int64_t i = 0; i < in; ++i) {
        const int* pair = kept[raw.codes ? c[o * groups + i / 4] : 0];
        if (!raw.codes || pair[0] == i % 4 || pair[1] == i % 4) sum += static_cast<double>(w[o * in + i]) * x[static_cast<size_t>(i)];
      }
      y[static_cast<size_t>(o)] = raw.relu ? std::max(0.0, sum) : sum;
    }
    return y;
  }
};

struct Net {
  std::vector<Layer*> layers;
  std::vector<k24_layer> raw;
  int64_t slots, in, out, hidden = 0, macs = 0;

  explicit Net(Fence fence) {
    static const int64_t widths[] = {1,  2,  3,  4,  5,  6,  7,  8,  9,  11, 12,  13,  15,  16,  17,  18,  20,  24,  28, 31,
                                     32, 33, 36, 40, 47, 48, 49, 63, 64, 65, 100, 127, 128, 129, 255, 256, 257, 300, 520};
    const bool large = chance(8);
    const auto width = [&] { return large ? one_of(widths) : widths[below(28)]; };
    slots = chance(3) ? 64 + below(4) : 1 + below(5);
    in = out = width();
    const int64_t count = 1 + below(4), gru = below(2 * count);
    const int masked = one_of({0, 50, 100, 100});  // all layers masked go one way, some another
    for (int64_t i = 0; i < count; ++i) {
      const int64_t before = out;
      out = width();
      if (i == gru) {
        hidden = out;
        layers.push_back(new Layer(before, 3 * hidden, slots, K24_GRU_INPUT, chance(masked), fence));
        layers.push_back(new Layer(hidden, 3 * hidden, slots, K24_GRU_RECURRENT, chance(masked), fence));
      } else {
        layers.push_back(new Layer(before, out, slots, K24_LINEAR, chance(masked), fence));
      }
    }
    for (const Layer* layer : layers) raw.push_back(layer->raw), macs += layer->raw.in * layer->raw.out;
  }
  ~Net() {
    for (Layer* layer : layers) delete layer;
  }

  // Takes x and h, leaves y and the next h in them.
  void operator()(int64_t slot, std::vector<double>& x, std::vector<double>& h) const {
    const auto sigmoid = [](double v) { return 1 / (1 + std::exp(-v)); };
    for (size_t i = 0; i < layers.size(); ++i) {
      if (raw[i].role == K24_LINEAR) {
        x = (*layers[i])(slot, x);
        continue;
      }
      const std::vector<double> gx = (*layers[i])(slot, x), gh = (*layers[i + 1])(slot, h);
      const size_t width = h.size();
      for (size_t k = 0; k < width; ++k) {
        const double n = std::tanh(gx[2 * width + k] + sigmoid(gx[k] + gh[k]) * gh[2 * width + k]);
        h[k] = n + sigmoid(gx[width + k] + gh[width + k]) * (h[k] - n);
      }
      x = h;
      ++i;
    }
  }
};

static void compare(const float* got, const std::vector<double>& wanted, const char* what) {
  double scale = 1;
  for (const double v : wanted) scale = std::max(scale, std::fabs(v));
  for (size_t i = 0; i < wanted.size(); ++i)
    if (!(std::fabs(got[i] - wanted[i]) <= 1e-5 * scale)) {
      std::printf("element %zu is %.9g instead of %.9g: ", i, static_cast<double>(got[i]), wanted[i]);
      fail("wrong", what);
    }
}

static int64_t runs = 0;

static void check(const k24_net* form, const Net& net, int64_t rows, bool mixed, Fence fence, const char* what) {
  Exact<float> x(rows * net.in, fence), h(rows * net.hidden, fence), y(rows * net.out, fence), after(rows * net.hidden, fence);
  Exact<float> x0(rows * net.in, HEAP), h0(rows * net.hidden, HEAP), again(rows * net.out, fence);
  Exact<int64_t> slots(mixed ? rows : 0, fence);
  for (float& v : x) v = coarse(1);
  for (float& v : h) v = coarse(1);
  std::copy(x.begin(), x.end(), x0.begin());
  std::copy(h.begin(), h.end(), h0.begin());
  for (int64_t& slot : slots) slot = chance(20) ? -1 - below(3) : below(net.slots);
  const int64_t* row_slots = mixed ? slots.data() : nullptr;
  const auto run = [&](const Exact<float>& to, const Exact<float>& next) {
    if (k24_run(form, x.data(), h.data(), to.data(), next.data(), rows, row_slots, 2)) fail("no memory", what);
    ++runs;
  };
  run(y, after);
  if (!(x == x0) || !(h == h0)) fail("inputs were changed", what);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t slot = mixed ? slots[row] : row / (rows / net.slots);
    std::vector<double> wanted(x.begin() + row * net.in, x.begin() + (row + 1) * net.in),
        state(h.begin() + row * net.hidden, h.begin() + (row + 1) * net.hidden);
    if (slot < 0)
      wanted.assign(static_cast<size_t>(net.out), 0.0), state.assign(static_cast<size_t>(net.hidden), 0.0);
    else
      net(slot, wanted, state);
    compare(y.data() + row * net.out, wanted, what);
    compare(after.data() + row * net.hidden, state, what);
  }
  const size_t before = allocated();
  run(again, h);                                                                      // the hidden state in place
  if (allocated() != before && rows * net.macs < 800'000) fail("a run leaks", what);  // several threads have memory of their own
  if (!(again == y) || !(h == after)) fail("the hidden state in place gives another result", what);
}

int main(int argc, char** argv) {
  const int64_t nets = argc > 1 ? std::atoll(argv[1]) : 100;
  generator.seed(argc > 2 ? static_cast<uint64_t>(std::atoll(argv[2])) : 0);
  const int32_t best = k24_best_isa();
  k24_poison(1);
  k24_free(nullptr);
  for (int64_t i = 0; i < nets; ++i) {
    const Fence fence = static_cast<Fence>(i % 3);
    const Net net(fence);
    static const int64_t counts[] = {0,  1,  1,  2,  3,  4,  5,  6,  7,  8,  9,  11, 12,  13,  15,  16,
                                     17, 23, 24, 25, 28, 31, 32, 33, 47, 63, 64, 65, 127, 128, 129, 130};
    int64_t rows = one_of(counts);
    if (chance(2))
      rows = std::max(rows, 1'000'000 / net.macs / net.slots + 1);  // enough for two threads
    else
      rows = std::min(rows, 200'000 / net.macs / net.slots + 1);
    if (k24_create(K24_NONE, net.slots, static_cast<int64_t>(net.raw.size()), net.raw.data(), K24_PACKED, K24_FP32))
      fail("made", "a net of no instruction set");
    for (int32_t isa = K24_AVX2; isa <= best; ++isa)
      for (const int32_t layout : {K24_PACKED, K24_SHARED})
        for (const int32_t values : {K24_FP32, K24_BF16}) {
          char what[160];
          std::snprintf(
              what, sizeof what,
              "net %lld: isa %d, layout %d, values %d, %lld slots, %lld rows each, %zu layers, %lld inputs, %lld outputs, hidden %lld",
              static_cast<long long>(i), isa, layout, values, static_cast<long long>(net.slots), static_cast<long long>(rows),
              net.raw.size(), static_cast<long long>(net.in), static_cast<long long>(net.out), static_cast<long long>(net.hidden));
          const size_t before = allocated();
          k24_free(k24_create(isa, net.slots, static_cast<int64_t>(net.raw.size()), net.raw.data(), layout, values));
          if (allocated() != before) fail("a net leaks", what);
          k24_net* form = k24_create(isa, net.slots, static_cast<int64_t>(net.raw.size()), net.raw.data(), layout, values);
          if (!form || k24_bytes(form) <= 0) fail("not made", what);
          check(form, net, rows * net.slots, false, fence, what);
          check(form, net, rows + below(net.slots), true, fence, what);
          k24_free(form);
        }
  }
  std::printf("%lld nets, %lld runs, instruction sets up to %d\n", static_cast<long long>(nets), static_cast<long long>(runs), best);
}
