// What happens at one pixel: softmax, score, loss, gradient. Mirrors fastmt/reference.py.
//
// `floats` is one value for each pixel that is worked on at once (a vector on the CPU), `ints` its
// integer twin and mask; select, max, exp, log, quotient (a / b, exactly 1 where they are equal),
// inverse_of (1 / a of a sum of exponentials) and the constants come from the including file. A
// `Column` is the C values of those pixels: column[c] is a reference to `floats`. A `Gradient` takes
// what is assigned to gradient[c], floats or a `Product`, once for each c, and may be the column of
// the logits itself. `Powers` are exponentials exp(z[c] - shift), for a shift that no class's logit
// lies above or far below: each is read once, in order, and stands in a column afterwards.

enum class Kind { max_prob, entropy, margin };
enum class Loss { mse, kl, soft_ce, ce, bce, js };

// 0 * log 0 = 0
FASTMT_INLINE floats times(floats probability, floats logarithm) {
  return select(probability == 0.0f, splat(0), probability * logarithm);
}

FASTMT_INLINE floats log_positive(floats x) { return log(select(x < TINY, splat(TINY), x)); }

// log(1.0f - p) for p in [0, 1/2], accurate also for small p
FASTMT_INLINE floats log_one_minus(floats p) {
  const floats u = 1.0f - p;
  return log(u) - ((u - 1.0f) + p) / u;
}

struct Peak {
  floats first, second;  // the two largest values
  ints label;            // where the first one stands
};

template <bool WITH_SECOND, bool WITH_LABEL, class Column>
FASTMT_INLINE Peak peak(Column x, int classes) {
  Peak top{x[0], splat(-INFINITY), isplat(0)};
  FASTMT_UNROLL
  for (int c = 1; c < classes; ++c) {
    const floats value = x[c];
    if constexpr (WITH_LABEL) top.label = iselect(value > top.first, isplat(c), top.label);
    if constexpr (WITH_SECOND) top.second = max(min(value, top.first), top.second);
    top.first = max(value, top.first);
  }
  return top;
}

// Where the sum of the exponentials is NaN every probability is, and the first of them counts as the
// largest.
FASTMT_INLINE ints label_of(const Peak& top, floats sum) {
  return iselect(sum == sum, top.label, isplat(0));
}

struct Teacher {
  floats score;
  floats inverse;  // q[c] = column[c] * inverse
  ints label;
};

template <Kind KIND>
FASTMT_INLINE floats clamp_score(floats score) {
  return KIND == Kind::entropy ? select(score < 0.0f, splat(0), score) : score;
}

// Replaces the logits y by exp((y - max) / T); score of q = softmax(y / T), and its label if asked.
template <Kind KIND, bool WITH_LABEL = true, class Column>
FASTMT_INLINE Teacher teacher_pixel(Column y, int classes, float inverse_temperature) {
  constexpr bool with_second = KIND == Kind::margin;
  const Peak top = peak<with_second, WITH_LABEL>(y, classes);
  floats sum = splat(0), moment = splat(0);
  FASTMT_UNROLL
  for (int c = 0; c < classes; ++c) {
    const floats x = (y[c] - top.first) * inverse_temperature;
    const floats e = exp(x);
    if constexpr (KIND == Kind::entropy) moment += e * select(x < LOG_TINY, splat(LOG_TINY), x);
    sum += e;
    y[c] = e;
  }
  Teacher teacher{splat(0), inverse_of(sum), label_of(top, sum)};
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

// The same from the exponentials of y / T; "entropy" needs the logits.
template <Kind KIND, bool WITH_LABEL, class Powers>
FASTMT_INLINE Teacher teacher_of_powers(Powers y, int classes) {
  static_assert(KIND != Kind::entropy);
  Peak top{splat(0), splat(0), isplat(0)};
  floats sum = splat(0);
  FASTMT_UNROLL
  for (int c = 0; c < classes; ++c) {
    const floats e = y[c];
    sum += e;
    if constexpr (WITH_LABEL) top.label = iselect(e > top.first, isplat(c), top.label);
    if constexpr (KIND == Kind::margin) top.second = max(min(e, top.first), top.second);
    top.first = max(e, top.first);
  }
  const bool is_margin = KIND == Kind::margin && classes > 1;
  // Divided, so that a certain teacher scores exactly 1.
  return {quotient(is_margin ? top.first - top.second : top.first, sum), inverse_of(sum),
          label_of(top, sum)};
}

// Adds softmax(y / T) of one member of an ensemble to q.
template <class Column>
FASTMT_INLINE void add_member(Column y, Column q, int classes, float inverse_temperature) {
  const Teacher member = teacher_pixel<Kind::max_prob, false>(y, classes, inverse_temperature);
  FASTMT_UNROLL
  for (int c = 0; c < classes; ++c) q[c] = q[c] + y[c] * member.inverse;
}

// Score and label of probabilities that the members of an ensemble have summed up in q.
template <Kind KIND, class Column>
FASTMT_INLINE Teacher ensemble_pixel(Column q, int classes, int members) {
  const Peak top = peak<KIND == Kind::margin, true>(q, classes);
  const float count = float(members), inverse = 1.0f / count;
  floats sum = splat(0);
  FASTMT_UNROLL
  for (int c = 0; c < classes; ++c) sum += q[c];
  Teacher teacher{quotient(top.first, splat(count)), splat(inverse), label_of(top, sum)};
  if (classes == 1) return teacher;
  if constexpr (KIND == Kind::margin) teacher.score = quotient(top.first - top.second, splat(count));
  if constexpr (KIND == Kind::entropy) {
    floats entropy = splat(0);
    FASTMT_UNROLL
    for (int c = 0; c < classes; ++c) entropy -= q[c] * inverse * log_positive(q[c] * inverse);
    teacher.score = clamp_score<KIND>(1.0f - entropy / logf(float(classes)));
  }
  return teacher;
}

template <class Column>
FASTMT_INLINE floats negative_entropy(Column y, floats inverse, int classes) {
  floats sum = splat(0);
  FASTMT_UNROLL
  for (int c = 0; c < classes; ++c) sum += y[c] * inverse * log_positive(y[c] * inverse);
  return sum;
}

// p[c] = column[c] / sum; `chosen` is the logarithm of the label's exponential, where it is asked for.
struct Student {
  floats sum, chosen;
};

// Replaces the logits z by exp(z - max).
template <bool WITH_LABEL, class Column>
FASTMT_INLINE Student student_pixel(Column z, ints label, int classes) {
  const Peak top = peak<false, false>(z, classes);
  Student student{splat(0), splat(0)};
  FASTMT_UNROLL
  for (int c = 0; c < classes; ++c) {
    const floats x = z[c] - top.first, e = exp(x);
    if constexpr (WITH_LABEL) student.chosen = select(label == c, x, student.chosen);
    student.sum += e;
    z[c] = e;
  }
  return student;
}

// The same from the exponentials.
template <bool WITH_LABEL, class Powers>
FASTMT_INLINE Student student_of_powers(Powers z, ints label, int classes) {
  Student student{splat(0), splat(1)};
  FASTMT_UNROLL
  for (int c = 0; c < classes; ++c) {
    const floats e = z[c];
    if constexpr (WITH_LABEL) student.chosen = select(label == c, e, student.chosen);
    student.sum += e;
  }
  if constexpr (WITH_LABEL) student.chosen = log(student.chosen);
  return student;
}

// A gradient as the pixel's factor times a value of the class: what is stored with further factors of
// the pixel takes one multiplication less.
struct Product {
  floats factor, value;
  FASTMT_INLINE operator floats() const { return factor * value; }
};

// sum (p - q)^2; its gradient 2 p ((p - q) - sum p (p - q)). Keeps both columns of exponentials.
template <class Column, class Gradient>
FASTMT_INLINE floats mse_pixel(Column z, Column y, const Student& student, floats inverse,
                        floats coefficient, Gradient gradient, int classes) {
  floats p_scale = inverse_of(student.sum);
  floats value = splat(0), mean = splat(0);
  FASTMT_UNROLL
  for (int c = 0; c < classes; ++c) {
    const floats p = z[c] * p_scale, difference = p - y[c] * inverse;
    value += difference * difference;
    mean += p * difference;
  }
  const floats factor = 2.0f * coefficient * p_scale;
  p_scale = again(p_scale), inverse = again(inverse);
  FASTMT_UNROLL
  for (int c = 0; c < classes; ++c) {
    const floats e = z[c];
    gradient[c] = Product{factor, e * ((e * p_scale - mean) - y[c] * inverse)};
  }
  return value;
}

// -sum q log p, plus sum q log q for "kl"; the gradient of both is p - q
template <Loss LOSS, class Column, class Gradient>
FASTMT_INLINE floats soft_ce_pixel(Column z, Column y, floats inverse, floats coefficient,
                            Gradient gradient, int classes) {
  const Peak top = peak<false, false>(z, classes);
  floats sum = splat(0), expected = splat(0);
  FASTMT_UNROLL
  for (int c = 0; c < classes; ++c) {
    const floats x = z[c] - top.first;
    expected += times(y[c] * inverse, x);
    z[c] = exp(x);
    sum += z[c];
  }
  const floats p_scale = inverse_of(sum);
  FASTMT_UNROLL
  for (int c = 0; c < classes; ++c)
    gradient[c] = coefficient * (z[c] * p_scale - y[c] * inverse);
  const floats value = log(sum) - expected;
  return LOSS == Loss::kl ? value + negative_entropy(y, inverse, classes) : value;
}

// -log p[label]; its gradient p - onehot. Keeps the column of exponentials.
template <class Column, class Gradient>
FASTMT_INLINE floats ce_pixel(Column z, const Student& student, ints label, floats coefficient,
                       Gradient gradient, int classes) {
  const floats p_scale = coefficient * inverse_of(student.sum);
  FASTMT_UNROLL
  for (int c = 0; c < classes; ++c) {
    const floats p = z[c] * p_scale;
    gradient[c] = select(label == c, p - coefficient, p);
  }
  return log(student.sum) - student.chosen;
}

// The part of a class's weight that smoothing spreads: none by a smoothing of 0, also of the infinite
// weight 1 / 0 of a class without labels.
FASTMT_INLINE float spread(float weight, float smoothing) {
  return smoothing == 0 ? 0.0f : weight * smoothing;
}

// -sum w[c] t[c] log p[c] for the target t = (1 - smoothing) onehot + smoothing / C; mean_weight is
// that of w
template <class Column, class Gradient>
FASTMT_INLINE floats weighted_ce_pixel(Column z, ints label, const float* class_weight, float mean_weight,
                                float smoothing, floats coefficient, Gradient gradient,
                                int classes) {
  const Peak top = peak<false, false>(z, classes);
  floats sum = splat(0), expected = splat(0), own = splat(class_weight ? 0.0f : 1.0f);
  FASTMT_UNROLL
  for (int c = 0; c < classes; ++c) {
    const float w = class_weight ? class_weight[c] : 1.0f;
    const floats target = select(label == c, splat(w * (1 - smoothing)), splat(0)) +
                          spread(w, smoothing) / float(classes);
    const floats x = z[c] - top.first;
    expected += times(target, x);
    if (class_weight) own = select(label == c, splat(w), own);
    z[c] = exp(x);
    sum += z[c];
  }
  const floats mass = own * (1 - smoothing) + spread(mean_weight, smoothing);
  const floats p_scale = mass / sum;
  FASTMT_UNROLL
  for (int c = 0; c < classes; ++c) {
    const float w = class_weight ? class_weight[c] : 1.0f;
    const floats target = select(label == c, splat(w * (1 - smoothing)), splat(0)) +
                          spread(w, smoothing) / float(classes);
    gradient[c] = coefficient * (z[c] * p_scale - target);
  }
  return mass * log(sum) - expected;
}

// -sum q log p + (1-q) log(1-p). 1 - p of the largest class is the mass of the others, so these are
// kept relative to the second largest logit: u[c] = exp(z[c] - second).
template <class Column, class Gradient>
FASTMT_INLINE floats bce_pixel(Column z, Column y, floats inverse, floats coefficient, Gradient gradient,
                        int classes) {
  if (classes == 1) {
    const floats nothing = (z[0] - z[0]) + (y[0] - y[0]);  // 0, or NaN as a softmax would be
    gradient[0] = coefficient * nothing;
    return nothing;
  }
  const Peak top = peak<true, true>(z, classes);
  // Where all others are -inf nothing is left to be kept relative to.
  const floats second = select(top.second == -INFINITY, top.first, top.second);
  // An infinite logit makes everything NaN, as it does in softmax; so does a NaN, which would be lost
  // as the largest.
  floats gap = second - top.first + (top.first - top.first);
  FASTMT_UNROLL
  for (int c = 0; c < classes; ++c) gap = select(z[c] == z[c], gap, z[c]);
  floats rest = splat(0), expected = splat(0), q_top = splat(0);
  FASTMT_UNROLL
  for (int c = 0; c < classes; ++c) {
    const ints is_top = top.label == c;
    const floats q = y[c] * inverse;
    expected += times(q, z[c] - top.first);
    q_top = select(is_top, q, q_top);
    z[c] = select(is_top, splat(0), exp(z[c] - second));
    rest += z[c];
  }
  const floats sum = 1.0f + rest * exp(gap), log_sum = log(sum);
  const floats p_top = 1.0f / sum, p_scale = exp(gap) * p_top;
  floats value = log_sum - expected - times(1.0f - q_top, gap + log(rest) - log_sum);
  floats odds = splat(0);  // sum over the other classes of -q + (1-q) p / (1-p)
  FASTMT_UNROLL
  for (int c = 0; c < classes; ++c) {
    const ints is_top = top.label == c;
    const floats p = z[c] * p_scale, q = y[c] * inverse;
    const floats a = select(is_top, splat(0), (1.0f - q) * p / (1.0f - p) - q);
    value -= select(is_top, splat(0), (1.0f - q) * log_one_minus(p));
    odds += a;
    y[c] = a;
  }
  // Where nothing is left the others lose alike, as logits that fall together do.
  const ints alone = rest == 0.0f;
  const floats lost = (1.0f - q_top) * p_top;
  const floats share = select(alone, splat(0), lost / rest);
  const floats even = select(alone, lost / float(classes - 1), splat(0));
  FASTMT_UNROLL
  for (int c = 0; c < classes; ++c) {
    const floats p = z[c] * p_scale;
    const floats other = y[c] - p * odds + q_top * p - (z[c] * share + even);
    gradient[c] = coefficient * select(top.label == c, p_top - q_top - p_top * odds, other);
  }
  return value;
}

// KL(p||m)/2 + KL(q||m)/2 with m = (p+q)/2; its gradient p (g - sum p g), g = log(p/m) / 2
template <class Column, class Gradient>
FASTMT_INLINE floats js_pixel(Column z, Column y, floats inverse, floats coefficient, Gradient gradient,
                       int classes) {
  const Student student = student_pixel<false>(z, isplat(0), classes);
  const floats p_scale = inverse_of(student.sum);
  floats value = splat(0), mean = splat(0);
  FASTMT_UNROLL
  for (int c = 0; c < classes; ++c) {
    const floats p = z[c] * p_scale, q = y[c] * inverse, total = p + q;
    const floats twice = 2.0f / select(total < TINY, splat(TINY), total);
    const floats g = 0.5f * log_positive(p * twice);
    value += p * g + 0.5f * q * log_positive(q * twice);
    mean += p * g;
    z[c] = p;
    y[c] = g;
  }
  FASTMT_UNROLL
  for (int c = 0; c < classes; ++c) gradient[c] = coefficient * z[c] * (y[c] - mean);
  return value;
}

// Loss of one pixel between p = z / student.sum and q = y * teacher.inverse, for the losses that need
// no logits; both columns are kept.
template <Loss LOSS, class Column, class Gradient>
FASTMT_INLINE floats loss_of_powers(Column z, Column y, const Student& student, const Teacher& teacher,
                             floats coefficient, Gradient gradient, int classes) {
  if constexpr (LOSS == Loss::mse)
    return mse_pixel(z, y, student, teacher.inverse, coefficient, gradient, classes);
  else
    return ce_pixel(z, student, teacher.label, coefficient, gradient, classes);
}

// Loss of one pixel between softmax(z) and q = y * teacher.inverse; both columns may be used up.
template <Loss LOSS, class Column, class Gradient>
FASTMT_INLINE floats consistency_pixel(Column z, Column y, const Teacher& teacher, floats coefficient,
                                Gradient gradient, int classes) {
  const floats inverse = teacher.inverse;
  if constexpr (LOSS == Loss::mse || LOSS == Loss::ce) {
    const Student student = student_pixel<LOSS == Loss::ce>(z, teacher.label, classes);
    return loss_of_powers<LOSS>(z, y, student, teacher, coefficient, gradient, classes);
  }
  if constexpr (LOSS == Loss::bce)
    return bce_pixel(z, y, inverse, coefficient, gradient, classes);
  if constexpr (LOSS == Loss::js) return js_pixel(z, y, inverse, coefficient, gradient, classes);
  if constexpr (LOSS == Loss::kl || LOSS == Loss::soft_ce)
    return soft_ce_pixel<LOSS>(z, y, inverse, coefficient, gradient, classes);
}
