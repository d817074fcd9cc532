// The mark of the C functions: the only symbols that the library shows.
#pragma once
#define GRADDROP_EXPORT extern "C" __attribute__((visibility("default")))
