// Marks the C functions, which are the only symbols that the library exports.
#pragma once
#define GRADDROP_EXPORT extern "C" __attribute__((visibility("default")))
