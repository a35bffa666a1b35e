// The order in which the loops of kernel.hpp read rows, and directions packed in the same order.
//
// How a row is read. A *step* is 2·W elements, read as two halves; W is the number of lanes of a vector. For
// f32 and f16 the halves are the first and the second W elements. For bf16 they are the even and the odd
// elements. One load gives both, because a bf16 is the upper half of a float32: a shift gives the even ones,
// a mask the odd ones. This saves the shuffle that widening in order needs. The directions and the offset are
// packed in the same order, once per layer, so the inner loop does not depend on the order.

#pragma once

#include <cstddef>
#include <cstring>

#include "projection.hpp"

namespace rs {

// V is a vector type of a target; see kernel.hpp for what targets must not share.
template <class V>
class Packing {
protected:
    static constexpr std::size_t lanes = V::lanes;
    static constexpr std::size_t step = 2 * lanes;
    static constexpr std::size_t columns = 6;  // C, the most directions in a tile

    static std::size_t steps_of(std::size_t width) { return (width + step - 1) / step; }
    // The columns of tiles are as even as possible: column t holds the directions [begin(t), begin(t + 1)).
    static std::size_t columns_of(std::size_t rank) { return (rank + columns - 1) / columns; }
    static std::size_t begin(std::size_t t, std::size_t rank) { return t * rank / columns_of(rank); }

    // A packed layer: the offset [steps][half][lane], then the directions [steps][half][C][lane] of each
    // column of tiles. Zeros fill the last step.
    template <class Float>
    static Float* packed_at(Float* packed, std::size_t width, std::size_t k) {
        return packed + steps_of(width) * step * (1 + k);
    }

private:
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
                float even[lanes];  // arrays that overlap nothing, so that compilers use vectors
                float odd[lanes];
                for (std::size_t i = 0; i < lanes; ++i) {
                    even[i] = values[2 * i];
                    odd[i] = values[2 * i + 1];
                }
                std::memcpy(to, even, sizeof even);
                std::memcpy(high, odd, sizeof odd);
            } else {
                std::memcpy(to, values, lanes * sizeof(float));
                std::memcpy(high, values + lanes, lanes * sizeof(float));
            }
        }
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
};

}  // namespace rs
