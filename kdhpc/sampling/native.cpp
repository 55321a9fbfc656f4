// The operations that are slow between the matrix products of a decoding step on CPUs, for float32
// and bfloat16: norms, rotary positions with attention over the cache, activations, and the draw.
// It also has the one product that torch does not offer on CPUs, bfloat16 with float32 results,
// which it computes with oneDNN's kernel. `make native` builds it; kdhpc/sampling/native.py calls
// it.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

namespace {

using at::BFloat16;
using at::Tensor;
constexpr int64_t WIDTH = 16;   // numbers in a vector
constexpr int64_t BLOCK = 256;  // vocabulary entries summed together, as in kdhpc.sampling.draws
constexpr int64_t HEAD_COLUMNS = 64;  // vocabulary entries in a block of the packed head
#ifdef __AVX512F__
constexpr int TOGETHER = 4;  // vectors that attention sums at once: 16 with 4 queries, of 32 registers
#else
constexpr int TOGETHER = 1;  // a vector takes two or four registers, of 16
#endif
typedef float Vec __attribute__((vector_size(WIDTH * 4)));
typedef int32_t Ints __attribute__((vector_size(WIDTH * 4)));
typedef uint16_t Halves __attribute__((vector_size(WIDTH * 2)));

inline Vec load(const float* from) {
    Vec v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

inline Vec load(const BFloat16* from) {
    Halves h;
    std::memcpy(&h, from, sizeof h);
    return (Vec)(__builtin_convertvector(h, Ints) << 16);
}

inline void store(float* to, Vec v) { std::memcpy(to, &v, sizeof v); }

inline void store(BFloat16* to, Vec v) {  // rounds to nearest, ties to even
    const Ints bits = (Ints)v, even = (bits >> 16) & 1;
    const Halves h = __builtin_convertvector((bits + 0x7FFF + even) >> 16, Halves);
    std::memcpy(to, &h, sizeof h);
}

template <typename T>
inline Vec rounded(Vec v) {
    T kept[WIDTH];
    store(kept, v);
    return load(kept);
}

inline float sum(Vec v) {
    float total = 0;
    for (int64_t i = 0; i < WIDTH; i++) total += v[i];
    return total;
}

inline float largest(Vec v) {
    float most = v[0];
    for (int64_t i = 1; i < WIDTH; i++) most = v[i] > most ? v[i] : most;
    return most;
}

// Computes e^x with a relative error of 2e-7; the result is 0 below -87 and e^88 above 88.
// Method: x = n log 2 + r, and a polynomial in r (Cephes' expf).
inline Vec exponential(Vec x) {
    const Vec zero = {}, one = zero + 1.0f, least = zero - 87.0f, most = zero + 88.0f;
    const auto gone = x < least;
    x = gone ? least : x;
    x = x > most ? most : x;
    const Vec shift = zero + 12582912.0f;  // 1.5 x 2^23: adding it rounds to an integer
    const Vec n = (x * 1.44269504088896341f + shift) - shift;
    const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Vec p = zero + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + one;
    const Ints power = (__builtin_convertvector(n, Ints) + 127) << 23;
    const Vec result = p * (Vec)power;
    return gone ? zero : result;
}

template <typename T>
const T* in(const Tensor& x) {
    TORCH_CHECK(x.is_contiguous(), "expected a contiguous tensor");
    return x.const_data_ptr<T>();
}

template <typename F>
void each_row(int64_t rows, const F& work) {
    at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++) work(row);
    });
}

#define FOR_DTYPE(tensor, ...)                                             \
    if ((tensor).scalar_type() == at::kBFloat16) {                         \
        using T = BFloat16;                                                \
        __VA_ARGS__                                                        \
    } else {                                                               \
        TORCH_CHECK((tensor).scalar_type() == at::kFloat, "wrong dtype"); \
        using T = float;                                                   \
        __VA_ARGS__                                                        \
    }

// A root-mean-square norm of rows, or none. The mean of squares is float32. Numbers are rounded
// before they are multiplied by weights of their own dtype, and after it by float32 weights.
template <typename T>
struct Norm {
    const T* own = nullptr;
    const float* wide = nullptr;
    float eps;

    Norm(const std::optional<Tensor>& weight, double eps) : eps((float)eps) {
        if (!weight) return;
        if (weight->scalar_type() == c10::CppTypeToScalarType<T>::value)
            own = in<T>(*weight);
        else
            wide = in<float>(*weight);
    }
    bool exists() const { return own || wide; }
    float scale(Vec squares, int64_t size) const {
        return 1.0f / std::sqrt(sum(squares) / size + eps);
    }
    float scale_of(const T* row, int64_t size) const {
        Vec squares = {};
        for (int64_t i = 0; i < size; i += WIDTH) squares += load(row + i) * load(row + i);
        return scale(squares, size);
    }
    Vec apply(Vec v, float scale, int64_t i) const {
        return wide ? rounded<T>(v * scale * load(wide + i)) : rounded<T>(v * scale) * load(own + i);
    }
};

// Adds `delta` [B, H], if it is given, to `x` [B, H] in place, and returns the norm of the sum.
// `delta_weight` [H] is that of a norm of `delta`, `weight` [H] that of the result; a norm without
// weights changes nothing.
Tensor add_norm(Tensor& x, const std::optional<Tensor>& delta,
                const std::optional<Tensor>& delta_weight, const std::optional<Tensor>& weight,
                double eps) {
    const int64_t size = x.size(1);
    Tensor out = at::empty_like(x);
    FOR_DTYPE(x, {
        T* xs = x.mutable_data_ptr<T>();
        T* outs = out.mutable_data_ptr<T>();
        const T* deltas = delta ? in<T>(*delta) : nullptr;
        const Norm<T> of_delta(delta_weight, eps);
        const Norm<T> norm(weight, eps);
        each_row(x.size(0), [&](int64_t row) {
            T* at = xs + row * size;
            const T* add = deltas ? deltas + row * size : nullptr;
            const float add_scale = add && of_delta.exists() ? of_delta.scale_of(add, size) : 0;
            Vec squares = {};
            for (int64_t i = 0; i < size; i += WIDTH) {
                Vec v = load(at + i);
                if (add) {
                    const Vec more = load(add + i);
                    v += of_delta.exists() ? rounded<T>(of_delta.apply(more, add_scale, i)) : more;
                    store(at + i, v);
                    v = load(at + i);
                }
                squares += v * v;
            }
            const float scale = norm.scale(squares, size);
            for (int64_t i = 0; i < size; i += WIDTH) {
                const Vec v = load(at + i);
                store(outs + row * size + i, norm.exists() ? norm.apply(v, scale, i) : v);
            }
        });
    })
    return out;
}

// Normalises the queries and keys of `qkv` [B, (heads + 2 kv_heads) D] in place, each head by
// itself or all queries and all keys together. `weight` is [heads + kv_heads, D].
void norm_queries_and_keys(Tensor& qkv, const Tensor& weight, int64_t heads, bool together,
                           double eps) {
    const int64_t count = weight.size(0), size = weight.size(1), stride = qkv.size(1);
    FOR_DTYPE(qkv, {
        T* rows = qkv.mutable_data_ptr<T>();
        const Norm<T> norm(weight, eps);
        each_row(qkv.size(0), [&](int64_t row) {
            for (int64_t head = 0, step = 1; head < count; head += step) {
                if (together) step = head < heads ? heads : count - heads;
                const int64_t first = head * size;
                T* at = rows + row * stride + first;
                const float scale = norm.scale_of(at, step * size);
                for (int64_t i = 0; i < step * size; i += WIDTH)
                    store(at + i, norm.apply(load(at + i), scale, first + i));
            }
        });
    })
}

// Returns act(gate) * up [B, F] for `gate_up` [B, 2 F], whose rows are gate, then up. The activation
// is SiLU, or GELU by its approximation with tanh. Both are gate times a logistic function.
Tensor activate(const Tensor& gate_up, bool gelu) {
    const int64_t size = gate_up.size(1) / 2;
    Tensor out = at::empty({gate_up.size(0), size}, gate_up.options());
    FOR_DTYPE(gate_up, {
        const T* from = in<T>(gate_up);
        T* outs = out.mutable_data_ptr<T>();
        each_row(gate_up.size(0), [&](int64_t row) {
            const T* gate = from + row * 2 * size;
            for (int64_t i = 0; i < size; i += WIDTH) {
                const Vec g = load(gate + i);
                const Vec at = gelu ? (g + g * g * g * 0.044715f) * 1.5957691216f : g;
                const Vec active = rounded<T>(g / (exponential(-at) + 1.0f));
                store(outs + row * size + i, active * load(gate + size + i));
            }
        });
    })
    return out;
}

// Computes tanh x, with a Pade approximant where the exponential function would lose digits.
inline Vec tanh(Vec x) {
    const Vec one = (Vec){} + 1.0f, s = x * x;
    const Vec near = x * (((s + 378.0f) * s + 17325.0f) * s + 135135.0f) /
                     (((s * 28.0f + 3150.0f) * s + 62370.0f) * s + 135135.0f);
    const Vec far = one - 2.0f / (exponential(x * 2.0f) + 1.0f);
    return s < one ? near : far;
}

// Sums VECTORS vectors of each of GROUPS products: of the numbers `weights` [GROUPS, weights_stride],
// `count` of each group, with the rows of `matrix` [count, stride]. A sum goes from row to row, however
// many vectors there are; several at a time hide its latency. The rows of the matrix that is `ahead`
// numbers further are fetched meanwhile, as it is multiplied next.
template <int GROUPS, int VECTORS, typename T>
inline void multiply(const float* weights, int64_t weights_stride, const T* matrix, int64_t stride,
                     int64_t count, int64_t ahead, Vec (&sums)[GROUPS][VECTORS]) {
    constexpr int64_t line = 64 / sizeof(T);  // numbers in a line of the cache
    for (int64_t i = 0; i < count; i++, matrix += stride) {
        Vec row[VECTORS];
        for (int v = 0; v < VECTORS; v++) row[v] = load(matrix + v * WIDTH);
        for (int64_t n = 0; n < VECTORS * WIDTH; n += line)
            __builtin_prefetch(matrix + ahead + n, 0, 2);
        for (int g = 0; g < GROUPS; g++)
            for (int v = 0; v < VECTORS; v++) sums[g][v] += row[v] * weights[g * weights_stride + i];
    }
}

// Multiplies as above with a matrix of `size` columns, a multiple of the vector, and gives each vector
// of the products to `keep(group, column, vector)`.
template <int GROUPS, typename T, typename F>
void each_product(const float* weights, int64_t weights_stride, const T* matrix, int64_t stride,
                  int64_t count, int64_t size, int64_t ahead, const F& keep) {
    int64_t at = 0;
    for (; at + TOGETHER * WIDTH <= size; at += TOGETHER * WIDTH) {
        Vec sums[GROUPS][TOGETHER] = {};
        multiply(weights, weights_stride, matrix + at, stride, count, ahead, sums);
        for (int g = 0; g < GROUPS; g++)
            for (int v = 0; v < TOGETHER; v++) keep(g, at + v * WIDTH, sums[g][v]);
    }
    for (; at < size; at += WIDTH) {
        Vec sums[GROUPS][1] = {};
        multiply(weights, weights_stride, matrix + at, stride, count, ahead, sums);
        for (int g = 0; g < GROUPS; g++) keep(g, at, sums[g][0]);
    }
}

// Attends with GROUPS queries of one row and key head to the first `seen` keys but the first
// `hidden` of them. `query` is already scaled [GROUPS, D], keys are columns [D, L], values are rows
// [L, D], `out` is [GROUPS, D]. A `cap` other than 0 caps scores softly. Keys and values that are
// `ahead` numbers further are fetched meanwhile.
template <typename T, int GROUPS>
void attend_head(const float* query, const T* keys, const T* values, int64_t length, int64_t hidden,
                 int64_t seen, int64_t size, int64_t ahead, float cap, float* scores, T* out) {
    const int64_t padded = (seen + WIDTH - 1) / WIDTH * WIDTH;  // at most `length`
    const auto keep_score = [&](int g, int64_t at, Vec sum) {
        store(scores + g * padded + at, cap ? tanh(sum / cap) * cap : sum);
    };
    each_product<GROUPS>(query, size, keys, length, size, padded, ahead, keep_score);
    for (int g = 0; g < GROUPS; g++) {
        float* row = scores + g * padded;
        for (int64_t i = 0; i < hidden; i++) row[i] = -std::numeric_limits<float>::infinity();
        for (int64_t i = seen; i < padded; i++) row[i] = -std::numeric_limits<float>::infinity();
        Vec most = load(row);
        for (int64_t i = WIDTH; i < padded; i += WIDTH) {
            const Vec v = load(row + i);
            most = v > most ? v : most;
        }
        const float top = largest(most);
        Vec total = {};
        for (int64_t i = 0; i < padded; i += WIDTH) {
            const Vec p = exponential(load(row + i) - top);
            store(row + i, p);
            total += p;
        }
        const float scale = 1.0f / sum(total);
        for (int64_t i = 0; i < padded; i += WIDTH) store(row + i, rounded<T>(load(row + i) * scale));
    }
    const auto keep_value = [&](int g, int64_t d, Vec sum) { store(out + g * size + d, sum); };
    each_product<GROUPS>(scores, padded, values, size, seen, size, ahead, keep_value);
}

// Rotates one head [D] by the angles of its position; the first half of the sines is negated.
template <typename T>
void turn(const T* from, const T* cos, const T* sin, int64_t size, T* to) {
    const int64_t half = size / 2;
    for (int64_t i = 0; i < size; i += WIDTH) {
        const Vec other = load(from + (i < half ? i + half : i - half));
        store(to + i, rounded<T>(load(from + i) * load(cos + i)) + other * load(sin + i));
    }
}

// Rotates queries and keys, writes the new keys and values to the cache at `position`, and attends.
// Queries share keys in groups; threads divide the pairs of row and key head.
template <typename T>
void attend_rows(const Tensor& qkv, Tensor& keys, Tensor& values, const Tensor& cos,
                 const Tensor& sin, int64_t position, int64_t groups, double scale, int64_t window,
                 double cap, Tensor& out) {
    const int64_t kv_heads = keys.size(1), size = keys.size(2), length = keys.size(3);
    const int64_t heads = kv_heads * groups, stride = (heads + 2 * kv_heads) * size;
    // Keys are read from a multiple of the vector on.
    const int64_t first = std::max(position + 1 - window, (int64_t)0);
    const int64_t base = first / WIDTH * WIDTH, hidden = first - base, seen = position + 1 - base;
    const int64_t padded = (seen + WIDTH - 1) / WIDTH * WIDTH;
    const T *from = in<T>(qkv), *c = in<T>(cos) + position * size, *s = in<T>(sin) + position * size;
    T *all_keys = keys.mutable_data_ptr<T>(), *all_values = values.mutable_data_ptr<T>();
    T* outs = out.mutable_data_ptr<T>();
    at::parallel_for(0, qkv.size(0) * kv_heads, 1, [&](int64_t begin, int64_t end) {
        std::vector<float> query(groups * size), scores(groups * padded);
        std::vector<T> turned(size);
        for (int64_t item = begin; item < end; item++) {
            const int64_t row = item / kv_heads, head = item % kv_heads;
            const T* mine = from + row * stride;
            T* key = all_keys + item * size * length;
            T* value = all_values + item * size * length;
            turn(mine + (heads + head) * size, c, s, size, turned.data());
            for (int64_t d = 0; d < size; d++) key[d * length + position] = turned[d];
            std::memcpy(value + position * size, mine + (heads + kv_heads + head) * size,
                        size * sizeof(T));
            for (int64_t g = 0; g < groups; g++) {
                turn(mine + (head * groups + g) * size, c, s, size, turned.data());
                for (int64_t d = 0; d < size; d++)
                    query[g * size + d] = (float)turned[d] * (float)scale;
            }
            T* to = outs + row * heads * size + head * groups * size;
            const int64_t ahead = item + 1 < end ? size * length : 0;  // the next item, if there is one
            for (int64_t g = 0; g < groups;) {
                const int64_t together = std::min(groups - g, (int64_t)4);
                const auto head = together == 4   ? attend_head<T, 4>
                                  : together == 3 ? attend_head<T, 3>
                                  : together == 2 ? attend_head<T, 2>
                                                  : attend_head<T, 1>;
                head(&query[g * size], key + base, value + base * size, length, hidden, seen, size,
                     ahead, (float)cap, scores.data(), to + g * size);
                g += together;
            }
        }
    });
}

// Takes `qkv` [B, (heads + 2 kv_heads) D], keys [B, kv_heads, D, L] and values [B, kv_heads, L, D],
// which are updated, and cosines and sines [L, D]. Queries see the last `window` positions; a `cap`
// other than 0 caps scores softly. Returns [B, heads D].
Tensor attend(const Tensor& qkv, Tensor& keys, Tensor& values, const Tensor& cos, const Tensor& sin,
              const Tensor& position, int64_t groups, double scale, int64_t window, double cap) {
    TORCH_CHECK(keys.size(2) % WIDTH == 0 && keys.size(3) % WIDTH == 0, "expected a head size and a cache length that are multiples of 16");
    const int64_t at = in<int64_t>(position)[0];
    TORCH_CHECK(at >= 0 && at < keys.size(3), "position ", at, " is outside the cache");
    Tensor out = at::empty({qkv.size(0), keys.size(1) * groups * keys.size(2)}, qkv.options());
    FOR_DTYPE(qkv, { attend_rows<T>(qkv, keys, values, cos, sin, at, groups, scale, window, cap, out); })
    return out;
}

// Packs a weight [V, H] for oneDNN: blocks of 64 vocabulary entries, in which pairs of inputs are
// adjacent; the last block is padded with zeros. Returns [blocks, H / 2, 64, 2].
Tensor pack_head(const Tensor& weight) {
    const int64_t rows = weight.size(0), size = weight.size(1);
    TORCH_CHECK(weight.scalar_type() == at::kBFloat16 && size % 2 == 0, "expected bfloat16 [V, even]");
    const int64_t blocks = (rows + HEAD_COLUMNS - 1) / HEAD_COLUMNS;
    Tensor packed = at::zeros({blocks, size / 2, HEAD_COLUMNS, 2}, weight.options());
    const BFloat16* from = in<BFloat16>(weight);
    BFloat16* to = packed.mutable_data_ptr<BFloat16>();
    each_row(rows, [&](int64_t row) {
        BFloat16* column = to + (row / HEAD_COLUMNS * (size / 2) * HEAD_COLUMNS + row % HEAD_COLUMNS) * 2;
        for (int64_t i = 0; i < size; i++)
            column[i / 2 * HEAD_COLUMNS * 2 + i % 2] = from[row * size + i];
    });
    return packed;
}

// Returns float32 logits [B, V] of bfloat16 hidden states [B, H] and a packed weight.
Tensor head(const Tensor& hidden, const Tensor& packed, int64_t vocab_size) {
    const int64_t rows = hidden.size(0), size = hidden.size(1), blocks = packed.size(0);
    Tensor out = at::empty({rows, vocab_size}, hidden.options().dtype(at::kFloat));
    const BFloat16 *from = in<BFloat16>(hidden), *weights = in<BFloat16>(packed);
    float* to = out.mutable_data_ptr<float>();
    at::parallel_for(0, blocks, 8, [&](int64_t begin, int64_t end) {
        std::vector<float> part(rows * HEAD_COLUMNS);
        for (int64_t block = begin; block < end; block++) {
            const int64_t first = block * HEAD_COLUMNS;
            const bool whole = first + HEAD_COLUMNS <= vocab_size;
            at::native::cpublas::brgemm(rows, HEAD_COLUMNS, size, size, HEAD_COLUMNS,
                                        whole ? vocab_size : HEAD_COLUMNS, false, from,
                                        weights + block * size * HEAD_COLUMNS,
                                        whole ? to + first : part.data());
            for (int64_t row = 0; !whole && row < rows; row++)
                std::memcpy(to + row * vocab_size + first, &part[row * HEAD_COLUMNS],
                            (vocab_size - first) * sizeof(float));
        }
        at::native::cpublas::brgemm_release();
    });
    return out;
}

// Returns the sum of e^(logit / tau - top) over one block, and stores the terms in `weights` if it
// is given. An incomplete last vector is padded with -inf.
inline float weigh(const float* logits, int64_t count, float inverse_tau, float top, float* weights) {
    Vec total = {};
    for (int64_t i = 0; i < count; i += WIDTH) {
        float last[WIDTH];
        const float* from = logits + i;
        if (count - i < WIDTH) {
            for (int64_t j = 0; j < WIDTH; j++)
                last[j] = i + j < count ? from[j] : -std::numeric_limits<float>::infinity();
            from = last;
        }
        const Vec v = exponential(load(from) * inverse_tau - top);
        if (weights) store(weights + i, v);
        total += v;
    }
    return sum(total);
}

// Draws one token per row of `logits` [B, V] at temperature tau with the numbers `uniform` [B], and
// returns ids and their log-probabilities at tau and at temperature 1, each [B].
std::tuple<Tensor, Tensor, Tensor> draw(const Tensor& logits, const Tensor& uniform, double tau) {
    const int64_t rows = logits.size(0), vocab_size = logits.size(1);
    const int64_t blocks = (vocab_size + BLOCK - 1) / BLOCK;
    Tensor token = at::empty({rows}, logits.options().dtype(at::kLong));
    Tensor log_prob_tau = at::empty({rows}, logits.options().dtype(at::kDouble));
    Tensor log_prob = at::empty_like(log_prob_tau);
    const float* from = in<float>(logits);
    const double* numbers = in<double>(uniform);
    int64_t* tokens = token.mutable_data_ptr<int64_t>();
    double *at_tau = log_prob_tau.mutable_data_ptr<double>(), *at_one = log_prob.mutable_data_ptr<double>();
    const float inverse_tau = (float)(1.0 / tau);
    at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
        std::vector<double> sums(blocks);
        std::vector<float> weights(BLOCK);
        for (int64_t row = begin; row < end; row++) {
            const float* mine = from + row * vocab_size;
            float top = mine[0];
            int64_t i = 0;
            if (vocab_size >= WIDTH) {
                Vec most = load(mine);
                for (; i + WIDTH <= vocab_size; i += WIDTH) {
                    const Vec v = load(mine + i);
                    most = v > most ? v : most;
                }
                top = largest(most);
            }
            for (; i < vocab_size; i++) top = mine[i] > top ? mine[i] : top;
            double total = 0, total_one = 0;
            for (int64_t b = 0; b < blocks; b++) {
                const int64_t first = b * BLOCK, count = std::min(BLOCK, vocab_size - first);
                sums[b] = weigh(mine + first, count, inverse_tau, top * inverse_tau, nullptr);
                total += sums[b];
                if (tau != 1.0) total_one += weigh(mine + first, count, 1.0f, top, nullptr);
            }
            // Find the block, then the token in it: the first whose cumulative weight exceeds the
            // target.
            double rest = numbers[row] * total;
            int64_t block = 0, last = 0;
            for (; block < blocks; block++) {
                if (sums[block] > 0) last = block;
                if (rest < sums[block]) break;
                rest -= sums[block];
            }
            if (block == blocks) block = last, rest = sums[block];  // after rounding errors
            const int64_t first = block * BLOCK, count = std::min(BLOCK, vocab_size - first);
            weigh(mine + first, count, inverse_tau, top * inverse_tau, weights.data());
            double inside = 0;
            for (int64_t j = 0; j < count; j++) inside += weights[j];
            rest *= inside / sums[block];
            int64_t index = 0;
            last = 0;
            for (; index < count; index++) {
                if (weights[index] > 0) last = index;
                if (rest < weights[index]) break;
                rest -= weights[index];
            }
            if (index == count) index = last;
            tokens[row] = first + index;
            const double logit = mine[first + index];
            at_tau[row] = (logit - top) * inverse_tau - std::log(total);
            at_one[row] = tau == 1.0 ? at_tau[row] : logit - top - std::log(total_one);
        }
    });
    return {token, log_prob_tau, log_prob};
}

}  // namespace

TORCH_LIBRARY(kdhpc, library) {
    library.def(
        "add_norm(Tensor(a!) x, Tensor? delta, Tensor? delta_weight, Tensor? weight, float eps) "
        "-> Tensor",
        &add_norm);
    library.def(
        "norm_queries_and_keys(Tensor(a!) qkv, Tensor weight, int heads, bool together, float eps) "
        "-> ()",
        &norm_queries_and_keys);
    library.def("activate(Tensor gate_up, bool gelu) -> Tensor", &activate);
    library.def(
        "attend(Tensor qkv, Tensor(a!) keys, Tensor(b!) values, Tensor cos, Tensor sin, "
        "Tensor position, int groups, float scale, int window, float cap) -> Tensor",
        &attend);
    library.def("pack_head(Tensor weight) -> Tensor", &pack_head);
    library.def("head(Tensor hidden, Tensor packed, int vocab_size) -> Tensor", &head);
    library.def("draw(Tensor logits, Tensor uniform, float tau) -> (Tensor, Tensor, Tensor)", &draw);
}
