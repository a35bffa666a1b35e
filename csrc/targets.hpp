// The targets of this build (CMakeLists.txt), one object per file. Only dispatch.cpp uses them all.

#pragma once

#include "projection.hpp"

namespace rs {

extern const Target scalar_target;
#ifdef RS_X86
extern const Target avx2_target;
extern const Target avx512_target;
#endif
#ifdef RS_NEON
extern const Target neon_target;
#endif

}  // namespace rs
