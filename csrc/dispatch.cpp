// Chooses the target at run time by the features of the CPU, so that one build serves every machine.

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "projection.hpp"
#include "targets.hpp"

#ifdef RS_X86
#ifdef _MSC_VER
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#endif

namespace rs {
namespace {

#ifdef RS_X86
using Registers = std::array<std::uint32_t, 4>;  // eax, ebx, ecx, edx

Registers cpuid(std::uint32_t leaf) {
#ifdef _MSC_VER
    int r[4] = {};
    __cpuidex(r, static_cast<int>(leaf), 0);
    return {static_cast<std::uint32_t>(r[0]), static_cast<std::uint32_t>(r[1]),
            static_cast<std::uint32_t>(r[2]), static_cast<std::uint32_t>(r[3])};
#else
    Registers r = {};
    // The registers stay zero if the leaf does not exist.
    __get_cpuid_count(leaf, 0, r.data(), r.data() + 1, r.data() + 2, r.data() + 3);
    return r;
#endif
}

// Returns the registers that the operating system saves when it switches threads. AVX is usable only if it
// saves them.
std::uint64_t saved_state() {
#ifdef _MSC_VER
    return _xgetbv(0);
#else
    std::uint32_t low = 0;
    std::uint32_t high = 0;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return static_cast<std::uint64_t>(high) << 32U | low;
#endif
}

bool has_bits(std::uint64_t value, std::uint64_t bits) { return (value & bits) == bits; }

struct X86 {
    bool avx2 = false;
    bool avx512 = false;
};

X86 ask_cpu() {
    constexpr std::uint32_t fma = 1U << 12U;
    constexpr std::uint32_t osxsave = 1U << 27U;
    constexpr std::uint32_t avx = 1U << 28U;
    constexpr std::uint32_t f16c = 1U << 29U;
    constexpr std::uint32_t avx2 = 1U << 5U;
    constexpr std::uint32_t avx512f = 1U << 16U;
    constexpr std::uint64_t ymm = 0x06;
    constexpr std::uint64_t zmm = 0xE6;

    X86 found;
    if (!has_bits(cpuid(1)[2], fma | osxsave | avx | f16c)) return found;
    const std::uint64_t saved = saved_state();
    const std::uint32_t extended = cpuid(7)[1];
    found.avx2 = has_bits(saved, ymm) && has_bits(extended, avx2);
    found.avx512 = found.avx2 && has_bits(saved, zmm) && has_bits(extended, avx512f);
    return found;
}
#endif

}  // namespace

std::vector<const Target*> available_targets() {
    std::vector<const Target*> targets = {&scalar_target};
#ifdef RS_X86
    static const X86 cpu = ask_cpu();
    if (cpu.avx2) targets.push_back(&avx2_target);
    if (cpu.avx512) targets.push_back(&avx512_target);
#endif
#ifdef RS_NEON
    targets.push_back(&neon_target);
#endif
    return targets;
}

// The variable is read at every call, so that a test or a benchmark can switch targets within one process.
const Target& chosen_target() {
    const std::vector<const Target*> targets = available_targets();
    const char* const wanted = std::getenv("RS_GGUF_KERNEL");
    if (wanted == nullptr || *wanted == '\0') return *targets.back();
    const auto found = std::find_if(targets.begin(), targets.end(), [wanted](const Target* target) {
        return std::string(wanted) == target->name;
    });
    if (found != targets.end()) return **found;
    std::string names;
    for (const Target* target : targets) names += std::string(names.empty() ? "" : ", ") + target->name;
    throw std::invalid_argument("RS_GGUF_KERNEL: this machine runs " + names + ", got " + wanted);
}

}  // namespace rs
