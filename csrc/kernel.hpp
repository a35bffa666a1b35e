// The loops, written once over a vector type V. Each target_*.cpp supplies its V and instantiates Kernel<V>.
//
// How a row is read. A *step* is 2·W elements, W the lanes of a vector, read as two halves. For f32 and f16
// these are the first and the second W elements. For bf16 they are the even and the odd elements: one load
// gives both, since a bf16 is the upper half of a float32 (even ones by a shift, odd ones by a mask), which
// saves the shuffle that widening in order needs. The directions and the offset are packed once a layer in
// the same order, so the inner loop never sees it.
//
// How a sum is taken. Each of the W lanes sums its own terms over a *chunk* of a row (at most 128 steps);
// the lanes are then added as a tree, and the chunks one after the other. At most 256 terms are ever summed
// in sequence, whatever D is.
//
// How memory is used. A *tile* is R rows × C directions held in registers. With one column of tiles (K ≤ C)
// rows go from memory to registers in one sweep, and the lines of the next R rows are prefetched meanwhile:
// rows of one layer lie L·D elements apart, which no hardware prefetcher guesses. With more directions this
// is a matrix product: a block of rows, less the offset, is widened into scratch that fits the first-level
// cache, and all columns of tiles pass over it.
//
// Nothing here may be shared between targets: a function of the standard library instantiated under AVX-512
// flags could be the one that the linker keeps for everybody. So: no std:: templates, and V is a type in an
// anonymous namespace, which makes every instantiation local to its file.

#pragma once

#include <cstring>

#include "projection.hpp"

namespace rs {

template <class V>
class Kernel {
    using Vector = typename V::Vector;

    static constexpr std::size_t lanes = V::lanes;
    static constexpr std::size_t step = 2 * lanes;
    static constexpr std::size_t columns = 6;              // C, the most directions in a tile
    static constexpr std::size_t block_rows = 12;         // rows staged together: a multiple of every R
    static constexpr std::size_t block_steps = V::staged_elements / step;
    static constexpr std::size_t sweep_steps = 128;       // longest chunk of the one-sweep form
    static constexpr std::size_t panel_floats = 48 << 10;  // directions that a block is multiplied with: 192 KiB
    static constexpr std::size_t line = 64;

    // Sources: where a tile reads its rows, and how one half of a step becomes a vector of float32.
    struct F32 {
        static constexpr std::size_t bytes = 4;
        template <int half>
        static Vector load(const unsigned char* p) {
            return V::load_f32(p + half * lanes * bytes);
        }
    };
    struct F16 {
        static constexpr std::size_t bytes = 2;
        template <int half>
        static Vector load(const unsigned char* p) {
            return V::load_f16(p + half * lanes * bytes);
        }
    };
    struct Bf16 {
        static constexpr std::size_t bytes = 2;
        template <int half>
        static Vector load(const unsigned char* p) {
            return half == 0 ? V::load_bf16_even(p) : V::load_bf16_odd(p);
        }
    };

    static std::size_t steps_of(std::size_t width) { return (width + step - 1) / step; }
    // The columns of tiles are as even as can be: column t holds the directions [begin(t), begin(t + 1)).
    static std::size_t columns_of(std::size_t rank) { return (rank + columns - 1) / columns; }
    static std::size_t begin(std::size_t t, std::size_t rank) { return t * rank / columns_of(rank); }

    static std::size_t smaller(std::size_t a, std::size_t b) { return a < b ? a : b; }

    // A packed layer: the offset [steps][half][lane], then for each column of tiles its directions
    // [steps][half][C][lane]. Zeros fill the last step.
    static const float* packed_column(const float* packed, std::size_t width, std::size_t k) {
        return packed + steps_of(width) * step * (1 + k);
    }

    static void pack_step(Type type, const float* from, std::size_t count, float* to, std::size_t half_stride) {
        float padded[step] = {};
        if (count < step) {
            std::memcpy(padded, from, count * sizeof(float));
            from = padded;
        }
        for (std::size_t half = 0; half < 2; ++half, to += half_stride) {
            if (type == Type::bf16) {
                for (std::size_t i = 0; i < lanes; ++i) to[i] = from[2 * i + half];
            } else {
                std::memcpy(to, from + half * lanes, lanes * sizeof(float));
            }
        }
    }

    template <int half, class Source, std::size_t R, std::size_t C, bool offset>
    static inline void half_step(const unsigned char* const* rows, std::size_t at, const float* origin,
                                 const float* column, Vector (&sum)[R][C]) {
        Vector h[R];
        for (std::size_t r = 0; r < R; ++r) h[r] = V::hold(Source::template load<half>(rows[r] + at));
        if constexpr (offset) {
            const Vector o = V::load(origin + half * lanes);
            for (std::size_t r = 0; r < R; ++r) h[r] = V::subtract(h[r], o);
        }
        for (std::size_t c = 0; c < C; ++c) {
            const Vector v = V::hold(V::load(column + (half * C + c) * lanes));
            for (std::size_t r = 0; r < R; ++r) sum[r][c] = V::multiply_add(h[r], v, sum[r][c]);
        }
    }

    // Adds one chunk of R rows × C directions to out[r][c].
    template <class Source, std::size_t R, std::size_t C, bool offset>
    static void tile(const unsigned char* const* rows, const unsigned char* const* next, const float* origin,
                     const float* column, std::size_t steps, float* const* out) {
        Vector sum[R][C];
        for (std::size_t r = 0; r < R; ++r)
            for (std::size_t c = 0; c < C; ++c) sum[r][c] = V::zero();
        for (std::size_t s = 0; s < steps; ++s) {
            const std::size_t at = s * step * Source::bytes;
            if (next != nullptr) {
                for (std::size_t r = 0; r < R; ++r)
                    for (std::size_t b = 0; b < step * Source::bytes; b += line) V::prefetch(next[r] + at + b);
            }
            half_step<0, Source, R, C, offset>(rows, at, origin, column, sum);
            half_step<1, Source, R, C, offset>(rows, at, origin, column, sum);
            if constexpr (offset) origin += step;
            column += step * C;
        }
        for (std::size_t r = 0; r < R; ++r)
            for (std::size_t c = 0; c < C; ++c) out[r][c] += V::total(sum[r][c]);
    }

    // Copies the ragged end of R rows into zero-filled steps, so that a tile can read whole vectors.
    template <class Source, std::size_t R>
    struct Tail {
        unsigned char bytes[R][step * Source::bytes];
        const unsigned char* rows[R];

        Tail(const unsigned char* const* from, std::size_t at, std::size_t count) {
            std::memset(bytes, 0, sizeof bytes);
            for (std::size_t r = 0; r < R; ++r) {
                std::memcpy(bytes[r], from[r] + at * Source::bytes, count * Source::bytes);
                rows[r] = bytes[r];
            }
        }
    };

    // K ≤ C: from memory to registers, once. The last rows may be fewer than R; the last one then stands in
    // for those that are missing, and its results there are dropped.
    template <class Source, std::size_t C, bool offset>
    static void sweep(const Rows& job) {
        constexpr std::size_t R = V::rows(C);
        const std::size_t full = job.width / step;
        const std::size_t rest = job.width % step;
        const float* const column = packed_column(job.packed, job.width, 0);
        for (std::size_t n = 0; n < job.count; n += R) {
            const unsigned char* row[R];
            const unsigned char* ahead[R];
            float sum[R][C] = {};
            float* out[R];
            for (std::size_t r = 0; r < R; ++r) {
                const std::size_t last = job.count - 1;
                row[r] = job.first + static_cast<std::ptrdiff_t>(smaller(n + r, last)) * job.stride;
                ahead[r] = job.first + static_cast<std::ptrdiff_t>(smaller(n + r + R, last)) * job.stride;
                out[r] = sum[r];
            }
            for (std::size_t s = 0; s < full; s += sweep_steps) {
                const unsigned char* from[R];
                const unsigned char* next[R];
                for (std::size_t r = 0; r < R; ++r) {
                    from[r] = row[r] + s * step * Source::bytes;
                    next[r] = ahead[r] + s * step * Source::bytes;
                }
                tile<Source, R, C, offset>(from, next, job.packed + s * step, column + s * step * C,
                                           smaller(sweep_steps, full - s), out);
            }
            if (rest != 0) {
                const Tail<Source, R> tail(row, full * step, rest);
                tile<Source, R, C, offset>(tail.rows, nullptr, job.packed + full * step, column + full * step * C, 1,
                                           out);
            }
            for (std::size_t r = 0; r < smaller(R, job.count - n); ++r)
                for (std::size_t c = 0; c < C; ++c) job.out[(n + r) * job.out_stride + c] = sum[r][c];
        }
    }

    // Widens `steps` steps of a row, less the offset, into scratch, in packed order.
    template <class Source, bool offset>
    static void stage(const unsigned char* row, const float* origin, std::size_t steps, float* to) {
        for (std::size_t s = 0; s < steps; ++s, row += step * Source::bytes, to += step) {
            Vector low = Source::template load<0>(row);
            Vector high = Source::template load<1>(row);
            if constexpr (offset) {
                low = V::subtract(low, V::load(origin + s * step));
                high = V::subtract(high, V::load(origin + s * step + lanes));
            }
            V::store(to, low);
            V::store(to + lanes, high);
        }
    }

    // One column of C directions over the staged rows.
    template <std::size_t C>
    static void staged_column(const float* scratch, std::size_t rows, std::size_t steps, const float* column,
                              float* out, std::size_t out_stride) {
        constexpr std::size_t R = V::rows(C);
        for (std::size_t n = 0; n < rows; n += R) {
            const unsigned char* from[R];
            float* to[R];
            float unused[C];
            for (std::size_t r = 0; r < R; ++r) {
                const std::size_t row = smaller(n + r, rows - 1);
                from[r] = reinterpret_cast<const unsigned char*>(scratch + row * block_steps * step);
                to[r] = n + r < rows ? out + (n + r) * out_stride : unused;
                if (n + r >= rows)
                    for (std::size_t c = 0; c < C; ++c) unused[c] = 0;
            }
            tile<F32, R, C, false>(from, nullptr, nullptr, column, steps, to);
        }
    }

    // K > C: a matrix product, blocked. Outermost a panel of the directions that fits the second-level cache,
    // then blocks of rows, then chunks of the panel's width.
    template <class Source, bool offset>
    static void product(const Rows& job, float* scratch) {
        const std::size_t all_steps = steps_of(job.width);
        const std::size_t full = job.width / step;
        std::size_t panel_steps = panel_floats / (job.rank * step) / block_steps * block_steps;
        if (panel_steps == 0) panel_steps = block_steps;
        for (std::size_t n = 0; n < job.count; ++n) std::memset(job.out + n * job.out_stride, 0, job.rank * sizeof(float));
        for (std::size_t panel = 0; panel < all_steps; panel += panel_steps) {
            const std::size_t panel_end = smaller(panel + panel_steps, all_steps);
            for (std::size_t n = 0; n < job.count; n += block_rows) {
                const std::size_t rows = smaller(block_rows, job.count - n);
                for (std::size_t s = panel; s < panel_end; s += block_steps) {
                    const std::size_t steps = smaller(block_steps, panel_end - s);
                    const std::size_t whole = smaller(steps, full - smaller(s, full));
                    for (std::size_t r = 0; r < rows; ++r) {
                        const unsigned char* row = job.first + static_cast<std::ptrdiff_t>(n + r) * job.stride;
                        float* const to = scratch + r * block_steps * step;
                        stage<Source, offset>(row + s * step * Source::bytes, job.packed + s * step, whole, to);
                        if (whole < steps) {
                            const Tail<Source, 1> tail(&row, full * step, job.width % step);
                            stage<Source, offset>(tail.rows[0], job.packed + full * step, 1, to + whole * step);
                        }
                    }
                    const Ahead ahead = Ahead::of(job, n, s, steps, panel, panel_end, Source::bytes);
                    for (std::size_t t = 0; t < columns_of(job.rank); ++t) {
                        ahead.prefetch(job, t, columns_of(job.rank));
                        const std::size_t k = begin(t, job.rank);
                        const std::size_t c = begin(t + 1, job.rank) - k;
                        const float* const column = packed_column(job.packed, job.width, k) + s * step * c;
                        column_of(c, scratch, rows, steps, column, job.out + n * job.out_stride + k, job.out_stride);
                    }
                }
            }
        }
    }

    // What product() will stage next: `rows` row pieces of `bytes` bytes.
    struct Ahead {
        std::size_t row, rows, at, bytes;

        static Ahead of(const Rows& job, std::size_t n, std::size_t s, std::size_t steps, std::size_t panel,
                        std::size_t panel_end, std::size_t size) {
            s += steps;
            if (s >= panel_end) {
                s = panel;
                n += block_rows;
            }
            const std::size_t end = smaller(smaller(s + block_steps, panel_end) * step, job.width);
            return {n, n < job.count ? smaller(block_rows, job.count - n) : 0, s * step * size,
                    (end - s * step) * size};
        }

        // Part `part` of `parts` of it.
        void prefetch(const Rows& job, std::size_t part, std::size_t parts) const {
            for (std::size_t r = rows * part / parts; r < rows * (part + 1) / parts; ++r) {
                const unsigned char* const p = job.first + static_cast<std::ptrdiff_t>(row + r) * job.stride + at;
                for (std::size_t b = 0; b < bytes; b += line) V::prefetch(p + b);
            }
        }
    };

    static void column_of(std::size_t c, const float* scratch, std::size_t rows, std::size_t steps,
                          const float* column, float* out, std::size_t out_stride) {
        switch (c) {  // columns of more than six directions are shared out evenly, so that none has one or two
            case 3: return staged_column<3>(scratch, rows, steps, column, out, out_stride);
            case 4: return staged_column<4>(scratch, rows, steps, column, out, out_stride);
            case 5: return staged_column<5>(scratch, rows, steps, column, out, out_stride);
            default: return staged_column<6>(scratch, rows, steps, column, out, out_stride);
        }
    }

    template <class Source, bool offset>
    static void project_as(const Rows& job, float* scratch) {
        switch (job.rank) {
            case 1: return sweep<Source, 1, offset>(job);
            case 2: return sweep<Source, 2, offset>(job);
            case 3: return sweep<Source, 3, offset>(job);
            case 4: return sweep<Source, 4, offset>(job);
            case 5: return sweep<Source, 5, offset>(job);
            case 6: return sweep<Source, 6, offset>(job);
            default: return product<Source, offset>(job, scratch);
        }
    }

    template <class Source>
    static void project_from(const Rows& job, float* scratch) {
        if (job.has_offset)
            project_as<Source, true>(job, scratch);
        else
            project_as<Source, false>(job, scratch);
    }

public:
    static std::size_t packed_floats(std::size_t width, std::size_t rank) { return steps_of(width) * step * (1 + rank); }

    static std::size_t scratch_floats() { return block_rows * block_steps * step; }

    static void pack(Type type, std::size_t width, std::size_t rank, const float* directions, const float* offset,
                     float* packed) {
        const std::size_t steps = steps_of(width);
        for (std::size_t s = 0; s < steps; ++s) {
            const std::size_t count = smaller(step, width - s * step);
            if (offset != nullptr) pack_step(type, offset + s * step, count, packed + s * step, lanes);
        }
        for (std::size_t t = 0; t < columns_of(rank); ++t) {
            const std::size_t k = begin(t, rank);
            const std::size_t c = begin(t + 1, rank) - k;
            float* const column = packed + steps * step * (1 + k);
            for (std::size_t s = 0; s < steps; ++s) {
                const std::size_t count = smaller(step, width - s * step);
                for (std::size_t i = 0; i < c; ++i)
                    pack_step(type, directions + (k + i) * width + s * step, count, column + (s * 2 * c + i) * lanes,
                              c * lanes);
            }
        }
    }

    static void project(const Rows& job, float* scratch) {
        if (job.count == 0) return;
        switch (job.type) {
            case Type::f32: return project_from<F32>(job, scratch);
            case Type::f16: return project_from<F16>(job, scratch);
            case Type::bf16: return project_from<Bf16>(job, scratch);
        }
    }
};

}  // namespace rs
