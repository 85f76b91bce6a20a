// What happens at one pixel: softmax, score, loss, gradient. Mirrors fastmt/reference.py.
//
// `floats` is one value for each pixel that is worked on at once (a vector on the CPU), `ints` its
// integer twin and mask; select, exp, log and the constants come from the including file. A `Column`
// is the C values of those pixels: column[c] is a reference to `floats`.

enum class Kind { max_prob, entropy, margin };
enum class Loss { mse, kl, soft_ce, ce, bce, js };

// 0 * log 0 = 0
inline floats times(floats probability, floats logarithm) {
  return select(probability == 0.0f, splat(0), probability * logarithm);
}

inline floats log_positive(floats x) { return log(select(x < TINY, splat(TINY), x)); }

// log(1.0f - p) for p in [0, 1/2], accurate also for small p
inline floats log_one_minus(floats p) {
  const floats u = 1.0f - p;
  return log(u) - ((u - 1.0f) + p) / u;
}

struct Peak {
  floats first, second;  // the two largest values
  ints label;            // where the first one stands; the first NaN where there is one
};

template <bool WITH_SECOND, bool WITH_LABEL, class Column>
inline Peak peak(Column x, int classes) {
  Peak top{x[0], splat(-INFINITY), isplat(0)};
  for (int c = 1; c < classes; ++c) {
    const floats value = x[c];
    if constexpr (WITH_LABEL) {
      const ints better = (value > top.first) | ((value != value) & (top.first == top.first));
      if constexpr (WITH_SECOND) {
        const floats loser = select(better, top.first, value);
        top.second = select(loser > top.second, loser, top.second);
      }
      top.first = select(better, value, top.first);
      top.label = iselect(better, isplat(c), top.label);
    } else {
      top.first = select(value > top.first, value, top.first);
    }
  }
  return top;
}

struct Teacher {
  floats score;
  floats inverse;  // q[c] = column[c] * inverse
  ints label;
};

template <Kind KIND>
inline floats clamp_score(floats score) {
  return KIND == Kind::entropy ? select(score < 0.0f, splat(0), score) : score;
}

// Replaces the logits y by exp((y - max) / T); score and label of q = softmax(y / T).
template <Kind KIND, class Column>
inline Teacher teacher_pixel(Column y, int classes, float inverse_temperature) {
  const Peak top = peak<KIND == Kind::margin, true>(y, classes);
  floats sum = splat(0), moment = splat(0);
  for (int c = 0; c < classes; ++c) {
    const floats x = (y[c] - top.first) * inverse_temperature;
    const floats e = exp(x);
    if constexpr (KIND == Kind::entropy) moment += e * select(x < LOG_TINY, splat(LOG_TINY), x);
    sum += e;
    y[c] = e;
  }
  Teacher teacher{splat(0), 1.0f / sum, top.label};
  if constexpr (KIND == Kind::max_prob) teacher.score = teacher.inverse;
  if constexpr (KIND == Kind::margin) {
    const floats runner_up = exp((top.second - top.first) * inverse_temperature);
    teacher.score = classes == 1 ? teacher.inverse : (1.0f - runner_up) * teacher.inverse;
  }
  if constexpr (KIND == Kind::entropy) {
    const floats entropy = log(sum) - moment * teacher.inverse;
    const floats score = 1.0f - entropy / logf(float(classes));
    teacher.score = classes == 1 ? teacher.inverse : clamp_score<KIND>(score);
  }
  return teacher;
}

// Adds share * softmax(y / T) of one member of an ensemble to q.
template <class Column>
inline void add_member(Column y, Column q, int classes, float inverse_temperature, float share) {
  const Teacher member = teacher_pixel<Kind::max_prob>(y, classes, inverse_temperature);
  for (int c = 0; c < classes; ++c) q[c] = q[c] + y[c] * member.inverse * share;
}

// Score and label of probabilities q that an ensemble has averaged.
template <Kind KIND, class Column>
inline Teacher ensemble_pixel(Column q, int classes) {
  const Peak top = peak<KIND == Kind::margin, true>(q, classes);
  Teacher teacher{top.first, splat(1), top.label};
  if (classes == 1) return teacher;
  if constexpr (KIND == Kind::margin) teacher.score = top.first - top.second;
  if constexpr (KIND == Kind::entropy) {
    floats entropy = splat(0);
    for (int c = 0; c < classes; ++c) entropy -= q[c] * log_positive(q[c]);
    teacher.score = clamp_score<KIND>(1.0f - entropy / logf(float(classes)));
  }
  return teacher;
}

template <class Column>
inline floats negative_entropy(Column y, floats inverse, int classes) {
  floats sum = splat(0);
  for (int c = 0; c < classes; ++c) sum += y[c] * inverse * log_positive(y[c] * inverse);
  return sum;
}

// sum (p - q)^2; its gradient 2 p ((p - q) - sum p (p - q))
template <class Column>
inline floats mse_pixel(Column z, Column y, floats inverse, floats coefficient, int classes) {
  const Peak top = peak<false, false>(z, classes);
  floats sum = splat(0);
  for (int c = 0; c < classes; ++c) {
    z[c] = exp(z[c] - top.first);
    sum += z[c];
  }
  const floats p_scale = 1.0f / sum;
  floats value = splat(0), mean = splat(0);
  for (int c = 0; c < classes; ++c) {
    const floats p = z[c] * p_scale, difference = p - y[c] * inverse;
    value += difference * difference;
    mean += p * difference;
    z[c] = p;
    y[c] = difference;
  }
  for (int c = 0; c < classes; ++c) z[c] = 2.0f * coefficient * z[c] * (y[c] - mean);
  return value;
}

// -sum q log p, plus sum q log q for "kl"; the gradient of both is p - q
template <Loss LOSS, class Column>
inline floats soft_ce_pixel(Column z, Column y, floats inverse, floats coefficient, int classes) {
  const Peak top = peak<false, false>(z, classes);
  floats sum = splat(0), expected = splat(0);
  for (int c = 0; c < classes; ++c) {
    const floats x = z[c] - top.first;
    expected += times(y[c] * inverse, x);
    z[c] = exp(x);
    sum += z[c];
  }
  const floats p_scale = 1.0f / sum;
  for (int c = 0; c < classes; ++c) z[c] = coefficient * (z[c] * p_scale - y[c] * inverse);
  const floats value = log(sum) - expected;
  return LOSS == Loss::kl ? value + negative_entropy(y, inverse, classes) : value;
}

// -log p[label]; its gradient p - onehot
template <class Column>
inline floats ce_pixel(Column z, ints label, floats coefficient, int classes) {
  const Peak top = peak<false, false>(z, classes);
  floats sum = splat(0), chosen = splat(0);
  for (int c = 0; c < classes; ++c) {
    const floats x = z[c] - top.first;
    chosen = select(label == c, x, chosen);
    z[c] = exp(x);
    sum += z[c];
  }
  const floats p_scale = coefficient / sum;
  for (int c = 0; c < classes; ++c) {
    const floats p = z[c] * p_scale;
    z[c] = select(label == c, p - coefficient, p);
  }
  return log(sum) - chosen;
}

// -sum w[c] t[c] log p[c] for the target t = (1 - smoothing) onehot + smoothing / C; mean_weight is
// that of w
template <class Column>
inline floats weighted_ce_pixel(Column z, ints label, const float* class_weight, float mean_weight,
                                float smoothing, floats coefficient, int classes) {
  const Peak top = peak<false, false>(z, classes);
  floats sum = splat(0), expected = splat(0), own = splat(class_weight ? 0.0f : 1.0f);
  for (int c = 0; c < classes; ++c) {
    const float w = class_weight ? class_weight[c] : 1.0f;
    const floats target = select(label == c, splat(w * (1 - smoothing)), splat(0)) +
                          w * smoothing / float(classes);
    const floats x = z[c] - top.first;
    expected += times(target, x);
    if (class_weight) own = select(label == c, splat(w), own);
    z[c] = exp(x);
    sum += z[c];
  }
  const floats mass = own * (1 - smoothing) + mean_weight * smoothing;
  const floats p_scale = mass / sum;
  for (int c = 0; c < classes; ++c) {
    const float w = class_weight ? class_weight[c] : 1.0f;
    const floats target = select(label == c, splat(w * (1 - smoothing)), splat(0)) +
                          w * smoothing / float(classes);
    z[c] = coefficient * (z[c] * p_scale - target);
  }
  return mass * log(sum) - expected;
}

// -sum q log p + (1-q) log(1-p). 1 - p of the largest class is the mass of the others, so these are
// kept relative to the second largest logit: u[c] = exp(z[c] - second).
template <class Column>
inline floats bce_pixel(Column z, Column y, floats inverse, floats coefficient, int classes) {
  if (classes == 1) {
    z[0] = splat(0);
    return splat(0);
  }
  const Peak top = peak<true, true>(z, classes);
  // An infinite logit makes everything NaN, as it does in softmax.
  const floats gap = top.second - top.first + (top.first - top.first);
  floats rest = splat(0), expected = splat(0), q_top = splat(0);
  for (int c = 0; c < classes; ++c) {
    const ints is_top = top.label == c;
    const floats q = y[c] * inverse;
    expected += times(q, z[c] - top.first);
    q_top = select(is_top, q, q_top);
    z[c] = select(is_top, splat(0), exp(z[c] - top.second));
    rest += z[c];
  }
  const floats sum = 1.0f + rest * exp(gap), log_sum = log(sum);
  const floats p_top = 1.0f / sum, p_scale = exp(gap) * p_top;
  floats value = log_sum - expected - times(1.0f - q_top, gap + log(rest) - log_sum);
  floats odds = splat(0);  // sum over the other classes of -q + (1-q) p / (1-p)
  for (int c = 0; c < classes; ++c) {
    const ints is_top = top.label == c;
    const floats p = z[c] * p_scale, q = y[c] * inverse;
    const floats a = select(is_top, splat(0), (1.0f - q) * p / (1.0f - p) - q);
    value -= select(is_top, splat(0), (1.0f - q) * log_one_minus(p));
    odds += a;
    y[c] = a;
  }
  const floats share = (1.0f - q_top) * p_top / rest;
  for (int c = 0; c < classes; ++c) {
    const floats p = z[c] * p_scale;
    const floats other = y[c] - p * odds + q_top * p - z[c] * share;
    z[c] = coefficient * select(top.label == c, p_top - q_top - p_top * odds, other);
  }
  return value;
}

// KL(p||m)/2 + KL(q||m)/2 with m = (p+q)/2; its gradient p (g - sum p g), g = log(p/m) / 2
template <class Column>
inline floats js_pixel(Column z, Column y, floats inverse, floats coefficient, int classes) {
  const Peak top = peak<false, false>(z, classes);
  floats sum = splat(0);
  for (int c = 0; c < classes; ++c) {
    z[c] = exp(z[c] - top.first);
    sum += z[c];
  }
  const floats p_scale = 1.0f / sum;
  floats value = splat(0), mean = splat(0);
  for (int c = 0; c < classes; ++c) {
    const floats p = z[c] * p_scale, q = y[c] * inverse, total = p + q;
    const floats twice = 2.0f / select(total < TINY, splat(TINY), total);
    const floats g = 0.5f * log_positive(p * twice);
    value += p * g + 0.5f * q * log_positive(q * twice);
    mean += p * g;
    z[c] = p;
    y[c] = g;
  }
  for (int c = 0; c < classes; ++c) z[c] = coefficient * z[c] * (y[c] - mean);
  return value;
}

// Loss of one pixel between softmax(z) and q = y * inverse; z becomes coefficient * gradient, and y
// is used up.
template <Loss LOSS, class Column>
inline floats consistency_pixel(Column z, Column y, const Teacher& teacher, floats coefficient,
                                int classes) {
  const floats inverse = teacher.inverse;
  if constexpr (LOSS == Loss::mse) return mse_pixel(z, y, inverse, coefficient, classes);
  if constexpr (LOSS == Loss::ce) return ce_pixel(z, teacher.label, coefficient, classes);
  if constexpr (LOSS == Loss::bce) return bce_pixel(z, y, inverse, coefficient, classes);
  if constexpr (LOSS == Loss::js) return js_pixel(z, y, inverse, coefficient, classes);
  if constexpr (LOSS == Loss::kl || LOSS == Loss::soft_ce)
    return soft_ce_pixel<LOSS>(z, y, inverse, coefficient, classes);
}
