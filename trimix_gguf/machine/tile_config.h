// GCC's _tile_loadconfig names only the first 8 of the 64 bytes that ldtilecfg reads, so the
// optimizer drops the stores to the rest, and the next tile instruction is an illegal one.
// Here the operand is all 64 bytes. Given to the compiler by -include.
#if defined(__AMX_TILE__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#undef _tile_loadconfig
#define _tile_loadconfig(config) \
    __asm__ volatile("ldtilecfg %0" : : "m"(*(const char(*)[64])(config)))
#endif
