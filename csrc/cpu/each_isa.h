// Includes FWM_SOURCE once per instruction set; see simd.h. No include guard: one use per kernel
// file. All other headers must come before: code inside a target region may not reach the portable
// path.
#define FWM_ISA base
#include FWM_SOURCE
#undef FWM_ISA

#if FWM_MULTI_ISA
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#define FWM_ISA v3
#include FWM_SOURCE
#undef FWM_ISA
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
#define FWM_ISA v4
#include FWM_SOURCE
#undef FWM_ISA
#pragma GCC pop_options
#endif
#undef FWM_SOURCE
