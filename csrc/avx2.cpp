// The kernels for AVX2 and FMA. Compiled with the flags that setup.py gives this file alone; nothing here runs before api.cpp has asked the
// CPU.
#define K24_ISA k24_avx2
#include "kernels.h"

const Isa K24_ISA_AVX2 = {K24_ISA::create, K24_ISA::destroy, K24_ISA::bytes, K24_ISA::run};
