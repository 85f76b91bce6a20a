// LANES float32 values in one variable, and exp and log that take float or such a vector.
// No include guard: included once per instruction set, inside that set's namespace.
typedef float vf __attribute__((vector_size(4 * LANES)));
typedef float vf_unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int vi __attribute__((vector_size(4 * LANES)));

template <class F> struct IntOf;
template <> struct IntOf<float> { using type = int; };
template <> struct IntOf<vf> { using type = vi; };
template <class F> using Int = typename IntOf<F>::type;

static inline vf load(const float* x) { return *reinterpret_cast<const vf_unaligned*>(x); }
static inline void store(float* x, vf v) { *reinterpret_cast<vf_unaligned*>(x) = v; }
static inline vf to_float(vi x) { return __builtin_convertvector(x, vf); }
static inline float to_float(int x) { return float(x); }

// A constant GCC must keep in a register: it turns max with a literal into compare and blend.
template <class F> static inline F opaque(F x) {
#if defined(__x86_64__)
  asm("" : "+x"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
}

// Returns b when either is NaN.
template <class F> static inline F max(F a, F b) { return a > b ? a : b; }

// x <= 88. Below -87.68 the result is 0 (so exp(-inf) = 0); NaN stays NaN.
template <class F> static inline F exp(F x) {
  x = max(opaque(F{} + kExpLow), x);
  F t = x * kLog2e + kShift, n = t - kShift;  // n = round(x / ln 2); t's low bits hold n + 127
  F r = x - n * kLn2Hi - n * kLn2Lo, r2 = r * r;
  F y = ((kE5 * r + kE4) * r2 + (kE3 * r + kE2)) * r2 + (kE1 * r + kE0);
  F scale = __builtin_bit_cast(F, __builtin_bit_cast(Int<F>, t) << 23);
  return (y * r2 + (r + 1.0f)) * scale;
}

// x positive and normal, inf or NaN. log(0) is -88.03, finite, so that 0 * log(0) = 0.
template <class F> static inline F log(F x) {
  Int<F> bits = __builtin_bit_cast(Int<F>, x), k = (bits - 0x3f3504f3) >> 23;
  F n = to_float(k);
  F f = __builtin_bit_cast(F, bits - (k << 23)) - 1.0f, f2 = f * f, f4 = f2 * f2;
  F high = kL8 * f4 + ((kL7 * f + kL6) * f2 + (kL5 * f + kL4));
  F y = high * f4 + ((kL3 * f + kL2) * f2 + (kL1 * f + kL0));
  y = y * (f * f2) + n * kLn2Lo - 0.5f * f2;
  return x < __builtin_inff() ? f + y + n * kLn2Hi : x;
}
