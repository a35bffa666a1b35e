// The loops, written once over a vector type V. Each target_*.cpp supplies its V and instantiates Kernel<V>.
//
// How a row is read. A *step* is 2·W elements, read as two halves; W is the number of lanes of a vector. For
// f32 and f16 the halves are the first and the second W elements. For bf16 they are the even and the odd
// elements. One load gives both, because a bf16 is the upper half of a float32: a shift gives the even ones,
// a mask the odd ones. This saves the shuffle that widening in order needs. The directions and the offset are
// packed in the same order, once per layer, so the inner loop does not depend on the order.
//
// How a sum is computed. Each of the W lanes sums its own terms in *runs* of 32, then adds the runs of a
// *chunk* of a row (at most 1,024 elements) one after another. Then the lanes are added as a tree, and the
// chunks one after another. So a term passes through at most 44 + D/512 roundings for any W, including its
// own and the offset's. Four lanes give the most: 32 in a run, up to 8 runs, a tree of 2. On rows of equal
// numbers, rounding errors do not cancel; a lane without runs would lose a digit.
//
// How memory is used. A *tile* is R rows × C directions, C ≤ 6, whose sums stay in registers. Rows are loaded
// directly from their place; only ragged ends are copied. A few rows, one chunk at a time, are multiplied
// with one column of C directions after another. Meanwhile the same chunk of the next rows is prefetched:
// rows of one layer are L·D elements apart, which no hardware prefetcher predicts. Each column prefetches its
// share, so that memory is read during all multiplications. It goes to the second-level cache: if L·D is a
// power of two, the same chunk of every row falls into the same few sets of the first-level cache, and
// waiting rows would evict the rows in use.
//
// Targets must not share code from here: the linker might keep a standard-library function that was compiled
// with AVX-512 flags for all targets. So there are no std:: templates, and V is a type in an anonymous
// namespace, which makes every instantiation local to its file.

#pragma once

#include <cstddef>
#include <cstring>

#include "projection.hpp"

#ifdef _MSC_VER
#define RS_NOINLINE __declspec(noinline)
#else
#define RS_NOINLINE __attribute__((noinline))
#endif

namespace rs {

template <class V>
class Kernel {
    using Vector = typename V::Vector;

    static constexpr std::size_t lanes = V::lanes;
    static constexpr std::size_t step = 2 * lanes;
    static constexpr std::size_t columns = 6;                // C, the most directions in a tile
    static constexpr std::size_t block_rows = 12;            // share a chunk of the directions; R's multiple
    static constexpr std::size_t panel_floats = 48U << 10U;  // directions in the second-level cache: 192 KiB
    static constexpr std::size_t line = 64;
    static constexpr std::size_t run_steps = 16;  // a step is two terms of each lane

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
    // The columns of tiles are as even as possible: column t holds the directions [begin(t), begin(t + 1)).
    static std::size_t columns_of(std::size_t rank) { return (rank + columns - 1) / columns; }
    static std::size_t begin(std::size_t t, std::size_t rank) { return t * rank / columns_of(rank); }

    // Steps in a chunk, and steps for which all directions stay in the second-level cache. With few
    // directions memory is the limit, and hardware prefetchers work best on long chunks. Many directions are
    // a matrix product: the chunk of a column (12 KiB) should be used often before it leaves the first-level
    // cache.
    struct Blocking {
        std::size_t chunk_steps, panel_steps;
    };
    static Blocking blocking(std::size_t rank) {
        const std::size_t chunk = rank <= 16 ? 1024 : 512;
        const std::size_t chunks = panel_floats / rank / chunk;
        return {chunk / step, (chunks == 0 ? 1 : chunks) * chunk / step};
    }

    static std::size_t smaller(std::size_t a, std::size_t b) { return a < b ? a : b; }

    // A packed layer: the offset [steps][half][lane], then the directions [steps][half][C][lane] of each
    // column of tiles. Zeros fill the last step.
    template <class Float>
    static Float* packed_at(Float* packed, std::size_t width, std::size_t k) {
        return packed + steps_of(width) * step * (1 + k);
    }

    // Writes one direction, or the offset, to a column of `c` directions.
    static void pack_row(Type type, std::size_t width, const float* from, float* to, std::size_t c) {
        for (std::size_t at = 0; at < width; at += step, from += step, to += step * c) {
            float padded[step] = {};
            const float* values = from;
            if (width - at < step) {
                std::memcpy(padded, from, (width - at) * sizeof(float));
                values = padded;
            }
            float* const high = to + lanes * c;
            if (type == Type::bf16) {
                for (std::size_t i = 0; i < lanes; ++i) {
                    to[i] = values[2 * i];
                    high[i] = values[2 * i + 1];
                }
            } else {
                std::memcpy(to, values, lanes * sizeof(float));
                std::memcpy(high, values + lanes, lanes * sizeof(float));
            }
        }
    }

    template <int half, class Source, std::size_t R, std::size_t C, bool offset>
    static void half_step(const unsigned char* const* rows, std::size_t at, const float* origin,
                          const float* column, Vector (&sum)[R][C]) {
        Vector h[R];
        for (std::size_t r = 0; r < R; ++r) {
            const Vector value = Source::template load<half>(rows[r] + at);
            if constexpr (offset)
                h[r] = V::hold(V::subtract(value, V::load(origin + half * lanes)));
            else
                h[r] = V::hold(value);
        }
        for (std::size_t c = 0; c < C; ++c) {
            const Vector v = V::hold(V::load(column + (half * C + c) * lanes));
            for (std::size_t r = 0; r < R; ++r) sum[r][c] = V::multiply_add(h[r], v, sum[r][c]);
        }
    }

    // The share of the next rows' chunk that a column prefetches: every `of`-th step, from `first` on,
    // counted over the rows in turn.
    struct Share {
        std::size_t first, of;
    };

    // Adds one chunk of R rows × C directions to out[r][c]. It is a separate function: inlined, it makes
    // compilers run out of registers, at half the speed. Meanwhile it prefetches its share of the next
    // chunks, one from each of `next`. `runs` holds the sum of the runs. It is the caller's, so that it is in
    // memory and leaves the registers to the current run.
    template <class Source, std::size_t R, std::size_t C, bool offset>
    RS_NOINLINE static void tile(const unsigned char* const* rows, const unsigned char* const* next,
                                 Share share, const float* origin, const float* column, std::size_t steps,
                                 float* const* out, Vector (&runs)[R][C]) {
        std::size_t others = share.first;  // steps to skip before the next prefetch
        for (std::size_t s = 0; s < steps;) {
            Vector sum[R][C];
            for (std::size_t r = 0; r < R; ++r)
                for (std::size_t c = 0; c < C; ++c) sum[r][c] = V::zero();
            const std::size_t end = smaller(s + run_steps, steps);
            for (; s < end; ++s) {
                for (std::size_t r = 0; r < R; ++r) {
                    if (others-- != 0) continue;
                    others = share.of - 1;
                    for (std::size_t b = 0; b < step * Source::bytes; b += line)
                        V::prefetch(next[r] + s * step * Source::bytes + b);
                }
                const std::size_t at = s * step * Source::bytes;
                half_step<0, Source, R, C, offset>(rows, at, origin, column, sum);
                half_step<1, Source, R, C, offset>(rows, at, origin, column, sum);
                if constexpr (offset) origin += step;
                column += step * C;
            }
            if (s > run_steps)  // not the first
                for (std::size_t r = 0; r < R; ++r)
                    for (std::size_t c = 0; c < C; ++c) runs[r][c] = V::add(runs[r][c], sum[r][c]);
            else
                for (std::size_t r = 0; r < R; ++r)
                    for (std::size_t c = 0; c < C; ++c) runs[r][c] = sum[r][c];
        }
        for (std::size_t r = 0; r < R; ++r) {
            std::size_t c = 0;
            for (; c + 4 <= C; c += 4) V::add_totals(&runs[r][c], out[r] + c);
            for (; c < C; ++c) out[r][c] += V::total(runs[r][c]);
        }
    }

    // A block of rows, and the destination of each result.
    struct Block {
        const unsigned char* row[block_rows];
        const unsigned char* next[block_rows];  // the same chunk of the next rows
        float* out[block_rows];
        std::size_t rows;
    };

    // One column of C directions over a block, R rows at a time. If the last tile lacks rows, the block's
    // last row replaces them, and those results are dropped.
    template <class Source, std::size_t C, bool offset>
    static void column_of(const Block& block, std::size_t first, Share share, const float* origin,
                          const float* column, std::size_t steps) {
        constexpr std::size_t R = V::rows(C);
        for (std::size_t n = 0; n < block.rows; n += R) {
            const unsigned char* row[R];
            const unsigned char* next[R];
            float* out[R];
            float dropped[C] = {};
            Vector runs[R][C];
            for (std::size_t r = 0; r < R; ++r) {
                const std::size_t i = smaller(n + r, block.rows - 1);
                row[r] = block.row[i];
                next[r] = block.next[i];
                out[r] = n + r < block.rows ? block.out[i] + first : dropped;
            }
            tile<Source, R, C, offset>(row, next, share, origin, column, steps, out, runs);
        }
    }

    // All columns over one chunk of a block.
    template <class Source, bool offset>
    static void multiply(const Rows& job, const Block& block, std::size_t s, std::size_t steps) {
        const float* const origin = job.packed + s * step;
        for (std::size_t t = 0; t < columns_of(job.rank); ++t) {
            const std::size_t k = begin(t, job.rank);
            const std::size_t c = begin(t + 1, job.rank) - k;
            const float* const column = packed_at(job.packed, job.width, k) + s * step * c;
            const Share share = {t, columns_of(job.rank)};
            switch (c) {
                case 1: column_of<Source, 1, offset>(block, k, share, origin, column, steps); break;
                case 2: column_of<Source, 2, offset>(block, k, share, origin, column, steps); break;
                case 3: column_of<Source, 3, offset>(block, k, share, origin, column, steps); break;
                case 4: column_of<Source, 4, offset>(block, k, share, origin, column, steps); break;
                case 5: column_of<Source, 5, offset>(block, k, share, origin, column, steps); break;
                default: column_of<Source, 6, offset>(block, k, share, origin, column, steps); break;
            }
        }
    }

    // A whole job: panels of the width, blocks of rows, chunks of the panel. A ragged end of the width is a
    // separate chunk: the ends of the rows are copied to whole steps, filled with zeros.
    template <class Source, bool offset>
    static void sweep(const Rows& job) {
        const std::size_t full = job.width / step;
        const std::size_t rest = job.width % step;
        const Blocking by = blocking(job.rank);
        const auto row_at = [&job](std::size_t n, std::size_t s) {
            return job.first + static_cast<std::ptrdiff_t>(smaller(n, job.count - 1)) * job.stride +
                   s * step * Source::bytes;
        };
        const auto block_at = [&](std::size_t n) {
            Block block;
            block.rows = smaller(block_rows, job.count - n);
            for (std::size_t r = 0; r < block.rows; ++r) block.out[r] = job.out + (n + r) * job.out_stride;
            return block;
        };

        for (std::size_t n = 0; n < job.count; ++n)
            std::memset(job.out + n * job.out_stride, 0, job.rank * sizeof(float));
        for (std::size_t start = 0; start < full; start += by.panel_steps) {
            const std::size_t end = smaller(start + by.panel_steps, full);
            for (std::size_t n = 0; n < job.count; n += block_rows) {
                Block block = block_at(n);
                for (std::size_t s = start; s < end; s += by.chunk_steps) {
                    for (std::size_t r = 0; r < block.rows; ++r) {
                        block.row[r] = row_at(n + r, s);
                        block.next[r] = row_at(n + r + block_rows, s);
                    }
                    multiply<Source, offset>(job, block, s, smaller(by.chunk_steps, end - s));
                }
            }
        }
        for (std::size_t n = 0; n < job.count && rest != 0; n += block_rows) {
            Block block = block_at(n);
            unsigned char ends[block_rows][step * Source::bytes] = {};
            for (std::size_t r = 0; r < block.rows; ++r) {
                std::memcpy(ends[r], row_at(n + r, full), rest * Source::bytes);
                block.row[r] = ends[r];
                block.next[r] = ends[r];
            }
            multiply<Source, offset>(job, block, full, 1);
        }
    }

    template <class Source>
    static void project_from(const Rows& job) {
        if (job.has_offset)
            sweep<Source, true>(job);
        else
            sweep<Source, false>(job);
    }

public:
    static std::size_t packed_floats(std::size_t width, std::size_t rank) {
        return steps_of(width) * step * (1 + rank);
    }

    static void pack(Type type, std::size_t width, std::size_t rank, const float* directions,
                     const float* offset, float* packed) {
        if (offset != nullptr) pack_row(type, width, offset, packed, 1);
        for (std::size_t t = 0; t < columns_of(rank); ++t) {
            const std::size_t k = begin(t, rank);
            const std::size_t c = begin(t + 1, rank) - k;
            for (std::size_t i = 0; i < c; ++i)
                pack_row(type, width, directions + (k + i) * width, packed_at(packed, width, k) + i * lanes,
                         c);
        }
    }

    static void project(const Rows& job) {
        if (job.count == 0 || job.rank == 0) return;
        switch (job.type) {
            case Type::f32: return project_from<F32>(job);
            case Type::f16: return project_from<F16>(job);
            case Type::bf16: return project_from<Bf16>(job);
        }
    }
};

}  // namespace rs
