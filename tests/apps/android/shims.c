// What the AAR's x86_64 JNI asks of Android's C library and of ONNX Runtime, handed on to glibc and to a libonnxruntime of this
// machine (EDGEWRIGHT_ONNXRUNTIME, a path). Built three times: -DC, -DDL, -DORT; the fourth library, libm.so, is empty.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>

// The function of a library by its name: called as `name` it would be the one that is given here.
static void* found(const char* file, const char* name) {
  void* library = file == NULL ? NULL : dlopen(file, RTLD_NOW | RTLD_LOCAL);
  void* symbol = library == NULL ? NULL : dlsym(library, name);
  if (symbol == NULL) {
    fprintf(stderr, "%s has no %s: %s\n", file == NULL ? "EDGEWRIGHT_ONNXRUNTIME" : file, name, dlerror());
    _Exit(3);
  }
  return symbol;
}

#define GIVE(file, version, result, name, parameters, arguments)               \
  result give_##name parameters {                                              \
    static void* real;                                                         \
    if (real == NULL) real = found(file, #name);                               \
    return ((result(*) parameters)real)arguments;                              \
  }                                                                            \
  __asm__(".symver give_" #name "," #name "@@" version)

#ifdef C
#define LIBC "libc.so.6", "LIBC"
#define EACH(...) GIVE(__VA_ARGS__)
EACH(LIBC, void, __cxa_finalize, (void* d), (d));
EACH(LIBC, int, __cxa_atexit, (void (*f)(void*), void* a, void* d), (f, a, d));
EACH(LIBC, int, __register_atfork, (void (*a)(void), void (*b)(void), void (*c)(void), void* d), (a, b, c, d));
EACH(LIBC, void, __stack_chk_fail, (void), ());
EACH(LIBC, void*, malloc, (size_t n), (n));
EACH(LIBC, void, free, (void* p), (p));
EACH(LIBC, void*, realloc, (void* p, size_t n), (p, n));
EACH(LIBC, size_t, strlen, (const char* s), (s));
EACH(LIBC, void*, memcpy, (void* to, const void* from, size_t n), (to, from, n));
#endif

#ifdef DL
GIVE("libc.so.6", "LIBC", int, dlclose, (void* handle), (handle));
#endif

#ifdef ORT
#define ORT_FILE getenv("EDGEWRIGHT_ONNXRUNTIME")
GIVE(ORT_FILE, "VERS_1.29.0", const void*, OrtGetApiBase, (void), ());
GIVE(ORT_FILE, "VERS_1.29.0", void*, OrtSessionOptionsAppendExecutionProvider_CPU, (void* options, int arena), (options, arena));
GIVE(ORT_FILE, "VERS_1.29.0", void*, OrtSessionOptionsAppendExecutionProvider_Nnapi, (void* options, unsigned flags), (options, flags));
#endif
