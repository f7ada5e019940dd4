// What a multiply-add costs on this CPU when its operand comes from memory: why 2:4 gains what it gains with 16 and more rows per agent
// (docs/kernels.md, "On another CPU"). AVX-512; every line is a loop in the first-level cache, its speed against that of the first.
//
//   g++ -O2 -mavx512f benchmarks/multiply_adds.cpp -o /tmp/multiply_adds && /tmp/multiply_adds
#include <algorithm>
#include <chrono>
#include <cstdio>

alignas(4096) static float memory[4096];

// Sixteen sums; `%0` is `memory`. One more register is the weight.
#define ALL(M) M(0) M(1) M(2) M(3) M(4) M(5) M(6) M(7) M(8) M(9) M(10) M(11) M(12) M(13) M(14) M(15)
#define PAIRS(M) M(0, 1) M(2, 3) M(4, 5) M(6, 7) M(8, 9) M(10, 11) M(12, 13) M(14, 15)
#define FOURS(M) M(0, 1, 2, 3) M(4, 5, 6, 7) M(8, 9, 10, 11) M(12, 13, 14, 15)
#define REGISTER(i) "vfmadd231ps %%zmm30, %%zmm31, %%zmm" #i "\n"
#define LOADED(i) "vfmadd231ps 64*" #i "(%0), %%zmm31, %%zmm" #i "\n"
#define ONE(i) "vpermilps $0x55, %%zmm30, %%zmm31\n" LOADED(i)
#define TWO(i, j) "vpermilps $0x55, %%zmm30, %%zmm31\n" LOADED(i) LOADED(j)
#define FOUR(i, j, k, l) "vpermilps $0x55, %%zmm30, %%zmm31\n" LOADED(i) LOADED(j) LOADED(k) LOADED(l)
#define HALF(i, j) LOADED(i) REGISTER(j)

// The fastest of many passes, in nanoseconds for sixteen multiply-adds.
template <class Block>
static double fastest(Block block) {
  double best = 1e9;
  for (int pass = 0; pass < 200; ++pass) {
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < 20000; ++i) block();
    best = std::min(best, std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - start).count() / 20000);
  }
  return best;
}

#define XMM(i) "xmm" #i,
#define TIME(TEXT) fastest([] { asm volatile(TEXT ::"r"(memory) : ALL(XMM) "xmm30", "xmm31"); })

int main() {
  const double registers = TIME(ALL(REGISTER));
  const auto line = [&](const char* what, double time) { std::printf("%-68s %.2f\n", what, registers / time); };
  line("both operands in registers (a dense kernel)", registers);
  line("every other one with an operand of 64 bytes from memory", TIME(PAIRS(HALF)));
  line("each with an operand from memory", TIME(ALL(LOADED)));
  line("and a shuffle for every four (panels of 64 rows)", TIME(FOURS(FOUR)));
  line("and a shuffle for every two (32 rows)", TIME(PAIRS(TWO)));
  line("and a shuffle for each (16 rows)", TIME(ALL(ONE)));
}
