// ONNX Runtime's C API: out of the xcframework on Apple platforms, else from a folder named with -Xcc -I.
#pragma once

#if __has_include(<onnxruntime/onnxruntime_c_api.h>)
#include <onnxruntime/onnxruntime_c_api.h>
#else
#include <onnxruntime_c_api.h>
#endif
