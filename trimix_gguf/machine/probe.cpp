// Runs one instruction of each extension that the compiler switches on, and checks its result.
//   probe            names the extensions compiled in, one a line
//   probe NAME       0: right, 1: wrong, 2: the system does not allow it; or dies of a signal
// build.py compiles the file twice: the checks with -march=native, main without.

#include <cstring>

#ifdef PROBE_MAIN

#include <cstdio>

struct Check {
    const char * name;
    int (*run)(void);
};
extern const Check checks[];

int main(int argc, char ** argv) {
    for (const Check * check = checks; check->name; check++) {
        if (argc < 2) {
            std::puts(check->name);
        } else if (std::strcmp(check->name, argv[1]) == 0) {
            return check->run();
        }
    }
    return argc < 2 ? 0 : 1;
}

#else

#include <immintrin.h>
#if defined(__AMX_INT8__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#include <thread>

struct Check {
    const char * name;
    int (*run)(void);
};

// Volatile: nothing may be computed by the compiler in place of the processor.
static volatile int three = 3;
static volatile float half = 0.5f;

#if defined(__AMX_TILE__) && defined(__AMX_INT8__)
struct TileConfig {
    unsigned char palette = 0, start_row = 0, reserved[14] = {0};
    unsigned short colsb[16] = {0};
    unsigned char rows[16] = {0};
};

// As ggml does it: inlined, once a thread, stored field by field into a local.
inline void configure(void) {
    static thread_local bool done = false;
    if (done) return;
    alignas(64) TileConfig config = {};
    config.palette = 1;
    config.start_row = 0;
    config.rows[0] = 8;   config.colsb[0] = 64;
    config.rows[1] = 8;   config.colsb[1] = 64;
    config.rows[2] = 16;  config.colsb[2] = 32;
    config.rows[3] = 16;  config.colsb[3] = 32;
    config.rows[4] = 16;  config.colsb[4] = 64;
    config.rows[5] = 16;  config.colsb[5] = 64;
    config.rows[6] = 16;  config.colsb[6] = 64;
    config.rows[7] = 16;  config.colsb[7] = 64;
    _tile_loadconfig(&config);
    done = true;
}

static int multiply(void) {
    alignas(64) signed char a[1024], b[1024];
    int out[256];
    std::memset(a, three, sizeof a);
    std::memset(b, three, sizeof b);
    configure();
    _tile_zero(4);
    _tile_loadd(5, a, 64);
    _tile_loadd(6, b, 64);
    _tile_dpbssd(4, 5, 6);
    _tile_stored(4, out, 64);
    _tile_release();
    return out[0] != 64 * 9 || out[255] != 64 * 9;
}
#endif

// Constant: code that ran before main could be what this processor lacks.
extern const Check checks[];
constexpr Check checks[] = {
#ifdef __SSE4_2__
    {"sse4.2", []() -> int { return _mm_crc32_u8(1u, (unsigned char) (three - 2)) != 0; }},
#endif
#ifdef __AVX__
    {"avx", []() -> int {
        float out[8];
        _mm256_storeu_ps(out, _mm256_add_ps(_mm256_set1_ps(half), _mm256_set1_ps(1.0f)));
        return out[0] != 1.5f || out[7] != 1.5f;
    }},
#endif
#ifdef __F16C__
    {"f16c", []() -> int {
        float out[8];
        _mm256_storeu_ps(out, _mm256_cvtph_ps(_mm256_cvtps_ph(_mm256_set1_ps(half), 0)));
        return out[7] != 0.5f;
    }},
#endif
#ifdef __FMA__
    {"fma", []() -> int {
        float out[8];
        __m256 x = _mm256_set1_ps(half);
        _mm256_storeu_ps(out, _mm256_fmadd_ps(x, x, x));
        return out[7] != 0.75f;
    }},
#endif
#ifdef __AVX2__
    {"avx2", []() -> int {
        short out[16];
        __m256i x = _mm256_set1_epi8((char) three);
        _mm256_storeu_si256((__m256i *) out, _mm256_maddubs_epi16(x, x));
        return out[15] != 18;
    }},
#endif
#ifdef __BMI2__
    {"bmi2", []() -> int { return _pext_u32(0xf0u, 0x30u * (unsigned) three / 3u) != 3u; }},
#endif
#ifdef __AVXVNNI__
    {"avxvnni", []() -> int {
        int out[8];
        __m256i x = _mm256_set1_epi8((char) three);
        _mm256_storeu_si256((__m256i *) out, _mm256_dpbusd_avx_epi32(_mm256_setzero_si256(), x, x));
        return out[7] != 36;
    }},
#endif
#ifdef __AVX512F__
    {"avx512f", []() -> int {
        float out[16];
        __m512 x = _mm512_set1_ps(half);
        _mm512_storeu_ps(out, _mm512_fmadd_ps(x, x, x));
        return out[15] != 0.75f;
    }},
#endif
#ifdef __AVX512BW__
    {"avx512bw", []() -> int {
        short out[32];
        __m512i x = _mm512_set1_epi8((char) three);
        _mm512_storeu_si512(out, _mm512_maddubs_epi16(x, x));
        return out[31] != 18;
    }},
#endif
#ifdef __AVX512DQ__
    {"avx512dq", []() -> int {
        long long out[8];
        __m512i x = _mm512_set1_epi64(three);
        _mm512_storeu_si512(out, _mm512_mullo_epi64(x, x));
        return out[7] != 9;
    }},
#endif
#ifdef __AVX512CD__
    {"avx512cd", []() -> int {
        int out[16];
        _mm512_storeu_si512(out, _mm512_lzcnt_epi32(_mm512_set1_epi32(three)));
        return out[15] != 30;
    }},
#endif
#ifdef __AVX512VL__
    {"avx512vl", []() -> int {
        int out[8] = {0};
        _mm256_mask_storeu_epi32(out, 0x80, _mm256_set1_epi32(three));
        return out[7] != 3 || out[0] != 0;
    }},
#endif
#ifdef __AVX512VBMI__
    {"avx512vbmi", []() -> int {
        char table[64], out[64];
        for (int i = 0; i < 64; i++) table[i] = (char) i;
        _mm512_storeu_si512(out, _mm512_permutexvar_epi8(_mm512_set1_epi8((char) three),
                                                         _mm512_loadu_si512(table)));
        return out[63] != 3;
    }},
#endif
#ifdef __AVX512VBMI2__
    {"avx512vbmi2", []() -> int {
        char out[64];
        _mm512_storeu_si512(out, _mm512_maskz_compress_epi8(1, _mm512_set1_epi8((char) three)));
        return out[0] != 3 || out[1] != 0;
    }},
#endif
#ifdef __AVX512IFMA__
    {"avx512ifma", []() -> int {
        long long out[8];
        __m512i x = _mm512_set1_epi64(three);
        _mm512_storeu_si512(out, _mm512_madd52lo_epu64(x, x, x));
        return out[7] != 12;
    }},
#endif
#ifdef __AVX512BITALG__
    {"avx512bitalg", []() -> int {
        char out[64];
        _mm512_storeu_si512(out, _mm512_popcnt_epi8(_mm512_set1_epi8((char) three)));
        return out[63] != 2;
    }},
#endif
#ifdef __AVX512VPOPCNTDQ__
    {"avx512vpopcntdq", []() -> int {
        int out[16];
        _mm512_storeu_si512(out, _mm512_popcnt_epi32(_mm512_set1_epi32(three)));
        return out[15] != 2;
    }},
#endif
#ifdef __AVX512VNNI__
    {"avx512vnni", []() -> int {
        int out[16];
        __m512i x = _mm512_set1_epi8((char) three);
        _mm512_storeu_si512(out, _mm512_dpbusd_epi32(_mm512_setzero_si512(), x, x));
        return out[15] != 36;
    }},
#endif
#ifdef __AVX512BF16__
    {"avx512bf16", []() -> int {
        float out[16];
        __m512bh x = _mm512_cvtne2ps_pbh(_mm512_set1_ps(half), _mm512_set1_ps(half));
        _mm512_storeu_ps(out, _mm512_dpbf16_ps(_mm512_setzero_ps(), x, x));
        return out[15] != 0.5f;
    }},
#endif
#ifdef __AVX512FP16__
    {"avx512fp16", []() -> int {
        __m512h x = _mm512_set1_ph((_Float16) half);
        return (float) _mm512_reduce_add_ph(x) != 16.0f;
    }},
#endif
#ifdef __GFNI__
    {"gfni", []() -> int {
        char out[16];
        __m128i x = _mm_set1_epi8((char) three);
        _mm_storeu_si128((__m128i *) out, _mm_gf2p8mul_epi8(x, x));
        return out[15] != 5;
    }},
#endif
#if defined(__AMX_TILE__) && defined(__AMX_INT8__)
    // As in ggml: the main thread asks for the permission, and a worker needs it.
    {"amx", []() -> int {
#ifdef __linux__
        if (syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) != 0) return 2;
#endif
        int in_worker = 1;
        std::thread worker([&] { in_worker = multiply(); });
        worker.join();
        return in_worker || multiply();
    }},
#endif
    {nullptr, nullptr},
};

#endif
