// The tile every variant works on, and the constants of its exp.
#pragma once

constexpr int kPixels = 128;

// teacher, student: [classes][stride] float32 logits, the first kPixels columns used. Both are
// overwritten; student ends as the gradient. Returns the loss summed over the tile.
using TileKernel = double (*)(float* teacher, float* student, int classes, int stride,
                              float threshold);

struct Variant {
  const char* name;
  const char* isa;
  TileKernel run;
};

// y[i] = f(x[i]) by vectors, scalar[i] = f(x[i]) one at a time; n a multiple of 16.
using Elementwise = void (*)(const float* x, float* y, float* scalar, int n);

// exp(x) = 2^n exp(r), n = round(x / ln 2). kShift leaves n + 127 in the low bits of the sum.
constexpr float kShift = 12582912.0f + 127.0f, kLog2e = 1.44269504088896341f;
constexpr float kLn2Hi = 0.693359375f, kLn2Lo = -2.12194440e-4f, kExpLow = -88.0f;
constexpr float kE0 = 5.0000001201e-1f, kE1 = 1.6666665459e-1f, kE2 = 4.1665795894e-2f,
                kE3 = 8.3334519073e-3f, kE4 = 1.3981999507e-3f, kE5 = 1.9875691500e-4f;

// log(1 + f) = f - f^2/2 + f^3 P(f), sqrt(1/2) <= 1 + f < sqrt(2).
constexpr float kL0 = 3.3333331174e-1f, kL1 = -2.4999993993e-1f, kL2 = 2.0000714765e-1f,
                kL3 = -1.6668057665e-1f, kL4 = 1.4249322787e-1f, kL5 = -1.2420140846e-1f,
                kL6 = 1.1676998740e-1f, kL7 = -1.1514610310e-1f, kL8 = 7.0376836292e-2f;
