// Names with the instruction set that a file is compiled for, and the switch over element types.
#pragma once

#define SYNKERN_CONCAT_(a, b) a##b
#define SYNKERN_CONCAT(a, b) SYNKERN_CONCAT_(a, b)
#define SYNKERN_STRING_(a) #a
#define SYNKERN_STRING(a) SYNKERN_STRING_(a)

#define SYNKERN_BY_DTYPE(dtype, function, ...) \
  switch (dtype) {                             \
    case DType::float32:                       \
      return function<float>(__VA_ARGS__);     \
    case DType::float64:                       \
      return function<double>(__VA_ARGS__);    \
    case DType::bfloat16:                      \
      return function<bfloat16>(__VA_ARGS__);  \
    case DType::float16:                       \
      return function<float16>(__VA_ARGS__);   \
  }
