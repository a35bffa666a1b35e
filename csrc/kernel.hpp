// The loops, written once over a vector type V. Each target_*.cpp supplies its V and instantiates Kernel<V>.
// packing.hpp says in which order rows and directions are read.
//
// How a sum is computed. Each of the W lanes sums its own terms in *runs* of 32, then adds the runs of a
// *chunk* of a row (at most 1,024 elements) one after another. Then the lanes are added as a tree, and the
// chunks one after another. So a term passes through at most 44 + D/512 roundings for any W, including its
// own and the offset's. Four lanes give the most: 32 in a run, up to 8 runs, a tree of 2. On rows of equal
// numbers, rounding errors do not cancel; a lane without runs would lose a digit.
//
// How memory is used. A *tile* is R rows × C directions, C ≤ 6, whose sums stay in registers. Rows are loaded
// directly from their place; only ragged ends are copied. A few rows, one chunk at a time, are multiplied
// with one column of C directions after another. If one column holds all directions, memory is the limit:
// then the chunk that follows is prefetched, of the same rows or of the next ones. Rows of one layer are L·D
// elements apart, which no hardware prefetcher predicts. Four rows are few enough for the first-level cache
// even if L·D is a power of two, when a chunk of every row falls into the same few sets. With more columns
// multiplications are the limit, and prefetching would only take their turns to load.
//
// Targets must not share code from here: the linker might keep a standard-library function that was compiled
// with AVX-512 flags for all targets. So there are no std:: templates, and V is a type in an anonymous
// namespace, which makes every instantiation local to its file.

#pragma once

#include <cstddef>
#include <cstring>

#include "packing.hpp"
#include "projection.hpp"

#ifdef _MSC_VER
#define RS_NOINLINE __declspec(noinline)
#else
#define RS_NOINLINE __attribute__((noinline))
#endif

namespace rs {

template <class V>
class Kernel : public Packing<V> {
    using Vector = typename V::Vector;

    using Layout = Packing<V>;

    static constexpr std::size_t lanes = Layout::lanes;
    static constexpr std::size_t step = Layout::step;
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

    static std::size_t smaller(std::size_t a, std::size_t b) { return a < b ? a : b; }

    // Steps in a chunk, steps for which all directions stay in the second-level cache, and rows in a block.
    // With few directions memory is the limit, and hardware prefetchers work best on few rows and long
    // chunks. Many directions are a matrix product: the chunk of a column (12 KiB) should be used often
    // before it leaves the first-level cache. The chunks of a panel are as even as possible, because what is
    // prefetched is as long as the chunk before it.
    struct Blocking {
        std::size_t chunk_steps, panel_steps, rows;
    };
    static Blocking blocking(std::size_t rank, std::size_t steps) {
        const std::size_t longest = (rank <= 16 ? 1024 : 512) / step;
        const std::size_t room = panel_floats / rank / step;
        const std::size_t panel = smaller(steps, room < longest ? longest : room / longest * longest);
        const std::size_t chunks = (panel + longest - 1) / longest;
        return {chunks == 0 ? 1 : (panel + chunks - 1) / chunks, panel == 0 ? 1 : panel,
                Layout::columns_of(rank) == 1 ? V::rows(rank) : block_rows};
    }

    // Adds half a step to the sums. The fewer of rows and directions stay in registers, the others pass by.
    template <int half, class Source, std::size_t R, std::size_t C, bool offset>
    static void half_step(const unsigned char* const* rows, std::size_t at, const float* origin,
                          const float* column, Vector (&sum)[R][C]) {
        const auto activation = [=](std::size_t r) {
            const Vector h = Source::template load<half>(rows[r] + at);
            if constexpr (offset) return V::subtract(h, V::load(origin + half * lanes));
            return h;
        };
        const auto direction = [=](std::size_t c) { return V::load(column + (half * C + c) * lanes); };
        if constexpr (C < R) {
            Vector v[C];
            for (std::size_t c = 0; c < C; ++c) v[c] = direction(c);
            for (std::size_t r = 0; r < R; ++r) {
                const Vector h = activation(r);
                for (std::size_t c = 0; c < C; ++c) sum[r][c] = V::multiply_add(h, v[c], sum[r][c]);
            }
        } else {
            Vector h[R];
            for (std::size_t r = 0; r < R; ++r) h[r] = activation(r);
            for (std::size_t c = 0; c < C; ++c) {
                const Vector v = direction(c);
                for (std::size_t r = 0; r < R; ++r) sum[r][c] = V::multiply_add(h[r], v, sum[r][c]);
            }
        }
    }

    // Adds one chunk of R rows × C directions to out[r][c]. It is a separate function: inlined, it makes
    // compilers run out of registers, at half the speed. `runs` holds the sum of the runs. It is the
    // caller's, so that it is in memory and leaves the registers to the current run.
    template <class Source, std::size_t R, std::size_t C, bool offset>
    RS_NOINLINE static void tile(const unsigned char* const* rows, std::ptrdiff_t ahead, const float* origin,
                                 const float* column, std::size_t steps, float* const* out,
                                 Vector (&runs)[R][C]) {
        // A processor starts two multiplications a cycle and ends each four cycles later: it wants eight
        // sums.
        constexpr std::size_t halves = R * C <= 4 ? 2 : 1;
        for (std::size_t s = 0; s < steps;) {
            Vector sum[halves][R][C];
            for (auto& half : sum)
                for (auto& row : half)
                    for (Vector& one : row) one = V::zero();
            const std::size_t end = smaller(s + run_steps, steps);
            for (; s < end; ++s) {
                const std::size_t at = s * step * Source::bytes;
                if (ahead != 0)
                    for (std::size_t r = 0; r < R; ++r)
                        for (std::size_t b = 0; b < step * Source::bytes; b += line)
                            V::prefetch(rows[r] + ahead + at + b);
                half_step<0, Source, R, C, offset>(rows, at, origin, column, sum[0]);
                half_step<1, Source, R, C, offset>(rows, at, origin, column, sum[halves - 1]);
                if constexpr (offset) origin += step;
                column += step * C;
            }
            for (std::size_t r = 0; r < R; ++r)
                for (std::size_t c = 0; c < C; ++c) {
                    Vector run = sum[0][r][c];  // NOLINT(misc-const-correctness): with two halves it changes
                    if constexpr (halves == 2) run = V::add(run, sum[1][r][c]);
                    runs[r][c] = s > run_steps ? V::add(runs[r][c], run) : run;
                }
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
        float* out[block_rows];
        std::size_t rows;
        std::ptrdiff_t ahead;  // from these bytes to the ones to prefetch; 0 for none
    };

    // One column of C directions over a block, R rows at a time. If the last tile lacks rows, the block's
    // last row replaces them, and those results are dropped.
    template <class Source, std::size_t C, bool offset>
    static void column_of(const Block& block, std::size_t k, const float* origin, const float* column,
                          std::size_t steps) {
        constexpr std::size_t R = V::rows(C);
        for (std::size_t n = 0; n < block.rows; n += R) {
            const unsigned char* row[R];
            float* out[R];
            float dropped[C] = {};
            Vector runs[R][C];
            for (std::size_t r = 0; r < R; ++r) {
                row[r] = block.row[smaller(n + r, block.rows - 1)];
                out[r] = n + r < block.rows ? block.out[n + r] + k : dropped;
            }
            tile<Source, R, C, offset>(row, block.ahead, origin, column, steps, out, runs);
        }
    }

    // All columns over one chunk of a block.
    template <class Source, bool offset>
    static void multiply(const Rows& job, const Block& block, std::size_t s, std::size_t steps) {
        const float* const origin = job.packed + s * step;
        for (std::size_t t = 0; t < Layout::columns_of(job.rank); ++t) {
            const std::size_t k = Layout::begin(t, job.rank);
            const std::size_t c = Layout::begin(t + 1, job.rank) - k;
            const float* const column = Layout::packed_at(job.packed, job.width, k) + s * step * c;
            switch (c) {
                case 1: column_of<Source, 1, offset>(block, k, origin, column, steps); break;
                case 2: column_of<Source, 2, offset>(block, k, origin, column, steps); break;
                case 3: column_of<Source, 3, offset>(block, k, origin, column, steps); break;
                case 4: column_of<Source, 4, offset>(block, k, origin, column, steps); break;
                case 5: column_of<Source, 5, offset>(block, k, origin, column, steps); break;
                default: column_of<Source, 6, offset>(block, k, origin, column, steps); break;
            }
        }
    }

    // A whole job: panels of the width, blocks of rows, chunks of the panel. A ragged end of the width is a
    // separate chunk: the ends of the rows are copied to whole steps, filled with zeros.
    template <class Source, bool offset>
    static void sweep(const Rows& job) {
        constexpr std::size_t step_bytes = step * Source::bytes;
        const std::size_t full = job.width / step;
        const std::size_t rest = job.width % step;
        const Blocking by = blocking(job.rank, full);
        const bool few = Layout::columns_of(job.rank) == 1;
        const auto block_at = [&](std::size_t n, std::size_t s) {
            Block block;
            block.rows = smaller(by.rows, job.count - n);
            block.ahead = 0;
            for (std::size_t r = 0; r < block.rows; ++r) {
                block.row[r] = job.first + static_cast<std::ptrdiff_t>(n + r) * job.stride + s * step_bytes;
                block.out[r] = job.out + (n + r) * job.out_stride;
            }
            return block;
        };

        for (std::size_t n = 0; n < job.count; ++n)
            std::memset(job.out + n * job.out_stride, 0, job.rank * sizeof(float));
        for (std::size_t start = 0; start < full; start += by.panel_steps) {
            const std::size_t end = smaller(start + by.panel_steps, full);
            for (std::size_t n = 0; n < job.count; n += by.rows) {
                for (std::size_t s = start; s < end; s += by.chunk_steps) {
                    Block block = block_at(n, s);
                    if (few && s + by.chunk_steps < end)
                        block.ahead = static_cast<std::ptrdiff_t>(by.chunk_steps * step_bytes);
                    else if (few && n + by.rows < job.count)
                        block.ahead = static_cast<std::ptrdiff_t>(by.rows) * job.stride -
                                      static_cast<std::ptrdiff_t>((s - start) * step_bytes);
                    multiply<Source, offset>(job, block, s, smaller(by.chunk_steps, end - s));
                }
            }
        }
        for (std::size_t n = 0; n < job.count && rest != 0; n += by.rows) {
            Block block = block_at(n, full);
            unsigned char ends[block_rows][step_bytes] = {};
            for (std::size_t r = 0; r < block.rows; ++r) {
                std::memcpy(ends[r], block.row[r], rest * Source::bytes);
                block.row[r] = ends[r];
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
