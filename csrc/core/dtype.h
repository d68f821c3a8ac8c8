#pragma once

namespace synkern {

enum class DType : int { float32, float64, bfloat16, float16 };

}  // namespace synkern
