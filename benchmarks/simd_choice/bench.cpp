// Checks every variant against a double scalar version, then times them interleaved.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "tile.h"

extern const Variant kClones[1], kLoops[3], kVector[3], kPair[3];
#ifdef WITH_HIGHWAY
extern const Variant kHighway[3];
#endif
#ifdef WITH_ATEN
extern const Variant kAten[1];
#endif

static bool runnable(const char* isa) {
  if (!strcmp(isa, "avx512")) return __builtin_cpu_supports("avx512vl");
  if (!strcmp(isa, "avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return true;
}

static double reference(const float* teacher, const float* student, int classes, int stride, int i,
                        double threshold, std::vector<double>& gradient, double& score) {
  auto softmax = [&](const float* x) {
    std::vector<double> p(classes);
    double top = -INFINITY, sum = 0;
    for (int c = 0; c < classes; ++c) top = std::max(top, double(x[c * stride + i]));
    for (int c = 0; c < classes; ++c) sum += p[c] = std::exp(x[c * stride + i] - top);
    for (double& v : p) v /= sum;
    return p;
  };
  auto q = softmax(teacher), p = softmax(student);
  double dot = 0, square = 0;
  score = 0;
  for (int c = 0; c < classes; ++c) {
    score = (std::isnan(q[c]) || q[c] > score) ? q[c] : score;
    dot += p[c] * (p[c] - q[c]);
    square += (p[c] - q[c]) * (p[c] - q[c]);
  }
  bool pass = score >= threshold;
  for (int c = 0; c < classes; ++c) gradient[c] = pass ? 2 * p[c] * (p[c] - q[c] - dot) : 0.0;
  return pass ? square : 0.0;
}

// The instruction set at which plain loops are this one's baseline.
static const char* baseline_isa(const char* isa) {
  if (!strcmp(isa, "ssse3")) return "sse2";
  if (!strcmp(isa, "dispatched") || !strcmp(isa, "-")) return "avx2";
  return isa;
}

static double quantile(std::vector<double> x, double q) {
  std::sort(x.begin(), x.end());
  return x[size_t(q * double(x.size() - 1))];
}

static void fill(std::vector<float>& x, unsigned seed, float spread) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0f, spread);
  for (float& v : x) v = normal(random);
}

static void check(const Variant& v, int classes, int stride) {
  std::vector<float> t(classes * stride), s(classes * stride);
  fill(t, 1, 4), fill(s, 2, 4);
  t[3] = 1e4f, s[4] = -INFINITY, t[5] = -INFINITY, t[6] = NAN, s[7] = 100.0f, s[stride + 8] = -1e4f;
  auto t2 = t, s2 = s;
  double loss = v.run(t2.data(), s2.data(), classes, stride, 0.7f), expected = 0, worst = 0;
  std::vector<double> gradient(classes);
  bool near = false;
  for (int i = 0; i < kPixels; ++i) {
    double score;
    expected += reference(t.data(), s.data(), classes, stride, i, 0.7f, gradient, score);
    if (std::abs(score - 0.7f) < 1e-6) { near = true; continue; }
    for (int c = 0; c < classes; ++c)
      worst = std::max(worst, std::abs(gradient[c] - s2[c * stride + i]));
  }
  // a NaN student under a confident teacher must come through
  s[0] = NAN, t[0] = 50.0f;
  t2 = t, s2 = s;
  double poisoned = v.run(t2.data(), s2.data(), classes, stride, 0.7f);
  bool ok = worst < 1e-6 && (near || std::abs(loss - expected) < 1e-5 * expected) &&
            std::isnan(poisoned) && std::isnan(s2[0]);
  if (!ok) {
    fprintf(stderr, "%s %s C=%d: gradient error %g, loss %g, expected %g, poisoned %g\n", v.name,
            v.isa, classes, worst, loss, expected, poisoned);
    exit(1);
  }
}

int main(int argc, char** argv) {
  int rounds = argc > 1 ? atoi(argv[1]) : 200;
  std::vector<Variant> all;
  auto add = [&](const Variant* v, int n) {
    for (int k = 0; k < n; ++k)
      if (runnable(v[k].isa)) all.push_back(v[k]);
  };
  add(kClones, 1), add(kLoops, 3), add(kVector, 3), add(kPair, 3);
#ifdef WITH_HIGHWAY
  add(kHighway, 3);
#endif
#ifdef WITH_ATEN
  add(kAten, 1);
#endif
  [[maybe_unused]] volatile double sink = 0;
  for (int classes : {2, 19, 150})
    for (int stride : {kPixels, kPixels + 16}) {
      size_t n = size_t(classes) * stride;
      std::vector<float> t(n), s(n);
      fill(t, 1, 4), fill(s, 2, 4);
      float* buffer = static_cast<float*>(aligned_alloc(64, 2 * n * 4));
      std::vector<std::vector<double>> times(all.size() + 1);
      int inner = std::max(4, 4000 / classes / 8);
      for (const Variant& v : all) check(v, classes, stride);
      for (int round = 0; round < rounds; ++round)
        for (size_t k = 0; k <= all.size(); ++k) {
          auto start = std::chrono::steady_clock::now();
          for (int r = 0; r < inner; ++r) {
            memcpy(buffer, t.data(), n * 4), memcpy(buffer + n, s.data(), n * 4);
            asm volatile("" ::"r"(buffer) : "memory");
            if (k < all.size()) sink = all[k].run(buffer, buffer + n, classes, stride, 0.7f);
          }
          std::chrono::duration<double, std::nano> took = std::chrono::steady_clock::now() - start;
          times[k].push_back(took.count() / inner / kPixels);
        }
      for (size_t k = 0; k <= all.size(); ++k) {
        size_t base = 0;
        const char* isa = k < all.size() ? all[k].isa : "-";
        for (size_t j = 0; j < all.size(); ++j)
          if (!strcmp(all[j].name, "loops_pragma") && !strcmp(all[j].isa, baseline_isa(isa)))
            base = j;
        std::vector<double> ratio(rounds);
        for (int r = 0; r < rounds; ++r) ratio[r] = times[k][r] / times[base][r];
        printf("%s %s %d %d %.4f %.4f %.4f\n", k < all.size() ? all[k].name : "refill", isa, classes,
               stride, quantile(times[k], 0.5), quantile(times[k], 0.1), quantile(ratio, 0.5));
      }
      free(buffer);
    }
}
