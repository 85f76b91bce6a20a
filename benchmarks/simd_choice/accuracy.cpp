// Largest error in ulp of exp over [-87.33, 0] and log over [1, 2^31), every float in range.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "tile.h"

extern const Elementwise kExp[3], kLog[3];

static float from_bits(unsigned b) {
  float x;
  memcpy(&x, &b, 4);
  return x;
}

static double ulps(float got, double exact) {
  int e;
  frexp(float(exact), &e);
  return std::abs(got - exact) / std::ldexp(1.0, e - 24);
}

static void worst(const char* name, const char* isa, Elementwise f, double (*exact)(double),
                  unsigned first, unsigned last, unsigned step) {
  float x[256], y[256], s[256];
  double vector = 0, scalar = 0;
  for (unsigned b = first; b < last; b += 256 * step) {
    for (unsigned i = 0; i < 256; ++i) x[i] = from_bits(b + i * step < last ? b + i * step : last);
    f(x, y, s, 256);
    for (int i = 0; i < 256; ++i) {
      double e = exact(x[i]);
      vector = std::fmax(vector, ulps(y[i], e)), scalar = std::fmax(scalar, ulps(s[i], e));
    }
  }
  printf("%s %s %.3f %.3f\n", name, isa, vector, scalar);
}

int main(int argc, char** argv) {
  unsigned step = argc > 1 ? atoi(argv[1]) : 1;
  const char* isa[] = {"sse2", "avx2", "avx512"};
  int levels = __builtin_cpu_supports("avx512vl") ? 3 : __builtin_cpu_supports("avx2") ? 2 : 1;
  for (int k = 0; k < levels; ++k) {
    worst("exp", isa[k], kExp[k], std::exp, 0x80000000u, 0xc2aea8f6u, step);
    worst("log", isa[k], kLog[k], std::log, 0x3f800001u, 0x4f000000u, step);
    worst("log_below_1", isa[k], kLog[k], std::log, 0x00800000u, 0x3f7fffffu, step);
    float x[16] = {-INFINITY, NAN, -88.5f, -1e30f, 0.0f,
                   from_bits(0x7fc12345u), from_bits(0xffc12345u)};
    float y[16], s[16], ly[16], ls[16];
    float lx[16] = {INFINITY, NAN, 1.0f, from_bits(0x7fc12345u), 0.0f};
    kExp[k](x, y, s, 16), kLog[k](lx, ly, ls, 16);
    for (const float* e : {y, s})
      if (e[0] != 0 || !std::isnan(e[1]) || e[2] != 0 || e[3] != 0 || e[4] != 1 ||
          !std::isnan(e[5]) || !std::isnan(e[6]))
        return fprintf(stderr, "exp: special values wrong (%s)\n", isa[k]), 1;
    for (const float* l : {ly, ls})
      if (l[0] != INFINITY || !std::isnan(l[1]) || l[2] != 0 || !std::isnan(l[3]) || 0 * l[4] != 0)
        return fprintf(stderr, "log: special values wrong (%s)\n", isa[k]), 1;
  }
}
